"""The progress line of a training run: a live bar on a terminal, a plain line now and then elsewhere."""

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from entrenar.cli.numbers import human_bytes, human_seconds
from entrenar.core.terminal import PROSE, printable

if TYPE_CHECKING:
    from entrenar.training.state import StepReport

_PLAIN_LINES = 20


class TrainingProgress:
    """Context manager; `step` takes the loop's reports, `say` prints a sentence above the bar."""

    def __init__(self, enabled: bool = True) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._enabled = enabled
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self._console, disable=not (enabled and self._console.is_terminal))
        self._task = self._bar.add_task("", total=None, visible=False)

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print one sentence."""
        self._console.print(printable(text, PROSE), markup=False, emoji=False)

    def step(self, report: "StepReport") -> None:
        """Show where the run stands."""
        text = (
            f"loss {report.loss:.4f}  {report.tokens_per_s:.0f} tok/s  {human_seconds(report.seconds_left)} left  "
            f"{human_bytes(report.memory_bytes)}"
        )
        self._bar.update(self._task, completed=report.step, total=report.total_steps, description=text, visible=True)
        every = max(report.total_steps // _PLAIN_LINES, 1)
        plain = self._enabled and not self._console.is_terminal
        if plain and (report.step % every == 0 or report.step == report.total_steps):
            self.say(f"step {report.step}/{report.total_steps}  {text}")
        if report.eval_loss is not None:
            self.say(f"step {report.step}: validation loss {report.eval_loss:.4f}")
