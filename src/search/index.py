"""An index of a folder of photos: their embeddings on disk, searched exactly.

On disk lie `index.json` and the matrix it names, a plain .npy of float32 unit rows that numpy,
FAISS or a vector database reads as it is; row i belongs to the i-th name. `src/search/update_index.py` keeps
it up to date.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from src.search.matrix import load_matrix, save_matrix
from src.utils.errors import printable

BLOCK_SCORES = 1 << 20  # 4 MB of float32: made, looked through and forgotten
FEW_QUERIES = 8


@dataclass
class ImageIndex:
    """Embeddings of the photos of one folder, made with one checkpoint.

    Attributes:
        checkpoint: fingerprint of the weights that made the embeddings.
        names: N paths relative to the folder, sorted.
        signatures: N pairs (bytes, time of change in ns), to notice a changed photo.
        embeddings: (N, D) float32 of unit length, often memory-mapped.
        failed: what could not be read: path -> [reason, signature].
    """

    checkpoint: str
    names: list[str] = field(default_factory=list)
    signatures: list[list[int]] = field(default_factory=list)
    embeddings: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    failed: dict[str, list] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, checkpoint: str, dim: int) -> ImageIndex:
        """The index kept in `folder`; an empty one where there is none that fits `checkpoint`.

        Args:
            dim: D of the checkpoint's embeddings.
        """
        try:
            content, embeddings = load_matrix(folder, "index")
            index = cls(*(content[key] for key in ("checkpoint", "names", "signatures")),
                        embeddings, content["failed"])
            index._check(dim)
        except FileNotFoundError:
            return cls(checkpoint)
        except (ValueError, KeyError) as error:
            print(f"the index in {folder} is damaged and is built anew "
                  f"({printable(str(error))})", file=sys.stderr)
            return cls(checkpoint)
        if index.checkpoint != checkpoint:
            print(f"the index in {folder} was made with another checkpoint and is built anew",
                  file=sys.stderr)
            return cls(checkpoint)
        return index

    def _check(self, dim: int) -> None:
        """Raises ValueError where the parts are not what they should be or do not fit."""
        if not (isinstance(self.checkpoint, str)
                and isinstance(self.names, list) and all(isinstance(n, str) for n in self.names)
                and isinstance(self.signatures, list) and isinstance(self.failed, dict)
                and all(isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
                        for entry in self.failed.values())):
            raise ValueError("values of another type")
        if not len(self.names) == len(self.signatures) == len(self.embeddings):
            raise ValueError(f"{len(self.embeddings)} rows for {len(self.names)} names")
        if len(set(self.names)) < len(self.names):
            raise ValueError("a name twice")
        if self.names and self.embeddings.shape[1] != dim:
            raise ValueError(f"rows of {self.embeddings.shape[1]} numbers instead of {dim}")

    def save(self, folder: Path) -> None:
        """Write the index, whole or not at all. Raises UserError as `save_matrix`."""
        save_matrix(folder, "index", {
            "checkpoint": self.checkpoint, "names": self.names, "signatures": self.signatures,
            "failed": self.failed,
        }, self.embeddings)

    def search(self, queries: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """The exact nearest photos of some queries, in one pass over the matrix, block by block.

        Args:
            queries: (Q, D) float32 unit rows.
            top: how many; fewer where there are fewer photos.

        Returns:
            scores (Q, K) float32, falling, and rows (Q, K) int64; equal scores in the order of
            their rows.
        """
        count, top = len(self.names), min(top, len(self.names))
        floor = np.full(len(queries), -np.inf, np.float32)  # no lower score can be in the answer
        owners, rows, kept = [], [], []
        step = max(BLOCK_SCORES // max(len(queries), 1), top, 1)
        for start in range(0, count, step):
            scores = _scores(queries, self.embeddings[start : start + step])  # (Q, R)
            # Of equal scores the first rows count, so later ones must be above what was reached.
            floor = np.maximum(_reached(scores, top), np.nextafter(floor, np.float32(np.inf)))
            found = np.flatnonzero(scores >= floor[:, None])
            owner = found // scores.shape[1]
            owners.append(owner)
            rows.append(found - owner * scores.shape[1] + start)
            kept.append(scores.ravel()[found])
        if not owners:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        owner, row, score = map(np.concatenate, (owners, rows, kept))
        order = np.lexsort((-score, owner))  # stable: of equal scores the first row stays first
        first = np.searchsorted(owner, np.arange(len(queries)), sorter=order)
        best = order[first[:, None] + np.arange(top)]
        return score[best], row[best]


def _scores(queries: np.ndarray, block: np.ndarray) -> np.ndarray:
    """(Q, D), (R, D) -> (Q, R) dot products."""
    # OpenBLAS and MKL multiply a matrix by few vectors at a third of the memory's speed.
    if len(queries) < FEW_QUERIES:
        return np.vecdot(block, queries[:, None])
    return queries @ block.T


def _reached(scores: np.ndarray, top: int) -> np.ndarray:
    """A score that at least `top` of each row reach, and hardly more: (Q, R) -> (Q,).

    It is the `top`-th best of the best of groups, found in a tenth of a full selection's time.
    With fewer than `top` scores it is the least.
    """
    size = max(1, scores.shape[1] // (8 * top))
    groups = scores.shape[1] // size
    best = scores[:, : groups * size].reshape(len(scores), size, groups).max(1)
    place = max(0, groups - top)
    best.partition(place, axis=1)
    return best[:, place]
