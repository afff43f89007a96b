"""Export: fuse a model with its adapter and write it for another tool, or write the adapter alone."""

from collections.abc import Callable
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from entrenar.core.atomic import refuse_existing, write_text
from entrenar.core.errors import InputError
from entrenar.evaluation.fidelity import ExportStep
from entrenar.exporting.fuse import fused_tensors, source_tensors
from entrenar.exporting.gguf import Metadata, copied_metadata, metadata, write_gguf
from entrenar.exporting.gguf_adapter import export_gguf_adapter, modelfile
from entrenar.exporting.gguf_types import FILE_TYPES
from entrenar.exporting.safetensors_output import TYPES
from entrenar.files.peft import largest_token
from entrenar.models.load import KEEP, UNQUANTIZED
from entrenar.models.source import ModelSource, open_source, with_tokenizer_of
from entrenar.ops.gguf_blocks import IMPORTANCE_TYPES
from entrenar.recipes.calibrate import calibrate
from entrenar.recipes.export_safetensors import export_safetensors
from entrenar.recipes.open_model import open_model
from entrenar.recipes.verify import verify

OnVerified = Callable[[list[ExportStep]], None]
_TYPES = {"safetensors": TYPES, "gguf": tuple(FILE_TYPES), "gguf-adapter": ("f32",)}


def export(
    model: str,
    output: str | Path,
    *,
    adapter: str | None = None,
    to: str = "safetensors",
    type: str | None = None,
    quantize: str | None = None,
    base: str | None = None,
    lossy: bool = False,
    text: str | None = None,
    ollama: bool = False,
    on_verified: OnVerified | None = None,
    verify_on: str | Path | None = None,
    calibrate_on: str | Path | None = None,
) -> Path:
    """Write `model`, fused with `adapter`, as a new file or directory; or the adapter alone.

    Args:
        to: "safetensors" (a Hugging Face directory), "gguf" (one file) or "gguf-adapter" (the adapter alone, for
            llama.cpp's --lora over the same model). type: of the weights; the first listed in the error for a wrong
            one is the default. quantize: see `open_model`. ollama: write an Ollama Modelfile beside a GGUF adapter.
        base, lossy, text: of "safetensors", see `export_safetensors`.
        on_verified: for "gguf": run the result against the live model and call this with KL and perplexity of every
            step. verify_on: a file of held-out text for it, in place of a page of prose.
        calibrate_on: for "gguf": a file of text like what the model will see; an error in a column of a weight then
            counts as much as what that column is multiplied by there (llama.cpp's importance matrix).

    Raises:
        InputError: an unknown kind or type, a taken output, or a model or adapter that cannot be written so.
    """
    output, type = Path(output), chosen_type(to, type)
    refuse_existing(output)
    if to != "safetensors" and (base or lossy or text):
        raise InputError(f"base, lossy and text are for safetensors, not for {to}: leave them out")
    if to != "gguf" and (on_verified is not None or verify_on is not None or calibrate_on is not None):
        raise InputError(f"what is calibrated and verified is a GGUF's model, not {to}: leave it out")
    if calibrate_on is not None and FILE_TYPES[type].most not in IMPORTANCE_TYPES:
        raise InputError(f"nothing in {type} is calibrated: only mixtures of {', '.join(IMPORTANCE_TYPES)} are")
    if ollama and to != "gguf-adapter":
        raise InputError(f"an Ollama Modelfile goes with a GGUF adapter, not with {to}: choose --to gguf-adapter")
    if to == "gguf-adapter":
        _adapter_alone(model, adapter, output, ollama)
    elif to == "gguf":
        live = _gguf(model, adapter, output, type, quantize, calibrate_on, loads=on_verified is not None)
        if live is not None and on_verified is not None:
            on_verified(verify(*live, output, verify_on))
    else:
        export_safetensors(
            model, output, adapter=adapter, type=type, quantize=quantize, base=base, lossy=lossy, text=text
        )
    return output


def chosen_type(to: str, type: str | None) -> str:
    """The type of an export, the kind's first one if none is named; InputError for a kind or type that is not there."""
    if to not in _TYPES:
        raise InputError(f"cannot export to {to!r}: choose {' or '.join(_TYPES)}")
    type = type or _TYPES[to][0]
    if type not in _TYPES[to]:
        raise InputError(f"{to} has no type {type!r} here: choose {', '.join(_TYPES[to])}")
    return type


def _gguf(
    model: str,
    adapter: str | None,
    output: Path,
    type: str,
    quantize: str | None,
    calibrate_on: str | Path | None,
    *,
    loads: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """Write it; the live model and its tokenizer, if there is an adapter or text, or `loads` asks for them."""
    if adapter is None and calibrate_on is None and not loads:
        source = open_source(model, with_tokenizer=False)
        tensors = source_tensors(source, None if quantize in (None, UNQUANTIZED, KEEP) else quantize)
        write_gguf(tensors, source.config, _keys(source, source.config), output, type)
        return None
    loaded, tokenizer = open_model(model, adapter, quantize, dtype="float32")
    source = open_source(model, with_tokenizer=False)
    if adapter is not None:
        source = with_tokenizer_of(source, Path(adapter), largest_token(Path(adapter)))
    keys = _keys(source, loaded.config)
    found = calibrate(loaded, tokenizer, calibrate_on) if calibrate_on is not None else None
    if found is not None:
        keys |= found.keys
    write_gguf(fused_tensors(loaded), loaded.config, keys, output, type, found and found.importance)
    return loaded, tokenizer


def _keys(source: ModelSource, config: PretrainedConfig) -> Metadata:
    """A GGUF's own keys, or those that say what a Hugging Face directory says, and where it is from."""
    copied = copied_metadata(source.blocks.raw_metadata) if source.blocks else {}
    if copied and config.vocab_size == source.config.vocab_size:
        return copied
    return {**copied, **metadata(config, source.tokenizer), **source.provenance}


def _adapter_alone(model: str, adapter: str | None, output: Path, ollama: bool) -> None:
    if adapter is None:
        raise InputError("--to gguf-adapter writes an adapter, and none is given: name its directory with --adapter")
    if ollama:
        refuse_existing(output.with_name("Modelfile"))
    export_gguf_adapter(open_source(model, with_tokenizer=False), adapter, output)
    if ollama:
        write_text(output.with_name("Modelfile"), modelfile(model, output))
