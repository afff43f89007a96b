"""A merge's result in another format: merged into a hidden directory beside the output, which is then exported.

What was merged is found again by a run that goes on, and removed once the export is complete.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from entrenar.core.atomic import atomic_directory, refuse_existing, write_text
from entrenar.core.errors import InputError
from entrenar.files.safetensors import SafetensorsCheckpoint
from entrenar.merging.directory import merged_config
from entrenar.merging.plan import MergePlan
from entrenar.merging.report import MergeReport

REPORT_NAME = "merge-report.json"


def check_target(output: Path, to: str, type: str | None) -> str | None:
    """The type to export to; None where the merge itself writes the result.

    Raises:
        InputError: a kind or type that is not there, or a taken output.
    """
    refuse_existing(output)
    if to == "safetensors" and type is None:
        return None
    if to == "gguf-adapter":
        raise InputError("a merge makes a whole model, not an adapter: choose --to safetensors or gguf")
    from entrenar.recipes.export import chosen_type  # imports transformers, which a merge does not need

    chosen = chosen_type(to, type)
    if to == "safetensors" and chosen != "nf4":
        raise InputError(f"a merge writes {chosen} when its config says so: set out_dtype there, and leave --type out")
    if to == "gguf":
        refuse_existing(report_file(output))
    return chosen


def check_architecture(plan: MergePlan, to: str) -> None:
    """InputError, before anything is merged, where GGUF has no place for the model."""
    if to == "gguf":
        from transformers import AutoConfig

        from entrenar.models.gguf_config import check_exportable

        config = merged_config(plan)
        check_exportable(AutoConfig.for_model(**config))


def merged_directory(output: Path) -> Path:
    """Where the merge lies until it is exported, under the name that the result is to have."""
    return output.with_name(f".{output.name}.merged") / output.stem


def finished(directory: Path, metadata: Mapping[str, str]) -> MergeReport | None:
    """The report of a merge that is complete there and has this provenance; anything else there is removed."""
    if directory.is_dir() and metadata.items() <= SafetensorsCheckpoint(directory).metadata.items():
        return MergeReport.from_json(json.loads((directory / REPORT_NAME).read_text(encoding="utf-8")))
    shutil.rmtree(directory, ignore_errors=True)
    return None


def export_merged(directory: Path, output: Path, to: str, type: str) -> None:
    """Write `output` of the merged directory, which is then removed; the report goes with it."""
    from entrenar.recipes.export import export

    report = (directory / REPORT_NAME).read_text(encoding="utf-8")
    if to == "gguf":
        export(str(directory), output, to=to, type=type)
        write_text(report_file(output), report)
    else:
        with atomic_directory(output) as temporary:
            made = export(str(directory), temporary / "exported", to=to, type=type)
            for file in (*made.iterdir(), directory / REPORT_NAME, directory / "README.md"):
                shutil.move(file, temporary / file.name)
            made.rmdir()
    shutil.rmtree(directory.parent)


def report_file(output: Path) -> Path:
    """The report of a result that is one file."""
    return output.with_name(f"{output.stem}.{REPORT_NAME}")
