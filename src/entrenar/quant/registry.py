"""Every number format by name."""

from entrenar.core.errors import InputError
from entrenar.quant.format import Format, KeptFormat
from entrenar.quant.formats import fp4, gguf, int4, int8, nf4

FORMATS = {row.name: row for row in (int4.FORMAT, nf4.FORMAT, fp4.FORMAT, int8.FORMAT)}
AS_STORED_FORMATS = {row.name: row for row in gguf.FORMATS}
BLOCK_SIZES = tuple(2**power for power in range(4, 13))


def get_format(name: str) -> Format:
    """The format called `name`, which weights can be quantized to; InputError lists the known ones."""
    if name not in FORMATS:
        raise InputError(f"unknown number format {name!r}: the formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def held_format(name: str) -> Format | KeptFormat:
    """The format called `name` that a weight is in: one of those, or one that weights are only kept in."""
    return AS_STORED_FORMATS[name] if name in AS_STORED_FORMATS else get_format(name)


def check_block_size(block_size: int) -> None:
    """InputError unless `block_size` is a power of two from 16 to 4096."""
    if block_size not in BLOCK_SIZES:
        raise InputError(f"block size {block_size} is not allowed: choose a power of two from 16 to 4096")
