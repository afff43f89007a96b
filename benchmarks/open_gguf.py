"""Config and tokenizer of SmolLM2's GGUF: our reader against transformers' (docs/decisions/0002)."""

from pathlib import Path

from _report import Row, alternate, report
from transformers import AutoConfig, AutoTokenizer

from entrenar.models.source import open_source

MODEL = Path("models/SmolLM2-135M-Instruct.Q4_1.gguf")


def theirs() -> None:
    """What transformers does to get a config and a tokenizer."""
    AutoConfig.from_pretrained(MODEL.parent, gguf_file=MODEL.name)
    AutoTokenizer.from_pretrained(MODEL.parent, gguf_file=MODEL.name)


def main() -> None:
    """Time both in turn."""
    ours, peer = alternate(lambda: open_source(str(MODEL)), theirs, runs=3)
    report(
        [
            Row(
                metric="open_gguf_seconds", unit="s", ours=ours, peer=peer, peer_name="transformers",
                ratio=peer / ours, limit=None,
            )
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()
