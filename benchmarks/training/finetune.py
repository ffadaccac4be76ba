"""Fine-tune MiniLM or SmolLM2 with static masks through the transformers Trainer; `bisparse verify` checks what it saved.

    python benchmarks/training/finetune.py sts MODEL_FOLDER --data FOLDER_WITH_sts-train.csv_AND_sts-test.csv
    python benchmarks/training/finetune.py text MODEL_FOLDER [--gguf FILE] [--steps 60]

"sts": sentence embeddings by mean pooling, trained to give human similarities by their cosine; Spearman on the test set.
"text": a causal language model on Python's documentation; perplexity on text held out. Before, after one-shot pruning, after
fine-tuning, and after a dense fine-tuning of the same length; with --method the static masks start from
weights that were fitted on a part of the training set; with --scale-lr sparse weights have a larger learning rate. --precision
bfloat16 trains under autocast. Rows go to results/training-finetune.jsonl; those there are skipped.
"""

from __future__ import annotations

import copy
import csv
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from experiment import Record, parser
from recipes.data import load_data
from recipes.recipe import DataRecipe
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import bisparse
from bisparse.pruning import ALPS, NetworkReconstruction
from bisparse.training import parameter_groups
from bisparse.training.integrations.transformers import SparsityCallback

CALIBRATION = {"adaprune": 512, "alps": 2048, "alps, then the network": 2048}
"""Rows of the training set (pairs of sentences in "sts") that the fits look at."""
FITS = {"adaprune": bisparse.AdaPrune(), "alps": ALPS(rho_every=1, correct_upstream=False)}
FITS["alps, then the network"] = FITS["alps"]
"""The last one fits the whole network's embeddings to the dense one's on all of the training set, without labels ("sts" only)."""

PRUNED: dict[tuple[str, str], dict[str, Tensor]] = {}
"""By pattern and method: the pruned model, which is the same for every seed."""


class Similarity(nn.Module):
    """Two sentences in, the squared error of (1 + cosine) / 2 against the human score, 0 to 1, out."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        one, other = self.embed(input_ids, attention_mask).chunk(2)
        cosine = (one * other).sum(1)
        return {"loss": (cosine.clamp(min=0) - labels).square().mean(), "logits": cosine}


def sts_rows(path: Path) -> list[tuple[str, str, float]]:
    with path.open(encoding="utf-8") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row[5], row[6], float(row[4]) / 5) for row in rows]


def sts(folder: Path, data: Path) -> tuple[nn.Module, nn.Module, list[Any], Callable[[list[Any]], Any], Callable[[], float]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Similarity(AutoModel.from_pretrained(folder))
    train, test = sts_rows(data / "sts-train.csv"), sts_rows(data / "sts-test.csv")

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        texts = [row[0] for row in rows] + [row[1] for row in rows]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        labels = torch.tensor([row[2] for row in rows])
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        found = torch.cat([model(**collate(test[start : start + 64]))["logits"] for start in range(0, len(test), 64)])
        return float(spearmanr(found, [row[2] for row in test]).statistic)

    return model, model.encoder, train, collate, evaluate


def text(
    folder: Path, gguf: str | None
) -> tuple[nn.Module, nn.Module, list[Any], Callable[[list[Any]], Any], Callable[[], float]]:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    if gguf:
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    content = load_data(DataRecipe("python-text", train=600_000, test=30_000, context=512))

    def sequences(tokens: Tensor, length: int = 128) -> list[Tensor]:
        ids = tokenizer(bytes(tokens.flatten().to(torch.uint8).tolist()).decode(errors="ignore"))["input_ids"]
        return list(torch.tensor(ids[: len(ids) // length * length]).view(-1, length))

    train, test = sequences(content.train_inputs), sequences(content.test_inputs)

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        tokens = torch.stack(rows)
        return {"input_ids": tokens, "labels": tokens}

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        losses = [float(model(**collate(test[start : start + 4])).loss) for start in range(0, len(test) - 3, 4)]
        return math.exp(sum(losses) / len(losses))

    return model, model, train, collate, evaluate


def main() -> None:
    arguments = parser(__doc__ or "", "training-finetune.jsonl")
    arguments.add_argument("task", choices=("sts", "text"))
    arguments.add_argument("model", type=Path)
    arguments.add_argument("--data", type=Path)
    arguments.add_argument("--gguf")
    arguments.add_argument("--patterns", nargs="+", default=["dense", "4:8-T"])
    arguments.add_argument("--steps", type=int, default=180)
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--lr", type=float, default=5e-5)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    arguments.add_argument("--method", choices=("magnitude", *FITS), default="magnitude", help="where static masks start")
    arguments.add_argument("--network-batch", type=int, default=32, help="pairs per step of the fit of the whole network")
    arguments.add_argument("--scale-lr", action="store_true", help="divide the learning rate of sparse weights by their density")
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    record = Record(chosen.results)
    for pattern in chosen.patterns:
        for seed in range(chosen.seeds):
            how = {"steps": chosen.steps, "batch": chosen.batch, "lr": chosen.lr, "seed": seed}
            if chosen.precision != "float32":
                how["precision"] = chosen.precision
            if chosen.method != "magnitude":
                how["method"] = chosen.method
            if chosen.method.endswith("the network") and chosen.network_batch != 32:
                how["network_batch"] = chosen.network_batch
            if chosen.scale_lr and pattern != "dense":
                how["scale_lr"] = True
            key = {"task": chosen.task, "model": chosen.model.name, "pattern": pattern, **how}
            if chosen.dry_run or any(all(row.get(name) == value for name, value in key.items()) for row in record.rows):
                print(key)
                continue
            print(record.add(key, fine_tune(chosen, pattern, seed)), flush=True)


def fine_tune(chosen: Any, pattern: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model, saved, train, collate, evaluate = (
        sts(chosen.model, chosen.data) if chosen.task == "sts" else text(chosen.model, chosen.gguf)
    )
    figures: dict[str, Any] = {"before": evaluate(), "threads": torch.get_num_threads()}
    callbacks = []
    if pattern != "dense":
        if chosen.method in FITS:
            rows = range(0, CALIBRATION[chosen.method], 64)
            calibration = [batch for start in rows if (batch := collate(train[start : start + 64]))]
            how: dict[str, Any] = {}
            if chosen.method.endswith("the network"):
                each = chosen.network_batch
                own = [collate(train[start : start + each]) for start in range(0, len(train), each)]
                how["reconstruction"] = NetworkReconstruction(epochs=4, batches=own)
                figures["network_step"] = how["reconstruction"].learning_rate
                how["forward"] = lambda net, batch: net.embed(batch["input_ids"], batch["attention_mask"])
            if (found := PRUNED.get((pattern, chosen.method))) is not None:
                model.load_state_dict(found)
            else:
                bisparse.prune_(model, pattern, FITS[chosen.method], calibration, exclude="*pooler*", **how)
                PRUNED[pattern, chosen.method] = copy.deepcopy(model.state_dict())
        masks = "nonzero" if chosen.method in FITS else None
        sparsity = bisparse.sparsify_(model, pattern, mode="static", masks=masks, exclude="*pooler*")  # type: ignore[arg-type]
        figures |= {"pruned": evaluate(), "layers": len(sparsity.layers)}
        callbacks = [SparsityCallback(sparsity)]
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            output_dir=f"{folder}/run", max_steps=chosen.steps, per_device_train_batch_size=chosen.batch, learning_rate=chosen.lr,
            warmup_steps=chosen.steps // 10, logging_steps=20, save_strategy="no", report_to=[], use_cpu=True, seed=seed,
            remove_unused_columns=False, bf16=chosen.precision == "bfloat16",
        )  # fmt: skip
        optimizer = None
        if chosen.scale_lr and pattern != "dense":
            optimizer = torch.optim.AdamW(parameter_groups(model, sparsity, chosen.lr), fused=True)
        trainer = Trainer(
            model=model,
            args=training,
            train_dataset=train,
            data_collator=collate,
            callbacks=callbacks,
            optimizers=(optimizer, None),
        )
        figures["seconds"] = trainer.train().metrics["train_runtime"]
        figures["after"] = evaluate()
        if pattern != "dense":
            bisparse.finalize_(model)
            saved.save_pretrained(f"{folder}/model")
            command = [
                sys.executable,
                "-m",
                "bisparse",
                "verify",
                f"{folder}/model",
                "--pattern",
                pattern,
                "--exclude",
                "*pooler*",
                "--json",
            ]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            figures |= {
                "verified": result.returncode == 0,
                "verify": _short(result.stdout) if result.stdout else result.stderr,
            }
    return figures


def _short(output: str) -> dict[str, Any]:
    return {name: value for name, value in json.loads(output).items() if name != "layers"}


if __name__ == "__main__":
    main()
