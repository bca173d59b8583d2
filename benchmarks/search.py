"""Measure search: a query with and without start-up, alone and in batches, for many sizes.

    python -m benchmarks.search            # compares faiss-cpu and open_clip_torch if installed

Embeddings and weights are random, which does not change the time. Ratios are of alternating calls;
set OMP_NUM_THREADS on a shared machine.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.timing import installed, interleaved, machine, ratio, seconds, spread
from src.data.images import write_image
from src.models.checkpoint import save_checkpoint
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.search.index import ImageIndex
from src.search.query import WordTable, embed_queries
from src.search.update_index import update_index

N_FLICKR30K = 31_783
REPEATS = {1_000: 999, 10_000: 299, N_FLICKR30K: 99, 100_000: 29, 1_000_000: 9}
TEXT = "two dogs running on the beach"


def make_model(image_size: int) -> tuple[DualEncoder, Tokenizer]:
    """Return a model of Flickr30k's size with random weights."""
    words = TEXT.split() + [f"word{i}" for i in range(10_000)]
    tokenizer = Tokenizer.from_captions([" ".join(words)], 1, 32)
    return DualEncoder(ModelConfig(len(tokenizer), image_size=image_size)).eval(), tokenizer


def make_images(folder: Path, count: int) -> None:
    """Write JPEGs of 500x375 with some detail."""
    folder.mkdir()
    for i in range(count):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (25, 20, 3)).repeat(15, 0).repeat(25, 1)
        noise = rng.integers(-20, 20, coarse.shape)
        write_image(folder / f"{i:05}.jpg", (coarse + noise).clip(0, 255).astype(np.uint8))


def unit_rows(count: int, seed: int = 0) -> np.ndarray:
    """Return (count, 256) float32 unit vectors."""
    rows = np.random.default_rng(seed).standard_normal((count, 256), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_table() -> WordTable:
    """Return the word table of that model."""
    model, tokenizer = make_model(64)
    return WordTable("", tokenizer.words, {}, model.word_embeddings().numpy())


def text_encoding() -> None:
    """Print the time to embed a text, and that of CLIP ViT-B/32, including tokenization."""
    table = make_table()

    def ours() -> object:
        return embed_queries(table, [TEXT])

    print("\nencoding one text")
    if not installed("open_clip_torch"):
        print(f"  ours {spread(seconds(ours, 99))}; CLIP ViT-B/32: open_clip_torch is missing")
        return
    import open_clip
    import torch

    clip = open_clip.create_model("ViT-B-32").eval()
    tokenize = open_clip.get_tokenizer("ViT-B-32")
    with torch.inference_mode():
        own, theirs = interleaved([ours, lambda: clip.encode_text(tokenize([TEXT]))], 50)
    print(f"  ours {spread(own)}; CLIP ViT-B/32 of open_clip {spread(theirs)}; "
          f"ratio {ratio(theirs, own)}")


def cold_and_build(folder: Path) -> None:
    """Print the speed of indexing, and the time of `python search.py` from start to answer."""
    model, tokenizer = make_model(224)
    checkpoint = folder / "results" / "models" / "flickr30k_clip_best.pth"
    save_checkpoint(checkpoint, model, tokenizer, epoch=0, metrics={}, args={})
    make_images(folder / "photos", 256)
    command = [sys.executable, "search.py", TEXT, "--images", str(folder / "photos"),
               "--results-dir", str(folder / "results")]

    def run(command: list[str]) -> None:
        subprocess.run(command, check=True, capture_output=True)

    (built,) = interleaved([lambda: update_index(
        Path(tempfile.mkdtemp(dir=folder)), folder / "photos", "x", 256, lambda: model)], 1)
    print("\nindex build, 256 JPEGs of 500x375 at 224 pixels: "
          f"{256 / built[0]:.1f} photos a second")
    own, numpy_alone, torch_alone = interleaved([
        lambda: run(command), lambda: run([sys.executable, "-c", "import numpy"]),
        lambda: run([sys.executable, "-c", "import torch"])], 9)
    print(f"python search.py, start to answer, index up to date: {spread(own, 1, 's')}; "
          f"'import numpy' {spread(numpy_alone, 1, 's')}, which it needs, and 'import torch' "
          f"{spread(torch_alone, 1, 's')}, which it does not need")


def growth(folder: Path) -> None:
    """Print the time of one query and of 100 at once, and that of FAISS."""
    query = embed_queries(make_table(), [TEXT])[0].embedding[None]
    hundred = unit_rows(100, seed=1)
    print("\nphotos       one query                    queries/s by 100    "
          "time / FAISS flat: one, by 100")
    for count, repeats in REPEATS.items():
        path = folder / "rows.npy"
        np.save(path, unit_rows(count))
        matrix = np.asarray(np.load(path, mmap_mode="c"))
        index = ImageIndex("", [""] * count, [], matrix)
        searches = [lambda i=index: i.search(query, 10), lambda i=index: i.search(hundred, 10)]
        flat = None
        if installed("faiss-cpu"):
            import faiss

            flat = faiss.IndexFlatIP(256)
            flat.add(matrix)
            searches += [lambda f=flat: f.search(query, 10), lambda f=flat: f.search(hundred, 10)]
        # Separately: a batch affects the caches and the threads of other libraries.
        one, *one_of_theirs = interleaved(searches[::2], repeats)
        many, *many_of_theirs = interleaved(searches[1::2], max(5, repeats // 9))
        against = (f"{ratio(one, one_of_theirs[0])}, {ratio(many, many_of_theirs[0])}"
                   if flat else "faiss-cpu is missing")
        print(f"{count:9,}   {spread(one):27}  {100 / sorted(many)[len(many) // 2]:8,.0f}"
              f"            {against}", flush=True)


def main() -> int:
    """Print every table."""
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        text_encoding()
        cold_and_build(Path(folder))
        growth(Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
