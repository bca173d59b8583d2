"""Training scripts that the benchmarks compare with.

Naive: images decoded in the training loop, efficientnet_pytorch unchanged, float32, no workers.
Stronger: timm's EfficientNet in mixed precision and channels_last, all cores as workers; and the
same with open_clip's loss and its reader of CSV files. Heads, loss, optimizer and hyperparameters
are those of this project, so only the implementation differs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_pytorch import EfficientNet
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from src.data.transforms import IMAGENET_MEAN, IMAGENET_STD

Pairs = list[tuple[Path, str]]  # image and caption


def preprocess(image_size: int) -> Callable[[Image.Image], torch.Tensor]:
    """Return the usual torchvision transform: resize, to tensor, normalize."""
    return transforms.Compose([
        _rgb,
        transforms.Resize((image_size, image_size)),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


class ImageCaptionDataset(Dataset):
    """Decode an image each time it is requested."""

    def __init__(self, pairs: Pairs, tokenize: Callable, image_size: int) -> None:
        self.pairs, self.tokenize, self.transform = pairs, tokenize, preprocess(image_size)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        path, caption = self.pairs[i]
        return self.transform(Image.open(path)), self.tokenize([caption])[0]


class NaiveModel(nn.Module):
    """This project's model with the package's image encoder unchanged and the same state names."""

    def __init__(
        self, vocab_size: int, image_size: int, dropout: float, drop_connect: float
    ) -> None:
        super().__init__()
        self.image_encoder = nn.ModuleDict({"backbone": EfficientNet.from_name(
            "efficientnet-b0", include_top=False, image_size=image_size,
            drop_connect_rate=drop_connect, batch_norm_momentum=0.9)})
        self.text_encoder = nn.ModuleDict({
            "embedding": nn.Embedding(vocab_size, 512, padding_idx=0)})
        self.image_projection = nn.ModuleDict({"linear": nn.Linear(1280, 256, bias=False)})
        self.text_projection = nn.ModuleDict({"linear": nn.Linear(512, 256, bias=False)})
        self.dropout = nn.Dropout(dropout)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, H, W) to (B, 256)."""
        features = self.image_encoder["backbone"](images).flatten(1)
        return F.normalize(self.image_projection["linear"](self.dropout(features)), dim=1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map (B, L) to (B, 256)."""
        mask = (tokens != 0).float().unsqueeze(2)  # (B, L, 1)
        words = self.text_encoder["embedding"](tokens) * mask
        features = words.sum(1) / mask.sum(1)
        return F.normalize(self.text_projection["linear"](self.dropout(features)), dim=1)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple:
        return self.encode_image(images), self.encode_text(tokens)


class TimmModel(NaiveModel):
    """The same model with timm's EfficientNet in channels_last."""

    def __init__(
        self, vocab_size: int, image_size: int, dropout: float, drop_connect: float
    ) -> None:
        import timm

        super().__init__(vocab_size, image_size, dropout, drop_connect)
        self.image_encoder = nn.ModuleDict({"backbone": timm.create_model(
            "efficientnet_b0", num_classes=0, drop_path_rate=drop_connect)})
        self.to(memory_format=torch.channels_last)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, H, W) to (B, 256)."""
        return super().encode_image(images.contiguous(memory_format=torch.channels_last))


def naive_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return CLIP's loss, the mean of two cross-entropies; `scale` is the inverse temperature."""
    logits = scale * images.float() @ texts.float().T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def naive_loader(pairs: Pairs, tokenize: Callable, image_size: int, batch_size: int) -> DataLoader:
    """Return a loader without workers; the order is given, so that all train on the same data."""
    return DataLoader(ImageCaptionDataset(pairs, tokenize, image_size), batch_size)


def timm_loader(pairs: Pairs, tokenize: Callable, image_size: int, batch_size: int) -> DataLoader:
    """Return a loader with all cores as workers."""
    return DataLoader(ImageCaptionDataset(pairs, tokenize, image_size), batch_size,
                      num_workers=os.cpu_count(), pin_memory=torch.cuda.is_available())


def open_clip_loader(
    pairs: Pairs, tokenize: Callable, image_size: int, batch_size: int
) -> DataLoader:
    """Return open_clip's reader of a CSV file with all cores as workers."""
    import pandas
    from open_clip_train.data import CsvDataset

    file = pairs[0][0].parent / "open_clip.tsv"
    pandas.DataFrame(pairs, columns=["filepath", "title"]).to_csv(file, sep="\t", index=False)
    rows = CsvDataset(file, preprocess(image_size), "filepath", "title", tokenizer=tokenize)
    return DataLoader(rows, batch_size, num_workers=os.cpu_count(),
                      pin_memory=torch.cuda.is_available())


def train(
    model: NaiveModel, loader: DataLoader, loss_function: Callable, *, lr: float,
    device: torch.device, mixed_precision: bool,
) -> list[float]:
    """Train one epoch and return the loss of each step.

    Mixed precision is bfloat16, as with timm's train.py --amp --amp-dtype bfloat16 and open_clip's
    --precision amp_bf16.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    losses = []
    for images, tokens in loader:
        images, tokens = images.to(device), tokens.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
            embeddings = model(images, tokens)
        loss = loss_function(*embeddings, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def embed(model: NaiveModel, loader: DataLoader, device: torch.device) -> torch.Tensor:
    """Return the embeddings of all images of the loader: (N, 256) on the CPU."""
    model.eval()
    return torch.cat([model.encode_image(images.to(device)).cpu() for images, _ in loader])
