"""Pruning with calibration data: a sentence encoder, a language model, an image classifier, and the 10 % law."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import mean, stdev
from typing import Any

from sections.markdown import provenance, table, verdict

Row = dict[str, Any]


def unmeasured(command: str) -> str:
    return f"Not measured yet: `python benchmarks/pruning/{command}`.\n"


def grid(rows: Iterable[Row], down: Callable[[Row], str], across: Callable[[Row], str], figure: str, digits: int) -> str:
    """Rows of one figure by two properties; several seeds as mean and deviation."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault(down(row), {}).setdefault(across(row), []).append(row[figure])
    columns = list(dict.fromkeys(column for line in found.values() for column in line))
    body = [[name, *(_spread(line.get(column, []), digits) for column in columns)] for name, line in found.items()]
    return table(["", *columns], body)


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    text = f"{mean(values):,.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def sentences(rows: list[Row]) -> list[str]:
    """all-MiniLM-L6-v2 on STS-B."""
    parts = ["## Pruning a sentence encoder with data\n"]
    if not rows:
        return [*parts, unmeasured("minilm.py")]
    dense = next(row["spearman"] for row in rows if row["pattern"] == "dense")
    rows = [row for row in rows if row["pattern"] != "dense"]
    parts += [
        f"all-MiniLM-L6-v2, Spearman correlation on STS-B test; dense {dense:.4f}. Calibration: sentences of the corpus named.\n"
    ]
    parts += [
        grid(rows, lambda r: r["method"] + (f", {r['corpus']} {r['count']}" if r["corpus"] else ""), by_pattern, "spearman", 4)
    ]
    for corpus, aim in (("sts-train", dense), ("foreign", 0.81)):
        best = max((row["spearman"] for row in rows if row["corpus"] == corpus and row["pattern"] == "4:8-T"), default=None)
        if best is not None:
            parts += [f"Best 4:8-T calibrated on {corpus}: {best:.4f}; the aim, {aim:.4f}, is {verdict(best >= aim)}.\n"]
    return [*parts, provenance(rows)]


def language(rows: list[Row]) -> list[str]:
    """SmolLM2 on WikiText-2."""
    parts = ["## Pruning a language model with data\n"]
    if not rows:
        return [*parts, unmeasured("smollm.py")]
    dense = next(row["perplexity"] for row in rows if row["pattern"] == "dense")
    rows = [row for row in rows if row["pattern"] != "dense"]
    parts += [f"{rows[0]['model']}; perplexity on {rows[0]['tokens']:,} tokens of WikiText-2, context 512; dense {dense:.1f}.\n"]

    def data(row: Row) -> str:
        return f"{row['method']}, {row['sequences']} of {row['corpus']}" if "sequences" in row else str(row["method"])

    parts += [grid(rows, data, by_pattern, "perplexity", 1)]
    for pattern, aim in (("16:32-T", 60.0), ("4:8-T", 100.0)):
        best = min((row for row in rows if row["pattern"] == pattern), key=lambda row: row["perplexity"], default=None)
        if best is not None:
            met = verdict(best["perplexity"] < aim)
            parts += [f"Best {pattern}: {best['perplexity']:.1f} by {best['method']}; under {aim:.0f}: {met}.\n"]
    return [*parts, provenance(rows)]


def images(rows: list[Row]) -> list[str]:
    """ResNet-20, the paper's comparison."""
    parts = ["## Changing the mask of an image classifier\n"]
    if not rows:
        return [*parts, unmeasured("resnet.py")]
    origins = ", ".join(f"{row['origin']} {row['accuracy']:.2f}" for row in rows if row["to"] is None)
    parts += [f"ResNet-20 on Fashion-MNIST, top-1 in per cent. Before conversion: {origins}. 400 calibration images a seed.\n"]
    converted = [row for row in rows if row["to"] is not None]
    for norms in ("as they were", "re-estimated"):
        chosen = [row for row in converted if row["batch_norms"] == norms]
        parts += [f"**Batch norms {norms}**\n"]
        parts += [grid(chosen, lambda row: row["method"], lambda row: f"{row['origin']} -> {row['to']}", "accuracy", 2)]
    parts += ["**Seconds**\n"]
    chosen = [row for row in converted if row["batch_norms"] == "re-estimated"]
    parts += [grid(chosen, lambda row: row["method"], lambda row: f"{row['origin']} -> {row['to']}", "seconds", 1)]
    return [*parts, provenance(rows)]


def law(rows: list[Row]) -> list[str]:
    """Accuracy against pattern violation."""
    parts = ["## The 10 % law\n"]
    if not rows:
        return [*parts, unmeasured("law.py")]
    start = {row["origin_density"]: row["accuracy"] for row in rows if row["to"] is None}
    converted = [dict(row, loss=start[row["origin_density"]] - row["accuracy"]) for row in rows if row["to"] is not None]
    parts += ["Top-1 lost, in points, by a network of some violation v_w that is converted without training.\n"]
    for to in dict.fromkeys(row["to"] for row in converted):
        chosen = sorted((row for row in converted if row["to"] == to), key=lambda row: row["violated_weights"])
        parts += [f"**To {to}**\n"]
        parts += [grid(chosen, lambda row: f"{100 * row['violated_weights']:.1f} %", lambda row: row["method"], "loss", 2)]
        for method in dict.fromkeys(row["method"] for row in chosen):
            held = [row["violated_weights"] for row in chosen if row["method"] == method and row["loss"] <= 1]
            broken = [row["violated_weights"] for row in chosen if row["method"] == method and row["loss"] > 1]
            upto = max((one for one in held if not broken or one < min(broken)), default=0.0)
            parts += [f"{method}: loses at most one point up to {100 * upto:.0f} % violation.\n"]
    return [*parts, provenance(rows)]


def depthwise(rows: list[Row]) -> list[str]:
    """EfficientNet-lite0."""
    parts = ["## A network with depthwise convolutions\n"]
    chosen = [row for row in rows if "pattern" in row]
    if not chosen:
        return [*parts, unmeasured("efficientnet.py")]
    heads = ["EfficientNet-lite0", "to", "layers", "left dense", "mean layer error masked", "now", "same class as dense", "s"]
    body = [
        [
            row["method"], row["pattern"], str(row["layers"]), str(row["left_dense"]),
            "" if row["mean_error_before"] is None else f"{row['mean_error_before']:.3f}",
            "" if row["mean_error"] is None else f"{row['mean_error']:.3f}", f"{row['same_class']:.2f}", f"{row['seconds']:.0f}",
        ]
        for row in chosen
    ]  # fmt: skip
    return [*parts, table(heads, body, 2), provenance(chosen)]


def by_pattern(row: Row) -> str:
    return str(row["pattern"])
