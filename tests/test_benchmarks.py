"""The scripts of the benchmarks compute the same as this project."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

import search
import train
from benchmarks import export, naive, pretrained
from benchmarks import train as train_benchmark
from benchmarks.photos import write_dataset
from benchmarks.timing import PeakMemory
from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.loader import sample_batches
from src.data.pixel_store import PixelStore
from src.data.transforms import eval_transform
from src.models.checkpoint import load_checkpoint, save_checkpoint
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.loss import contrastive_loss
from src.models.tokenizer import Tokenizer
from src.training.recipes import RECIPES

SIZE = 32


@pytest.fixture(scope="module")
def models() -> tuple[DualEncoder, naive.NaiveModel]:
    """Return both models with the same weights and without dropout."""
    torch.manual_seed(0)
    ours = DualEncoder(ModelConfig(50, image_size=SIZE, dropout=0.0, drop_connect=0.0))
    theirs = naive.NaiveModel(50, SIZE, dropout=0.0, drop_connect=0.0)
    theirs.load_state_dict(ours.state_dict())  # every name, every shape
    return ours.train(), theirs.train()


def test_naive_model_equals_the_dual_encoder(models: tuple) -> None:
    """The same weights and batch give the same loss and gradients."""
    ours, theirs = models
    images = torch.randn(6, 3, SIZE, SIZE)
    tokens = torch.randint(2, 50, (6, 8))
    tokens[:, 5:] = 0
    loss = contrastive_loss(*ours(images, tokens), torch.arange(6), ours.logit_scale)
    naive_loss = naive.naive_loss(*theirs(images, tokens), theirs.logit_scale.exp())
    assert loss.item() == pytest.approx(naive_loss.item(), rel=1e-4)
    loss.backward()
    naive_loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        other = gradients[name].grad
        error = (parameter.grad - other).norm() / other.norm().clamp(min=1e-3)
        assert error < 1e-2, name


def test_naive_input_equals_the_pixel_store(tmp_path: Path) -> None:
    """torchvision's transforms of an image file give the pixels of the store, normalized."""
    source = write_dataset(tmp_path, 4)
    records = source.splits["train"]
    names = [record.name for record in records]
    pairs = [(source.images / record.name, record.captions[0]) for record in records]
    tokenizer = Tokenizer.from_captions([caption for _, caption in pairs], 1, 32)
    images, tokens = next(iter(naive.naive_loader(pairs, tokenizer.encode, 224, len(pairs))))
    store = PixelStore.build(tmp_path / "store", source.images, names, 224)
    pixels = torch.from_numpy(store.pixels[[store.rows[name] for name in names]])
    torch.testing.assert_close(images, eval_transform(pixels, 224), rtol=0, atol=1e-5)
    assert torch.equal(tokens, tokenizer.encode([caption for _, caption in pairs]))


def test_naive_training_lowers_the_loss(tmp_path: Path) -> None:
    """Of two steps on the same batch the second has the lower loss."""
    source = write_dataset(tmp_path, 7)
    pairs = [(source.images / r.name, r.captions[0]) for r in source.splits["train"]]
    tokenizer = Tokenizer.from_captions([caption for _, caption in pairs], 1, 8)
    model = naive.NaiveModel(len(tokenizer), SIZE, dropout=0.0, drop_connect=0.0)
    loader = naive.naive_loader(pairs * 2, tokenizer.encode, SIZE, len(pairs))
    first, second = naive.train(model, loader, naive.naive_loss, lr=1e-3,
                                device=torch.device("cpu"), mixed_precision=False)
    assert second < first


def test_our_epoch_has_the_batches_of_the_sampler(tmp_path: Path) -> None:
    """The benchmark trains as train.py: its first loss is that of the first sampled batch."""
    source = write_dataset(tmp_path, 8)
    records = [ImageRecord(r.name, r.captions[:1]) for r in source.splits["train"]]
    tokenizer = Tokenizer.from_captions([r.captions[0] for r in records], 1, 8)
    store = PixelStore.build(tmp_path / "store", source.images, [r.name for r in records], SIZE)
    dataset = Flickr30kDataset(records, store, tokenizer)
    model = DualEncoder(ModelConfig(len(tokenizer), image_size=SIZE, dropout=0.0,
                                    drop_connect=0.0)).train()
    first, _ = sample_batches(dataset, 4, 1, seed=0, epoch=1)
    batch = dataset.batch(first)
    with torch.no_grad():
        embeddings = model(eval_transform(batch.images, SIZE), batch.tokens)
        expected = contrastive_loss(*embeddings, batch.image_index, model.logit_scale).item()
    losses = train_benchmark.ours(model, dataset, 4)["losses"]
    assert len(losses) == 2 and losses[0] == pytest.approx(expected, rel=1e-4)


def test_pretrained_model_and_card(
    tmp_path: Path, tiny_data: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The command writes a checkpoint that search.py takes, and a card with its metrics."""
    images, annotations = tiny_data
    train.main(["--images", str(images), "--annotations", str(annotations), "--image-size", "32",
                "--weights", "none", "--epochs", "1", "--batch-size", "4", "--no-flip",
                "--results-dir", str(tmp_path / "run"), "--val-fraction", "0.4"])
    output = tmp_path / "new" / "dual_encoder.pth"
    best = tmp_path / "run" / "models" / "flickr30k_clip_best.pth"
    assert pretrained.main([str(best), "--output", str(output), "--data", "noise",
                            "--limits", "everything"]) == 0
    card = output.with_name("README.md").read_text()
    assert "    python train.py --recipe baseline --image-encoder efficientnet-b0 " in card
    assert "--no-flip" in card and "--image-size 32" in card and str(tmp_path) not in card
    metrics = pretrained.measure(output, load_checkpoint(best).content["args"])
    assert f"| {metrics['rsum']:.1f} |" in card
    assert load_checkpoint(output).content["metrics"]["weak_score"] == metrics["weak_score"]
    capsys.readouterr()
    assert search.main(["red thing", "--checkpoint", str(output), "--images", str(images),
                        "--results-dir", str(tmp_path / "search")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 11


def test_the_card_has_the_flags_that_are_not_defaults() -> None:
    """The default image size is that of the image encoder."""
    flags = {**RECIPES["strong"], "recipe": "strong", "image_encoder": "efficientnet-lite1"}
    assert pretrained.changed_flags({**flags, "image_size": 240}) == [
        "--recipe strong", "--image-encoder efficientnet-lite1"]
    assert pretrained.changed_flags({**flags, "image_size": 224, "flip": False})[2:] == [
        "--image-size 224", "--no-flip"]


def test_peak_memory_counts_freed_memory() -> None:
    """A block that is allocated and freed while the memory is measured counts with its size."""
    with PeakMemory() as peak:
        before = peak.bytes
        # New pages: the C library may have kept memory that earlier tests freed.
        block = np.frombuffer(mmap.mmap(
            -1, 200_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        block[:] = 1
        tries = 0
        while peak.bytes - before < 150_000_000 and tries < 10_000:  # until the thread reads it
            block[:1_000_000] += 1
            tries += 1
        del block
    assert 150_000_000 < peak.bytes - before < 400_000_000


def test_the_table_of_exported_files(tmp_path, monkeypatch, capsys):
    """Every row has size, speed and cosine; the cosines fall with the precision."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_captions(["a b"], 1, 4)
    model = DualEncoder(ModelConfig(len(tokenizer), "efficientnet-lite0", image_size=SIZE))
    save_checkpoint(tmp_path / "model.pth", model, tokenizer)
    monkeypatch.setattr("sys.argv", ["export", "--checkpoint", str(tmp_path / "model.pth"),
                                     "--count", "3", "--repeats", "1"])
    assert export.main() == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("  ")[1].strip() for line in lines] == [
        "PyTorch float32", "PyTorch bfloat16", "onnxruntime float32", "onnxruntime float16",
        "onnxruntime int8"]
    cosines = [float(line.split("cosine mean ")[1].split(",")[0]) for line in lines]
    assert cosines[0] == 1 and cosines[2] > 0.9999 and min(cosines) > 0.5
    assert "rsum" not in lines[0]
