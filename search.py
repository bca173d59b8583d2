"""Find the photos that fit a text best, or that look like a photo.

    python search.py "two dogs running on the beach"
    python search.py "a red car" --images ~/Pictures --pretrained     # without any training
    python search.py "a red car" --images ~/Pictures --top 20 --explain
    python search.py --image photo.jpg                 # similar photos, and captions that fit it
    python search.py --queries queries.txt --json      # one query per line; - for standard input
    python search.py "a red car" --sheet sheet.png     # draw the query and its best photos
    python search.py --page album --images ~/Pictures  # write a web page that searches by itself
    python search.py --serve                           # the same, on http://127.0.0.1:8000
    torchrun --nproc-per-node 2 search.py "a red car"  # several processes embed new photos

The photos are embedded once, into an index in results/index; later calls embed only new and changed
photos. Without --images the photos of the training run are searched.
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

from src import cli
from src.search.index import ImageIndex
from src.search.query import TextQuery, WordTable, embed_queries, load_words, spelling_hints
from src.search.update_index import help_update, update_index
from src.utils.errors import UserError, printable, run_script
from src.utils.paths import DataPaths

# torch, Pillow and the modules that need them are imported where they are used: a text query
# with an index that is up to date needs neither, and importing torch takes longer than the rest.
if TYPE_CHECKING:
    import numpy as np

    from src.models.dual_encoder import DualEncoder
    from src.models.tokenizer import Tokenizer


def main(argv: list[str] | None = None) -> int:
    """Answer the queries of `argv`. Returns the exit status."""
    # --- config --------------------------------------------------------------------------------
    args = make_parser().parse_args(argv)
    results = cli.resolve_results(args)
    checkpoint = args.checkpoint or results.best
    load = functools.cache(lambda: load_model(checkpoint, args.device))
    if "RANK" in os.environ:
        from src.utils import distributed

        distributed.init_distributed()
        if distributed.rank() > 0:
            help_update(lambda: load()[0])
            distributed.destroy_distributed()
            return 0

    # --- queries -------------------------------------------------------------------------------
    texts = read_queries(args)
    if not (texts or args.image or args.page or args.serve is not None):
        raise UserError('nothing to search for: give a text, as in python search.py "a red car", '
                        "or --image FILE, or --page DIR")
    if not checkpoint.exists():
        raise UserError(f"there is no file {checkpoint}: train first, with python train.py, or "
                        "name another checkpoint with --checkpoint")
    indexes = results.folder / "index"
    table = load_words(args.index_dir or indexes, checkpoint, load)
    queries = embed_queries(table, texts)
    for query in queries:
        for hint in spelling_hints(query.unknown, table):
            print(f"note: {hint}", file=sys.stderr)

    # --- index ---------------------------------------------------------------------------------
    data = cli.resolve_data(cli.defaults_from_checkpoint(make_parser(), argv, {"args": table.args}))
    folder = args.index_dir or index_folder(indexes, data.images)
    index = update_index(folder, data.images, table.checkpoint, table.dim, lambda: load()[0])
    if "RANK" in os.environ:
        distributed.destroy_distributed()

    # --- answers -------------------------------------------------------------------------------
    answers = [answer_text(query, index, data.images, args.top) for query in queries]
    if args.image:
        answers.append(answer_image(args.image, *load()[:2], index, data, args.top))
    for answer in answers:
        print(json.dumps(answer) if args.json else format_answer(answer, args.explain))
    if args.sheet and answers:
        draw_sheet(args.sheet, answers)
        print(f"drawn: {args.sheet}", file=sys.stderr)
    if args.page or args.serve is not None:
        page = args.page or results.folder / "page"
        write_page(page, table, index, data)
        if args.serve is not None:
            from src.search.page_server import serve_page

            serve_page(page, args.serve)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.Parser(description=__doc__)
    cli.add_results_arguments(parser)
    queries = parser.add_argument_group("queries")
    queries.add_argument("query", nargs="*", help="texts; each is a query")
    queries.add_argument("--queries", metavar="FILE", 
                         help="texts, one per line; - for standard input")
    queries.add_argument("--image", type=Path, metavar="FILE", help="a photo instead of a text")
    photos = parser.add_argument_group("photos")
    photos.add_argument("--images", type=Path, metavar="DIR",
                        help="folder of photos, with its subfolders (default: the training run's)")
    photos.add_argument("--annotations", type=Path, metavar="FILE",
                        help="captions of the photos, shown with them (default: the training "
                        "run's)")
    photos.add_argument("--data-dir", type=Path, metavar="DIR",
                        help="holds images/ and annotations/annotations.csv")
    cli.add_checkpoint_arguments(photos)
    photos.add_argument("--index-dir", type=Path, metavar="DIR",
                        help="where the index is stored (default: a folder in RESULTS_DIR/index)")
    photos.add_argument("--device", default="auto", help="(default: %(default)s)")
    output = parser.add_argument_group("answers")
    output.add_argument("--top", type=cli.positive_int, default=10, metavar="K",
                        help="photos for each query (default: %(default)s)")
    output.add_argument("--explain", action="store_true",
                        help="what each word adds to each score")
    output.add_argument("--json", action="store_true", help="print a JSON line for each query")
    output.add_argument("--sheet", type=Path, metavar="FILE.png",
                        help="draw the answers as a picture")
    output.add_argument("--page", type=Path, metavar="DIR",
                        help="write a web page that searches by itself")
    output.add_argument("--serve", nargs="?", type=int, const=8000, metavar="PORT",
                        help="serve that page on 127.0.0.1 (default port: 8000; default folder: "
                        "RESULTS_DIR/page)")
    return parser


def index_folder(indexes: Path, images: Path) -> Path:
    """Return the folder of the index of an image folder, below `indexes`."""
    path = images.resolve()
    key = hashlib.sha256(str(path).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return indexes / f"{path.name}-{key}"


def load_model(checkpoint: Path, device: str) -> tuple[DualEncoder, Tokenizer, dict]:
    """Load a checkpoint like `load_checkpoint`, with the model on a device."""
    from src.models.checkpoint import load_checkpoint
    from src.utils.runtime import pick_device, tune_malloc

    tune_malloc()
    model, tokenizer, content = load_checkpoint(checkpoint)
    return model.to(pick_device(device)), tokenizer, content


def read_queries(args: argparse.Namespace) -> list[str]:
    """Return the texts of the command line and of --queries.

    Raises:
        UserError: the file cannot be read.
    """
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
    """Return the best images of a text as plain values, with the contributions of its words."""
    scores, positions = index.search(query.embedding[None], top)
    results = make_results(scores[0], positions[0], index, images)
    contributions = query.word_contributions(index.embeddings[positions[0]])  # (K, W)
    for result, values in zip(results, contributions.tolist(), strict=True):
        result["word_contributions"] = list(zip(query.words, values, strict=True))
    return {"query": query.text, "unknown": query.unknown, "results": results}


def answer_image(
    path: Path, model: DualEncoder, tokenizer: Tokenizer, index: ImageIndex, data: DataPaths,
    top: int,
) -> dict:
    """Return the images most similar to an image, and its best captions, as plain values.

    Raises:
        UserError: the image cannot be read.
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
    scores, positions = index.search(embedding.numpy(), top)
    captions = sorted({text for texts in known_captions(data).values() for text in texts})
    best_captions = []
    if captions:
        best = (embed_tokens(model, tokenizer.encode(captions)) @ embedding[0]).topk(
            min(5, len(captions)))
        best_captions = [{"score": score, "caption": captions[i]} for score, i in
                         zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    return {"image": str(path), "captions": best_captions,
            "results": make_results(scores[0], positions[0], index, data.images)}


def make_results(
    scores: np.ndarray, positions: np.ndarray, index: ImageIndex, images: Path
) -> list[dict]:
    """Return the hits of one query as plain values."""
    return [{"rank": rank, "score": float(score), "path": str(images / index.names[i])}
            for rank, (score, i) in enumerate(zip(scores, positions, strict=True), start=1)]


def known_captions(data: DataPaths) -> dict[str, tuple[str, ...]]:
    """Return the captions of each image; an empty dict without a caption file."""
    if not data.annotations.exists():
        return {}
    from src.data.captions import read_annotations

    return {record.name: record.captions for record in read_annotations(data.annotations).records}


def format_answer(answer: dict, explain: bool) -> str:
    """Return an answer as text: rank, score, path, and the contributions of the words."""
    lines = [printable(answer.get("query") or f"photos like {answer['image']}")]
    for result in answer["results"]:
        path = printable(result["path"]).replace("\n", "\\n")
        lines.append(f"{result['rank']:4}  {result['score']:6.3f}  {path}")
        if explain and "word_contributions" in result:
            lines.append(" " * 14 + "  ".join(
                f"{word}{'?' if word in answer['unknown'] else ''} {value:+.3f}"
                for word, value in result["word_contributions"]))
    if answer.get("captions"):
        lines.append("captions that fit it best")
        lines += [f"      {fit['score']:6.3f}  {fit['caption']}" for fit in answer["captions"]]
    return "\n".join(lines)


def draw_sheet(path: Path, answers: list[dict]) -> None:
    """Draw each query with its best images as a PNG."""
    import numpy as np

    from src.data.images import load_image
    from src.utils.plots import SheetRow, plot_contact_sheet

    def load(file: str) -> np.ndarray:
        try:
            return np.asarray(load_image(Path(file), longest=320))
        except ValueError:  # deleted since it was indexed
            return np.full((8, 8, 3), 255, np.uint8)

    plot_contact_sheet(path, [
        SheetRow(
            answer["query"] if "query" in answer else load(answer["image"]),
            [load(result["path"]) for result in answer["results"]],
            [f"{result['score']:.2f}" for result in answer["results"]],
        )
        for answer in answers
    ])


def write_page(folder: Path, table: WordTable, index: ImageIndex, data: DataPaths) -> None:
    """Write the web page of an index."""
    from src.search import page

    captions = known_captions(data)
    written = page.write_page(
        folder,
        words=table.words,
        word_embeddings=table.vectors,
        context_length=table.context_length,
        names=index.names,
        image_embeddings=index.embeddings,
        captions=[list(captions.get(name, ())) for name in index.names],
        paths=[data.images / name for name in index.names],
    )
    for name, reason in written["skipped"]:
        print(printable(f"not in the page: {name}: {reason}"), file=sys.stderr)
    print(f"a page that searches {written['photos']:,} photos: {folder / 'index.html'}")


if __name__ == "__main__":
    run_script(main)
