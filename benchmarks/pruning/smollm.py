"""SmolLM2-135M: perplexity on WikiText-2 after one-shot pruning, calibrated on another corpus.

    python benchmarks/pruning/smollm.py FILE.gguf --wikitext FILE --calibration TEXT_OR_BROWN_FOLDER

The weights are Q4_1, dequantised: say so beside every figure. Perplexity is over the first 12,288 tokens at context 512, unless
--tokens asks for more; "as written" is that of the same text without WikiText's spaces around punctuation.
Rows: benchmarks/results/pruning_smollm.jsonl. A method and pattern that is cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import re
import time
from pathlib import Path

import torch
from experiment import Rows, detokenised, load_text, measured, method_named
from torch import Tensor, nn

from bisparse import verify
from bisparse.cli.calibration_text import token_batches
from bisparse.cli.model_source import open_source
from bisparse.pruning import NetworkReconstruction, prune_
from record import RESULTS

PATTERNS = ("2:4", "2:4-T", "4:8-T", "8:16-T", "16:32-T")
COMPARED = ("magnitude", "wanda", "sparsegpt", "adaprune, own inputs", "adaprune", "alps")


def perplexity(model: nn.Module, ids: Tensor, context: int = 512, batch: int = 4) -> float:
    rows = ids[: len(ids) // context * context].view(-1, context)
    total = 0.0
    with torch.inference_mode():
        for part in rows.split(batch):
            logits = model(input_ids=part).logits.float()
            total += float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return float(torch.tensor(total / (rows.shape[0] * (context - 1))).exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a .gguf file or a transformers folder")
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--spaced", action="store_true", help="spaces around punctuation in --calibration, as in WikiText")
    parser.add_argument("--draw", type=int, default=0, help="draw K starts K sevenths into the text: other sequences")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--network-sequences", type=int, default=1000, help='for methods that end in "the network on more"')
    parser.add_argument("--network-batch", type=int, default=2, help="sequences per step of that fit")
    parser.add_argument("--network-step", type=float, default=NetworkReconstruction().learning_rate, help="its learning rate")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=12_288, help="of WikiText-2, for the perplexity")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--budget", help="such as 50%%: one row per method, in which each layer gets one of --patterns or dense")
    parser.add_argument("--methods", nargs="+", default=COMPARED)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="the forward passes'; moments are float32"
    )
    parser.add_argument("--device", help="run blocks there")
    parser.add_argument("--journal", type=Path, help="a folder to resume single jobs from")
    parser.add_argument("--results", type=Path, default=RESULTS / "pruning_smollm.jsonl")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.results)
    source = open_source(options.model)
    dense = source.model.float() if options.dtype == "float32" else source.model.bfloat16()
    test = source.tokenizer(options.wikitext.read_text(), return_tensors="pt", verbose=False)["input_ids"][0][: options.tokens]
    words = load_text(options.calibration, "text", spaced=options.spaced)[0]
    text = source.tokenizer(words, return_tensors="pt", verbose=False)["input_ids"][0]
    text = text.roll(-(options.draw * len(text) // 7))
    batches = token_batches(text, sequences=options.sequences, length=options.length, batch_size=2)
    written = "\n".join(map(detokenised, options.wikitext.read_text().splitlines()))
    written = source.tokenizer(written, return_tensors="pt", verbose=False)["input_ids"][0][: options.tokens]
    common = {"model": "SmolLM2-135M-Instruct, Q4_1 dequantised", "tokens": options.tokens, "dtype": options.dtype}
    with rows.new({**common, "pattern": "dense"}) as row:
        if row is not None:
            row |= {"perplexity": perplexity(dense, test), "perplexity_as_written": perplexity(dense, written)}
    for pattern in options.patterns if options.budget is None else [f"{options.budget} of {', '.join(options.patterns)}, dense"]:
        for name in options.methods:
            method, how = method_named(name)
            more = options.network_sequences if name.endswith("the network on more") else None
            if more is not None:
                own = token_batches(text, sequences=more, length=options.length, batch_size=options.network_batch)
                how["reconstruction"] = dataclasses.replace(how["reconstruction"], batches=own)
            data = {"sequences": options.sequences, "length": options.length, "corpus": options.calibration.name}
            data |= {"spaced": options.spaced or None, "draw": options.draw or None, "network_sequences": more}
            data["network_batch"] = options.network_batch if more is not None and options.network_batch != 2 else None
            if isinstance(how["reconstruction"], NetworkReconstruction):  # rows without a step are of 0.003
                how["reconstruction"] = dataclasses.replace(how["reconstruction"], learning_rate=options.network_step)
                data["network_step"] = options.network_step
            with rows.new({**common, "pattern": pattern, "method": name, **(data if method.needs else {})}) as row:
                if row is None:
                    continue
                model = copy.deepcopy(dense)
                started = time.perf_counter()
                resume = (
                    options.journal / re.sub(r"[ ,%]+", "-", f"{name}-{pattern}").replace(":", "of") if options.journal else None
                )
                if options.budget is not None:
                    how = {**how, "budget": options.budget, "patterns": [*options.patterns, "dense"]}
                given = pattern if options.budget is None else None
                report = prune_(model, given, method, batches, **how, device=options.device, resume=resume, progress=True)
                row |= measured(report, time.perf_counter() - started) | {"notes": list(report.notes)}
                for layer in report:
                    verify(model.get_parameter(layer.parameter), layer.pattern, name=layer.name).check()
                row |= {"perplexity": perplexity(model, test), "perplexity_as_written": perplexity(model, written)}


if __name__ == "__main__":
    main()
