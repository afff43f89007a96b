"""fp4: 4-bit float with bitsandbytes' code order, equal to it to the byte. |error| ≤ absmax / 6 of the block."""

from entrenar.quant.formats.codebook4 import codebook_format

FORMAT = codebook_format("fp4")
