"""What only a GPU can show: pytest -m cuda. Skipped on machines without one."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train
from src.data.captions import ImageRecord
from src.data.dataset import Batch, Flickr30kDataset
from src.data.loader import Prefetcher, cache_on_device, sample_batches
from src.data.pixel_store import PixelStore
from src.data.transforms import eval_transform, sample_crops, train_transform
from src.evaluation.embed import evaluate_retrieval
from src.evaluation.metrics import retrieval_ranks
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.training import cuda_graph
from src.training.cuda_graph import GraphedStep, graphed_step
from src.training.engine import Progress, forward_backward, train_one_epoch
from src.training.optim import MovingAverage, build_optimizer, build_schedule
from src.utils.errors import UserError
from src.utils.runtime import autocast, explain_oom, seed_all
from tests.tiny_data import make_tiny_data

pytestmark = [
    pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    # Shown, and no errors: what PyTorch warns of depends on the GPU and on the versions of CUDA.
    pytest.mark.filterwarnings("default"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[1]
SIZE = 64


@pytest.fixture(autouse=True)
def exact_float32():
    """Compute float32 products and convolutions in float32, not TF32, and restore the kernels."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def dataset() -> Flickr30kDataset:
    """Return 48 images of noise around a color with one to three captions each."""
    rng = np.random.default_rng(0)
    colors, noise = rng.integers(0, 256, (48, 1, 1, 3)), rng.integers(-60, 60, (48, 68, 68, 3))
    pixels = (colors + noise).clip(0, 255).astype(np.uint8)
    records = [ImageRecord(f"{i}.jpg", tuple(f"image {i} word{j}" for j in range(1 + i % 3)))
               for i in range(48)]
    store = PixelStore(pixels, {record.name: i for i, record in enumerate(records)}, {})
    return Flickr30kDataset(records, store, Tokenizer.from_captions(
        [caption for record in records for caption in record.captions], 1, 6))


def make_model(device: torch.device, **config) -> DualEncoder:
    """Return a small model in training mode, with the same weights on every device."""
    seed_all(0, "weights")
    defaults = {"vocab_size": 64, "image_size": SIZE, "dropout": 0.0, "drop_connect": 0.0}
    return DualEncoder(ModelConfig(**{**defaults, **config})).to(device).train()


def make_calibrated_model(dataset: Flickr30kDataset, device: torch.device) -> DualEncoder:
    """Return a model whose running statistics are those of a batch.

    With the initial ones the features of random weights vanish in evaluation.
    """
    model = make_model(CPU)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.image_encoder(eval_transform(make_batch(dataset, CPU).images, SIZE))
    return model.to(device)


def make_batch(dataset: Flickr30kDataset, device: torch.device, size: int = 16) -> Batch:
    """Return the first batch of an epoch."""
    return dataset.batch(sample_batches(dataset, size, 2, seed=0, epoch=1)[0]).to(device)


def make_graphed(model: DualEncoder, optimizer: torch.optim.Optimizer) -> GraphedStep:
    """Return what train.py makes for --cuda-graph."""
    return graphed_step(model, optimizer, torch.amp.GradScaler("cuda", enabled=False), None)


def step_gradients(
    model: DualEncoder, batch: Batch, dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None, scaler: torch.amp.GradScaler | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and the unscaled gradients of a step."""
    scaler = scaler or torch.amp.GradScaler(model.logit_scale.device.type, enabled=False)
    model.zero_grad(set_to_none=True)
    loss = forward_backward(model, scaler, batch, flip=True, key=(0, 1, 0), dtype=dtype,
                            chunk_size=chunk_size)
    scale = scaler.get_scale()
    return loss, {name: p.grad / scale for name, p in model.named_parameters()}


def assert_gradients_close(found: dict, expected: dict, tolerance: float) -> None:
    """Compare the gradients of each parameter relative to their norm.

    A shift before a BatchNorm has no gradient, only rounding errors: norms below a thousandth of
    the whole gradient's count as that.
    """
    floor = 1e-3 * torch.stack([value.norm().cpu() for value in expected.values()]).norm()
    for name, value in expected.items():
        error = (found[name].cpu() - value.cpu()).norm() / value.norm().cpu().clamp(min=floor)
        assert error < tolerance, (name, error.item())


def train_steps(
    model: DualEncoder, dataset: Flickr30kDataset, optimizer: torch.optim.Optimizer,
    epochs: int = 1, **options: object,
) -> None:
    """Train for epochs of six steps."""
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    for epoch in range(1, epochs + 1):
        train_one_epoch(
            model, dataset, optimizer, build_schedule(optimizer, 0, 1, "constant"), scaler,
            batch_size=16, captions_per_image=1, flip=True, seed=0, epoch=epoch, **options)


def test_a_step_equals_the_cpu(dataset):
    """Loss and gradients in float32 are those of the CPU."""
    results = [step_gradients(make_model(device), make_batch(dataset, device))
               for device in (CPU, CUDA)]
    torch.testing.assert_close(results[1][0].cpu(), results[0][0], rtol=1e-4, atol=1e-4)
    assert_gradients_close(results[1][1], results[0][1], 2e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float32, 1e-3), (torch.bfloat16, 0.5), (torch.float16, 0.15)], ids=str)
def test_chunks_equal_the_whole_batch(dataset, dtype, tolerance):
    """In every precision, with a scaler for float16, chunks give the gradient of the batch.

    cuDNN may compute a chunk with another kernel than the batch: over the depth of the network the
    rounding of its results grows to a quarter of some gradients in bfloat16.
    """
    results = []
    for chunk_size in (None, 5):
        model = make_calibrated_model(dataset, CUDA)
        model.image_encoder.freeze_batchnorm()
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16, init_scale=1024.0)
        results.append(step_gradients(model, make_batch(dataset, CUDA), dtype, chunk_size, scaler))
    assert_gradients_close(results[1][1], results[0][1], tolerance)


def test_pixels_on_the_device_are_the_pixels(dataset):
    """Cached and copied batches hold the same bits."""
    batches = sample_batches(dataset, 16, 2, seed=0, epoch=1)
    cached = Prefetcher(cache_on_device(dataset, CUDA), batches, CUDA)
    for one, other in zip(Prefetcher(dataset, batches, CUDA), cached, strict=True):
        assert one.images.is_cuda and torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)


def test_transforms_equal_the_cpu(dataset):
    """Crop, flip and normalization give the values of the CPU."""
    pixels = dataset.take_images(np.arange(16))
    torch.manual_seed(0)
    crops = sample_crops(16, 4, flip=True)
    for transform in (lambda x: train_transform(x, SIZE, crops), lambda x: eval_transform(x, SIZE)):
        torch.testing.assert_close(transform(pixels.to(CUDA)).cpu(), transform(pixels))


def test_deterministic_runs_end_in_the_same_bits(tmp_path, monkeypatch):
    """With --deterministic a run, one with a CUDA graph, and a resumed one are the same."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    images, annotations = make_tiny_data(tmp_path / "data")
    # The graph keeps the learning rate in float32, which has this one.
    flags = ["--images", str(images), "--annotations", str(annotations), "--val-fraction", "0.25",
             "--image-size", str(SIZE), "--weights", "none", "--batch-size", "4", "--device",
             "cuda", "--deterministic", "--lr", str(2**-11)]

    def run(name: str, *more: str) -> dict:
        assert train.main([*flags, "--results-dir", str(tmp_path / name), *more]) == 0
        last = tmp_path / name / "models" / "flickr30k_clip_last.pth"
        return torch.load(last, weights_only=True)["model_state"]  # no map_location: CPU tensors

    one = run("one", "--epochs", "2", "--no-cuda-graph")
    two = run("two", "--epochs", "2", "--no-cuda-graph")
    graph = run("graph", "--epochs", "2", "--cuda-graph")
    run("resumed", "--epochs", "1", "--cuda-graph")
    resumed = run("resumed", "--epochs", "2", "--cuda-graph", "--resume")
    for other in (two, graph, resumed):
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert not any(value.is_cuda for value in one.values())


def test_a_compiled_step_equals_the_eager_step(dataset):
    """With drop-connect too, torch.compile changes the features by rounding only."""
    results = []
    images = eval_transform(dataset.take_images(np.arange(16)).to(CUDA), SIZE)
    for compiled in (False, True):
        encoder = make_model(CUDA, drop_connect=0.2).image_encoder
        if compiled:
            encoder.compile_training()
        torch.manual_seed(0)
        with autocast(CUDA, torch.bfloat16):
            results.append(encoder(images).float())
        assert encoder.compiled == compiled
    error = (results[1] - results[0]).norm() / results[0].norm()
    assert error < 0.4  # features in float32 differ by 0.2, those of another seed by 1.1


def test_a_run_moves_between_devices(tmp_path):
    """A run started on the GPU continues on the CPU, and then on the GPU again."""
    images, annotations = make_tiny_data(tmp_path / "data")
    flags = ["--images", str(images), "--annotations", str(annotations), "--val-fraction", "0.25",
             "--image-size", str(SIZE), "--weights", "none", "--batch-size", "4", "--ema-decay",
             "0.9", "--results-dir", str(tmp_path / "run")]
    for epochs, device in enumerate(("cuda", "cpu", "cuda"), start=1):
        more = ["--resume"] if epochs > 1 else []
        assert train.main([*flags, "--epochs", str(epochs), "--device", device, *more]) == 0
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 3


def test_an_infinite_gradient_skips_the_step(dataset):
    """With float16 a gradient that is not finite changes no weight and lowers the scale."""
    model = make_model(CUDA)
    optimizer = build_optimizer(model, 1e-3, 0.01)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**120)  # overflows in float16
    before = deepcopy(model.state_dict())
    forward_backward(model, scaler, make_batch(dataset, CUDA), flip=True, key=(0,),
                     dtype=torch.float16)
    scaler.step(optimizer)
    scaler.update()
    parameters = dict(model.named_parameters())
    assert [name for name in parameters if not torch.equal(parameters[name], before[name])] == []
    assert scaler.get_scale() < 2.0**120


def run_epochs(
    dataset: Flickr30kDataset, captions_per_image: int, graph: bool, stop: int | None = None,
) -> tuple[dict, torch.Tensor, int]:
    """Train two epochs with everything that is random, and a learning rate that changes.

    Args:
        dataset: with its pixels on the GPU.
        captions_per_image: of a batch.
        graph: replay the steps as a CUDA graph.
        stop: the step of the second epoch after which the run is resumed with a new optimizer.

    Returns:
        The averaged weights, the losses of the last epoch, and the number of graphs.
    """
    model = make_model(CUDA, dropout=0.3, drop_connect=0.2, word_dropout=0.3)
    average = MovingAverage(model, 0.9)
    done = 0

    def start(state: dict | None = None) -> tuple[torch.optim.Optimizer, GraphedStep | None]:
        optimizer = build_optimizer(model, 2**-10, 0.01)
        if state:
            optimizer.load_state_dict(state)
        return optimizer, make_graphed(model, optimizer) if graph else None

    def train_epoch(epoch: int, progress: Progress | None = None) -> Progress:
        def after_step(progress: Progress) -> bool:
            nonlocal done
            done += 1
            average.update(done)
            return epoch == 2 and progress.step == stop

        # Every rate of the warm-up has an exact value in float32, in which a graph has it.
        scheduler = build_schedule(optimizer, 8, 12, "constant", done_steps=done)
        return train_one_epoch(
            model, dataset, optimizer, scheduler, torch.amp.GradScaler("cuda", enabled=False),
            batch_size=16, captions_per_image=captions_per_image, flip=True, seed=0, epoch=epoch,
            dtype=torch.bfloat16, graphed=graphed, after_step=after_step, progress=progress)

    optimizer, graphed = start()
    train_epoch(1)
    progress = train_epoch(2)
    if stop:
        state = deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            group["lr"] = group["initial_lr"]
        optimizer, graphed = start(state)
        progress = train_epoch(2, progress)
    average.copy_counts()
    weights = {name: value.cpu() for name, value in average.model.state_dict().items()}
    return weights, progress.losses.cpu(), graphed.captured if graphed else 0


@pytest.mark.parametrize(("captions_per_image", "stop"), [(1, None), (1, 2), (2, None)])
def test_a_graphed_step_equals_the_eager_step(dataset, monkeypatch, captions_per_image, stop):
    """To the bit, over replays, a resumed epoch and batches of several shapes."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    if captions_per_image == 2:  # the number of captions differs from batch to batch
        monkeypatch.setattr(cuda_graph, "WARM_UP", 1)
        monkeypatch.setattr(cuda_graph, "MAX_GRAPHS", 2)
    cached = cache_on_device(dataset, CUDA)
    expected, losses, _ = run_epochs(cached, captions_per_image, graph=False)
    found, own_losses, captured = run_epochs(cached, captions_per_image, graph=True, stop=stop)
    assert 1 <= captured <= (1 if captions_per_image == 1 else 2)
    assert torch.equal(own_losses, losses)
    assert len(set(losses.tolist())) == len(losses)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_the_host_does_not_wait_in_a_step(dataset, monkeypatch, graph):
    """In 20 steps, the moving average included, nothing synchronizes host and device."""
    monkeypatch.setattr("src.training.engine.CHECK_SECONDS", float("inf"))
    model = make_model(CUDA, drop_connect=0.2)
    average = MovingAverage(model, 0.9)
    cached = cache_on_device(dataset, CUDA)
    optimizer = build_optimizer(model, 1e-3, 0.01)
    graphed = make_graphed(model, optimizer) if graph else None
    options = {"dtype": torch.bfloat16, "graphed": graphed}
    train_steps(model, cached, optimizer, 2, **options)  # cuDNN's measurements, the capture

    def after_step(progress):
        average.update(progress.step)
        return progress.step + 1 == len(progress.losses)  # the last one reads the losses

    for _ in range(4):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            train_steps(model, cached, optimizer, after_step=after_step, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_ranks_equal_the_cpu():
    """Both directions' ranks of embeddings with many ties are those of the CPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(-2, 3, (300, 8), generator=generator).float()
    texts = torch.randint(-2, 3, (1500, 8), generator=generator).float()
    owner = torch.randint(0, 300, (1500,), generator=generator)
    expected = retrieval_ranks(images, texts, owner)
    for tile_size in (None, 128):
        found = retrieval_ranks(images.to(CUDA), texts.to(CUDA), owner, tile_size)
        assert all(map(torch.equal, found, expected))


def test_metrics_of_a_split_are_near_those_of_the_cpu(dataset, monkeypatch):
    """The metrics of a model in float32 are those of the CPU, up to the rounding of embeddings."""
    monkeypatch.setattr("src.evaluation.embed.compute_dtype", lambda device: torch.float32)
    model = make_calibrated_model(dataset, CPU).eval()
    expected = evaluate_retrieval(model, dataset)
    found = evaluate_retrieval(model.to(CUDA), cache_on_device(dataset, CUDA))
    assert found.keys() == expected.keys()
    assert abs(found["text_to_image_mean_rank"] - expected["text_to_image_mean_rank"]) < 0.5


def test_out_of_memory_is_explained():
    """More memory than the GPU has gives the message that names the flags."""
    with pytest.raises(UserError, match="out of memory.*\n.*--chunk-size"), explain_oom():
        torch.empty(2 * torch.cuda.mem_get_info()[1], dtype=torch.uint8, device=CUDA)


def test_nccl_with_one_rank(tmp_path):
    """train.py under torchrun with one process and NCCL trains an epoch."""
    images, annotations = make_tiny_data(tmp_path / "data")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
         "train.py", "--images", str(images), "--annotations", str(annotations), "--val-fraction",
         "0.25", "--image-size", str(SIZE), "--weights", "none", "--batch-size", "4", "--epochs",
         "1", "--device", "cuda", "--results-dir", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_step_that_cannot_be_captured_runs_without_a_graph(dataset, monkeypatch, capsys):
    """One line says so, and the weights are those of eager steps, random numbers included."""
    # The last test of this file, since a failed capture may leave more behind than it should.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    cached = cache_on_device(dataset, CUDA)
    expected, _, _ = run_epochs(cached, 1, graph=False)
    clamp = DualEncoder.clamp_logit_scale
    monkeypatch.setattr(DualEncoder, "clamp_logit_scale",
                        lambda self: (clamp(self), self.logit_scale.item()))
    found, _, captured = run_epochs(cached, 1, graph=True)
    assert captured == 0
    assert capsys.readouterr().err.count("cannot be captured") == 1
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
