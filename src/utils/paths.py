"""The input and output paths of the scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# The model that comes with the repository; its card is next to it.
PRETRAINED = Path(__file__).parents[1] / "models" / "pretrained" / "dual_encoder.pth"


@dataclass(frozen=True)
class DataPaths:
    """Where the images and captions are read, and where decoded pixels are cached."""

    images: Path
    annotations: Path
    cache: Path


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

    @property
    def exported(self) -> Path:
        """The exported image encoder."""
        return self.folder / "models" / "image_encoder_from_clip.pth"

    def archive_last_run(self) -> None:
        """Rename the last checkpoint of an earlier run, so that --resume cannot mistake it."""
        if self.last.exists():
            self.last.replace(self.last.with_name("flickr30k_clip_last_earlier.pth"))
        self.previous.unlink(missing_ok=True)
