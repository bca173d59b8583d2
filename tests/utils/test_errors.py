"""The texts of messages."""

from __future__ import annotations

import pytest

from src.utils.errors import MAX_LINES, counted, shorten_lines


@pytest.mark.parametrize(("things", "one"), [
    ("photos embedded", "1 photo embedded"), ("caption rows rejected", "1 caption row rejected"),
    ("images missing from results/photos", "1 image missing from results/photos"),
    ("files", "1 file"), ("groups of byte-identical images", "1 group of byte-identical images"),
])
def test_one_thing_is_in_the_singular(things: str, one: str) -> None:
    """Only the first plural changes, and only for one; thousands are separated."""
    assert counted(1, things) == one
    assert [counted(n, things) for n in (0, 2, 1234)] == [
        f"0 {things}", f"2 {things}", f"1,234 {things}"]


@pytest.mark.parametrize(("count", "more"), [(0, []), (10, []), (11, ["and 1 more"]),
                                             (1010, ["and 1,000 more"])])
def test_long_lists_are_shortened(count: int, more: list[str]) -> None:
    """Ten lines and a number."""
    lines = [str(i) for i in range(count)]
    assert MAX_LINES == 10 and shorten_lines(lines) == lines[:10] + more
