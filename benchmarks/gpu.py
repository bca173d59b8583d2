"""Everything that only a GPU can show, in at most nine minutes, on a machine without a network.

    python -m benchmarks.gpu [--output gpu.jsonl] [--only tests steps ...]

Each part runs in a process of its own under a time limit, and its result is written when it ends,
so that an interruption loses one part. Nothing is downloaded: weights are random and images
generated. A part that fails is reported, and the others run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import machine
from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.loader import cache_on_device, sample_batches
from src.data.pixel_store import PixelStore, store_size
from src.evaluation.embed import embed_images, evaluate_retrieval
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.training.engine import forward_backward
from src.training.optim import MovingAverage, build_optimizer
from src.training.recipes import RECIPES
from src.utils.runtime import choose_kernels, compute_dtype, grad_scaler, seed_all

# Part -> seconds that it may take; 520 together.
LIMITS = {"tests": 100, "steps": 60, "compiled": 90, "epoch": 70, "embedding": 30,
          "validation": 30, "strong": 30, "profile": 50, "resume": 60}
IMAGE_SIZE = 224


def main() -> int:
    """Run all parts, or one in this process with --part. Returns 1 if a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.jsonl"),
                        help="a JSON line for each part (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing is measured")
        return 0
    if args.part:
        with contextlib.redirect_stdout(sys.stderr):
            report = globals()[f"measure_{args.part}"]()
        print(json.dumps(report))
        return 0
    print(machine(), torch.cuda.get_device_name(), sep=", ")
    computes = torch.ones(1000, device="cuda").sum().item() == 1000  # an emulator may not
    if not computes:
        print("this GPU does not compute: the figures are NOT MEASUREMENTS")
    failed = 0
    with open(args.output, "a", encoding="utf-8") as output:
        for part in args.only:
            report = run_part(part)
            if not computes:
                report["note"] = "not measured: the GPU does not compute"
            failed += "error" in report
            output.write(json.dumps(report) + "\n")
            output.flush()
            print(f"\n== {part}: {report.pop('seconds'):.0f} s")
            for name, value in report.items():
                print(f"  {name}: {value}", flush=True)
    return 1 if failed else 0


def run_part(part: str) -> dict:
    """Return the report of a part, or its error, from a process under the part's time limit."""
    start = time.perf_counter()
    # A session of its own: the processes that the part has started end with it.
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu", "--part", part], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    try:
        output, errors = process.communicate(timeout=LIMITS[part])
        report = (json.loads(output.splitlines()[-1]) if process.returncode == 0
                  else {"error": errors.strip()[-1000:]})
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        report = {"error": f"stopped after {LIMITS[part]} s"}
    return {"part": part, "seconds": time.perf_counter() - start, **report}


def make_dataset(count: int, image_size: int = IMAGE_SIZE) -> Flickr30kDataset:
    """Return images of noise with five captions each."""
    side = store_size(image_size)
    pixels = np.random.default_rng(0).integers(0, 256, (256, side, side, 3), np.uint8)
    records = [ImageRecord(f"{i}.jpg", tuple(f"image {i % 997} word{j}" for j in range(5)))
               for i in range(count)]
    store = PixelStore(pixels, {record.name: i % 256 for i, record in enumerate(records)}, {})
    tokenizer = Tokenizer.from_captions([c for r in records for c in r.captions], 1, 32)
    return Flickr30kDataset(records, store, tokenizer)


def make_model(vocab_size: int, **config: object) -> DualEncoder:
    """Return a model on the GPU with random weights."""
    choose_kernels(deterministic=False)
    seed_all(0, "weights")
    return DualEncoder(ModelConfig(vocab_size, image_size=IMAGE_SIZE, **config)).cuda()


def time_steps(
    batch_size: int, compiled: bool = False, captions_per_image: int = 1, ema_decay: float = 0.0,
    steps: int = 20, **config: object,
) -> dict:
    """Return the time of a training step on a batch on the GPU, and the peak of its memory."""
    dataset = make_dataset(batch_size)
    model = make_model(8000, **config).train()
    if compiled:
        model.image_encoder.compile_training()
    device = model.logit_scale.device
    dtype = compute_dtype(device)
    optimizer, scaler = build_optimizer(model, 1e-4, 0.01), grad_scaler(device, dtype)
    average = MovingAverage(model, ema_decay) if ema_decay else None
    batch = dataset.batch(
        sample_batches(dataset, batch_size, captions_per_image, seed=0, epoch=1)[0]).to(device)

    def step(number: int) -> None:
        forward_backward(model, scaler, batch, flip=True, key=(0, 1, number), dtype=dtype)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.clamp_logit_scale()
        if average:
            average.update(number + 1)

    start = time.perf_counter()
    for number in range(3):
        step(number)
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    times = []
    for number in range(steps):
        start = time.perf_counter()
        step(number)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    for number in range(steps):
        step(number)
    host = (time.perf_counter() - start) / steps
    torch.cuda.synchronize()
    together = (time.perf_counter() - start) / steps
    return {"ms": round(1e3 * together, 2), "ms alone": round(1e3 * statistics.median(times), 2),
            "host ms": round(1e3 * host, 2), "images/s": round(batch_size / together),
            "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "first steps s": round(warm_up, 1), "compiled": model.image_encoder.compiled}


def measure_tests() -> dict:
    """Run the tests that need a GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/test_cuda.py"],
        capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"result": lines[-1] if lines else done.stderr[-300:], "failures": failures}


def measure_steps() -> dict:
    """Time eager steps of three batch sizes."""
    return {f"batch {size}": time_steps(size) for size in (64, 128, 256)}


def measure_compiled() -> dict:
    """Time steps with torch.compile; 'compiled' is false if it fell back."""
    return {"batch 64": time_steps(64, compiled=True)}


def measure_epoch() -> dict:
    """Compare an epoch of the naive script, timm and this project from files to the last step."""
    reports = {}
    for name in ("naive", "timm", "ours", "ours, in place"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.train", "--one", name, "--device", "cuda", "--steps",
             "10", "--batch-size", "64"], capture_output=True, text=True)
        if done.returncode:
            reports[name] = "not measured: " + done.stderr.strip().splitlines()[-1]
        else:
            seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
            reports[name] = {"s": round(seconds, 2), "images/s": round(640 / seconds)}
    return reports


def measure_embedding() -> dict:
    """Time the embedding of images, with pixels on the host and on the GPU."""
    dataset, model = make_dataset(2048), make_model(8000)
    reports = {}
    for name, data in (("pixels on the host", dataset),
                       ("pixels on the GPU", cache_on_device(dataset, model.logit_scale.device))):
        embed_images(model, data)  # to warm up
        start = time.perf_counter()
        embed_images(model, data)
        reports[name] = {"images/s": round(2048 / (time.perf_counter() - start))}
    return reports


def measure_validation() -> dict:
    """Time the validation of an epoch on Flickr30k: 3,178 images and 15,890 captions."""
    dataset, model = make_dataset(3178), make_model(8000)
    data = cache_on_device(dataset, model.logit_scale.device)
    evaluate_retrieval(model, data)  # to warm up
    start = time.perf_counter()
    evaluate_retrieval(model, data)
    return {"s": round(time.perf_counter() - start, 2)}


def measure_strong() -> dict:
    """Time a step of the strong recipe."""
    recipe = RECIPES["strong"]
    return time_steps(recipe["batch_size"], captions_per_image=recipe["captions_per_image"],
                      ema_decay=recipe["ema_decay"], drop_connect=recipe["drop_connect"],
                      word_dropout=recipe["word_dropout"])


def measure_profile() -> dict:
    """Profile steps: the 20 kernels that take the most time on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        time_steps(64, steps=3)
    kernels = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return {f"{event.key[:80]} x{event.count}": f"{event.self_device_time_total / 1e3:.1f} ms"
            for event in kernels[:20]}


def measure_resume() -> dict:
    """Train the demo, stop it with SIGTERM, and continue it with --resume."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--demo", "--device", "cuda", "--epochs", "3",
                   "--data-dir", f"{folder}/data", "--results-dir", f"{folder}/results"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True)
        log = Path(folder, "results", "log.jsonl")
        while process.poll() is None and not log.exists():  # the first epoch
            time.sleep(0.1)
        process.terminate()
        errors = process.communicate()[1]
        resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True)
        lines = log.read_text().splitlines() if log.exists() else []
        return {"status of the stopped run": process.returncode, "its last line":
                errors.strip().splitlines()[-1], "status of the resumed run": resumed.returncode,
                "epochs": len(lines), "rsum": [json.loads(line)["metrics"]["rsum"]
                                               for line in lines]}


if __name__ == "__main__":
    sys.exit(main())
