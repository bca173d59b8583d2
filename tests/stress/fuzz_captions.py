"""A coverage-guided fuzzer at the caption reader: no crash, no hang, no row unaccounted for.

    pip install atheris
    python -m tests.stress.fuzz_captions --seconds 3600 [CAPTION_FILE ...]

The fuzzer mutates the given files and small built-in ones, keeps what reaches new lines of the
reader, and stops at the first file for which a promise breaks, which it writes to the current
folder as crash-…. On standard error it ends with "Done N runs".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path, PurePosixPath

from src.data.captions import Annotations, read_annotations
from src.utils.errors import UserError

CONTROLS = frozenset(map(chr, range(32)))
SEEDS = [
    b"image_name| comment_number| comment\na.jpg| 0| A dog .\na.jpg| 4   A cat .\nb/c.jpg|1|x",
    b"a.jpg#0\tA dog .\r\na.jpg#1\tA cat .\r\n",
    b'image,caption\na.jpg,"A dog , ""brown"" ."\rb.png,A cat .',
    b'raw,sentids,split,filename,img_id\n"[""A dog ."", ""x""]","[0]",train,a.jpg,0\n',
    b'{"images": [{"filename": "a.jpg", "split": "val", "filepath": "f", '
    b'"sentences": [{"raw": "A dog ."}, {"raw": 3}]}]}',
    b"\xff\xd8\xff\xe0\x00\x10JFIF", b"PK\x03\x04\x14\x00", b"\xef\xbb\xbf",
]
TOKENS = ["image_name", "comment_number", "comment", "| 0| ", "#0\\x09", ".jpg", "raw", "filename",
          "split", "sentences", "images", "filepath", "train", "restval", "[\\\"\\\"", "\\\\ud800",
          "../", "\\x00", "\\xff", "\\x0d\\x0a", "\\xe2\\x80\\xa8", "\\xef\\xbb\\xbf"]


def check_file(path: Path) -> Annotations | None:
    """Read a caption file of any content and hold the reader to its promises.

    Returns:
        What was read; None where the file was refused with a message that names it.

    Raises:
        AssertionError: a promise is broken. Any other exception is a crash of the reader.
    """
    try:
        read = read_annotations(path)
    except UserError as error:
        assert str(path) in str(error)
        return None
    kept = [caption for record in read.records for caption in record.captions]
    assert read.rows == len(kept) + len(read.rejected)
    assert all(caption.strip() and CONTROLS.isdisjoint(caption) for caption in kept)
    names = [record.name for record in read.records]
    assert len(set(names)) == len(names) and all(record.captions for record in read.records)
    for name in names:
        assert ".." not in PurePosixPath(name).parts
        assert os.path.normpath(os.path.join("/images", name)).startswith("/images/")
    remarks = [*read.fixed, *read.rejected, *read.repeated]
    assert all(remark.where and remark.reason for remark in remarks)
    assert len(read.fixed) + len(read.repeated) <= 2 * len(kept)
    _check_rows(path.read_bytes().decode("utf-8-sig", "replace"), read)
    return read


def _check_rows(text: str, read: Annotations) -> None:
    """Count the file's rows by another way than the reader's."""
    if read.format == "dataset_flickr30k.json":
        sentences = [photo.get("sentences") if isinstance(photo, dict) else None
                     for photo in json.loads(text)["images"]]
        assert read.rows == sum(max(1, len(found)) if isinstance(found, list) else 1
                                for found in sentences)
        return
    lines = sum(bool(line.strip())
                for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    assert read.rows >= lines - 1  # a header is the one line that may be no row
    assert read.rows <= lines or read.format == "flickr_annotations_30k.csv"


def main() -> None:
    """Fuzz until the time is up; does not return, as libFuzzer ends the process itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("files", nargs="*", type=Path, help="caption files to start from")
    args = parser.parse_args()
    import atheris  # wanted by nobody else

    for module in ("src.data.captions", "src.caption_formats"):
        del sys.modules[module]
    with atheris.instrument_imports(include=["src.data.captions", "src.caption_formats"]):
        from src.data.captions import read_annotations as instrumented
    globals()["read_annotations"] = instrumented
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (folder / "seeds").mkdir()
    for number, content in enumerate([*SEEDS, *(path.read_bytes() for path in args.files)]):
        (folder / "seeds" / str(number)).write_bytes(content)
    (folder / "tokens").write_text("".join(f'"{token}"\n' for token in TOKENS))

    def try_one(content: bytes) -> None:
        (folder / "captions").write_bytes(content)
        check_file(folder / "captions")

    atheris.Setup([sys.argv[0], f"-max_total_time={args.seconds}", "-max_len=8192", "-timeout=20",
                   "-rss_limit_mb=2000", f"-dict={folder / 'tokens'}", str(folder / "seeds")],
                  try_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
