"""`bisparse prune --eval`: the perplexity of the model before and of what was written after, recorded with the model."""

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
        help="Perplexity of a causal language model on this text before and after (context and stride 512): measure and record "
        "both in bisparse.json and README.md.",
    ),
]
EvalTokens = Annotated[
    int | None, typer.Option("--eval-tokens", min=2, help="Read only the first so many tokens of the text of --eval.")
]


def before_and_after(
    source: Path, target: Path | None, text: Path | None, tokens: int | None, *, as_json: bool
) -> AbstractContextManager[None]:
    """A block that measures the source, lets the job run, measures what it wrote from the disk, and records both.

    Without a text it does nothing. Under torchrun the first rank measures.
    """
    if text is None and tokens is not None:
        raise typer.BadParameter("has no use without --eval", param_hint="--eval-tokens")
    if text is not None and target is None:
        raise typer.BadParameter("needs a target: nothing is written with --dry-run", param_hint="--eval")
    if text is not None and ":" in str(source) and not source.exists():
        raise typer.BadParameter("needs a transformers model, with its tokenizer", param_hint="--eval")
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
    """The perplexity of a transformers model on disk, and the dtype that it ran in."""
    from bisparse.cli.model_source import open_source
    from bisparse.evaluation import text_perplexity

    source = open_source(str(model))
    figure = text_perplexity(source.model, source.tokenizer, text, context=context, stride=stride, tokens=tokens)
    return figure, str(next(source.model.parameters()).dtype).removeprefix("torch.")
