"""safetensors: read what the library writes, write what the library reads, refuse what is broken."""

import json
import os
import random
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.files.safetensors import INDEX_NAME, LazyTensor, SafetensorsCheckpoint, read_metadata, write_checkpoint

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SHAPES = st.lists(
    st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6
)  # a scalar, and tensors of no elements, among them
_HEADER = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"layer.{number}.{dtype}": torch.randn(3, 4 + number, generator=generator).to(dtype)
        for number, dtype in enumerate((*_DTYPES, torch.float64))
    } | {"counts": torch.arange(6, dtype=torch.int64).view(2, 3), "one": torch.tensor(2.5)}


def _assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def _lazy(tensors: dict[str, Tensor]) -> list[LazyTensor]:
    def maker(name: str) -> Callable[[], Tensor]:
        return lambda: tensors[name]

    return [LazyTensor(name, tuple(tensor.shape), maker(name)) for name, tensor in tensors.items()]


def _read_all(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _shards(directory: Path) -> dict[str, Tensor]:
    """Two shards by the library, and an index."""
    tensors = _tensors()
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, directory / file)
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    return tensors


def test_one_file_is_read_as_the_library_wrote_it(tmp_path: Path) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "model.safetensors", {"made": "here"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        checkpoint = SafetensorsCheckpoint(path)
        assert sorted(checkpoint.names()) == sorted(tensors)
        for name, tensor in tensors.items():
            _assert_same(checkpoint.read(name), tensor)
    assert read_metadata(tmp_path / "model.safetensors") == {"made": "here"}


@pytest.mark.parametrize("dtype", [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e8m0fnu, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16,
    torch.uint8, torch.bool, torch.complex64,
], ids=str)  # fmt: skip
def test_every_dtype_the_library_writes_is_read_as_it_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2, (3, 8 * dtype.itemsize), dtype=torch.uint8)
    save_file({"a": raw.view(dtype)}, tmp_path / "model.safetensors")
    ours = SafetensorsCheckpoint(tmp_path).read("a")
    theirs = load_file(tmp_path / "model.safetensors")["a"]
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_shards_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    tensors = _shards(tmp_path)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert sorted(checkpoint.names()) == sorted(tensors)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    for name, tensor in tensors.items():
        _assert_same(checkpoint.read(name), tensor)


@pytest.mark.parametrize("dtype", _DTYPES)
@settings(max_examples=25, deadline=None)
@given(shapes=_SHAPES, limit=st.integers(1, 200), seed=st.integers(0, 99))
def test_what_is_written_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, shapes: list[tuple[int, ...]], limit: int, seed: int
) -> None:
    directory = tmp_path_factory.mktemp("written")
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"t{n}": torch.randn(shape, generator=generator) for n, shape in enumerate(shapes)}
    write_checkpoint(directory, _lazy(tensors), dtype, limit)
    for file in directory.glob("*.safetensors"):
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0, "the data begins on a multiple of 8 bytes"
    back = _read_all(directory)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        _assert_same(back[name], tensor.to(dtype))


def test_rows_in_another_order_in_memory_are_written_in_row_order(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    write_checkpoint(tmp_path, [LazyTensor("w", (3, 2), lambda: weight.T)], torch.float32, 1000)
    _assert_same(load_file(tmp_path / "model.safetensors")["w"], weight.T.contiguous())


def test_shards_keep_to_the_limit_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    """Unless one tensor alone is larger: it gets a shard of its own."""
    sizes = {"a": 10, "b": 10, "big": 90, "c": 10, "d": 10, "e": 1}
    tensors = {name: torch.full((size,), float(size)) for name, size in sizes.items()}
    write_checkpoint(tmp_path, _lazy(tensors), torch.float16, max_shard_bytes=40)
    index = json.loads((tmp_path / INDEX_NAME).read_text(encoding="utf-8"))
    held = {file.name: sorted(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))}
    assert list(held.values()) == [["a", "b"], ["big"], ["c", "d"], ["e"]]
    assert list(held) == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert index["weight_map"] == {name: file for file, names in held.items() for name in names}
    assert index["metadata"]["total_size"] == 2 * sum(sizes.values())
    assert SafetensorsCheckpoint(tmp_path).names() == list(sizes)


def test_a_checkpoint_that_fits_is_one_file_without_an_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, _lazy({"a": torch.zeros(10), "b": torch.zeros(10)}), torch.float32, max_shard_bytes=80)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    most = []

    def make() -> Tensor:
        array = np.zeros(64, np.float32)
        alive.append(weakref.ref(array))
        most.append(sum(ref() is not None for ref in alive))
        return torch.from_numpy(array)

    write_checkpoint(tmp_path, [LazyTensor(f"t{n}", (64,), make) for n in range(5)], torch.float32, 10_000)
    # While the next is made, the one just written may still have its name in the loop.
    assert len(most) == 5
    assert max(most) <= 2


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_an_input_error(tmp_path: Path, share: float) -> None:
    path = tmp_path / "model.safetensors"
    save_file(_tensors(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"model\.safetensors is not a complete safetensors file"):
        SafetensorsCheckpoint(tmp_path)


def _file(header: object, data: bytes = bytes(24), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


_LIES = {
    "a header longer than the file": _file(_HEADER, length=10_000),
    "a header of 2**63 bytes": _file(_HEADER, length=2**63),
    "a header that is not JSON": _file(b"{not json"),
    "a header that is not UTF-8": _file(b'{"\xff": 1}'),
    "a list for a header": _file([1, 2]),
    "offsets past the end": _file({"a": _HEADER["a"] | {"shape": [200], "data_offsets": [0, 800]}}),
    "offsets that do not fit the shape": _file({"a": _HEADER["a"] | {"shape": [2, 2]}}),
    "offsets backwards": _file({"a": _HEADER["a"] | {"data_offsets": [24, 0]}}),
    "a negative size": _file({"a": _HEADER["a"] | {"shape": [-2, -3]}}),
    "a size of 2**62": _file({"a": _HEADER["a"] | {"shape": [2**62, 2**62]}}),
    "an unknown dtype": _file({"a": _HEADER["a"] | {"dtype": "F31"}}),
    "tensors that overlap": _file({"a": _HEADER["a"], "b": _HEADER["a"]}),
    "data that no tensor names": _file(_HEADER, bytes(25)),
}


@pytest.mark.parametrize("content", _LIES.values(), ids=_LIES)
def test_a_header_that_lies_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(_file(_HEADER))
    assert SafetensorsCheckpoint(tmp_path).read("a").shape == (2, 3)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors is not a complete safetensors file"):
        SafetensorsCheckpoint(tmp_path)
    with pytest.raises(InputError):
        read_metadata(tmp_path / "model.safetensors")


def test_a_dtype_that_torch_has_no_whole_bytes_for_is_listed_and_not_read(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}
    (tmp_path / "model.safetensors").write_bytes(_file(header, bytes(4)))
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert [(info.dtype, info.shape, info.size) for info in checkpoint.tensors.values()] == [("F4", (2, 4), 4)]
    with pytest.raises(InputError, match=r"model\.safetensors: a is F4, which is not read"):
        checkpoint.read("a")


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 200), value=st.integers(0, 255))
def test_any_byte_of_a_header_may_be_wrong_without_another_exception(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    content = bytearray(_file(_HEADER | {"b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]}}, bytes(26)))
    content[place % (len(content) - 26)] = value
    path.write_bytes(content)
    try:
        checkpoint = SafetensorsCheckpoint(path)
        sizes = [checkpoint.read(name).nbytes for name in checkpoint.names()]
    except InputError:
        return
    assert sum(sizes) <= 26  # nothing but the file's own data


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/x.safetensors", "..", "", 5, None])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, name: object) -> None:
    """Even where such a file exists."""
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    for file in (tmp_path / "x", inside / "sub" / "x.safetensors"):
        save_file({"a": torch.zeros(2)}, file)
    (inside / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    with pytest.raises(InputError, match=r"index\.json(: 'weight_map.a' is| names)"):
        SafetensorsCheckpoint(inside)


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    _shards(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"names model-1\.safetensors, which is missing"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": {}}}', b"\xff", b"[" * 100_000]
)
def test_an_index_that_is_none_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX_NAME).write_bytes(content)
    with pytest.raises(
        InputError, match=r"^shard index .*index\.json: (not JSON|it is|the key 'weight_map' is missing|'wei)"
    ):
        SafetensorsCheckpoint(tmp_path)


def test_a_directory_without_weights_is_an_input_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"holds no model\.safetensors"):
            SafetensorsCheckpoint(path)


def _write(directory: Path, files: dict[str, dict[str, float]], index: object) -> None:
    """Files of tensors (2,) that are all one number, and an index."""
    for name, values in files.items():
        save_file({tensor: torch.full((2,), value) for tensor, value in values.items()}, directory / name)
    if index is not None:
        text = index if isinstance(index, str) else json.dumps({"weight_map": index})
        (directory / INDEX_NAME).write_text(text, encoding="utf-8")


_OTHERS: dict[str, object] = {"shards": {"a": "s.safetensors"}, "gone": {"a": "gone.safetensors"}, "broken": "{"}


@pytest.mark.parametrize("index", _OTHERS)
def test_a_single_file_is_read_before_an_index_and_it_is_said(tmp_path: Path, index: str) -> None:
    """As transformers: modeling_utils looks for model.safetensors first, whatever else lies there."""
    _write(tmp_path, {"model.safetensors": {"a": 1}, "s.safetensors": {"a": 2}}, _OTHERS[index])
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.read("a").tolist() == [1, 1]
    assert len(checkpoint.notes) == 1
    assert "has both model.safetensors and model.safetensors.index.json" in checkpoint.notes[0]


@pytest.mark.parametrize("index", [None, {"a": "model.safetensors"}])
def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path, index: object) -> None:
    _write(tmp_path, {"model.safetensors": {"a": 1}}, index)
    assert SafetensorsCheckpoint(tmp_path).notes == []


def test_a_tensor_in_two_shards_is_refused_unless_all_readers_agree(tmp_path: Path) -> None:
    """transformers reads the last shard's, others the one that the index names."""
    _write(tmp_path, {"1.safetensors": {"a": 1, "b": 3}, "2.safetensors": {"a": 2, "c": 4}}, None)
    rest = {"b": "1.safetensors", "c": "2.safetensors"}
    for wrong in ({"a": "1.safetensors"}, {}):
        _write(tmp_path, {}, wrong | rest)
        with pytest.raises(InputError, match=r"a is in both 1\.safetensors and 2\.safetensors, and which is meant"):
            SafetensorsCheckpoint(tmp_path)
    _write(tmp_path, {}, {"a": "2.safetensors"} | rest)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.read("a").tolist() == [2, 2]
    assert "2.safetensors is read, as its index says" in checkpoint.notes[0]


@pytest.mark.parametrize("name", ["n" * 300, "é" * 128, "a\0b", "directory", "pipe", "device", "loop"])
def test_a_shard_that_is_no_file_is_an_input_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    _write(tmp_path, {}, {"a": name})
    with pytest.raises(InputError, match=r"is a directory|is a named pipe|is a device|cannot be read|not a plain file"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX_NAME])
def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is a named pipe, not a file"):
        SafetensorsCheckpoint(tmp_path)


def test_any_change_to_an_index_gives_its_tensors_or_an_input_error(tmp_path: Path) -> None:
    """Names that are too long or of a directory were tracebacks once. Random, but the same every time."""
    _shards(tmp_path)
    (tmp_path / "somewhere").mkdir()
    content, chance = (tmp_path / INDEX_NAME).read_text(), random.Random(0)
    parts = ["somewhere", "x" * 300, "..", "/", "{", "null", "1e999", "\\u0000", "\\ud800", '"', ":", "weight_map", ""]
    for _ in range(300):
        place, width = chance.randrange(len(content)), chance.choice([0, 1, 8])
        (tmp_path / INDEX_NAME).write_text(content[:place] + chance.choice(parts) + content[place + width :])
        try:
            checkpoint = SafetensorsCheckpoint(tmp_path)
            assert all(checkpoint.read(name).numel() for name in checkpoint.names())
        except InputError as error:
            assert "\n" not in str(error)
