"""`entrenar eval`: perplexity, exact match, KL."""

from typing import Annotated

import typer

from entrenar.cli.arguments import AdapterOption, ModelArgument, QuantizeOption
from entrenar.core.terminal import PROSE, printable, write_line


def evaluate(
    model: ModelArgument,
    data: Annotated[str, typer.Option("--data", help="JSONL rows to measure on.")],
    adapter: AdapterOption = None,
    against: Annotated[str | None, typer.Option(help="Another model: prints KL(OTHER ‖ MODEL).")] = None,
    quantize: QuantizeOption = None,
    show: Annotated[int, typer.Option(min=0, help="Print this many wrong answers.")] = 3,
) -> None:
    """Measure a model on a file: perplexity of the trained tokens, exact match of its greedy answers."""
    from entrenar.recipes.inputs import check_adapter, check_file, check_model, check_quantize

    for path in filter(None, (model, against)):
        check_model(path)
    check_adapter(adapter)
    check_file(data, "data file")
    check_quantize(quantize)
    from entrenar.recipes.evaluate import evaluate as run

    result = run(model, data, adapter=adapter, against=against, quantize=quantize)
    write_line(f"rows         {result.rows}")
    write_line(f"loss         {result.loss:.4f} nats/token over {result.tokens} tokens")
    write_line(f"perplexity   {result.perplexity:.3f}")
    if result.exact_match is not None:
        write_line(f"exact match  {result.exact_match:.1%}")
    if result.kl is not None:
        write_line(f"KL           {result.kl:.3e} nats/token")
    for answer in [answer for answer in result.answers if not answer.is_exact][:show]:
        told = f"\nasked     {answer.prompt}\nexpected  {answer.expected}\nanswered  {answer.actual}"
        write_line(printable(told, PROSE))
