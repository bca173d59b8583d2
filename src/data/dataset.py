"""The images and captions of one split, and the batches made of them."""

from __future__ import annotations

import hashlib
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from src.data.captions import ImageRecord
from src.data.pixel_store import PixelStore
from src.utils.runtime import copy_to_device

if TYPE_CHECKING:  # src/data does not depend on src/models
    from src.models.tokenizer import Tokenizer

# One entry of a batch: an image and some of its captions, both as indices into the dataset.
Item = tuple[int, np.ndarray]


@dataclass
class Batch:
    """B distinct images with M >= B of their captions, in the order of the images.

    With several processes each rank holds the images and captions of its part of the batch. It
    knows how many captions the other ranks hold, which is all that gathering embeddings needs.

    Attributes:
        images: (b, S, S, 3) uint8 pixels, or (b, F) float32 features of a frozen image encoder.
        tokens: (m, L) int64 token ids, or (m, E) float32 features of a frozen text encoder.
        image_index: (M,) int64, ascending: the image of each caption, as its place in the batch.
        counts: number of captions of each of the B images.
        local: the b of the B images that this rank holds.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    image_index: torch.Tensor
    counts: list[int]
    local: range

    def to(self, device: torch.device) -> Batch:
        """Copy the tensors to `device`; the host does not wait for a copy to a GPU."""
        return replace(self, images=copy_to_device(self.images, device),
                       tokens=copy_to_device(self.tokens, device),
                       image_index=copy_to_device(self.image_index, device))

    def count_captions(self, images: range) -> int:
        """Return how many captions the given images of the whole batch have."""
        return sum(self.counts[images.start : images.stop])

    def chunks(self, size: int | None) -> list[tuple[slice, slice]]:
        """Cut the local part into chunks of `size` images (None: one chunk).

        Returns:
            A slice of `images` and the slice of `tokens` that belongs to it, for each chunk.
        """
        size = size or max(1, len(self.local))
        slices = []
        for start in range(0, len(self.local), size):
            stop = min(len(self.local), start + size)
            first = self.count_captions(self.local[:start])
            count = self.count_captions(self.local[start:stop])
            slices.append((slice(start, stop), slice(first, first + count)))
        return slices


class Flickr30kDataset:
    """The N images of one split with all their M captions.

    Attributes:
        records: the image records whose image could be decoded.
        images: pixels of the store, or after `with_images` features; image i is
            `images[store_rows[i]]`.
        store_rows: (N,) int64.
        captions: M texts, grouped by image.
        image_index: (M,) int64, the image of each caption.
        first_caption: (N,) int64, the first caption of each image.
        tokens: (M, L) int64 token ids, or after `with_tokens` features of the captions.
        has_known_word: (M,) bool, whether a word of the caption is in the vocabulary.
    """

    def __init__(
        self, records: list[ImageRecord], store: PixelStore, tokenizer: Tokenizer
    ) -> None:
        """Tokenize all captions once; images that are not in `store` are left out."""
        # Images that could not be decoded have no row; the caller reports them.
        self.records = [record for record in records if record.name in store.rows]
        self.images: np.ndarray | torch.Tensor = store.pixels
        # The rows of the store are in the order of decoding, and another split has rows in between.
        self.store_rows = np.array([store.rows[record.name] for record in self.records], np.int64)
        self.captions = [caption for record in self.records for caption in record.captions]
        # Ground truth as data: an image may have any number of captions.
        counts = torch.tensor([len(record.captions) for record in self.records], dtype=torch.int64)
        self.image_index = torch.repeat_interleave(torch.arange(len(counts)), counts)
        self.first_caption = torch.cumsum(counts, 0) - counts
        # Once: (M, L) int64 takes 40 MB for Flickr30k, and an epoch then only indexes.
        self.tokens = tokenizer.encode(self.captions)
        self.has_known_word = tokenizer.has_known_word(self.tokens)

    def __len__(self) -> int:
        """Return the number of image-caption pairs, M."""
        return len(self.captions)

    def digest(self) -> str:
        """Return a hash of names and captions, to detect that a run is resumed on other data."""
        digest = hashlib.blake2b(digest_size=8)
        for record in self.records:
            # Names of files need not be valid Unicode.
            digest.update(repr((record.name, record.captions)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def pixel_digest(self) -> str:
        """Return a hash of every 16th row of each image, to detect changed image files."""
        digest = hashlib.blake2b(digest_size=8)
        # All pixels would be gigabytes to read; a changed image differs in some of these rows.
        for rows in np.array_split(self.store_rows, 1 + len(self.store_rows) // 1024):
            digest.update(np.ascontiguousarray(self.images[rows, ::16]))
        return digest.hexdigest()

    def with_images(self, images: np.ndarray | torch.Tensor) -> Flickr30kDataset:
        """Return a copy that takes image i from `images[i]`.

        Args:
            images: (N, F) features of a frozen image encoder, or (N, S, S, 3) pixels on a GPU.
        """
        other = copy(self)  # captions and tokens are shared
        other.images, other.store_rows = images, np.arange(len(self.records))
        return other

    def with_tokens(self, tokens: torch.Tensor) -> Flickr30kDataset:
        """Return a copy with the features (M, E) of a frozen text encoder in place of tokens."""
        other = copy(self)
        other.tokens = tokens
        return other

    def take_images(self, indices: np.ndarray) -> torch.Tensor:
        """Return the stored images `indices` (B,): (B, S, S, 3) uint8, or (B, F) features."""
        rows = self.store_rows[indices]
        # A tensor is on the training device: indexing there needs no copy from the host.
        if isinstance(self.images, torch.Tensor):
            return self.images[torch.from_numpy(rows).to(self.images.device, non_blocking=True)]
        return torch.from_numpy(self.images[rows])

    def batch(self, items: list[Item], local: range | None = None) -> Batch:
        """Return the batch of `items`, with the images and captions of `local` (None: of all)."""
        local = range(len(items)) if local is None else local
        # Only the local images are read: each rank pays for its own part.
        own = items[local.start : local.stop]
        captions = np.concatenate([np.empty(0, np.int64), *(chosen for _, chosen in own)])
        counts = [len(chosen) for _, chosen in items]  # of all ranks, for gathering
        return Batch(
            images=self.take_images(np.array([image for image, _ in own], np.int64)),
            tokens=self.tokens[torch.from_numpy(captions)],
            image_index=torch.repeat_interleave(torch.arange(len(items)), torch.tensor(counts)),
            counts=counts,
            local=local,
        )
