"""Which photos fit a text best? Or: which photos are like this one?

    python search.py "two dogs running on the beach"
    python search.py "a red car" --images ~/Pictures --top 20 --explain
    python search.py --image photo.jpg                 # like this photo, and captions that fit it
    python search.py --queries queries.txt --json      # one query a line; - for standard input
    python search.py "a red car" --sheet sheet.png     # the query and its top photos as a picture
    python search.py --page album --images ~/Pictures  # a web page that searches by itself
    python search.py --serve                           # the same, on http://127.0.0.1:8000
    torchrun --nproc-per-node 2 search.py "a red car"  # several processes embed what is new

The photos are embedded once, into an index below results/index; later calls embed only what is new
or changed. Without --images the photos of the training run are searched.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from src.cli import (
    Parser,
    add_results_arguments,
    defaults_from_checkpoint,
    positive_int,
    resolve_data,
    resolve_results,
)
from src.search.index import ImageIndex
from src.search.query import TextQuery, WordTable, embed_queries, load_words, spelling_hints
from src.search.update_index import help_update, update_index
from src.utils.errors import UserError, printable, run_script
from src.utils.paths import DataPaths

# torch, Pillow and the rooms that need them are imported where they are used: a text over an index
# that is up to date needs none of them, and their import takes ten times as long as its answer.
if TYPE_CHECKING:
    import numpy as np

    from src.models.dual_encoder import DualEncoder
    from src.models.tokenizer import Tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add_results_arguments(parser)
    what = parser.add_argument_group("what to look for")
    what.add_argument("query", nargs="*", help="texts, each a query of its own")
    what.add_argument("--queries", metavar="FILE", help="texts, one a line; - for standard input")
    what.add_argument("--image", type=Path, metavar="FILE", help="a photo instead of a text")
    where = parser.add_argument_group("where to look")
    where.add_argument("--images", type=Path, metavar="DIR",
                       help="folder of photos, with its subfolders (default: the training run's)")
    where.add_argument("--annotations", type=Path, metavar="FILE",
                       help="captions of the photos, shown where known (default: the training "
                       "run's)")
    where.add_argument("--data-dir", type=Path, metavar="DIR",
                       help="holds images/ and annotations/annotations.csv")
    where.add_argument("--checkpoint", type=Path, metavar="FILE",
                       help="(default: RESULTS_DIR/models/flickr30k_clip_best.pth)")
    where.add_argument("--index-dir", type=Path, metavar="DIR",
                       help="where the index is kept (default: a folder of RESULTS_DIR/index)")
    where.add_argument("--device", default="auto", help="(default: %(default)s)")
    how = parser.add_argument_group("how to answer")
    how.add_argument("--top", type=positive_int, default=10, metavar="K",
                     help="photos for each query (default: %(default)s)")
    how.add_argument("--explain", action="store_true", help="each word's share of each score")
    how.add_argument("--json", action="store_true", help="a JSON line for each query")
    how.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw the answers")
    how.add_argument("--page", type=Path, metavar="DIR",
                     help="write a folder that searches by itself in a browser")
    how.add_argument("--serve", nargs="?", type=int, const=8000, metavar="PORT",
                     help="show that folder on 127.0.0.1 (default port: 8000; default folder: "
                     "RESULTS_DIR/page)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Embed the queries, bring the index up to date, answer. Returns the exit status."""
    args = parser().parse_args(argv)
    results = resolve_results(args)
    checkpoint = args.checkpoint or results.best
    load = functools.cache(lambda: load_model(checkpoint, args.device))
    if "RANK" in os.environ:
        from src.utils.distributed import destroy_distributed, init_distributed, rank

        init_distributed()
        if rank() > 0:
            help_update(lambda: load()[0])
            destroy_distributed()
            return 0
    texts = read_queries(args)
    if not (texts or args.image or args.page or args.serve is not None):
        raise UserError('nothing to look for: give a text, as in python search.py "a red car", '
                        "or --image FILE, or --page DIR")
    if not checkpoint.exists():
        raise UserError(f"there is no file {checkpoint}: train first, with python train.py, or "
                        "name another with --checkpoint")
    indexes = results.folder / "index"
    table = load_words(args.index_dir or indexes, checkpoint, load)
    data = resolve_data(defaults_from_checkpoint(parser(), argv, {"args": table.args}))
    queries = embed_queries(table, texts)
    for query in queries:
        for hint in spelling_hints(query.unknown, table):
            print(f"note: {hint}", file=sys.stderr)
    images = data.images
    key = hashlib.sha256(str(images.resolve()).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    folder = args.index_dir or indexes / f"{images.resolve().name}-{key}"
    index = update_index(folder, images, table.checkpoint, table.dim, lambda: load()[0])
    if "RANK" in os.environ:
        destroy_distributed()

    answers = [answer_text(query, index, images, args.top) for query in queries]
    if args.image:
        answers.append(answer_image(args.image, *load()[:2], index, data, args.top))
    for answer in answers:
        print(json.dumps(answer) if args.json else format_answer(answer, args.explain))
    if args.sheet and answers:
        draw_sheet(args.sheet, answers, args.top)
        print(f"drawn: {args.sheet}", file=sys.stderr)
    if args.page or args.serve is not None:
        page = args.page or results.folder / "page"
        write(page, table, index, data)
        if args.serve is not None:
            from src.search.page_server import serve_page

            serve_page(page, args.serve)
    return 0


def load_model(checkpoint: Path, device: str) -> tuple[DualEncoder, Tokenizer, dict]:
    """A checkpoint with its model on a device: what `load_checkpoint` gives."""
    from src.models.checkpoint import load_checkpoint
    from src.utils.runtime import pick_device, tune_malloc

    tune_malloc()
    model, tokenizer, content = load_checkpoint(checkpoint)
    return model.to(pick_device(device)), tokenizer, content


def read_queries(args: argparse.Namespace) -> list[str]:
    """The texts of the command line and of --queries. Raises UserError for an unreadable file."""
    texts = list(args.query)
    if args.queries == "-":
        texts += sys.stdin.read().split("\n")
    elif args.queries:
        try:
            texts += Path(args.queries).read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError as error:
            raise UserError(f"cannot read {args.queries}: {error.strerror}") from error
    return [text.strip() for text in texts if text.strip()]


def answer_text(query: TextQuery, index: ImageIndex, images: Path, top: int) -> dict:
    """The best photos of a text, each with its score and its words' shares, as plain values."""
    scores, rows = index.search(query.embedding[None], top)
    shares = query.shares(index.embeddings[rows[0]])
    return {
        "query": query.text,
        "unknown": query.unknown,
        "results": [
            {"rank": rank, "score": float(score), "path": str(images / index.names[row]),
             "shares": [[word, float(part)] for word, part in zip(query.words, of, strict=True)]}
            for rank, (score, row, of) in enumerate(
                zip(scores[0], rows[0], shares, strict=True), start=1)
        ],
    }


def answer_image(
    path: Path, model: DualEncoder, tokenizer: Tokenizer, index: ImageIndex, data: DataPaths, top: int
) -> dict:
    """The photos most like a photo, and the known captions that fit it best, as plain values.

    Raises:
        UserError: the photo cannot be read.
    """
    import torch

    from src.data.images import load_resized
    from src.data.pixel_store import store_size
    from src.evaluation.embed import embed_pixels, embed_tokens

    try:
        pixels = torch.from_numpy(load_resized(path, store_size(model.config.image_size)))
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    embedding = embed_pixels(model, pixels[None])  # (1, D)
    scores, rows = index.search(embedding.numpy(), top)
    captions = sorted({text for texts in known_captions(data).values() for text in texts})
    best_captions = []
    if captions:
        fits = (embed_tokens(model, tokenizer.encode(captions)) @ embedding[0]).topk(
            min(5, len(captions)))
        best_captions = [{"score": score, "caption": captions[row]} for score, row in
                         zip(fits.values.tolist(), fits.indices.tolist(), strict=True)]
    return {
        "image": str(path),
        "results": [
            {"rank": rank, "score": float(score), "path": str(data.images / index.names[row])}
            for rank, (score, row) in enumerate(zip(scores[0], rows[0], strict=True), start=1)
        ],
        "captions": best_captions,
    }


def known_captions(data: DataPaths) -> dict[str, tuple[str, ...]]:
    """Photo name -> its captions, where there is a caption file."""
    if not data.annotations.exists():
        return {}
    from src.data.captions import read_annotations

    return {record.name: record.captions for record in read_annotations(data.annotations).records}


def format_answer(answer: dict, explain: bool) -> str:
    """An answer for people: rank, score, path, and each word's share if asked for."""
    lines = [printable(answer.get("query") or f"photos like {answer['image']}")]
    for result in answer["results"]:
        path = printable(result["path"]).replace("\n", "\\n")
        lines.append(f"{result['rank']:4}  {result['score']:6.3f}  {path}")
        if explain and "shares" in result:
            lines.append(" " * 14 + "  ".join(
                f"{word}{'?' if word in answer['unknown'] else ''} {share:+.3f}"
                for word, share in result["shares"]))
    if answer.get("captions"):
        lines.append("captions that fit it best")
        lines += [f"      {fit['score']:6.3f}  {fit['caption']}" for fit in answer["captions"]]
    return "\n".join(lines)


def draw_sheet(path: Path, answers: list[dict], top: int) -> None:
    """Draw each query with its top photos, five or fewer, as a PNG."""
    import numpy as np

    from src.data.images import load_image
    from src.utils.plots import SheetRow, plot_contact_sheet

    def picture(file: str) -> np.ndarray:
        try:
            return np.asarray(load_image(Path(file), longest=320))
        except ValueError:  # gone since it was indexed
            return np.full((8, 8, 3), 255, np.uint8)

    plot_contact_sheet(path, [
        SheetRow(
            answer["query"] if "query" in answer else picture(answer["image"]),
            [picture(result["path"]) for result in answer["results"][:top]],
            [f"{result['score']:.2f}" for result in answer["results"][:top]],
        )
        for answer in answers
    ])


def write(page: Path, table: WordTable, index: ImageIndex, data: DataPaths) -> None:
    """Write the web page of an index."""
    from src.search.page import write_page

    captions = known_captions(data)
    written = write_page(
        page,
        words=table.words,
        word_embeddings=table.vectors,
        context_length=table.context_length,
        names=index.names,
        image_embeddings=index.embeddings,
        captions=[list(captions.get(name, ())) for name in index.names],
        photos=[data.images / name for name in index.names],
    )
    for name, reason in written["skipped"]:
        print(printable(f"left out of the page: {name}: {reason}"), file=sys.stderr)
    print(f"a page that searches {written['photos']:,} photos by itself: {page / 'index.html'}")


if __name__ == "__main__":
    run_script(main)
