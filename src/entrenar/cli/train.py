"""`entrenar train`: run a config, with a progress line."""

from entrenar.cli.arguments import ConfigArgument, OverridesArgument
from entrenar.cli.numbers import human_bytes, human_seconds


def train(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Fine-tune; a run that was stopped goes on by itself when the same command is given again."""
    from pathlib import Path

    from entrenar.core.config import parse_override
    from entrenar.recipes.inputs import check_config

    check_config(config, dict(map(parse_override, overrides or [])))  # before seconds of imports
    from entrenar.cli.progress import TrainingProgress
    from entrenar.core.config import load_config
    from entrenar.recipes.config import RunConfig

    settings = load_config(RunConfig, Path(config), dict(map(parse_override, overrides or [])))
    with TrainingProgress(enabled=settings.log.progress) as progress:
        progress.say("loading…")
        from entrenar.recipes.train import train as run

        result = run(settings, on_step=progress.step, say=progress.say)
        losses = [f"loss {result.train_loss:.4f}"] if result.train_loss is not None else []
        losses += [f"validation loss {result.eval_loss:.4f}"] if result.eval_loss is not None else []
        progress.say(
            f"{result.steps} steps, {', '.join(losses)}; {human_seconds(result.seconds)}, "
            f"peak memory {human_bytes(result.peak_memory_bytes)}; adapter in {result.adapter}"
        )
