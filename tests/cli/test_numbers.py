"""Numbers as people read them."""

import pytest

from entrenar.cli.numbers import human_bytes, human_seconds


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_340_000, "2.3 MB"), (7.1e12, "7.1 TB")]
)
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3725, "1:02:05")])
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text
