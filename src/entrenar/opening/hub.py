"""A model by its hub id: where its files lie on this machine, fetched if they do not."""

from pathlib import Path

from entrenar.core.errors import InputError, first_line


def local_directory(path: str) -> Path:
    """A model's directory: `path` itself, or the snapshot of that hub id; InputError if it is neither."""
    return Path(path) if Path(path).is_dir() else _download(path)


def _download(model_id: str) -> Path:
    """The local snapshot of a hub id; whatever stops it, the user hears one sentence."""
    from huggingface_hub import snapshot_download

    if "@" in model_id:
        raise InputError(
            f"model {model_id!r}: revisions (@…) are not read: download that revision and point to its directory"
        )
    if model_id.count("/") > 1 or model_id.startswith((".", "/", "~")):
        raise InputError(
            f"model path {model_id!r} does not exist: point to a model directory, a .gguf file or a hub id"
        )
    try:
        return Path(snapshot_download(model_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except Exception as error:
        raise InputError(
            f"model {model_id!r} is not a directory, a .gguf file or a hub model within reach: {first_line(error)}"
        ) from None
