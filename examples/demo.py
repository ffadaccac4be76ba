"""Prune all-MiniLM-L6-v2 with and without calibration data, prove and check every mask, and run the result on this CPU.

python examples/demo.py MODEL_FOLDER LEE50_FOLDER OUT_FOLDER [DOCUMENTS]    (`make demo` fetches the files for it)
"""

import copy
import sys
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import bisparse
from bisparse.pruning import ALPS, Magnitude
from bisparse.report import Task, write_comparison
from lee50 import AGREEMENT, COSINE, agreement, embed, load, read_documents, read_similarities, speed
from quiet import quiet

# ALPS searches mask and weights jointly, using the layers' inputs for a few unlabelled documents; settings of docs/pruning.md.
METHODS = {"magnitude": Magnitude(), "with data": ALPS(rho_every=1, refit_damping=0.01, correct_upstream=False)}
# At most N KEPT of every M; -T: along rows and along columns.
PATTERNS = {"magnitude": ("2:4", "2:4-T", "4:8-T", "16:32-T"), "with data": ("2:4-T", "4:8-T", "16:32-T")}


def main(source: Path, lee50: Path, out: Path, count: int = 60) -> None:
    torch.set_num_threads(1)  # more threads are much slower when anything else runs on the machine
    quiet()
    console, scores = Console(record=True), {}
    documents, people = read_documents(lee50), read_similarities(lee50)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    texts = read_documents(lee50, "lee_background.cor")[:count]  # none of them among the 50
    cut = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    batches = [dict(tokenizer(texts[start : start + 10], **cut)) for start in range(0, count, 10)]
    bisparse.solve(torch.rand(32, 32), "16:32-T").check()  # compiles the first kernel, or loads it from numba's cache
    table = Table("pattern", "weights", "agreement", "cosine", "on W", "on W^T", "gap", title=source.name)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("dense: embedding 50 documents", total=sum(map(len, PATTERNS.values())))
        dense_model = load(source)
        dense = embed(dense_model, tokenizer, documents)
        table.add_row("dense", "", f"{agreement(dense, people):.3f}", "1.000", "", "", "", end_section=True)
        for name, pattern in ((name, pattern) for name, patterns in PATTERNS.items() for pattern in patterns):
            bar.update(task, description=f"{pattern}, {name}: pruning, proving and checking")
            target, model = out / f"{source.name}-{pattern.replace(':', '-')}-{name.replace(' ', '-')}", load(source)
            report = bisparse.prune_(model, pattern, METHODS[name], batches, exclude="pooler*")  # the embedding is a mean
            bisparse.save(model, target, report=report, overwrite=True, beside=tokenizer.save_pretrained)
            checks = (bisparse.verify_checkpoint(target, form) for form in (pattern, pattern.removesuffix("-T") + "-T"))
            holds = ["[green]holds" if check else "[dim]does not" for check in checks]
            sparse = embed(load(target), tokenizer, documents)
            scores[target] = agreement(sparse, people), float((sparse * dense).sum(1).mean())
            end = pattern == PATTERNS[name][-1]
            table.add_row(pattern, name, *map("{:.3f}".format, scores[target]), *holds, f"{report.gap:.0e}", end_section=end)
            bar.advance(task)
        bar.update(task, description="running on this CPU")
        halves = [copy.deepcopy(one).to(torch.bfloat16) for one in (dense_model, load(target))]
        packed = bisparse.accelerate_(halves[1])
        speeds = speed(halves, tokenizer, documents)
    tasks = [Task("Agreement with people", agreement(dense, people), tuple(one[0] for one in scores.values()), AGREEMENT)]
    tasks.append(Task("Cosine to dense", 1.0, tuple(one[1] for one in scores.values()), COSINE))
    page = write_comparison(list(scores), out / "report.html", against=source, tasks=tasks)
    plain = scores[out / f"{source.name}-{pattern.replace(':', '-')}-magnitude"]
    console.print(table)
    console.print(
        f"{pattern} keeps half of {report.weights:,} weights in {len(report)} layers. Agreement with people goes from "
        f"{agreement(dense, people):.3f} to {scores[target][0]:.3f} with {count} documents as calibration data, and to "
        f"{plain[0]:.3f} without data.\nOn this CPU, in bfloat16: {len(packed)} of {len(report)} layers are faster packed; "
        f"{packed.bytes_before / 1e6:.1f} -> {packed.bytes_after / 1e6:.1f} MB in memory, {speeds[0]:.0f} -> {speeds[1]:.0f} "
        f"sentences per second, one at a time.\nagreement: {AGREEMENT}\ncosine: {COSINE}"
    )
    console.save_text(str(out / "summary.txt"), clear=False)
    console.print(f"Report to look at: {page.resolve().as_uri()}", soft_wrap=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *map(int, sys.argv[4:]))
