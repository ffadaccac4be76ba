"""Pruning with calibration data: a sentence encoder, image classifiers, and the 10 % law."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import mean, stdev
from typing import Any

from sections.markdown import provenance, table, verdict

Row = dict[str, Any]

HELD_OUT = 400
"""Test images that layer errors of image classifiers are measured on."""


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
        seeds: dict[str, list[float]] = {}
        for row in rows:
            if row["corpus"] == corpus and row["pattern"] == "4:8-T":
                seeds.setdefault(f"{row['method']}, {row['count']} sentences", []).append(row["spearman"])
        if seeds:
            best = max(seeds, key=lambda name: mean(seeds[name]))
            found = mean(seeds[best])
            parts += [
                f"Best 4:8-T calibrated on {corpus}: {_spread(seeds[best], 4)} by {best}, {len(seeds[best])} draws; "
                f"the target, {aim:.4f}, is {verdict(found >= aim)}.\n"
            ]
    return [*parts, provenance(rows)]


def images(rows: list[Row]) -> list[str]:
    """ResNet-20, the paper's comparison."""
    parts = ["## Changing the mask of an image classifier\n"]
    if not rows:
        return [*parts, unmeasured("resnet.py")]
    origins = ", ".join(f"{row['origin']} {row['accuracy']:.2f}" for row in rows if row["to"] is None)
    parts += [f"{budget(rows[0])} Top-1 in per cent. Before conversion: {origins}. 400 calibration images per seed.\n"]
    converted = [row for row in rows if row["to"] is not None]
    for norms in ("as they were", "re-estimated"):
        chosen = [row for row in converted if row["batch_norms"] == norms]
        parts += [f"**Batch norms {norms}**\n"]
        parts += [grid(chosen, lambda row: row["method"], route, "accuracy", 2)]
    parts += [
        "Repairs of means alone lower every layer's error and can still lose accuracy while batch norms stay as they were: the "
        "outputs of a masked layer vary less than the dense one's, and with corrected means this adds up from layer to "
        "layer.\n",
        "**CPU seconds**, one thread\n",
    ]
    chosen = [row for row in converted if row["batch_norms"] == "re-estimated"]
    parts += [grid(chosen, lambda row: row["method"], route, "cpu_seconds", 1)]
    return [*parts, *gradient_against_least_squares(chosen), provenance(rows)]


ADAM, SAME, DEFAULT = "adaprune (a), Adam", "adaprune (b), same mask and inputs", "adaprune (b), default"
IN_A = 10
"""(b) has to be this many times as fast as (a)."""


def gradient_against_least_squares(rows: list[Row]) -> list[str]:
    """AdaPrune (b) against (a), on images that neither was fitted to."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(route(row), {}).setdefault(row["method"], []).append(row)
    found = {name: methods for name, methods in found.items() if ADAM in methods and (SAME in methods or DEFAULT in methods)}
    if not found:
        return []
    parts = [
        f"**AdaPrune: (a) by Adam, (b) as least squares.** Mean relative error of the layers' outputs on {HELD_OUT} test images. "
        "With the dense network's inputs (a) and (b) solve the same problem, on the same mask; by default (b) takes Wanda's mask "
        "and the inputs that the pruned network has, and is judged on those.\n"
    ]
    heads = [
        "", "seeds", "(a) error", "(b)", "(a) in the network", "(b) default", "(a) s", "(b) s", "(b) default s",
        "(b): lower, in a tenth of the time", "(b) default: the same",
    ]  # fmt: skip
    body = []
    for name, methods in found.items():
        error = {kind: [row["held_out_error"] for row in methods.get(kind, [])] for kind in (ADAM, SAME)}
        own = {kind: [row["held_out_error_own_inputs"] for row in methods.get(kind, [])] for kind in (ADAM, DEFAULT)}
        times = {kind: [row["cpu_seconds"] for row in methods.get(kind, [])] for kind in (ADAM, SAME, DEFAULT)}
        cells = [name, str(len(methods[ADAM])), *(_spread(one, 4) for one in (*error.values(), *own.values()))]
        cells += [_spread(one, 1) for one in times.values()]
        for kind, errors in ((SAME, error), (DEFAULT, own)):
            if not errors[kind]:
                cells.append("")
                continue
            lower = verdict(mean(errors[kind]) < mean(errors[ADAM]))
            factor = mean(times[ADAM]) / mean(times[kind])
            cells.append(f"{lower}, {verdict(factor >= IN_A)} ({factor:.0f} x)")
        body.append(cells)
    return [*parts, table(heads, body)]


def route(row: Row) -> str:
    return f"{row['origin']} -> {row['to']}"


FULL_SIDE = 28
REDUCED = " The images are reduced from 28 x 28 pixels, for a quarter of the work."
BREAKS = 1.0
"""Points of top-1 from which on a conversion counts as broken."""
PAPERS_LIMIT = 10
"""Per cent of pattern violation up to which, according to the paper, AdaPrune recovers the accuracy."""


def law(rows: list[Row]) -> list[str]:
    """Accuracy against pattern violation."""
    parts = ["## The 10 % law\n"]
    if not rows:
        return [*parts, unmeasured("law.py")]
    parts += [
        f"{budget(rows[0])} Top-1 lost, in points, by a network that violates the new pattern by v_w (the fraction of its "
        "kept weights "
        "that have to be dropped) and is converted without training.\n"
    ]
    tables: list[str] = []
    breaks: list[str] = []
    for title, losses in curves_of_law(rows).items():
        tables += [f"**{title[0].upper()}{title[1:]}**\n", *_law_of(losses)]
        found = "; ".join(f"{method} {_breaking(curve_of) or 'nowhere'}" for method, curve_of in losses.items())
        breaks.append(f"- {title}: {found}\n")
    parts += [
        "![Top-1 lost against the fraction of violated weights](../images/law.svg)\n",
        f'Where more than {BREAKS:g} point is lost, against the paper\'s "about {PAPERS_LIMIT} %" (dotted):\n',
        "".join(breaks),
        *tables,
    ]
    return [*parts, provenance(rows)]


def curves_of_law(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Points of top-1 lost by target pattern and treatment of batch norms, by method, by violation."""
    start = {row["origin_density"]: row["accuracy"] for row in rows if row["to"] is None}
    converted = [row for row in rows if row["to"] is not None]
    curves = {}
    for norms, field in (("as they were", "accuracy_norms_as_they_were"), ("re-estimated", "accuracy")):
        measured = [dict(row, loss=start[row["origin_density"]] - row[field]) for row in converted if field in row]
        for to in dict.fromkeys(row["to"] for row in measured):
            chosen = sorted((row for row in measured if row["to"] == to), key=lambda row: row["violated_weights"])
            curves[f"to {to}, batch norms {norms}"] = _losses(chosen)
    return curves


def _losses(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Mean loss by method and violation."""
    return {
        method: {
            at: mean(row["loss"] for row in rows if row["method"] == method and violated(row) == at)
            for at in dict.fromkeys(violated(row) for row in rows if row["method"] == method)
        }
        for method in dict.fromkeys(row["method"] for row in rows)
    }


def _breaking(losses: dict[str, float]) -> str | None:
    return next((at for at, loss in losses.items() if loss > BREAKS), None)


def _law_of(curves: dict[str, dict[str, float]]) -> list[str]:
    """One pattern: the table, and where each method breaks."""
    places = list(dict.fromkeys(at for losses in curves.values() for at in losses))
    body = [[at, *(f"{losses[at]:,.2f}" if at in losses else "" for losses in curves.values())] for at in places]
    parts = [table(["", *curves], body)]
    for method, losses in curves.items():
        breaking = _breaking(losses)
        held = [at for at in losses if breaking is None or list(losses).index(at) < list(losses).index(breaking)]
        where = f"breaks at {breaking}" if breaking else "does not break"
        within = [loss for at, loss in losses.items() if float(at.removesuffix(" %")) <= PAPERS_LIMIT]
        limit = f"; up to the paper's {PAPERS_LIMIT} % it loses at most {max(within):.2f}" if within else ""
        parts += [f"{method}: loses at most {BREAKS:g} point up to v_w = {held[-1] if held else '0 %'}, {where}{limit}.\n"]
    return parts


def violated(row: Row) -> str:
    return f"{100 * row['violated_weights']:.1f} %"


def budget(row: Row) -> str:
    """What the networks were trained and judged on, in a sentence."""
    return (
        f"ResNet-20 on Fashion-MNIST at {row['side']} x {row['side']} pixels, trained for {row['epochs']} epochs; sparse "
        f"ones for one more epoch on {row['tuning']:,} images; judged on {row['test_images']:,} test images, "
        f"all in {row['dtype']}; conversion in float32." + ("" if row["side"] == FULL_SIDE else REDUCED)
    )


def peers(rows: list[Row]) -> list[str]:
    """Layer errors against other libraries' own code."""
    parts = ["## One layer at 2:4 against other libraries\n"]
    chosen = [row for row in rows if "error" in row]
    if not chosen:
        return [*parts, unmeasured("peers.py")]
    parts += [
        f"Relative output error of layers of all-MiniLM-L6-v2 on the {chosen[0]['tokens']:,} tokens they were calibrated on, and "
        "on others; damping 0.01 everywhere. Times are of the pruning alone, without collecting the moments.\n"
    ]
    heads = ["layer", "by", "method", "error", "on other text", "ms"]
    body = [
        [
            row["layer"],
            row["by"],
            row["method"],
            f"{row['error']:.4f}",
            f"{row['error_held_out']:.4f}",
            f"{1e3 * row['seconds']:.0f}",
        ]
        for row in chosen
    ]
    parts += [table(heads, body, 3)]
    ours = {(row["layer"], row["method"]): row for row in chosen if row["by"] == "bisparse"}
    for row in chosen:
        if row["by"] == "bisparse":
            continue
        masked = "mask only" in row["method"]
        own = ours[row["layer"], row["method"].split(",")[0]]
        error = own["mask_error" if masked else "error"]
        # Rounding of the two ways of computing one and the same thing.
        met = verdict(error <= row["error"] * 1.001)
        parts += [f"{row['layer']}, {row['method']}: ours {error:.4f}, {row['by']} {row['error']:.4f}; at most theirs: {met}.\n"]
    return [*parts, provenance(chosen)]


def depthwise(rows: list[Row]) -> list[str]:
    """EfficientNet-lite0."""
    parts = ["## A network with depthwise convolutions\n"]
    chosen = [row for row in rows if "pattern" in row]
    if not chosen:
        return [*parts, unmeasured("efficientnet.py")]
    parts += [
        f"{chosen[0]['images']} enlarged Fashion-MNIST images to calibrate on, and others to measure on, since no ImageNet "
        "images were at hand. Left dense: depthwise convolutions, the first one, the head.\n"
    ]

    def judged(row: Row) -> str:
        return f"{row.get('test_images', row['images'])} of {row['side']} x {row['side']}"

    heads = ["EfficientNet-lite0", "to", "layers", "left dense", "mean layer error masked", "now", "judged"]
    heads += ["same class as dense", "s"]
    body = [
        [
            row["method"], row["pattern"], str(row["layers"]), str(row["left_dense"]),
            "" if row["mean_error_before"] is None else f"{row['mean_error_before']:.3f}",
            "" if row["mean_error"] is None else f"{row['mean_error']:.3f}", judged(row),
            f"{row['same_class']:.2f}", f"{row['seconds']:.0f}",
        ]
        for row in chosen
    ]  # fmt: skip
    return [*parts, table(heads, body, 2), provenance(chosen)]


def by_pattern(row: Row) -> str:
    return str(row["pattern"])


def permutation(rows: list[Row]) -> list[str]:
    """Channel orders next to ASP's search."""
    parts = ["## Channel permutation at 2:4\n"]
    if not rows:
        return [*parts, unmeasured("permutation.py")]
    parts += [
        "Fraction of the magnitude that 2:4 keeps in layers of all-MiniLM-L6-v2, with the columns as they are and in the order "
        f"found. Stripe groups are ASP's search, re-implemented in plain torch, with {rows[0]['escapes']} random "
        "regressions; its "
        "seconds are those of this implementation on a CPU, not of ASP's.\n"
    ]
    heads = ["layer", "shape", "search", "kept before, %", "after, %", "seconds"]
    body = [
        [
            row["tensor"].removesuffix(".weight"),
            " x ".join(map(str, row["shape"])),
            row["method"],
            f"{100 * row['kept_before']:.3f}",
            f"{100 * row['kept']:.3f}",
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    parts += [table(heads, body, 3)]
    for tensor in dict.fromkeys(row["tensor"] for row in rows):
        kept = {row["method"]: row["kept"] - row["kept_before"] for row in rows if row["tensor"] == tensor}
        if len(kept) == 2:
            ours, theirs = kept["ours"], kept["stripe groups"]
            gain = f"ours gains {ours / theirs:.3f} of what stripe groups gain; at least as much: {verdict(ours >= theirs)}"
            parts += [f"{tensor.removesuffix('.weight')}: {gain}.\n"]
    return [*parts, provenance(rows)]
