"""An embedding over GGUF blocks: the rows of the dequantized table, and a head over the same storage."""

import pytest
import torch
import torch.nn.functional as F

from entrenar.core.errors import InputError
from entrenar.layers.quantized_embedding import QuantizedEmbedding
from entrenar.ops.gguf.blocks import quantize_gguf
from entrenar.quant.tensor import as_stored_tensor, quantize


def embedding(dtype: torch.dtype = torch.float32) -> QuantizedEmbedding:
    return QuantizedEmbedding(as_stored_tensor(quantize_gguf(torch.randn(50, 64), "q5_0"), "q5_0"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3)])
def test_rows_are_those_of_the_dequantized_table(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer = embedding(dtype)
    ids = torch.randint(0, 50, shape)
    found = layer(ids)
    assert found.dtype == dtype
    torch.testing.assert_close(found, F.embedding(ids, layer.dequantized().to(dtype)), atol=0, rtol=0)


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(IndexError):
        embedding()(torch.tensor([50]))


def test_a_tied_head_shares_the_storage_and_multiplies_by_the_table() -> None:
    layer = embedding()
    head = layer.tied_linear()
    assert head.weight_codes is layer.weight_codes
    x = torch.randn(3, 64)
    torch.testing.assert_close(head(x), x @ layer.dequantized().t())


def test_a_format_whose_blocks_straddle_rows_is_refused() -> None:
    with pytest.raises(InputError, match="row by row"):
        QuantizedEmbedding(quantize(torch.randn(4, 64), format="nf4"), torch.float32)


def test_a_kept_tensor_knows_its_shape_size_and_values() -> None:
    weight = torch.randn(4, 512)
    kept = as_stored_tensor(quantize_gguf(weight, "q4_k"), "q4_k")
    assert (kept.shape, kept.format, kept.block_size, kept.memory_bytes) == ((4, 512), "q4_k", 256, 4 * 2 * 144)
    assert kept.dequantize().shape == (4, 512)
    assert (kept.dequantize() - weight).square().mean() < 0.01
