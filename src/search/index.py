"""The index of an image folder: embeddings on disk, searched exactly.

An index is `index.json` and the matrix that it names, a plain .npy file of float32 unit vectors
that numpy, FAISS or a vector database reads as it is; row i belongs to the i-th name.
`src/search/update_index.py` keeps an index up to date.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from src.search.matrix import load_matrix, save_matrix
from src.utils.errors import printable

BLOCK_SCORES = 1 << 20  # scores per block: 4 MB of float32, which stays in the cache
FEW_QUERIES = 8


@dataclass
class ImageIndex:
    """The embeddings of the images of one folder, computed with one checkpoint.

    Attributes:
        checkpoint: fingerprint of the weights.
        names: N paths relative to the folder, sorted.
        signatures: N pairs (size in bytes, modification time in ns), to detect changed files.
        embeddings: (N, D) float32 unit vectors, often memory-mapped.
        failed: unreadable files: path -> [reason, signature].
    """

    checkpoint: str
    names: list[str] = field(default_factory=list)
    signatures: list[list[int]] = field(default_factory=list)
    embeddings: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    failed: dict[str, list] = field(default_factory=dict)

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
            index = cls(*(content[key] for key in ("checkpoint", "names", "signatures")),
                        embeddings, content["failed"])
            index._check(dim)
            if index.checkpoint == checkpoint:
                return index
        except FileNotFoundError:
            return cls(checkpoint)
        except (ValueError, KeyError) as error:
            reason = f"is damaged ({printable(str(error))})"
        print(f"the index in {folder} {reason} and is built again", file=sys.stderr)
        return cls(checkpoint)

    def _check(self, dim: int) -> None:
        """Raise ValueError if values have the wrong type or do not fit each other."""
        if not (isinstance(self.checkpoint, str)
                and isinstance(self.names, list) and all(isinstance(n, str) for n in self.names)
                and isinstance(self.signatures, list) and isinstance(self.failed, dict)
                and all(isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
                        for entry in self.failed.values())):
            raise ValueError("values of another type")
        if not len(self.names) == len(self.signatures) == len(self.embeddings):
            raise ValueError(f"{len(self.embeddings)} embeddings for {len(self.names)} names")
        if len(set(self.names)) < len(self.names):
            raise ValueError("a repeated name")
        if self.names and self.embeddings.shape[1] != dim:
            raise ValueError(f"embeddings of {self.embeddings.shape[1]} numbers instead of {dim}")

    def save(self, folder: Path) -> None:
        """Write the index atomically. Raises UserError like `save_matrix`."""
        save_matrix(folder, "index", {
            "checkpoint": self.checkpoint, "names": self.names, "signatures": self.signatures,
            "failed": self.failed,
        }, self.embeddings)

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
