"""Retrieval metrics, compared with a slow and obvious loop."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.evaluation.metrics import (
    EPOCH_HEADER,
    format_epoch,
    format_seconds,
    format_table,
    retrieval_metrics,
    retrieval_ranks,
    summarize_ranks,
    weak_score,
)
from tests.tiny_data import log_line, make_metrics


def similarity_table(images: torch.Tensor, texts: torch.Tensor) -> list[list[float]]:
    """Return dot products (captions, images) as Python numbers."""
    return (texts.double() @ images.double().T).tolist()


def oracle_ranks(table: list[list[float]], owner: list[int]) -> tuple[list[int], list[int]]:
    """Return the ranks of both directions by counting what is not strictly less similar."""
    text_to_image = [
        sum(not table[m][n] < table[m][owner[m]] for n in range(len(table[m])))
        for m in range(len(owner))
    ]
    image_to_text = []
    for n in range(len(table[0])):
        own = [table[m][n] for m in range(len(owner)) if owner[m] == n]
        others = [table[m][n] for m in range(len(owner)) if owner[m] != n]
        if own:
            best = math.nan if any(map(math.isnan, own)) else max(own)
            image_to_text.append(1 + sum(not other < best for other in others))
    return image_to_text, text_to_image


def oracle_metrics(image_to_text: list[int], text_to_image: list[int]) -> dict[str, float]:
    """Return percentages, medians and means of lists of ranks."""
    metrics = {}
    for direction, ranks in (("image_to_text", image_to_text), ("text_to_image", text_to_image)):
        for k in (1, 5, 10):
            metrics[f"{direction}_R@{k}"] = 100 * (sum(r <= k for r in ranks) / len(ranks))
        metrics[f"{direction}_median_rank"] = float(statistics.median(ranks))
        metrics[f"{direction}_mean_rank"] = sum(ranks) / len(ranks)
    metrics["rsum"] = sum(metrics[f"{d}_R@{k}"] for d in ("image_to_text", "text_to_image")
                          for k in (1, 5, 10))
    return metrics


@st.composite
def tied_embeddings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Draw embeddings of small integers, whose similarities are exact and often tie; images have
    different numbers of captions, in any order, and some have none."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    n_images, n_texts = draw(st.integers(1, 14)), draw(st.integers(1, 40))
    width, largest = draw(st.integers(1, 4)), draw(st.integers(0, 3))

    def rows(count: int) -> torch.Tensor:
        return torch.tensor([[float(rng.randint(-largest, largest)) for _ in range(width)]
                             for _ in range(count)])

    return rows(n_images), rows(n_texts), [rng.randrange(n_images) for _ in range(n_texts)]


@given(tied_embeddings())
def test_equals_brute_force_to_the_last_digit(example):
    """Recall, median, mean and rsum are those of a loop over lists, also with ties; the weak score
    is the 10 % quantile of the captions' scores with their own images."""
    images, texts, owner = example
    table = similarity_table(images, texts)
    metrics = retrieval_metrics(images, texts, torch.tensor(owner))
    own = sorted(table[m][n] for m, n in enumerate(owner))
    place = 0.1 * (len(own) - 1)
    low, high = own[math.floor(place)], own[math.ceil(place)]
    weak = low + (high - low) * (place - math.floor(place))
    assert metrics.pop("weak_score") == pytest.approx(weak, abs=1e-5)
    assert metrics == oracle_metrics(*oracle_ranks(table, owner))


@given(tied_embeddings(), st.integers(0, 2**32))
def test_order_of_captions_does_not_matter(example, seed):
    """Shuffled captions have the same ranks, in the new order."""
    images, texts, owner = example
    order = torch.randperm(len(owner), generator=torch.Generator().manual_seed(seed))
    image_index = torch.tensor(owner)
    image_to_text, text_to_image = retrieval_ranks(images, texts, image_index)
    shuffled = retrieval_ranks(images, texts[order], image_index[order])
    assert torch.equal(shuffled[0], image_to_text)
    assert torch.equal(shuffled[1], text_to_image[order])


@pytest.mark.parametrize("cached", [1, 2**26])
@pytest.mark.parametrize("tile_size", [1, 3, 7, 13, 40, 2**13])
def test_tile_size_changes_no_rank(monkeypatch, tile_size, cached):
    """In tiles of any size, computed once or again, the ranks are the same."""
    monkeypatch.setattr("src.evaluation.metrics.CACHED_ELEMENTS", cached)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(-2, 3, (13, 3), generator=generator).float()
    texts = torch.randint(-2, 3, (40, 3), generator=generator).float()
    owner = torch.randint(0, 11, (40,), generator=generator)  # the last two images have none
    expected = oracle_ranks(similarity_table(images, texts), owner.tolist())
    ranks = retrieval_ranks(images, texts, owner, tile_size)
    assert [part.tolist() for part in ranks] == list(expected)


def test_ranks_of_real_numbers():
    """On random unit vectors, which do not tie, the ranks equal the oracle's."""
    generator = torch.Generator().manual_seed(1)
    images = torch.nn.functional.normalize(torch.randn(30, 16, generator=generator))
    texts = torch.nn.functional.normalize(torch.randn(150, 16, generator=generator))
    owner = torch.arange(150) % 30
    expected = oracle_ranks(similarity_table(images, texts), owner.tolist())
    assert [part.tolist() for part in retrieval_ranks(images, texts, owner)] == list(expected)


def test_all_equal_similarities_rank_worst():
    """A model that gives the same embedding to everything has the worst ranks, not the best."""
    image_to_text, text_to_image = retrieval_ranks(
        torch.ones(4, 3), torch.ones(12, 3), torch.arange(12) // 3
    )
    assert text_to_image.tolist() == [4] * 12
    assert image_to_text.tolist() == [1 + 9] * 4


@pytest.mark.parametrize("where", ["images", "texts", "both"])
def test_nan_is_never_found(where):
    """A model whose embeddings are NaN has the worst ranks; its recall is 0."""
    images, texts = torch.eye(12), torch.eye(12).repeat_interleave(2, 0)
    if where != "texts":
        images = images * torch.nan
    if where != "images":
        texts = texts * torch.nan
    image_index = torch.arange(24) // 2
    image_to_text, text_to_image = retrieval_ranks(images, texts, image_index)
    assert text_to_image.tolist() == [12] * 24
    assert image_to_text.tolist() == [23] * 12
    assert retrieval_metrics(images, texts, image_index)["rsum"] == 0


def test_one_nan_caption_hurts_only():
    """A caption with NaN is never found, and ranks before every image's own caption."""
    images, texts = torch.eye(3), torch.eye(3)
    texts[1] = torch.nan
    image_to_text, text_to_image = retrieval_ranks(images, texts, torch.arange(3))
    assert text_to_image.tolist() == [1, 3, 1]
    assert image_to_text.tolist() == [2, 3, 2]
    assert weak_score(images, texts, torch.arange(3)) == pytest.approx(-0.6)  # of -1, 1, 1


def test_perfect_embeddings():
    """If every image is similar only to its own captions, all recalls are 100 and all ranks 1."""
    metrics = retrieval_metrics(
        torch.eye(20), torch.eye(20).repeat_interleave(5, 0), torch.arange(100) // 5
    )
    assert metrics.pop("rsum") == 600
    assert {name: value for name, value in metrics.items() if "R@" in name and value != 100} == {}
    assert {value for name, value in metrics.items() if "rank" in name} == {1}


def test_float16_embeddings_are_scored_in_float32():
    """Half-precision embeddings are converted before the products: near neighbors still differ."""
    images = torch.tensor([[1.0, 2**-10], [1.0, 0.0]], dtype=torch.float16)
    texts = torch.tensor([[1.0, 2**-10]], dtype=torch.float16)  # 1 + 2^-20 against 1
    assert retrieval_ranks(images, texts, torch.tensor([0]))[1].tolist() == [1]


def test_median_between_two_ranks():
    """The median of an even number of ranks is the mean of the middle two."""
    metrics = summarize_ranks(torch.tensor([1, 2, 5, 90]), torch.tensor([3]))
    assert metrics["image_to_text_median_rank"] == 3.5
    assert metrics["image_to_text_mean_rank"] == 24.5
    assert metrics["text_to_image_median_rank"] == 3


@pytest.mark.parametrize(("is_best", "epochs"), [(False, 2), (True, 9), (True, 10_000)])
def test_an_epoch_is_one_row_of_a_table(is_best, epochs):
    """The row has the recalls of both directions in the columns of the header, a mark for the best
    epoch, and an estimate of the remaining time; it fits 80 columns."""
    row = format_epoch(log_line(2), is_best, epochs)
    assert row.split()[:8] == ["2", "2.000", "23.0", "27.0", "32.0", "3.0", "7.0", "12.0"]
    assert row.split()[8] == "123.4" + "*" * is_best
    assert len(row) <= 80 and max(map(len, EPOCH_HEADER.splitlines())) <= 80
    seconds = log_line(2)["time"]["seconds"] + log_line(2)["time"]["validation_seconds"]
    times = [format_seconds(seconds)] + [format_seconds((epochs - 2) * seconds)] * (epochs > 2)
    assert " ".join(row.split()[9:]) == " ".join(times)
    for name, value in (("loss", "2.000"), ("rsum", "123.4"), ("R@10", "32.0")):
        end = EPOCH_HEADER.splitlines()[1].index(name) + len(name)
        assert row[:end].endswith(value)


def test_the_time_of_tuned_epochs_is_not_estimated_from_frozen_ones() -> None:
    """An epoch on computed features takes a hundredth of the time of those that follow."""
    frozen, last_frozen, tuned = (
        format_epoch(log_line(epoch), True, 10, frozen_epochs=3) for epoch in (2, 3, 4))
    without = format_epoch(log_line(2), True, 2)  # the last epoch: no time is left
    assert frozen == without and len(last_frozen) == len(without)
    assert tuned.split()[-1] in ("s", "min") and len(tuned) > len(without)
    whole_run = format_epoch(log_line(2), True, 10, frozen_epochs=10)
    assert whole_run == format_epoch(log_line(2), True, 10)


def test_an_epoch_without_validation() -> None:
    """The columns of the metrics are empty, and the row is as wide as others."""
    row = format_epoch({**log_line(2), "metrics": {}}, True, 2)
    assert row.split() == ["2", "2.000", *"-------", "13", "s"]
    assert len(row) == len(format_epoch(log_line(2), True, 2))


def test_times_have_a_unit():
    """A time is in seconds, minutes or hours, by its size."""
    assert [format_seconds(s) for s in (0, 89, 90, 5399, 5400, 360_000)] == [
        "0 s", "89 s", "2 min", "90 min", "1.5 h", "100.0 h"]


def test_table_has_every_metric():
    """The recalls and ranks of both directions are aligned below their headings, then the rsum."""
    lines = format_table(make_metrics(1)).splitlines()
    assert lines[0].split() == ["R@1", "R@5", "R@10", "median", "rank", "mean", "rank"]
    assert lines[1].split() == ["image", "to", "text", "2.0", "6.0", "11.0", "30.5", "60.2"]
    assert lines[2].split() == ["text", "to", "image", "22.0", "26.0", "31.0", "31.5", "61.2"]
    assert lines[3] == "rsum 123.4"
    assert len({len(line) for line in lines[:3]}) == 1
