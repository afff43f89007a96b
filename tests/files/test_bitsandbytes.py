"""bitsandbytes' layout without bitsandbytes: a weight read from any element on is that part of the whole weight."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from entrenar.files.bitsandbytes import BitsandbytesWeights, Layout, PackedWeight, four_bit_tensors
from entrenar.files.safetensors import SafetensorsCheckpoint, write_checkpoint
from entrenar.quant.tensor import quantize

SHAPE = (37, 1001)  # an odd number of elements, more than two groups of 256 blocks of 64


def stored_weight(directory: Path, kind: str) -> PackedWeight:
    """A random weight on disk: `int8`, or a 4-bit format, perhaps nested."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    if kind == "int8":
        largest = values.abs().amax(1)
        codes = (values / largest[:, None] * 127).round().to(torch.int8)
        save_file({"x.weight": codes, "x.SCB": largest}, directory / "model.safetensors")
    else:
        layout = Layout(kind[:3], 64, double_quant="nested" in kind, dtype=torch.bfloat16)
        packed = quantize(values, format=kind[:3], double_quant=layout.double_quant)
        tensors = four_bit_tensors("x.weight", SHAPE, layout, lambda: packed)
        write_checkpoint(directory, tensors, torch.bfloat16, 1 << 30)
    return BitsandbytesWeights(SafetensorsCheckpoint(directory)).weight("x.weight")


@pytest.fixture(scope="module", params=["nf4", "nf4 nested", "fp4", "fp4 nested", "int8"])
def weight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedWeight:
    return stored_weight(tmp_path_factory.mktemp("packed"), request.param)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_range_is_that_part_of_the_whole(weight: PackedWeight, data: st.DataObject) -> None:
    whole = weight.read().dequantize().view(-1)
    start = data.draw(st.integers(0, len(whole)))
    count = data.draw(st.integers(0, len(whole) - start))
    assert torch.equal(weight.read_range(start, count), whole[start : start + count])


def test_the_whole_is_what_was_quantized(tmp_path: Path) -> None:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    expected = quantize(values, format="nf4", double_quant=True)
    found = stored_weight(tmp_path, "nf4 nested").read()
    assert found.shape == SHAPE
    assert {name: part.tolist() for name, part in found.parts.items()} == {
        name: part.tolist() for name, part in expected.parts.items()
    }
