"""SmolLM2-135M: one-shot pruning, then training under the static mask, with the dense model as a teacher and without.

    python benchmarks/training/teacher.py FOLDER_OR_GGUF --wikitext FILE --text TEXT_OR_BROWN_FOLDER [--minutes 60]

Trains on --text alone; perplexity is over the first 12,288 tokens of WikiText-2 at context 512, as in pruning/smollm.py. AdamW on
float32 weights under bfloat16 autocast; the teacher is in bfloat16. The learning rate follows the CPU time spent: a cosine to
zero at the end of --minutes, or the steps given by --steps. Rows go to results/training-teacher.jsonl.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pruning"))
from experiment import load_text, method_named
from smollm import perplexity

from bisparse import finalize_, prune_, sparsify_, verify
from bisparse.cli.calibration_text import token_batches
from bisparse.cli.model_source import open_source
from bisparse.training import Distillation
from record import RESULTS, Record

LOSSES: dict[str, dict[str, float]] = {
    "task": {},
    "logits": {"logits": 1.0, "task": 0.0},
    "logits and task": {"logits": 1.0, "task": 1.0},
    "logits and hidden": {"logits": 1.0, "hidden": 1.0, "task": 0.0},
}


def evaluated(model: nn.Module, test: Tensor) -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = perplexity(model.eval(), test)
    model.train()
    return result


def train(
    model: nn.Module, teacher: Distillation | None, batches: list[Tensor], options: argparse.Namespace, test: Tensor
) -> dict[str, Any]:
    """Train until the CPU time or the steps are spent; what was measured."""
    sparsity = sparsify_(model, options.pattern, mode="static", masks="nonzero", exclude="lm_head")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    sparsity.attach(optimizer)
    wants_labels = teacher is None or teacher.weights["task"] > 0
    started, steps, tokens, curve = time.process_time(), 0, 0, []
    while (done := _done(started, steps, options)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (steps + 1) / 10) * 0.5 * (1 + math.cos(math.pi * done))
        ids = batches[steps % len(batches)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(input_ids=ids, labels=ids if wants_labels else None, use_cache=False)
        loss = output.loss if teacher is None else teacher.loss(output.loss)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, tokens = steps + 1, tokens + ids.numel()
        curve.append(round(float(loss.detach()), 4))
    spent = time.process_time() - started
    finalize_(model)
    return {
        "steps": steps,
        "trained_tokens": tokens,
        "cpu_s": round(spent, 1),
        "perplexity": evaluated(model, test),
        "curve": curve[::10],
    }


def _done(started: float, steps: int, options: argparse.Namespace) -> float:
    return steps / options.steps if options.steps else (time.process_time() - started) / (60 * options.minutes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a transformers folder or a .gguf file")
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="to calibrate and to train on")
    parser.add_argument("--pattern", default="4:8-T")
    parser.add_argument("--method", default="wanda", help="one-shot, by its name in pruning/experiment.py")
    parser.add_argument("--calibration", type=int, default=32, help="sequences of 512 tokens")
    parser.add_argument("--losses", nargs="+", default=["logits", "task"], choices=LOSSES)
    parser.add_argument("--minutes", type=float, default=60.0, help="CPU minutes of each training")
    parser.add_argument("--steps", type=int, default=0, help="instead of minutes")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS / "training-teacher.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = Record(options.results)
    source = open_source(options.model)
    test = source.tokenizer(options.wikitext.read_text(), return_tensors="pt", verbose=False)["input_ids"][0][: options.tokens]
    text = source.tokenizer(load_text(options.text, "text")[0], return_tensors="pt", verbose=False)["input_ids"][0]
    calibration = token_batches(text, sequences=options.calibration, length=512, batch_size=2)
    rows = text[: len(text) // options.length * options.length].view(-1, options.length)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    batches = [part for part in rows.split(options.batch) if len(part) == options.batch]
    dense = source.model.float()
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    method, how = method_named(options.method)
    for name in options.losses:
        torch.manual_seed(0)
        dense.load_state_dict(state)
        weights = LOSSES[name]
        teacher = Distillation(dense, dtype=torch.bfloat16, **weights) if weights else None  # type: ignore[arg-type]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prune_(dense, options.pattern, method, calibration, **how)
        one_shot = evaluated(dense, test)
        print(f"{name}: one-shot {one_shot:.1f}", flush=True)
        figures = train(dense, teacher, batches, options, test)
        verify(dense, options.pattern, exclude="lm_head").check()
        key = {"study": "teacher", "model": "SmolLM2-135M-Instruct, Q4_1 dequantised", "pattern": options.pattern, "loss": name}
        key |= {"method": options.method, "calibration": options.calibration, "text": options.text.name, "lr": options.lr}
        key |= {"batch": options.batch, "length": options.length, "minutes": options.minutes, "tokens": options.tokens}
        row = record.add(key, {"one_shot_perplexity": round(one_shot, 2), **figures})
        print({entry: row[entry] for entry in ("loss", "one_shot_perplexity", "perplexity", "steps", "cpu_s")}, flush=True)
        if teacher is not None:
            teacher.detach()


if __name__ == "__main__":
    main()
