"""Read, split and tokenize a caption file of the size of Flickr30k.

    python -m benchmarks.captions           # a synthetic file, in four layouts
    python -m benchmarks.captions FILE ...  # these files

The synthetic file has 31,783 images with five captions each. Its words are drawn from a Zipf
distribution over 20,000 random ones, and its captions have up to 82 words, as in the original.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
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
    """Write a results.csv of `n_photos` images with five captions each."""
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


def write_layouts(path: Path) -> list[Path]:
    """Write the captions of a results.csv in other layouts. Returns all files."""
    captions: dict[str, list[str]] = {}
    for line in path.read_text().splitlines()[1:]:
        name, _, caption = line.split("| ", 2)
        captions.setdefault(name, []).append(caption)
    texts = {
        "captions.txt": "image,caption\n" + "".join(
            f'{name},"{text}"\n' for name, of_image in captions.items() for text in of_image),
        "results.token": "".join(
            f"{name}#{i}\t{text}\n" for name, of_image in captions.items()
            for i, text in enumerate(of_image)),
        "dataset.json": json.dumps({"images": [
            {"filename": name, "split": "train", "sentences": [{"raw": t} for t in of_image]}
            for name, of_image in captions.items()]}),
    }
    for name, text in texts.items():
        path.with_name(name).write_text(text)
    return [path, *map(path.with_name, texts)]


def measure(path: Path) -> None:
    """Print the seconds of each stage and the peak memory of this process."""
    def memory() -> float:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1e9 if sys.platform == "darwin" else 1e6)

    importlib.import_module("torch")  # encode imports it, which takes seconds
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
    tokens = len(tokenizer.encode(train)) + len(tokenizer.encode(val))
    clock.append(time.perf_counter())
    stages = zip(("read", "split", "vocabulary", "tokenize"), clock, clock[1:], strict=False)
    print(f"{path.name:20} " + "  ".join(f"{name} {end - start:.2f} s"
                                         for name, start, end in stages)
          + f"  all {clock[-1] - clock[0]:.2f} s   {tokens:,} captions, {len(tokenizer):,} words, "
          f"{memory():.2f} GB at most, {imported:.2f} GB before", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Measure each file in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    args = parser.parse_args(argv)
    if len(args.files) == 1:
        measure(args.files[0])
        return 0
    with tempfile.TemporaryDirectory() as folder:
        files = args.files
        if not files:
            write_captions(Path(folder) / "results.csv", N_PHOTOS)
            files = write_layouts(Path(folder) / "results.csv")
        for file in files:
            subprocess.run([sys.executable, "-m", "benchmarks.captions", str(file)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
