"""save and load: plain dense weights that load anywhere, from models that hold theirs in other forms."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bisparse
from bisparse import CheckpointError, Pattern, PatternError, load, prune_, save, verify_checkpoint
from bisparse.checkpoint import load_masks, read_sidecar


class Tied(nn.Module):
    """A head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.body = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 24, bias=False)
        self.lm_head.weight = self.embed.weight


class Mask(nn.Module):
    """A parametrization like those of sparse training."""

    def __init__(self, mask: Tensor, pattern: Pattern) -> None:
        super().__init__()
        self.mask = nn.Buffer(mask)
        self.pattern = pattern

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Packed(nn.Module):
    """A layer that holds half a weight, as accelerated ones do."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = weight.shape
        self.packed = nn.Buffer(weight.to_sparse().values())
        self.places = nn.Buffer(weight.to_sparse().indices())
        self.bias = nn.Parameter(torch.randn(weight.shape[0]))

    def dense_weight(self) -> Tensor:
        return torch.sparse_coo_tensor(self.places, self.packed, self.shape, check_invariants=True).to_dense()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.BatchNorm1d(16))


def test_a_pruned_model_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = mlp()
    report = prune_(model, "4:8-T", patterns={"2": "2:4"})
    save(model, tmp_path / "out", report=report)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    fresh = mlp()
    sidecar = load(fresh, tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))
    assert sidecar is not None and sidecar.report == report
    assert verify_checkpoint(tmp_path / "out")
    masks = load_masks(tmp_path / "out")
    assert masks.keys() == {"0.weight", "2.weight"}
    assert all(torch.equal(mask, model.state_dict()[name] != 0) for name, mask in masks.items())


def test_strict_loading_by_plain_torch(tmp_path: Path) -> None:
    model = Tied()
    save(model, tmp_path / "out", report=prune_(model, "2:4"))
    fresh = Tied()
    fresh.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    assert torch.equal(fresh.lm_head.weight, model.embed.weight), "tied weights stand under each of their names"


def test_a_checkpoint_that_names_tied_weights_once_loads(tmp_path: Path) -> None:
    model = Tied()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    (tmp_path / "model").mkdir()
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    fresh = Tied()
    load(fresh, tmp_path / "model")
    assert torch.equal(fresh.lm_head.weight, model.embed.weight) and fresh.lm_head.weight is fresh.embed.weight


def test_a_parametrized_model_is_saved_as_its_forward_pass_sees_it(tmp_path: Path) -> None:
    model, pattern = mlp(), Pattern(4, 8, transposable=True)
    for layer in (model[0], model[2]):
        assert isinstance(layer, nn.Linear)
        mask = bisparse.solve(layer.weight.detach().abs(), pattern).mask
        parametrize.register_parametrization(layer, "weight", Mask(mask, pattern))
    sidecar = save(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == mlp().state_dict().keys(), "plain names"
    assert torch.equal(written["2.weight"], model[2].weight)
    assert {layer.pattern for layer in sidecar.report} == {"4:8-T"}, "the parametrization knows its pattern"
    load(mlp(), tmp_path / "out")
    assert parametrize.is_parametrized(model[0]), "the model is as it was"


def test_a_model_in_sparse_training_is_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    bisparse.sparsify_(model, "2:4-T")
    save(model, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert verify_checkpoint(tmp_path / "out", "2:4-T")


def test_packed_layers_are_asked_for_their_dense_weight(tmp_path: Path) -> None:
    weight = torch.randn(16, 16)
    weight *= bisparse.solve(weight.abs(), "2:4").mask
    model = nn.Sequential(nn.Linear(16, 16), Packed(weight))
    prune_(model, "2:4")
    save(model, tmp_path / "out", "2:4")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(written["1.weight"], weight)


def test_a_mask_lost_before_saving_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = mlp()
    report = prune_(model, "4:8-T")
    with torch.no_grad():
        model[2].weight[5] += 1e-3
    with pytest.raises(PatternError, match=r"^2: .*4:8-T.*W, row 5"):
        save(model, tmp_path / "out", report=report)
    assert not list(tmp_path.iterdir())


def test_a_pattern_must_come_from_somewhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass pattern"):
        save(mlp(), tmp_path / "out")
    with pytest.raises(PatternError, match="0: "):
        save(mlp(), tmp_path / "out", "2:4")
    assert not list(tmp_path.iterdir())


def test_half_precision_and_buffers(tmp_path: Path) -> None:
    model = mlp().bfloat16()
    save(model, tmp_path / "out", report=prune_(model, "2:4"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["0.weight"].dtype == torch.bfloat16 and written["3.num_batches_tracked"].dtype == torch.int64
    assert written["3.running_mean"].shape == (16,)


@pytest.mark.parametrize("damage", ["shape", "missing", "unexpected", "mask", "truncated"])
def test_loading_what_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    model = mlp()
    save(model, tmp_path / "out", report=prune_(model, "2:4"))
    path = tmp_path / "out" / "model.safetensors"
    state = load_file(path)
    match damage:
        case "shape":
            state["3.bias"] = torch.zeros(17)
        case "missing":
            del state["3.bias"]
        case "unexpected":
            state["more"] = torch.zeros(3)
        case "mask":
            state["2.weight"] = torch.randn(16, 24)
    save_file(state, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-4])
    fresh = mlp()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises((CheckpointError, PatternError)) as caught:
        load(fresh, tmp_path / "out")
    assert str(tmp_path) in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_on_the_meta_device_is_refused_not_passed_over(tmp_path: Path, strict: bool) -> None:
    model = mlp()
    save(model, tmp_path / "out", report=prune_(model, "2:4"))
    half = mlp()
    half[2].to("meta")
    before = half[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"2\.weight is on the meta device"):
        load(half, tmp_path / "out", strict=strict)
    assert torch.equal(half[0].weight, before)


@pytest.mark.parametrize(
    ("stored", "own", "fits"),
    [
        (torch.float32, torch.int8, False),
        (torch.complex64, torch.float32, False),
        (torch.float32, torch.bool, False),
        (torch.uint8, torch.bool, True),
        (torch.float64, torch.float16, True),
        (torch.int64, torch.float32, True),
    ],
)
def test_values_that_the_models_dtype_does_not_have_are_refused(
    tmp_path: Path, stored: torch.dtype, own: torch.dtype, fits: bool
) -> None:
    model = nn.Linear(8, 8)
    model.register_buffer("table", torch.zeros(4, dtype=own))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = nn.Linear(8, 8).state_dict() | {"table": torch.tensor([0, 1, 1, 0]).to(stored)}
    save_file(new, tmp_path / "model.safetensors")
    if fits:
        load(model, tmp_path)
        assert model.table.tolist() == [0, 1, 1, 0]
        return
    with pytest.raises(CheckpointError, match="does not have"):
        load(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_loading_what_fits_in_part(tmp_path: Path) -> None:
    model = mlp()
    save(model, tmp_path / "out", report=prune_(model, "2:4"))
    part = nn.Sequential(nn.Linear(16, 24))
    with pytest.raises(CheckpointError, match="strict=False"):
        load(part, tmp_path / "out")
    load(part, tmp_path / "out", strict=False)
    assert torch.equal(part[0].weight, model[0].weight)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("prefix", "stripped", "hint"),
    [
        ("module.", "", "the checkpoint's have the prefix 'module.'"),
        ("", "0.", "the model's have the prefix '0.'"),
        ("x.y.", "", "x.y."),
    ],
)
def test_loading_what_has_no_name_in_common_says_so(tmp_path: Path, prefix: str, stripped: str, hint: str, strict: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = model.state_dict()["0.weight"].clone()
    state = {prefix + name.removeprefix(stripped): torch.ones_like(value) for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"has none of the model's tensors") as caught:
        load(model, tmp_path / "w.pt", strict=strict)
    assert hint in str(caught.value) and "nothing was loaded" in str(caught.value)
    assert torch.equal(model[0].weight, before)


def test_any_checkpoint_can_be_loaded(tmp_path: Path) -> None:
    model, fresh = mlp(), mlp()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert load(fresh, tmp_path / "weights.pt") is None
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))


def test_saving_again_needs_overwrite_and_is_whole(tmp_path: Path) -> None:
    model = mlp()
    report = prune_(model, "2:4")
    save(model, tmp_path / "out", report=report)
    before = snapshot(tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists already"):
        save(model, tmp_path / "out", report=report)
    assert snapshot(tmp_path / "out") == before
    save(model, tmp_path / "out", report=prune_(model, "1:4"), overwrite=True)
    sidecar = read_sidecar(tmp_path / "out")
    assert sidecar is not None and sidecar.report.pattern == "1:4"


def test_dtypes_that_safetensors_lacks(tmp_path: Path) -> None:
    model = mlp()
    model.register_buffer("phase", torch.zeros(3, dtype=torch.complex128))
    report = prune_(model, "2:4")
    with pytest.raises(CheckpointError, match=r"phase.*complex128"):
        save(model, tmp_path / "out", report=report)
    assert not list(tmp_path.iterdir())


@pytest.mark.transformers
def test_a_transformers_model_loads_with_equal_outputs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    config = transformers.AutoConfig.for_model("llama", **tiny, num_key_value_heads=2, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    save(model, tmp_path / "saved", report=prune_(model, "4:8-T"))
    model.save_pretrained(tmp_path / "own")
    bisparse.prune_checkpoint(tmp_path / "own", tmp_path / "pruned", "2:4-T")  # prunes what is pruned already, further
    tokens = torch.randint(0, 64, (2, 9))
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), "a strict load: nothing missing, unexpected or renamed"
    assert torch.equal(back(tokens).logits, model(tokens).logits)
    config_written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config_written["architectures"] == ["LlamaForCausalLM"] and "sparsity_config" not in config_written
    pruned, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info.values())
    assert bisparse.verify(pruned, "2:4-T") and bisparse.verify(pruned, "4:8-T")


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
def test_nothing_is_saved_with_wider_permissions_than_the_source_has(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    source = tmp_path / "source"
    (source / "private").mkdir(parents=True, mode=0o700)
    save_file(model.state_dict(), source / "model.safetensors")
    (source / "private" / "notes").write_text("text")
    (source / "token").write_text("secret")
    for name, mode in {"model.safetensors": 0o640, "token": 0o600, "private/notes": 0o644, ".": 0o750}.items():
        (source / name).chmod(mode)
    save(model, tmp_path / "out", report=prune_(model, "2:4", include=["0", "1"]), source=source)
    found = {str(path.relative_to(tmp_path / "out")): path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    written = dict.fromkeys(("model.safetensors", "bisparse.json", "bisparse-masks.safetensors", "README.md"), 0o640)
    assert found == {**written, "token": 0o600, "private": 0o700, "private/notes": 0o644}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


class OldBuffers(nn.Module):
    """A model whose older versions saved a buffer that it does not save any more."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.register_buffer("position_ids", torch.arange(8), persistent=persistent)


def test_buffers_that_a_model_no_longer_saves_are_kept_as_the_source_has_them(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    old = OldBuffers(True)
    save_file(old.state_dict(), tmp_path / "source" / "model.safetensors")
    model = OldBuffers(False)
    model.load_state_dict(old.state_dict(), strict=False)
    report = prune_(model, "2:4", include="body")
    sidecar = save(model, tmp_path / "out", report=report, source=tmp_path / "source")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == old.state_dict().keys() and torch.equal(written["position_ids"], torch.arange(8))
    assert sidecar.report.parameters == 272
    # A tensor that the model does not know at all is evidence of another model.
    save_file(old.state_dict() | {"position_embeddings": torch.ones(8)}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(CheckpointError, match="position_embeddings"):
        save(model, tmp_path / "again", report=report, source=tmp_path / "source")


def test_the_parameters_of_an_accelerated_model_are_those_of_its_plain_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64)).eval()
    prune_(model, "2:4-T")
    bisparse.accelerate_(model, "reference")
    sidecar = save(model, tmp_path / "out", "2:4-T")
    assert sidecar.report.parameters == 2 * (64 * 64 + 64) + 2 * 64
    assert verify_checkpoint(tmp_path / "out").contradicted == ()


def test_layouts_say_how_layers_of_unknown_classes_are_stored(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 16))

    model = nn.Sequential(Own(), nn.Linear(16, 16))
    prune_(model, "2:4", layouts={"0": "transposed"})
    sidecar = save(model, tmp_path / "out", "2:4", layouts={"0": "transposed"})
    assert [(one.name, str(one.layout)) for one in sidecar.report] == [("0", "transposed"), ("1", "linear")]
    with pytest.raises(PatternError, match="0"):
        save(model, tmp_path / "wrong", "2:4", layouts={"0": "linear"})


def test_text_as_patterns_or_layouts_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    save_file({"a.weight": torch.randn(16, 16)}, tmp_path / "source" / "model.safetensors")
    for argument in ("patterns", "layouts"):
        for value in ("2:4", ["a"], 3):
            with pytest.raises(ValueError, match=f"{argument}=.*expected a mapping"):
                bisparse.prune_checkpoint(tmp_path / "source", tmp_path / "out", "2:4", **{argument: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "sides"), [(nn.Linear, (16, 32)), (nn.Conv2d, (16, 16, 3)), (nn.ConvTranspose2d, (16, 16, 3))])
def test_a_model_that_is_one_layer(kind: type[nn.Module], sides: tuple[int, ...], tmp_path: Path) -> None:
    model, again = kind(*sides), kind(*sides)
    report = bisparse.prune_(model, "2:4-T", include="*")
    assert report[0].parameter == "weight"
    save(model, tmp_path / "one", report=report)
    load(again, tmp_path / "one")
    assert all(torch.equal(own, again.state_dict()[name]) for name, own in model.state_dict().items())
    assert torch.equal(load_masks(tmp_path / "one")["weight"], model.weight != 0)
    found = verify_checkpoint(tmp_path / "one")
    assert found and len(found.layers) == 1
    with torch.no_grad():
        again.weight.fill_(1)
    save_file(again.state_dict(), tmp_path / "one" / "model.safetensors")
    assert not verify_checkpoint(tmp_path / "one")


def test_the_pattern_that_is_given_is_checked_and_written_whatever_the_report_says(tmp_path: Path) -> None:
    model = mlp()
    report = prune_(model, "2:4")
    saved = save(model, tmp_path / "wider", "4:8", report=report).report
    assert saved.pattern == "4:8" and [(one.pattern, one.retained, one.gap) for one in saved] == [
        ("4:8", one.retained, None) for one in report
    ]
    other = mlp()
    prune_(other, "4:8")
    model.load_state_dict(other.state_dict())
    save(model, tmp_path / "pruned again", "4:8", report=report)
    for name in ("wider", "pruned again"):
        checked = verify_checkpoint(tmp_path / name)
        assert checked and checked.contradicted == () and load(mlp(), tmp_path / name) is not None
    with pytest.raises(PatternError, match="2:4"):
        save(model, tmp_path / "refused", "2:4", report=report)


@pytest.mark.parametrize("view", [torch.Tensor.conj, torch._neg_view], ids=["conjugated", "negated"])
def test_buffers_that_are_conjugated_or_negated_views_are_written_as_they_read(view: Any, tmp_path: Path) -> None:
    model, other = mlp(), mlp()
    report = prune_(model, "2:4")
    for one in (model, other):
        one.register_buffer("turned", view(torch.randn(3, dtype=torch.complex64)))
    save(model, tmp_path / "out", report=report)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["turned"], model.turned.resolve_conj().resolve_neg())
    load(other, tmp_path / "out")
    assert torch.equal(other.turned, model.turned)
