"""Export: fuse a model with its adapter and write it for another tool, or write the adapter alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from transformers import PretrainedConfig

from entrenar.core.atomic import output_lock, write_text
from entrenar.evaluation.fidelity import ExportStep
from entrenar.exporting.fuse import fused_tensors, source_tensors
from entrenar.exporting.gguf import Metadata, copied_metadata, metadata, write_gguf
from entrenar.exporting.gguf_adapter import export_gguf_adapter, modelfile
from entrenar.opening.adapted import open_model
from entrenar.opening.as_stored import AS_STORED, UNQUANTIZED
from entrenar.opening.fed import as_fed, stopping
from entrenar.opening.source import ModelSource, open_source
from entrenar.recipes.calibrate import calibrate
from entrenar.recipes.export_request import ExportRequest, chosen_type
from entrenar.recipes.export_safetensors import export_safetensors
from entrenar.recipes.verify import held_out, verify

__all__ = ["chosen_type", "export", "run"]

OnVerified = Callable[[list[ExportStep]], None]
Say = Callable[[str], None]


def export(
    model: str | Path,
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    to: str | None = None,
    type: str | None = None,
    quantize: str | None = None,
    base: str | None = None,
    lossy: bool = False,
    text: str | None = None,
    ollama: bool = False,
    on_verified: OnVerified | None = None,
    verify_on: str | Path | None = None,
    calibrate_on: str | Path | None = None,
    say: Say | None = None,
) -> Path:
    """Write `model`, fused with `adapter`, as a new file or directory; or the adapter alone.

    Nothing lies under the output's name until it is complete, measured and verified.

    Args:
        to: "safetensors" (a Hugging Face directory), "gguf" (one file) or "gguf-adapter" (the adapter alone, for
            llama.cpp's --lora over the same model); None: gguf for an output that ends in .gguf, else safetensors.
            type: of the weights, in capitals or not; the first listed in the error for a wrong one is the default.
            quantize: see `open_model`. ollama: write an Ollama Modelfile beside a GGUF adapter.
        base, lossy, text: of "safetensors", see `export_safetensors`.
        on_verified: for "gguf": run the result against the live model and call this with KL and perplexity of every
            step. verify_on: a file of held-out text for it, in place of a page of prose.
        calibrate_on: for "gguf": a file of text like what the model will see; an error in a column of a weight then
            counts as much as what that column is multiplied by there (llama.cpp's importance matrix).
        say: gets a sentence for what the written file does otherwise than the model it is made of, in rare cases.

    Raises:
        InputError: an unknown kind or type, a taken output, or a model or adapter that cannot be written so.
    """
    request = ExportRequest(
        model=str(model), output=Path(output), adapter=None if adapter is None else str(adapter), to=to, type=type,
        quantize=quantize, base=base, lossy=lossy, text=text, ollama=ollama, verifies=on_verified is not None,
        verify_on=verify_on, calibrate_on=calibrate_on,
    )  # fmt: skip
    return run(request, on_verified=on_verified, say=say)


def run(request: ExportRequest, *, on_verified: OnVerified | None = None, say: Say | None = None) -> Path:
    """The same for arguments that are held together; see `export`."""
    type, say = request.checked_type(), say or _ignored
    with output_lock(request.output):
        if request.kind == "gguf-adapter":
            _adapter_alone(request, say)
        elif request.kind == "gguf":
            _gguf(request, type, on_verified, say)
        else:
            export_safetensors(request, type)
    return request.output


def _ignored(_: str) -> None:
    """Takes what nobody asked to hear."""


def _gguf(request: ExportRequest, type: str, on_verified: OnVerified | None, say: Say) -> None:
    """Write it; without adapter, text and verification the model is not loaded."""
    quantize, adapter = request.quantize, request.adapter
    source = open_source(request.model, with_tokenizer=False)
    if adapter is None and request.calibrate_on is None and on_verified is None:
        tensors = source_tensors(source, None if quantize in (None, UNQUANTIZED, AS_STORED) else quantize)
        write_gguf(tensors, source.config, _keys(source, source.config, say), request.output, type)
        return
    loaded, tokenizer = open_model(request.model, adapter, quantize, dtype="float32")
    if adapter is not None:
        source = as_fed(source, Path(adapter))
    keys = _keys(source, loaded.config, say)
    check: Callable[[Path], None] | None = None
    if on_verified is not None:
        held_out(tokenizer, request.verify_on)  # a text that does not serve is told before any work
        check = lambda written: on_verified(verify(loaded, tokenizer, written, request.verify_on))  # noqa: E731
    calibration = calibrate(loaded, tokenizer, request.calibrate_on) if request.calibrate_on is not None else None
    if calibration is not None:
        keys |= calibration.keys
    importance = calibration.importance if calibration is not None else None
    write_gguf(fused_tensors(loaded), loaded.config, keys, request.output, type, importance, check)


def _keys(source: ModelSource, config: PretrainedConfig, say: Say) -> Metadata:
    """A GGUF's own keys, or those that say what a Hugging Face directory says, and where it is from."""
    copied = copied_metadata(source.gguf.raw_metadata) if source.gguf else {}
    if copied and config.vocab_size == source.config.vocab_size:
        return copied
    described = metadata(config, source.tokenizer, replace(source, generation=stopping(source)).ends, say)
    return {**copied, **described, **source.provenance}


def _stop_texts(source: ModelSource) -> list[str]:
    ends = replace(source, generation=stopping(source)).ends
    return [str(token) for token in source.tokenizer.convert_ids_to_tokens(ends)]


def _adapter_alone(request: ExportRequest, say: Say) -> None:
    """The Modelfile first, so that an adapter that is there is whole with what goes beside it."""
    assert request.adapter is not None
    source = as_fed(open_source(request.model, with_tokenizer=False), Path(request.adapter))
    if request.ollama:
        write_text(request.modelfile, modelfile(request.model, request.output, _stop_texts(source)))
    try:
        export_gguf_adapter(source, request.adapter, request.output)
    except BaseException:
        if request.ollama:
            request.modelfile.unlink(missing_ok=True)
        raise
    if request.ollama:
        say(f"wrote {request.modelfile}: ollama create {request.output.stem} -f {request.modelfile}")
