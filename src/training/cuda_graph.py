"""The training step as one CUDA graph, which the host launches at once, not kernel by kernel.

A step of EfficientNet-B0 has about 1,400 kernels, and a fast GPU computes them in less time than a
host needs to launch them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from src.data.dataset import Batch
from src.models.dual_encoder import DualEncoder
from src.utils.distributed import world_size
from src.utils.errors import print_message
from src.utils.runtime import copy_to_device

WARM_UP = 3  # eager steps in which cuDNN chooses its kernels
MAX_GRAPHS = 4  # shapes of batches: where images have unequal numbers of captions there are many

# Computes a step of a batch with its crops, and returns the loss.
Step = Callable[[Batch, torch.Tensor | None], torch.Tensor]


@dataclass
class _Graph:
    """A captured step, with the tensors that it reads and the loss that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    loss: torch.Tensor


class GraphedStep:
    """Run training steps; from the fourth batch of a shape replay them as a CUDA graph.

    A replay computes the same bits as the step, with the learning rates in float32: torch seeds a
    graph's random numbers when it is replayed, and the optimizer reads its rates from tensors. If a
    step cannot be captured, a note is printed, and all steps run without a graph.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Prepare for the steps of `optimizer`, which must be fused, on the current GPU."""
        self._optimizer = optimizer
        # float32 on the device: a graph would keep the value of a number.
        self._rates = [torch.zeros((), device="cuda") for _ in optimizer.param_groups]
        # Steps before the capture run on the stream of the capture, as PyTorch requires.
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()  # the graphs run one at a time: one pool
        self._graphs: dict[tuple, _Graph] = {}
        self._seen: Counter[tuple] = Counter()
        self._failed = False

    @property
    def captured(self) -> int:
        """How many shapes of batches have a graph."""
        return len(self._graphs)

    def __call__(self, step: Step, batch: Batch, crops: torch.Tensor | None) -> torch.Tensor:
        """Compute a step; the random number generators must have been seeded.

        Args:
            step: computes the step without a value on the host; the same in every call.
            batch: on the GPU.
            crops: of its images, or None for features.

        Returns:
            The loss, a scalar that the next call may overwrite.
        """
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        crops = None if crops is None else copy_to_device(crops, batch.images.device)
        inputs = [tensor for tensor in (batch.images, batch.tokens, batch.image_index, crops)
                  if tensor is not None]
        shape = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if shape not in self._graphs and self._seen[shape] >= WARM_UP \
                and len(self._graphs) < MAX_GRAPHS and not self._failed:
            self._capture(shape, step, batch, crops)
        if shape not in self._graphs:
            self._seen[shape] += 1
            return self._run(step, batch, crops)
        graph = self._graphs[shape]
        for own, tensor in zip(graph.inputs, inputs, strict=True):
            own.copy_(tensor)
        graph.graph.replay()
        return graph.loss

    def _run(self, step: Step, batch: Batch, crops: torch.Tensor | None) -> torch.Tensor:
        """Compute a step without a graph."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), self._rates_on_device(capturable=False):
            loss = step(batch, crops)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _capture(
        self, shape: tuple, step: Step, batch: Batch, crops: torch.Tensor | None
    ) -> None:
        """Capture the step of batches of this shape; nothing is computed yet."""
        images, tokens, image_index = (
            tensor.clone() for tensor in (batch.images, batch.tokens, batch.image_index))
        own = replace(batch, images=images, tokens=tokens, image_index=image_index)
        own_crops = None if crops is None else crops.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context restores the stream if the capture fails. Other threads, such as
            # the one that prepares batches, go on: hence thread_local.
            with torch.cuda.stream(self._stream), self._rates_on_device(capturable=True), \
                    torch.cuda.graph(graph, pool=self._pool, stream=self._stream,
                                     capture_error_mode="thread_local"):
                loss = step(own, own_crops)
        except RuntimeError as error:  # out of memory too: without a graph it may be enough
            self._give_up(images.device, error)
            return
        tensors = [images, tokens, image_index, *([] if crops is None else [own_crops])]
        self._graphs[shape] = _Graph(graph, tensors, loss)

    def _give_up(self, device: torch.device, error: RuntimeError) -> None:
        """Print a note, and go back to steps without a graph."""
        reason = str(error).splitlines()[0]
        print_message(f"note: the training step cannot be captured as a CUDA graph ({reason}); "
                      "training continues without it")
        self._failed = True
        self._graphs.clear()
        self._optimizer.zero_grad(set_to_none=True)  # gradients that were never computed
        # The failed capture may have left its state in the generator: give it a new one.
        generator = torch.cuda.default_generators[device.index]
        fresh = torch.Generator(device).manual_seed(generator.initial_seed())
        generator.graphsafe_set_state(fresh)

    @contextlib.contextmanager
    def _rates_on_device(self, capturable: bool) -> Iterator[None]:
        """Let the optimizer read its learning rates from the device."""
        groups = self._optimizer.param_groups
        before = [(group["lr"], group["capturable"]) for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group.update(lr=rate, capturable=capturable)
        try:
            yield
        finally:
            for group, (rate, was_capturable) in zip(groups, before, strict=True):
                group.update(lr=rate, capturable=was_capturable)


def graphed_step(
    model: DualEncoder, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    chunk_size: int | None,
) -> GraphedStep | None:
    """Return a GraphedStep; None where there is no GPU, or a step is more than one graph.

    That is with several processes, with chunks, and with a scaler, which skips steps. None also
    with a BERT, whose steps have not been tested as a graph.
    """
    possible = (model.logit_scale.is_cuda and model.config.text_encoder == "words"
                and world_size() == 1 and not chunk_size and not scaler.is_enabled())
    return GraphedStep(optimizer) if possible else None
