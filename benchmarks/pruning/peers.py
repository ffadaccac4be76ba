"""One layer at 2:4, by us and by others' own code: same weight, same calibration data, error and time.

    python benchmarks/pruning/peers.py MODEL_FOLDER --calibration TEXT [--layers NAME ...]

Run it in an environment that has bisparse, `nvidia-modelopt` and `llmcompressor`; what is not installed is left out. Error is
|| W X - W' X || / || W X || on the calibration sentences and on as many others. ModelOpt's SparseGPT returns a mask only, which
is compared with the dense weights in it, as for Wanda. Times are of the pruning alone: second moments are collected before.
Rows: benchmarks/results/pruning_peers.jsonl.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from experiment import Rows, load_text
from minilm import calibration
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from bisparse import Pattern, verify
from bisparse.pruning import ALPS, AdaPrune, LayerProblem, Method, SparseGPT, Wanda
from bisparse.pruning.calibration.statistics import Statistics
from record import RESULTS

LAYERS = (
    "encoder.layer.2.attention.self.query",
    "encoder.layer.2.attention.output.dense",
    "encoder.layer.2.intermediate.dense",
    "encoder.layer.2.output.dense",
)
DAMPING = 0.01
OURS: dict[str, Method] = {
    "Wanda": Wanda(),
    "SparseGPT": SparseGPT(damping=DAMPING),
    "AdaPrune": AdaPrune(damping=DAMPING, correct_upstream=False),
    "ALPS": ALPS(refit_damping=DAMPING, correct_upstream=False),
}


def inputs_of(model: nn.Module, names: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The inputs (T, I) of layers for all real tokens."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    keep: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][keep[-1]]))
        for name in names
    ]
    with torch.inference_mode():
        for batch in batches:
            keep.append(batch["attention_mask"].bool())
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def by_us(method: Method, weight: Tensor, inputs: Tensor) -> tuple[Callable[[], Tensor], str]:
    measured = Statistics(
        len(inputs), inputs.square().mean(0).sqrt()[None], inputs.mean(0)[None], torch.cov(inputs.T, correction=0)[None]
    )
    problem = LayerProblem("layer", weight[None], Pattern(2, 4), statistics=measured)

    def run() -> Tensor:
        pruned = method.prune(problem)
        return (problem.weight * pruned.solution.mask if pruned.weight is None else pruned.weight)[0]

    return run, f"bisparse {version('bisparse')}"


def by_modelopt(weight: Tensor, inputs: Tensor) -> tuple[Callable[[], Tensor], str]:
    peer = importlib.import_module("modelopt.torch.sparsity.weight_sparsity.sparsegpt")
    config = {"pattern": "2:4 sparsity", "hessian_damp": DAMPING, "col_block_size": 128, "row_block_size": -1}
    hessian = 2 * inputs.T @ inputs / len(inputs)
    return (
        lambda: weight * peer.create_sgpt_mask(weight, hessian.clone(), config),
        f"nvidia-modelopt {version('nvidia-modelopt')}",
    )


def by_llmcompressor(method: str, weight: Tensor, inputs: Tensor) -> tuple[Callable[[], Tensor], str]:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    folder = "llmcompressor.modifiers.pruning"
    if method == "Wanda":
        peer = importlib.import_module(f"{folder}.wanda.wanda_sparsify")
        squares = inputs.square().sum(0) / len(inputs)
        run = lambda: peer.sparsify_weight(layer, {layer: squares.clone()}, 0.5, 2, 4)  # noqa: E731
    else:
        peer = importlib.import_module(f"{folder}.sparsegpt.sgpt_sparsify")
        hessian = 2 * inputs.T @ inputs / len(inputs)

        def run() -> Tensor:
            result = peer.sparsify_weight(layer, {layer: hessian.clone()}, 0.5, 2, 4, 128, DAMPING, False)
            return result[-1] if isinstance(result, tuple) else result

    return run, f"llmcompressor {version('llmcompressor')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS))
    parser.add_argument("--count", type=int, default=512, help="calibration sentences; as many others judge")
    parser.add_argument("--results", type=Path, default=RESULTS / "pruning_peers.jsonl")
    options = parser.parse_args()
    rows = Rows(options.results)
    model = AutoModel.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = load_text(options.calibration, "sentence")
    fitted = inputs_of(model, options.layers, calibration(tokenizer, texts[0::2], options.count, 0))
    judged = inputs_of(model, options.layers, calibration(tokenizer, texts[1::2], options.count, 0))
    contenders: dict[tuple[str, str], Callable[[Tensor, Tensor], tuple[Callable[[], Tensor], str]]] = {
        ("bisparse", name): lambda weight, inputs, method=method: by_us(method, weight, inputs) for name, method in OURS.items()
    }
    contenders["ModelOpt", "SparseGPT, mask only"] = by_modelopt
    for name in ("SparseGPT", "Wanda"):
        contenders["llm-compressor", name] = lambda weight, inputs, name=name: by_llmcompressor(name, weight, inputs)
    for layer in options.layers:
        weight = model.get_submodule(layer).weight.detach()
        for (who, method), make in contenders.items():
            with rows.new({"layer": layer, "by": who, "method": method, "tokens": len(fitted[layer])}) as row:
                if row is None:
                    continue
                try:
                    run, row["code"] = make(weight, fitted[layer])
                except ModuleNotFoundError as error:
                    print(f"{who}: {error}")
                    row["missing"] = str(error)
                    continue
                times = []
                for _ in range(4):
                    started = time.perf_counter()
                    with torch.no_grad():
                        pruned = run().float()
                    times.append(time.perf_counter() - started)
                # The first run compiles.
                row["seconds"] = round(statistics.median(times[1:]), 4)
                verify(pruned, "2:4").check()
                row["shape"] = list(weight.shape)
                for column, inputs in (("error", fitted[layer]), ("error_held_out", judged[layer])):
                    goal = inputs @ weight.T
                    row[column] = round(float((inputs @ pruned.T - goal).norm() / goal.norm()), 5)
                if who == "bisparse" and method == "SparseGPT":
                    masked = weight * (pruned != 0)
                    for column, inputs in (("mask_error", fitted[layer]), ("mask_error_held_out", judged[layer])):
                        goal = inputs @ weight.T
                        row[column] = round(float((inputs @ masked.T - goal).norm() / goal.norm()), 5)


if __name__ == "__main__":
    main()
