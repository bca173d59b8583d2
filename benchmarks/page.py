"""Measure the search page: bytes, milliseconds per query in Chromium, and the recall with int8.

    python -m benchmarks.page            # needs chromium and selenium; recall needs train.py --demo

Embeddings, words and captions are random, except for the recall; the time does not depend on them.
"""

from __future__ import annotations

import base64
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.search import N_FLICKR30K, unit_rows
from benchmarks.timing import installed, machine
from src.data.dataset import Flickr30kDataset
from src.data.images import write_image
from src.data.pixel_store import PixelStore, store_size
from src.data.source import scan_dataset
from src.evaluation.embed import embed_images, embed_tokens
from src.evaluation.metrics import retrieval_metrics
from src.models.checkpoint import load_checkpoint
from src.search.page import quantize, write_page

N_WORDS = 10_000
QUERY = "word5 word77 word301 word4000 word9 word12"
MEASURE = """
const query = encode(arguments[0]);
const spread = (run, repeats) => {
  const times = [];
  for (let i = 0; i < repeats; i++) {
    const start = performance.now(); run(); times.push(performance.now() - start);
  }
  times.sort((a, b) => a - b);
  return [0, 0.5, 0.9, 1].map((share) => times[Math.round(share * (repeats - 1))]);
};
const score = spread(() => bestPhotos(query.vector, 24), 101);
const thousand = spread(() => { for (let i = 0; i < 1000; i++) encode(arguments[0]); }, 9);
return {score, encode_us: thousand[1]};
"""


def chromium():  # noqa: ANN201 (selenium is optional)
    """Return a headless browser with its own profile."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update",
                 "--disable-sync", f"--user-data-dir={tempfile.mkdtemp()}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def queries(folder: Path) -> None:
    """Print size and speed of pages with growing numbers of images, with five captions each."""
    from selenium.webdriver.support.ui import WebDriverWait

    picture = folder / "picture.png"
    write_image(picture, np.zeros((48, 64, 3), np.uint8))
    words = ["<pad>", "<unk>"] + [f"word{i}" for i in range(N_WORDS)]
    vectors = unit_rows(len(words), seed=1)
    browser = chromium()
    print("\nphotos      data/, MB    score all and take 24, ms     encode a text, us")
    for count in (1_000, N_FLICKR30K, 100_000):
        page = folder / str(count)
        captions = [[f"{QUERY} number {i} of photo {n}" for i in range(5)] for n in range(count)]
        written = write_page(
            page, words=words, word_embeddings=vectors,
            names=[f"{i}.jpg" for i in range(count)], image_embeddings=unit_rows(count),
            captions=captions, paths=[picture] * count, progress=False)
        browser.get((page / "index.html").as_uri())
        WebDriverWait(browser, 120, 0.1).until(lambda b, n=count: b.execute_script(
            "return typeof photos !== 'undefined' && photos.count === arguments[0]"
            " && vocabulary.codes !== null", n))
        seen = browser.execute_script(MEASURE, QUERY)
        low, middle, tenth, high = seen["score"]
        print(f"{count:7,}   {written['data_bytes'] / 1e6:8.1f}      {middle:6.1f} ({low:.1f} to "
              f"{high:.1f}, nine in ten below {tenth:.1f})     {seen['encode_us']:8.1f}",
              flush=True)
    words_bytes = (page / "data" / "words.js").stat().st_size
    print(f"words.js with {N_WORDS:,} words: {words_bytes / 1e6:.2f} MB; a photo's embedding: "
          f"{written['photo_vector_bytes'] // count} bytes before base64")
    browser.quit()


def dequantized(rows: np.ndarray) -> torch.Tensor:
    """Return rows as the page has them: rounded to int8 with a scale for each row."""
    coded = quantize(rows)
    codes = np.frombuffer(base64.b64decode(coded["codes"]), np.int8).reshape(rows.shape)
    scales = np.frombuffer(base64.b64decode(coded["scales"]), "<f4")
    return torch.from_numpy(codes * scales[:, None])


def recall(checkpoint: Path) -> None:
    """Print the demo's validation recall with float32 and with the int8 vectors of the page."""
    model, tokenizer, content = load_checkpoint(checkpoint)
    data = Path("data/demo")
    source = scan_dataset(data / "images", data / "annotations" / "annotations.csv", 0.1,
                         content["args"]["seed"])
    records = source.splits["val"]
    store = PixelStore.build(data, data / "images", [r.name for r in records],
                             store_size(model.config.image_size))
    dataset = Flickr30kDataset(records, store, tokenizer)
    images = embed_images(model, dataset)
    exact = retrieval_metrics(images, embed_tokens(model, dataset.tokens), dataset.image_index)
    vectors = dequantized(model.word_embeddings().numpy())
    texts = torch.nn.functional.normalize(vectors[dataset.tokens].sum(1), dim=1)
    rounded = retrieval_metrics(dequantized(images.numpy()), texts, dataset.image_index)
    print("\nrecall of the demo's validation images, float32 -> int8 of the page")
    for name in exact:
        if "R@" in name or name == "rsum":
            print(f"  {name:22} {exact[name]:6.1f} -> {rounded[name]:6.1f}")


def main() -> int:
    """Print both tables, or what they need."""
    print(machine())
    if installed("selenium") and shutil.which("chromium") and shutil.which("chromedriver"):
        with tempfile.TemporaryDirectory() as folder:
            queries(Path(folder))
    else:
        print("not measured: chromium, chromedriver or selenium is missing")
    checkpoint = Path("results/demo/models/flickr30k_clip_best.pth")
    if checkpoint.exists():
        recall(checkpoint)
    else:
        print("not measured: recall needs python train.py --demo")
    return 0


if __name__ == "__main__":
    sys.exit(main())
