"""Train the dual encoder, and keep the epoch with the best validation recall.

    python train.py                    # Flickr30k in data/flickr30k
    python train.py --recipe strong    # the recipe with the best recall
    python train.py --text-encoder bert
    python train.py --demo             # a synthetic dataset, 1 to 3 minutes
    python train.py --max-images 2000 --weights none
    python train.py --resume           # continue a run, even within an epoch
    python train.py --resume auto      # continue a run, or start one
    torchrun --nproc-per-node 2 train.py

Written to results/: models/flickr30k_clip_best.pth (model_state, vocab, config,
metrics), models/flickr30k_clip_last.pth (for --resume), log.jsonl (one line per
epoch), args.json, curves.png, examples.png (validation captions with their top
five images) and rejected.csv.
"""

from __future__ import annotations

from src.utils.script import run_script, start_script

if __name__ == "__main__":
    start_script("PyTorch")  # before the imports, which take seconds

import argparse
import time
from contextlib import nullcontext

import torch

from src import cli
from src.data.dataset import Flickr30kDataset
from src.data.loader import cache_on_device, count_batches
from src.data.prepare import check_splits, prepare_datasets
from src.data.source import DataSource, scan_dataset
from src.evaluation.embed import evaluate_retrieval
from src.evaluation.examples import report_best
from src.evaluation.metrics import EPOCH_HEADER, format_epoch
from src.models.bert import load_pretrained
from src.models.checkpoint import Checkpoint
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.training import run_state
from src.training.cuda_graph import graphed_step
from src.training.engine import check_batch_size, explain_memory, train_one_epoch
from src.training.frozen_features import freeze_images, freeze_texts
from src.training.optim import build_optimizer, build_schedule
from src.training.recipes import RECIPES
from src.utils import distributed, runtime
from src.utils.errors import UserError, counted, print_message
from src.utils.files import only_writer
from src.utils.paths import DataPaths, ResultPaths


def main(argv: list[str] | None = None) -> int:
    """Train with the flags of `argv`. Returns the exit status."""
    runtime.tune_malloc()
    with distributed.process_group(), runtime.explain_oom():
        # --- config ----------------------------------------------------------------------------
        args, resumed = parse_args(argv)
        data, results = cli.resolve_data(args), cli.resolve_results(args)

        # --- device ----------------------------------------------------------------------------
        device = runtime.pick_device(args.device)
        runtime.choose_kernels(args.deterministic)
        is_main = distributed.rank() == 0  # the other ranks print nothing
        if is_main:
            cli.prepare_results(results.folder, args.tensorboard)
            cli.prepare_demo(args, data)
        distributed.barrier()  # the others read what rank 0 has written
        with only_writer(results.folder) if is_main else nullcontext():
            status, val_set = train(args, data, results, device, resumed)
    if is_main and status == 0:  # without the process group: one process embeds alone
        report_best(results, val_set, device)
    return status


def train(args: argparse.Namespace, data: DataPaths, results: ResultPaths, device: torch.device,
          resumed: Checkpoint | None) -> tuple[int, Flickr30kDataset]:
    """Train all epochs and keep the best. Returns the exit status and the validation split."""
    # --- captions ------------------------------------------------------------------------------
    source, tokenizer, text_config = load_captions(args, resumed)

    # --- model ---------------------------------------------------------------------------------
    # Before the images are decoded, which can take minutes: weights that do not fit are refused.
    model = (resumed.model if resumed else build_model(args, tokenizer, text_config)).to(device)
    if args.compile:
        model.image_encoder.compile_training()
    print(f"model: {model.summary()}, on {device}")

    # --- images --------------------------------------------------------------------------------
    train_set, val_set = load_images(args, source, tokenizer, data, results, model)
    steps_per_epoch = count_batches(train_set, args.batch_size, args.captions_per_image)
    frozen_epochs = args.epochs if args.freeze_image_encoder else min(args.head_epochs, args.epochs)
    dtype = runtime.compute_dtype(device, args.precision)
    check_batch(args, model, dtype, len(train_set.records), frozen_epochs)

    # --- optimizer -----------------------------------------------------------------------------
    scaler = runtime.grad_scaler(device, dtype)
    optimizer = build_optimizer(
        model, args.lr, args.weight_decay, args.image_encoder_lr, args.text_encoder_lr)
    graphed = graphed_step(model, optimizer, scaler, args.chunk_size) if args.cuda_graph else None
    with runtime.stop_on_request() as stop_request:
        run = run_state.RunState(
            model, tokenizer, optimizer, scaler, results=results, flags=cli.plain_values(args),
            data=run_state.data_digests(train=train_set, validation=val_set),
            ema_decay=args.ema_decay, save_minutes=args.save_every, stop_request=stop_request,
            tensorboard=args.tensorboard)
        run.start(resumed)
        scheduler = build_schedule(  # a function of the step, which a resumed run knows by now
            optimizer, args.warmup_steps, args.epochs * steps_per_epoch, args.schedule,
            done_steps=run.steps, restart_at=frozen_epochs * steps_per_epoch)

        # --- loop ------------------------------------------------------------------------------
        # The first epochs train the heads on features that are computed once, the others on pixels.
        splits, features, pixels = [train_set, val_set], [], []
        if len(run.log) < frozen_epochs:
            features = freeze_images(data.cache, model.image_encoder, splits, dtype)
        if frozen_epochs < args.epochs:
            pixels = [cache_on_device(split, device) for split in splits]
        if len(run.log) < args.epochs:
            print(EPOCH_HEADER)
        for epoch in range(len(run.log) + 1, args.epochs + 1):
            train_input, val_input = features if epoch <= frozen_epochs else pixels
            train_one_epoch(
                model, train_input, optimizer, scheduler, scaler, batch_size=args.batch_size,
                captions_per_image=args.captions_per_image, flip=args.flip, seed=args.seed,
                epoch=epoch, dtype=dtype, chunk_size=args.chunk_size, progress=run.progress,
                freeze_batchnorm=args.freeze_batchnorm, graphed=graphed, after_step=run.after_step)
            if run.stopped:
                return run.report_stop(cli.resume_command(args, distributed.world_size())), val_set
            run.save()  # a run that is killed during validation continues with the validation
            start = time.perf_counter()
            metrics = evaluate_retrieval(run.eval_model, val_input) if len(val_set) else {}
            is_best = run.finish_epoch(metrics, time.perf_counter() - start)
            print(format_epoch(run.log[-1], is_best, args.epochs, frozen_epochs))
    return 0, val_set


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, Checkpoint | None]:
    """Parse the flags; with --resume also load the run, whose flags are then the defaults.

    Raises:
        UserError: there is no run to resume, a flag contradicts it, or a new run would replace an
            unfinished one with the same flags.
    """
    parser = cli.Parser(description=__doc__)
    cli.add_results_arguments(parser)
    cli.add_data_arguments(parser)
    cli.add_split_arguments(parser)
    cli.add_model_arguments(parser)
    cli.add_training_arguments(parser)
    cli.add_machine_arguments(parser)
    cli.apply_recipe(parser, argv)
    args = parser.parse_args(argv)
    results = cli.resolve_results(args)
    if not args.resume or (args.resume == "auto" and not run_state.has_run(results)):
        cli.check_text_flags(args)
        if not args.resume:
            run_state.check_no_unfinished_run(results, cli.plain_values(args))
        return args, None
    resumed = run_state.load_run(results)
    # Flags that the version of the run did not have yet get their baseline values.
    flags = {**RECIPES["baseline"], **run_state.rename_flags(resumed.content["args"])}
    # The folder of the run may have been moved since.
    parser.set_defaults(**{**flags, "results_dir": results.folder})
    args = parser.parse_args(argv)
    run_state.compare_flags(cli.plain_values(args), flags)
    return args, resumed


def load_captions(
    args: argparse.Namespace, resumed: Checkpoint | None
) -> tuple[DataSource, Tokenizer, str]:
    """Read and split the captions; return them, a tokenizer, and the configuration of a BERT.

    Raises:
        UserError: there are no validation images, or see `scan_dataset` and `load_pretrained`.
    """
    source = scan_dataset(**cli.scan_arguments(args))
    if args.val_fraction != 0 and (reason := source.explain_no_validation()):
        raise UserError(reason)
    if args.text_encoder == "bert":  # a resumed run does not need the files of --text-weights
        return source, *((resumed.tokenizer, resumed.model.config.text_config) if resumed else
                         load_pretrained(args.text_weights, args.context_length))
    # A vocabulary of all captions would leak the words of the validation captions.
    captions = [caption for record in source.splits["train"] for caption in record.captions]
    return source, Tokenizer.from_captions(captions, args.min_freq, args.context_length), ""


def load_images(
    args: argparse.Namespace, source: DataSource, tokenizer: Tokenizer, data: DataPaths,
    results: ResultPaths, model: DualEncoder,
) -> list[Flickr30kDataset]:
    """Decode the images; return the training and the validation split.

    With --freeze-text-encoder they have the features of the captions in place of tokens.

    Raises:
        UserError: a split has fewer than two images, or see `prepare_datasets`.
    """
    rejected = results.folder / "rejected.csv"
    check_splits(source, rejected, strict=args.strict)  # again below, without unreadable images
    datasets = prepare_datasets(
        source, [source.splits["train"], source.splits["val"]], tokenizer, args.image_size,
        cache=data.cache, rejected=rejected, strict=args.strict)
    for split, dataset in zip(("train", "val"), datasets, strict=True):
        n_images, n_captions = len(dataset.records), len(dataset)
        print(f"{'train' if split == 'train' else 'validation'}: {counted(n_images, 'images')}, "
              f"{counted(n_captions, 'captions')}")
        if reason := source.explain_small_split(split, n_images):
            raise UserError(reason)
    if not args.freeze_text_encoder:
        return datasets
    dtype = runtime.compute_dtype(model.logit_scale.device, args.precision)
    return freeze_texts(data.cache, model.text_encoder, datasets, dtype)


def build_model(args: argparse.Namespace, tokenizer: Tokenizer, text_config: str) -> DualEncoder:
    """Return a new model; the same seed gives the same weights."""
    runtime.seed_all(args.seed, "weights")
    model = DualEncoder(ModelConfig(
        vocab_size=len(tokenizer), image_encoder=args.image_encoder, image_size=args.image_size,
        context_length=args.context_length, token_dim=args.token_dim, embed_dim=args.embed_dim,
        dropout=args.dropout, drop_connect=args.drop_connect, word_dropout=args.word_dropout,
        flip_tta=args.flip_tta, text_encoder=args.text_encoder, text_config=text_config,
        text_pooling=args.text_pooling,
    ))
    if args.text_encoder == "bert":
        model.text_encoder.load_weights(args.text_weights)
    model.image_encoder.load_weights(args.weights)
    return model


def check_batch(args: argparse.Namespace, model: DualEncoder, dtype: torch.dtype, n_images: int,
                frozen_epochs: int) -> None:
    """Refuse a batch that cannot be trained on; note one that may not fit into memory."""
    unfrozen = frozen_epochs < args.epochs
    batch_size = min(args.batch_size, n_images)
    check_batch_size(batch_size, args.chunk_size, args.image_size,
                     batchnorm_trained=unfrozen and not args.freeze_batchnorm)
    note = explain_memory(model, batch_size, args.chunk_size, dtype) if unfrozen else None
    if note and distributed.rank() == 0:
        print_message(note)


if __name__ == "__main__":
    run_script(main)
