"""The demo dataset: its captions say what its images show."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.data import synthetic as demo
from src.data.captions import ImageRecord, read_annotations
from src.data.source import split_by_image
from src.utils.errors import UserError

# The upper end of each color on the circle of hues, in degrees.
HUES = {"red": 15, "orange": 39, "yellow": 70, "green": 155, "turquoise": 199, "blue": 245,
        "purple": 295, "pink": 345}
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
FIRST_IS = {"above": (0, 1), "over": (0, 1), "at the top and": (0, 1), "below": (0, -1),
            "under": (0, -1), "left of": (1, 1), "to the left of": (1, 1), "right of": (1, -1),
            "to the right of": (1, -1), "on the left and": (1, 1), "at the left side and": (1, 1)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred images: two for each query, the others random."""
    folder = tmp_path_factory.mktemp("demo")
    demo.make_demo_dataset(folder, 100)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def described(dataset: Path) -> list[tuple[dict[str, np.ndarray], tuple[str, ...]]]:
    """For each image the masks of its colors, and its captions."""
    records = read_annotations(dataset / "annotations" / "annotations.csv").records
    return [(color_masks(dataset / "images" / record.name), record.captions) for record in records]


def color_masks(path: Path) -> dict[str, np.ndarray]:
    """Where each named color is: name -> (H, W) bool. Backgrounds have less saturation."""
    hue, saturation, value = np.moveaxis(np.asarray(Image.open(path).convert("HSV")), -1, 0)
    # The circle of hues begins again after its last color.
    name = np.searchsorted(list(HUES.values()), hue * (360 / 256), side="right") % len(HUES)
    strong = (saturation > 100) & (value > 100)
    masks = {color: strong & (name == i) for i, color in enumerate(HUES)}
    # On an edge a few pixels may have a color between those of shape and background.
    return {color: mask for color, mask in masks.items() if mask.sum() > 60}


def blob_areas(mask: np.ndarray) -> list[int]:
    """Pixels of each connected part of a mask, without tiny ones; every second row and column."""
    left, areas = set(map(tuple, np.argwhere(mask[::2, ::2]).tolist())), []
    while left:
        stack, area = [left.pop()], 0
        while stack:
            row, column = stack.pop()
            area += 1
            near = {(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)}
            stack += near & left
            left -= near
        areas.append(4 * area)
    return [area for area in areas if area > 30]


def test_the_dataset_is_a_function_of_its_seed(tmp_path: Path) -> None:
    """The same seed writes the same bytes, another seed others."""
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        demo.make_demo_dataset(tmp_path / name, 8, seed)
    one, same, other = (content(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same
    assert one.keys() == other.keys()
    assert not any(one[name] == other[name] for name in one)


def test_a_larger_dataset_begins_with_the_smaller_one(tmp_path: Path, dataset: Path) -> None:
    """Image and captions i do not depend on the number of images."""
    demo.make_demo_dataset(tmp_path, 9)
    small, large = content(tmp_path), content(dataset)
    rows, more_rows = (files["annotations/annotations.csv"] for files in (small, large))
    assert len(rows.splitlines()) == 1 + 9 * 5
    assert more_rows.startswith(rows)
    images = [name for name in small if name.endswith(".png")]
    assert len(images) == 9
    assert all(small[name] == large[name] for name in images)


def test_the_layout_is_that_of_flickr30k(dataset: Path) -> None:
    """Each RGB image, and nothing else, has five different captions, numbered from 0."""
    rows = (dataset / "annotations" / "annotations.csv").read_text().splitlines()
    assert rows[0] == "image_name| comment_number| comment"
    assert [row.split("| ")[1] for row in rows[1:]] == list("01234") * 100
    read = read_annotations(dataset / "annotations" / "annotations.csv")
    assert (read.format, read.rejected, read.fixed) == ("results.csv", [], [])
    assert [record.name for record in read.records] == sorted(
        path.name for path in (dataset / "images").iterdir())
    assert all(len(set(record.captions)) == 5 for record in read.records)
    for record in read.records:
        with Image.open(dataset / "images" / record.name) as image:
            assert (image.mode, image.size) == ("RGB", (demo.SIDE, demo.SIDE))


def test_captions_name_the_colors_that_are_drawn(described: list) -> None:
    """The colors named in each caption are those of the pixels, no more and no fewer."""
    seen = set()
    for masks, captions in described:
        drawn = set(masks)
        seen |= drawn
        for caption in captions:
            assert set(caption.split()) & set(HUES) == drawn, caption
    assert seen == set(HUES) == set(demo.COLORS)


def test_captions_count_and_size_the_shapes_that_are_drawn(described: list) -> None:
    """'two small red' is two red blobs, none as large as the smallest 'large' one."""
    number, color = "|".join(NUMBERS), "|".join(HUES)
    phrase = re.compile(rf"\b({number}) (?:(large|big|small|little) )?({color}) ")
    checked = set()
    for masks, captions in described:
        areas = {name: blob_areas(mask) for name, mask in masks.items()}
        for number, size, color in phrase.findall(" ".join(captions)):
            assert len(areas[color]) == NUMBERS[number], captions
            if size:
                large = size in ("large", "big")
                assert all((area > 640) == large for area in areas[color]), captions
            checked |= {number, size}
    assert checked == {*NUMBERS, "large", "big", "small", "little", ""}


def test_captions_say_how_a_pair_is_arranged(described: list) -> None:
    """'a red … above a blue …': the center of the red pixels is above that of the blue ones."""
    color = f"({'|'.join(HUES)})"
    relation = "|".join(FIRST_IS)
    phrase = re.compile(rf"{color} \w+ (?:is )?({relation}) an? (?:\w+ )?{color} ")
    checked = set()
    for masks, captions in described:
        centers = {name: np.argwhere(mask).mean(axis=0) for name, mask in masks.items()}
        for caption in captions:
            for first, word, second in phrase.findall(caption):
                axis, sign = FIRST_IS[word]
                assert sign * (centers[second] - centers[first])[axis] > 20, caption
                checked.add(word)
    assert checked == set(FIRST_IS)


def test_captions_say_where_a_single_shape_is(described: list) -> None:
    """'on the left', 'at the bottom', 'in the middle': the shape's pixels are there."""
    low, high = demo.SIDE / 3, demo.SIDE * 2 / 3
    places = {"left": lambda x, y: x < low, "right": lambda x, y: x > high,
              "top": lambda x, y: y < low, "bottom": lambda x, y: y > high,
              "middle": lambda x, y: low < x < high and low < y < high}
    places["centre"] = places["middle"]
    checked = set()
    for masks, captions in described:
        if len(masks) == 1:
            y, x = np.argwhere(*masks.values()).mean(axis=0)
            for word in set(" ".join(captions).split()) & set(places):
                assert places[word](x, y), captions
                checked.add(word)
    assert checked == set(places)


def test_captions_name_the_background(dataset: Path) -> None:
    """The background named is that of the corners."""
    shades = {"black": (0, 60), "grey": (150, 200), "beige": (200, 230), "white": (232, 256)}
    checked = set()
    for record in read_annotations(dataset / "annotations" / "annotations.csv").records:
        picture = np.asarray(Image.open(dataset / "images" / record.name))
        shade = picture[::demo.SIDE - 1, ::demo.SIDE - 1].mean()
        for word in set(" ".join(record.captions).split()) & set(shades):
            assert shades[word][0] < shade < shades[word][1], record
            checked.add(word)
    assert checked == set(shades) == set(demo.BACKGROUNDS)


def test_only_rings_have_a_hole(described: list) -> None:
    """Where one shape has its color to itself, its middle is empty if captions call it a ring."""
    named = re.compile(rf"\ban? (?:\w+ )?({'|'.join(HUES)}) (\w+)")
    checked = set()
    for masks, captions in described:
        for color, shape in named.findall(" ".join(captions)):
            ys, xs = np.nonzero(masks[color])
            middle = (ys.min() + ys.max()) // 2, (xs.min() + xs.max()) // 2
            assert masks[color][middle] == (shape != "ring"), captions
            checked.add(shape)
    assert checked == set(demo.SHAPES)


@pytest.mark.parametrize("name, upper, lower", [
    ("circle", 0.79, 0.79), ("square", 1.0, 1.0), ("triangle", 0.29, 0.79), ("star", 0.42, 0.5),
    ("heart", 0.89, 0.47), ("ring", 0.55, 0.55)])
def test_shapes_fill_their_boxes_as_their_names_say(name: str, upper: float, lower: float) -> None:
    """A triangle is wide below and a heart above; each nearly fits a circle of radius 1."""
    y, x = np.mgrid[-1.3:1.3:400j, -1.3:1.3:400j]
    inside = demo.SHAPES[name](x, y) < 0
    assert np.array_equal(inside, inside[:, ::-1])
    assert 0.8 < np.hypot(x, y)[inside].max() < 1.2
    box = inside[np.ix_(inside.any(axis=1), inside.any(axis=0))]
    half = len(box) // 2
    assert box[:half].mean() == pytest.approx(upper, abs=0.03)
    assert box[half:].mean() == pytest.approx(lower, abs=0.03)


@pytest.mark.parametrize("corners, notch", [(5, 0.48), (3, 0.5), (4, 0.5**0.5)])
def test_star_is_the_signed_distance_to_its_outline(corners: int, notch: float) -> None:
    """The distance agrees with the smallest one to many points of the outline."""
    turns = np.arange(2 * corners) * np.pi / corners
    radii = np.where(np.arange(2 * corners) % 2, notch, 1.0)
    outline = np.stack([radii * np.sin(turns), -radii * np.cos(turns)], axis=1)
    ends = np.roll(outline, -1, axis=0)
    steps = np.linspace(0, 1, 2001)[:, None, None]
    walk = (outline + steps * (ends - outline)).reshape(-1, 2)
    for x, y in np.random.default_rng(0).uniform(-1.3, 1.3, (60, 2)):
        distance = np.hypot(*(walk - (x, y)).T).min()
        crossed = (outline[:, 1] > y) != (ends[:, 1] > y)
        rise = (y - outline[:, 1])[crossed] / (ends - outline)[crossed, 1]
        right = outline[crossed, 0] + rise * (ends - outline)[crossed, 0] > x
        expected = -distance if right.sum() % 2 else distance
        assert demo._star(x, y, corners, notch) == pytest.approx(expected, abs=2e-3)


FITS = {
    "a red circle above a blue square": lambda s: (
        s.layout == "above" and s.shapes == ("circle", "square") and s.colors == ("red", "blue")),
    "three yellow stars": lambda s: (
        (s.count, s.shapes, s.colors) == (3, ("star",), ("yellow",))),
    "a green triangle next to a purple heart": lambda s: (
        s.layout == "beside"
        and set(zip(s.colors, s.shapes, strict=True))
        == {("green", "triangle"), ("purple", "heart")}),
    "a large orange ring in the middle": lambda s: (
        (s.layout, s.sizes, s.colors, s.shapes) == ("middle", ("large",), ("orange",), ("ring",))),
    "four pink hearts on a black background": lambda s: (
        (s.count, s.colors, s.shapes, s.background) == (4, ("pink",), ("heart",), "black")),
    "a small turquoise square at the bottom": lambda s: (
        (s.layout, s.sizes, s.colors, s.shapes)
        == ("bottom", ("small",), ("turquoise",), ("square",))),
}


def default_scenes() -> list[demo.Scene]:
    return [demo.sample_scene(np.random.default_rng([0, i]), i) for i in range(1000)]


def test_every_query_has_images_in_both_splits() -> None:
    """By default several images of each split fit each of DEMO_QUERIES."""
    assert list(FITS) == demo.DEMO_QUERIES
    scenes = default_scenes()
    records = [ImageRecord(f"{i:04d}.png", ("a",)) for i in range(1000)]
    splits = split_by_image(records, 0.1, 0)
    for query, fits in FITS.items():
        for split, least in (("train", 3), ("val", 1)):
            fitting = sum(fits(scenes[int(record.name[:4])]) for record in splits[split])
            assert fitting >= least, (query, split)


def test_most_scenes_have_a_bag_of_words_of_their_own() -> None:
    """Few scenes share all their attributes: the text encoder ignores the order of words."""
    scenes = default_scenes()
    bags = {(s.layout, s.count, s.background, *sorted(s.shapes), *sorted(s.colors),
             *sorted(s.sizes)) for s in scenes}
    assert len(bags) > 850
    assert 550 < sum(len(s.shapes) == 2 for s in scenes) < 650


def test_the_vocabulary_is_small_and_holds_the_queries(described: list) -> None:
    """There are few words, and the captions use every word of the queries."""
    captions = [caption for _, captions in described for caption in captions]
    words = set(re.findall(r"\w+", " ".join(captions)))
    assert 40 <= len(words) <= 70
    assert set(" ".join(demo.DEMO_QUERIES).split()) <= words


def test_an_existing_dataset_is_not_written_again(tmp_path: Path) -> None:
    """A second call writes nothing, even if an image has changed."""
    demo.make_demo_dataset(tmp_path, 2)
    (tmp_path / "images" / "0000.png").write_bytes(b"changed")
    before = content(tmp_path)
    demo.make_demo_dataset(tmp_path, 2)
    assert content(tmp_path) == before


@pytest.mark.parametrize("n_images, seed", [(5, 1), (2, 0)])
def test_another_dataset_replaces_the_old_one(
    tmp_path: Path, n_images: int, seed: int
) -> None:
    """The folder is then the same as one that was empty before."""
    demo.make_demo_dataset(tmp_path / "redrawn", 5)
    demo.make_demo_dataset(tmp_path / "redrawn", n_images, seed)
    demo.make_demo_dataset(tmp_path / "drawn", n_images, seed)
    assert content(tmp_path / "redrawn") == content(tmp_path / "drawn")


def test_an_interrupted_dataset_has_no_annotations_and_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An incomplete dataset has no annotations, and the next call completes it."""
    demo.make_demo_dataset(tmp_path / "broken", 3)
    write = demo.write_image

    def write_some(path: Path, image: np.ndarray) -> None:
        if path.name == "0002.png":
            raise KeyboardInterrupt
        write(path, image)

    monkeypatch.setattr(demo, "write_image", write_some)
    with pytest.raises(KeyboardInterrupt):
        demo.make_demo_dataset(tmp_path / "broken", 5, seed=1)
    assert not (tmp_path / "broken" / "annotations" / "annotations.csv").exists()
    monkeypatch.undo()
    demo.make_demo_dataset(tmp_path / "broken", 5, seed=1)
    demo.make_demo_dataset(tmp_path / "whole", 5, seed=1)
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", ["annotations/annotations.csv", "images/0000.png"])
def test_other_data_is_never_overwritten(tmp_path: Path, name: str) -> None:
    """A folder of other images or captions is refused and not changed."""
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match="folder of its own"):
        demo.make_demo_dataset(tmp_path, 2)
    assert content(tmp_path) == {name: b"precious"}
