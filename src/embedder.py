"""Use a trained model from Python: embed texts and images, and search a folder of images.

    from src.embedder import Embedder

    model = Embedder("results/models/flickr30k_clip_best.pth")
    similarity = model.texts(["two dogs in the snow"]) @ model.images(["dogs.jpg", "cat.jpg"]).T
    results = model.search("two dogs in the snow", "photos", top=5)
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from src.data.images import encode_image_file, load_resized
from src.data.pixel_store import store_size
from src.evaluation.embed import embed_pixels
from src.models.checkpoint import load_checkpoint
from src.search.answers import Filter, Library, find_results
from src.search.manage import index_folder
from src.search.query import embed_texts, text_side
from src.search.update_index import update_index
from src.utils.errors import UserError
from src.utils.files import fingerprint
from src.utils.paths import PRETRAINED, ResultPaths
from src.utils.runtime import pick_device, tune_malloc

BATCH_SIZE = 64


class Embedder:
    """A trained dual encoder.

    Attributes:
        model: the DualEncoder, in eval mode, on its device.
        tokenizer: with the vocabulary of the model.
        dim: D, the size of an embedding.
    """

    def __init__(
        self, checkpoint: str | Path, device: str = "auto", index_dir: str | Path | None = None
    ) -> None:
        """Load a checkpoint.

        Args:
            checkpoint: written by train.py.
            device: 'auto' (CUDA, then MPS, then the CPU) or a name such as 'cpu' or 'cuda:1'.
            index_dir: folder of the indexes that `search` keeps; None for the one that search.py
                uses: `index` beside the folder of the checkpoint.

        Raises:
            UserError: the checkpoint cannot be read, or there is no such device.
        """
        tune_malloc()
        checkpoint = Path(checkpoint)
        self.model, self.tokenizer, content = load_checkpoint(checkpoint)
        self._texts = text_side(fingerprint(checkpoint), self.model, self.tokenizer, content)
        self.model.to(pick_device(device))
        self.dim = self._texts.dim
        self._index_dir = (Path(index_dir) if index_dir else
                           ResultPaths(checkpoint.resolve().parents[1]).indexes(pretrained=False))

    @classmethod
    def pretrained(
        cls, device: str = "auto", index_dir: str | Path = "results/index_pretrained"
    ) -> Embedder:
        """Load the model that comes with the repository; the arguments are those of __init__."""
        return cls(PRETRAINED, device, index_dir)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts of any length; a BERT uses the tokens that it has positions for, often 512.

        Returns:
            (M, D) float32 of unit length.

        Raises:
            UserError: a text has no word that the model knows.
            TypeError: `texts` is a single string.
        """
        if isinstance(texts, str):
            raise TypeError("texts takes a list of strings, such as [text]")
        return embed_texts(self._texts, list(texts)) if len(texts) else self._empty()

    def images(self, images: Iterable[str | Path | object], batch_size: int = BATCH_SIZE
               ) -> np.ndarray:
        """Embed images, with a progress bar if it takes more than two seconds.

        Args:
            images: paths, PIL images, or uint8 arrays of shape (H, W, 3) or (H, W).
            batch_size: images in memory at a time.

        Returns:
            (N, D) float32 of unit length.

        Raises:
            UserError: an image cannot be read; the message names it.
        """
        images = [images] if isinstance(images, str | Path) else list(images)
        embeddings = [self._empty()]
        with ThreadPoolExecutor(os.cpu_count()) as pool, \
                tqdm(total=len(images), desc="embedding", unit="image", delay=2, leave=False,
                     disable=None) as bar:
            for start in range(0, len(images), batch_size):
                pixels = np.stack(list(pool.map(self._load, images[start : start + batch_size])))
                embeddings.append(embed_pixels(self.model, torch.from_numpy(pixels)).numpy())
                bar.update(len(pixels))
        return np.concatenate(embeddings)

    def search(
        self, query: str | Path | object, images: str | Path, top: int = 10
    ) -> list[tuple[str, float]]:
        """Return the images of a folder that fit a text best, or are most similar to an image.

        The images are embedded once; the index is shared with search.py.

        Args:
            query: a text, or an image as in `images` (a path as a Path, not as a string).
            images: an image folder, searched with its subfolders.
            top: number of results.

        Returns:
            (path, cosine similarity) of each result, the best first.

        Raises:
            UserError: the query cannot be embedded, or there is no image in the folder.
        """
        embedding = self.texts([query]) if isinstance(query, str) else self.images([query])
        folder = Path(images)
        index = update_index(index_folder(self._index_dir, folder), folder, self._texts.checkpoint,
                             self.dim, lambda: self.model, about=self._texts.about)
        results, _ = find_results(Library.join([folder], [index]), embedding[0],
                                  Filter(top, duplicates=True))
        return [(result["path"], result["score"]) for result in results]

    def _load(self, image: str | Path | object) -> np.ndarray:
        """Return an image as the (S, S, 3) uint8 square that the model takes."""
        size = store_size(self.model.config.image_size)
        try:
            if isinstance(image, str | Path):
                return load_resized(Path(image), size)
            # Through a file in memory, so that modes, profiles and orientation are handled once.
            return load_resized(io.BytesIO(encode_image_file(image)), size)
        except (ValueError, OSError) as error:
            name = image if isinstance(image, str | Path) else f"a {type(image).__name__}"
            raise UserError(f"cannot read {name}: {error}") from error

    def _empty(self) -> np.ndarray:
        return np.zeros((0, self.dim), np.float32)
