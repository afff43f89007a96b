"""GGUF: read as the gguf package reads, and refuse every file whose header does not fit it."""

import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.core.errors import InputError
from entrenar.gguf.reader import GGUFFile

_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_SCALARS = [
    (GGUFValueType.UINT8, 255), (GGUFValueType.INT8, -128), (GGUFValueType.UINT16, 2**16 - 1),
    (GGUFValueType.INT16, -(2**15)), (GGUFValueType.UINT32, 2**32 - 1), (GGUFValueType.INT32, -(2**31)),
    (GGUFValueType.UINT64, 2**64 - 1), (GGUFValueType.INT64, -(2**63)), (GGUFValueType.FLOAT32, 0.1),
    (GGUFValueType.FLOAT64, 0.1), (GGUFValueType.BOOL, True), (GGUFValueType.STRING, "ñ \n 漢字"),
]  # fmt: skip
_ARRAYS = {
    "array.int": [1, -2, 3], "array.float": [0.5, -1.25], "array.bool": [True, False], "array.text": ["a", "", "Ġñ"],
    "array.bytes": b"\x00\xff",
}  # fmt: skip


def _pack(values: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.quantize(values, GGMLQuantizationType[kind])


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write(path: Path, alignment: int | None = None, endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> Path:
    """A file with one tensor of each type and metadata of every type, by the gguf package."""
    writer = GGUFWriter(path, "llama", endianess=endian)
    if alignment:
        writer.add_custom_alignment(alignment)
    for kind, value in _SCALARS:
        writer.add_key_value(f"scalar.{kind.name}", value, kind)
    for key, value in _ARRAYS.items():
        writer.add_array(key, value)
    generator = np.random.default_rng(0)
    for number, kind in enumerate(_TYPES):
        values = generator.standard_normal((number + 1, 2, 64)).astype(np.float32)
        writer.add_tensor(f"{kind}.weight", _pack(values, kind), raw_dtype=GGMLQuantizationType[kind])
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    _finish(writer)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of `_write`; read only."""
    return _write(tmp_path_factory.mktemp("gguf") / "all.gguf")


def test_metadata_of_every_type_equal_those_of_the_gguf_package(written: Path) -> None:
    theirs = {name: field.contents() for name, field in GGUFReader(written).fields.items() if name[:5] != "GGUF."}
    ours = GGUFFile(written).metadata
    assert ours == theirs
    assert {type(ours[f"scalar.{kind.name}"]) for kind, _ in _SCALARS} == {int, float, bool, str}
    assert ours["scalar.FLOAT32"] == np.float32(0.1)
    assert ours["scalar.UINT64"] == 2**64 - 1
    assert ours["array.text"] == ["a", "", "Ġñ"]


def test_tensors_of_every_type_equal_those_of_the_gguf_package(written: Path) -> None:
    file, reader = GGUFFile(written), GGUFReader(written)
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        ours = file.read(tensor.name)
        assert tuple(ours.shape) == tuple(int(size) for size in tensor.shape[::-1])
        np.testing.assert_array_equal(ours.to(torch.float32).numpy(), expected.reshape(tuple(ours.shape)))
        info = file.tensors[tensor.name]
        assert (info.type, info.start, info.size) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)


def test_float_types_keep_their_type(written: Path) -> None:
    file = GGUFFile(written)
    assert {kind: file.read(f"{kind}.weight").dtype for kind in _TYPES[:4]} == {
        "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q4_0": torch.float32,
    }  # fmt: skip


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_the_alignment_a_file_asks_for_is_kept(tmp_path: Path, alignment: int) -> None:
    path = _write(tmp_path / "aligned.gguf", alignment)
    file, reader = GGUFFile(path), GGUFReader(path)
    assert [info.start for info in file.tensors.values()] == [tensor.data_offset for tensor in reader.tensors]
    np.testing.assert_array_equal(file.read("vector").numpy(), np.arange(5))


def test_writing_into_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    path = _write(tmp_path / "kept.gguf")
    before = path.read_bytes()
    GGUFFile(path).read("vector").zero_()
    assert path.read_bytes() == before


def test_version_2_is_read_as_version_3(tmp_path: Path, written: Path) -> None:
    """The two differ only in that 3 may be big-endian."""
    content = bytearray(written.read_bytes())
    content[4:8] = struct.pack("<I", 2)
    (tmp_path / "v2.gguf").write_bytes(content)
    file = GGUFFile(tmp_path / "v2.gguf")
    assert file.version == 2
    assert file.metadata == GGUFFile(written).metadata


def test_real_weights_are_read_as_the_gguf_package_reads_them(smollm2: Path) -> None:
    file, reader = GGUFFile(smollm2), GGUFReader(smollm2)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    assert list(file.tensors) == list(theirs)
    for name in ("blk.0.attn_norm.weight", "blk.7.attn_k.weight", "blk.29.attn_q.weight"):
        expected = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        np.testing.assert_array_equal(file.read(name).numpy(), expected)


# A small file made by hand, to be broken in every place.


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _key(name: bytes, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


def _info(name: bytes = b"w", shape: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def _build(
    infos: list[bytes] | None = None, keys: list[bytes] | None = None, *, magic: bytes = b"GGUF", version: int = 3,
    tensor_count: int | None = None, key_count: int | None = None, data: bytes = bytes(256),
) -> bytes:  # fmt: skip
    infos = [_info()] if infos is None else infos
    keys = keys or [_key(b"general.architecture", 8, _text(b"llama"))]
    counts = (len(infos) if tensor_count is None else tensor_count, len(keys) if key_count is None else key_count)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(infos)
    return header + bytes(-len(header) % 32) + data


_U32, _STRING, _ARRAY = 4, 8, 9
_BROKEN: dict[str, tuple[bytes, str]] = {
    "another magic": (_build(magic=b"GGML"), "starts with b'GGML'"),
    "version 1": (_build(version=1), "its version is 1"),
    "version 4": (_build(version=4), "its version is 4"),
    "2**63 tensors": (_build(tensor_count=2**63), "more than fit"),
    "2**63 keys": (_build(key_count=2**63), "more than fit"),
    "a tensor more than there are": (_build(tensor_count=2), "not a valid GGUF"),
    "a key more than there are": (_build(key_count=2), "not a valid GGUF"),
    "a key less than there are": (_build(keys=[_key(b"a", _U32, bytes(4))] * 2, key_count=1), "not a valid GGUF"),
    "a string of 2**63 bytes": (_build(keys=[_key(b"k", _STRING, struct.pack("<Q", 2**63))]), "ends at byte"),
    "a key of 2**63 bytes": (_build(keys=[struct.pack("<Q", 2**63)]), "ends at byte"),
    "a tensor name of 2**63 bytes": (_build([struct.pack("<Q", 2**63) + bytes(16)]), "ends at byte"),
    "an array of 2**63 numbers": (_build(keys=[_key(b"k", _ARRAY, struct.pack("<IQ", _U32, 2**63))]), "more than fit"),
    "an array of 2**63 strings": (
        _build(keys=[_key(b"k", _ARRAY, struct.pack("<IQ", _STRING, 2**63))]), "more than fit",
    ),
    "an array of arrays": (
        _build(keys=[_key(b"k", _ARRAY, struct.pack("<IQ", _ARRAY, 1))]), "unknown array type 9",
    ),
    "an unknown value type": (_build(keys=[_key(b"k", 13, bytes(4))]), "unknown value type 13"),
    "an unknown array type": (_build(keys=[_key(b"k", _ARRAY, struct.pack("<IQ", 99, 1))]), "unknown array type 99"),
    "a template that is not UTF-8": (
        _build(keys=[_key(b"tokenizer.chat_template", _STRING, _text(b"\xff\xfe"))]), "not UTF-8",
    ),
    "a token that is not UTF-8": (
        _build(keys=[_key(b"tokenizer.ggml.tokens", _ARRAY, struct.pack("<IQ", _STRING, 1) + _text(b"\xff"))]),
        "not UTF-8",
    ),
    "a tensor name that is not UTF-8": (_build([_info(b"\xff")]), "not UTF-8"),
    "two tensors in one place": (_build([_info(), _info(b"v")]), "'v' claims the offset 0, but"),
    "tensors that overlap": (_build([_info(), _info(b"v", offset=128)], data=bytes(384)), "before it end at 256"),
    "a gap": (_build([_info(), _info(b"v", offset=288)], data=bytes(544)), "before it end at 256"),
    "a gap before the first": (_build([_info(offset=32)], data=bytes(288)), "before it end at 0"),
    "tensors in another order": (_build([_info(offset=256), _info(b"v")], data=bytes(512)), "before it end at 0"),
    "a smaller type than was written": (_build([_info(kind=1), _info(b"v", offset=256)], data=bytes(512)), "at 128"),
    "a larger type than was written": (_build([_info(kind=0), _info(b"v", offset=128)], data=bytes(512)), "end at 256"),
    "a smaller type of the last": (_build([_info(kind=1)]), "128 bytes follow its last tensor 'w'"),
    "a smaller shape of the last": (_build([_info(shape=(32, 1))]), "128 bytes follow its last tensor 'w'"),
    "a key twice": (_build(keys=[_key(b"k", _U32, bytes(4))] * 2), "key 'k' appears twice"),
    "a tensor twice": (_build([_info(), _info(offset=256)], data=bytes(512)), "tensor 'w' appears twice"),
    "five dimensions": (_build([_info(shape=(2, 2, 2, 2, 2))]), "has 5 dimensions"),
    "2**31 dimensions": (_build([_text(b"w") + struct.pack("<I", 2**31)]), "dimensions"),
    "no dimension": (_build([_info(shape=())]), "tensor 'w'"),
    "no element": (_build([_info(shape=(32, 0))]), "tensor 'w'"),
    "2**63 by no element": (_build([_info(shape=(0, 2**63))]), "tensor 'w'"),
    "more elements than bytes": (_build([_info(shape=(32, 3))]), "past the end"),
    "2**124 elements": (_build([_info(shape=(2**62, 2**62))]), "past the end"),
    "an offset past the end": (_build([_info(offset=32)]), "claims the offset 32"),
    "an offset of 2**63": (_build([_info(offset=2**63)]), "claims the offset"),
    "an offset that is not aligned": (_build([_info(shape=(8, 2), offset=4)]), "claims the offset 4"),
    "half a block": (_build([_info(shape=(16, 2), kind=2)]), "whole blocks of 32"),
    "an unknown tensor type": (_build([_info(kind=4)]), "unknown type 4"),
    "another unknown tensor type": (_build([_info(kind=999)]), "unknown type 999"),
    "an alignment of 3": (_build(keys=[_key(b"general.alignment", _U32, struct.pack("<I", 3))]), "power of two"),
    "no alignment": (_build(keys=[_key(b"general.alignment", _U32, bytes(4))]), "power of two"),
    "an alignment in words": (_build(keys=[_key(b"general.alignment", _STRING, _text(b"big"))]), "power of two"),
    "an alignment of 2**63": (
        _build(keys=[_key(b"general.alignment", 10, struct.pack("<Q", 2**63))]), "past the end",
    ),
    "no data": (_build(data=b""), "past the end"),
    "nothing": (b"", "cannot be read"),
}  # fmt: skip


def _open(path: Path, content: bytes) -> GGUFFile:
    path.write_bytes(content)
    return GGUFFile(path)


def test_the_file_made_by_hand_is_whole(tmp_path: Path) -> None:
    """Or the tests below would prove nothing."""
    file = _open(tmp_path / "whole.gguf", _build())
    assert file.metadata == {"general.architecture": "llama"}
    assert file.read("w").shape == (2, 32)
    assert [tensor.name for tensor in GGUFReader(tmp_path / "whole.gguf").tensors] == ["w"]


@pytest.mark.parametrize(("content", "reason"), _BROKEN.values(), ids=_BROKEN)
def test_a_header_that_does_not_fit_the_file_is_an_input_error(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        _open(tmp_path / "broken.gguf", content)
    assert reason in str(caught.value)
    assert str(tmp_path / "broken.gguf") in str(caught.value)


def test_a_file_cut_anywhere_is_an_input_error(tmp_path: Path) -> None:
    content = _build([_info(), _info(b"q", (32, 4), 3, 256)], data=bytes(256 + 80))
    assert list(_open(tmp_path / "cut.gguf", content).tensors) == ["w", "q"]
    for size in range(len(content)):
        with pytest.raises(InputError):
            _open(tmp_path / "cut.gguf", content[:size])


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.98])
def test_a_download_that_stopped_is_an_input_error(tmp_path: Path, written: Path, share: float) -> None:
    content = written.read_bytes()
    with pytest.raises(InputError, match=r"stopped\.gguf"):
        _open(tmp_path / "stopped.gguf", content[: int(share * len(content))])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bytes_of_a_header_may_be_wrong_without_another_exception(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    array = _key(b"list", _ARRAY, struct.pack("<IQ", _STRING, 2) + _text(b"a") + _text(b"b"))
    content = bytearray(
        _build([_info(), _info(b"v", (8,), 1, 256)], [array, _key(b"n", _U32, bytes(4))], data=bytes(272))
    )
    place = data.draw(st.integers(0, len(content) - 273))
    change = data.draw(st.binary(min_size=1, max_size=8))
    content[place : place + len(change)] = change
    try:
        file = _open(tmp_path_factory.getbasetemp() / "flipped.gguf", bytes(content))
        shapes: list[tuple[Any, Any]] = [(file.read(name).shape, info.shape) for name, info in file.tensors.items()]
    except InputError:
        return
    assert all(read == said for read, said in shapes)


@pytest.mark.parametrize("make", [np.int8, np.int16, np.int32, np.int64, np.float64])
def test_a_tensor_of_a_type_that_is_no_weight_is_an_input_error(tmp_path: Path, make: type[np.generic]) -> None:
    writer = GGUFWriter(tmp_path / "counts.gguf", "llama")
    writer.add_tensor("counts", np.zeros(32, make))
    _finish(writer)
    with pytest.raises(InputError, match=r"counts\.gguf: tensor 'counts' is"):
        GGUFFile(tmp_path / "counts.gguf").read("counts")


def test_a_big_endian_file_is_an_input_error(tmp_path: Path) -> None:
    path = _write(tmp_path / "big.gguf", endian=gguf.GGUFEndian.BIG)
    with pytest.raises(InputError, match="little-endian"):
        GGUFFile(path)


def test_a_file_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        GGUFFile(tmp_path / "absent.gguf")
    with pytest.raises(InputError, match="is a directory"):
        GGUFFile(tmp_path)


def test_only_a_regular_file_is_opened(tmp_path: Path) -> None:
    """A pipe would be waited for without end."""
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "device.gguf").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a named pipe"), ("device", "a device")):
        with pytest.raises(InputError, match=kind):
            GGUFFile(tmp_path / f"{name}.gguf")


def test_a_description_that_is_not_utf8_harms_nobody(tmp_path: Path) -> None:
    keys = [_key(b"general.description", _STRING, _text(b"f\xfcr")), _key(b"n\xe4me", _STRING, _text(b"x"))]
    file = _open(tmp_path / "latin1.gguf", _build(keys=keys))
    assert file.metadata == {"general.description": r"f\xfcr", r"n\xe4me": "x"}
    assert file.raw_metadata["general.description"] == keys[0]


def test_a_header_that_would_swell_in_memory_is_an_input_error(tmp_path: Path) -> None:
    """A file of 20 MB without content, which costs nothing to make, would become 160 MB of numbers; of 10 GB, 80."""
    keys = _key(b"k", _ARRAY, struct.pack("<IQ", 0, 20_000_000))
    path = tmp_path / "sparse.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + keys)
    os.truncate(path, 21_000_000)
    with pytest.raises(InputError, match="more than 16777216 entries"):
        GGUFFile(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _key(b"k", _STRING, struct.pack("<Q", 1 << 27)))
    os.truncate(path, 1 << 28)
    with pytest.raises(InputError, match="has 134217728 bytes; at most 67108864 are read"):
        GGUFFile(path)
