"""What we write the gguf package reads: keys of every kind, whole entries of another file, tensors in their places."""

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader

from entrenar.gguf.reader import GGUFFile
from entrenar.gguf.writer import GGUFTensor, Value, write_gguf_file
from entrenar.ops.gguf.blocks import quantize_gguf

_KEYS: dict[str, Value | bytes] = {
    "general.architecture": "llama", "text": "ñ 漢", "yes": True, "count": 7, "share": 0.5, "words": ["a", "", "Ġñ"],
    "numbers": [1, -2], "weights": [0.5, -1.0], "nothing": [],
}  # fmt: skip


def _tensors() -> list[GGUFTensor]:
    torch.manual_seed(0)
    vector, matrix = torch.randn(5), torch.randn(3, 64)
    return [
        GGUFTensor("vector", (5,), "f32", lambda: vector.view(torch.uint8)),
        GGUFTensor("matrix", (3, 64), "q5_1", lambda: quantize_gguf(matrix, "q5_1")),
        GGUFTensor("halves", (3, 64), "f16", lambda: matrix.half().view(torch.uint8)),
    ]


def test_the_gguf_package_reads_what_is_written(tmp_path: Path) -> None:
    write_gguf_file(tmp_path / "m.gguf", _KEYS, _tensors())
    reader = GGUFReader(tmp_path / "m.gguf")
    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert found == _KEYS
    assert GGUFFile(tmp_path / "m.gguf").metadata == _KEYS
    for tensor, written in zip(reader.tensors, _tensors(), strict=True):
        assert tensor.name == written.name
        assert tuple(map(int, tensor.shape[::-1])) == written.shape
        assert tensor.data_offset % 32 == 0
        np.testing.assert_array_equal(np.array(tensor.data).view(np.uint8).ravel(), written.make().numpy().ravel())


def test_an_entry_of_another_file_is_copied_as_it_is(tmp_path: Path) -> None:
    write_gguf_file(tmp_path / "one.gguf", _KEYS, _tensors())
    raw = GGUFFile(tmp_path / "one.gguf").raw_metadata
    write_gguf_file(tmp_path / "two.gguf", {**raw, "count": 8}, _tensors())
    assert GGUFFile(tmp_path / "two.gguf").metadata == _KEYS | {"count": 8}
    write_gguf_file(tmp_path / "three.gguf", dict(raw), _tensors())
    assert (tmp_path / "three.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
