"""Quantised folders and ONNX files of pruned models, as `benchmarks/deploy.py` measured them; the table of docs/deploy.md."""

from __future__ import annotations

from typing import Any

from record import newest
from sections.markdown import provenance, table

MODELS = {
    "minilm": "all-MiniLM-L6-v2",
    "smollm": "SmolLM2-135M-Instruct (from 4-bit GGUF)",
    "efficientnet": "EfficientNet-lite0",
}
HOW = """Score: perplexity on the first tokens of WikiText-2's test set at context 512, or Spearman correlation on STS-B's test
set; of a quantised folder, that of what transformers loads from it. MB: the weights on disk. CPU seconds: of the process on one
thread, for pruning and saving, quantising and saving, or exporting and checking. Entries broken: non-zeros in the file where the
mask prunes. Outputs differ by: the largest difference of one output between the loaded file (by transformers or onnxruntime) and
the model in memory, next to the largest output.
"""


def deploy(rows: list[dict[str, Any]]) -> list[str]:
    """The table, and what it was measured on."""
    if not rows:
        return ["Not measured yet: `python benchmarks/deploy.py`.\n"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    latest = sorted(newest(rows, "model", "step").values(), key=lambda row: models.index(row["model"]))
    head = ["model", "step", "score", "MB", "CPU seconds", "entries broken", "outputs differ by"]
    parts = [HOW, table(head, [_cells(row) for row in latest], text_columns=3)]
    for model in dict.fromkeys(row["model"] for row in latest):
        parts.append(_how([row for row in latest if row["model"] == model]))
    return [*parts, f"\n{latest[-1]['device']}; {provenance(latest)}"]


def deploy_openvino(rows: list[dict[str, Any]]) -> list[str]:
    """What OpenVINO takes for a pruned model on a CPU, and what it computes."""
    if not rows:
        return ["Not measured yet: `python benchmarks/openvino_cpu.py`.\n"]
    latest = list(newest(rows, "contender", "batch", "length").values())
    sizes = list(dict.fromkeys((row["batch"], row["length"]) for row in latest))
    head = ["file", *(f"{batch} x {length} tokens, ms" for batch, length in sizes), "outputs differ by"]
    body = []
    for name in dict.fromkeys(row["contender"] for row in latest):
        own = {(row["batch"], row["length"]): row for row in latest if row["contender"] == name}
        last = own[max(own)]
        times = [f"{own[size]['ms']:.1f} ({own[size]['ms_min']:.1f})" if size in own else "" for size in sizes]
        body.append([name, *times, f"{last['difference']:.1e} of {last['largest']:.3g}"])
    said = f"{latest[-1]['model']}, {latest[-1]['threads']} thread; median (fastest) of turns. Outputs: against "
    said += "torch's, whose inputs are not rounded. "
    said += f"OpenVINO {latest[-1]['openvino'].split('-')[0]}; {latest[-1]['device']}; {provenance(latest)}"
    return [table(head, body), said]


def _cells(row: dict[str, Any]) -> list[str]:
    score = ""
    if "perplexity" in row:
        score = f"perplexity {row['perplexity']:.1f}"
    elif "spearman" in row:
        score = f"Spearman {row['spearman']:.4f}"
    differs = "" if row.get("difference") is None else f"{row['difference']:.1e} of {row['largest']:.3g}"
    if row.get("difference") == 0:
        differs = f"0 of {row['largest']:.3g}"
    step = {
        "dense": "dense",
        "pruned": f"{row['method']}, {row['pattern']}",
        "onnx": "ONNX, float32",
        "onnx int8": "ONNX, int8 weights",
    }.get(row["step"], f"+ {row['step']}")
    seconds = f"{row['cpu_s']:.0f}" if "cpu_s" in row else ""
    return [MODELS[row["model"]], step, score, f"{row['mb']:.1f}", seconds, str(row.get("broken", "")), differs]


def _how(rows: list[dict[str, Any]]) -> str:
    first = next((row for row in rows if row["step"] == "pruned"), rows[0])
    said = [f"{MODELS[first['model']]}: {first['dtype']}"]
    if "sequences" in first:
        said.append(f"calibrated on {first['sequences']} sequences of at most {first['length']} tokens ({first['corpus']})")
    if "tokens" in first:
        said.append(f"perplexity of {first['tokens']:,} tokens")
    if "pairs" in first:
        said.append(f"{first['pairs']:,} pairs")
    said.append(f"{first.get('layers', '?')} layers pruned")
    if unmatched := sorted({name for row in rows for name in row.get("unmatched", ())}):
        said.append(f"not in the ONNX file, since its output does not depend on it: {', '.join(unmatched)}")
    if note := first.get("note"):
        said.append(note)
    return "* " + "; ".join(said) + "."
