"""The training experiments of the benchmarks: they learn, and go on after a stop as if nothing had happened."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bisparse import verify

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "training"))
from recipes.models import GPT, ResNet20, build_model
from recipes.recipe import DataRecipe, ModelRecipe, SparsityRecipe, TrainingRecipe

from recipes import Recipe, RecipeError, RunError, run_recipe

BLOBS = Recipe(
    "blobs",
    model=ModelRecipe("mlp", width=64),
    data=DataRecipe("blobs", train=2000, test=500, side=8),
    training=TrainingRecipe(epochs=6.0, batch=64, lr=0.05, evaluate_every=60),
    sparsity=SparsityRecipe("4:8-T", refresh=10),
)
SHORT = replace(BLOBS, training=replace(BLOBS.training, epochs=1.0, checkpoint_every=7), sparsity=SparsityRecipe(refresh=3))


def test_recipes_round_trip() -> None:
    assert Recipe.from_dict(json.loads(json.dumps(BLOBS.as_dict()))) == BLOBS


@pytest.mark.parametrize("stops", [(5,), (13, 1, 4)])
def test_a_stopped_run_goes_on_bit_by_bit(tmp_path, stops):
    whole = run_recipe(SHORT, tmp_path / "whole", progress=False)
    for stop in stops:
        assert run_recipe(SHORT, tmp_path / "parts", progress=False, stop_after=stop) is None
    resumed = run_recipe(SHORT, tmp_path / "parts", progress=False)
    assert resumed.curve == whole.curve and resumed.test_loss == whole.test_loss
    one, other = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "parts" / "metrics.jsonl").read_bytes()


def test_a_small_gpt_learns_text(tmp_path):
    recipe = Recipe(
        "gpt",
        model=ModelRecipe("gpt", width=32, layers=1, heads=2),
        data=DataRecipe("python-text", train=40_000, test=4_000, context=32),
        training=TrainingRecipe(steps=30, batch=16, optimizer="adamw", lr=1e-2, clip=1.0),
        sparsity=SparsityRecipe("4:8-T", refresh=5, mvue=True),
    )
    outcome = run_recipe(recipe, tmp_path, progress=False)
    assert outcome.test_loss < 4.0 < outcome.curve[0]["loss"]


def test_models_are_those_that_the_experiments_name():
    model = ResNet20()
    assert 0.27e6 < sum(one.numel() for one in model.parameters()) < 0.275e6
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3)]
    assert len(convolutions) == 19 and model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    gpt = GPT(384, 6, 6, 256)
    assert 10e6 < sum(one.numel() for one in gpt.parameters()) < 11.5e6
    tokens = torch.randint(0, 256, (1, 16))
    one, other = gpt(tokens), gpt(torch.cat([tokens[:, :8], (tokens[:, 8:] + 1) % 256], 1))
    assert torch.allclose(one[..., :8], other[..., :8], atol=1e-5)  # causal
    with pytest.raises(ValueError, match="not a multiple"):
        build_model(ModelRecipe("gpt", width=30, heads=4), context=8)


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(RecipeError, match=r"exists already and holds no run \(no recipe\.json\)"):
            run_recipe(SHORT, folder, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert run_recipe(SHORT, tmp_path / "empty", progress=False, stop_after=1) is None


def test_a_run_learns_and_leaves_a_plain_sparse_model(tmp_path):
    outcome = run_recipe(BLOBS, tmp_path, progress=False)
    assert outcome.test_accuracy > 0.9 and outcome.density <= 0.5
    assert verify(torch.load(tmp_path / "weights.pt", weights_only=True)["3.weight"], "4:8-T")
    assert run_recipe(BLOBS, tmp_path, progress=False) == outcome  # read, not run again


def test_static_sparsity_starts_from_a_dense_run(tmp_path):
    dense = run_recipe(replace(SHORT, name="dense", sparsity=None), tmp_path / "dense", progress=False)
    start = replace(SHORT.model, start=str(tmp_path / "dense"))
    static = replace(SHORT, model=start, sparsity=SparsityRecipe("4:8-T", mode="static"))
    outcome = run_recipe(static, tmp_path / "static", progress=False)
    assert outcome.curve[0]["loss"] < dense.curve[0]["loss"] and outcome.density <= 0.5


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(RunError, match=r"lower .* lr"):
        run_recipe(replace(SHORT, training=replace(SHORT.training, lr=1e30)), tmp_path, progress=False)
