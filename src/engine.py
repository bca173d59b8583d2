"""One epoch of training: read this loop to know what a step does."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from src.augment import draw_places, train_view
from src.dataset import Batch, Flickr30kDataset
from src.distributed import average_gradients, gather_rows, rank, shares
from src.errors import UserError
from src.feed import feed
from src.loss import contrastive_loss
from src.model import DualEncoder
from src.runtime import autocast, seed_all

REFRESH_SECONDS = 0.5  # reading the loss waits for the GPU, so the bar does it this rarely


@dataclass
class Progress:
    """How far an epoch has come; all that a run needs to go on in its middle.

    Attributes:
        lr: the learning rate of the first step.
        step: steps done.
        loss_sum: scalar, the sum of their losses, on the device.
        pairs: photo and caption pairs trained on.
        seconds, waited: time spent, and the part of it that the model waited for data.
    """

    lr: float
    step: int = 0
    loss_sum: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    pairs: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def summary(self) -> tuple[dict[str, float], dict[str, float]]:
        """What a second run would find too: lr, mean loss; and what the clock says."""
        seconds = max(self.seconds, 1e-9)
        return (
            {"lr": self.lr, "loss": self.loss_sum.item() / max(1, self.step)},
            {"seconds": self.seconds, "pairs_per_second": self.pairs / seconds,
             "wait_share": self.waited / seconds},
        )


def train_one_epoch(
    model: DualEncoder,
    dataset: Flickr30kDataset,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    *,
    batch_size: int,
    captions_per_image: int,
    flip: bool,
    seed: int,
    epoch: int,
    dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
    freeze_batchnorm: bool = False,
    progress: Progress | None = None,
) -> Iterator[Progress]:
    """Train on every caption once, but for those that fill no last batch.

    Yields after each step, so that the caller may save or stop.

    Args:
        model: on the device to train on.
        batch_size: photos a step, of all processes together.
        captions_per_image: captions that each photo of a batch brings.
        flip: mirror half of the photos.
        seed, epoch: with the step's number the source of all randomness.
        dtype: of products and convolutions, as `compute_dtype` gives it.
        chunk_size: photos in memory at a time, None for the whole batch; see `backward`.
        freeze_batchnorm: normalise with the running statistics, and leave them as they are.
        progress: where the epoch was left, if it was.

    Raises:
        UserError: the loss is not finite.
    """
    device = model.logit_scale.device
    model.train()
    if freeze_batchnorm:
        model.image_encoder.freeze_batchnorm()
    batches = dataset.epoch(batch_size, captions_per_image, seed, epoch)
    progress = progress or Progress(lr=scheduler.get_last_lr()[0])
    progress.loss_sum = progress.loss_sum.to(device)
    # Of the first step without a finite loss: its number, rate and logit_scale.
    first_bad = torch.full((3,), -1.0, device=device)
    last = asked = time.perf_counter()
    refreshed = 0.0
    with tqdm(total=len(batches), initial=progress.step, desc=f"epoch {epoch}", unit="step",
              disable=None if rank() == 0 else True, file=sys.stderr) as bar:
        for batch in feed(dataset, batches[progress.step :], device):
            progress.waited += time.perf_counter() - asked
            loss = backward(model, scaler, batch, flip=flip, key=(seed, epoch, progress.step),
                            dtype=dtype, chunk_size=chunk_size)
            here = torch.stack([torch.full_like(loss, progress.step),
                                torch.full_like(loss, scheduler.get_last_lr()[0]),
                                model.logit_scale.detach()])
            first_bad = torch.where((first_bad[0] < 0) & ~loss.isfinite(), here, first_bad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            model.clamp_logit_scale()
            progress.loss_sum += loss
            progress.step += 1
            progress.pairs += sum(batch.counts)
            now = time.perf_counter()
            progress.seconds += now - last
            last = now
            if now - refreshed > REFRESH_SECONDS or progress.step == len(batches):
                refreshed = now
                _check_finite(*first_bad.tolist(), dataset, batches, epoch)
                bar.set_postfix_str(f"loss {progress.loss_sum.item() / progress.step:.3f}, "
                                    f"{progress.pairs / progress.seconds:,.0f} pairs/s")
            bar.update()
            yield progress
            asked = time.perf_counter()


def backward(
    model: DualEncoder, scaler: torch.amp.GradScaler, batch: Batch, *, flip: bool,
    key: tuple[int, ...], dtype: torch.dtype = torch.float32, chunk_size: int | None = None,
) -> torch.Tensor:
    """Add the gradients of a batch's loss to the parameters', over all processes.

    In chunks, by the method of Gao et al., "Scaling Deep Contrastive Learning Batch Size under
    Memory Limited Setup", 2021: embed everything without a graph, take the loss's gradient by the
    embeddings, then embed piece by piece again, with the same random draws, and send each piece's
    share of that gradient back. Exact, in the memory of one chunk, for a second pass forward. (Only
    BatchNorm sees a chunk where it would have seen the batch, and twice, unless it is frozen.)

    Args:
        scaler: scales the loss where half precision needs it.
        flip: mirror half of the photos.
        key: seeds all that is random.
        dtype: of products and convolutions.
        chunk_size: photos in memory at a time; None for all at once.

    Returns:
        The loss of the whole batch, a scalar without gradient.
    """
    seed_all(*key)
    if batch.images.ndim == 4:  # pixels; features of a frozen encoder have no places to cut from
        slack = batch.images.shape[1] - model.config.image_size
        places = draw_places(len(batch.counts), slack, flip)[batch.rows.start : batch.rows.stop]
    pieces = batch.pieces(chunk_size)

    def embed(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        photos, captions = pieces[number]
        seed_all(*key, rank(), number)  # of dropout
        images = batch.images[photos]
        if images.ndim == 4:
            images = train_view(images, model.config.image_size, places[photos])
        with autocast(images.device, dtype):
            return model(images, batch.tokens[captions])

    at_once = len(pieces) == 1
    with torch.set_grad_enabled(at_once):
        images, texts = map(torch.cat, zip(*map(embed, range(len(pieces))), strict=True))
    if not at_once:
        images.requires_grad_()
        texts.requires_grad_()
    parts = shares(len(batch.counts))
    loss = contrastive_loss(
        gather_rows(images, [len(rows) for rows in parts]),
        gather_rows(texts, [batch.captions_of(rows) for rows in parts]),
        batch.image_index, model.logit_scale,
    )
    scaler.scale(loss).backward()
    if not at_once:
        for number, (photos, captions) in enumerate(pieces):
            torch.autograd.backward(embed(number), (images.grad[photos], texts.grad[captions]))
    average_gradients(model)
    return loss.detach()


def _check_finite(
    bad_step: float, lr: float, logit_scale: float, dataset: Flickr30kDataset, batches: list,
    epoch: int,
) -> None:
    """Stop a run that has left the numbers; going on would only overwrite good weights."""
    if bad_step >= 0:
        names = [dataset.records[photo].name for photo, _ in batches[int(bad_step)]]
        raise UserError(
            f"the loss is no longer finite at epoch {epoch}, step {bad_step:.0f} (lr {lr:.2g}, "
            f"logit_scale {logit_scale:.3f});\n"
            f"photos of that batch: {', '.join(names)}\n"
            "The last good checkpoint is kept: go on from it with --resume and a smaller --lr"
        )
