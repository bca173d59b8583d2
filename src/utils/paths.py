"""The input and output paths of the scripts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The model that comes with the repository; its card is next to it.
PRETRAINED = Path(__file__).parents[1] / "models" / "pretrained" / "dual_encoder.pth"


@dataclass(frozen=True)
class DataPaths:
    """Where the images and captions are read, and where decoded pixels are cached.

    Attributes:
        images: the image folder.
        annotations: the caption files.
        cache: folder of the decoded pixels.
        columns: the arguments of `read_annotations` that choose the columns of caption files.
    """

    images: Path
    annotations: list[Path]
    cache: Path
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ResultPaths:
    """The files that the scripts write below `folder`."""

    folder: Path

    @property
    def best(self) -> Path:
        """The checkpoint of the epoch with the highest rsum."""
        return self.folder / "models" / "flickr30k_clip_best.pth"

    @property
    def last(self) -> Path:
        """The newest checkpoint, with the state that --resume needs."""
        return self.folder / "models" / "flickr30k_clip_last.pth"

    @property
    def previous(self) -> Path:
        """The checkpoint written before `last`, used if `last` is damaged."""
        return self.folder / "models" / "flickr30k_clip_previous.pth"

    @property
    def earlier(self) -> Path:
        """The best checkpoint of the run before this one."""
        return self.folder / "models" / "flickr30k_clip_best_earlier.pth"

    def indexes(self, pretrained: bool) -> Path:
        """The folder of the indexes of this folder's own checkpoints, or of the pretrained model.

        An index belongs to one checkpoint: in one folder, each would replace that of the other.
        """
        return self.folder / ("index_pretrained" if pretrained else "index")

    @property
    def exported(self) -> Path:
        """The exported image encoder; the suffix is that of its format."""
        return self.folder / "models" / "image_encoder_from_clip.pth"

    @property
    def exported_text(self) -> Path:
        """The exported text encoder."""
        return self.folder / "models" / "text_encoder_from_clip.npz"

    def archive_last_run(self) -> None:
        """Rename the last checkpoint of an earlier run, so that --resume cannot mistake it."""
        if self.last.exists():
            self.last.replace(self.last.with_name("flickr30k_clip_last_earlier.pth"))
        self.previous.unlink(missing_ok=True)
