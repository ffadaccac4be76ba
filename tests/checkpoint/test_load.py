"""Loading is exact or refused: tied tensors that differ, and values that a model's dtype cannot hold."""

from pathlib import Path

import pytest
import torch
from checkpoint_files import write_folder
from torch import nn

import bisparse
from bisparse.checkpoint import CheckpointError, load, save


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
