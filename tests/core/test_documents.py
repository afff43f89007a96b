"""Files from elsewhere: only regular ones are opened, sizes are bounded, JSON has the shape that is asked for."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.core.documents import open_regular, parse_json, read_bytes, read_json, read_text
from entrenar.core.errors import InputError


@dataclass(frozen=True)
class Point:
    x: int
    y: float = 0.0


def test_a_regular_file_and_a_link_to_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"x": 1}')
    (tmp_path / "b.json").symlink_to("a.json")
    assert read_json(tmp_path / "b.json", "point") == {"x": 1}
    assert read_json(tmp_path / "a.json", "point", Point) == Point(1)
    assert read_text(tmp_path / "a.json", "point") == '{"x": 1}'


def test_what_is_no_regular_file_is_named_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (tmp_path / "pipe", "is a named pipe"),
        (Path("/dev/zero"), "is a device"),
        (tmp_path, "is a directory"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / ("n" * 300), "cannot be read: File name too long"),
        (Path("a\0b"), "cannot be read: embedded null byte"),
    ):
        with pytest.raises(InputError, match=said):
            open_regular(path, "config")


def test_a_file_beyond_its_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    assert read_bytes(tmp_path / "a", "note", limit=4) == b"1234"
    with pytest.raises(InputError, match=r"note .* is larger than 3 bytes"):
        read_bytes(tmp_path / "a", "note", limit=3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "it is"),
        ('{"y": 1}', "the key 'x' is missing"),
        ('{"x": "3"}', "'x' is '3' but input should be a valid integer"),
        ('{"x": 1, "y": true}', "'y' is True but input should be a valid number"),
        ("[" * 100_000, "not JSON"),
        (b'{"x": 1, "\xff": 2}', "not JSON"),
    ],
)
def test_wrong_json_is_a_sentence_with_the_key(text: str | bytes, said: str) -> None:
    with pytest.raises(InputError, match="state.json: .*" + said):
        parse_json(text, "state.json", Point)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_anything_parsed_is_taken_or_refused_in_a_sentence(values: object) -> None:
    try:
        assert isinstance(parse_json(json.dumps(values), "state.json", Point), Point)
    except InputError as error:
        assert str(error).startswith("state.json: ")
