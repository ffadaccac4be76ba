"""What is said of a trained model: about its weights as they are, and nothing more once `finalize_` has ended the run."""

import copy

import pytest
import torch
from torch import nn

import bisparse
from bisparse import Schedule, finalize_, prune_, solve, sparsify_, verify
from bisparse.checkpoint import read_sidecar, save
from bisparse.solvers import Greedy


def trained(steps: int = 9, model: nn.Module | None = None, **how):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    sparsity = sparsify_(model, **({"pattern": "4:8-T", "refresh": 6} | how))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsity.attach(optimizer)
    train(model, optimizer, steps)
    return model, optimizer, sparsity


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 16)), torch.randint(0, 8, (16,))).backward()
        optimizer.step()


@pytest.mark.parametrize("how", [{}, {"solver": Greedy()}, {"pattern": "2:4"}, {"pattern": "50%"}], ids=str)
def test_the_report_is_about_the_weights_as_they_are_and_not_about_the_last_refresh(how, tmp_path) -> None:
    model, _, sparsity = trained(**how)
    expected = {}
    for layer in sparsity.layers:
        scores = layer.weight.detach().abs()
        best = solve(scores, layer.pattern, layout=layer.layout).check()
        value = float(scores.double()[layer.mask].sum())
        assert value < 0.9999 * best.value, "the masks of step 6 are not the best of step 9"
        expected[layer.name] = value, value / float(scores.double().sum()), 1 - value / best.value
    report = sparsity.report()
    finalize_(model)
    assert [replaced.gap for replaced in sparsity.report()] == [one.gap for one in report]
    save(model, tmp_path / "saved", report=sparsity.report())
    for given in (report, sparsity.report(), read_sidecar(tmp_path / "saved").report):
        for layer in given:
            assert (layer.value, layer.retained, layer.gap) == pytest.approx(expected[layer.name], rel=1e-5), layer.name
            assert layer.density == float((model.get_submodule(layer.name).weight != 0).double().mean())
    assert "0.00 s" not in str(report)


def test_a_gap_of_zero_is_that_of_a_mask_that_is_the_best_now() -> None:
    model, _, sparsity = trained()
    assert sparsity.report().gap > 1e-3
    sparsity.refresh()
    report = sparsity.report()
    assert report.gap < 1e-6 and [verify(model[number].weight, "4:8-T").check() for number in (0, 2)]


def test_static_masks_follow_no_scores_and_dense_phases_have_no_mask() -> None:
    for how, density in (({"mode": "static"}, 0.5), ({"schedule": Schedule(dense_until=100)}, 1.0)):
        _, _, sparsity = trained(**how)
        for layer in sparsity.report():
            assert layer.retained is layer.gap is layer.value is None and layer.density == pytest.approx(density, abs=0.01)
            assert ("dense phase" in layer.note) is (density == 1.0)


@pytest.mark.parametrize("finalized", [False, True])
def test_figures_of_a_report_do_not_outlive_its_weights(tmp_path, finalized: bool) -> None:
    model, _, sparsity = trained()
    if finalized:
        finalize_(model)
    report = sparsity.report()
    save(model, tmp_path / "same", "4:8-T", report=report)
    assert read_sidecar(tmp_path / "same").report.gap == report.gap
    with torch.no_grad():
        weight = model[0].weight if finalized else model[0].parametrizations.weight.original
        weight.mul_(1.5)
    save(model, tmp_path / "later", "4:8-T", report=report)
    later = read_sidecar(tmp_path / "later").report
    assert later["0"].gap is later["0"].retained is later["0"].value is None
    assert later["2"].gap == report["2"].gap and "1 layers were changed after the report" in later.notes[-1]


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_summary_says_how_much_of_the_model_is_sparse(mode: str) -> None:
    model = nn.Sequential(nn.Embedding(1000, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    sparsity = sparsify_(model, "4:8-T", mode=mode, steps=10)
    assert "2 layers (3.1% of all parameters) sparse, 1 dense" in repr(sparsity)  # 512 of 16,544
    finalize_(model)
    assert "3.1% of all parameters" in repr(sparsity)


def test_finalize_ends_a_sparsity_and_leaves_the_optimizer_to_the_next() -> None:
    model, optimizer, sparsity = trained(pattern="2:4", refresh=1)
    finalize_(model)
    assert sparsity.ended == 9 and "ended" in repr(sparsity)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not any(module._forward_pre_hooks for module in model.modules())
    for mode in ("dynamic", "static"):
        second = sparsify_(model, "2:4-T", mode=mode, refresh=1).attach(optimizer)
        masks = [layer.mask.clone() for layer in second.layers]
        for _ in range(5):
            train(model, optimizer, 1)
            for layer in second.layers:
                weight = getattr(layer.module, layer.parameter)
                assert verify(weight, "2:4-T") and not bool(weight[~layer.mask].any())
        if mode == "static":
            assert all(torch.equal(layer.mask, mask) for layer, mask in zip(second.layers, masks, strict=True))
        finalize_(model)
    assert sparsity.step == 9


def test_an_ended_sparsity_gives_final_facts_or_says_that_it_ended() -> None:
    model, optimizer, sparsity = trained()
    before = sparsity.report()
    metrics = sparsity.metrics()
    finalize_(model)
    report, state = sparsity.report(), sparsity.state_dict()
    assert report.layers == before.layers and sparsity.metrics() == metrics
    assert report.notes == ("ended by finalize_ after optimizer step 9; later steps are dense",) and before.notes == ()
    assert state["ended"] == 9 and state["layers"] == {}
    train(model, optimizer, 2)  # dense by design
    assert sparsity.step == 9 and sparsity.report() == report
    for action in (
        lambda: sparsity.attach(optimizer),
        lambda: sparsity.load_state_dict(state),
        sparsity.refresh,
    ):
        with pytest.raises(ValueError, match="this Sparsity ended with finalize_ after optimizer step 9"):
            action()
    fresh = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    with pytest.raises(ValueError, match="ended with finalize_ after optimizer step 9: load only the model's weights"):
        sparsify_(fresh, "4:8-T").load_state_dict(state)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_part_that_is_finalized_leaves_the_rest_in_training(mode: str) -> None:
    model, optimizer, sparsity = trained(mode=mode, refresh=1)
    finalize_(model[0])
    before = sparsity.report()["0"]
    train(model, optimizer, 3)
    assert sparsity.ended is None and sparsity.step == 12
    assert sparsity.report()["0"] == before and set(sparsity.state_dict()["layers"]) == {"2", "4"}
    assert verify(model[2].weight, "4:8-T")
    finalize_(model)
    assert sparsity.ended == 12


def test_finalizing_a_copy_ends_nothing() -> None:
    model, optimizer, sparsity = trained(refresh=1)
    finalize_(copy.deepcopy(model))
    train(model, optimizer, 1)
    assert sparsity.ended is None and sparsity.step == 10 and sparsity.refreshes == 9


def test_an_optimizer_that_carries_another_sparsity_of_the_same_weights_is_refused() -> None:
    model, optimizer, sparsity = trained(pattern="2:4")
    for layer in sparsity.layers:  # as others might do it, without finalize_
        nn.utils.parametrize.remove_parametrizations(layer.module, "weight", leave_parametrized=True)
    other = sparsify_(model, "2:4-T")
    with pytest.raises(ValueError, match=r"is attached to another Sparsity of the same weights \(Sparsity\(2:4, dynamic"):
        other.attach(optimizer)
    sparsity.detach()
    other.attach(optimizer)
    train(model, optimizer, 1)
    assert (sparsity.step, other.step) == (9, 1)
    elsewhere = nn.Linear(16, 16)
    optimizer.add_param_group({"params": list(elsewhere.parameters())})
    sparsify_(elsewhere, "2:4", include="*").attach(optimizer)  # of other weights


def test_a_diverged_model_is_finalized_without_figures() -> None:
    model, _, sparsity = trained()
    sparsity.layers[0].weight.detach()[0, 0] = float("nan")
    finalize_(model)
    assert sparsity.report()["0"].gap is None and sparsity.report()["2"].gap is not None


def test_metrics_say_of_which_step_they_are() -> None:
    _, _, sparsity = trained(steps=30, refresh=7, measure_every=14)
    assert sparsity.refreshes == 4
    assert sparsity.metrics()["sparsity/step"] == sparsity.metrics()["sparsity/0/step"] == 21


def test_a_page_about_a_trained_model_claims_no_proof_and_no_time(tmp_path) -> None:
    pytest.importorskip("jinja2")
    from bisparse.report import write_report

    model, _, sparsity = trained()
    finalize_(model)
    save(model, tmp_path / "trained", report=sparsity.report())
    text = write_report(tmp_path / "trained", tmp_path / "trained.html").read_text()
    assert "proved" not in text.split("<h2")[0] and "seconds to solve" not in text and "gap to the best mask" in text
    pruned = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    save(pruned, tmp_path / "pruned", report=prune_(pruned, "4:8-T", include="*"))
    text = write_report(tmp_path / "pruned", tmp_path / "pruned.html").read_text()
    assert "Each mask is proved to be the best for its scores." in text and "proof included" in text
    assert bisparse.verify(pruned, "4:8-T", include="*")
