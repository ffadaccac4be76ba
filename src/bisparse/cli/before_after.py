"""`bisparse prune --eval`: measures the perplexity before and after pruning, and records both with the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bisparse.cli.console import is_function, to_stderr, to_stdout

if TYPE_CHECKING:
    from bisparse.evaluation import Perplexity

__all__ = ["EvalText", "EvalTokens", "Measurement", "measured", "parse_measurement"]

EvalText = Annotated[
    Path | None,
    typer.Option(
        "--eval",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Measure the perplexity of a causal language model on this text before and after, and of the --quantize folder "
        "(context and stride 512, or the model's positions if these are fewer), and record it in bisparse.json and README.md.",
    ),
]
EvalTokens = Annotated[int | None, typer.Option("--eval-tokens", min=2, help="Read only this many tokens of the --eval text.")]


@dataclass(frozen=True)
class Measurement:
    """The perplexity on a text, with windows of 512 tokens, or as many as the model has positions, that do not overlap."""

    text: Path
    tokens: int | None
    """Read only this many tokens."""
    as_json: bool

    def of(self, model: Path) -> dict[str, Any]:
        """The figure of a model on disk, as JSON values; the text's digest and the dtype of the weights are part of it."""
        if not self.as_json:
            to_stderr().print(f"Measuring the perplexity of {model} ...", markup=False, soft_wrap=True)
        figure, dtype = measured(model, self.text, tokens=self.tokens)
        return {**figure.as_dict(), **self._protocol(), "dtype": dtype}

    def recorded(self, folder: Path, when: str) -> dict[str, Any] | None:
        """The figure of this measurement that a folder's sidecar has; None if it has none."""
        from bisparse.checkpoint import read_sidecar

        sidecar, wanted = read_sidecar(folder), {"when": when, **self._protocol()}
        found = [] if sidecar is None else [dict(one) for one in sidecar.evaluation]
        return next((one for one in found if wanted.items() <= one.items()), None)

    def record(self, folder: Path, when: str, model: Path, figure: Mapping[str, Any] | None = None) -> None:
        """Record a figure in a folder's sidecar and card, unless it is there; a model is measured if no figure is given."""
        from bisparse.checkpoint import record_evaluation

        if self.recorded(folder, when) is None:
            record_evaluation(folder, [{**(self.of(model) if figure is None else figure), "when": when}])

    def show(self, target: Path, quantised: Path | None) -> None:
        """Print the recorded figures."""
        if self.as_json:
            return
        console = to_stdout()
        for label, folder, when in (
            ("Before:", target, "before"),
            ("After: ", target, "after"),
            ("Quantised:", quantised, "after"),
        ):
            if folder is not None and (figure := self.recorded(folder, when)) is not None:
                console.print(f"{label:10} {_described(figure)}", markup=False, soft_wrap=True)

    def _protocol(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.text.read_bytes()).hexdigest()
        return {"corpus_sha256": digest, "tokens_asked": self.tokens}


def parse_measurement(
    source: Path, target: Path | None, text: Path | None, tokens: int | None, *, as_json: bool
) -> Measurement | None:
    """The measurement that --eval and --eval-tokens ask for; None without them. Refuses what cannot be measured."""
    if text is None and tokens is not None:
        raise typer.BadParameter("requires --eval", param_hint="--eval-tokens")
    if text is None:
        return None
    if target is None:
        raise typer.BadParameter("does not work with --dry-run, which writes nothing to measure", param_hint="--eval")
    if is_function(source):
        raise typer.BadParameter("requires a transformers model, with its tokenizer", param_hint="--eval")
    return Measurement(text, tokens, as_json)


def measured(
    model: Path, text: Path, *, context: int | None = None, stride: int | None = None, tokens: int | None = None
) -> tuple[Perplexity, str]:
    """The perplexity of a transformers model on disk, and the dtype in which it ran."""
    from bisparse.cli.model_source import open_source
    from bisparse.evaluation import text_perplexity

    source = open_source(str(model))
    figure = text_perplexity(source.model, source.tokenizer, text, context=context, stride=stride, tokens=tokens)
    return figure, str(next(source.model.parameters()).dtype).removeprefix("torch.")


def _described(figure: Mapping[str, Any]) -> str:
    from bisparse.evaluation import Perplexity

    counts = (figure[key] for key in ("windows", "scored", "tokens", "context", "stride", "corpus"))
    return str(Perplexity(figure["nats_per_token"], figure["nats_per_token_error"], *counts))
