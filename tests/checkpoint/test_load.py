"""Loading is exact or refused: tied tensors that differ, and values that a model's dtype cannot hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import write_folder
from torch import Tensor, nn

import bisparse
from bisparse.checkpoint import CheckpointError, load, save
from bisparse.training import Distillation, plain_state_dict


class Tied(nn.Module):
    """A head that is the embedding, and a view of a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("first", self.emb.weight.detach()[:2])


class Views(nn.Module):
    """One block of memory, and views of its first and its last rows."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.zeros(8, 4))
        self.first, self.last = (nn.Parameter(self.flat.data[rows]) for rows in (slice(5), slice(5, 8)))


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("names", [("emb.weight", "head.weight"), ("head.weight", "emb.weight"), ("emb.weight", "first")])
@pytest.mark.parametrize("number", [1.5, float("nan")])
def test_tied_tensors_that_differ_in_the_file_are_refused_by_both_names(
    tmp_path: Path, names: tuple[str, str], number: float
) -> None:
    model = Tied()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in state.items()}
    load(model, write_folder(tmp_path / "equal", state))
    state[names[1]][0, 0] = number
    with pytest.raises(CheckpointError, match="to which the model ties it") as refused:
        load(model, write_folder(tmp_path / "different", state))
    assert all(name in str(refused.value) for name in names) and unchanged(model, before)


@pytest.mark.parametrize(
    ("stored", "own", "fits"),
    [
        (torch.tensor([1.0, 65504.0, float("inf")]), torch.float16, True),
        (torch.tensor([1.0, 70000.0, 2.0]), torch.float16, False),
        (torch.tensor([1.0, 3e38, 2.0], dtype=torch.float64), torch.float32, True),
        (torch.tensor([1.0, 1e39, 2.0], dtype=torch.float64), torch.float32, False),
        (torch.tensor([1.0, 1000.0, 2.0]), torch.float8_e4m3fn, False),
        (torch.tensor([1.0, 400.0, float("nan")]), torch.float8_e4m3fn, True),
        (torch.tensor([1, 1 << 40, 2]), torch.int32, False),
        (torch.tensor([1, 2, 100000]), torch.float16, False),
        (torch.tensor([0, 1, 2], dtype=torch.uint8), torch.bool, False),
        (torch.tensor([0, 1, 1], dtype=torch.uint8), torch.bool, True),
        (torch.tensor([1.0, 3e38, 2.0]), torch.bfloat16, True),
    ],
)
def test_values_that_the_models_dtype_cannot_hold_are_refused_with_the_layer(
    tmp_path: Path, stored: torch.Tensor, own: torch.dtype, fits: bool
) -> None:
    model = nn.Module()
    model.register_buffer("inner", torch.zeros(3).to(own))
    model.register_buffer("other", torch.zeros(3))
    source = write_folder(tmp_path / "m", {"inner": stored, "other": torch.ones(3)})
    if fits:
        load(model, source)
        assert torch.equal(model.inner.double().nan_to_num(), stored.to(own).double().nan_to_num())
    else:
        with pytest.raises(CheckpointError, match=r"tensor inner has 1 values, up to .* cannot hold"):
            load(model, source)
        assert not model.inner.float().any() and not model.other.any()


def test_a_job_from_a_file_whose_tied_tensors_differ_is_not_saved(tmp_path: Path) -> None:
    model = Tied()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["head.weight"] += 1
    source = write_folder(tmp_path / "m", state)
    report = bisparse.prune_(model, "2:4", include="head")
    with pytest.raises(CheckpointError, match=r"has other values than (emb|head)\.weight"):
        save(model, tmp_path / "out", report=report, source=source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("held", "filled"),
    [
        ({"flat": (8, 4)}, True),
        ({"first": (5, 4), "last": (3, 4)}, True),
        ({"first": (5, 4)}, False),  # begins where flat does
        ({"last": (3, 4)}, False),
    ],
)
def test_a_tensor_may_be_absent_only_if_others_fill_all_of_its_memory(
    tmp_path: Path, held: dict[str, tuple[int, int]], filled: bool
) -> None:
    model = Views()
    source = write_folder(tmp_path / "m", {name: torch.ones(shape) for name, shape in held.items()})
    if filled:
        load(model, source)
        assert bool((model.flat == 1).all())
    else:
        with pytest.raises(CheckpointError, match=r"lacks 2 of the model's tensors \['flat'"):
            load(model, source)
        assert not model.flat.any()


class Cloned(nn.Linear):
    """A layer whose entries in the state_dict are copies."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"].clone()


class Metric(nn.Module):
    """A state that is neither parameter nor buffer, as in torchmetrics, which are loaded by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(2)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "total"] = self.total.clone()

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.total = state.pop(prefix + "total", self.total)


class Counter(nn.Module):
    """Extra state that is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.seen: list[int] = []

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.seen)

    def set_extra_state(self, state: Tensor) -> None:
        if len(state) > 3:
            raise ValueError("too many")
        self.seen = state.tolist()


class Note(nn.Module):
    """Extra state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.text = "new"

    def get_extra_state(self) -> dict[str, str]:
        return {"text": self.text}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.text = state["text"]


def made() -> nn.ModuleDict:
    return nn.ModuleDict({"plain": nn.Linear(16, 16), "cloned": Cloned(16, 16), "metric": Metric(), "counter": Counter()})


def hooked() -> nn.ModuleDict:
    model = made()
    model.register_state_dict_post_hook(lambda module, state, *_: state.update({key: v.clone() for key, v in state.items()}))
    return model


@pytest.mark.parametrize("build", [made, hooked])
def test_entries_that_are_not_memory_of_the_model_are_loaded_by_the_model(tmp_path: Path, build: Any) -> None:
    model, other = build(), build()
    report = bisparse.prune_(model, "2:4")
    model["metric"].total, model["counter"].seen = torch.tensor([3.0, 5.0]), [7, 8]
    save(model, tmp_path / "out", report=report)
    load(other, tmp_path / "out")
    assert unchanged(other, model.state_dict()) and other["counter"].seen == [7, 8]
    model["counter"].seen = [1, 2, 3, 4]
    model["metric"].total += 1
    save(model, tmp_path / "bad", report=report)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="too many"):
        load(other, tmp_path / "bad")
    assert unchanged(other, before) and other["counter"].seen == [7, 8]


def test_a_copy_that_the_model_does_not_load_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    source = write_folder(tmp_path / "m", {name: torch.ones_like(value) for name, value in model.state_dict().items()})
    model[0].register_state_dict_post_hook(lambda module, state, prefix, _: state.update({prefix + "weight": module.weight * 2}))
    before = model[0].weight.clone()
    with pytest.raises(CheckpointError, match=r"tensor 0\.weight was passed to the model's load_state_dict, but"):
        load(model, source)
    assert torch.equal(model[0].weight, before)


def test_extra_state_that_is_no_tensor_stays_as_it_is_with_a_warning(tmp_path: Path) -> None:
    model, other = (nn.Sequential(nn.Linear(16, 16), Note()) for _ in range(2))
    model[1].text = "old"
    save(model, tmp_path / "out", report=bisparse.prune_(model, "2:4"))
    with pytest.warns(UserWarning, match=r"1 entries .* are no tensors.*1\._extra_state") as warned:
        load(other, tmp_path / "out")
    assert torch.equal(other[0].weight, model[0].weight) and other[1].text == "new"
    assert warned[0].filename == __file__
    assert torch.equal(Distillation(other, tmp_path / "out").teacher[0].weight, model[0].weight)
    assert plain_state_dict(model)["1._extra_state"] == {"text": "old"}
