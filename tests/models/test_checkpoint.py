"""What is saved comes back, and what does not fit is refused by name."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from efficientnet_pytorch import EfficientNet

from src.data.pixel_store import store_size
from src.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from src.models.checkpoint import export_image_encoder, load_checkpoint, save_checkpoint
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.utils.errors import UserError

CAPTIONS = ["a dog runs", "a man 's red dog", "the sea", "", "no such words"]
PLAIN = (torch.Tensor, dict, list, str, int, float, bool, type(None))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small vocabulary, in which some words of CAPTIONS are missing."""
    return Tokenizer.from_captions(CAPTIONS[:3] + ["日本 été"], 1, 6)


@pytest.fixture(scope="module")
def model(tokenizer) -> DualEncoder:
    """A model of unusual sizes whose statistics and scale are not those of a fresh one.

    At 48 pixels some strided convolutions see an odd side, where the padding depends on the size.
    """
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(vocab_size=len(tokenizer), image_size=48, context_length=6,
                                    token_dim=10, embed_dim=7, dropout=0.3))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean: what one batch has is what evaluation takes
    with torch.no_grad():
        model.image_encoder(torch.randn(16, 3, 48, 48) + torch.randn(16, 3, 1, 1))
        model.logit_scale.fill_(3.25)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """A batch of normalized photos, noise around a color each."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 3, 48, 48, generator=generator)
    return noise + torch.randn(4, 3, 1, 1, generator=generator)


@pytest.fixture
def saved(model, tokenizer, tmp_path):
    """The model's checkpoint in a folder of its own."""
    path = tmp_path / "new" / "clip.pth"
    save_checkpoint(path, model, tokenizer, epoch=3, metrics={"rsum": 1.5}, log=[{"epoch": 1}])
    return path


def kinds_in(value: object) -> set[type]:
    """The types of a value and of all that it holds."""
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    else:
        parts = value if isinstance(value, list | tuple | set) else []
    return {type(value)}.union(*map(kinds_in, parts))


def test_loaded_equals_saved(model, tokenizer, images, saved):
    """Outputs to the last bit, words, sizes and the other values: all as they were."""
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


def test_the_file_is_plain(model, tokenizer, saved):
    """torch.load(weights_only=True) reads it: model_state, vocab, config, in plain types only."""
    content = torch.load(saved, weights_only=True)
    assert content["vocab"] == tokenizer.vocab
    assert content["config"] == asdict(model.config)
    assert content["model_state"].keys() == model.state_dict().keys()
    odd = {kind for kind in kinds_in(content) if not issubclass(kind, PLAIN)}
    assert odd == set()


def test_saving_again_replaces_the_file_and_leaves_no_other(model, tokenizer, saved):
    """The file is replaced as a whole; no temporary file stays behind."""
    save_checkpoint(saved, model, tokenizer, epoch=4)
    assert load_checkpoint(saved)[2]["epoch"] == 4
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_an_image_encoder_is_no_checkpoint(model, tmp_path):
    """A file of the wrong kind is refused, and the message says what it holds and what it takes."""
    path = tmp_path / "image.pth"
    export_image_encoder(path, model, resize=store_size(model.config.image_size),
                         mean=IMAGENET_MEAN, std=IMAGENET_STD)
    with pytest.raises(UserError, match="image.pth holds image encoder; .* train.py is needed"):
        load_checkpoint(path)


@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "cut", "text", "list", "foreign"])
def test_files_that_are_no_checkpoints(saved, damage):
    """Whatever stands in its place, one message that names the file."""
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


class Malice:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the file ran code')",))


def test_code_in_a_file_is_not_run(saved):
    """A checkpoint that asks to run code is refused."""
    torch.save({"kind": "dual encoder", "model_state": Malice()}, saved)
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
    """A part that is missing or does not fit the others is told, not met later as a crash."""
    content = torch.load(saved, weights_only=True)
    content[part] = value
    if value is None:
        del content[part]
    torch.save(content, saved)
    with pytest.raises(UserError, match="clip.pth is damaged or of another version"):
        load_checkpoint(saved)


@pytest.fixture
def exported(model, tmp_path):
    """The file that train_image_only.py writes, read as a user would."""
    export_image_encoder(tmp_path / "image.pth", model, resize=store_size(model.config.image_size),
                         mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return torch.load(tmp_path / "image.pth", weights_only=True)


@pytest.mark.parametrize("flip_tta", [False, True])
def test_exported_encoder_rebuilds_without_this_project(model, images, tmp_path, flip_tta):
    """With only torch and efficientnet_pytorch the file gives the embeddings of encode_image."""
    averaging = DualEncoder(replace(model.config, flip_tta=flip_tta)).eval()
    averaging.load_state_dict(model.state_dict())
    export_image_encoder(tmp_path / "image.pth", averaging, resize=store_size(averaging.config.image_size),
                         mean=IMAGENET_MEAN, std=IMAGENET_STD)
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
    assert torch.cdist(expected, expected).fill_diagonal_(9).min() > 0.01  # they do differ
    torch.testing.assert_close(embeddings, expected, rtol=1e-3, atol=1e-4)


def test_exported_file_says_how_to_feed_it(exported):
    """Input size, size to squeeze photos to before the centre crop, mean and deviation; whether to
    take the mean over the photo and its mirror image."""
    assert exported["flip_tta"] is False
    assert exported["image_size"] == 48
    assert exported["image_size"] <= exported["resize"] <= 56
    assert exported["mean"] == [0.485, 0.456, 0.406]
    assert exported["std"] == [0.229, 0.224, 0.225]
    odd = {kind for kind in kinds_in(exported) if not issubclass(kind, PLAIN)}
    assert odd == set()
