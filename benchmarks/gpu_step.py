"""A QLoRA step on one GPU: a random 1.1B Llama in nf4, against peft over the same model in bfloat16 (no bitsandbytes).

python benchmarks/gpu_step.py [--rows 2 8] [--json FILE]. Rank 16 on all linear layers, rows of 512 tokens, every
position supervised; each side has the GPU to itself, medians of 10 steps, peaks of torch's own count.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TOKENS, STEPS, WARM = 512, 10, 3
SHAPE: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
Figures = tuple[float, int]


def _measured(step: Any) -> Figures:
    """Seconds a step, and peak bytes."""
    for _ in range(WARM):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times), torch.cuda.max_memory_allocated()


def _ours(directory: Path, ids: torch.Tensor, quantize: str) -> Figures:
    import entrenar
    from entrenar.models.forward import target_loss

    model: Any = entrenar.load(str(directory), quantize)[0]
    entrenar.attach_lora(model, rank=16, alpha=32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    positions = torch.arange(TOKENS).repeat(len(ids), 1)
    model.train()

    def step() -> None:
        loss = target_loss(model, ids, positions, positions > 0) / (len(ids) * (TOKENS - 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _measured(step)


def _peer(directory: Path, ids: torch.Tensor, checkpointing: bool) -> Figures:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map={"": 0})
    if checkpointing:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batch = ids.to("cuda")
    model.train()

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _measured(step)


def main() -> None:
    """Print the table, and write it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU that torch sees")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "1b"
        with torch.device("cuda"):
            LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().save_pretrained(directory)
        _tokenizer(directory)
        for count in options.rows:
            ids = torch.randint(0, 32000, (count, TOKENS))
            sides = {
                "ours nf4": lambda ids=ids: _ours(directory, ids, "nf4"),
                "ours bf16": lambda ids=ids: _ours(directory, ids, "none"),
                "peft bf16": lambda ids=ids: _peer(directory, ids, checkpointing=False),
            }
            found: dict[str, Figures] = {}
            for name, run in sides.items():
                found[name] = run()
                gc.collect()
                torch.cuda.empty_cache()
            rows += _rows(count, found)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for row in rows:
        print(f"{row['metric']:40} {row['ours']:>16,.0f} {row['peer']:>16,.0f} {row['unit']:10} {row['ratio']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _rows(count: int, found: dict[str, Figures]) -> list[dict[str, Any]]:
    seconds, peak = found["peft bf16"]
    tokens, made = count * TOKENS, []
    for name in ("ours nf4", "ours bf16"):
        own_seconds, own_peak = found[name]
        label = f"{name.removeprefix('ours ')}_{count}x{TOKENS}"
        for metric, unit, ours, peer, ratio in (
            (f"gpu_step_{label}", "tokens/s", tokens / own_seconds, tokens / seconds, seconds / own_seconds),
            (f"gpu_peak_{label}", "bytes", own_peak, peak, peak / own_peak),
        ):
            made.append({
                "metric": metric, "unit": unit, "ours": ours, "peer": peer, "peer_name": "peft bf16", "ratio": ratio,
                "limit": None,
            })  # fmt: skip
    return made


def _tokenizer(directory: Path) -> None:
    """Any: nothing is tokenized."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(directory)


if __name__ == "__main__":
    main()
