"""A GPT block in training, forward and backward, compiled: sparse with a refresh every 40 steps against dense.

    python benchmarks/gpu/block.py [--width 4096] [--batch 8] [--length 2048] [--fresh] [--rehearse]

Both are compiled whole; weights are float32 under bfloat16 autocast. First the sparse block's output is compared with the
masked-dense block's, before and after a refresh. A sparse step is forward, backward, and its share of a refresh: the mask search
on the device, and the new positions. A refresh at every step is reported beside it. Rows go to benchmarks/results/gpu.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from environment import RESULTS, clocked, need_gpu, record_on, relative_error, take_turns
from torch import Tensor, nn

from bisparse import Sparsity, accelerate_, sparsify_
from bisparse.accelerate import usable_backends

REFRESH = 40
TARGET, REFRESH_SHARE = 1.15, 0.03
TOLERANCE = 2e-2


class Block(nn.Module):
    """Attention and MLP, residual, normed before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in self.qkv(self.norm(hidden)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.down(nn.functional.gelu(self.up(self.norm2(hidden)), approximate="tanh"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU, by the reference backend; writes nothing")
    options = parser.parse_args()
    device = torch.device("cpu") if options.rehearse else need_gpu("block.py")
    if options.rehearse:
        options.width, options.batch, options.length, options.rounds = 64, 2, 16, 3
        print("A rehearsal on the CPU by the reference backend: the times below say nothing about a GPU.")
    reasons = usable_backends(device)
    backends = (
        ["reference"]
        if options.rehearse
        else [name for name, reason in reasons.items() if reason is None and name != "reference"]
    )
    record = None if options.rehearse else record_on(device, options.results, options.fresh)
    hidden = torch.randn(
        options.batch, options.length, options.width, device=device, generator=torch.Generator(device).manual_seed(1)
    )
    compiler = "aot_eager" if options.rehearse else "inductor"
    torch._dynamo.config.recompile_limit = 64  # two libraries make nine graphs of one class
    dense = build(options.width, device)
    programs = {"dense": step(torch.compile(dense, backend=compiler, fullgraph=True), dense, hidden, device)}
    sparsities: dict[str, Sparsity] = {}
    failed = False
    for backend in backends:
        for mvue in (False, True):
            name = f"sparse{', MVUE' if mvue else ''} by {backend}"
            block = build(options.width, device)
            sparsity = sparsify_(block, "2:4-T", refresh=REFRESH, mvue=mvue)
            accelerate_(block, backend)  # type: ignore[arg-type]
            compiled = torch.compile(block, backend=compiler, fullgraph=True)
            error = max(differs(compiled, block, sparsity, hidden), changed(compiled, block, sparsity, hidden))
            if error > TOLERANCE:
                print(f"{name}: relative error {error:.1e}: WRONG, not timed", file=sys.stderr)
                failed = True
                continue
            programs[name] = step(compiled, block, hidden, device)
            sparsities[name] = sparsity
    times = take_turns(programs, options.rounds)
    refreshes = take_turns({name: refresh(one, device) for name, one in sparsities.items()}, options.rounds)
    base = sum(times["dense"][0])
    key = {"benchmark": "block", "width": options.width, "batch": options.batch, "length": options.length, "dtype": "bfloat16"}
    for name, ((forward, backward), spreads) in times.items():
        search = refreshes[name][0][0] if name in refreshes else 0.0
        total = forward + backward + search / REFRESH
        figures = {
            "forward_ms": forward,
            "backward_ms": backward,
            "refresh_ms": search,
            "refresh_every": REFRESH,
            "spread": max(spreads),
            "speedup": base / total,
            "target": TARGET if name.startswith("sparse by") else None,
            "refresh_share_every_step": search / (forward + backward + search) if search else None,
            "refresh_share_target": REFRESH_SHARE,
        }
        if record is not None:
            record.add({**key, "contender": name}, figures)
        share = figures["refresh_share_every_step"]
        shown = (
            ""
            if share is None
            else f"  refresh {search:.3f} ms, {share:.1%} of a step with one (target under {REFRESH_SHARE:.0%})"
        )
        print(f"{name:28} {forward:8.3f} + {backward:8.3f} ms  {base / total:5.2f}x{shown}")
    if failed:
        raise SystemExit(1)


def build(width: int, device: torch.device) -> Block:
    torch.manual_seed(0)
    return Block(width, max(1, width // 128)).to(device)


def masked_dense(block: Block, sparsity: Sparsity, hidden: Tensor) -> Tensor:
    """The output of a plain block with the same masked weights."""
    plain = build(hidden.shape[-1], hidden.device)
    state = {name: value for name, value in block.state_dict().items() if "parametrizations" not in name}
    for layer in sparsity.layers:
        state[f"{layer.name}.weight"] = layer.full_weight() * layer.mask
    plain.load_state_dict(state)
    with torch.no_grad(), torch.autocast(hidden.device.type, torch.bfloat16):
        return plain(hidden)


def differs(compiled: nn.Module, block: Block, sparsity: Sparsity, hidden: Tensor) -> float:
    """Relative error of the sparse block's output."""
    with torch.no_grad(), torch.autocast(hidden.device.type, torch.bfloat16):
        found = compiled(hidden)
    return relative_error(found, masked_dense(block, sparsity, hidden))


def changed(compiled: nn.Module, block: Block, sparsity: Sparsity, hidden: Tensor) -> float:
    """The same once the weights have moved and the masks have followed."""
    with torch.no_grad():
        for layer in sparsity.layers:
            layer.weight.add_(torch.randn_like(layer.weight), alpha=float(layer.weight.std()) / 2)
    sparsity.refresh()
    return differs(compiled, block, sparsity, hidden)


def step(compiled: nn.Module, block: Block, hidden: Tensor, device: torch.device):  # type: ignore[no-untyped-def]
    """Forward and backward, timed apart."""
    inputs = hidden.clone().requires_grad_()
    upstream = torch.randn_like(hidden)

    def run() -> tuple[float, ...]:
        block.zero_grad()
        inputs.grad = None
        made: list[Tensor] = []

        def forward() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                made.append(compiled(inputs))

        return clocked(forward, lambda: made[0].backward(upstream.to(made[0].dtype)), device=device)

    return run


def refresh(sparsity: Sparsity, device: torch.device):  # type: ignore[no-untyped-def]
    """A mask search on all layers, and new positions."""
    sparsity.measure_every = 0
    return lambda: clocked(sparsity.refresh, device=device)


if __name__ == "__main__":
    main()
