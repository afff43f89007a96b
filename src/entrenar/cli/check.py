"""`entrenar check`: show what a config would do; trains nothing."""

from typing import TYPE_CHECKING

from entrenar.cli.arguments import ConfigArgument, OverridesArgument
from entrenar.cli.numbers import human_bytes
from entrenar.core.terminal import PROSE, printable

if TYPE_CHECKING:
    from rich.console import Console

    from entrenar.recipes.check import CheckReport


def check(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Resolve a config, read its data, size its model and show samples with trained tokens coloured; trains nothing."""
    from rich.console import Console

    from entrenar.core.config import parse_override, to_yaml
    from entrenar.recipes.inputs import check_config

    values = dict(map(parse_override, overrides or []))
    check_config(config, values)  # before seconds of imports
    from entrenar.recipes.check import check as run

    report = run(config, values)
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    console.print(printable(to_yaml(report.config), PROSE))
    _print_sizes(console, report)
    _print_doubts(console, report)
    _print_data(console, report)
    _print_samples(console, report)


def _print_sizes(console: "Console", report: "CheckReport") -> None:
    plan = report.memory
    console.print("memory", style="bold")
    sizes = {
        "libraries": plan.fixed.libraries, "base": plan.fixed.base, "adapter": plan.fixed.adapter,
        "gradients": plan.fixed.gradients, "optimizer": plan.fixed.optimizer, "activations": plan.saved,
        "working": plan.transient, "in all": plan.total,
    }  # fmt: skip
    for name, size in sizes.items():
        console.print(f"  {name:<12}{size:>16,} bytes  ({human_bytes(size)})")
    console.print(f"  {plan.sentence()}")
    console.print(f"  {report.trainable_parameters:,} trained parameters in {report.adapted_layers} layers")
    resumes = f", resuming {printable(report.resumes_from)}" if report.resumes_from else ""
    console.print(f"  {report.total_steps} steps{resumes}")


def _print_doubts(console: "Console", report: "CheckReport") -> None:
    for sentence in report.doubts:
        console.print(f"  note: {printable(sentence)}")


def _print_data(console: "Console", report: "CheckReport") -> None:
    from entrenar.recipes.check import histogram
    from entrenar.recipes.train import describe

    console.print("\ndata", style="bold")
    console.print(f"  {printable(describe(report.data), PROSE)}")
    bins = histogram(report.lengths)
    most = max(count for *_, count in bins)
    for start, end, count in bins:
        console.print(f"  {start:>6}–{end:<6} tokens {count:>6} {'█' * round(40 * count / most)}")
    use, packing = report.use, report.config.data.packing
    rows = f"packed into rows of up to {report.config.data.max_length}" if packing else "each row padded on its own"
    console.print(
        f"  first {use.batches} batches: {use.tokens:,} tokens and {use.padding:,} of padding, {use.useful:.1%} useful "
        f"({rows})"
    )


def _print_samples(console: "Console", report: "CheckReport") -> None:
    from rich.text import Text

    console.print("\nsamples (trained tokens in green, between » and «)", style="bold")
    for number, pieces in enumerate(report.samples, start=1):
        text = Text(f"{number}. ")
        for piece, trained in pieces:
            shown = printable(piece, PROSE)
            text.append(f"»{shown}«" if trained else shown, style="green" if trained else "dim")
        console.print(text, "")
