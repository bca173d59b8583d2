"""One epoch of training: read this loop to know what a step does."""

from __future__ import annotations

import math
import sys
import time

import torch
from tqdm import tqdm

from src.augment import train_view
from src.dataset import Flickr30kDataset
from src.errors import UserError
from src.loss import contrastive_loss
from src.model import DualEncoder
from src.runtime import autocast, seed_all

REFRESH_SECONDS = 0.5  # reading the loss waits for the GPU, so the bar does it this rarely


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
) -> dict[str, float]:
    """Train on every caption once.

    Args:
        model: on the device to train on.
        batch_size: photos a step.
        captions_per_image: captions that each photo of a batch brings.
        flip: mirror half of the photos.
        seed, epoch: with the step's number the source of all randomness.

    Returns:
        loss (mean over the steps), pairs_per_second, seconds, wait_share (the part of the time
        that the model waited for data).

    Raises:
        UserError: the loss is not finite.
    """
    device = model.logit_scale.device
    model.train()
    batches = dataset.epoch(batch_size, captions_per_image, seed, epoch)
    total_loss = torch.zeros((), device=device)
    pairs, waited, refreshed = 0, 0.0, 0.0
    start = time.perf_counter()
    bar = tqdm(batches, desc=f"epoch {epoch}", unit="step", disable=None, file=sys.stderr)
    for step, items in enumerate(bar):
        seed_all(seed, epoch, step)
        asked = time.perf_counter()
        batch = dataset.batch(items).to(device)
        waited += time.perf_counter() - asked
        images = train_view(batch.pixels, model.config.image_size, flip)
        with autocast(device):
            image_embeddings, text_embeddings = model(images, batch.tokens)
        loss = contrastive_loss(
            image_embeddings, text_embeddings, batch.image_index, model.logit_scale
        )
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        model.clamp_logit_scale()
        total_loss += loss.detach()
        pairs += len(batch.tokens)
        now = time.perf_counter()
        if now - refreshed > REFRESH_SECONDS or step == len(batches) - 1:
            refreshed = now
            _check_finite(loss.item(), epoch, step, optimizer, model)
            bar.set_postfix_str(f"loss {total_loss.item() / (step + 1):.3f}, "
                                f"{pairs / (now - start):,.0f} pairs/s")
    seconds = time.perf_counter() - start
    return {
        "loss": total_loss.item() / max(1, len(batches)),
        "pairs_per_second": pairs / seconds,
        "seconds": seconds,
        "wait_share": waited / seconds,
    }


def _check_finite(
    loss: float, epoch: int, step: int, optimizer: torch.optim.Optimizer, model: DualEncoder
) -> None:
    """Stop a run that has left the numbers; going on would only overwrite good weights."""
    if not math.isfinite(loss):
        raise UserError(
            f"the loss became {loss} at epoch {epoch}, step {step} (lr "
            f"{optimizer.param_groups[0]['lr']:.2g}, logit_scale {model.logit_scale.item():.3f}); "
            "the last good checkpoint is kept: go on from it with --resume and a smaller --lr"
        )
