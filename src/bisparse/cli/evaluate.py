"""`bisparse eval`: measures a model, and states the protocol with every figure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bisparse.cli.console import AsJson, Threads, command, print_json, set_threads, to_stdout

if TYPE_CHECKING:
    from torch import Tensor

    from bisparse.cli.model_source import Source

__all__ = ["evaluate"]

LARGEST_DEFAULT = 512
"""The context without --context, unless the model has fewer positions, which is known once it is loaded."""


@command
def evaluate(
    model: Annotated[str, typer.Argument(help="A transformers folder, a .gguf file, or module:function that returns a model.")],
    text: Annotated[
        Path | None, typer.Option("--text", exists=True, dir_okay=False, help="Perplexity of a causal model on this text.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per window of --text; by default 512, or the model's positions if these are fewer."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens between the starts of two windows of --text; by default the context, without overlap."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Read only this many tokens of --text.")] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            "--pairs",
            exists=True,
            dir_okay=False,
            help="Spearman correlation with the scores of these sentence pairs, mean pooling: tab-separated score, sentence, "
            "sentence, or the columns of STS-B.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", exists=True, dir_okay=False, help="Inputs of a classifier, samples first: a .npy file."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", exists=True, dir_okay=False, help="Accuracy: the classes of --images, a .npy file.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="Measure how often this model gives the same class for --images."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="TASK", help="A task of lm-eval, which must be installed. May be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples per task of lm-eval.")] = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record", help="Write the figures into bisparse.json and README.md of MODEL, a folder that bisparse wrote."
        ),
    ] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model: perplexity, sentence similarity, classification, or tasks of lm-eval; each figure with its protocol."""
    _check(text, stride, context, tokens, pairs, images, labels, against, tasks, limit)
    if record:
        _check_record(model)
    set_threads(threads)
    from bisparse.cli.model_source import open_source

    inputs = None if images is None else _array(images, "--images")
    classes = None if labels is None else _array(labels, "--labels")
    words = bool(text or pairs or tasks)
    source = open_source(model, tokenizer=words)
    if words and source.tokenizer is None:
        raise typer.BadParameter(f"{model} has no tokenizer: --text, --pairs and --tasks need a transformers model")
    found = _text_figures(source, text, context, stride, tokens, pairs, tasks, limit)
    if inputs is not None and images is not None:
        found += _image_figures(source, inputs, classes, against, images.name)
    dtype = str(next(source.model.parameters()).dtype).removeprefix("torch.")
    figures = [{**one.as_dict(), "dtype": dtype} for one in found]
    if record:
        from bisparse.checkpoint import record_evaluation

        record_evaluation(model, figures)
    if as_json:
        print_json({"ok": True, "model": model, "figures": figures})
        return
    for one in found:
        to_stdout().print(str(one), markup=False, soft_wrap=True)


def _text_figures(
    source: Source,
    text: Path | None,
    context: int | None,
    stride: int | None,
    tokens: int | None,
    pairs: Path | None,
    tasks: list[str] | None,
    limit: int | None,
) -> list[Any]:
    from bisparse.evaluation import read_pairs, run_tasks, similarity, text_perplexity

    found: list[Any] = []
    if pairs is not None:
        found.append(similarity(source.model, source.tokenizer, read_pairs(pairs), corpus=pairs.name))
    if text is not None:
        found.append(text_perplexity(source.model, source.tokenizer, text, context=context, stride=stride, tokens=tokens))
    if tasks:
        found.append(_installed(lambda: run_tasks(source.model, source.tokenizer, tasks, limit=limit)))
    return found


def _image_figures(source: Source, inputs: Tensor, classes: Tensor | None, against: str | None, corpus: str) -> list[Any]:
    from bisparse.cli.model_source import open_source
    from bisparse.evaluation import agreement, classification

    found: list[Any] = []
    dtype = next(source.model.parameters()).dtype
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    if classes is not None:
        found.append(classification(source.model, inputs, classes, corpus=corpus))
    if against is not None:
        other = open_source(against, tokenizer=False).model.to(dtype)
        found.append(agreement(source.model, other, inputs, against=Path(against).name, corpus=corpus))
    return found


def _check(
    text: Path | None,
    stride: int | None,
    context: int | None,
    tokens: int | None,
    pairs: Path | None,
    images: Path | None,
    labels: Path | None,
    against: str | None,
    tasks: list[str] | None,
    limit: int | None,
) -> None:
    """Refuse options that do not work together or measure nothing, before a model is loaded."""
    if not (text or pairs or images or tasks):
        raise typer.BadParameter("nothing to measure; pass --text, --pairs, --images or --tasks")
    for hint, given, needed, other in (
        ("--tokens", tokens, text, "--text"),
        ("--stride", stride, text, "--text"),
        ("--context", context, text, "--text"),
        ("--labels", labels, images, "--images"),
        ("--against", against, images, "--images"),
        ("--limit", limit, tasks, "--tasks"),
    ):
        if given is not None and not needed:
            raise typer.BadParameter(f"requires {other}", param_hint=hint)
    if images is not None and labels is None and against is None:
        raise typer.BadParameter("requires --labels, --against or both", param_hint="--images")
    if stride is not None and stride > (context or LARGEST_DEFAULT):
        raise typer.BadParameter(
            f"{stride} is more than the context of {context or LARGEST_DEFAULT}: tokens would be left out", param_hint="--stride"
        )
    if tokens is not None and context is not None and tokens < context:
        raise typer.BadParameter(f"{tokens} tokens are fewer than one window of {context}", param_hint="--tokens")


def _check_record(model: str) -> None:
    from bisparse.checkpoint import read_sidecar

    if read_sidecar(model) is None:
        raise typer.BadParameter(f"{model} has no bisparse.json to record figures in", param_hint="--record")


def _array(path: Path, hint: str) -> Tensor:
    """The array of a .npy file, as a tensor; wrong use if it cannot be read."""
    import numpy as np
    import torch

    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it holds more than one array")
        return torch.from_numpy(array)
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise typer.BadParameter(f"{path} is not a .npy file of numbers ({error})", param_hint=hint) from error


def _installed(run: Callable[[], Any]) -> Any:
    """The result of a function; if it needs a package that is not installed, a one-line error."""
    try:
        return run()
    except ImportError as error:
        raise ValueError(str(error)) from error
