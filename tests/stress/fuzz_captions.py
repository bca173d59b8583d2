"""A coverage-guided fuzzer for the caption reader: no crash, no hang, no lost row.

    pip install atheris
    python -m tests.stress.fuzz_captions --seconds 3600 [CAPTION_FILE ...]

The fuzzer changes the given files and small built-in ones, keeps what reaches new lines of the
reader, and stops at the first file for which a check fails, which it writes to the current folder
as crash-.... It ends with "Done N runs" on standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path, PurePosixPath

from src.data.caption_files import decode, read_table
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
    b'file_name,split,caption_0,caption_1\na.jpg,dev,"two\nlines",x\n',
    b'image|caption|id\na.jpg|"a | ""dog"""|3\n', b'{"file_name": "a.jpg", "text": "A dog ."}\n',
    b'{"images": [{"id": 1, "file_name": "a.jpg"}], '
    b'"annotations": [{"image_id": 1, "caption": "A dog ."}]}',
    b"a.jpg#zhb#0 \xe7\x8b\x97\na.jpg#zhb#1 \xe7\x8c\xab\n",
    b'[{"image": "a.jpg", "caption": "x"}]',
    b"\xff\xd8\xff\xe0\x00\x10JFIF", b"PK\x03\x04\x14\x00", b"\xef\xbb\xbf",
]
TOKENS = ["image_name", "comment_number", "comment", "| 0| ", "#0\\x09", ".jpg", "raw", "filename",
          "split", "sentences", "images", "filepath", "train", "restval", "[\\\"\\\"", "\\\\ud800",
          "image,caption", "caption_1", "file_name", "annotations", "image_id", "../", "\\x00",
          "\\xff", "\\x0d\\x0a", "\\xe2\\x80\\xa8", "\\xef\\xbb\\xbf"]


def check_file(path: Path) -> Annotations | None:
    """Read a caption file of any content and check what the reader promises.

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
    issues = [*read.fixed, *read.rejected, *read.repeated]
    assert all(issue.where and issue.reason for issue in issues)
    assert len(read.fixed) + len(read.repeated) <= 2 * len(kept)
    table, layout = read_table(path)
    assert len(table) == read.rows
    _check_rows(decode(path.read_bytes()), layout, Counter(table["where"]))
    return read


def _check_rows(text: str, layout: str, rows: Counter[str]) -> None:
    """Count the rows of the file in another way than the reader.

    Args:
        text: the file.
        layout: as the reader describes it.
        rows: place in the file -> number of rows.
    """
    lines = text.split("\n")
    if layout.startswith("JSON lines"):
        assert rows.keys() == {f"line {i}" for i, line in enumerate(lines, 1) if line.strip()}
    elif re.match("Karpathy's JSON: filename, sentences(,|;|$)", layout):
        for number, image in enumerate(json.loads(text, strict=False)["images"], 1):
            sentences = image.get("sentences") if isinstance(image, dict) else None
            usable = isinstance(sentences, list) and isinstance(image.get("filename"), str | int)
            assert rows[f"image {number}"] == (max(1, len(sentences)) if usable else 1)
    elif layout.startswith(("JSON list:", "COCO:")):
        data = json.loads(text, strict=False)
        items = data if isinstance(data, list) else data["annotations"]
        assert len(rows) == len(items)
    elif layout.startswith(("table", "list")):
        # Every line starts a row, is the header, or continues a cell in quotes.
        start = None
        for number, line in enumerate(lines, 1):
            if line.strip():
                if start is None or f"line {number}" in rows:
                    start = number
                else:
                    assert "\n".join(lines[start - 1 : number - 1]).count('"') % 2


def main() -> None:
    """Fuzz until the time is up; does not return, as libFuzzer ends the process itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("files", nargs="*", type=Path, help="caption files to start from")
    args = parser.parse_args()
    import atheris  # not needed elsewhere

    modules = ["src.data.captions", "src.data.caption_files"]
    for module in modules:
        del sys.modules[module]
    with atheris.instrument_imports(include=modules):
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
