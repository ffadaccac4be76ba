"""Trainers of others: examples run, resumed runs equal uninterrupted ones, and what they save obeys the pattern."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import bisparse
from bisparse import finalize_, sparsify_, verify
from bisparse.checkpoint import read_sidecar, save

EXAMPLES = Path(__file__).parents[3] / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_loop_learns(capsys):
    assert example("train_loop.py").main(steps=400) > 0.9
    assert "4:8-T holds" in capsys.readouterr().out


@pytest.mark.transformers
def test_transformers(tmp_path):
    assert example("train_transformers.py").main(tmp_path, steps=6)
    state = torch.load(tmp_path / "run" / "checkpoint-6" / "sparsity.pt", weights_only=True)
    assert state["step"] == 6 and state["mode"] == "static"


@pytest.mark.transformers
def test_transformers_resumes_bit_by_bit(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    from bisparse.training.integrations.transformers import SparsityCallback

    data = example("train_transformers.py").sentences(64)
    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)

    def run(folder, **how):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        sparsity = sparsify_(model, "4:8-T", refresh=2, measure_every=1, exclude="*pooler*")
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=8, per_device_train_batch_size=8, save_steps=5, logging_steps=2, report_to=[],
            use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[SparsityCallback(sparsity)])
        trainer.train(**how)
        return model, sparsity, trainer

    model, sparsity, trainer = run(tmp_path)
    assert sparsity.step == 8  # optimizer steps, not micro-batches
    assert any("sparsity/flip_rate" in entry for entry in trainer.state.log_history)
    resumed, other, _ = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert other.step == 8
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    assert verify(loaded, "4:8-T", exclude="*pooler*")
    inputs = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(inputs).logits, model.eval()(inputs).logits)
    (tmp_path / "checkpoint-5" / "sparsity.pt").unlink()
    with pytest.raises(FileNotFoundError, match="SparsityCallback"):
        run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_lightning():
    assert example("train_lightning.py").main(epochs=1)


def test_lightning_resumes_bit_by_bit(tmp_path):
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    from bisparse.training.integrations.lightning import SparsityCallback

    module_class = example("train_lightning.py").Classifier
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=8)

    def run(epochs, checkpoint=None):
        torch.manual_seed(0 if checkpoint is None else 9)
        module = module_class()
        sparsity = sparsify_(module, "4:8-T", refresh=3, steps=16)  # the decay goes by the length of the whole run
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[SparsityCallback(sparsity)],
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module, sparsity, trainer

    module, sparsity, _ = run(2)
    _, _, half = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, other, _ = run(2, tmp_path / "half.ckpt")
    assert sparsity.step == other.step == 16
    for name, value in module.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_second_fit_decays_and_resumes_bit_by_bit(tmp_path):
    import lightning
    from lightning.pytorch.callbacks import LambdaCallback
    from torch.utils.data import DataLoader, TensorDataset

    from bisparse.training.integrations.lightning import SparsityCallback

    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=8)

    def new():
        torch.manual_seed(0)
        module = example("train_lightning.py").Classifier()
        return module, SparsityCallback(sparsify_(module, "4:8-T", refresh=1000))

    def fit(module, callback, checkpoint=None):
        save = LambdaCallback(
            on_train_epoch_end=lambda trainer, _: trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}")
        )
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[callback] if checkpoint else [callback, save],
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=checkpoint)

    module, callback = new()
    fit(module, callback)
    layer = callback.sparsity.layers[0]
    with torch.no_grad():
        layer.weight[~layer.mask] = 1.0
    fit(module, callback)
    assert callback.sparsity.step == callback.sparsity.steps == 32
    assert float(layer.weight.detach()[~layer.mask].abs().max()) < 0.2
    other, resumed = new()
    fit(other, resumed, tmp_path / "0")
    assert resumed.sparsity.step == resumed.sparsity.steps == 32
    for name, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.transformers
def test_a_second_train_of_transformers_has_steps_of_its_own(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    from bisparse.training.integrations.transformers import SparsityCallback

    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = BertForSequenceClassification(config)
    sparsity = sparsify_(model, "4:8-T", exclude="*pooler*")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    data = example("train_transformers.py").sentences(16)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[SparsityCallback(sparsity)])
    for steps in (2, 4):
        trainer.train()
        assert sparsity.step == sparsity.steps == steps


def test_accelerate(tmp_path):
    sparsity = example("train_accelerate.py").main(tmp_path, epochs=1)
    assert sparsity.step == 16  # 32 batches, accumulated by two
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    fresh = sparsify_(model, "4:8-T", refresh=10)
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01))
    fresh.attach(optimizer)
    accelerator.register_for_checkpointing(fresh)
    accelerator.load_state(str(tmp_path))
    assert fresh.step == 16


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_the_sidecar_keeps_which_layers_stayed_dense_and_why(model, tmp_path, mode):
    sparsity = sparsify_(model, "4:8-T", mode=mode, patterns={"up": "2:4"})
    finalize_(model)
    save(model, tmp_path / "saved", report=sparsity.report())
    sidecar = read_sidecar(tmp_path / "saved")
    assert {skipped.name for skipped in sidecar.report.left_dense} == {"stem", "head"}
    assert {layer.name: layer.pattern for layer in sidecar.report}["up"] == "2:4"
    fresh = type(model)()
    bisparse.checkpoint.load(fresh, tmp_path / "saved")
    assert verify(fresh.down.weight, "4:8-T") and torch.equal(fresh.up.weight, model.up.weight)


@pytest.mark.parametrize("kind", ["EMAWeightAveraging", "WeightAveraging"])
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_lightning_averages(kind, mode):
    import lightning
    from lightning.pytorch import callbacks
    from torch.utils.data import DataLoader, TensorDataset

    from bisparse.training.integrations.lightning import SparsityCallback

    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=8)
    torch.manual_seed(0)
    module = example("train_lightning.py").Classifier()
    sparsity = sparsify_(module, "4:8-T", mode=mode, refresh=3)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[SparsityCallback(sparsity), getattr(callbacks, kind)()],
    )  # fmt: skip
    trainer.fit(module, data)
    masks = [layer.mask.clone() for layer in sparsity.layers]
    finalize_(module)
    assert verify(module, "4:8-T")
    weights = [getattr(layer.module, layer.parameter) for layer in sparsity.layers]
    assert all(bool((weight[~mask] == 0).all()) for weight, mask in zip(weights, masks, strict=True))
    assert all(float((weight != 0).float().mean()) > 0.4 for weight in weights)
