"""all-MiniLM-L6-v2 on STS-B test: Spearman correlation after one-shot pruning, calibrated on its own domain and on foreign text.

    python benchmarks/pruning/minilm.py MODEL_FOLDER --sts DATA_FOLDER --foreign TEXT_FILE_OR_FOLDER

Rows are appended to benchmarks/results/pruning_minilm.jsonl; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch
from experiment import METHODS, Rows, load_text, measured, method_named
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

import bisparse
from bisparse.pruning import prune_

PATTERNS = ("2:4", "4:8", "16:32", "2:4-T", "4:8-T", "8:16-T", "16:32-T")


def sentences(path: Path) -> list[tuple[float, str, str]]:
    with path.open(encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(float(row[4]), row[5], row[6]) for row in rows]


def embed(model: torch.nn.Module, tokenizer, texts: list[str], size: int = 128) -> torch.Tensor:
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = torch.empty(len(texts), model.config.hidden_size)
    with torch.no_grad():
        for start in range(0, len(order), size):
            index = order[start : start + size]
            batch = tokenizer([texts[i] for i in index], padding=True, truncation=True, max_length=128, return_tensors="pt")
            hidden = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            out[index] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    return out


def spearman(model: torch.nn.Module, tokenizer, rows: list[tuple[float, str, str]]) -> float:
    a, b = (embed(model, tokenizer, [row[column] for row in rows]) for column in (1, 2))
    return float(spearmanr((a * b).sum(1), [row[0] for row in rows]).statistic)


def calibration(tokenizer, texts: list[str], count: int, seed: int, size: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    chosen = [texts[i] for i in torch.randperm(len(texts), generator=generator)[:count].tolist()]
    chosen.sort(key=len)
    batches = [
        dict(tokenizer(chosen[i : i + size], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, len(chosen), size)
    ]
    # Shuffled again: every fifth batch is held out, which should not mean every fifth length.
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sts", type=Path, required=True)
    parser.add_argument("--foreign", type=Path)
    parser.add_argument("--count", type=int, default=2048, help="calibration sentences")
    parser.add_argument("--seeds", type=int, default=1, help="draws of calibration sentences")
    parser.add_argument("--corpora", nargs="+", default=["sts-train", "foreign"])
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pruning_minilm.jsonl"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    test = sentences(args.sts / "sts-test.csv")
    corpora = {"sts-train": [text for row in sentences(args.sts / "sts-train.csv") for text in row[1:]]}
    if args.foreign:
        corpora["foreign"] = load_text(args.foreign, unit="sentence")
    draws = [(corpus, seed) for corpus in args.corpora if corpus in corpora for seed in range(args.seeds)]
    rows = Rows(args.out)

    def fresh() -> torch.nn.Module:
        return AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()

    with rows.new({"model": "all-MiniLM-L6-v2", "pattern": "dense"}) as row:
        if row is not None:
            row["spearman"] = spearman(fresh(), tokenizer, test)
    for corpus, seed in draws:
        batches = calibration(tokenizer, corpora[corpus], args.count, seed)
        for pattern in args.patterns:
            for name in args.methods:
                method, how = method_named(name)
                key = {"model": "all-MiniLM-L6-v2", "pattern": pattern, "method": name}
                if method.needs:
                    key |= {"corpus": corpus, "count": args.count, "seed": seed}
                else:
                    key |= {"corpus": None, "count": 0}
                with rows.new(key) as row:
                    if row is None:
                        continue
                    model = fresh()
                    started = time.perf_counter()
                    report = prune_(model, pattern, method, batches, **how, exclude="pooler*", progress=True)
                    row |= measured(report, time.perf_counter() - started) | {"notes": list(report.notes)}
                    for layer in report:
                        bisparse.verify(model.get_parameter(layer.parameter), pattern, layout=layer.layout).check()
                    row["spearman"] = spearman(model, tokenizer, test)


if __name__ == "__main__":
    main()
