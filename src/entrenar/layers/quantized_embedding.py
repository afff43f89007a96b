"""QuantizedEmbedding: a frozen token embedding that keeps its table as a GGUF file holds it."""

import torch
from torch import Tensor, nn

from entrenar.core.errors import InputError
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.ops.linear.gguf import decode_rows
from entrenar.quant.registry import AS_STORED_FORMATS
from entrenar.quant.tensor import QuantizedTensor, as_stored_tensor


class QuantizedEmbedding(nn.Module):
    """Token ids → rows of a table (V, H) of which only the rows looked up are decoded.

    Args:
        weight: the table, in a format of GGUF (rows are whole blocks there).
        dtype: of the rows that come out.
    """

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype) -> None:
        super().__init__()
        if weight.format not in AS_STORED_FORMATS or len(weight.shape) != 2:
            raise InputError(f"an embedding of {weight.format} cannot be looked up row by row: load it unquantized")
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype
        self._type = weight.format
        self.weight_codes = nn.Parameter(weight.parts["codes"], requires_grad=False)

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The table as it is held; its part is this layer's own parameter."""
        return as_stored_tensor(self.weight_codes, self._type)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (...) int64 → (..., H)."""
        rows = self.weight_codes[ids.reshape(-1)]
        return decode_rows(rows, self._type, self.dtype).view(*ids.shape, self.embedding_dim)

    def tied_linear(self) -> QuantizedLinear:
        """An output head over the same storage."""
        return QuantizedLinear(self.quantized_weight)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._type}"

    def dequantized(self) -> Tensor:
        """The dequantized table, (V, H) float32."""
        return self.quantized_weight.dequantize()
