"""Recipes: read strictly, run to the end, and go on after a kill as if nothing had happened."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bisparse import verify, verify_checkpoint
from bisparse.checkpoint import SIDECAR, read_sidecar
from bisparse.training.recipe import Recipe, RecipeError, RunError, read_recipe, run_recipe
from bisparse.training.recipe.data import load_data
from bisparse.training.recipe.models import GPT, ResNet20, build_model
from bisparse.training.recipe.recipe import DataRecipe, ModelRecipe, SparsityRecipe, TrainingRecipe

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
BLOBS = read_recipe(RECIPES / "blobs.toml")
SHORT = replace(BLOBS, training=replace(BLOBS.training, epochs=1.0, checkpoint_every=7), sparsity=SparsityRecipe(refresh=3))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_examples_is_read_and_round_trips(path):
    recipe = read_recipe(path)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 'x'\n[training]\nepoch = 3", r"\[training\] has no entry 'epoch'; it has accumulate, batch"),
        ("name = 'x'\n[sparsity]\npattern = '5:4'", "does not exist"),
        ("name = 'x'\n[training]\nbatch = 0", "batch = 0: must be above 0"),
        ("name = 'x'\n[training]\nbatch = 'many'", "batch = 'many': expected int"),
        ("name = 'x'\n[model]\nkind = 'vgg'", "expected one of resnet20, gpt, mlp"),
        ("name = 'x'\n[model]\nkind = 'gpt'", "go together"),
        ("name = 'x'\nmodel = 3", r"\[model\] must be a table"),
        ("seed = 1", "needs a name"),
        ("name = ", "cannot be read as TOML"),
        ("name = 'x'\n[data]\nside = 10", "expected 28, 14 or 7"),
        ("name = 'x'\n[sparsity]\nsolver = 'oracle'", "expected one of exact"),
        ("name = 'x'\n[training]\nthreads = 0", "threads = 0: must be above 0"),
        ("name = 'x'\n[training]\nsteps = -3", "steps = -3: must be 0 or more"),
        ("name = 'x'\n[training]\nepochs = inf", "epochs = inf: must be a finite number"),
        ("name = 'x'\n[training]\nclip = nan", "clip = nan: must be 0 or more"),
        ("name = 'x'\n[model]\nheads = 0", "heads = 0: must be above 0"),
        ("name = 'x'\n[data]\nkind = 'blobs'\nside = -1", "side = -1: must be above 0"),
        ("name = 'x'\nseed = 99999999999999999999", "seed = 99999999999999999999: must be below"),
        ("name = 'x'\n[training]\nprecision = 'float16'", "expected one of float32, bfloat16"),
    ],
)
def test_wrong_recipes_are_refused_by_entry(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as error:
        read_recipe(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("training", "sparsity", "decay"),
    [
        ("optimizer = 'sgd'", "", 2e-4),
        ("optimizer = 'adamw'", "", 2e-3),
        ("optimizer = 'adamw'", "method = 'sr-ste'", 2e-4),
        ("optimizer = 'adamw'", "decay = 0", 0.0),
    ],
)
def test_the_decay_of_a_recipe_is_that_of_sparsify_for_its_optimizer(tmp_path, training, sparsity, decay):
    from bisparse.training.optimizer import default_decay

    path = tmp_path / "recipe.toml"
    path.write_text(f"name = 'x'\n[training]\n{training}\n[sparsity]\n{sparsity}")
    assert read_recipe(path).sparsity.decay == decay == read_recipe(path).as_dict()["sparsity"]["decay"]
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    weights = [torch.nn.Parameter(torch.zeros(1))]
    for name, kind in kinds.items():
        recipe = Recipe("x", training=TrainingRecipe(optimizer=name), sparsity=SparsityRecipe())
        assert recipe.sparsity.decay == default_decay(kind(weights, lr=0.1))


def test_entries_are_changed_from_outside(tmp_path):
    changes = (
        "training.steps=7",
        "seed = 3",
        "data.folder=/some/where",
        "sparsity.pattern='2:4'",
        "sparsity.patterns={'3' = '4:8'}",
    )
    recipe = read_recipe(RECIPES / "blobs.toml", changes)
    assert (recipe.training.steps, recipe.seed, recipe.data.folder) == (7, 3, "/some/where")
    assert recipe.sparsity.pattern == "2:4" and recipe.sparsity.patterns == {"3": "4:8"}
    for change, message in (
        ("training.epoch=1", "no entry 'epoch'"), ("steps", "expected ENTRY=VALUE"), ("a.b.c=1", "expected ENTRY=VALUE"),
        ("training.steps=few", "'few': expected int"), ("name.x=1", "'name' is no table"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            read_recipe(RECIPES / "blobs.toml", [change])


def test_a_run_learns_and_leaves_a_plain_sparse_model(tmp_path):
    outcome = run_recipe(BLOBS, tmp_path, progress=False)
    assert outcome.test_accuracy > 0.9 and outcome.density <= 0.5 and outcome.refreshes == outcome.steps // 10
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert verify(state["3.weight"], "4:8-T")
    assert verify_checkpoint(tmp_path).density == pytest.approx(outcome.density)
    sidecar = read_sidecar(tmp_path)
    assert sidecar.source == BLOBS.name and {one.layer for one in sidecar.samples} == {layer.name for layer in sidecar.report}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == outcome.curve and len(rows) == outcome.steps and "flip_rate" in rows[10] and "test_accuracy" in rows[59]
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert run_recipe(BLOBS, tmp_path, progress=False) == outcome  # read, not run again
    with pytest.raises(RecipeError, match="another recipe"):
        run_recipe(replace(BLOBS, seed=1), tmp_path, progress=False)


@pytest.mark.parametrize("stops", [(5,), (13, 1, 4)])
def test_a_stopped_run_goes_on_bit_by_bit(tmp_path, monkeypatch, stops):
    monkeypatch.setattr("bisparse.training.recipe.plot.plot_outcome", lambda *_: False)  # drawing takes longer than training
    whole = run_recipe(SHORT, tmp_path / "whole", progress=False)
    for stop in stops:
        assert run_recipe(SHORT, tmp_path / "parts", progress=False, stop_after=stop) is None
    resumed = run_recipe(SHORT, tmp_path / "parts", progress=False)
    assert resumed.curve == whole.curve and resumed.test_loss == whole.test_loss
    one, other = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "parts" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path):
    script = (
        "from bisparse.training.recipe import *; import sys, dataclasses;"
        f"r = read_recipe({str(RECIPES / 'blobs.toml')!r});"
        "r = dataclasses.replace(r, training=dataclasses.replace(r.training, checkpoint_every=1));"
        "run_recipe(r, sys.argv[1], progress=False)"
    )
    killed = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "killed")])
    for _ in range(600):
        if (tmp_path / "killed" / "checkpoint.pt").exists():
            break
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() != 0 and not (tmp_path / "killed" / "outcome.json").exists()
    recipe = replace(BLOBS, training=replace(BLOBS.training, checkpoint_every=1))
    assert (
        run_recipe(recipe, tmp_path / "killed", progress=False).curve == run_recipe(recipe, tmp_path / "w", progress=False).curve
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", "{"])
def test_a_damaged_outcome_is_named_and_can_be_had_again(content, tmp_path):
    whole = run_recipe(SHORT, tmp_path, progress=False)
    (tmp_path / "outcome.json").write_text(content)
    with pytest.raises(RunError, match=r"outcome\.json is damaged .*: delete it"):
        run_recipe(SHORT, tmp_path, progress=False)
    (tmp_path / "outcome.json").unlink()
    assert run_recipe(SHORT, tmp_path, progress=False).test_loss == whole.test_loss


def test_static_sparsity_starts_from_a_dense_run(tmp_path):
    dense = run_recipe(replace(SHORT, name="dense", sparsity=None), tmp_path / "dense", progress=False)
    assert dense.density == 1.0 and dense.refreshes == 0 and not (tmp_path / "dense" / SIDECAR).exists()
    recipe = tmp_path / "static.toml"
    text = (RECIPES / "blobs.toml").read_text().replace('kind = "mlp"', 'kind = "mlp"\nstart = "dense"')
    recipe.write_text(text.replace("refresh = 10", 'mode = "static"').replace("epochs = 6", "epochs = 1"))
    outcome = run_recipe(read_recipe(recipe), tmp_path / "static", progress=False)
    assert outcome.curve[0]["loss"] < dense.curve[0]["loss"] and outcome.density <= 0.5
    assert verify(torch.load(tmp_path / "static" / "weights.pt", weights_only=True)["1.weight"], "4:8-T")


def test_bfloat16_is_for_the_products_and_not_for_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("bisparse.training.recipe.plot.plot_outcome", lambda *_: False)
    seen = set()
    linear = torch.nn.functional.linear

    def watched(*arguments):
        result = linear(*arguments)
        seen.add((arguments[1].dtype, result.dtype))
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    training = replace(SHORT.training, precision="bfloat16", epochs=3.0)
    outcome = run_recipe(replace(SHORT, training=training), tmp_path, progress=False)
    assert seen == {(torch.float32, torch.bfloat16), (torch.float32, torch.float32)}  # the second where lazy layers take shape
    assert outcome.test_accuracy > 0.8
    assert all(value.dtype == torch.float32 for value in torch.load(tmp_path / "weights.pt", weights_only=True).values())


def test_accumulated_batches_make_one_step(tmp_path):
    training = replace(SHORT.training, accumulate=4, epochs=1.0)
    outcome = run_recipe(replace(SHORT, training=training), tmp_path, progress=False)
    assert outcome.steps == 8  # 31 batches


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


def test_a_recipe_that_cannot_be_run_leaves_no_folder(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    for start, message in ((tmp_path / "none", "is not there; a run writes it"), (tmp_path, "does not hold the weights")):
        with pytest.raises(RecipeError, match=message):
            run_recipe(replace(SHORT, model=replace(SHORT.model, start=str(start))), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(RecipeError, match=r"exists already and holds no run \(no recipe\.json\)"):
            run_recipe(SHORT, folder, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert run_recipe(SHORT, tmp_path / "empty", progress=False, stop_after=1) is None


def test_a_damaged_checkpoint_and_a_loss_that_is_no_number_are_said(tmp_path):
    assert run_recipe(SHORT, tmp_path, progress=False, stop_after=8) is None
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"hello world"):
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(RunError, match=r"checkpoint\.pt is damaged .*delete it to begin this run anew"):
            run_recipe(SHORT, tmp_path, progress=False)
    with pytest.raises(RunError, match=r"lower .* lr"):
        run_recipe(replace(SHORT, training=replace(SHORT.training, lr=1e30)), tmp_path / "wild", progress=False)


def test_missing_data_say_what_to_install(tmp_path):
    with pytest.raises(RecipeError, match="dataset-fashion-mnist"):
        load_data(DataRecipe("fashion-mnist", folder=str(tmp_path)))
    with pytest.raises(RecipeError, match="bytes of text asked for"):
        load_data(DataRecipe("python-text", train=10**12))


def test_a_recipe_that_could_not_run_leaves_its_folder_to_the_mended_one(tmp_path):
    here = replace(SHORT, data=replace(SHORT.data, kind="fashion-mnist", folder=str(tmp_path / "nowhere")))
    with pytest.raises(RecipeError, match="Fashion-MNIST is not in"):
        run_recipe(here, tmp_path / "run", progress=False)
    assert run_recipe(SHORT, tmp_path / "run", progress=False, stop_after=1) is None


def test_the_command_runs_a_recipe(tmp_path, monkeypatch, capfd):
    from bisparse import cli

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bisparse", "train", "--out", str(tmp_path / "run"), *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.run()
        return int(stopped.value.code or 0), *capfd.readouterr()

    short = tmp_path / "short.toml"
    short.write_text((RECIPES / "blobs.toml").read_text().replace("epochs = 6", "epochs = 1"))
    code, shown, live = call(str(short))
    assert code == 0 and "test accuracy" in shown and "flip_rate" in live
    code, shown, _ = call(str(short), "--json")
    assert code == 0 and json.loads(shown)["steps"] == 31
    wild = tmp_path / "wild.toml"
    wild.write_text((RECIPES / "blobs.toml").read_text().replace("lr = 0.05", "lr = 1e30"))
    code, _, message = call(str(wild), "--out", str(tmp_path / "wild"))
    assert code == 1 and "lower [training] lr" in message and "Traceback" not in message
    short.write_text("name = 'x'\n[training]\nepoch = 1")
    code, _, message = call(str(short))
    assert code == 2 and "no entry 'epoch'" in message and "Traceback" not in message
    code, shown, message = call(
        str(RECIPES / "blobs.toml"), "--set", "training.lr=1e30", "--out", str(tmp_path / "high"), "--json"
    )
    assert code == 1 and "lower [training] lr" in json.loads(shown)["error"] and "Traceback" not in message
