"""`entrenar eval`: perplexity, exact match, KL."""

from typing import TYPE_CHECKING, Annotated

import typer

from entrenar.cli.arguments import AdapterOption, Dtype, DtypeOption, ModelArgument, QuantizeOption, TooLong
from entrenar.core.terminal import PROSE, printable, write_line

if TYPE_CHECKING:
    from entrenar.recipes.evaluate import Evaluation


def evaluate(
    model: ModelArgument,
    data: Annotated[
        str, typer.Option("--data", help="Rows to measure on: a file, a pattern, a directory or a hub dataset.")
    ],
    adapter: AdapterOption = None,
    against: Annotated[str | None, typer.Option(help="Another model: prints KL(OTHER ‖ MODEL).")] = None,
    quantize: QuantizeOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    max_length: Annotated[int, typer.Option(min=1, help="Longest row, in tokens.")] = 2048,
    too_long: Annotated[TooLong, typer.Option(help="What becomes of longer rows.")] = TooLong.ERROR,
    match: Annotated[bool, typer.Option(help="Answer the rows greedily and compare.")] = True,
    date: Annotated[
        str | None,
        typer.Option(help="Day that a chat template is told, as 2026-11-30 [default: one fixed day, always the same]."),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Print this many wrong answers.")] = 3,
) -> None:
    """Measure a model on a file: perplexity of the trained tokens, exact match of its greedy answers."""
    from entrenar.recipes.inputs import check_adapter, check_data, check_model, check_quantize

    for path in filter(None, (model, against)):
        check_model(path)
    check_adapter(adapter)
    check_data(data)
    check_quantize(quantize)
    from entrenar.recipes.evaluate import evaluate as run

    result = run(
        model,
        data,
        adapter=adapter,
        against=against,
        quantize=quantize,
        dtype=dtype.value,
        max_length=max_length,
        too_long=too_long.value,
        match=match,
        date=date,
    )
    _print_numbers(result, match)
    for answer in [answer for answer in result.answers if not answer.is_exact][:show]:
        told = f"\nasked     {answer.prompt}\nexpected  {answer.expected}\nanswered  {answer.actual}"
        write_line(printable(told, PROSE))


def _print_numbers(result: "Evaluation", match: bool) -> None:
    write_line(f"rows         {result.rows}")
    write_line(f"loss         {result.loss:.4f} nats/token over {result.tokens} tokens")
    write_line(f"perplexity   {result.perplexity:.3f}")
    without = result.rows - len(result.answers)
    if result.exact_match is not None:
        of = f" of {len(result.answers)} rows ({without} end without an answer to match)" if without else ""
        write_line(f"exact match  {result.exact_match:.1%}{of}")
    elif match:
        write_line("exact match  none: no row ends with an answer to match")
    if result.kl is not None:
        write_line(f"KL           {result.kl:.3e} nats/token")
    if result.date:
        write_line(f"date         {result.date}: the chat template writes the day, and is told this one (--date)")
    if result.truncated:
        write_line(f"truncated    {result.truncated} rows")
    if result.rejected:
        first = result.rejected[0]
        write_line(
            printable(f"left out     {len(result.rejected)} rows (first: {first.file}:{first.line}: {first.reason})")
        )
