"""A file compressed with Zstandard, read as it is decompressed, through pyarrow's reader.

That reader only goes forward; here it can begin again, which is all that is asked of it (a look at the first bytes).
"""

import io
import os
from typing import Any, BinaryIO

import pyarrow


class ZstandardFile(io.RawIOBase):
    """The decompressed bytes of `compressed`, from its beginning. Its frames are one text; a frame cut short is an
    OSError."""

    def __init__(self, compressed: BinaryIO) -> None:
        super().__init__()
        self._compressed = compressed
        self.seek(0)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """To the beginning."""
        return True

    def tell(self) -> int:
        """Bytes read so far."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Begin again; io.UnsupportedOperation for any other place."""
        if (offset, whence) != (0, io.SEEK_SET):
            raise io.UnsupportedOperation("only the beginning can be gone back to")
        again = os.fdopen(os.dup(self._compressed.fileno()), "rb")  # pyarrow closes what it has read from
        again.seek(0)
        self._stream, self._place = pyarrow.CompressedInputStream(pyarrow.PythonFile(again), "zstd"), 0
        return 0

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as there is something; 0 at the end."""
        part = self._stream.read(len(buffer))
        buffer[: len(part)] = part
        self._place += len(part)
        return len(part)
