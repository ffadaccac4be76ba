"""Digests see every number, wherever it is, and nothing that differs between processes. Oracle: one number that is changed."""

from __future__ import annotations

import copy
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from failing import Failing
from torch import Tensor, nn

from bisparse.pruning import prune_
from bisparse.pruning.fingerprint import fingerprint, saved_tensors
from bisparse.pruning.journal import JournalError


@dataclass
class Record:
    values: Tensor


class Plain:
    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.itself = self


CONTAINERS = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "mapping": lambda x: {"x": x},
    "tokenizer's output": lambda x: UserDict({"x": x}),
    "nested": lambda x: [("a", {"b": [x]})],
    "dataclass": Record,
    "object": Plain,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_one_number_in_the_middle_of_a_large_tensor_is_seen(name: str) -> None:
    made, one = CONTAINERS[name], torch.randn(40, 64)
    other = one.clone()
    other[20, 30] += 1
    assert fingerprint([made(one)]) == fingerprint([made(one.clone())]) != fingerprint([made(other)])


def test_names_and_nesting_are_seen() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    different: list[Any] = [[x, y], [[x], y], {"a": x, "b": y}, {"a": x, "c": y}, [y, x], [x, y, None], (x, y)]
    assert len({fingerprint(one) for one in different}) == len(different)


def test_functions_are_known_by_their_code() -> None:
    def make(factor: str) -> Any:
        return eval(f"lambda model, batch: [model({factor} * one) for one in (batch,)]")

    assert fingerprint(make("2")) == fingerprint(make("2")) != fingerprint(make("3"))


def test_caches_of_a_model_are_left_out() -> None:
    model = nn.BatchNorm1d(3)
    model.register_buffer("cache", torch.ones(2), persistent=False)
    assert {id(one) for one in saved_tensors(model)} == {id(one) for one in model.state_dict(keep_vars=True).values()}


class Network(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def doubled(model: nn.Module, batch: Tensor) -> Tensor:
    return model(2 * batch)


@pytest.mark.parametrize("changed", ["norm", "bias", "forward", "batches"])
def test_a_job_resumes_with_the_same_network_and_data_only(changed: str, tmp_path: Path) -> None:
    model, batches = Network(), [torch.randn(8, 16) for _ in range(5)]
    with pytest.raises(KeyboardInterrupt):
        prune_(model, "2:4", Failing(2, KeyboardInterrupt), batches, resume=tmp_path / "journal")
    other, options = copy.deepcopy(model), {}
    with torch.no_grad():
        if changed == "norm":
            other[1].weight[3] += 0.1
        elif changed == "bias":
            other[4].bias[3] += 0.1
    if changed == "forward":
        options["forward"] = doubled
    given = [{"input": batch} for batch in batches] if changed == "batches" else batches
    with pytest.raises(JournalError, match="another job"):
        prune_(other, "2:4", Failing(-1, ValueError), given, resume=tmp_path / "journal", **options)
    assert prune_(model, "2:4", Failing(-1, ValueError), batches, resume=tmp_path / "journal")
