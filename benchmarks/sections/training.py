"""Sparse training: accuracy of networks, what mask search costs, curves of a language model, fine-tuning."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from scipy.stats import spearmanr

from bisparse.diversity import mask_diversity
from sections.markdown import table

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
    model = first["recipe"]["model"]
    shape = f", {model['layers']} blocks" if model["kind"] == "gpt" else ""
    return (
        f"{first['data']}; {model['kind']} of width {model['width']}{shape}; {length}, batches of {how['batch']}, "
        f"{how.get('precision', 'float32')}, {seeds} seeds, {first['steps']} optimizer steps per run. "
        f"{first['device']}, torch {first['versions']['torch']}.\n"
    )


def by_budget(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of the same data, training and model size together, the shortest runs first."""
    budgets: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        recipe = row["recipe"]
        model = recipe["model"] | {"start": ""}
        training = {"precision": "float32"} | recipe["training"]
        budgets[json.dumps([recipe["data"], training, model], sort_keys=True)].append(row)
    return sorted(budgets.values(), key=lambda own: own[0]["steps"] * own[0]["recipe"]["training"]["batch"])


def training_resnet(everything: list[dict[str, Any]]) -> list[str]:
    """Accuracy by structure and method."""
    parts = ["## Sparse training: ResNet-20 on Fashion-MNIST\n"]
    if not everything:
        return [*parts, "Not measured yet: `python benchmarks/training/resnet.py`.\n"]
    for rows in by_budget(everything):
        parts.append(f"### {rows[0]['recipe']['data']['train']} images, {rows[0]['steps']} steps\n")
        parts += _resnet_budget(rows)
    return parts


def _resnet_budget(rows: list[dict[str, Any]]) -> list[str]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        how = row["recipe"]["sparsity"]
        if row["study"] in ("control", "total decay"):
            continue
        if how is None:
            kind: tuple[Any, ...] = ("dense, trained on",) if row["recipe"]["model"]["start"] else ("dense",)
        else:
            kind = (how["pattern"], how["mode"], how["method"], how["solver"], how["refresh"])
        found[kind].append(row)

    def accuracy(kind: tuple[Any, ...]) -> list[float]:
        return [row["test_accuracy"] for row in found.get(kind, [])]

    def cell(kind: tuple[Any, ...]) -> str:
        runs = len(accuracy(kind))
        return spread(accuracy(kind)) + (f" ({runs} of {seeds} runs)" if 0 < runs < seeds else "")

    seeds = len({row["recipe"]["seed"] for row in rows})

    def dynamic(pattern: str, method: str = "masked-decay", solver: str = "exact", refresh: int = 40) -> tuple[Any, ...]:
        return (pattern, "dynamic", method, solver, refresh)

    parts = [
        _budget(rows),
        "Test accuracy, %. Static runs start from the dense network and train as long again, as does the second dense row; "
        "dynamic runs start from scratch. Their decay is the fixed lambda of 2e-4 that Zhou et al. used on ImageNet, far too "
        "weak for runs as short as these; what `sparsify_` does by default, a total of 5, is in the table of totals.\n",
    ]
    patterns = ("2:4", "2:4-T", "4:8-T", "16:32-T")
    body = [[name, cell((name,)), "", "", ""] for name in ("dense", "dense, trained on")]
    body.append(["static, from dense", *(cell((one, "static", "masked-decay", "exact", 40)) for one in patterns)])
    for label, method in (("STE", "ste"), ("SR-STE", "sr-ste"), ("masked decay 2e-4", "masked-decay")):
        body.append([f"dynamic, {label}", *(cell(dynamic(one, method)) for one in patterns)])
    body.append(["dynamic, masked decay 2e-4, greedy masks", *(cell(dynamic(one, solver="greedy")) for one in patterns)])
    parts.append(table(("", *patterns), [line for line in body if set(line[1:]) - {"", "-"}]))
    density = {one: [row["density"] for row in found.get(dynamic(one), [])] for one in patterns}
    shown = ", ".join(f"{one} {statistics.mean(numbers):.3f}" for one, numbers in density.items() if numbers)
    parts.append(
        f"Density of the sparse layers (16 channels do not fill a tile of 32, whose padding counts as pruned): {shown}.\n"
    )
    parts += _claim(accuracy)
    if sum(bool(accuracy(dynamic("4:8-T", refresh=one))) for one in REFRESHES) > 1:
        parts += _refreshes(found, dynamic)
    parts += _total_decay(rows)
    measured = [one for one in DIVERSITY if accuracy(dynamic(one))]
    if len(measured) == len(DIVERSITY):
        parts += _diversity({one: accuracy(dynamic(one)) for one in measured})
    return parts


def _total_decay(rows: list[dict[str, Any]]) -> list[str]:
    """The decay as a total over the run, against dense runs and against a fixed mask of the random initial weights."""
    studies = {"control", "total decay"}
    chosen = [row["recipe"]["sparsity"] | {"name": row["recipe"]["name"]} for row in rows if row["study"] in studies]
    chosen.sort(key=lambda one: (one["pattern"], one["total_decay"], one["name"]))
    names = list(dict.fromkeys((one["pattern"], one["name"]) for one in chosen))
    if not names:
        return []
    dense = {row["recipe"]["seed"]: row for row in rows if row["study"] == "dense"}
    body = []
    for pattern, name in names:
        own = [row for row in rows if row["recipe"]["name"] == name and row["study"] in studies]
        pairs = [(row, dense[row["recipe"]["seed"]]) for row in own if row["recipe"]["seed"] in dense]
        change = [100 * (row["test_accuracy"] - other["test_accuracy"]) for row, other in pairs]
        error = f" ± {statistics.stdev(change) / len(change) ** 0.5:.2f}" if len(change) > 1 else ""
        body.append(
            [
                pattern,
                name.removesuffix(f" {pattern}"),
                spread([row["test_accuracy"] for row in own]),
                f"{statistics.mean(change):+.2f}{error}" if change else "-",
                f"{statistics.mean(row['test_loss'] for row in own):.4f}",
                f"{statistics.mean(row['flip_rate'] for row in own):.1e}" if "fixed" not in name else "",
                str(len(own)),
            ]
        )
    return [
        "#### Decay as a total over the run\n",
        "Masked decay, a refresh every 40 steps. The total is lambda times the sum of learning rates; 5 is the default of "
        "`sparsify_`. A fixed random mask is the best mask of the initial weights, kept. Differences to dense: paired by seed, "
        "mean and standard error.\n",
        table(("pattern", "run", "test accuracy, %", "against dense", "test loss", "last flip rate", "runs"), body),
    ]


def _refreshes(found: dict[tuple[Any, ...], list[dict[str, Any]]], dynamic: Any) -> list[str]:
    runs = [found.get(dynamic("4:8-T", refresh=one), []) for one in REFRESHES]
    body = [
        ["test accuracy, %", *(spread([row["test_accuracy"] for row in own]) for own in runs)],
        ["last flip rate, %", *(spread([row["flip_rate"] for row in own], digits=3) for own in runs)],
    ]
    return [
        "#### How often masks are refreshed (4:8-T, masked decay 2e-4)\n",
        table(("", *(f"every {one}" for one in REFRESHES)), body),
    ]


def _diversity(accuracies: dict[str, list[float]]) -> list[str]:
    bits = {one: [mask_diversity(one, (64, 64), method=how).log2_per_weight for how in ("exact", "paper")] for one in accuracies}
    body = [[one, *(f"{number:.3f}" for number in bits[one]), spread(own)] for one, own in accuracies.items()]
    means = [statistics.mean(own) for own in accuracies.values()]
    ranks = [spearmanr([bits[one][how] for one in accuracies], means).statistic for how in (0, 1)]
    return [
        "#### Does accuracy follow mask diversity? (masked decay 2e-4, 50 %)\n",
        table(("structure", "bits per weight, exact", "paper's formula", "test accuracy, %"), body),
        f"Rank correlation with accuracy: {ranks[0]:.2f} by the exact count, {ranks[1]:.2f} by the paper's formula.\n",
    ]


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
        "dynamic with a decay of 2e-4": against(
            kind("4:8-T", "dynamic"),
            {"dense": ("dense",), "2:4": kind("2:4", "dynamic"), "unstructured 50 %": kind("50%", "dynamic")},
        ),
    }
    said = "; ".join(f"{mode} {claim}" for mode, claim in claims.items() if claim)
    return (
        [f"The paper's claim is that 4:8-T loses nothing. Here (same seeds, mean and standard error): {said}.\n"] if said else []
    )


def training_search(rows: list[dict[str, Any]]) -> list[str]:
    """The fraction of training time spent on mask search."""
    parts = [
        "## Sparse training: what mask search costs\n",
        "Fraction of training time: search / (k steps + search). The paper's figures at every 40 steps, as added time, are "
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
    parts.append("CPU time with one thread, elapsed time with more.\n")
    parts.append(f"{last['device']}, {last['vector']}, {last['cores']} cores, torch {last['versions']['torch']}. Medians.\n")
    return parts


def training_gpt(rows: list[dict[str, Any]]) -> list[str]:
    """Loss and flip rates of a language model; the curves are in a picture."""
    parts = ["## Sparse training: a small GPT on text\n"]
    if not rows:
        return [*parts, "Not measured yet: `python benchmarks/training/gpt.py`.\n"]
    for budget in by_budget([row for row in rows if row["study"] == "gpt"]):
        body = []
        for name in dict.fromkeys(row["recipe"]["name"] for row in budget):
            own = [row for row in budget if row["recipe"]["name"] == name]
            body.append(
                [name, str(len(own)), spread([row["test_loss"] for row in own], 1, 4),
                 spread([row["test_accuracy"] for row in own]),
                 spread([_mean_flip_rate(row) for row in own if row["recipe"]["sparsity"]]),
                 spread([row["flip_rate"] for row in own if row["recipe"]["sparsity"]], digits=3)]
            )  # fmt: skip
        head = ("", "runs", "test loss, nats per byte", "bytes right, %", "mean flip rate per refresh, %", "at the last, %")
        parts += [_budget(budget), table(head, body)]
    parts.append("Of the longest runs:\n\n![Training loss and flip rate](../images/training-gpt.svg)\n")
    decays = [row for row in rows if row["study"] == "decay"]
    # The grid has the runs at 2e-4.
    parts += _decays([*decays, *(row for row in rows if _at_default(row))]) if decays else []
    return parts + _studies(rows)


def _at_default(row: dict[str, Any]) -> bool:
    return bool(row["study"] == "gpt" and row["recipe"]["name"] == "4:8-T")


def _mean_flip_rate(row: dict[str, Any]) -> float:
    return statistics.mean(point["flip_rate"] for point in row["curve"] if "flip_rate" in point)


def _decays(rows: list[dict[str, Any]]) -> list[str]:
    """Test loss and flip rate by the strength of masked decay."""
    parts = []
    for budget in by_budget(rows):
        by_decay: dict[float, list[dict[str, Any]]] = defaultdict(list)
        for row in budget:
            by_decay[row["recipe"]["sparsity"]["decay"]].append(row)
        if len(by_decay) < 2:
            continue
        body = [
            [f"{decay:g}", str(len(own)), spread([row["test_loss"] for row in own], 1, 4),
             spread([_mean_flip_rate(row) for row in own])]
            for decay, own in sorted(by_decay.items())
        ]  # fmt: skip
        parts += [
            f"### Masked decay with AdamW: lambda at 4:8-T, {budget[0]['steps']} steps\n",
            _budget(budget),
            table(("lambda", "runs", "test loss, nats per byte", "mean flip rate per refresh, %"), body),
        ]
    return parts


def _against_dense(rows: list[dict[str, Any]], study: str) -> list[list[str]]:
    """A row for each recipe of a study: its loss, and the difference to dense runs, paired by seed."""
    chosen = [row for row in rows if row["study"] == study]
    dense = {
        (row["recipe"]["training"]["steps"], row["recipe"]["seed"]): row["test_loss"]
        for row in rows
        if row["study"] == "gpt" and row["recipe"]["sparsity"] is None
    }
    body = []
    for name in dict.fromkeys(row["recipe"]["name"] for row in chosen):
        own = [row for row in chosen if row["recipe"]["name"] == name]
        change = [row["test_loss"] - dense[row["recipe"]["training"]["steps"], row["recipe"]["seed"]] for row in own]
        error = f" ± {statistics.stdev(change) / len(change) ** 0.5:.4f}" if len(change) > 1 else ""
        losses = spread([row["test_loss"] for row in own], 1, 4)
        body.append([name, str(len(own)), losses, f"{statistics.mean(change):+.4f}{error}", f"{own[0]['flip_rate']:.1e}"])
    return body


STUDIES = {
    "total": (
        "Decay as a total with AdamW",
        "A refresh every 40 steps. The total is lambda times the sum of learning rates, applied outside of AdamW's moments "
        "(SR-STE); 5 is the default of `sparsify_`. A fixed random mask is the best mask of the initial weights, kept.",
    ),
    "rates": (
        "Learning rates of sparse weights with AdamW",
        "*Scaled rates*: the learning rate of sparse weights is the dense network's divided by the density, and their weight "
        "decay is multiplied by it (`parameter_groups`).",
    ),
    "rules": (
        "Gradient rules with AdamW",
        "A refresh every 40 steps; the length of the run is known, so the decay of SR-STE, masked decay and hysteresis "
        "(a margin of 0.1) is a total of 5, for which the first two are the same with AdamW. "
        "AST's lambda grows to 4e-4 inside of the moments.",
    ),
}
"""Title and text of the studies whose runs are compared with dense ones."""


def _studies(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each study, its recipes against dense runs."""
    parts = []
    for study, (title, text) in STUDIES.items():
        if body := _against_dense(rows, study):
            parts += [
                f"### {title}\n",
                f"{text} Differences to dense: paired by seed, mean and standard error.\n",
                table(("run", "runs", "test loss, nats per byte", "against dense", "flip rate at the last refresh"), body),
            ]
    return parts


def training_finetune(rows: list[dict[str, Any]]) -> list[str]:
    """Static masks through the transformers Trainer."""
    parts = ["## Sparse training: fine-tuning with static masks through the transformers Trainer\n"]
    if not rows:
        return [*parts, "Not measured yet: `python benchmarks/training/finetune.py`.\n"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        starts = {"adaprune": ", from AdaPrune", "alps": ", from ALPS", "alps, then the network": ", from ALPS, then the network"}
        how = row["pattern"] + starts.get(row.get("method", ""), "")
        how += f" in batches of {row['network_batch']} pairs" if row.get("network_batch") else ""
        how += ", scaled rates" if row.get("scale_lr") else ""
        groups[row["task"], row["model"], how, row["steps"], row["batch"], row.get("precision", "float32")].append(row)
    body = []
    for (task, model, pattern, steps, batch, precision), own in sorted(groups.items(), key=lambda one: (one[0][:2], one[0][3:])):
        digits = 4 if task == "sts" else 2
        verified = "" if pattern == "dense" else f"{sum(row['verified'] for row in own)} of {len(own)}"
        columns = [spread([row[one] for row in own if one in row], 1, digits) for one in ("before", "pruned", "after")]
        dense = {row["seed"]: row["after"] for row in groups.get((task, model, "dense", steps, batch, precision), [])}
        apart = [row["after"] - dense[row["seed"]] for row in own if pattern != "dense" and row["seed"] in dense]
        error = f" ± {statistics.stdev(apart) / len(apart) ** 0.5:.{digits}f}" if len(apart) > 1 else ""
        against = f"{statistics.mean(apart):+.{digits}f}{error}" if apart else ""
        body.append([f"{model}, {task}", pattern, f"{steps} of {batch}, {precision}", str(len(own)), *columns, against, verified])
    head = (
        "model",
        "pattern",
        "steps",
        "seeds",
        "before",
        "pruned, not tuned",
        "tuned",
        "minus dense",
        "`bisparse verify` holds",
    )
    parts.append(
        "sts: Spearman correlation on STS-B test, higher is better. text: perplexity, lower is better. *minus dense*: the mean "
        "difference from the dense model tuned alike with the same seeds, and its standard error.\n"
    )
    return [*parts, table(head, body)]


def training_teacher(rows: list[dict[str, Any]]) -> list[str]:
    """One-shot pruning, then training under the static mask with the dense model as a teacher."""
    parts = ["## Sparse training: SmolLM2-135M with a teacher\n"]
    if not rows:
        return [*parts, "Not measured yet: `python benchmarks/training/teacher.py`.\n"]
    body = [
        [row["pattern"], f"{row['method']}, {row['calibration']} sequences", row["loss"], str(row["steps"]),
         f"{row['trained_tokens']:,}", f"{row['cpu_s']:.0f}", f"{row['one_shot_perplexity']:.1f}", f"{row['perplexity']:.1f}"]
        for row in rows
    ]  # fmt: skip
    head = ("pattern", "one-shot", "loss", "steps", "tokens", "CPU seconds of training", "perplexity one-shot", "after")
    last = rows[-1]
    return [
        *parts,
        f"{last['model']}; perplexity on {last['tokens']:,} tokens of WikiText-2, context 512; dense 32.9. Calibration and "
        f"training on {last['text']} alone, {last['batch']} x {last['length']} tokens per step, AdamW at {last['lr']:g} with a "
        "cosine to zero, static masks, one run per row. logits: KL from the dense model in bfloat16; no labels.\n",
        table(head, body),
        f"{last['device']}, {last['cores']} cores, one thread, torch {last['versions']['torch']}; commit {last['commit']}; "
        f"{last['date'][:10]}.\n",
    ]
