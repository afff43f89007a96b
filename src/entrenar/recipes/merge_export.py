"""A merge's result in another format: merged into a hidden directory beside the output, which is then exported.

What was merged is found again by a run that goes on, and removed once the export is complete.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from entrenar.core.atomic import atomic_directory, fsync, refuse_existing, remove_tree
from entrenar.core.documents import read_json
from entrenar.core.errors import InputError
from entrenar.merging.directory import merged_config
from entrenar.merging.place import clear, discard, disk_full, export_directory, own_directory
from entrenar.merging.plan import MergePlan
from entrenar.merging.report import MergeReport
from entrenar.recipes.export_request import check_name

REPORT_NAME = "merge-report.json"


def check_target(to: str, type: str | None, output: Path) -> str | None:
    """The type to export to; None where the merge itself writes the result.

    Raises:
        InputError: a kind or type that is not there, or an output whose name is not of that kind.
    """
    if to == "safetensors" and output.suffix.lower() == ".gguf":
        raise InputError(f"{output} is the name of a GGUF: give --to gguf (to), or leave out the .gguf")
    if to == "safetensors" and type is None:
        return None
    if to == "gguf-adapter":
        raise InputError("a merge makes a whole model, not an adapter: choose --to safetensors or gguf")
    from entrenar.recipes.export import chosen_type  # imports transformers, which a merge does not need

    chosen = chosen_type(to, type)
    check_name(output, to)
    if to == "safetensors" and chosen != "nf4":
        raise InputError(f"a merge writes {chosen} when its config says so: set out_dtype there, and leave --type out")
    return chosen


def check_architecture(plan: MergePlan, to: str) -> None:
    """InputError, before anything is merged, where GGUF has no place for the model."""
    if to == "gguf":
        from transformers import AutoConfig

        from entrenar.gguf.config import check_exportable

        config = merged_config(plan)
        check_exportable(AutoConfig.for_model(**config))


@dataclass(frozen=True)
class Exported:
    """A merge's result in another format, `output`; `metadata`: the merge's provenance.

    Whatever happens, the next run of the same merge goes on: from the merged directory, or from the `ready` one, which
    holds what is complete and only has still to get its names.
    """

    output: Path
    to: str
    type: str
    metadata: Mapping[str, str]

    def check_names(self) -> None:
        """Raise InputError when a name is taken, unless this very merge was stopped while it gave out names."""
        if self._ready.is_dir():
            return
        try:
            for name in self._names():
                refuse_existing(self.output.with_name(name))
        except InputError:
            discard(export_directory(self.output))  # of a merge that was stopped while it cleaned up
            raise

    def make(self, merge: Callable[[Path], MergeReport]) -> MergeReport:
        """Merge into a hidden directory (the argument of `merge`), export that, and give out the names."""
        with disk_full(self.output):
            own_directory(export_directory(self.output))
            if not self._ready.is_dir():
                self._prepare(merge)
            report = read_json(self._report, "merge report", MergeReport)
            self._publish()
        return report

    def _names(self) -> list[str]:
        """What appears beside the output's own name, which is the last."""
        return [report_file(self.output).name, self.output.name] if self.to == "gguf" else [self.output.name]

    @property
    def _place(self) -> Path:
        """Of this very merge and type; what another one has left beside it is removed."""
        told = repr((sorted(self.metadata.items()), self.to, self.type))
        return export_directory(self.output) / hashlib.blake2b(told.encode(), digest_size=8).hexdigest()

    @property
    def _merged(self) -> Path:
        """Under the name that the result is to have."""
        return self._place / "merged" / self.output.stem

    @property
    def _ready(self) -> Path:
        return self._place / "ready"

    @property
    def _report(self) -> Path:
        return self._place / REPORT_NAME

    def _prepare(self, merge: Callable[[Path], MergeReport]) -> None:
        for path in export_directory(self.output).iterdir():
            if path != self._place:
                remove_tree(path)
        own_directory(self._place)
        clear(self._place, keep=("merged",), directories=True)
        own_directory(self._merged.parent)
        if not self._merged.is_dir() or self._merged.is_symlink():
            merge(self._merged)
        shutil.copyfile(self._merged / REPORT_NAME, self._report)
        fsync(self._report)
        with atomic_directory(self._ready) as temporary:
            self._export_into(temporary)

    def _export_into(self, temporary: Path) -> None:
        from entrenar.recipes.export import export

        exported = export(str(self._merged), temporary / self.output.name, to=self.to, type=self.type)
        if self.to == "gguf":
            shutil.copyfile(self._report, temporary / report_file(self.output).name)
            return
        for file in (self._report, self._merged / "README.md"):
            shutil.copyfile(file, exported / file.name)
            fsync(exported / file.name)

    def _publish(self) -> None:
        """Give out the names: what was stopped between two of them goes on with the others."""
        for name in self._names():
            if os.path.lexists(self._ready / name):
                refuse_existing(self.output.with_name(name))
                (self._ready / name).rename(self.output.with_name(name))
        fsync(self.output.parent)
        remove_tree(export_directory(self.output))


def report_file(output: Path) -> Path:
    """The report of a result that is one file."""
    return output.with_name(f"{output.stem}.{REPORT_NAME}")
