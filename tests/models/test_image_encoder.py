"""The image encoder: failures of torch.compile, and files of weights."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from src.models.checkpoint import save_checkpoint
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.export import image_card, prepare_image_encoder
from src.models.image_encoder import ImageEncoder
from src.models.tokenizer import Tokenizer
from src.utils.errors import UserError

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make_encoder() -> ImageEncoder:
    """Return an encoder with random drop-connect, always with the same weights."""
    torch.manual_seed(0)
    return ImageEncoder("efficientnet-b0", 32, drop_connect=0.3).train()


def one_step(encoder: ImageEncoder, images: torch.Tensor) -> list[torch.Tensor]:
    """Return features, gradients and BatchNorm statistics of a step with fixed random numbers."""
    torch.manual_seed(1)
    encoder.zero_grad()
    features = encoder(images)
    (features * torch.linspace(-1, 1, features.shape[1])).sum().backward()
    return [features.detach(), *(p.grad.clone() for p in encoder.parameters()),
            *(b.clone() for b in encoder.buffers())]


def fail(*_: object) -> None:
    """Fail as a compiler does."""
    raise RuntimeError("no C compiler here")


@pytest.mark.parametrize("backend", [
    fail, aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=fail),
], ids=["forward", "backward"])
def test_a_failure_of_the_compiler_is_one_note(backend, capsys):
    """If the forward or the backward pass cannot be compiled, a note is printed once, and the step
    has the same bits as one that is not compiled, statistics and random numbers included."""
    expected = one_step(make_encoder(), IMAGES)
    encoder = make_encoder()
    encoder.compile_training(backend)
    assert encoder.compiled
    assert all(map(torch.equal, one_step(encoder, IMAGES), expected))
    assert not encoder.compiled
    one_step(encoder, IMAGES)
    error = capsys.readouterr().err
    assert error.count("note: torch.compile does not work here") == error.count("\n") == 1
    assert "no C compiler here" in error


def test_too_many_recompilations_are_one_note(capsys):
    """An input beyond torch.compile's limit of recompilations ends compiling, not the run."""
    torch._dynamo.reset()
    encoder = make_encoder()
    encoder.compile_training("eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        one_step(encoder, IMAGES)
        assert encoder.compiled
        one_step(encoder, IMAGES[:3])
    assert not encoder.compiled
    assert capsys.readouterr().err.count("note: torch.compile does not work here") == 1


def test_out_of_memory_is_not_a_failure_of_the_compiler():
    """Memory that runs out while compiling is raised, since it would run out without it too."""
    def run(*inputs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    encoder = make_encoder()
    encoder.compile_training(lambda graph, inputs: run)
    with pytest.raises(torch.OutOfMemoryError):
        encoder(IMAGES)


# Files of weights


def backbone_state() -> dict[str, torch.Tensor]:
    """Return weights as efficientnet_pytorch publishes them, with the classifier."""
    state = dict(make_encoder().backbone.state_dict())
    return state | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


LAYOUTS = {
    "published": lambda state: state,
    "DataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
    "no counts": lambda state: {key: value for key, value in state.items()
                                if "num_batches_tracked" not in key},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_common_layouts_are_loaded(layout, tmp_path):
    """Weights with a prefix, nested, or without BatchNorm's counts are those of the state."""
    state = backbone_state()
    torch.save(LAYOUTS[layout](state), tmp_path / "weights.pth")
    torch.manual_seed(1)
    encoder = ImageEncoder("efficientnet-b0", 32)
    encoder.load_weights(str(tmp_path / "weights.pth"))
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_files_of_this_project_are_loaded_as_weights(kind, tmp_path):
    """A checkpoint and an exported image encoder can start another run."""
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(3, image_size=32))
    path = tmp_path / "weights.pth"
    if kind == "checkpoint":
        save_checkpoint(path, model, Tokenizer.from_captions(["word"], 1, 4), args={})
    else:
        prepare_image_encoder(model, "torch", resize=34).write(path, image_card(model, resize=34))
    encoder = ImageEncoder("efficientnet-b0", 32)
    encoder.load_weights(str(path))
    for name, value in model.image_encoder.backbone.state_dict().items():
        assert torch.equal(encoder.backbone.state_dict()[name], value), name


@pytest.mark.parametrize(("change", "reason"), [
    (lambda state: state.pop("_bn0.bias"), "1 of .* tensors are missing, e.g. _bn0.bias; choose"),
    (lambda state: state.update(other=torch.zeros(1)), "1 are not part of it, e.g. other; choose"),
    (lambda state: state.update({"_bn0.bias": torch.zeros(3)}),
     r"1 have another shape, e.g. _bn0.bias \(3,\) instead of \(32,\); choose the --image-encoder"),
    (lambda state: [state.update({f"backbone.{key}": state.pop(key)}) for key in list(state)],
     "the names must be those of the package efficientnet_pytorch"),
])
def test_weights_that_do_not_fit_are_refused_with_the_reason(change, reason, tmp_path):
    """The message names what is missing, unknown or of another shape; nothing is loaded."""
    state = backbone_state()
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    encoder = make_encoder()
    before = [value.clone() for value in encoder.state_dict().values()]
    with pytest.raises(UserError, match=f"(?s)does not hold the weights.*{reason}"):
        encoder.load_weights(str(tmp_path / "weights.pth"))
    assert all(map(torch.equal, encoder.state_dict().values(), before))
