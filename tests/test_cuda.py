"""What only a GPU can show: pytest -m cuda. Skipped on machines without one."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

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
from src.training.engine import forward_backward, train_one_epoch
from src.training.optim import MovingAverage, build_optimizer, build_schedule
from src.utils.errors import UserError
from src.utils.runtime import autocast, explain_oom, seed_all
from tests.tiny_data import make_tiny_data

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
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


def make_batch(dataset: Flickr30kDataset, device: torch.device, size: int = 16) -> Batch:
    """Return the first batch of an epoch."""
    return dataset.batch(sample_batches(dataset, size, 2, seed=0, epoch=1)[0]).to(device)


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
    """Compare the gradients of each parameter relative to their norm."""
    for name, value in expected.items():
        error = (found[name].cpu() - value.cpu()).norm() / (value.norm().cpu() + 1e-6)
        assert error < tolerance, (name, error.item())


def train_steps(model: DualEncoder, dataset: Flickr30kDataset, epochs: int = 1, **options):
    """Train with AdamW; return the optimizer and the losses."""
    optimizer = build_optimizer(model, 1e-3, 0.01)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    losses = [train_one_epoch(
        model, dataset, optimizer, build_schedule(optimizer, 0, 1, "constant"), scaler,
        batch_size=16, captions_per_image=2, flip=True, seed=0, epoch=epoch, **options,
    ).losses for epoch in range(1, epochs + 1)]
    return optimizer, torch.cat(losses)


def test_a_step_equals_the_cpu(dataset):
    """Loss and gradients in float32 are those of the CPU."""
    results = [step_gradients(make_model(device), make_batch(dataset, device))
               for device in (CPU, CUDA)]
    torch.testing.assert_close(results[1][0].cpu(), results[0][0], rtol=1e-4, atol=1e-4)
    assert_gradients_close(results[1][1], results[0][1], 2e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float32, 1e-3), (torch.bfloat16, 0.2), (torch.float16, 0.05)], ids=str)
def test_chunks_equal_the_whole_batch(dataset, dtype, tolerance):
    """In every precision, with a scaler for float16, chunks give the gradient of the batch."""
    results = []
    for chunk_size in (None, 5):
        model = make_model(CUDA)
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


def test_deterministic_runs_end_in_the_same_bits(tmp_path):
    """Two runs with --deterministic, and one that is stopped and resumed, are the same."""
    images, annotations = make_tiny_data(tmp_path / "data")
    flags = ["--images", str(images), "--annotations", str(annotations), "--val-fraction", "0.25",
             "--image-size", str(SIZE), "--weights", "none", "--batch-size", "4", "--device",
             "cuda", "--deterministic"]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

    def run(name: str, *more: str) -> dict:
        command = [sys.executable, "train.py", *flags, "--results-dir", str(tmp_path / name), *more]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        last = tmp_path / name / "models" / "flickr30k_clip_last.pth"
        return torch.load(last, weights_only=True)["model_state"]  # no map_location: CPU tensors

    one, two = run("one", "--epochs", "2"), run("two", "--epochs", "2")
    run("resumed", "--epochs", "1")
    resumed = run("resumed", "--epochs", "2", "--resume")
    for other in (two, resumed):
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
    assert error < 0.05


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


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_does_not_wait_in_a_step(dataset, monkeypatch):
    """In 20 steps, the moving average included, nothing synchronizes host and device."""
    monkeypatch.setattr("src.training.engine.CHECK_SECONDS", float("inf"))
    model = make_model(CUDA, drop_connect=0.2)
    average = MovingAverage(model, 0.9)
    cached = cache_on_device(dataset, CUDA)
    train_steps(model, cached, dtype=torch.bfloat16)  # allocations and cuDNN's measurements

    def after_step(progress):
        average.update(progress.step)
        return progress.step + 1 == len(progress.losses)  # the last one reads the losses

    for _ in range(8):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            train_steps(model, cached, dtype=torch.bfloat16, after_step=after_step)
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


def test_metrics_of_a_split_are_near_those_of_the_cpu(dataset):
    """The metrics of a model are those of the CPU, up to the rounding of embeddings."""
    model = make_model(CPU).eval()
    expected = evaluate_retrieval(model, dataset)
    found = evaluate_retrieval(model.to(CUDA), cache_on_device(dataset, CUDA))
    assert found.keys() == expected.keys()
    assert abs(found["text_to_image_mean_rank"] - expected["text_to_image_mean_rank"]) < 2


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
