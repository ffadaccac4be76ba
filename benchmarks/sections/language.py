"""Pruning a language model with calibration data."""

from __future__ import annotations

from collections.abc import Callable

from sections.markdown import provenance, table, verdict
from sections.pruning import Row, by_pattern, grid, unmeasured


def language(rows: list[Row]) -> list[str]:
    """SmolLM2 on WikiText-2."""
    parts = ["## Pruning a language model with data\n"]
    if not rows:
        return [*parts, unmeasured("smollm.py")]
    dense_row = next(row for row in rows if row["pattern"] == "dense")
    dense, dense_as_written = dense_row["perplexity"], dense_row.get("perplexity_as_written")
    rows = [row for row in rows if row["pattern"] != "dense"]
    parts += [f"{rows[0]['model']}; perplexity on {rows[0]['tokens']:,} tokens of WikiText-2, context 512; dense {dense:.1f}.\n"]

    def data(row: Row) -> str:
        if "sequences" not in row:
            return str(row["method"])
        more = f", network {row['network_sequences']}" if row.get("network_sequences") else ""
        more += f" at a step size of {row['network_step']:g}" if row.get("network_step") else ""
        more += ", one sequence per step" if row.get("network_batch") == 1 else ""
        spaced = ", spaced" if row.get("spaced") else ""
        draw = f", draw {row['draw']}" if row.get("draw") else ""
        return f"{row['method']}, {row['sequences']} of {row['corpus']}{spaced}{draw}{more}"

    parts += [grid(rows, data, by_pattern, "perplexity", 1)]
    parts += [
        "The full budget is 256 sequences; rows with fewer are reduced. Targets of the fit: "
        "*own inputs*, the dense layer's outputs on the "
        "pruned network's inputs; *dense inputs*, the same on the dense network's inputs; otherwise the dense network's outputs. "
        "*short*: rho grows at "
        "every iteration. *then blocks*: after its layers, the kept weights of each block are fitted to the dense network's "
        "activations after that block (`BlockReconstruction`). *then the network*: at the end, those of all layers "
        "together to the dense network's logits (`NetworkReconstruction`), *on more*: on as many sequences as follow 'network', "
        "at a step size of 0.003 unless another is named, two sequences per step unless one is named. "
        "*spaced*: calibration text with spaces around punctuation, as both corpora have them; otherwise as people write. "
        "*draw*: other sequences of the corpus.\n"
    ]
    budget = "50% of 8:32-T, 12:32-T, 16:32-T, 20:32-T, 24:32-T, dense"
    for pattern, aim in {"2:4": 66, "2:4-T": 95, "4:8-T": 72, "16:32-T": 50, "6:8": 37, "6:8-T": 38, budget: 55}.items():
        for spaced in (None, True):
            own = [row for row in rows if row["pattern"] == pattern and row.get("spaced") == spaced]
            if not own:
                continue
            best = min(own, key=lambda row: row["perplexity"])
            met = verdict(best["perplexity"] <= aim)
            fits = [note for note in best.get("notes", []) if note.startswith(("budget", "reconstructed", "fitted"))]
            notes = "".join(f" {note[0].upper()}{note[1:]}." for note in fits)
            parts += [f"Best {pattern}: {best['perplexity']:.2f} by {data(best)}; at most {aim}: {met}.{notes}\n"]
    parts += [
        "A budget's row whose notes do not say that layers were weighed is by the fractions of energy that layers lose, which "
        "was worse than one pattern for all layers.\n"
        if any("%" in row["pattern"] for row in rows)
        else ""
    ]
    parts += _what_blocks_gain(rows)
    parts += _as_written(rows, dense_as_written, data)
    return [*parts, provenance(rows)]


def _as_written(rows: list[Row], dense: float | None, data: Callable[[Row], str]) -> list[str]:
    """The perplexity of the same text without spaces around punctuation, of the rows that have it."""
    known = [row for row in rows if row.get("perplexity_as_written")]
    if not known or dense is None:
        return []
    body = [
        [row["pattern"], data(row), f"{row['perplexity']:.1f}", f"{row['perplexity_as_written']:.1f}"]
        for row in sorted(known, key=lambda row: (row["pattern"], row["method"], bool(row.get("spaced"))))
    ]
    return [
        "WikiText-2 has spaces around punctuation and `@-@` for hyphens, which people do not write. The same text without "
        f"them, its first {known[0]['tokens']:,} tokens, dense {dense:.1f}:\n",
        table(("pattern", "method and calibration text", "WikiText-2", "as written"), body, 2),
    ]


def _what_blocks_gain(rows: list[Row]) -> list[str]:
    """Cells that were run with blocks fitted and without, all else equal."""
    pairs = [
        (without, row)
        for row in rows
        for without in rows
        if ", then blocks" in row["method"]
        and "the network" not in row["method"]
        and without["method"] == row["method"].split(", then blocks")[0]
        and all(without.get(key) == row.get(key) for key in ("pattern", "sequences", "corpus", "dtype"))
    ]
    if not pairs:
        return []
    gains = "; ".join(
        f"{row['pattern']} with {row['sequences']} sequences {without['perplexity']:.1f} -> {row['perplexity']:.1f}"
        for without, row in pairs
    )
    return [
        f"What fitting blocks gains over the same layers alone: {gains}. A fit of a single layer does not see the attention's "
        "softmax, the gate of an MLP or the other layers; the fit of the block does, with the same masks.\n"
    ]
