"""`bisparse prune --eval`: measures the perplexity before and after pruning, and records both with the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bisparse.cli.console import to_stdout

if TYPE_CHECKING:
    from bisparse.evaluation import Perplexity

__all__ = ["EvalText", "EvalTokens", "before_and_after", "measured"]

EvalText = Annotated[
    Path | None,
    typer.Option(
        "--eval",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Measure the perplexity of a causal language model on this text before and after (context and stride 512), and "
        "record both in bisparse.json and README.md.",
    ),
]
EvalTokens = Annotated[int | None, typer.Option("--eval-tokens", min=2, help="Read only this many tokens of the --eval text.")]


def before_and_after(
    source: Path, target: Path | None, text: Path | None, tokens: int | None, *, as_json: bool
) -> AbstractContextManager[None]:
    """A context manager: measures the source on entry and the written target on exit, and records both.

    Does nothing without a text. Under torchrun only the first rank measures.
    """
    if text is None and tokens is not None:
        raise typer.BadParameter("requires --eval", param_hint="--eval-tokens")
    if text is not None and target is None:
        raise typer.BadParameter("does not work with --dry-run, which writes nothing to measure", param_hint="--eval")
    if text is not None and ":" in str(source) and not source.exists():
        raise typer.BadParameter("requires a transformers model, with its tokenizer", param_hint="--eval")
    if text is None or target is None or os.environ.get("RANK", "0") != "0":
        return nullcontext()
    return _measuring(source, target, text, tokens, as_json)


@contextmanager
def _measuring(source: Path, target: Path, text: Path, tokens: int | None, as_json: bool) -> Iterator[None]:
    from bisparse.checkpoint import record_evaluation

    before, dtype = measured(source, text, tokens=tokens)
    yield
    after, _ = measured(target, text, tokens=tokens)
    record_evaluation(
        target,
        [{**figure.as_dict(), "when": when, "dtype": dtype} for when, figure in (("before", before), ("after", after))],
    )
    if not as_json:
        console = to_stdout()
        console.print(f"Before: {before}", markup=False, soft_wrap=True)
        console.print(f"After:  {after}", markup=False, soft_wrap=True)


def measured(
    model: Path, text: Path, *, context: int = 512, stride: int | None = None, tokens: int | None = None
) -> tuple[Perplexity, str]:
    """The perplexity of a transformers model on disk, and the dtype in which it ran."""
    from bisparse.cli.model_source import open_source
    from bisparse.evaluation import text_perplexity

    source = open_source(str(model))
    figure = text_perplexity(source.model, source.tokenizer, text, context=context, stride=stride, tokens=tokens)
    return figure, str(next(source.model.parameters()).dtype).removeprefix("torch.")
