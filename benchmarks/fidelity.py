"""What quantizing and fusing lose: ours against bitsandbytes and the usual way with peft.

- delta_survival_nf4: share of a rank-16 change of 1% that is left in an NF4 export (peer: fused on the dequantized base
  and quantized again, as `merge_and_unload` on a 4-bit model and a new 4-bit load do).
- nf4_mse: mean squared error on N(0, 1), double quantization, the same bits.
- nf4_loss_increase: what NF4 with double quantization adds to SmolLM2's loss on 20k tokens of Python's documentation.
- nf4_search_speed: searched scales, both threads.
- pissa_error, loftq_error: ‖W − (base + B·A)‖ of SmolLM2's layers over NF4 at rank 16, against NF4 alone.
- fuse_seconds, fuse_peak: a 1.1B base and adapter to bf16 safetensors, each in a fresh process.

python benchmarks/fidelity.py [--json FILE] [--rounds N] [--only PART_OF_A_NAME]
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _models import LLAMA_1B, TOKENIZER, random_checkpoint
from _timing import Row, arguments, leave_this_folder, report, seconds
from torch import Tensor, nn

from entrenar.exporting.fidelity import measure
from entrenar.exporting.streaming import Fused
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.attach import attach_lora
from entrenar.lora.low_rank import AdapterLayer
from entrenar.opening.original import original_weights
from entrenar.quant.tensor import quantize, quantize_4bit

SIDE = 2048
TOKENS_OF_TEXT = 20_000
LAYERS = [
    f"model.layers.{n}.{part}" for n in (0, 14, 29) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
]


def less(metric: str, shape: str, unit: str, ours: float, peer: float, peer_name: str, limit: float) -> Row:
    """A row where less is better."""
    return Row(
        metric=metric, shape=shape, unit=unit, ours=ours, peer=peer, peer_name=peer_name, ratio=peer / ours, limit=limit
    )


def theirs(weight: Tensor) -> Tensor:
    """What bitsandbytes makes of a weight: NF4 with double quantization, and back."""
    import bitsandbytes.functional as peer

    packed, state = peer.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return peer.dequantize_4bit(packed, state)


def survival() -> Row:
    """A change of 1% in a Gaussian weight."""
    torch.manual_seed(0)
    weight = torch.randn(SIDE, SIDE) * 0.02
    delta = torch.randn(SIDE, 16) @ torch.randn(16, SIDE)
    delta *= 0.01 * weight.norm() / delta.norm()
    written = quantize_4bit(weight + delta, double_quant=True, search=True).dequantize()
    ours = measure("", Fused(weight + delta, weight), written).survival or 0.0
    base = theirs(weight)
    peer = measure("", Fused(base + delta, base), theirs(base + delta)).survival or 0.0
    return Row(
        metric="delta_survival_nf4", shape=f"{SIDE}x{SIDE}", unit="share", ours=ours, peer=peer,
        peer_name="peft+bitsandbytes", ratio=ours / 0.99, limit=1.0,
    )  # fmt: skip


def error() -> Row:
    """NF4 with searched scales."""
    torch.manual_seed(0)
    weight = torch.randn(SIDE, SIDE)
    ours = (quantize_4bit(weight, double_quant=True, search=True).dequantize() - weight).square().mean().item()
    peer = (theirs(weight) - weight).square().mean().item()
    return less("nf4_mse", "4.127 bits", "mse", ours, peer, "bitsandbytes", 1 / 0.88)


def loss_increase() -> Row:
    """Plain NF4, which is bitsandbytes' to the byte (tests/interop), is the peer."""
    from pydoc_data.topics import topics

    import entrenar

    rows: list[Tensor] = []

    def loss(quantize: str, search: bool) -> float:
        model, tokenizer = entrenar.load(
            str(TOKENIZER), quantize, double_quant=quantize != "none", search=search, dtype="float32"
        )
        if not rows:
            ids: list[int] = tokenizer("\n".join(topics.values()))["input_ids"]  # pyright: ignore
            rows.extend(torch.tensor(ids[:TOKENS_OF_TEXT]).split(512))
        with torch.no_grad():
            losses = [float(model(input_ids=row[None], labels=row[None]).loss) * (len(row) - 1) for row in rows]
        return sum(losses) / sum(len(row) - 1 for row in rows)

    exact, plain, searched = loss("none", False), loss("nf4", False), loss("nf4", True)
    return less("nf4_loss_increase", "SmolLM2", "nats", searched - exact, plain - exact, "bitsandbytes' nf4", 1.0)


def speed() -> Row:
    """The search's own speed, against the limit of 0.2."""
    weight = torch.randn(4096, 4096)
    ours = weight.numel() / seconds(lambda: quantize_4bit(weight, search=True)) / 1e9
    peer = weight.numel() / seconds(lambda: quantize_4bit(weight)) / 1e9
    return Row(
        metric="nf4_search_speed", shape="4096x4096", unit="Gelem/s", ours=ours, peer=peer,
        peer_name="ours without search", ratio=ours / 0.2, limit=1.0,
    )  # fmt: skip


def starts() -> Iterator[Row]:
    """PiSSA and LoftQ over nine layers of SmolLM2."""
    read = original_weights(str(TOKENIZER))
    weights = {name: read(name).float() for name in LAYERS}
    plain = sum((quantize(w, format="nf4").dequantize() - w).square().sum().item() for w in weights.values())
    for init in ("pissa", "loftq"):
        total = 0.0
        for weight in weights.values():
            model = nn.Sequential(QuantizedLinear(quantize(weight, format="nf4")))
            attach_lora(model, rank=16, init=init, original=lambda _, w=weight: w)
            layer = model[0]
            assert isinstance(layer, AdapterLayer)
            total += (layer.merge_to_f32() - weight).square().sum().item()
        yield less(f"{init}_error", "SmolLM2 r=16", "of NF4's", (total / plain) ** 0.5, 1.0, "nf4 alone", 1.0)


def fuse_ours(base: Path, adapter: Path, output: Path) -> None:
    """Our export."""
    import entrenar

    entrenar.export(str(base), output, adapter=str(adapter))


def fuse_theirs(base: Path, adapter: Path, output: Path) -> None:
    """What a user of peft writes over a 4-bit base."""
    leave_this_folder()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=options, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.dequantize().save_pretrained(output)


def fuse() -> Iterator[Row]:
    """1.1B, two fresh processes."""
    base = random_checkpoint("llama-1.1b", LLAMA_1B)
    with TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        _random_adapter(base, adapter)
        ours, peer = (
            _in_a_process(work, base, adapter, Path(folder) / work.__name__) for work in (fuse_ours, fuse_theirs)
        )
    yield less("fuse_seconds", "1.1B bf16", "s", ours[0], peer[0], "peft", 3.0)
    yield less("fuse_peak", "1.1B bf16", "MB", ours[1] / 1e6, peer[1] / 1e6, "peft", 4.0)


def _random_adapter(base: Path, directory: Path) -> None:
    """Rank 16 in every linear layer, trained on nf4 as far as its file says."""
    from entrenar.files.peft import AdapterTensors, BaseFormat, PeftAdapter, write_adapter
    from entrenar.opening.build import build_on_meta
    from entrenar.opening.source import open_source

    model = build_on_meta(open_source(str(base)), torch.bfloat16)
    layers = {
        name: {
            "lora_A.weight": torch.randn(16, module.in_features) * 0.01,
            "lora_B.weight": torch.randn(module.out_features, 16) * 0.01,
        }
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }
    held = BaseFormat(format="nf4", block_size=64, double_quant=False)
    targets = sorted({name.rpartition(".")[2] for name in layers})
    write_adapter(
        directory,
        PeftAdapter(
            rank=16, alpha=16.0, dropout=0.0, targets=targets, base_model=str(base), base_format=held,
            tensors=AdapterTensors(layers),
        ),
    )  # fmt: skip


def _in_a_process(work: Callable[..., None], *paths: Path) -> tuple[float, int]:
    """Seconds, libraries imported beforehand not counted, and the peak of anonymous memory."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_serve, args=(other, work, paths))
    process.start()
    found = pipe.recv()
    process.join()
    return found


def _serve(pipe: Connection, work: Callable[..., None], paths: tuple[Path, ...]) -> None:
    import transformers  # noqa: F401 - its import is not counted

    from entrenar.core.memory import PeakMemory

    torch.set_num_threads(2)
    with PeakMemory(interval=0.01) as watch:
        start = time.perf_counter()
        work(*paths)
        taken = time.perf_counter() - start
    pipe.send((taken, watch.peak))


def main() -> None:
    """Run what is asked for."""
    options = arguments(__doc__ or "")
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "delta_survival_nf4": lambda: iter([survival()]),
        "nf4_mse": lambda: iter([error()]),
        "nf4_loss_increase": lambda: iter([loss_increase()]),
        "nf4_search_speed": lambda: iter([speed()]),
        "pissa_error loftq_error": starts,
        "fuse_seconds fuse_peak": fuse,
    }
    report([row for name, make in parts.items() if options.only in name for row in make()], options.json)


if __name__ == "__main__":
    main()
