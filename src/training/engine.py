"""One epoch of training: `train_one_epoch` is the loop, `train_step` computes a step."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from src.data.dataset import Batch, Flickr30kDataset, Item
from src.data.loader import Prefetcher, sample_batches
from src.data.transforms import sample_crops, train_transform
from src.models.dual_encoder import DualEncoder
from src.models.loss import contrastive_loss
from src.training.cuda_graph import GraphedStep
from src.utils.distributed import all_gather_with_grad, average_gradients, rank, split_evenly
from src.utils.errors import UserError
from src.utils.runtime import autocast, free_memory, seed_all

CHECK_SECONDS = 0.5  # how often the loss is read: on a GPU the host has to wait for it


@dataclass
class Progress:
    """The state of an epoch between two steps, with which it can be continued.

    Attributes:
        losses: (steps of the epoch,) float32, the loss of each step so far.
        lr: the learning rate of the first step.
        step: steps done.
        pairs: image-caption pairs trained on.
        seconds: time spent.
        wait_seconds: the part of it that was spent waiting for batches.
    """

    losses: torch.Tensor
    lr: float
    step: int = 0
    pairs: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0

    def mean_loss(self) -> float:
        """Return the mean loss of the steps so far."""
        return self.losses[: self.step].double().mean().item()


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
    graphed: GraphedStep | None = None,
    progress: Progress | None = None,
    after_step: Callable[[Progress], bool] = lambda progress: False,
) -> Progress:
    """Train on every caption once, except those that do not fill the last batch.

    Args:
        model: on the device to train on.
        dataset: the training split.
        optimizer, scheduler, scaler: stepped once per batch.
        batch_size: images per step, over all ranks.
        captions_per_image: captions that each image of a batch brings.
        flip: flip half of the images horizontally.
        seed, epoch: with the number of the step the source of all random numbers.
        dtype: of matrix products and convolutions, see `compute_dtype`.
        chunk_size: images in memory at a time, None for the whole batch; see `forward_backward`.
        freeze_batchnorm: normalize with the running statistics and do not update them.
        graphed: replays steps as a CUDA graph; the same object in every epoch.
        progress: of an epoch that was interrupted, to continue it.
        after_step: called after each step; returns whether to stop.

    Returns:
        The progress at the end of the epoch, or where `after_step` stopped it.

    Raises:
        UserError: the loss is not finite.
    """
    device = model.logit_scale.device
    model.train()  # validation has left it in eval mode
    if freeze_batchnorm:
        model.image_encoder.freeze_batchnorm()
    batches = sample_batches(dataset, batch_size, captions_per_image, seed, epoch)
    # Every loss is kept, so that the step that broke a run can be named.
    losses = torch.zeros(len(batches), device=device)
    if progress is None:
        progress = Progress(losses, lr=scheduler.get_last_lr()[0])
    losses[: progress.step] = progress.losses[: progress.step]
    progress.losses = losses
    # The batches are a function of seed and epoch: a resumed epoch skips those it has done.
    loader = Prefetcher(dataset, batches[progress.step :], device)
    start, last_check = time.perf_counter() - progress.seconds, 0.0
    waited_before = progress.wait_seconds
    with tqdm(loader, total=len(batches), initial=progress.step, desc=f"epoch {epoch}",
              unit="step", leave=False, disable=None if rank() == 0 else True,
              file=sys.stderr) as bar:
        for batch in bar:
            # The key makes a step a function of its number, so a resumed run draws the same numbers
            # without a saved generator state.
            loss = train_step(model, optimizer, scaler, batch, flip=flip, dtype=dtype,
                              key=(seed, epoch, progress.step), chunk_size=chunk_size,
                              graphed=graphed)
            scheduler.step()  # per step, not per epoch

            progress.losses[progress.step] = loss  # stays on the device: no wait
            progress.step += 1
            progress.pairs += len(batch.image_index)  # of all ranks
            progress.seconds = time.perf_counter() - start
            progress.wait_seconds = waited_before + loader.wait_seconds
            if progress.seconds - last_check > CHECK_SECONDS or progress.step == len(batches):
                _check_finite(progress, dataset, batches, epoch, scheduler.get_last_lr()[0])
                bar.set_postfix_str(f"loss {progress.mean_loss():.3f}, "
                                    f"{progress.pairs / progress.seconds:,.0f} pairs/s")
                last_check = progress.seconds
            if after_step(progress):
                break
    return progress


def train_step(
    model: DualEncoder, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    batch: Batch, *, flip: bool, key: tuple[int, ...], dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None, graphed: GraphedStep | None = None,
) -> torch.Tensor:
    """Compute the gradients of a batch and update the weights; see `forward_backward`.

    Args:
        graphed: replays the step as a CUDA graph; None to launch its kernels one by one.

    Returns:
        The loss before the update, a scalar without gradient; `graphed` overwrites it.
    """

    def step(batch: Batch, crops: torch.Tensor | None) -> torch.Tensor:
        loss = _add_gradients(model, scaler, batch, crops, key, dtype, chunk_size)
        scaler.step(optimizer)  # skips the step if a float16 gradient is not finite
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.clamp_logit_scale()
        return loss

    crops = _seed_step(model, batch, flip, key)
    return graphed(step, batch, crops) if graphed else step(batch, crops)


def forward_backward(
    model: DualEncoder, scaler: torch.amp.GradScaler, batch: Batch, *, flip: bool,
    key: tuple[int, ...], dtype: torch.dtype = torch.float32, chunk_size: int | None = None,
) -> torch.Tensor:
    """Add the gradients of the loss of a batch, over all ranks, to the parameters' gradients.

    With `chunk_size` the gradients are cached as in Gao et al., "Scaling Deep Contrastive Learning
    Batch Size under Memory Limited Setup", 2021: embed everything without a graph, compute the
    loss's gradient with respect to the embeddings, then embed chunk by chunk again with the same
    random numbers and propagate each chunk's part of that gradient. It is exact, takes the memory
    of one chunk, and costs a second forward pass. (BatchNorm in training mode normalizes over a
    chunk instead of the batch, and updates its statistics twice.)

    Args:
        model: in training mode, on the device of the batch.
        scaler: scales the loss for float16.
        batch: this rank's part of a batch.
        flip: flip half of the images horizontally.
        key: seeds all random numbers.
        dtype: of matrix products and convolutions.
        chunk_size: images in memory at a time; None for all at once.

    Returns:
        The loss of the whole batch, a scalar without gradient.
    """
    crops = _seed_step(model, batch, flip, key)
    return _add_gradients(model, scaler, batch, crops, key, dtype, chunk_size)


def _seed_step(
    model: DualEncoder, batch: Batch, flip: bool, key: tuple[int, ...]
) -> torch.Tensor | None:
    """Seed the random numbers of a step, and draw the crops of this rank's images."""
    seed_all(*key)
    crops = None
    if batch.images.ndim == 4:  # pixels; features of a frozen encoder are not cropped
        slack = batch.images.shape[1] - model.config.image_size
        # Drawn for the whole batch, so that the crops do not depend on the number of ranks.
        crops = sample_crops(len(batch.counts), slack, flip)[batch.local.start : batch.local.stop]
    _seed_chunk(key, 0)
    return crops


def _seed_chunk(key: tuple[int, ...], number: int) -> None:
    """Seed the dropout masks of a chunk; the same in both passes."""
    seed_all(*key, rank(), number)


def _add_gradients(
    model: DualEncoder, scaler: torch.amp.GradScaler, batch: Batch, crops: torch.Tensor | None,
    key: tuple[int, ...], dtype: torch.dtype, chunk_size: int | None,
) -> torch.Tensor:
    """Add the gradients of a batch after `_seed_step`. Returns the loss."""
    chunks = batch.chunks(chunk_size)
    one_pass = len(chunks) == 1

    def embed(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        image_slice, token_slice = chunks[number]
        if not one_pass:  # a CUDA graph, which is one pass, cannot be seeded within
            _seed_chunk(key, number)
        images = batch.images[image_slice]
        if crops is not None:
            images = train_transform(images, model.config.image_size, crops[image_slice])
        with autocast(images.device, dtype):
            return model(images, batch.tokens[token_slice])

    # With several chunks the first pass keeps no activations: only the embeddings are needed.
    with torch.set_grad_enabled(one_pass):
        embeddings = [embed(number) for number in range(len(chunks))]
    images, texts = (torch.cat(parts) for parts in zip(*embeddings, strict=True))
    if not one_pass:
        images.requires_grad_()  # leaves: backward stops here and leaves .grad on them
        texts.requires_grad_()

    # Every rank computes the same loss of the whole batch: all images are negatives.
    parts = split_evenly(len(batch.counts))
    loss = contrastive_loss(
        all_gather_with_grad(images, [len(part) for part in parts]),
        all_gather_with_grad(texts, [batch.count_captions(part) for part in parts]),
        batch.image_index, model.logit_scale,
    )
    scaler.scale(loss).backward()
    if not one_pass:
        for number, (image_slice, token_slice) in enumerate(chunks):
            torch.autograd.backward(embed(number), (images.grad[image_slice],
                                                    texts.grad[token_slice]))
    # Not DistributedDataParallel: it averages in each backward pass, and a batch in chunks has
    # several; its hooks would also be in the way of the gathered loss.
    average_gradients(model)
    return loss.detach()


def check_batch_size(
    batch_size: int, chunk_size: int | None, image_size: int, batchnorm_trained: bool
) -> None:
    """Check that a batch can be trained on by all ranks.

    Args:
        batch_size: images per step, over all ranks.
        chunk_size: images in memory at a time, None for all.
        image_size: side of the images in pixels.
        batchnorm_trained: whether BatchNorm normalizes over the images.

    Raises:
        UserError: the batch is too small; the message says what to change.
    """
    parts = [len(part) for part in split_evenly(batch_size)]
    if batch_size < 2:
        raise UserError("a batch of 1 image has no negatives, so its loss is always 0: choose "
                        "--batch-size 2 or more")
    if min(parts) < 1:
        raise UserError(f"a batch of {batch_size} images leaves some of {len(parts)} processes "
                        "without one: choose a larger --batch-size or fewer processes")
    smallest = min((part - 1) % (chunk_size or part) + 1 for part in parts)
    # At 32 pixels the last feature map is 1x1: one image gives BatchNorm one value per channel.
    if smallest == 1 and image_size <= 32 and batchnorm_trained:
        raise UserError(
            f"BatchNorm cannot be trained on a single image of {image_size} pixels, and a batch of "
            f"{batch_size} has one in a chunk or process of its own: choose another --batch-size, "
            "--chunk-size or number of processes, or a larger --image-size")


def explain_memory(
    model: DualEncoder, batch_size: int, chunk_size: int | None, dtype: torch.dtype
) -> str | None:
    """Return a warning if training the image encoder may need more memory than is free, or None.

    The system may kill a process without a message when its memory is used up.

    Args:
        model: on the device to train on.
        batch_size: images per step, over all ranks.
        chunk_size: images in memory at a time, None for all.
        dtype: of matrix products and convolutions.
    """
    device = model.logit_scale.device
    free = free_memory(device)
    count = max(len(part) for part in split_evenly(batch_size))
    one = 1.6 * activation_bytes(model, dtype)  # with gradients and the kernels' own buffers
    needed = one * min(count, chunk_size or count)
    if free is None or needed < free:
        return None
    fitting = max(1, 2 ** int(math.log2(max(1, free / 2 / one))))
    return (f"note: a step takes about {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB "
            f"are free:\n--chunk-size {fitting} takes {one * fitting / 1e9:.1f} GB, for a second "
            "forward pass")


def activation_bytes(model: DualEncoder, dtype: torch.dtype) -> float:
    """Return the bytes per image that the image encoder keeps for the backward pass."""
    sizes: dict[int, int] = {}  # address of a saved tensor's memory -> its bytes
    parameters = {p.data_ptr() for p in model.parameters()}
    saved = []  # alive, so that no two have the same address

    def pack(tensor: torch.Tensor) -> None:
        # Detached, and nothing is returned for a backward pass: an output that its own node holds
        # would keep the graph, and with it the parameters' AccumulateGrad nodes, for good.
        saved.append(tensor.detach())
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in parameters:
            sizes[memory.data_ptr()] = memory.nbytes()

    size = model.config.image_size
    images = torch.zeros(2, 3, size, size, device=model.logit_scale.device)
    encoder = model.image_encoder.train()
    encoder.freeze_batchnorm()  # no image may change the statistics; train_one_epoch undoes it
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None), \
            autocast(images.device, dtype):
        encoder.backbone(images.contiguous(memory_format=torch.channels_last))
    return sum(sizes.values()) / len(images)


def _check_finite(
    progress: Progress, dataset: Flickr30kDataset, batches: list[list[Item]], epoch: int, lr: float
) -> None:
    """Raise if a loss is not finite: further steps would only overwrite good weights."""
    losses = progress.losses[: progress.step]
    if not losses.isfinite().all():
        step = int((~losses.isfinite()).int().argmax())
        names = [dataset.records[image].name for image, _ in batches[step]]
        raise UserError(
            f"the loss is no longer finite at epoch {epoch}, step {step} (lr {lr:.2g});\n"
            f"images of that batch: {', '.join(names)}\n"
            "The last good checkpoint is kept: continue from it with --resume and a smaller --lr"
        )
