"""nf4: NormalFloat4, equal to bitsandbytes to the byte. |error| ≤ 0.152 · absmax of the block."""

from entrenar.quant.formats.codebook4 import codebook_format

FORMAT = codebook_format("nf4")
