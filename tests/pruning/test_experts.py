"""Experts in 3-D parameters are calibrated one by one; the oracle is each expert as a Linear layer on its own tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bisparse
from bisparse.pruning import ALPS, AdaPrune, CalibrationError, GradientAdaPrune, Method, SparseGPT, Wanda
from bisparse.pruning.calibration.options import EXPERT_FLOOR
from bisparse.quantization import quantize_

transformers = pytest.importorskip("transformers", minversion="5")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 48},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 0, "num_key_value_heads": 4, **LATENT,
    },
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
}  # fmt: skip
PARALLEL = {"order": "parallel", "expert_floor": 0}


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def batches_of(number: int = 5) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(97, (2, 32), generator=generator)} for _ in range(number)]


def stacks_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: one for name, one in model.named_parameters() if one.ndim == 3}


def linears(stack: Tensor, transposed: bool) -> list[nn.Linear]:
    """The experts of a stack as plain layers."""
    found = []
    for matrix in stack.detach():
        weight = matrix.t() if transposed else matrix
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data.copy_(weight)
        found.append(layer)
    return found


class Spy:
    """Computes which tokens each expert gets, and its inputs, from the arguments of the experts' module alone."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls: list[tuple[Any, ...]] = []
        module.register_forward_pre_hook(lambda _, args, kwargs: self.calls.append((*args, *kwargs.values())), with_kwargs=True)

    def tokens(self, expert: int) -> list[Tensor]:
        experts = self.module.gate_up_proj.shape[0]
        found = []
        for hidden, *routing in self.calls:
            if routing:
                chosen = (routing[0] == expert).any(1)
                found.append(hidden[chosen])
            else:
                own = hidden.view(experts, -1, hidden.shape[-1])[expert]
                found.append(own[own.abs().sum(1) > 0])
        return found

    def inner(self, expert: int, tokens: Tensor) -> Tensor:
        """The input of the down projection."""
        module = self.module
        transposed = getattr(module, "is_transposed", type(module).__name__.startswith("Llama4"))
        weight = module.gate_up_proj[expert]
        both = tokens @ (weight if transposed else weight.t())
        if getattr(module, "has_bias", False):
            both = both + module.gate_up_proj_bias[expert]
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(both)
        gate, up = both.chunk(2, dim=-1)
        return module.act_fn(gate) * up


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"jetmoe"}))
def test_each_expert_of_every_family_is_pruned_as_a_linear_layer_on_its_tokens(family: str) -> None:
    model, batches = model_of(family), batches_of()
    dense = copy.deepcopy(model)
    module_name = next(name for name in stacks_of(model) if name.endswith("gate_up_proj")).removesuffix(".gate_up_proj")
    spy = Spy(dense.get_submodule(module_name))
    with torch.no_grad():
        for batch in batches:
            dense(**batch)
    report = bisparse.prune_(model, "2:4", AdaPrune(), batches, **PARALLEL)
    for which in ("gate_up_proj", "down_proj"):
        result = report[f"{module_name}.{which}"]
        transposed = result.layout.inputs_first
        oracle = linears(getattr(spy.module, which), transposed)
        pruned = linears(getattr(model.get_submodule(module_name), which), transposed)
        for expert, (own, theirs) in enumerate(zip(oracle, pruned, strict=True)):
            tokens = spy.tokens(expert)
            if which == "down_proj":
                with torch.no_grad():
                    tokens = [spy.inner(expert, one) for one in tokens]
            assert f"{sum(map(len, tokens))}" in result.note
            bisparse.prune_(nn.Sequential(own), "2:4", AdaPrune(), tokens, order="parallel")
            torch.testing.assert_close(theirs.weight, own.weight, rtol=1e-3, atol=1e-4)
    routers = [one.name for one in report.left_dense if "router" in one.reason]
    assert len(routers) >= 2
    assert all(torch.equal(model.get_submodule(one).weight, dense.get_submodule(one).weight) for one in routers)


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(), ALPS(), AdaPrune(SparseGPT()), GradientAdaPrune(steps=3)], ids=repr)
@pytest.mark.parametrize("pattern", ["2:4", "4:8-T"])
def test_every_method_prunes_each_expert_as_a_linear_layer(method: Method, pattern: str) -> None:
    model, batches = model_of("mixtral"), batches_of()
    dense = copy.deepcopy(model)
    spy = Spy(dense.model.layers[0].mlp.experts)
    with torch.no_grad():
        for batch in batches:
            dense(**batch)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    report = bisparse.prune_(model, pattern, method, batches, include=name, **PARALLEL)
    own = report[name]
    assert own.density <= 0.5 and own.gap is not None
    assert bool(bisparse.verify(model.model.layers[0].mlp.experts.gate_up_proj != 0, pattern, layout=own.layout))
    for expert, theirs in enumerate(linears(model.get_parameter(name), False)):
        oracle = linears(spy.module.gate_up_proj, False)[expert]
        bisparse.prune_(nn.Sequential(oracle), pattern, method, spy.tokens(expert), order="parallel")
        same = float(((theirs.weight != 0) == (oracle.weight != 0)).float().mean())
        # ALPS: masks depend on the last bits of its inputs.
        assert same > (0.8 if isinstance(method, ALPS) else 0.999)


def test_the_size_of_weights_does_not_change_the_error_of_a_stack() -> None:
    name, batches, errors = "model.layers.0.mlp.experts.down_proj", batches_of(), []
    for exponent in (0, -100):
        model = model_of("mixtral")
        with torch.no_grad():
            model.get_parameter(name).mul_(2.0**exponent)
        errors.append(bisparse.prune_(model, "2:4", "sparsegpt", batches, include=name, **PARALLEL)[name].error)
    assert 0 < errors[0] < 1 and errors[1] == pytest.approx(errors[0], rel=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "jetmoe"])
def test_in_the_order_sequential_the_down_projection_sees_the_pruned_up_projection(family: str) -> None:
    model, batches = model_of(family), batches_of()
    report = bisparse.prune_(model, "2:4", "adaprune", batches, expert_floor=0)
    stacks = stacks_of(model)
    assert stacks
    for name in stacks:
        layer = report[name]
        assert layer.error is not None and layer.error_before is not None
        assert layer.error < layer.error_before
        assert bool(bisparse.verify(model.get_parameter(name) != 0, "2:4", layout=layer.layout))


def test_experts_with_few_tokens_are_calibrated_on_all_tokens() -> None:
    batches = batches_of()
    name = "model.layers.0.mlp.experts.down_proj"

    def pruned(floor: float) -> tuple[nn.Module, str]:
        model = model_of("mixtral")
        return model, bisparse.prune_(model, "2:4", AdaPrune(), batches, order="parallel", expert_floor=floor)[name].note

    dense = model_of("mixtral")
    spy = Spy(dense.model.layers[0].mlp.experts)
    with torch.no_grad():
        for batch in batches:
            dense(**batch)
    model, note = pruned(float("inf"))
    assert "on all tokens, since few were routed there: experts 0, 1, 2, 3" in note
    for expert, theirs in enumerate(linears(model.get_parameter(name), False)):
        with torch.no_grad():
            tokens = [spy.inner(expert, hidden) for hidden, *_ in spy.calls]
        own = linears(spy.module.down_proj, False)[expert]
        bisparse.prune_(nn.Sequential(own), "2:4", AdaPrune(), tokens, order="parallel")
        torch.testing.assert_close(theirs.weight, own.weight, rtol=1e-3, atol=1e-4)
    assert "all tokens" not in pruned(0)[1]
    counts = sorted(sum(map(len, spy.tokens(expert))) for expert in range(4))
    some = pruned((counts[0] + 0.5) / dense.model.layers[0].mlp.experts.down_proj.shape[2])[1]
    assert "on all tokens, since few were routed there: expert " in some


class Mixture(nn.Module):
    """Experts that tokens are sent to by their first number; expert 3 gets none."""

    def __init__(self, gathers: bool = False) -> None:
        super().__init__()
        self.experts = Stack(gathers)

    def forward(self, x: Tensor) -> Tensor:
        index = (x[:, :1] > 0).long() + (x[:, :1] > 1).long()
        return self.experts(x, index, torch.ones_like(index, dtype=x.dtype))


class Stack(nn.Module):
    def __init__(self, gathers: bool) -> None:
        super().__init__()
        self.gathers = gathers
        self.up_proj = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if self.gathers:
            return torch.einsum("ti,toi->to", x, self.up_proj[index[:, 0]])
        out = torch.zeros_like(x)
        for expert in range(4):
            mine = index[:, 0] == expert
            out[mine] = functional.linear(x[mine], self.up_proj[expert]) * weights[mine]
        return out


LAYOUT = {"experts.up_proj": "experts"}


@pytest.mark.parametrize(
    ("floor", "said"), [(0, "by magnitude, since no token was routed there: expert 3"), (1, "on all tokens")]
)
def test_an_expert_without_tokens_is_reported(floor: float, said: str) -> None:
    torch.manual_seed(0)
    model, batches = Mixture(), [torch.randn(64, 16) for _ in range(5)]
    before = model.experts.up_proj.detach().clone()
    report = bisparse.prune_(model, "2:4", "adaprune", batches, layouts=LAYOUT, expert_floor=floor)
    (layer,) = report
    assert said in layer.note and ", 0;" in layer.note
    if floor == 0:
        by_magnitude = bisparse.solve(before[3].abs(), "2:4").mask
        assert torch.equal(model.experts.up_proj[3], before[3] * by_magnitude)


def test_a_wrong_layout_and_experts_that_cannot_be_seen_are_refused_or_left_dense() -> None:
    batches = [torch.randn(64, 16) for _ in range(5)]
    model = Mixture()
    before = model.experts.up_proj.detach().clone()
    with pytest.raises(CalibrationError, match="multiplies these experts as 'experts', but their layout is 'experts-transposed'"):
        bisparse.prune_(model, "2:4", "wanda", batches, layouts={"experts.up_proj": "experts-transposed"})
    assert torch.equal(model.experts.up_proj, before)
    with pytest.raises(CalibrationError, match="no calibration batch reached any"):
        bisparse.prune_(Mixture(gathers=True), "2:4", "wanda", batches, layouts=LAYOUT)


@pytest.mark.parametrize("value", [-1, float("nan"), "all", True])
def test_a_floor_that_is_no_number_of_tokens_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="expert_floor="):
        bisparse.prune_(Mixture(), "2:4", "wanda", [torch.randn(4, 16)], layouts=LAYOUT, expert_floor=value)


def test_padding_is_not_counted() -> None:
    model, batches = model_of("mixtral"), batches_of()
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :16] = 0
    report = bisparse.prune_(model, "2:4", "wanda", batches, expert_floor=0)
    note = report["model.layers.0.mlp.experts.gate_up_proj"].note
    counts = [int(one) for one in note.rpartition(": ")[2].split(", ")]
    assert sum(counts) == 2 * 5 * (16 + 32)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_implementation_of_the_experts_does_not_matter_and_is_unchanged(implementation: str) -> None:
    batches = batches_of()
    plain, other = model_of("mixtral"), model_of("mixtral")
    plain.set_experts_implementation("eager")
    other.set_experts_implementation(implementation)
    for model in (plain, other):
        bisparse.prune_(model, "2:4", AdaPrune(), batches, **PARALLEL)
    assert other.config._experts_implementation == implementation
    for name, stack in stacks_of(plain).items():
        torch.testing.assert_close(other.get_parameter(name), stack, rtol=1e-3, atol=1e-4)


def test_a_budget_and_a_conversion_take_experts() -> None:
    model, batches = model_of("mixtral"), batches_of()
    report = bisparse.prune_(model, budget="60%", patterns=["2:4", "6:8", "dense"], method="adaprune", batches=batches)
    assert any("experts" in layer.name and "under the budget" in layer.note for layer in report)
    dense = [model.get_submodule(one.name).weight.numel() for one in report.left_dense if "under the budget" in one.reason]
    total = sum(layer.size for layer in report) + sum(dense)
    assert sum(layer.size * layer.density for layer in report) + sum(dense) <= 0.6 * total
    again = bisparse.convert_(model, "2:4", batches=batches, include="*experts*")
    assert all("calibrated per expert" in layer.note for layer in again)
    assert "on all tokens (below 2 routed tokens per input)" in " ".join(again.notes) and EXPERT_FLOOR == 2


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_quantisation_with_error_feedback_takes_each_expert_as_a_linear_layer(family: str) -> None:
    model, batches = model_of(family), batches_of()
    dense = copy.deepcopy(model)
    spy = Spy(dense.model.layers[0].mlp.experts)
    with torch.no_grad():
        for batch in batches:
            dense(**batch)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    (result,) = quantize_(model, "int8", data=batches, method="gptq", include=name)
    transposed = result.layout.inputs_first
    assert result.error is not None and result.error < 0.02
    for expert, theirs in enumerate(linears(model.get_parameter(name), transposed)):
        own = linears(spy.module.gate_up_proj, transposed)[expert]
        quantize_(nn.Sequential(own), "int8", data=spy.tokens(expert), method="gptq")
        assert float((theirs.weight == own.weight).float().mean()) > 0.99
