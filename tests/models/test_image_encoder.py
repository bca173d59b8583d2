"""The image encoder: what happens where torch.compile fails."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from src.models.image_encoder import ImageEncoder

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
