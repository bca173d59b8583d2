"""Find the photos that fit a text best, or that look like a photo.

    python search.py "two dogs running on the beach"
    python search.py "a red car" --images ~/Pictures --pretrained  # no training
    python search.py "beach -people"               # minus subtracts a word
    python search.py "a red car" --images ~/Pictures /mnt/photos --explain
    python search.py --image photo.jpg             # similar photos, captions
    python search.py --queries queries.txt --json  # "-" for standard input
    python search.py "a red car" --sheet cars.png  # draw the best photos
    python search.py --page album                  # write a web page
    python search.py --serve                       # show it in a browser
    python search.py --list-indexes
    torchrun --nproc-per-node 2 search.py "a car"  # embed in several processes

The photos are embedded once, into an index in results/index; later calls embed
only photos with new content. Without --images the photos of the training run
are searched. Answers go to standard output, everything else to standard error.
The exit status is 1 if some of the queries were not answered.
"""

from __future__ import annotations

from src.utils.script import run_script, start_script, status

if __name__ == "__main__":
    start_script()

import argparse
import codecs
import functools
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from src import cli
from src.search.answers import (
    Filter,
    Library,
    answer_image,
    answer_text,
    file_uri,
    format_answer,
)
from src.search.manage import index_folder, list_indexes, remove_if_failed, remove_index
from src.search.query import (
    BertTexts,
    TextQuery,
    WordTable,
    embed_queries,
    load_words,
    spelling_hints,
)
from src.search.update_index import end_updates, help_update, update_index
from src.utils.errors import UserError, counted, on_terminal, print_message, shorten_lines
from src.utils.paths import PRETRAINED, DataPaths, ResultPaths

# torch, Pillow and the modules that need them are imported where they are used: a text query with
# an index that is up to date needs neither, and importing torch takes longer than the rest.
if TYPE_CHECKING:
    import numpy as np

    from src.models.dual_encoder import DualEncoder
    from src.models.tokenizer import Tokenizer


LONE_MINUS = re.compile(r"(?<!\S)-\s+(\w+)")  # "- people" in "beach - people"


def main(argv: list[str] | None = None) -> int:
    """Answer the queries of `argv`. Returns the exit status."""
    # --- config --------------------------------------------------------------------------------
    args = make_parser().parse_args(argv)
    results = cli.resolve_results(args)
    indexes = results.indexes(args.checkpoint)
    if args.remove_index:
        write_line(remove_index(indexes, args.remove_index))
        return 0
    if args.list_indexes:
        write_line(list_indexes(results.indexes(None), results.indexes(PRETRAINED)))
        return 0
    if "RANK" in os.environ:
        from src.utils import distributed

        distributed.init_distributed()
        if distributed.rank() > 0:
            help_update(lambda: load_model(args.checkpoint or results.best, args.device)[0])
            distributed.destroy_distributed()
            return 0
    with remove_if_failed(args.index_dir or indexes):
        return search(argv, args, results)


def search(argv: list[str] | None, args: argparse.Namespace, results: ResultPaths) -> int:
    """Answer the queries of `argv`, which are parsed as `args`. Returns the exit status."""
    # --- queries -------------------------------------------------------------------------------
    texts = read_queries(args)
    if not (texts or args.image or args.page or args.serve is not None):
        raise UserError('nothing to search for: give a text, as in python search.py "a red car", '
                        "or --image FILE, or --page DIR")
    checkpoint = cli.find_checkpoint(args, results)
    load = functools.cache(lambda: load_model(checkpoint, args.device))
    indexes = results.indexes(args.checkpoint)
    table = load_words(args.index_dir or indexes, checkpoint, load, args.word_vectors)
    if not isinstance(table, WordTable):
        check_bert(args)
    queries, errors = embed_each(table, texts)

    # --- index ---------------------------------------------------------------------------------
    folders, data = resolve_folders(argv, table)
    library = Library.join(folders, [
        update_index(
            choose_index(args.index_dir, indexes, folder, len(folders)), folder, table.checkpoint,
            table.dim, lambda: load()[0], exclude=args.exclude, follow_links=args.follow_links,
            prune=args.prune, about={"checkpoint_file": str(checkpoint.resolve()), **table.about})
        for folder in folders])
    if "RANK" in os.environ:
        from src.utils import distributed

        end_updates()
        distributed.destroy_distributed()

    # --- answers -------------------------------------------------------------------------------
    chosen = Filter(args.top, args.offset, args.min_score, args.duplicates)
    answers = [answer_text(query, library, chosen, table.weak_score) for query in queries]
    captions = known_captions(data) if args.image or args.page or args.serve is not None else {}
    if args.image:
        texts = sorted({caption for own in captions.values() for caption in own})
        answers.append(answer_image(args.image, lambda: load()[:2], library, texts, chosen))
    for answer in answers:
        write_line(json.dumps(answer) if args.json else format_answer(answer, args.explain))
    for text, error in errors.items():
        if args.json:
            write_line(json.dumps({"query": text, "error": error}))
        print_message(f"error: {error}")
    if args.sheet and answers:
        draw_sheet(args.sheet, answers)
        print_message(f"drawn: {args.sheet}")
    if args.page or args.serve is not None:
        page = args.page or results.folder / "page"
        write_page(page, table, library, captions, args)
        if args.serve is not None:
            serve(page, args.serve, open_browser=not args.no_browser and has_browser())
    return 1 if errors else 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.SearchParser(description=__doc__)
    cli.add_results_arguments(parser)
    queries = parser.add_argument_group("queries")
    queries.add_argument("query", nargs="*",
                         help="a text, with or without quotes; of several texts each needs quotes")
    queries.add_argument("--queries", metavar="FILE",
                         help="a file of texts, one per line; - for standard input")
    queries.add_argument("--image", type=Path, metavar="FILE",
                         help="a photo; the most similar photos are answered")
    photos = parser.add_argument_group("photos")
    photos.add_argument("--images", type=Path, metavar="DIR", nargs="+", action="extend",
                        help="folders of photos, with their subfolders (default: the training "
                        "run's)")
    photos.add_argument("--exclude", metavar="PATTERN", nargs="+", action="extend", default=[],
                        help="skip files and folders, such as '*.gif' or raw")
    photos.add_argument("--follow-links", action="store_true",
                        help="search linked folders and files outside the folder, too")
    photos.add_argument("--annotations", type=Path, nargs=1, action=cli.Repeatable, metavar="FILE",
                        help="captions of the photos, shown if known; may be repeated (default: "
                        "those of the training run)")
    cli.add_column_arguments(photos)
    photos.add_argument("--data-dir", type=Path, metavar="DIR",
                        help="folder with images/ and annotations/annotations.csv")
    cli.add_checkpoint_arguments(photos)
    photos.add_argument("--word-vectors", type=Path, metavar="FILE",
                        help="GloVe or other pretrained word vectors (text, .vec, .npz), which "
                        "add words that were not in the training captions")
    photos.add_argument("--device", default="auto",
                        help="device to embed on, such as cpu, cuda, cuda:1 or mps (default: "
                        "%(default)s)")
    index = parser.add_argument_group("index")
    index.add_argument("--index-dir", type=Path, metavar="DIR",
                       help="where the index is stored (default: a folder in RESULTS_DIR/index)")
    index.add_argument("--prune", action="store_true",
                       help="remove missing photos from the index even if they are more than half")
    index.add_argument("--list-indexes", action="store_true",
                       help="list the indexes in RESULTS_DIR/index")
    index.add_argument("--remove-index", type=Path, metavar="DIR",
                       help="remove the index of a folder of photos")
    output = parser.add_argument_group("answers")
    output.add_argument("--top", type=cli.positive_int, default=10, metavar="K",
                        help="photos for each query (default: %(default)s)")
    output.add_argument("--offset", type=cli.non_negative_int, default=0, metavar="N",
                        help="skip the N best (default: %(default)s)")
    output.add_argument("--min-score", type=float, default=float("-inf"), metavar="X",
                        help="only photos with at least this score, from -1 to 1 (default: all)")
    output.add_argument("--duplicates", action="store_true",
                        help="show near duplicates one by one")
    output.add_argument("--explain", action="store_true",
                        help="print what each word adds to each score")
    output.add_argument("--json", action="store_true", help="print a JSON line for each query")
    output.add_argument("--sheet", type=cli.png_file, metavar="FILE.png",
                        help="draw the answers as a picture")
    output.add_argument("--page", type=Path, metavar="DIR",
                        help="write a web page that searches by itself")
    output.add_argument("--page-title", default="Photo search", metavar="TEXT",
                        help="title of the page (default: %(default)s)")
    output.add_argument("--page-words", type=cli.positive_int, default=20_000, metavar="N",
                        help="words that the page knows, those of the captions first "
                        "(default: %(default)s)")
    output.add_argument("--serve", nargs="?", type=int, const=8000, metavar="PORT",
                        help="serve that page on 127.0.0.1 and open it in the browser (default "
                        "port: 8000; default folder: RESULTS_DIR/page)")
    output.add_argument("--no-browser", action="store_true",
                        help="with --serve, open no browser")
    return parser


def load_model(checkpoint: Path, device: str) -> tuple[DualEncoder, Tokenizer, dict]:
    """Load a checkpoint like `load_checkpoint`, with the model on a device."""
    with status("loading PyTorch and the model"):
        from src.models.checkpoint import load_checkpoint
        from src.utils.runtime import pick_device, tune_malloc

        tune_malloc()
        model, tokenizer, content = load_checkpoint(checkpoint)
        return model.to(pick_device(device)), tokenizer, content


def check_bert(args: argparse.Namespace) -> None:
    """Refuse what only a bag of words can do; say how --explain differs.

    Raises:
        UserError: --page or --serve is given.
    """
    if args.page or args.serve is not None:
        raise UserError("--page and --serve need a checkpoint with a bag of words: the page embeds "
                        "a text as a mean of word vectors, and this text encoder is a BERT")
    if args.explain:
        print_message("note: with a BERT, a word's number is the score minus the score without the "
                      "word; they do not sum to the score")


def read_queries(args: argparse.Namespace) -> list[str]:
    """Return the texts of the command line and of --queries.

    Raises:
        UserError: the file cannot be read.
    """
    texts = list(args.query)
    if args.queries:
        try:
            content = (sys.stdin.buffer.read() if args.queries == "-"
                       else Path(args.queries).read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {args.queries}: {error.strerror}") from error
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        texts += content.decode("utf-16" if is_utf16 else "utf-8-sig", "replace").splitlines()
    return [text.strip() for text in texts if text.strip()]


def embed_each(
    table: WordTable | BertTexts, texts: list[str]
) -> tuple[list[TextQuery], dict[str, str]]:
    """Return the embedded texts, and the errors of those without a known word.

    Raises:
        UserError: there is only one text, and it has no known word.
    """
    queries, errors = [], {}
    for text in texts:
        try:
            queries += embed_queries(table, [text])
        except UserError as error:
            if len(texts) == 1:
                raise
            errors[text] = str(error)
    for text in texts:
        for word in LONE_MINUS.findall(text):
            print_message(f"note: in {text!r} the minus sign has no effect; -{word} without a "
                          "space subtracts the word")
    for query in queries:
        for hint in spelling_hints(query.unknown, table):
            print_message(f"note: {hint}")
    return queries, errors


def resolve_folders(
    argv: list[str] | None, table: WordTable | BertTexts
) -> tuple[list[Path], DataPaths]:
    """Return the image folders, each once, and the paths of the first one's captions."""
    args = cli.defaults_from_checkpoint(make_parser(), argv, {"args": table.args})
    given = args.images if isinstance(args.images, list) else []
    args.images = given[0] if given else args.images
    data = cli.resolve_data(args)
    folders = {folder.resolve(): folder for folder in given or [data.images]}
    # A folder inside another one is searched with it.
    return [folder for path, folder in folders.items()
            if not any(parent in folders for parent in path.parents)], data


def choose_index(index_dir: Path | None, indexes: Path, folder: Path, n_folders: int) -> Path:
    """Return where the index of a folder is stored."""
    if index_dir and n_folders == 1:
        return index_dir
    return index_folder(index_dir or indexes, folder)


def known_captions(data: DataPaths) -> dict[str, tuple[str, ...]]:
    """Return the captions of each image; an empty dict without a caption file."""
    paths = [path for path in data.annotations if path.exists()]
    if not paths:
        return {}
    from src.data.captions import read_annotations
    from src.data.source import match_image_names

    read = read_annotations(paths, **data.columns,
                            match_image_names=functools.partial(match_image_names, data.images))
    return {record.name: record.captions for record in read.records}


def write_line(text: str) -> None:
    """Print an answer.

    Raises:
        UserError: standard output cannot be written, such as to a full disk.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        # Python would report the same error again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"cannot write to standard output: {error.strerror}", status=1) from error


def draw_sheet(path: Path, answers: list[dict]) -> None:
    """Draw each query with its best images as a PNG."""
    import numpy as np

    from src.data.images import load_image
    from src.utils.plots import SheetRow, plot_contact_sheet, rank_headings

    def load(file: str) -> np.ndarray:
        try:
            return np.asarray(load_image(Path(file), 320, []))
        except ValueError:  # deleted since it was indexed
            return np.full((8, 8, 3), 255, np.uint8)

    plot_contact_sheet(path, [
        SheetRow(
            answer["query"] if "query" in answer else load(answer["image"]),
            [load(result["path"]) for result in answer["results"]],
            [f"{result['score']:.2f}" for result in answer["results"]],
        )
        for answer in answers
    ], headings=rank_headings("query", max(len(answer["results"]) for answer in answers)))


def write_page(
    folder: Path, table: WordTable, library: Library, captions: dict[str, tuple[str, ...]],
    args: argparse.Namespace,
) -> None:
    """Write the web page of a library."""
    from src.search import page

    written = page.write_page(
        folder,
        words=table.words[: args.page_words],
        word_embeddings=table.vectors[: args.page_words],
        names=library.names,
        image_embeddings=library.index.embeddings,
        captions=[list(captions.get(name, ())) for name in library.names],
        paths=[Path(path) for path in library.paths],
        groups=library.index.groups(),
        weak_score=table.weak_score,
        title=args.page_title,
    )
    skipped = [f"{name}: {reason}" for name, reason in written["skipped"]]
    if skipped:
        title = f"{counted(len(skipped), 'photos')} cannot be shown in the page:"
        print_message("\n  ".join([title, *shorten_lines(skipped)]))
    print_message(f"a page that searches {counted(written['photos'], 'photos')}: "
                  f"{file_uri(str(folder / 'index.html'))}")


def has_browser() -> bool:
    """Return whether a person at this machine's screen can be shown a web page."""
    is_local = on_terminal() and "SSH_CONNECTION" not in os.environ
    return is_local and (sys.platform == "darwin" or "DISPLAY" in os.environ
                         or "WAYLAND_DISPLAY" in os.environ)


def serve(page: Path, port: int, open_browser: bool) -> None:
    """Serve a page until Ctrl-C, and open it in the browser.

    Raises:
        UserError: the port cannot be used.
    """
    import threading
    import webbrowser

    from src.search.page_server import serve_page

    # Half a second later, when the server answers; port 0 stands for any free port.
    timer = threading.Timer(0.5, webbrowser.open, [f"http://127.0.0.1:{port}/"])
    timer.daemon = True
    if open_browser and port:
        timer.start()
    try:
        serve_page(page, port)
    except UserError as error:
        other = port + 1 if 0 < port < 65535 else 8000
        raise UserError(f"{error}, such as --serve {other}") from error
    finally:
        timer.cancel()


if __name__ == "__main__":
    run_script(main)
