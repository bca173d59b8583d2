"""Checkpoints load as they were saved; damaged and foreign files are refused."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from src.models.checkpoint import load_checkpoint, save_checkpoint, save_compact
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.export import image_card, prepare_image_encoder
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
    prepare_image_encoder(model, "torch", resize=50).write(path, image_card(model, resize=50))
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
