"""Which kind a data file is, compressed or not, and what is refused by its name."""

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pytest

from entrenar.core.errors import InputError
from entrenar.files.data_file import read_data_file


def _zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


_COMPRESS = {"gz": gzip.compress, "zst": _zstd}


def _lines(tmp_path: Path, content: bytes) -> list[tuple[int, object, str]]:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return [(line.number, line.row, line.problem) for line in read_data_file(path)]


@pytest.mark.parametrize("text", [b'{"a": 1}\n{"a": 2}\n', b'[{"a": 1}, {"a": 2}]'], ids=["lines", "array"])
@pytest.mark.parametrize("name", _COMPRESS)
def test_a_compressed_file_is_read(tmp_path: Path, text: bytes, name: str) -> None:
    assert [row for _, row, _ in _lines(tmp_path, _COMPRESS[name](text))] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("name", _COMPRESS)
def test_what_is_compressed_in_parts_is_one_text(tmp_path: Path, name: str) -> None:
    parts = [b'{"a": ' + b" " * 100_000, b"1}\n", b'{"a": 2}\n' * 20_000]
    rows = _lines(tmp_path, b"".join(map(_COMPRESS[name], parts)))
    assert rows == [(1, {"a": 1}, ""), *((number, {"a": 2}, "") for number in range(2, 20_002))]


@pytest.mark.parametrize("name", _COMPRESS)
def test_a_compressed_csv_is_told_by_the_name_before(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"data.tsv.{name}"
    path.write_bytes(_COMPRESS[name](b"prompt\tcompletion\nHi\tHello\n"))
    assert [line.row for line in read_data_file(path)] == [{"prompt": "Hi", "completion": "Hello"}]


_NOISE = b"".join(b'{"a": "%d"}\n' % (number * 7919 % 10007) for number in range(5000))


@pytest.mark.parametrize("cut", [1, 9, 5000])
@pytest.mark.parametrize("name", _COMPRESS)
def test_a_compressed_file_that_is_cut_short_is_an_input_error(tmp_path: Path, name: str, cut: int) -> None:
    with pytest.raises(InputError, match=r"data file .*data\.jsonl cannot be read: "):
        _lines(tmp_path, _COMPRESS[name](_NOISE)[:-cut])


@pytest.mark.parametrize("start", [b"\x1f\x8b", b"\x28\xb5\x2f\xfd"])
def test_a_compressed_file_that_is_wrong_is_an_input_error(tmp_path: Path, start: bytes) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        _lines(tmp_path, start + b"not compressed at all")


@pytest.mark.parametrize(("outer", "inner"), [("gz", "zst"), ("zst", "gz"), ("zst", "zst")])
def test_a_file_compressed_twice_is_refused(tmp_path: Path, outer: str, inner: str) -> None:
    with pytest.raises(InputError, match="compressed twice"):
        _lines(tmp_path, _COMPRESS[outer](_COMPRESS[inner](b"{}")))


def test_a_columnar_file_compressed_as_a_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a Parquet file, compressed as a whole: decompress it"):
        _lines(tmp_path, gzip.compress(b"PAR1 and so on PAR1"))


_KINDS = {
    b"PARE\x15\x04": "an encrypted Parquet file",
    b"version https://git-lfs.github.com/spec/v1\n": "Git LFS leaves",
    b"PK\x03\x04\x14": "a ZIP archive",
    b"BZh91AY": "compressed with bzip2",
    "\ufeff{}".encode("utf-16-le"): "UTF-16 text",
    "\ufeff{}".encode("utf-16-be"): "UTF-16 text",
    '{"a": 1}'.encode("utf-16-le"): "UTF-16 text",
    "\ufeff{}".encode("utf-32-le"): "UTF-32 text",
    b'{"a": 1,\n "b": [2]}\n': r"one JSON object over several lines \(keys: a, b\)",
    b"prompt,completion\nHi,Hello\n": "looks like CSV",
}


@pytest.mark.parametrize(("content", "kind"), _KINDS.items(), ids=_KINDS.values())
def test_a_file_of_another_kind_is_refused_by_its_name(tmp_path: Path, content: bytes, kind: str) -> None:
    with pytest.raises(InputError, match=kind):
        _lines(tmp_path, content)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.jsonl")
    with pytest.raises(InputError, match="named pipe"):
        list(read_data_file(tmp_path / "data.jsonl"))
