"""Checkpoints load as they were saved; damaged and foreign files are refused."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from efficientnet_pytorch import EfficientNet

from src.data.pixel_store import store_size
from src.models.checkpoint import (
    export_image_encoder,
    load_checkpoint,
    save_checkpoint,
    save_compact,
)
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.image_encoder import IMAGENET_MEAN, IMAGENET_STD
from src.models.tokenizer import Tokenizer
from src.utils.errors import UserError
from src.utils.paths import PRETRAINED

CAPTIONS = ["a dog runs", "a man 's red dog", "the sea", "", "no such words"]
PLAIN = (torch.Tensor, dict, list, str, int, float, bool, type(None))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Return a small vocabulary without some words of CAPTIONS."""
    return Tokenizer.from_captions(CAPTIONS[:3] + ["日本 été"], 1, 6)


@pytest.fixture(scope="module")
def model(tokenizer) -> DualEncoder:
    """Return a model of unusual sizes with BatchNorm statistics and scale as after training.

    At 48 pixels some strided convolutions have inputs of odd size, whose padding is different.
    """
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(vocab_size=len(tokenizer), image_size=48, context_length=6,
                                    token_dim=10, embed_dim=7, dropout=0.3))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # cumulative average: the statistics of one batch
    with torch.no_grad():
        model.image_encoder(torch.randn(16, 3, 48, 48) + torch.randn(16, 3, 1, 1))
        model.logit_scale.fill_(3.25)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Return normalized images, each noise around a color."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 3, 48, 48, generator=generator)
    return noise + torch.randn(4, 3, 1, 1, generator=generator)


@pytest.fixture
def saved(model, tokenizer, tmp_path):
    """Return the path of the model's checkpoint, in a new folder."""
    path = tmp_path / "new" / "clip.pth"
    save_checkpoint(path, model, tokenizer, epoch=3, metrics={"rsum": 1.5}, log=[{"epoch": 1}])
    return path


def kinds_in(value: object) -> set[type]:
    """Return the types of a value and of all values in it."""
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    else:
        parts = value if isinstance(value, list | tuple | set) else []
    return {type(value)}.union(*map(kinds_in, parts))


def test_loaded_equals_saved(model, tokenizer, images, saved):
    """Outputs are bit-identical; vocabulary, config and extra values are equal."""
    loaded, its_tokenizer, content = load_checkpoint(saved)
    assert not loaded.training
    assert loaded.config == model.config
    assert its_tokenizer.vocab == tokenizer.vocab
    assert its_tokenizer.context_length == tokenizer.context_length
    assert torch.equal(loaded.logit_scale, model.logit_scale)
    tokens = tokenizer.encode(CAPTIONS)
    assert torch.equal(its_tokenizer.encode(CAPTIONS), tokens)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(images), model.encode_image(images))
        assert torch.equal(loaded.encode_text(tokens), model.encode_text(tokens))
    assert (content["epoch"], content["metrics"]) == (3, {"rsum": 1.5})


def test_checkpoint_holds_plain_types(model, tokenizer, saved):
    """torch.load(weights_only=True) reads model_state, vocab and config, in plain types only."""
    content = torch.load(saved, weights_only=True)
    assert content["vocab"] == tokenizer.vocab
    assert content["config"] == asdict(model.config)
    assert content["model_state"].keys() == model.state_dict().keys()
    odd = {kind for kind in kinds_in(content) if not issubclass(kind, PLAIN)}
    assert odd == set()


def test_saving_replaces_the_file(model, tokenizer, saved):
    """Saving again replaces the file and leaves no temporary file."""
    save_checkpoint(saved, model, tokenizer, epoch=4)
    assert load_checkpoint(saved)[2]["epoch"] == 4
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_exported_encoder_is_not_a_checkpoint(model, tmp_path):
    """An exported image encoder is refused; the message names what it is and what is needed."""
    path = tmp_path / "image.pth"
    export_image_encoder(path, model, resize=store_size(model.config.image_size))
    with pytest.raises(UserError, match="image.pth holds image encoder; .* train.py is needed"):
        load_checkpoint(path)


@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "cut", "text", "list", "foreign"])
def test_other_files_are_refused(saved, damage):
    """A missing file, a folder, a truncated or another file: one message that names it."""
    content = saved.read_bytes()
    saved.unlink()
    if damage == "folder":
        saved.mkdir()
    elif damage == "empty":
        saved.touch()
    elif damage == "cut":
        saved.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        saved.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif damage == "list":
        torch.save([1, 2], saved)
    elif damage == "foreign":
        torch.save({"state_dict": {}}, saved)
    with pytest.raises(UserError, match="clip.pth"):
        load_checkpoint(saved)


class Malicious:
    """Run code when unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the file ran code')",))


def test_code_in_a_file_is_not_run(saved):
    """A checkpoint that asks to run code is refused."""
    torch.save({"kind": "dual encoder", "model_state": Malicious()}, saved)
    with pytest.raises(UserError, match="clip.pth"):
        load_checkpoint(saved)


@pytest.mark.parametrize("part, value", [
    ("model_state", None), ("vocab", None), ("config", None), ("vocab", ["a", "b"]),
    ("vocab", {"<pad>": 0, "<unk>": 1, "dog": 5}), ("vocab", {"<pad>": 0, "<unk>": 1}),
    ("config", {"vocab_size": 3}), ("config", {"words": 3}), ("model_state", {"x": 1}),
    ("config", {"vocab_size": 10, "image_encoder": "resnet50"}), ("args", ["lr"]),
    ("config", {"vocab_size": 10**12}), ("config", {"vocab_size": 10, "token_dim": 10**14}),
], ids=str)
def test_damaged_parts(saved, part, value):
    """A part that is missing or does not fit the others is reported as damage."""
    content = torch.load(saved, weights_only=True)
    content[part] = value
    if value is None:
        del content[part]
    torch.save(content, saved)
    with pytest.raises(UserError, match="clip.pth is damaged or of another version"):
        load_checkpoint(saved)


def test_compact_checkpoint(model, tokenizer, images, saved, tmp_path):
    """A compact checkpoint has half the size or less, and the same embeddings up to rounding."""
    path = tmp_path / "compact.pth"
    save_compact(path, model, tokenizer, epoch=3)
    assert path.stat().st_size < 0.55 * saved.stat().st_size
    loaded, its_tokenizer, content = load_checkpoint(path)
    assert its_tokenizer.vocab == tokenizer.vocab and content["epoch"] == 3
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {
        torch.float32, torch.int64}
    assert torch.equal(loaded.logit_scale, model.logit_scale)
    tokens = tokenizer.encode(CAPTIONS)
    with torch.no_grad():
        for name, inputs in (("encode_image", images), ("encode_text", tokens)):
            expected = getattr(model, name)(inputs)
            torch.testing.assert_close(getattr(loaded, name)(inputs), expected, rtol=0, atol=0.01)
    assert not loaded.word_embeddings()[:2].any()  # <pad> and <unk> stay zero


def test_the_pretrained_model_loads():
    """The model that comes with the repository loads, is small and holds no path of a machine."""
    loaded, tokenizer, content = load_checkpoint(PRETRAINED)
    assert PRETRAINED.stat().st_size <= 12_000_000
    assert content["args"] == {}
    card = PRETRAINED.with_name("README.md").read_text(encoding="utf-8")
    assert PRETRAINED.name in card and f"{len(tokenizer):,}" in card
    dogs, dog, car = loaded.encode_text(tokenizer.encode(["two dogs", "a dog", "a car"]))
    assert dogs @ dog > dogs @ car


@pytest.fixture
def exported(model, tmp_path):
    """Return the content of the file that train_image_only.py writes."""
    export_image_encoder(tmp_path / "image.pth", model, resize=store_size(model.config.image_size))
    return torch.load(tmp_path / "image.pth", weights_only=True)


@pytest.mark.parametrize("flip_tta", [False, True])
def test_exported_encoder_rebuilds_without_this_project(model, images, tmp_path, flip_tta):
    """torch and efficientnet_pytorch alone compute the embeddings of encode_image from the file."""
    averaging = DualEncoder(replace(model.config, flip_tta=flip_tta)).eval()
    averaging.load_state_dict(model.state_dict())
    export_image_encoder(tmp_path / "image.pth", averaging, resize=56)
    exported = torch.load(tmp_path / "image.pth", weights_only=True)
    net = EfficientNet.from_name(
        exported["name"], include_top=False, image_size=exported["image_size"]
    )
    net.load_state_dict(exported["backbone_state"])
    with torch.no_grad():
        features = net.eval()(images).flatten(1)
        if exported["flip_tta"]:
            features = (features + net(images.flip(3)).flatten(1)) / 2
        embeddings = torch.nn.functional.normalize(features @ exported["projection"].T)
        expected = averaging.encode_image(images)
        alone = model.encode_image(images)
    assert torch.equal(alone, expected) != flip_tta
    assert torch.cdist(expected, expected).fill_diagonal_(9).min() > 0.01  # the images differ
    torch.testing.assert_close(embeddings, expected, rtol=1e-3, atol=1e-4)


def test_exported_lite_encoder_rebuilds_with_its_package(images, tmp_path):
    """efficientnet_lite_pytorch computes the embeddings of encode_image from the file.

    `images` have ImageNet's normalization; the file holds that of the Lite networks.
    """
    reference = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(10, "efficientnet-lite1", image_size=48, drop_connect=0.0))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train().encode_image(images)
        expected = model.eval().encode_image(images)
    export_image_encoder(tmp_path / "image.pth", model, resize=50)
    exported = torch.load(tmp_path / "image.pth", weights_only=True)
    net = reference.EfficientNet.from_name(exported["name"], image_size=exported["image_size"])
    result = net.load_state_dict(exported["backbone_state"], strict=False)
    assert result.missing_keys == ["_fc.weight", "_fc.bias"] and not result.unexpected_keys
    mean, std = (torch.tensor(exported[name])[:, None, None] for name in ("mean", "std"))
    own_mean, own_std = (torch.tensor(values)[:, None, None]
                         for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        inputs = (images * own_std + own_mean - mean) / std
        features = net.eval().extract_features(inputs).mean((2, 3))
    embeddings = torch.nn.functional.normalize(features @ exported["projection"].T)
    assert torch.cdist(expected, expected).fill_diagonal_(9).min() > 0.01  # the images differ
    torch.testing.assert_close(embeddings, expected, rtol=1e-3, atol=1e-4)


def test_exported_file_describes_its_input(exported):
    """The file holds input size, size before the center crop, mean, deviation and flip TTA."""
    assert exported["flip_tta"] is False
    assert exported["image_size"] == 48
    assert exported["image_size"] <= exported["resize"] <= 56
    assert exported["mean"] == [0.485, 0.456, 0.406]
    assert exported["std"] == [0.229, 0.224, 0.225]
    odd = {kind for kind in kinds_in(exported) if not issubclass(kind, PLAIN)}
    assert odd == set()
