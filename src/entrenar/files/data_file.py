"""A file of rows of any kind that is read: JSON or CSV, also compressed, Parquet, Arrow.

The kind is told by a file's first bytes, but for CSV, which its name tells. What is of another kind is refused by its
name, with what to do.
"""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from entrenar.core.documents import open_regular, reason
from entrenar.core.errors import InputError
from entrenar.files.json_lines import Line, text_rows

__all__ = ["COMPRESSED", "SUFFIXES", "Line", "is_data_file", "read_data_file"]

_TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
COMPRESSED = (".gz", ".zst")
SUFFIXES = (
    *_TEXT_SUFFIXES,
    *(text + compressed for text in _TEXT_SUFFIXES for compressed in COMPRESSED),
    ".parquet",
    ".arrow",
)
# JSON that `datasets` and the hub write beside the rows.
_BESIDE_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_GZIP, _ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_COLUMNAR = {b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"\xff\xff\xff\xff": "an Arrow stream"}
_OTHERS = (
    (b"PARE", "an encrypted Parquet file", "write it again without encryption"),
    (b"\xfd7zXZ", "compressed with xz", "decompress it: xz -d"),
    (b"BZh", "compressed with bzip2", "decompress it: bzip2 -d"),
    (b"PK\x03\x04", "a ZIP archive (or a spreadsheet)", "extract it, or export it as CSV"),
    (b"SQLite format 3", "a SQLite database", "export its rows as JSON lines"),
    (b"version https://git-lfs", "what Git LFS leaves in place of a file", "fetch the file itself: git lfs pull"),
    (codecs.BOM_UTF32_LE, "UTF-32 text", "save it as UTF-8: iconv -f UTF-32 -t UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
)  # fmt: skip


def is_data_file(name: str) -> bool:
    """Whether a file is named as one with rows, by its suffix."""
    return name.lower().endswith(SUFFIXES) and Path(name).name not in _BESIDE_ROWS


def read_data_file(path: Path) -> Iterator[Line]:
    """Every row of a file, good or bad, one after the other: of a large file never more than a part is in memory
    (unless it is one JSON array).

    Raises:
        InputError: the file cannot be read, is cut short, or is of another kind, which is named.
    """
    try:
        with open_regular(path, "data file") as raw:
            kind = _columnar_kind(_head(raw))
            if kind:
                from entrenar.files.columnar import columnar_rows  # loads pyarrow

                yield from columnar_rows(raw, path, kind)
                return
            plain = _decompressed(raw, path)
            _refuse_others(plain, path)
            separator = _separator(path)
            text = io.TextIOWrapper(plain, encoding="utf-8-sig", newline="" if separator else None)
            yield from text_rows(text, path, separator)
    except UnicodeDecodeError as error:
        raise InputError(f"data file {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"data file {path} cannot be read: {reason(error)}") from None


def _columnar_kind(start: bytes) -> str:
    return next((name for magic, name in _COLUMNAR.items() if start.startswith(magic)), "")


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    start = _head(raw)
    if start.startswith(_GZIP):
        plain = cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    elif start.startswith(_ZSTANDARD):
        from entrenar.files.zstandard import ZstandardFile  # loads pyarrow

        plain = cast(BinaryIO, io.BufferedReader(ZstandardFile(raw)))
    else:
        return raw
    start = _head(plain)
    if start.startswith((_GZIP, _ZSTANDARD)):
        raise InputError(f"data file {path} is compressed twice: decompress it once")
    if _columnar_kind(start):
        raise InputError(f"data file {path} is {_columnar_kind(start)}, compressed as a whole: decompress it")
    return plain


def _head(file: BinaryIO) -> bytes:
    start = file.read(64)
    file.seek(0)
    return start


def _refuse_others(file: BinaryIO, path: Path) -> None:
    start = _head(file)
    kinds = [(name, remedy) for magic, name, remedy in _OTHERS if start.startswith(magic)]
    if not kinds and re.match(rb"[^\x00]\x00[^\x00]\x00|\x00[^\x00]\x00[^\x00]", start):
        kinds = [("UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8")]
    if kinds:
        name, remedy = kinds[0]
        raise InputError(f"data file {path} is {name}, not rows: {remedy}")


def _separator(path: Path) -> str:
    names = path.suffixes[:-1] if path.suffix.lower() in COMPRESSED else path.suffixes
    return {".csv": ",", ".tsv": "\t"}.get(names[-1].lower() if names else "", "")
