"""Recipes: named sets of defaults for the training flags; flags on the command line override."""

# Image sizes at which networks were published; a recipe's size is the default of all others.
IMAGE_SIZES = {"efficientnet-lite1": 240, "efficientnet-lite2": 260}

RECIPES = {
    # Fine-tune everything at one small learning rate, as BERT is fine-tuned.
    "baseline": dict(
        weights="imagenet", image_size=224, min_freq=2, token_dim=512, dropout=0.1,
        drop_connect=0.2, word_dropout=0.0, epochs=5, batch_size=64, captions_per_image=1, lr=2e-5,
        image_encoder_lr=None, text_encoder_lr=None, weight_decay=0.01, schedule="constant",
        warmup_steps=0, flip=True, head_epochs=0, freeze_batchnorm=False, flip_tta=False,
        ema_decay=0.0,
    ),
}
# First the heads on frozen features, then everything, with a learning rate of its own for the image
# encoder and a moving average of the weights. benchmarks/quality.md lists what was tried.
RECIPES["strong"] = RECIPES["baseline"] | dict(
    dropout=0.3, word_dropout=0.3, drop_connect=0.2, epochs=18, batch_size=256,
    captions_per_image=5, lr=1e-3, image_encoder_lr=3e-4, text_encoder_lr=5e-5, schedule="cosine",
    warmup_steps=20, head_epochs=8, freeze_batchnorm=True, flip_tta=True, ema_decay=0.995,
)
# From random weights, on images of 64 pixels.
RECIPES["demo"] = RECIPES["baseline"] | dict(
    weights="none", image_size=64, epochs=10, lr=3e-3, text_encoder_lr=1e-4, schedule="cosine",
    warmup_steps=20, captions_per_image=5, flip=False, min_freq=1, drop_connect=0.0,
    word_dropout=0.1,
)


def recipe_defaults(recipe: str, image_encoder: str | None) -> dict:
    """Return the flags of a recipe, with the published image size of the image encoder.

    Args:
        recipe: of RECIPES; 'demo' keeps its small images.
        image_encoder: the name of the network, or None for the default.
    """
    defaults = dict(RECIPES[recipe])
    if recipe != "demo" and image_encoder in IMAGE_SIZES:
        defaults["image_size"] = IMAGE_SIZES[image_encoder]
    return defaults
