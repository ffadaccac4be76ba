"""What quantisation and export leave of a pruned model: score, bytes, time, and mask entries broken on the files themselves.

    python benchmarks/deploy.py minilm FOLDER --sts DATA/sts-test.csv --calibration TEXT
    python benchmarks/deploy.py smollm FOLDER --wikitext FILE --calibration TEXT

FOLDER is a transformers folder. Scores of quantised models are of what transformers loads from the written folder. Rows go to
benchmarks/results/deploy.jsonl; --table writes them into docs/deploy.md.
"""

from __future__ import annotations

import argparse
import copy
import csv
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import bisparse
from bisparse.checkpoint import load_masks
from bisparse.checkpoint.packed_integers import unpacked
from bisparse.checkpoint.reader import open_source
from bisparse.cli.calibration_text import text_batches
from bisparse.export import export_onnx, save_quantized
from bisparse.quantization import quantize_
from record import RESULTS, Record, read_rows

PAGE = Path(__file__).resolve().parent.parent / "docs" / "deploy.md"
BEGIN, END = "<!-- table of benchmarks/deploy.py -->\n", "<!-- end of the table -->\n"


def perplexity(model: nn.Module, ids: Tensor, context: int = 512) -> float:
    rows = ids[: len(ids) // context * context].view(-1, context)
    total = 0.0
    with torch.inference_mode():
        for part in rows.split(2):
            logits = model(input_ids=part, use_cache=False).logits.float()
            total += float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return float(torch.tensor(total / (rows.shape[0] * (context - 1))).exp())


def spearman(model: nn.Module, tokenizer: Any, rows: list[tuple[float, str, str]]) -> float:
    texts = sorted({text for _, *both in rows for text in both}, key=len)
    vectors = {}
    with torch.inference_mode():
        for start in range(0, len(texts), 64):
            part = texts[start : start + 64]
            batch = tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt")
            hidden = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None]
            vectors.update(zip(part, nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1), strict=True))
    found = torch.tensor([float(vectors[one] @ vectors[other]) for _, one, other in rows], dtype=torch.float64)
    meant = torch.tensor([score for score, _, _ in rows], dtype=torch.float64)
    ranks = [_ranks(one) for one in (found, meant)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks, equal values sharing their mean."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() - 1) / 2)[inverse]


def broken(file: Path, masks: dict[str, Tensor]) -> int:
    """How many entries that a mask prunes are not zero in a written file."""
    tensors = unpacked(open_source(file)).tensors
    return sum(int(((tensors[name].read().float() != 0).view(mask.shape) & ~mask).sum()) for name, mask in masks.items())


def size_mb(place: Path) -> float:
    files = [place] if place.is_file() else place.glob("model*.safetensors")
    return sum(one.stat().st_size for one in files) / 1e6


@contextmanager
def timed(figures: dict[str, Any]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    figures["time_s"] = round(time.perf_counter() - started, 1)


def measure(
    options: argparse.Namespace, folder: Path, load: Callable[[Path], nn.Module], score: Callable[[nn.Module], float]
) -> None:
    """All rows of one model, in a temporary folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    causal = options.model == "smollm"
    texts = text_batches(
        tokenizer, options.calibration, causal=causal, sequences=options.sequences, length=256, batch_size=4
    ).batches
    batches = list(texts.batches)
    rows = Record(options.results)
    common = {"model": options.model, "pattern": options.pattern, "method": options.method, "sequences": options.sequences}
    metric = "perplexity" if causal else "spearman"
    model = load(folder)
    rows.add({**common, "step": "dense"}, {metric: score(model), "mb": size_mb(folder)})
    with tempfile.TemporaryDirectory() as work:
        pruned, figures = Path(work) / "pruned", {}
        with timed(figures):
            report = bisparse.prune_(model, options.pattern, options.method, batches)
            bisparse.save(model, pruned, report=report)
        masks = load_masks(pruned)
        figures |= {metric: score(model), "mb": size_mb(pruned), "broken": broken(pruned, masks)}
        rows.add({**common, "step": "pruned"}, figures)
        example = torch.randint(0, 1000, (2, 16))
        inputs = {"input_ids": example, "attention_mask": torch.ones_like(example)}
        for scheme in ("int8", "int4-g64"):
            changed, target, figures = copy.deepcopy(model), Path(work) / scheme, {}
            with timed(figures):
                done = quantize_(changed, scheme, data=batches, method="gptq", include=[one.name for one in report])
                save_quantized(changed, target, done, pruned=report)
            figures |= {metric: score(load(target)), "mb": size_mb(target), "broken": broken(target, masks)}
            rows.add({**common, "step": scheme}, {**figures, "error": done.error, "weight_error": done.weight_error})
        for step in ("onnx", "onnx int8") if options.onnx else ():
            file, figures, whole = Path(work) / "model.onnx", {}, copy.deepcopy(model).float()
            with timed(figures):
                done = quantize_(whole, "int8", include=[one.name for one in report]) if step == "onnx int8" else None
                made = export_onnx(whole, file, inputs, pattern=options.pattern, quantized=done, overwrite=True)
            said = {"mb": size_mb(file), "broken": broken(file, masks), "difference": made.difference, "largest": made.largest}
            rows.add({**common, "step": step}, {**figures, **said})


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = (
        "| model | step | score | MB | seconds | mask entries broken | onnxruntime differs by |\n|---|---|---|---|---|---|---|\n"
    )
    lines = []
    for row in rows:
        name = (
            f"perplexity {row['perplexity']:.1f}"
            if "perplexity" in row
            else f"Spearman {row['spearman']:.4f}"
            if "spearman" in row
            else ""
        )
        differs = f"{row['difference']:.1e} (of {row['largest']:.3g})" if row.get("difference") is not None else ""
        step = {"pruned": f"{row['method']} {row['pattern']}"}.get(row["step"], row["step"])
        cells = (row["model"], step, name, f"{row['mb']:.1f}", row.get("time_s", ""), row.get("broken", ""), differs)
        lines.append("| " + " | ".join(map(str, cells)) + " |\n")
    return heads + "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["minilm", "smollm", "table"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--sts", type=Path)
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=12_288, help="of WikiText-2, for the perplexity")
    parser.add_argument("--no-onnx", dest="onnx", action="store_false")
    parser.add_argument("--results", type=Path, default=RESULTS / "deploy.jsonl")
    options = parser.parse_args()
    if options.model == "minilm":
        with options.sts.open(newline="", encoding="utf-8") as file:
            lines = [line for line in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if len(line) > 6]
        pairs = [(float(line[4]), line[5], line[6]) for line in lines]
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.folder)
        measure(
            options,
            options.folder,
            lambda place: transformers.AutoModel.from_pretrained(place, dtype=torch.float32).eval(),
            lambda model: spearman(model, tokenizer, pairs),
        )
    elif options.model == "smollm":
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.folder)
        text = options.wikitext.read_text(encoding="utf-8")
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0][: options.tokens]
        measure(
            options,
            options.folder,
            lambda place: transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).eval(),
            lambda model: perplexity(model, ids),
        )
    else:
        page = PAGE.read_text(encoding="utf-8")
        before, _, after = page.partition(BEGIN)
        PAGE.write_text(before + BEGIN + table(read_rows(options.results)) + END + after.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
