"""The dataset of --demo: drawn images with captions, in the layout of Flickr30k.

An image shows one colored shape, a group of two to four, or a pair, one above or beside the other.
Image i is a function of (seed, i) alone, so a larger dataset begins with the smaller one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from src.data.images import write_image
from src.utils.errors import UserError
from src.utils.files import write_atomic

VERSION = 1  # to be raised when the same seed draws other images
SIDE = 128  # pixels
# Distance from the center, down and to the right, in pixels: (SIDE, SIDE) float32 each.
Y, X = np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5 - SIDE / 2

# Shapes have saturated colors and backgrounds do not, so a color word means one of the two.
COLORS = {
    "red": (224, 54, 50), "orange": (246, 138, 30), "yellow": (250, 214, 48),
    "green": (66, 172, 76), "turquoise": (44, 200, 194), "blue": (48, 104, 222),
    "purple": (142, 76, 204), "pink": (246, 126, 182),
}
BACKGROUNDS = {
    "white": (248, 248, 246), "grey": (172, 176, 182), "black": (36, 38, 44),
    "beige": (233, 216, 184),
}
RADII = {"large": (24.0, 28.0), "small": (13.0, 16.0)}  # pixels

# Offsets from the center in pixels, to the right and down.
POSITIONS = {"left": (-32, 0), "right": (32, 0), "top": (0, -32), "bottom": (0, 32),
             "middle": (0, 0)}
# Drawn with equal probability: three in five are pairs, one in five is a group.
LAYOUTS = ("above", "beside") * 15 + ("group",) * 10 + tuple(POSITIONS) * 2


@dataclass(frozen=True)
class Scene:
    """What an image shows.

    Attributes:
        layout: 'above' or 'beside' for a pair, whose first shape is the upper or the left one;
            'group' for two to four equal shapes; a key of POSITIONS for a single shape.
        shapes: keys of SHAPES; two for a pair, otherwise one.
        colors: keys of COLORS, one for each shape.
        sizes: keys of RADII, one for each shape.
        count: number of shapes that are drawn.
        background: a key of BACKGROUNDS.
    """

    layout: str
    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    sizes: tuple[str, ...]
    count: int
    background: str


# Queries, and the attributes of a scene that they determine. A red circle above a blue square is
# rare by chance: one of every 50 images is made for each query, so that training and validation
# both have some.
QUERY_SCENES: dict[str, dict] = {
    "a red circle above a blue square": dict(
        layout="above", shapes=("circle", "square"), colors=("red", "blue")),
    "three yellow stars": dict(layout="group", shapes=("star",), colors=("yellow",), count=3),
    "a green triangle next to a purple heart": dict(
        layout="beside", shapes=("triangle", "heart"), colors=("green", "purple")),
    "a large orange ring in the middle": dict(
        layout="middle", shapes=("ring",), colors=("orange",), sizes=("large",)),
    "four pink hearts on a black background": dict(
        layout="group", shapes=("heart",), colors=("pink",), count=4, background="black"),
    "a small turquoise square at the bottom": dict(
        layout="bottom", shapes=("square",), colors=("turquoise",), sizes=("small",)),
}
DEMO_QUERIES: list[str] = list(QUERY_SCENES)
QUERY_PERIOD = 50  # images

# Five of the six templates of its layout give the captions of a scene; {a} and {b} are its nouns.
PAIR = ("{a} {over} {b} {background}", "{b} {under} {a}", "there is {a} {over} {b}",
        "{background} {b} is {under} {a}", "{a} {here} and {b} {there}",
        "a picture of {a} and {b} {background}")
GROUP = ("{a} {background}", "there are {a}", "a picture of {a}", "{background} there are {a}",
         "a group of {a} {background}", "{a} together")
SINGLE = ("{a} {here} {background}", "{a} is {here}", "there is {a} {here}",
          "{background} there is {a}",
          "a picture of {a} {here}", "just {a} {here} {background}")
TEMPLATES = {"above": PAIR, "beside": PAIR, "group": GROUP, **dict.fromkeys(POSITIONS, SINGLE)}
LEFT, RIGHT = ("on the left", "at the left side"), ("on the right", "at the right side")
TOP, BOTTOM = ("at the top",), ("at the bottom",)
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "above": {"over": ("above", "over"), "under": ("below", "under"),
              "here": TOP, "there": BOTTOM},
    "beside": {"over": ("left of", "to the left of", "next to"),
               "under": ("right of", "to the right of", "beside"), "here": LEFT, "there": RIGHT},
    "group": {},
    "left": {"here": LEFT}, "right": {"here": RIGHT}, "top": {"here": TOP},
    "bottom": {"here": BOTTOM}, "middle": {"here": ("in the middle", "in the centre")},
}
# A third of the nouns leave the size out.
SIZES = {"large": ("large", "big", ""), "small": ("small", "little", "")}
NUMBERS = {2: "two", 3: "three", 4: "four"}


def sample_scene(rng: np.random.Generator, index: int) -> Scene:
    """Return the random scene of image `index`, with what a query determines of it."""
    turn = index % QUERY_PERIOD
    given = QUERY_SCENES[DEMO_QUERIES[turn]] if turn < len(QUERY_SCENES) else {}
    layout = given.get("layout") or _pick(rng, LAYOUTS)
    kinds = 2 if TEMPLATES[layout] is PAIR else 1
    drawn = dict(
        layout=layout,
        shapes=tuple(_pick(rng, tuple(SHAPES)) for _ in range(kinds)),
        colors=tuple(tuple(COLORS)[i] for i in rng.permutation(len(COLORS))[:kinds]),
        sizes=tuple(_pick(rng, tuple(RADII)) for _ in range(kinds)),
        count=int(rng.integers(2, 5)) if layout == "group" else kinds,
        background=_pick(rng, tuple(BACKGROUNDS)),
    )
    return Scene(**{**drawn, **given})


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]  # rng.choice takes ten times as long


def describe(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Return five different captions of a scene; each names every shape and its color."""
    templates = TEMPLATES[scene.layout]
    captions = []
    for i in rng.permutation(len(templates))[:5]:
        words = {slot: _pick(rng, options) for slot, options in WORDS[scene.layout].items()}
        words |= {slot: _noun(scene, k, rng) for k, slot in enumerate("ab"[:len(scene.shapes)])}
        background = _pick(rng, ("on a {} background", "on {} paper"))
        words["background"] = background.format(scene.background)
        captions.append(templates[i].format(**words) + " .")
    return captions


def _noun(scene: Scene, k: int, rng: np.random.Generator) -> str:
    """Return shape `k` as 'a small red star', 'an orange ring' or 'three blue hearts'."""
    noun = f"{_pick(rng, SIZES[scene.sizes[k]])} {scene.colors[k]} {scene.shapes[k]}".strip()
    if scene.layout == "group":
        return f"{NUMBERS[scene.count]} {noun}s"
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _star(x: np.ndarray, y: np.ndarray, points: int, notch: float) -> np.ndarray:
    """Return the signed distance to a star with tips at radius 1, one of them at the top.

    Args:
        x, y: coordinates.
        points: number of tips.
        notch: radius of the corners between the tips.
    """
    sector = math.pi / points
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    radius = np.hypot(x, y)
    # By symmetry all points are mapped to one sector, where the outline is one line segment.
    u, v = radius * np.cos(angle) - 1, radius * np.sin(angle)
    edge_u, edge_v = notch * math.cos(sector) - 1, notch * math.sin(sector)
    along = np.clip((u * edge_u + v * edge_v) / (edge_u**2 + edge_v**2), 0, 1)
    inside = np.sign(edge_u * v - edge_v * u)
    return -inside * np.hypot(u - along * edge_u, v - along * edge_v)


def _polygon(x: np.ndarray, y: np.ndarray, corners: int) -> np.ndarray:
    """Return the signed distance to a regular polygon, a star with its notches on the sides."""
    return _star(x, y, corners, math.cos(math.pi / corners))


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the distance to a square on its corner, 2 across, and a disc on each upper side."""
    lobes = np.hypot(np.abs(x) - 0.5, y + 0.5) - 0.5**0.5
    return np.minimum(lobes, _polygon(x, y, 4))


# Signed distances with y pointing down, scaled so that shapes of one radius look equally large.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.88,
    "square": lambda x, y: _polygon((x - y) / 2**0.5, (x + y) / 2**0.5, 4) - 0.06,
    "triangle": lambda x, y: _polygon(x, y - 0.2, 3) - 0.06,
    "star": lambda x, y: _star(x, y - 0.04, 5, 0.48) - 0.05,
    "heart": lambda x, y: 0.74 * _heart(x / 0.74, y / 0.74 - 0.14) - 0.02,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.2,
}


def draw_scene(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return the image of a scene, (SIDE, SIDE, 3) uint8, with random offsets, tilts and tints."""
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 + 0.06 * (math.cos(angle) * X + math.sin(angle) * Y) / (SIDE / 2)
    tint = np.float32(BACKGROUNDS[scene.background] + rng.uniform(-3, 3, 3))
    image = light[..., None] * tint  # (SIDE, SIDE, 3)
    radii = [rng.uniform(*RADII[size]) for size in scene.sizes]
    for i, (x, y) in enumerate(_centers(scene, rng).tolist()):
        kind = i % len(scene.shapes)
        color = np.float32(COLORS[scene.colors[kind]] + rng.uniform(-9, 9, 3))
        _draw_shape(image, SHAPES[scene.shapes[kind]], color, x, y, radii[kind],
                    rng.uniform(-0.2, 0.2))
    return (image + 0.5).clip(0, 255).astype(np.uint8)


def _centers(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return the center of each shape: (count, 2) pixels right of and below the image's center."""
    if scene.layout in POSITIONS:
        centers = np.array([POSITIONS[scene.layout]])
    elif scene.layout == "group":
        # On a circle just large enough for large neighbors; four of them fit only as a square.
        radius, turn = {2: (29, 3.1), 3: (33, 3.1), 4: (41, 0.1)}[scene.count]
        angles = np.linspace(0, 2 * math.pi, scene.count, endpoint=False) + rng.uniform(-turn, turn)
        angles += math.pi / 4
        centers = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    else:
        offsets = rng.uniform(-9, 9, 2)
        centers = np.stack([offsets, [-30, 30]], axis=1)
        if scene.layout == "beside":
            centers = centers[:, ::-1]
    return centers + rng.uniform(-2, 2, (scene.count, 2))


def _draw_shape(image: np.ndarray, shape: Callable, color: np.ndarray, x: float, y: float,
                radius: float, tilt: float) -> None:
    """Draw one shape into `image` with a soft shadow, a darker rim and light from above."""
    reach = 1.2 * radius + 10
    window = tuple(slice(max(0, int(c + SIDE / 2 - reach)), int(c + SIDE / 2 + reach))
                   for c in (y, x))
    dx, dy = X[window] - x, Y[window] - y
    cos, sin = math.cos(tilt) / radius, math.sin(tilt) / radius

    def distance(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
        return radius * shape(dx * cos + dy * sin, dy * cos - dx * sin)  # pixels

    shadow = 0.3 * np.clip((5 - distance(dx - 2, dy - 3)) / 7, 0, 1) ** 2
    edge = distance(dx, dy)
    shade = (0.84 + 0.16 * np.clip(-edge - 1.2, 0, 1)) * (1.04 - 0.1 * dy / radius)
    coverage = np.clip(0.5 - edge, 0, 1)[..., None]
    behind = image[window] * (1 - shadow[..., None])
    image[window] = behind + coverage * (shade[..., None] * color - behind)


def make_demo_dataset(folder: Path, n_images: int = 1000, seed: int = 0) -> None:
    """Write `folder`/images/*.png and `folder`/annotations/annotations.csv, five captions an image.

    Does nothing if the folder holds this dataset already; another demo dataset, or an incomplete
    one, is replaced.

    Raises:
        UserError: the folder holds images or annotations that are not of the demo.
    """
    marker, images = folder / "demo.json", folder / "images"
    annotations = folder / "annotations" / "annotations.csv"
    wanted = {"version": VERSION, "n_images": n_images, "seed": seed}
    found = json.loads(marker.read_text()) if marker.exists() else {"n_images": 0}
    if found == wanted and annotations.exists():
        return
    if not marker.exists() and (images.exists() or annotations.exists()):
        raise UserError(f"{folder} holds other data; give the demo a folder of its own")
    # The annotations are removed first and written last, so they exist only beside all images.
    annotations.unlink(missing_ok=True)
    for i in range(n_images, found["n_images"]):
        (images / f"{i:04d}.png").unlink(missing_ok=True)
    write_atomic(marker, json.dumps(wanted).encode())

    def draw(i: int) -> list[str]:
        rng = np.random.default_rng([seed, i])
        scene, name = sample_scene(rng, i), f"{i:04d}.png"
        write_image(images / name, draw_scene(scene, rng))
        return [f"{name}| {number}| {text}\n" for number, text in enumerate(describe(scene, rng))]

    with ThreadPoolExecutor() as pool:  # most of the time is spent writing files
        drawn = tqdm(pool.map(draw, range(n_images)), desc="drawing the demo", total=n_images,
                     unit="image", leave=False, disable=None)
        rows = [row for rows in drawn for row in rows]
    header = "image_name| comment_number| comment\n"
    write_atomic(annotations, "".join([header, *rows]).encode())
