"""What an export is asked for, checked before anything is imported that takes seconds, and before any work is done."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from entrenar.core.atomic import refuse_existing
from entrenar.core.errors import InputError
from entrenar.recipes.inputs import check_adapter, check_file, check_model, check_quantize

# Of each kind the types it has, the default first; "gguf": gguf/types.py's, which says what they are.
TYPES = {
    "safetensors": ("bf16", "f32", "f16", "nf4"),
    "gguf": (
        "f16", "f32", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q5_1", "q5_0", "q4_1", "q4_0",
    ),
    "gguf-adapter": ("f32",),
}  # fmt: skip
BASES = ("dequantized", "original")
_SUFFIX = ".gguf"


@dataclass(frozen=True)
class Exclusive:
    """Options of a request that only one kind of output has; `refusal`: what is said where `{kind}` is another."""

    kind: str
    options: tuple[str, ...]
    refusal: str


EXCLUSIVE = (
    Exclusive(
        "safetensors", ("base", "lossy", "text"),
        "base, lossy and text are for safetensors, not for {kind}: leave them out",
    ),
    Exclusive(
        "gguf", ("verifies", "verify_on", "calibrate_on"),
        "what is calibrated and verified is a GGUF's model, not {kind}: leave it out",
    ),
    Exclusive(
        "gguf-adapter", ("ollama",),
        "an Ollama Modelfile goes with a GGUF adapter, not with {kind}: choose --to gguf-adapter",
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """The arguments of `recipes.export.export`, as they were given; `to` and `type` None: the output's name decides."""

    model: str
    output: Path
    adapter: str | None = None
    to: str | None = None
    type: str | None = None
    quantize: str | None = None
    base: str | None = None
    lossy: bool = False
    text: str | None = None
    ollama: bool = False
    verifies: bool = False
    verify_on: str | Path | None = None
    calibrate_on: str | Path | None = None

    @property
    def kind(self) -> str:
        """One of TYPES' keys."""
        return chosen_kind(self.output, self.to)

    @property
    def modelfile(self) -> Path:
        """Where Ollama's goes."""
        return self.output.with_name("Modelfile")

    def checked_type(self) -> str:
        """The type to write, once everything about the request holds that can be known without opening a file.

        Raises:
            InputError: a kind, type or option that is not there or does not fit the others, a taken output, a path
                where nothing is.
        """
        kind = self.kind
        type = chosen_type(kind, self.type)
        self._check_options(kind, type)
        refuse_existing(self.output)
        if self.ollama and os.path.lexists(self.modelfile) and not self._is_modelfile_mine():
            raise InputError(f"{self.modelfile} already exists and is of another adapter: choose another folder")
        if kind == "gguf-adapter" and self.adapter is None:
            raise InputError(
                "--to gguf-adapter writes an adapter, and none is given: name its directory with --adapter"
            )
        check_quantize(self.quantize)
        check_model(self.model)
        check_adapter(self.adapter)
        check_file(self.text, "data file")
        for path, purpose in ((self.verify_on, "verify on"), (self.calibrate_on, "calibrate on")):
            if path is not None and not os.path.lexists(path):
                raise InputError(f"cannot read the text {path} to {purpose}: it does not exist; name a UTF-8 file")
        check_name(self.output, kind)
        return type

    def _is_modelfile_mine(self) -> bool:
        """Whether it is of this very output, which a run that was killed did not come to write."""
        try:
            return self.modelfile.read_text(encoding="utf-8").endswith(f"ADAPTER ./{self.output.name}\n")
        except (OSError, ValueError):
            return False

    def _check_options(self, kind: str, type: str) -> None:
        for row in EXCLUSIVE:
            if kind != row.kind and any(getattr(self, option) not in (None, False) for option in row.options):
                raise InputError(row.refusal.format(kind=kind))
        if self.base is not None and self.base not in BASES:
            raise InputError(f"there is no base {self.base!r}: choose {' or '.join(BASES)}")
        if self.calibrate_on is not None and "_k" not in type:
            raise InputError(f"nothing in {type} is calibrated: only mixtures of q4_k, q5_k, q6_k are")


def chosen_kind(output: Path, to: str | None) -> str:
    """`to`, or where it is None what the output's name says: `x.gguf` is a GGUF, any other a directory."""
    if to is None:
        return "gguf" if output.suffix.lower() == _SUFFIX else "safetensors"
    if to.lower() not in TYPES:
        raise InputError(f"cannot export to {to!r}: choose {' or '.join(TYPES)}{_nearest(to, TYPES)}")
    return to.lower()


def chosen_type(kind: str, type: str | None) -> str:
    """The type of an export, in capitals or not; the kind's first one if none is named.

    Raises:
        InputError: a kind or type that is not there.
    """
    known = TYPES[chosen_kind(Path(), kind)]
    if type is None:
        return known[0]
    if type.lower() not in known:
        raise InputError(f"{kind} has no type {type!r} here: choose {', '.join(known)}{_nearest(type, known)}")
    return type.lower()


def check_name(output: Path, kind: str) -> None:
    """InputError for a GGUF whose name does not end in .gguf, by which every tool knows one, and for a directory with a
    file's name."""
    if kind == "safetensors" and output.suffix.lower() == _SUFFIX:
        raise InputError(f"{output} is the name of a GGUF, but safetensors is a directory: leave out --to or the .gguf")
    if kind == "safetensors" and output.suffix.lower() == ".safetensors":
        raise InputError(f"{output} is the name of one file, but a model is a directory: leave the suffix out")
    if kind != "safetensors" and output.suffix != _SUFFIX:
        raise InputError(f"{output} does not end in .gguf, by which tools know such a file: write {output}.gguf")


def _nearest(name: str, known: "dict[str, tuple[str, ...]] | tuple[str, ...]") -> str:
    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
