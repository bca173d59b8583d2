"""A caption file of Flickr30k's full size: read, split and tokenize it.

    python -m benchmarks.captions

The file is synthetic: 31,783 photos with five captions each, words drawn from a Zipf law over
20,000 made-up ones, lengths up to 82 words as in the original.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from src.data.captions import read_annotations
from src.data.source import split_by_image
from src.models.tokenizer import Tokenizer

N_PHOTOS = 31_783


def write_captions(path: Path, n_photos: int, seed: int = 0) -> None:
    """Write a results.csv of `n_photos` photos with five captions each."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, length)) for length in rng.integers(2, 11, 20_000)]
    lengths = rng.lognormal(np.log(11.5), 0.42, 5 * n_photos).astype(int).clip(1, 82)
    ids = iter((rng.zipf(1.2, lengths.sum()) % len(words)).tolist())
    with open(path, "w", encoding="utf-8") as file:
        file.write("image_name| comment_number| comment\n")
        for row, length in enumerate(lengths.tolist()):
            caption = " ".join(words[next(ids)] for _ in range(length))
            file.write(f"{1_000_000 + row // 5}.jpg| {row % 5}| {caption} .\n")


def main() -> int:
    """Print seconds of each stage and the peak memory of the whole process."""
    def memory() -> float:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1e9 if sys.platform == "darwin" else 1e6)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotations.csv"
        write_captions(path, N_PHOTOS)
        imported = memory()
        clock = [time.perf_counter()]
        annotations = read_annotations(path)
        clock.append(time.perf_counter())
        splits = split_by_image(annotations.records, 0.1, seed=0)
        clock.append(time.perf_counter())
        train = [caption for record in splits["train"] for caption in record.captions]
        tokenizer = Tokenizer.from_captions(train, min_freq=2, context_length=32)
        clock.append(time.perf_counter())
        val = [caption for record in splits["val"] for caption in record.captions]
        tokens = tokenizer.encode(train), tokenizer.encode(val)
        clock.append(time.perf_counter())
    for stage, start, end in zip(("read", "split", "vocabulary", "tokenize"), clock, clock[1:],
                                 strict=False):
        print(f"{stage:12}{end - start:7.2f} s")
    print(f"{'all':12}{clock[-1] - clock[0]:7.2f} s   {annotations.rows:,} captions, "
          f"{len(tokenizer):,} words, tokens {sum(map(len, tokens)):,}")
    print(f"peak memory {memory():.2f} GB, of which {imported:.2f} GB before the first stage")
    return 0


if __name__ == "__main__":
    sys.exit(main())
