"""Merge: combine several models into one, as a config of mergekit's says, or tensors in memory."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import entrenar
from entrenar.core.atomic import output_lock, refuse_existing
from entrenar.files.stream import MAX_THREADS
from entrenar.merging.config import read_merge_config
from entrenar.merging.directory import write_model_files
from entrenar.merging.execute import Progress, execute, working
from entrenar.merging.in_memory import merge_tensors
from entrenar.merging.names import without_paths
from entrenar.merging.output import OutputFiles
from entrenar.merging.place import discard, export_directory, statistics_directory, working_directory
from entrenar.merging.plan import MergePlan, PlannedTensor, make_plan
from entrenar.merging.registry import METHODS
from entrenar.merging.report import MergeReport, make_report
from entrenar.merging.stack import PIECE_ELEMENTS
from entrenar.merging.thresholds import MOST_MARGIN
from entrenar.recipes.merge_export import REPORT_NAME, Exported, check_architecture, check_target
from entrenar.recipes.merge_statistics import measured, measured_texts

MAX_SHARD_BYTES = 5 * 10**9
# Of inputs and result together, TIES on two cores with the files half in the page cache (all: 1.4e9, none: 0.7e9); only
# for the plan's guess.
_BYTES_PER_SECOND = 1e9


@dataclass(frozen=True, kw_only=True)
class MergeOutlook:
    """What a merge would do.

    Attributes:
        tensors: with method and inputs. files, output_bytes: of the result. memory_bytes: of pieces, the libraries
            apart. seconds: a guess. exported_as: kind and type of a result that the merged files are then exported to.
    """

    method: str
    tensors: list[PlannedTensor]
    files: int
    input_bytes: int
    output_bytes: int
    memory_bytes: int
    seconds: float
    exported_as: str | None


class Merge:
    """`merge(config, output)` merges models in files; `merge.ties({...}, base, density=0.5)` tensors in memory.

    There is one such function for every merge method; see `merging.in_memory.merge_tensors` for its arguments.
    """

    __name__ = "merge"

    def __call__(
        self,
        config: str | Path | dict[str, Any],
        output: str | Path,
        *,
        to: str = "safetensors",
        type: str | None = None,
        seed: int = 0,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        progress: Progress = lambda _done, _all: None,
    ) -> MergeReport:
        """Merge into a new model; stopped at any moment, the same call goes on to the same bytes.

        Args:
            config: a mergekit YAML, or its content as a dict.
            to, type: a Hugging Face directory in the config's dtype, or as `export` writes it: "gguf" in any of its
                types, "safetensors" as "nf4". The merge is then on the disk beside it meanwhile.
            seed: of the random masks of dare and della.

        Raises:
            InputError: a config or models that are refused, or a taken output. EntrenarError: the disk is full.
        """
        output = Path(output)
        with output_lock(output):
            report = self._run(config, output, to, type, seed, max_shard_bytes, progress)
            for left in (working_directory, export_directory, statistics_directory):  # by another merge into this name
                discard(left(output))
        return report

    def _run(
        self, config: str | Path | dict[str, Any], output: Path, to: str, type: str | None, seed: int,
        max_shard_bytes: int, progress: Progress,
    ) -> MergeReport:  # fmt: skip
        to = to.lower()
        chosen = check_target(to, type, output)
        opened = _open(config, seed)
        if chosen is None:
            refuse_existing(output)
            return _merge(opened, output, max_shard_bytes, progress)
        exported = Exported(output, to, chosen, opened.metadata)
        exported.check_names()
        check_architecture(opened.plan, to)
        return exported.make(lambda directory: _merge(opened, directory, max_shard_bytes, progress))

    def plan(
        self,
        config: str | Path | dict[str, Any],
        output: str | Path,
        *,
        to: str = "safetensors",
        type: str | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> MergeOutlook:
        """Read headers only; everything that would be refused is refused here too."""
        to = to.lower()
        chosen = check_target(to, type, Path(output))
        opened = _open(config, seed=0)
        plan = opened.plan
        if chosen is not None:
            Exported(Path(output), to, chosen, opened.metadata).check_names()
            check_architecture(plan, to)
        else:
            refuse_existing(Path(output))
        files = OutputFiles(working_directory(Path(output)), plan.tensors, max_shard_bytes, opened.metadata)
        inputs = sum(tensor.input_bytes for tensor in plan.tensors)
        return MergeOutlook(
            method=plan.method.name, tensors=plan.tensors, files=len(files.names), input_bytes=inputs,
            output_bytes=files.bytes, memory_bytes=_memory(plan), seconds=(inputs + files.bytes) / _BYTES_PER_SECOND,
            exported_as=None if chosen is None else f"{to} {chosen}",
        )  # fmt: skip

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in METHODS:
            raise AttributeError(f"entrenar.merge has no method {name!r}: it has {', '.join(METHODS)}")

        def function(models: Any, base: Any = None, **arguments: Any) -> Any:
            return merge_tensors(name, models, base, **arguments)

        function.__name__ = name
        function.__doc__ = METHODS[name].function.__doc__
        return function


merge = Merge()


@dataclass(frozen=True)
class _Opened:
    """A merge that is about to be done; `metadata`: its provenance, `texts`: see merge_statistics.py."""

    plan: MergePlan
    text: str
    chat_template: str | None
    seed: int
    metadata: dict[str, str]
    texts: dict[str, str]


def _open(config: str | Path | dict[str, Any], seed: int) -> _Opened:
    parsed, text = read_merge_config(config)
    plan = make_plan(parsed)
    texts = measured_texts(plan)
    text = without_paths(text, plan.shown)
    return _Opened(plan, text, parsed.chat_template, seed, _provenance(plan, text, seed, texts), texts)


def _merge(opened: _Opened, output: Path, max_shard_bytes: int, progress: Progress) -> MergeReport:
    """Write the Hugging Face directory."""
    plan, seed = opened.plan, opened.seed
    with measured(plan, output, opened.texts) as statistics, working(output) as directory:
        files = OutputFiles(directory, plan.tensors, max_shard_bytes, opened.metadata)
        notes = execute(plan, files, _digest(plan, files, seed), seed, progress, statistics)
        report = make_report(plan, notes)
        readme = _readme(output.name, plan, opened.text, opened.metadata)
        write_model_files(directory, plan, opened.chat_template, readme)
        (directory / REPORT_NAME).write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    return report


def _memory(plan: MergePlan) -> int:
    """A thread's pieces: inputs at their width, a mask each, the result, and float64 temporaries; where magnitudes are
    compared at most those near a threshold; for regmean a matrix of each model's inputs, their sum and its factor."""
    import torch

    inputs = max((len(tensor.models) + 1 for tensor in plan.tensors), default=1)
    threads = min(torch.get_num_threads(), MAX_THREADS)
    columns = max((tensor.shape[-1] for tensor in plan.tensors if len(tensor.shape) == 2), default=0)
    matrices = (inputs + 2) * columns**2 * 8 if plan.method.statistic == "input products" else 0
    largest = max((math.prod(tensor.shape) for tensor in plan.tensors), default=0)
    compares = not {"density", "select_topk"}.isdisjoint(plan.method.parameters)
    near = int(inputs * largest * 2 * MOST_MARGIN) * 4 if compares else 0
    return threads * (PIECE_ELEMENTS * (inputs * (4 + 1) + 4 + 8) + near + matrices)


def _provenance(plan: MergePlan, text: str, seed: int, texts: dict[str, str]) -> dict[str, str]:
    inputs = {plan.shown[label]: model.fingerprint for label, model in plan.models.items()}
    told = {"version": entrenar.__version__, "method": plan.method.name, "seed": seed, "inputs": inputs}
    if texts:
        told["measured_on"] = {
            plan.shown[label]: hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
            for label, content in texts.items()
        }
    return {"entrenar.merge": json.dumps(told), "entrenar.merge_config": text}


def _digest(plan: MergePlan, files: OutputFiles, seed: int) -> str:
    """Of everything that decides the result's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for one in files.layouts:
        digest.update(one.header)
    for tensor in plan.tensors:
        digest.update(repr((tensor.name, sorted(tensor.options.items()), tensor.labels, seed)).encode())
    return digest.hexdigest()


def _readme(name: str, plan: MergePlan, text: str, metadata: dict[str, str]) -> str:
    inputs = "\n".join(
        f"- `{plan.shown[label]}` (fingerprint {model.fingerprint})" for label, model in plan.models.items()
    )
    return (
        f"# {name}\n\nMerged by entrenar {entrenar.__version__}, method `{plan.method.name}`, from\n\n{inputs}\n\n"
        f"```yaml\n{text.rstrip()}\n```\n\n`entrenar inspect` shows the same from the weights' metadata:\n"
        f"`{metadata['entrenar.merge']}`\n"
    )
