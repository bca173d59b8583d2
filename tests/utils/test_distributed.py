"""Several processes over gloo, compared with one process that has the whole batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import search
import src.utils.runtime
import train
from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.loader import sample_batches
from src.data.pixel_store import PixelStore
from src.evaluation.embed import embed_images, evaluate_retrieval
from src.models.checkpoint import save_checkpoint
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.image_encoder import ImageEncoder
from src.models.tokenizer import Tokenizer
from src.search.index import ImageIndex
from src.training.engine import forward_backward
from src.utils.distributed import (
    all_gather_object,
    all_gather_with_grad,
    any_rank,
    average_gradients,
    barrier,
    broadcast_object,
    destroy_distributed,
    init_distributed,
    rank,
    split_evenly,
    world_size,
)
from src.utils.files import fingerprint
from src.utils.runtime import grad_scaler, seed_all
from src.utils.script import run_script
from tests.tiny_data import make_tiny_data

ROOT = Path(__file__).resolve().parents[2]


def torchrun(*command: str, processes: int = 2) -> subprocess.CompletedProcess:
    """Run a command in several processes of this machine, as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes), *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )


def make_dataset(count: int) -> Flickr30kDataset:
    """Return images of noise with one to three captions each."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (count, 36, 36, 3), dtype=torch.uint8).numpy()
    records = [ImageRecord(f"{i}.jpg", tuple(f"image {i} word{j}" for j in range(1 + i % 3)))
               for i in range(count)]
    store = PixelStore(pixels, {record.name: i for i, record in enumerate(records)}, {})
    return Flickr30kDataset(records, store, Tokenizer.from_captions(
        [caption for record in records for caption in record.captions], 1, 6))


def one_step(chunk_size: int | None) -> dict[str, torch.Tensor]:
    """Return loss, gradients, embeddings and metrics of an uneven batch of seven images.

    This rank computes its part. BatchNorm is frozen and nothing is dropped, so the result does not
    depend on the number of ranks.
    """
    dataset = make_dataset(7)
    seed_all(0, "weights")
    model = DualEncoder(ModelConfig(vocab_size=len(dataset.tokens) + 9, image_size=32, token_dim=12,
                                    embed_dim=8, dropout=0.0, drop_connect=0.0)).train()
    model.image_encoder.freeze_batchnorm()
    items = sample_batches(dataset, 7, 2, seed=0, epoch=1)[0]
    batch = dataset.batch(items, split_evenly(len(items))[rank()])
    loss = forward_backward(model, grad_scaler(torch.device("cpu")), batch, flip=True,
                            key=(0, 1, 0), chunk_size=chunk_size)
    found = {name: p.grad for name, p in model.named_parameters()}
    metrics = torch.tensor(list(evaluate_retrieval(model, dataset).values()))
    return {"loss": loss, "metrics": metrics, "embeddings": embed_images(model, dataset), **found}


def worker(folder: Path, chunk_size: int | None) -> int:
    """Check the collectives, and save what this rank computes. Returns the exit status."""
    init_distributed()
    assert world_size() > 1
    assert any_rank(rank() == 1) and not any_rank(False)
    rows = torch.full((rank() + 1, 2), float(rank()))
    gathered = all_gather_with_grad(rows, [i + 1 for i in range(world_size())])
    assert gathered[:, 0].tolist() == [float(i) for i in range(world_size()) for _ in range(i + 1)]
    assert all_gather_object(f"from {rank()}") == [f"from {i}" for i in range(world_size())]
    assert broadcast_object({"number": rank()}) == {"number": 0}
    torch.save(one_step(chunk_size), folder / f"{rank()}.pt")
    model = ImageEncoder("efficientnet-b0", 32).train()
    model.backbone._bn1.eval()  # frozen
    features = model(torch.randn(4, 3, 32, 32) + rank())
    features.sum().backward()  # gradients and statistics of its own part ...
    layers = (model.backbone._bn0, model.backbone._bn1)
    own = [tensor.clone() for layer in layers
           for tensor in (layer.running_mean, layer.running_var, layer.weight.grad)]
    average_gradients(model)
    averaged = [tensor for layer in layers
                for tensor in (layer.running_mean, layer.running_var, layer.weight.grad)]
    torch.save([own, averaged], folder / f"statistics {rank()}.pt")
    barrier()
    destroy_distributed()
    return 0


@pytest.mark.parametrize(("processes", "chunk_size"), [(2, None), (3, 2)])
def test_several_processes_compute_what_one_does(tmp_path, processes, chunk_size):
    """Loss, all gradients, embeddings and metrics of each process equal those of one process with
    the whole batch, also if its parts differ in size and are cut into chunks."""
    ran = torchrun(__file__, str(tmp_path), str(chunk_size or 0), processes=processes)
    assert ran.returncode == 0, ran.stderr
    expected = one_step(None)
    for number in range(processes):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            scale = value.abs().max().item() + 1e-6
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * scale,
                                       msg=lambda text, name=name: f"{name}: {text}")
    own, averaged = zip(*(torch.load(tmp_path / f"statistics {number}.pt", weights_only=True)
                          for number in range(processes)), strict=True)
    for found in averaged:  # ... become the mean over the ranks
        for value, parts in zip(found, zip(*own, strict=True), strict=True):
            torch.testing.assert_close(value, torch.stack(parts).mean(0))
    changed = [not torch.equal(*pair) for pair in zip(own[0], averaged[0], strict=True)]
    assert changed == [True, True, True, False, False, True]  # a frozen layer has its gradient


def test_torchrun_trains_as_one_process_does(tmp_path):
    """train.py under torchrun has the split, vocabulary, losses, recall and weights of one process
    (with frozen BatchNorm and nothing dropped); only rank 0 writes and prints."""
    images, annotations = make_tiny_data(tmp_path / "data")
    flags = ["--images", str(images), "--annotations", str(annotations), "--val-fraction", "0.25",
             "--image-size", "32", "--embed-dim", "16", "--token-dim", "24", "--weights", "none",
             "--batch-size", "5", "--device", "cpu", "--lr", "1e-4", "--epochs", "2", "--dropout",
             "0", "--drop-connect", "0", "--freeze-batchnorm", "--captions-per-image", "2",
             "--precision", "float32"]
    ran = torchrun("--no-python", sys.executable, "-c", TRAIN, *flags, "--results-dir",
                   str(tmp_path / "two"))
    assert ran.returncode == 0, ran.stderr
    assert "another run" not in ran.stderr  # the ranks wait for each other, not for another run
    assert ran.stdout.count("\nepoch    loss") == 1 and ran.stdout.count("train: 9 images") == 1
    assert train.main([*flags, "--results-dir", str(tmp_path / "one")]) == 0
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        assert one["steps"] == two["steps"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["metrics"]["text_to_image_mean_rank"] == pytest.approx(
            one["metrics"]["text_to_image_mean_rank"], abs=0.5)
    models = [torch.load(tmp_path / name / "models" / "flickr30k_clip_last.pth", weights_only=True)
              for name in ("one", "two")]
    assert models[0]["vocab"] == models[1]["vocab"] and models[0]["data"] == models[1]["data"]
    one, two = (torch.cat([tensor.double().flatten() for tensor in model["model_state"].values()])
                for model in models)
    assert (one - two).square().mean().sqrt() < 1e-6  # a step changes a weight by lr, 1e-4


def test_a_batch_smaller_than_the_processes_is_refused(tmp_path):
    """A rank without an image is an error that names the cure, without a traceback."""
    images, annotations = make_tiny_data(tmp_path / "data")
    ran = torchrun("train.py", "--images", str(images), "--annotations", str(annotations),
                   "--batch-size", "2", "--weights", "none", "--val-fraction", "0.25",
                   "--image-size", "32", "--results-dir", str(tmp_path / "r"), "--device", "cpu",
                   processes=3)
    assert ran.returncode != 0
    message = "error: a batch of 2 images leaves some of 3 processes without one"
    assert ran.stderr.count(message) == 1  # though all ranks have this error
    assert "src/" not in ran.stderr


# Processes of their own, in float32 as all tests.
TRAIN = """
import train, src.utils.runtime
from src.utils.script import run_script
src.utils.runtime.cpu_has_bfloat16 = lambda: False
run_script(train.main)
"""
# With another batch size and time between saves.
SEARCH = """
import sys
import search, src.search.update_index, src.utils.runtime
from src.utils.script import run_script
src.utils.runtime.cpu_has_bfloat16 = lambda: False
src.search.update_index.BATCH_SIZE = int(sys.argv.pop(1))
src.search.update_index.SAVE_SECONDS = float(sys.argv.pop(1))
run_script(search.main)
"""


def search_in_two(flags: list[str], *, batch_size: int = 64, save_seconds: float = 30.0
                  ) -> subprocess.CompletedProcess:
    """Run `torchrun search.py ...` in two processes."""
    return torchrun("--no-python", sys.executable, "-c", SEARCH, str(batch_size), str(save_seconds),
                    *flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Make a random model and 150 images, two of them unreadable; return the flags of a search."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = Tokenizer.from_captions(["a red thing"], 1, 6)
    torch.manual_seed(0)
    save_checkpoint(folder / "best.pth", DualEncoder(ModelConfig(len(tokenizer), image_size=32)),
                    tokenizer, epoch=1, args={})
    for i in range(150):
        path = folder / "images" / ("sub" if i % 3 else "") / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(noise).save(path)
    (folder / "images" / "003.png").write_text("not an image")  # in the part of rank 0 ...
    cut = folder / "images" / "sub" / "149.png"  # ... and of rank 1
    cut.write_bytes(cut.read_bytes()[:200])
    return ["a red thing", "--json", "--device", "cpu", "--checkpoint", str(folder / "best.pth"),
            "--images", str(folder / "images")]


def test_torchrun_indexes_as_one_process_does(tmp_path, trained, capsys):
    """Two processes with uneven batches find the names, embeddings, unreadable images and results
    of one process. Only rank 0 prints, also in a second run that finds nothing new."""
    one, two = ([*trained, "--index-dir", str(tmp_path / name)] for name in ("one", "two"))
    runs = [search_in_two(two), search_in_two(two)]
    assert search.main(one) == 0
    outputs = capsys.readouterr()
    checkpoint = fingerprint(Path(trained[trained.index("--checkpoint") + 1]))
    expected, found = (ImageIndex.load(tmp_path / name, checkpoint, 256) for name in ("one", "two"))
    assert len(expected.names) == 148 and set(expected.failed) == {"003.png", "sub/149.png"}
    assert (found.names, found.signatures, found.failed) == (
        expected.names, expected.signatures, expected.failed)
    np.testing.assert_allclose(found.embeddings, expected.embeddings, atol=1e-5)
    paths = [result["path"] for result in json.loads(outputs.out)["results"]]
    for ran in runs:
        assert ran.returncode == 0, ran.stderr
        assert [result["path"] for result in json.loads(ran.stdout)["results"]] == paths
        assert ran.stderr.count("003.png: not an image") == 1


def test_a_failed_search_ends_all_its_processes(tmp_path, trained):
    """An error between two batches is one message, without a traceback or results."""
    (tmp_path / "index.json").mkdir()  # so that no index can be written
    ran = search_in_two([*trained, "--index-dir", str(tmp_path)], batch_size=8, save_seconds=-1.0)
    assert ran.returncode != 0 and ran.stdout == ""
    assert ran.stderr.count("error: ") == ran.stderr.count("error: cannot write") == 1, ran.stderr
    assert "src/" not in ran.stderr


def test_the_other_ranks_end_by_themselves(tmp_path, trained):
    """If rank 0 fails while another rank waits for it, that rank ends too, without being killed,
    and only rank 0 prints the message."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "search.py", *trained[:-1], str(tmp_path / "nowhere"),
               "--index-dir", str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": str(number)},
                                  text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                 for number in range(2)]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 1], outputs
    assert outputs[0][1].startswith("error: there is no folder of photos")
    assert outputs[0][0] == outputs[1][0] == "" and "rror" not in outputs[1][1], outputs


def test_one_process_communicates_nothing():
    """Without torchrun the world size is 1, and rows and flags are returned as they are."""
    rows = torch.randn(3, 2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert all_gather_with_grad(rows, [3]) is rows
    assert any_rank(True) and not any_rank(False)
    assert all_gather_object("x") == ["x"] and broadcast_object("x") == "x"
    assert split_evenly(5) == [range(5)]


@pytest.mark.parametrize("count", [0, 1, 5, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_parts_differ_by_at_most_one(monkeypatch, count, world):
    """The parts cover everything once and in order, and their lengths differ by at most one."""
    monkeypatch.setattr("src.utils.distributed.world_size", lambda: world)
    parts = split_evenly(count)
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    src.utils.runtime.cpu_has_bfloat16 = lambda: False  # as in all tests
    run_script(lambda: worker(Path(sys.argv[1]), int(sys.argv[2]) or None))
