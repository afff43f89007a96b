"""Config and tokenizer of SmolLM2's GGUF: our reader against transformers' (docs/decisions/0002).

python benchmarks/open_gguf.py [--json FILE]
"""

from pathlib import Path

from _timing import Row, alternate, arguments, report, timed
from transformers import AutoConfig, AutoTokenizer

from entrenar.opening.source import open_source

MODEL = Path("models/SmolLM2-135M-Instruct.Q4_1.gguf")


def theirs() -> None:
    """What transformers does to get a config and a tokenizer."""
    AutoConfig.from_pretrained(MODEL.parent, gguf_file=MODEL.name)
    AutoTokenizer.from_pretrained(MODEL.parent, gguf_file=MODEL.name)


def main() -> None:
    """Time both in turn."""
    options = arguments(__doc__ or "")
    ours, peer = alternate(lambda: open_source(str(MODEL)), timed(theirs), rounds=1)
    row = Row(
        metric="open_gguf_seconds", shape="SmolLM2", unit="s", ours=ours, peer=peer, peer_name="transformers",
        ratio=peer / ours, limit=1.0,
    )  # fmt: skip
    report([row], options.json)


if __name__ == "__main__":
    main()
