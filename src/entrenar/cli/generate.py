"""`entrenar generate`: answer one prompt."""

from pathlib import Path
from typing import Annotated

import typer

from entrenar.cli.arguments import AdapterOption, Dtype, DtypeOption, ModelArgument, QuantizeOption
from entrenar.core.terminal import PROSE, printable, write_line


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer.")],
    adapter: AdapterOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    quantize: QuantizeOption = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Answer one prompt in the model's own chat template (or continue it, where there is none)."""
    from entrenar.recipes.inputs import check_adapter, check_model, check_quantize

    check_model(model)
    check_adapter(adapter)
    check_quantize(quantize)
    from entrenar.data.feed import read_feed
    from entrenar.evaluation.generate import generate as run
    from entrenar.opening.adapted import open_model

    loaded, tokenizer = open_model(model, adapter, quantize, dtype.value)
    messages = [[{"role": "user", "content": prompt}]]
    feed = read_feed(Path(adapter)) if adapter else None
    answers = run(
        loaded, tokenizer, messages, max_new_tokens=max_new_tokens, temperature=temperature,
        options=feed.template_options if feed else None,
    )  # fmt: skip
    write_line(printable(answers[0], PROSE))
