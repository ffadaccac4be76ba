"""Prune all-MiniLM-L6-v2 to five patterns, check what was written, and see what each costs. `make demo` fetches the files for it.

python examples/demo.py MODEL_FOLDER LEE50_FOLDER OUT_FOLDER
"""

import sys
from pathlib import Path

import torch
from rich.columns import Columns
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import bisparse
from bisparse.report import Task, write_comparison
from lee50 import agreement, embed, read_documents, read_similarities

PATTERNS = ("2:4", "2:4-T", "4:8-T", "8:16-T", "16:32-T")  # at most N KEPT of every M; -T: along rows and along columns
AGREEMENT = "Pearson correlation of the model's cosines with people's similarities, 50 news documents (Lee50)."
COSINE = "Mean cosine of the 50 embeddings to those of the dense model."


def load(folder: Path) -> torch.nn.Module:
    """The model, if every tensor of the checkpoint finds its place and none is missing."""
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), f"{folder} does not load strictly: {info}"
    return model.eval()


def picture(mask: torch.Tensor, side: int = 16) -> str:
    """The corner of a mask, two rows a line; what is drawn is kept."""
    pairs = mask[:side, :side].int().view(side // 2, 2, side).tolist()
    return "\n".join("".join(" ▄▀█"[2 * top + bottom] for top, bottom in zip(*pair, strict=True)) for pair in pairs)


def main(model_folder: Path, lee50_folder: Path, out: Path) -> None:
    torch.set_num_threads(1)  # more threads collapse when anything else runs on the machine
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, pictures, scores = Console(record=True), [], {}
    documents, people = read_documents(lee50_folder), read_similarities(lee50_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    table = Table("pattern", "kept |w|", "gap", "on W", "on W^T", "agreement", "cosine", "search", title=f"{model_folder.name}")
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("dense: embedding 50 documents", total=1 + 2 * len(PATTERNS))
        dense = embed(load(model_folder), tokenizer, documents)
        table.add_row("dense", "100 %", "", "", "", f"{agreement(dense, people):.3f}", "1.000", "")
        for done, pattern in enumerate(PATTERNS):
            target = out / f"{model_folder.name}-{pattern.replace(':', '-')}"

            def show(what: str, part: int, whole: int, pattern: str = pattern, done: int = done) -> None:
                bar.update(task, description=f"{pattern}: pruning and proving {what}", completed=1 + 2 * done + part / whole)

            pruned = bisparse.prune_checkpoint(model_folder, target, pattern, overwrite=True, progress=show)
            bar.update(task, description=f"{pattern}: checking and embedding", completed=2 + 2 * done)
            checks = (bisparse.verify_checkpoint(target, form) for form in (pattern, pattern.removesuffix("-T") + "-T"))
            holds = ["[green]holds" if check else "[dim]does not" for check in checks]
            model = load(target)
            sparse = embed(model, tokenizer, documents)
            scores[target] = agreement(sparse, people), float((sparse * dense).sum(1).mean())
            measured = *map("{:.3f}".format, scores[target]), f"{pruned.time_s:.2f} s"
            table.add_row(pattern, f"{pruned.retained:.2%}", f"{pruned.gap:.0e}", *holds, *measured)
            pictures.append(f"{pattern}\n{picture(model.get_parameter(pruned.layers[0].parameter) != 0)}")
    agreements, cosines = zip(*scores.values(), strict=True)
    tasks = [Task("Agreement with people", agreement(dense, people), agreements, AGREEMENT)]
    tasks.append(Task("Cosine to dense", 1.0, cosines, COSINE))
    report = write_comparison(list(scores), out / "report.html", against=model_folder, tasks=tasks)
    console.print("The corner of one layer's mask, each way:", Columns(pictures, width=22, padding=(1, 2)), table)
    console.print(f"{len(pruned)} layers, {pruned.weights:,} weights. agreement: {AGREEMENT}\ncosine: {COSINE}")
    console.save_text(str(out / "summary.txt"), clear=False)
    console.print(f"Report to look at: {report.resolve().as_uri()}", soft_wrap=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
