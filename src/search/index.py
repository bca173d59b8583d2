"""The index of an image folder: embeddings on disk, searched exactly.

An index is `index.json` and the matrix that it names, a plain .npy file of float32 unit vectors
that numpy, FAISS or a vector database reads as it is; row i belongs to the i-th name.
`src/search/update_index.py` keeps an index up to date.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from src.search.matrix import load_matrix, save_matrix
from src.utils.errors import print_message

BLOCK_SCORES = 1 << 20  # scores per block: 4 MB of float32, which stays in the cache
FEW_QUERIES = 8
DECODER = 3  # as in src/data/images.py, whose import takes longer than a search
THUMBNAIL_BYTES = 48  # 4x4 RGB
DUPLICATE_CHANGE = 4  # of 255, which is more than a resized or recompressed copy changes


@dataclass
class ImageIndex:
    """The embeddings of the images of one folder, computed with one checkpoint.

    Attributes:
        checkpoint: fingerprint of the weights.
        names: N paths relative to the folder, sorted.
        signatures: N pairs (size in bytes, modification time in ns), to detect changed files.
        embeddings: (N, D) float32 unit vectors, often memory-mapped.
        failed: unreadable files: path -> [reason, signature, version of the reader].
        digests: of the N files, to recognize an image under another name.
        thumbnails: (N, 48) uint8, the images at 4x4 pixels, to recognize near duplicates.
        notes: damaged images: path -> what is wrong with them.
        about: the image folder, and for other programs the checkpoint and the model.
        decoder: version of the decoder of the images.
    """

    checkpoint: str
    names: list[str] = field(default_factory=list)
    signatures: list[list[int]] = field(default_factory=list)
    embeddings: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    failed: dict[str, list] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    thumbnails: np.ndarray = field(
        default_factory=lambda: np.zeros((0, THUMBNAIL_BYTES), np.uint8))
    notes: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    decoder: int = DECODER

    @classmethod
    def load(cls, folder: Path, checkpoint: str, dim: int) -> ImageIndex:
        """Return the index stored in `folder`, or an empty one if none fits the checkpoint.

        Args:
            folder: where `save` wrote it.
            checkpoint: fingerprint of the weights.
            dim: D of their embeddings.
        """
        reason = "was made with another checkpoint"
        try:
            content, embeddings = load_matrix(folder, "index")
            index = cls._from_json(content, embeddings)
            index._check(dim)
            if index.checkpoint == checkpoint:
                return index
        except FileNotFoundError:
            return cls(checkpoint)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"is damaged ({error})"
        print_message(f"the index in {folder} {reason} and is built again")
        return cls(checkpoint)

    @classmethod
    def _from_json(cls, content: dict, embeddings: np.ndarray) -> ImageIndex:
        """Return the index of index.json, also of one that an earlier version wrote."""
        names = content["names"]
        if content.get("decoder") is None:  # version 1 had no digests and thumbnails
            return cls(content["checkpoint"], names, content["signatures"], embeddings,
                       {}, [""] * len(names), np.zeros((len(names), THUMBNAIL_BYTES), np.uint8),
                       decoder=1)
        thumbnails = np.frombuffer(base64.b64decode(content["thumbnails"]), np.uint8)
        return cls(content["checkpoint"], names, content["signatures"], embeddings,
                   content["failed"], content["digests"],
                   thumbnails.reshape(-1, THUMBNAIL_BYTES), content["notes"], content["about"],
                   content["decoder"])

    def _check(self, dim: int) -> None:
        """Raise ValueError if values have the wrong type or do not fit each other."""
        if not (isinstance(self.checkpoint, str)
                and isinstance(self.names, list) and all(isinstance(n, str) for n in self.names)
                and isinstance(self.signatures, list) and isinstance(self.failed, dict)
                and all(isinstance(pair, list) and len(pair) == 2 for pair in self.signatures)
                and all(isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str)
                        for entry in self.failed.values())
                and isinstance(self.digests, list) and all(isinstance(d, str) for d in self.digests)
                and all(isinstance(texts, dict) and all(isinstance(t, str) for t in texts.values())
                        for texts in (self.notes, self.about))):
            raise ValueError("values of another type")
        if not len(self.names) == len(self.signatures) == len(self.embeddings) \
                == len(self.digests) == len(self.thumbnails):
            raise ValueError(f"{len(self.embeddings)} embeddings, {len(self.names)} names, "
                             f"{len(self.digests)} digests")
        if len(set(self.names)) < len(self.names):
            raise ValueError("a repeated name")
        if self.names and self.embeddings.shape[1] != dim:
            raise ValueError(f"embeddings of {self.embeddings.shape[1]} numbers instead of {dim}")

    def save(self, folder: Path) -> None:
        """Write the index atomically. Raises UserError like `save_matrix`."""
        save_matrix(folder, "index", {
            "about": self.about, "checkpoint": self.checkpoint, "decoder": self.decoder,
            "names": self.names, "signatures": self.signatures, "digests": self.digests,
            "failed": self.failed, "notes": self.notes,
            "thumbnails": base64.b64encode(self.thumbnails.tobytes()).decode(),
        }, self.embeddings)

    def take(self, rows: list[int]) -> ImageIndex:
        """Return an index of some of the images."""
        names = [self.names[i] for i in rows]
        kept = set(names)
        return replace(
            self, names=names, signatures=[self.signatures[i] for i in rows],
            embeddings=self.embeddings[rows], digests=[self.digests[i] for i in rows],
            thumbnails=self.thumbnails[rows],
            notes={name: note for name, note in self.notes.items() if name in kept})

    def merge(self, parts: list[ImageIndex]) -> None:
        """Add the images and failures of other indexes, and sort the images by name."""
        parts = [part for part in [self, *parts] if part.names or part.failed]
        names = [name for part in parts for name in part.names]
        order = sorted(range(len(names)), key=names.__getitem__)
        matrices = [part.embeddings for part in parts if part.names]
        if order:
            self.embeddings = np.concatenate(matrices)[order]
            self.thumbnails = np.concatenate(
                [part.thumbnails for part in parts if part.names])[order]
        for key in ("names", "signatures", "digests"):
            values = [value for part in parts for value in getattr(part, key)]
            setattr(self, key, [values[i] for i in order])
        for part in parts:
            self.failed, self.notes = self.failed | part.failed, self.notes | part.notes

    def near_duplicates(self, row: int) -> np.ndarray:
        """Return the rows of images that look like one of them, that one included.

        They have the same content, or all of their 4x4 thumbnails' values differ by at most
        DUPLICATE_CHANGE: copies that were resized or saved again.
        """
        if not self.digests[row]:  # of an earlier version, which had no thumbnails
            return np.array([row])
        own = self.thumbnails[row].astype(np.int16)
        rows = np.flatnonzero(abs(self.thumbnails[:, 0] - own[0]) <= DUPLICATE_CHANGE)  # for speed
        return rows[(abs(self.thumbnails[rows] - own) <= DUPLICATE_CHANGE).all(1)]

    def groups(self) -> list[int]:
        """Return a number for each image, the same for near duplicates."""
        groups = np.full(len(self.names), -1)
        for row in range(len(groups)):
            if groups[row] < 0:
                similar = self.near_duplicates(row)
                groups[similar[groups[similar] < 0]] = row
        return groups.tolist()

    def search(self, queries: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the exact nearest images of Q queries, in one pass over the matrix by blocks.

        Args:
            queries: (Q, D) float32 unit vectors.
            top: number of hits for each query; fewer if the index has fewer images.

        Returns:
            scores (Q, K) float32 in descending order, and positions (Q, K) int64 of the images;
            equal scores are in the order of the images.
        """
        count, top = len(self.names), min(top, len(self.names))
        floor = np.full(len(queries), -np.inf, np.float32)  # lower scores cannot be hits
        owners, positions, kept = [], [], []
        step = max(BLOCK_SCORES // max(len(queries), 1), top, 1)
        for start in range(0, count, step):
            scores = _scores(queries, self.embeddings[start : start + step])  # (Q, block)
            # Among equal scores the first images win, so later ones must exceed the floor.
            floor = np.maximum(_lower_bound(scores, top), np.nextafter(floor, np.float32(np.inf)))
            found = np.flatnonzero(scores >= floor[:, None])
            owner = found // scores.shape[1]
            owners.append(owner)
            positions.append(found - owner * scores.shape[1] + start)
            kept.append(scores.ravel()[found])
        if not owners:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        owner, position, score = map(np.concatenate, (owners, positions, kept))
        order = np.lexsort((-score, owner))  # stable: equal scores keep the order of the images
        first = np.searchsorted(owner, np.arange(len(queries)), sorter=order)
        best = order[first[:, None] + np.arange(top)]
        return score[best], position[best]


def _scores(queries: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Return the dot products of (Q, D) and (R, D): (Q, R)."""
    # OpenBLAS and MKL multiply a matrix by few vectors at a third of the memory bandwidth.
    if len(queries) < FEW_QUERIES:
        return np.vecdot(block, queries[:, None])
    return queries @ block.T


def _lower_bound(scores: np.ndarray, top: int) -> np.ndarray:
    """Return a lower bound of the `top`-th best score of each query: (Q, R) -> (Q,).

    It is the `top`-th best of the maxima of groups, which takes a tenth of the time of a full
    selection. With fewer than `top` scores it is the minimum.
    """
    size = max(1, scores.shape[1] // (8 * top))
    groups = scores.shape[1] // size
    best = scores[:, : groups * size].reshape(len(scores), size, groups).max(1)
    rank = max(0, groups - top)
    best.partition(rank, axis=1)
    return best[:, rank]
