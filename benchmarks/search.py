"""Search: what a query costs, cold and warm, alone and in batches, and how it grows.

    python -m benchmarks.search            # faiss-cpu and open_clip_torch are compared if installed

Embeddings are random unit rows and the weights random: neither changes the time.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import installed, interleaved, machine, ratio, seconds, spread
from src.checkpoint import save_checkpoint
from src.image_file import write_image
from src.index import ImageIndex, update_index
from src.model import DualEncoder, ModelConfig
from src.query import embed_queries
from src.tokenizer import Tokenizer

N_FLICKR30K = 31_783
TEXT = "two dogs running on the beach"


def make_model(image_size: int) -> tuple[DualEncoder, Tokenizer]:
    """A model of Flickr30k's size with random weights."""
    words = TEXT.split() + [f"word{i}" for i in range(10_000)]
    tokenizer = Tokenizer.from_captions([" ".join(words)], 1, 32)
    return DualEncoder(ModelConfig(len(tokenizer), image_size=image_size)).eval(), tokenizer


def make_photos(folder: Path, count: int) -> None:
    """JPEGs of 500x375 with some detail."""
    folder.mkdir()
    for i in range(count):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (25, 20, 3)).repeat(15, 0).repeat(25, 1)
        noise = rng.integers(-20, 20, coarse.shape)
        write_image(folder / f"{i:05}.jpg", (coarse + noise).clip(0, 255).astype(np.uint8))


def unit_rows(count: int, seed: int = 0) -> np.ndarray:
    """(count, 256) float32."""
    rows = np.random.default_rng(seed).standard_normal((count, 256), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def text_encoding() -> None:
    """One text through our tower and through CLIP ViT-B/32's, tokenizing included."""
    model, tokenizer = make_model(64)

    def ours() -> object:
        return model.encode_text(tokenizer.encode([TEXT]))

    print("\nencoding one text")
    with torch.inference_mode():
        if not installed("open_clip_torch"):
            print(f"  ours {spread(seconds(ours, 50))}; CLIP ViT-B/32: open_clip_torch is missing")
            return
        import open_clip

        clip = open_clip.create_model("ViT-B-32").eval()
        tokenize = open_clip.get_tokenizer("ViT-B-32")
        own, theirs = interleaved([ours, lambda: clip.encode_text(tokenize([TEXT]))], 50)
    print(f"  ours {spread(own)}; CLIP ViT-B/32 of open_clip {spread(theirs)}; "
          f"ratio {ratio(theirs, own)}")


def cold_and_build(folder: Path) -> None:
    """Index build at 224 pixels, and a whole `python search.py` from start to answer."""
    model, tokenizer = make_model(224)
    checkpoint = folder / "results" / "models" / "flickr30k_clip_best.pth"
    save_checkpoint(checkpoint, model, tokenizer, epoch=0, metrics={}, args={})
    make_photos(folder / "photos", 256)
    command = [sys.executable, "search.py", TEXT, "--images", str(folder / "photos"),
               "--results-dir", str(folder / "results")]

    def run() -> None:
        subprocess.run(command, check=True, capture_output=True)

    (built,) = interleaved([lambda: update_index(
        Path(tempfile.mkdtemp(dir=folder)), folder / "photos", "x", model)], 1)
    print("\nindex build, 256 JPEGs of 500x375 at 224 pixels: "
          f"{256 / built[0]:.1f} photos a second")
    print(f"python search.py, start to answer, index there: {spread(seconds(run), 1, 's')}; "
          "of which import torch alone "
          + spread(seconds(lambda: subprocess.run([sys.executable, "-c", "import torch"])), 1, "s"))


def growth(folder: Path) -> None:
    """A warm query, and 100 at a time, over memory-mapped matrices, beside FAISS."""
    model, tokenizer = make_model(64)
    query = embed_queries(model, tokenizer, [TEXT])[0]
    hundred = torch.from_numpy(unit_rows(100, seed=1))
    print("\nphotos       one query                    queries/s by 100    "
          "time / FAISS flat: one, by 100")
    for count in (1_000, 10_000, N_FLICKR30K, 100_000, 1_000_000):
        path = folder / "rows.npy"
        np.save(path, unit_rows(count))
        matrix = np.load(path, mmap_mode="c")
        index = ImageIndex("", [""] * count, [], matrix)
        searches = [lambda i=index: i.search(query.embedding[None], 10),
                    lambda i=index: i.search(hundred, 10)]
        against = "faiss-cpu is missing"
        if installed("faiss-cpu"):
            import faiss

            flat = faiss.IndexFlatIP(256)
            flat.add(np.asarray(matrix))
            searches += [lambda f=flat: f.search(query.embedding[None].numpy(), 10),
                         lambda f=flat: f.search(hundred.numpy(), 10)]
        one, many, *theirs = interleaved(searches, 9)
        if theirs:
            against = f"{ratio(one, theirs[0])}, {ratio(many, theirs[1])}"
        print(f"{count:9,}   {spread(one):27}  {100 / sorted(many)[4]:8,.0f}            {against}")


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
