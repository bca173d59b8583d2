"""Everything that only a GPU can show, in at most 26 minutes, on a machine without a network.

    python -m benchmarks.gpu [--output gpu.jsonl] [--only tests steps ...]

Each part runs in a process of its own under a time limit, and its results are written when it ends
or is stopped: those that it had by then. Nothing is downloaded: weights are random and images
generated. A part that fails is reported, and the others run. Much of the time is that of the first
steps of each process and batch, in which cuDNN loads and compares its kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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
from src.training.cuda_graph import graphed_step
from src.training.engine import train_step
from src.training.optim import MovingAverage, build_optimizer
from src.training.recipes import RECIPES
from src.utils.runtime import choose_kernels, compute_dtype, grad_scaler, seed_all

# Part -> seconds that it may take, in the order of what is needed most.
LIMITS = {"tests": 300, "steps": 240, "strong": 90, "kernels": 90, "validation": 60,
          "embedding": 60, "profile": 60, "epoch": 240, "resume": 180, "compiled": 240}
IMAGE_SIZE = 224
Results = Iterator[tuple[str, object]]  # of a part: a name and a value that json writes


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
        with os.fdopen(os.dup(1), "w") as results:
            os.dup2(2, 1)  # whatever else is printed, by C code and processes too
            for result in globals()[f"measure_{args.part}"](args.output):
                print(json.dumps(result), file=results, flush=True)
        return 0
    print(machine(), torch.cuda.get_device_name(), sep=", ")
    computes = torch.ones(1000, device="cuda").sum().item() == 1000  # an emulator may not
    if not computes:
        print("this GPU does not compute: the figures are NOT MEASUREMENTS")
    failed = 0
    with open(args.output, "a", encoding="utf-8") as output:
        for part in args.only:
            report = run_part(part, args.output, 1 if computes else 4)
            if not computes:
                report["note"] = "not measured: the GPU does not compute"
            failed += "error" in report
            output.write(json.dumps(report) + "\n")
            output.flush()
            print(f"\n== {part}: {report.pop('seconds'):.0f} s")
            for name, value in report.items():
                print(f"  {name}: {value}", flush=True)
    return 1 if failed else 0


def run_part(part: str, output_path: Path, patience: int) -> dict:
    """Return the results of a part, and its error, from a process under the part's time limit.

    Args:
        part: of LIMITS.
        output_path: of the reports; beside it lies what the tests print.
        patience: factor of the time limit, for a GPU that is emulated.
    """
    limit = patience * LIMITS[part]
    start = time.perf_counter()
    # A session of its own: the processes that the part has started end with it.
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--output", str(output_path)],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    error = {}
    try:
        output, errors = process.communicate(timeout=limit)
        if process.returncode:
            error = {"error": errors.strip()[-1000:]}
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        error = {"error": f"stopped after {limit} s"}
    report = dict(json.loads(line) for line in output.splitlines(keepends=True)
                  if line.endswith("\n"))  # the last one may have been cut
    return {"part": part, "seconds": time.perf_counter() - start, **report, **error}


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
    steps: int = 20, graph: bool = False, freeze_batchnorm: bool = False, compare: bool = True,
    **config: object,
) -> dict:
    """Return the time of a training step on a batch on the GPU, and the peak of its memory.

    'ms' is of steps one after another, 'host ms' the time in which the host has launched them;
    'ms alone' is of a step that starts on an idle GPU. Without `compare` cuDNN uses the kernels
    that its heuristics choose.
    """
    dataset = make_dataset(batch_size)
    model = make_model(8000, **config).train()
    torch.backends.cudnn.benchmark = compare
    if freeze_batchnorm:
        model.image_encoder.freeze_batchnorm()
    if compiled:
        model.image_encoder.compile_training()
    device = model.logit_scale.device
    dtype = compute_dtype(device)
    optimizer, scaler = build_optimizer(model, 1e-4, 0.01), grad_scaler(device, dtype)
    graphed = graphed_step(model, optimizer, scaler, None) if graph else None
    average = MovingAverage(model, ema_decay) if ema_decay else None
    batch = dataset.batch(
        sample_batches(dataset, batch_size, captions_per_image, seed=0, epoch=1)[0]).to(device)

    def step(number: int) -> None:
        train_step(model, optimizer, scaler, batch, flip=True, key=(0, 1, number), dtype=dtype,
                   graphed=graphed)
        if average:
            average.update(number + 1)

    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for number in range(5):  # with the capture of a graph
        step(number)
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - start
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
            "reserved GB": round(torch.cuda.max_memory_reserved() / 1e9, 2),
            "first steps s": round(warm_up, 1), "compiled": model.image_encoder.compiled,
            "graph": bool(graphed and graphed.captured)}


def try_steps(*args: object, **options: object) -> dict:
    """Return `time_steps`, or the error, so that one variant does not lose the others."""
    try:
        return time_steps(*args, **options)
    except Exception as error:  # out of memory, a compiler's
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        torch.cuda.empty_cache()


def measure_tests(output: Path) -> Results:
    """Run the tests that need a GPU, except the one of torch.compile, which takes a minute."""
    yield from run_tests(output.with_suffix(".tests.txt"), "not compiled")


def run_tests(log: Path, chosen: str) -> Results:
    """Run tests of tests/test_cuda.py; `log` gets what they print, with all tracebacks."""
    with open(log, "w", encoding="utf-8") as file:  # as they run: a time limit keeps the first
        subprocess.run([sys.executable, "-m", "pytest", "-v", "--durations=8", "--tb=short",
                        "-m", "cuda", "-k", chosen, "tests/test_cuda.py"], stdout=file,
                       stderr=subprocess.STDOUT, check=False)
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    yield "result", lines[-1] if lines else ""
    yield "failures", [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield "reasons", [line[:200] for line in lines if line.startswith("E  ")][:40]
    yield "all of it", str(log)


def measure_steps(_: Path) -> Results:
    """Time steps of three batch sizes, eager and as a CUDA graph."""
    for size in (64, 128, 256):
        for graph in (False, True):
            yield f"batch {size}, {'graph' if graph else 'eager'}", try_steps(size, graph=graph)


def measure_kernels(_: Path) -> Results:
    """Time steps with the kernels that cuDNN chooses without comparing them.

    'first steps s' against that of 'steps' is the time of comparing them, 'ms' what it gains.
    """
    for size in (64, 256):
        yield f"batch {size}, graph, not compared", try_steps(size, graph=True, compare=False)


def measure_compiled(output: Path) -> Results:
    """Time steps with torch.compile; 'compiled' is false if it fell back."""
    yield "batch 64", try_steps(64, compiled=True)
    yield "batch 64, graph", try_steps(64, compiled=True, graph=True)
    yield from run_tests(output.with_suffix(".compiled.txt"), "compiled")


def measure_epoch(_: Path) -> Results:
    """Compare an epoch of the naive script, timm and this project from files to the last step."""
    for name in ("naive", "timm", "ours", "ours, in place"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.train", "--one", name, "--device", "cuda", "--steps",
             "10", "--batch-size", "64"], capture_output=True, text=True)
        if done.returncode:
            yield name, "not measured: " + (done.stderr.strip().splitlines() or ["?"])[-1]
        else:
            seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
            yield name, {"s": round(seconds, 2), "images/s": round(640 / seconds)}


def measure_embedding(_: Path) -> Results:
    """Time the embedding of images, with pixels on the host and on the GPU."""
    dataset, model = make_dataset(2048), make_model(8000)
    for name, data in (("pixels on the host", dataset),
                       ("pixels on the GPU", cache_on_device(dataset, model.logit_scale.device))):
        embed_images(model, data)  # to warm up
        start = time.perf_counter()
        embed_images(model, data)
        yield name, {"images/s": round(2048 / (time.perf_counter() - start))}


def measure_validation(_: Path) -> Results:
    """Time the validation of an epoch on Flickr30k: 3,178 images and 15,890 captions."""
    dataset, model = make_dataset(3178), make_model(8000)
    data = cache_on_device(dataset, model.logit_scale.device)
    evaluate_retrieval(model, data)  # to warm up
    start = time.perf_counter()
    evaluate_retrieval(model, data)
    yield "s", round(time.perf_counter() - start, 2)


def measure_strong(_: Path) -> Results:
    """Time a step of the strong recipe, eager and as a CUDA graph."""
    recipe = RECIPES["strong"]
    names = ("captions_per_image", "ema_decay", "drop_connect", "dropout", "word_dropout",
             "freeze_batchnorm")
    for graph in (False, True):
        yield "graph" if graph else "eager", try_steps(
            recipe["batch_size"], graph=graph, **{name: recipe[name] for name in names})


def measure_profile(_: Path) -> Results:
    """Profile steps: the 20 kernels that take the most time on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        time_steps(64, steps=3)
    events = profile.key_averages()
    events = [event for event in events if "CUDA" in str(event.device_type)] or events
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:20]:
        yield (f"{event.key[:80]} x{event.count}", f"{event.self_device_time_total / 1e3:.1f} ms")


def measure_resume(_: Path) -> Results:
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
        errors = process.communicate()[1].strip().splitlines()
        yield "status of the stopped run", process.returncode
        yield "its last lines", errors[-2:]
        if process.returncode == 2 and any("finite" in line for line in errors):
            yield "resumed", "not tried: the weights are not finite"
            return
        resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True)
        lines = log.read_text().splitlines() if log.exists() else []
        yield "status of the resumed run", resumed.returncode
        if resumed.returncode:
            yield "its error", resumed.stderr.strip()[-300:]
        yield "rsum of each epoch", [json.loads(line)["metrics"]["rsum"] for line in lines]


if __name__ == "__main__":
    sys.exit(main())
