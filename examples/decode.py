"""Generate text on this CPU, dense and packed, and print tokens per second and memory. See `make demo-speed`.

python examples/decode.py MODEL [PATTERN [TOKENS [THREADS]]]

Both models have the same weights, pruned by magnitude, and decode greedily in turns with transformers' cache. Figures are medians
over all tokens but the first. Without training the text is useless: this shows speed; docs/pruning.md is about quality.
"""

import copy
import sys
import time
from statistics import median

import torch
import transformers
from torch import nn

import bisparse
from bisparse.cli.model_source import open_source
from quiet import quiet


@torch.inference_mode()
def generate(model: nn.Module, ids: torch.Tensor, tokens: int) -> tuple[list[int], list[float]]:
    """The generated tokens, and milliseconds per token; the first includes the prompt."""
    cache, written, times = transformers.DynamicCache(config=model.config), [], []
    for _ in range(tokens):
        start = time.perf_counter()
        ids = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        times.append(1e3 * (time.perf_counter() - start))
        written.append(int(ids))
    return written, times


@torch.inference_mode()
def alone(layers: list[nn.Module]) -> float:
    """Milliseconds of the Linear layers alone, one after the other, with one token."""
    calls, times = [(layer, torch.randn(1, 1, layer.in_features).bfloat16()) for layer in layers], []
    for _ in range(15):
        start = time.perf_counter()
        for layer, inputs in calls:
            layer(inputs)
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def main(name: str, pattern: str = "4:8-T", tokens: int = 128, threads: int = 2, rounds: int = 3) -> None:
    torch.set_num_threads(threads)
    quiet()
    dense = (source := open_source(name)).model.bfloat16().eval()
    names = [one for one, module in dense.named_modules() if isinstance(module, nn.Linear) and one != "lm_head"]
    if not all(bisparse.verify(dense.get_submodule(one).weight, pattern) for one in names):
        print(bisparse.prune_(dense, pattern, include=names))
    models = {"dense": dense, "packed": copy.deepcopy(dense)}
    report = bisparse.accelerate_(models["packed"], include=names)
    notes = {f"packed: {one.shape[0]} x {one.shape[1]}, {one.note}" for one in report.layers}
    print(*sorted(notes | {f"left dense: {one.reason}" for one in report.left_dense if one.name in names}), sep="\n")
    ids = source.tokenizer("The quick brown fox jumps over the lazy dog, and then", return_tensors="pt").input_ids
    times, texts = {"dense": [], "packed": []}, {}
    for turn in range(rounds + 1):  # the first turn compiles and fills caches, and is not counted
        for one in sorted(models, reverse=turn % 2 == 1):
            texts[one], own = generate(models[one], ids, tokens if turn else 4)
            times[one] += own[1:] if turn else []
    print(repr(source.tokenizer.decode(texts["packed"])))
    print(f"{sum(a == b for a, b in zip(*texts.values(), strict=True))} of {tokens} tokens are the dense model's\n")
    for one, model in models.items():
        parts = alone([model.get_submodule(at) for at in names]), alone([model.lm_head])
        both = f"Linear {parts[0]:.2f}, head {parts[1]:.2f}, rest {median(times[one]) - sum(parts):.2f}"
        print(f"{one:6} {1e3 / median(times[one]):6.1f} tokens/s, {median(times[one]):.2f} ms: {both}")
    before, after = (sum(getattr(one, f"bytes_{side}") for one in report.layers) / 1e6 for side in ("before", "after"))
    print(f"{median(times['dense']) / median(times['packed']):.2f}x with {threads} threads; packed layers hold {after:.1f} MB,")
    print(
        f"not {before:.1f}; the model {report.bytes_after / 1e6:.1f}, not {report.bytes_before / 1e6:.1f}: the head stays dense"
    )


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
