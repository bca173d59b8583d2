"""The demo's little world: drawn pictures and their captions, in the layout of Flickr30k.

Colored shapes stand alone, in groups of two to four, or in pairs, one above or beside the other.
Picture i is a function of (seed, i) alone, so a larger world begins with the smaller one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.data.images import write_image
from src.utils.errors import UserError
from src.utils.files import write_atomic

VERSION = 1  # raise it when the same seed would draw another world
SIDE = 128  # pixels
# (SIDE, SIDE) float32 each: pixels below and right of the middle.
Y, X = np.mgrid[:SIDE, :SIDE].astype(np.float32) + 0.5 - SIDE / 2

# Hues far apart for the shapes, hardly any hue for the grounds: a colour word tells which it means.
COLORS = {
    "red": (224, 54, 50), "orange": (246, 138, 30), "yellow": (250, 214, 48),
    "green": (66, 172, 76), "turquoise": (44, 200, 194), "blue": (48, 104, 222),
    "purple": (142, 76, 204), "pink": (246, 126, 182),
}
GROUNDS = {
    "white": (248, 248, 246), "grey": (172, 176, 182), "black": (36, 38, 44),
    "beige": (233, 216, 184),
}
RADII = {"large": (24.0, 28.0), "small": (13.0, 16.0)}  # pixels

PLACES = {"left": (-32, 0), "right": (32, 0), "top": (0, -32), "bottom": (0, 32), "middle": (0, 0)}
LAYOUTS = ("above", "beside") * 15 + ("group",) * 10 + tuple(PLACES) * 2  # as often as they stand


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        layout: 'above' or 'beside' for a pair, whose first shape is the upper or the left one;
            'group' for two to four alike; a key of PLACES for a shape alone.
        shapes, colors, sizes: two of each for a pair, else one.
        count: how many shapes are drawn.
        ground: the background's color.
    """

    layout: str
    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    sizes: tuple[str, ...]
    count: int
    ground: str


# Queries, and what they fix of a scene. Left to chance, most worlds would hold no red circle above
# a blue square at all: of every 50 pictures each query gets one, so that a few validate, too.
WISHES: dict[str, dict] = {
    "a red circle above a blue square": dict(
        layout="above", shapes=("circle", "square"), colors=("red", "blue")),
    "three yellow stars": dict(layout="group", shapes=("star",), colors=("yellow",), count=3),
    "a green triangle next to a purple heart": dict(
        layout="beside", shapes=("triangle", "heart"), colors=("green", "purple")),
    "a large orange ring in the middle": dict(
        layout="middle", shapes=("ring",), colors=("orange",), sizes=("large",)),
    "four pink hearts on a black background": dict(
        layout="group", shapes=("heart",), colors=("pink",), count=4, ground="black"),
    "a small turquoise square at the bottom": dict(
        layout="bottom", shapes=("square",), colors=("turquoise",), sizes=("small",)),
}
DEMO_QUERIES: list[str] = list(WISHES)
WISH_PERIOD = 50

# Five of its layout's templates caption a scene. A third of the nouns leave out the size.
PAIR = ("{a} {over} {b} {ground}", "{b} {under} {a}", "there is {a} {over} {b}",
        "{ground} {b} is {under} {a}", "{a} {here} and {b} {there}",
        "a picture of {a} and {b} {ground}")
GROUP = ("{a} {ground}", "there are {a}", "a picture of {a}", "{ground} there are {a}",
         "a group of {a} {ground}", "{a} together")
ALONE = ("{a} {here} {ground}", "{a} is {here}", "there is {a} {here}", "{ground} there is {a}",
         "a picture of {a} {here}", "just {a} {here} {ground}")
TEMPLATES = {"above": PAIR, "beside": PAIR, "group": GROUP, **dict.fromkeys(PLACES, ALONE)}
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
SIZES = {"large": ("large", "big", ""), "small": ("small", "little", "")}
NUMBERS = {2: "two", 3: "three", 4: "four"}


def sample_scene(rng: np.random.Generator, index: int) -> Scene:
    """The scene of picture `index`, by chance but for what a query may fix of it."""
    turn = index % WISH_PERIOD
    wish = WISHES[DEMO_QUERIES[turn]] if turn < len(WISHES) else {}
    layout = wish.get("layout") or _pick(rng, LAYOUTS)
    kinds = 2 if TEMPLATES[layout] is PAIR else 1
    chance = dict(
        layout=layout,
        shapes=tuple(_pick(rng, tuple(SHAPES)) for _ in range(kinds)),
        colors=tuple(tuple(COLORS)[i] for i in rng.permutation(len(COLORS))[:kinds]),
        sizes=tuple(_pick(rng, tuple(RADII)) for _ in range(kinds)),
        count=int(rng.integers(2, 5)) if layout == "group" else kinds,
        ground=_pick(rng, tuple(GROUNDS)),
    )
    return Scene(**{**chance, **wish})


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]  # rng.choice takes ten times as long


def describe(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Five different captions of one scene; each names every shape and its color."""
    templates = TEMPLATES[scene.layout]
    captions = []
    for i in rng.permutation(len(templates))[:5]:
        words = {slot: _pick(rng, options) for slot, options in WORDS[scene.layout].items()}
        words |= {slot: _noun(scene, k, rng) for k, slot in enumerate("ab"[:len(scene.shapes)])}
        words["ground"] = _pick(rng, ("on a {} background", "on {} paper")).format(scene.ground)
        captions.append(templates[i].format(**words) + " .")
    return captions


def _noun(scene: Scene, k: int, rng: np.random.Generator) -> str:
    """'a small red star', 'an orange ring' or 'three blue hearts', the size named or not."""
    noun = f"{_pick(rng, SIZES[scene.sizes[k]])} {scene.colors[k]} {scene.shapes[k]}".strip()
    if scene.layout == "group":
        return f"{NUMBERS[scene.count]} {noun}s"
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _star(x: np.ndarray, y: np.ndarray, points: int, notch: float) -> np.ndarray:
    """Signed distance to a star with tips at radius 1, one straight up, and notches at `notch`."""
    sector = math.pi / points
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    radius = np.hypot(x, y)
    # All sectors are folded onto one, whose outline is a single segment from tip to notch.
    u, v = radius * np.cos(angle) - 1, radius * np.sin(angle)
    edge_u, edge_v = notch * math.cos(sector) - 1, notch * math.sin(sector)
    along = np.clip((u * edge_u + v * edge_v) / (edge_u**2 + edge_v**2), 0, 1)
    inside = np.sign(edge_u * v - edge_v * u)
    return -inside * np.hypot(u - along * edge_u, v - along * edge_v)


def _polygon(x: np.ndarray, y: np.ndarray, corners: int) -> np.ndarray:
    """Signed distance to a regular polygon: a star whose notches lie on its straight sides."""
    return _star(x, y, corners, math.cos(math.pi / corners))


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its corner, 2 across, and a disc on each of its upper sides."""
    lobes = np.hypot(np.abs(x) - 0.5, y + 0.5) - 0.5**0.5
    return np.minimum(lobes, _polygon(x, y, 4))


# Signed distances, y pointing down, in units that make the shapes of one radius look equally large.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.88,
    "square": lambda x, y: _polygon((x - y) / 2**0.5, (x + y) / 2**0.5, 4) - 0.06,
    "triangle": lambda x, y: _polygon(x, y - 0.2, 3) - 0.06,
    "star": lambda x, y: _star(x, y - 0.04, 5, 0.48) - 0.05,
    "heart": lambda x, y: 0.74 * _heart(x / 0.74, y / 0.74 - 0.14) - 0.02,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.2,
}


def draw_scene(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The picture of a scene: (SIDE, SIDE, 3) uint8; positions, tilts and tints are by chance."""
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 + 0.06 * (math.cos(angle) * X + math.sin(angle) * Y) / (SIDE / 2)
    tint = np.float32(GROUNDS[scene.ground] + rng.uniform(-3, 3, 3))
    picture = light[..., None] * tint  # (SIDE, SIDE, 3)
    radii = [rng.uniform(*RADII[size]) for size in scene.sizes]
    for i, (x, y) in enumerate(_places(scene, rng).tolist()):
        kind = i % len(scene.shapes)
        color = np.float32(COLORS[scene.colors[kind]] + rng.uniform(-9, 9, 3))
        _stamp(picture, SHAPES[scene.shapes[kind]], color, x, y, radii[kind],
               rng.uniform(-0.2, 0.2))
    return (picture + 0.5).clip(0, 255).astype(np.uint8)


def _places(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Where each shape stands: (count, 2) pixels right of and below the middle."""
    if scene.layout in PLACES:
        places = np.array([PLACES[scene.layout]])
    elif scene.layout == "group":
        # On a circle just wide enough for large neighbours; four fit no other way than square.
        reach, turn = {2: (29, 3.1), 3: (33, 3.1), 4: (41, 0.1)}[scene.count]
        angles = np.linspace(0, 2 * math.pi, scene.count, endpoint=False) + rng.uniform(-turn, turn)
        angles += math.pi / 4
        places = reach * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    else:
        aside = rng.uniform(-9, 9, 2)
        places = np.stack([aside, [-30, 30]], axis=1)
        if scene.layout == "beside":
            places = places[:, ::-1]
    return places + rng.uniform(-2, 2, (scene.count, 2))


def _stamp(picture: np.ndarray, shape: Callable, color: np.ndarray, x: float, y: float,
           radius: float, tilt: float) -> None:
    """Draw one shape into `picture`: a soft shadow, a darker rim, light from above."""
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
    behind = picture[window] * (1 - shadow[..., None])
    picture[window] = behind + coverage * (shade[..., None] * color - behind)


def make_demo_dataset(folder: Path, n_images: int = 1000, seed: int = 0) -> None:
    """Draw `folder`/images/*.png and `folder`/annotations/annotations.csv, five captions a picture.

    A folder that holds this very world already is left as it is; another world, or a part of one,
    is drawn anew.

    Raises:
        UserError: the folder holds images or annotations that are no demo's.
    """
    marker, images = folder / "demo.json", folder / "images"
    annotations = folder / "annotations" / "annotations.csv"
    world = {"version": VERSION, "n_images": n_images, "seed": seed}
    before = json.loads(marker.read_text()) if marker.exists() else {"n_images": 0}
    if before == world and annotations.exists():
        return
    if not marker.exists() and (images.exists() or annotations.exists()):
        raise UserError(f"{folder} holds other data; give the demo a folder of its own")
    # The annotations go first and come last: a world half drawn never passes for a whole one.
    annotations.unlink(missing_ok=True)
    for i in range(n_images, before["n_images"]):
        (images / f"{i:04d}.png").unlink(missing_ok=True)
    write_atomic(marker, json.dumps(world).encode())

    def draw(i: int) -> list[str]:
        rng = np.random.default_rng([seed, i])
        scene, name = sample_scene(rng, i), f"{i:04d}.png"
        write_image(images / name, draw_scene(scene, rng))
        return [f"{name}| {number}| {text}\n" for number, text in enumerate(describe(scene, rng))]

    with ThreadPoolExecutor() as pool:  # most of the time goes to the disk
        rows = [row for rows in pool.map(draw, range(n_images)) for row in rows]
    header = "image_name| comment_number| comment\n"
    write_atomic(annotations, "".join([header, *rows]).encode())
