"""Sparse training: accuracy of networks, what mask search costs, curves of a language model, fine-tuning."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from bisparse.diversity import mask_diversity
from record import ROOT
from sections.markdown import table

CURVES = ROOT / "docs" / "images" / "training-gpt.svg"
DIVERSITY = ("50%", "4:8", "2:4", "4:8-T", "2:4-T", "4:8-seq")
REFRESHES = (1, 10, 40, 100)
TARGETS = {40: 0.01, 1: 0.05}


def spread(numbers: Sequence[float], scale: float = 100, digits: int = 2) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    if not numbers:
        return "-"
    mean = f"{scale * statistics.mean(numbers):.{digits}f}"
    return mean if len(numbers) < 2 else f"{mean} ± {scale * statistics.stdev(numbers):.{digits}f}"


def _budget(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    how = first["recipe"]["training"]
    length = f"{how['steps']} steps" if how["steps"] else f"{how['epochs']:g} epochs"
    seeds = len({row["recipe"]["seed"] for row in rows})
    return (
        f"{first['data']}; {length}, batches of {how['batch']}, {seeds} seeds, {first['steps']} optimizer steps a run. "
        f"{first['device']}, torch {first['versions']['torch']}.\n"
    )


def training_resnet(everything: list[dict[str, Any]]) -> list[str]:
    """Accuracy by structure and method."""
    parts = ["## Sparse training: ResNet-20 on Fashion-MNIST\n"]
    budgets: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in everything:
        budgets[
            json.dumps([row["recipe"]["data"], row["recipe"]["training"], row["recipe"]["model"]["width"]], sort_keys=True)
        ].append(row)
    if not budgets:
        return [*parts, "Not measured yet: `python benchmarks/training/resnet.py`.\n"]
    for rows in budgets.values():
        parts += _resnet_budget(rows)
    return parts


def _resnet_budget(rows: list[dict[str, Any]]) -> list[str]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        how = row["recipe"]["sparsity"]
        if how is None:
            kind: tuple[Any, ...] = ("dense, trained on",) if row["recipe"]["model"]["start"] else ("dense",)
        else:
            kind = (how["pattern"], how["mode"], how["method"], how["solver"], how["refresh"])
        found[kind].append(row)

    def accuracy(kind: tuple[Any, ...]) -> list[float]:
        return [row["test_accuracy"] for row in found.get(kind, [])]

    def dynamic(pattern: str, method: str = "masked-decay", solver: str = "exact", refresh: int = 40) -> tuple[Any, ...]:
        return (pattern, "dynamic", method, solver, refresh)

    parts = [
        _budget(rows),
        "Test accuracy, %. Static runs start from the dense network and train as long again, as does the second dense row; "
        "dynamic runs start from scratch.\n",
    ]
    patterns = ("2:4", "2:4-T", "4:8-T", "16:32-T")
    body = [[name, spread(accuracy((name,))), "", "", ""] for name in ("dense", "dense, trained on")]
    body.append(["static, from dense", *(spread(accuracy((one, "static", "masked-decay", "exact", 40))) for one in patterns)])
    for label, method in (("STE", "ste"), ("SR-STE", "sr-ste"), ("masked decay", "masked-decay")):
        body.append([f"dynamic, {label}", *(spread(accuracy(dynamic(one, method))) for one in patterns)])
    body.append(["dynamic, masked decay, greedy masks", *(spread(accuracy(dynamic(one, solver="greedy"))) for one in patterns)])
    parts.append(table(("", *patterns), body))
    density = {one: [row["density"] for row in found.get(dynamic(one), [])] for one in patterns}
    shown = ", ".join(f"{one} {statistics.mean(numbers):.3f}" for one, numbers in density.items() if numbers)
    parts.append(
        f"Density of the sparse layers (16 channels do not fill a tile of 32, whose padding counts as pruned): {shown}.\n"
    )
    parts += _claim(accuracy)
    flips = {one: [row["flip_rate"] for row in found.get(dynamic("4:8-T", refresh=one), [])] for one in REFRESHES}
    parts.append("### How often masks are refreshed (4:8-T, masked decay)\n")
    parts.append(
        table(
            ("", *(f"every {one}" for one in REFRESHES)),
            [
                ["test accuracy, %", *(spread(accuracy(dynamic("4:8-T", refresh=one))) for one in REFRESHES)],
                ["last flip rate, %", *(spread(flips[one], digits=3) for one in REFRESHES)],
            ],
        )
    )
    parts.append("### Does accuracy follow mask diversity? (masked decay, 50 %)\n")
    measured = [one for one in DIVERSITY if accuracy(dynamic(one))]
    bits = {one: [mask_diversity(one, (64, 64), method=how).log2_per_weight for how in ("exact", "paper")] for one in measured}
    parts.append(
        table(
            ("structure", "bits a weight, exact", "paper's formula", "test accuracy, %"),
            [[one, *(f"{number:.3f}" for number in bits[one]), spread(accuracy(dynamic(one)))] for one in measured],
        )
    )
    if len(measured) > 2:
        means = [statistics.mean(accuracy(dynamic(one))) for one in measured]
        ranks = [spearmanr([bits[one][how] for one in measured], means).statistic for how in (0, 1)]
        parts.append(
            f"Rank correlation with accuracy: {ranks[0]:.2f} by the exact count, {ranks[1]:.2f} by the paper's formula.\n"
        )
    return parts


def _claim(accuracy: Any) -> list[str]:
    """Differences of paired seeds: 4:8-T against dense training as long, and against 2:4 found the same way."""

    def against(kind: tuple[Any, ...], others: dict[str, tuple[Any, ...]]) -> str:
        lines = []
        for name, other in others.items():
            ours, theirs = accuracy(kind), accuracy(other)
            if len(ours) > 1 and len(theirs) == len(ours):
                differences = [100 * (one - another) for one, another in zip(ours, theirs, strict=True)]
                error = statistics.stdev(differences) / len(differences) ** 0.5
                lines.append(f"{statistics.mean(differences):+.2f} ± {error:.2f} points against {name}")
        return ", ".join(lines)

    def kind(pattern: str, mode: str) -> tuple[Any, ...]:
        return (pattern, mode, "masked-decay", "exact", 40)

    claims = {
        "static": against(kind("4:8-T", "static"), {"dense, trained on": ("dense, trained on",), "2:4": kind("2:4", "static")}),
        "dynamic": against(
            kind("4:8-T", "dynamic"),
            {"dense": ("dense",), "2:4": kind("2:4", "dynamic"), "unstructured 50 %": kind("50%", "dynamic")},
        ),
    }
    said = "; ".join(f"{mode} {claim}" for mode, claim in claims.items() if claim)
    return (
        [f"The paper's claim is that 4:8-T loses nothing. Here (same seeds, mean and standard error): {said}.\n"] if said else []
    )


def training_search(rows: list[dict[str, Any]]) -> list[str]:
    """The share of training time that goes to the search of masks."""
    parts = [
        "## Sparse training: what mask search costs\n",
        "Share of training time, search / (k steps + search). The paper's figures at every 40 steps, as time added on top, are "
        "180 % integer program, 70 % min-cost flow, 14 % approximation. The target is under 1 % at every 40 and under 5 % at "
        "every step.\n",
    ]
    newest = {(row["model"], row["pattern"], row["solver"], row["threads"], row["batch"]): row for row in rows}
    if not newest:
        return [*parts, "Not measured yet: `python benchmarks/training/search_cost.py`.\n"]
    body = [
        [
            f"{row['model']}, batch {row['batch']}", row["pattern"], row["solver"], str(row["threads"]),
            f"{row['step_ms']:.0f}", f"{row['search_ms']:.2f}",
            f"{100 * row['share_every_40']:.3f}", f"{100 * row['share_every_1']:.2f}",
        ]
        for row in newest.values()
    ]  # fmt: skip
    parts.append(
        table(("model", "pattern", "solver", "threads", "step, ms", "search, ms", "every 40 steps, %", "every step, %"), body)
    )
    last = rows[-1]
    parts.append(f"{last['device']}, {last['vector']}, {last['cores']} cores, torch {last['versions']['torch']}. Medians.\n")
    return parts


def training_gpt(rows: list[dict[str, Any]]) -> list[str]:
    """Loss and flip rates of a language model; the curves are a picture beside the page."""
    parts = ["## Sparse training: a small GPT on text\n"]
    if not rows:
        return [*parts, "Not measured yet: `python benchmarks/training/gpt.py`.\n"]
    names = list(dict.fromkeys(row["recipe"]["name"] for row in rows))
    body = []
    for name in names:
        own = [row for row in rows if row["recipe"]["name"] == name]
        body.append(
            [name, spread([row["test_loss"] for row in own], 1, 4), spread([row["test_accuracy"] for row in own]),
             spread([row["flip_rate"] for row in own if row["recipe"]["sparsity"]], digits=3)]
        )  # fmt: skip
    parts += [_budget(rows), table(("", "test loss, nats a byte", "bytes right, %", "last flip rate, %"), body)]
    parts.append("![Training loss and flip rate](images/training-gpt.svg)\n")
    return parts


def training_finetune(rows: list[dict[str, Any]]) -> list[str]:
    """Static masks through the transformers Trainer."""
    parts = ["## Sparse training: fine-tuning with static masks through the transformers Trainer\n"]
    if not rows:
        return [*parts, "Not measured yet: `python benchmarks/training/finetune.py`.\n"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["model"], row["pattern"], row["steps"]].append(row)
    body = []
    for (task, model, pattern, steps), own in groups.items():
        digits = 4 if task == "sts" else 2
        verified = "" if pattern == "dense" else f"{sum(row['verified'] for row in own)} of {len(own)}"
        columns = [spread([row[one] for row in own if one in row], 1, digits) for one in ("before", "pruned", "after")]
        body.append([f"{model}, {task}", pattern, str(steps), *columns, verified])
    head = ("model", "pattern", "steps", "before", "pruned, not tuned", "tuned", "`bisparse verify` holds")
    parts.append("sts: Spearman correlation on STS-B test, higher is better. text: perplexity, lower is better.\n")
    return [*parts, table(head, body)]


def draw_gpt(rows: list[dict[str, Any]], path: Path = CURVES) -> None:
    """Mean training loss and flip rate of the GPT runs."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "bisparse"
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, flips = figure.subplots(1, 2)
    for index, name in enumerate(dict.fromkeys(row["recipe"]["name"] for row in rows)):
        curves = [row["curve"] for row in rows if row["recipe"]["name"] == name]
        style = {"linestyle": "--" if "MVUE" in name else "-", "linewidth": 1, "label": name, "color": f"C{index}"}
        points = list(zip(*curves, strict=False))
        loss.plot([p[0]["step"] for p in points], [statistics.mean(one["loss"] for one in p) for p in points], **style)
        moved = [p for p in points if all(one.get("flip_rate", 0) > 0 for one in p)]
        if moved:
            flips.plot([p[0]["step"] for p in moved], [statistics.mean(one["flip_rate"] for one in p) for p in moved], **style)
    loss.set(xlabel="optimizer steps", ylabel="training loss, nats a byte")
    flips.set(xlabel="optimizer steps", ylabel="flip rate a refresh", yscale="log")
    loss.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
