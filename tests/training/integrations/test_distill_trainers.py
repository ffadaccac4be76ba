"""A teacher in the trainers of others: the loss is the one of a plain loop, and resumed runs equal uninterrupted ones."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from bisparse import finalize_, sparsify_, verify
from bisparse.training import Distillation, FixedDecay

EXAMPLES = Path(__file__).parents[3] / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llama(seed: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=32, max_position_embeddings=32,
        )
    )  # fmt: skip


def sequences(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 40, (count, 12), generator=generator)
    labels = rows.clone()
    labels[::2, :6] = -100  # batches with different numbers of labels
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def run(folder, *, batch=4, accumulate=2, seed=0, **how):
    from transformers import Trainer, TrainingArguments

    from bisparse.training.integrations.transformers import SparsityCallback

    model = llama(seed)
    teacher = Distillation(model, hidden=1.0)
    with torch.no_grad():  # so that there is a distance from the first step on
        for one in model.parameters():
            one.mul_(1.05)
    sparsity = sparsify_(model, "4:8-T", refresh=2, measure_every=1, decay=FixedDecay(0.01))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=batch, save_steps=4, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=accumulate, optim="sgd", learning_rate=0.1,
        max_grad_norm=0.0,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=sequences(64), callbacks=[SparsityCallback(sparsity, distill=teacher)]
    )
    trainer.train(**how)
    return model, trainer, teacher


@pytest.mark.transformers
def test_transformers_adds_the_distances_and_resumes_bit_by_bit(tmp_path):
    model, trainer, _ = run(tmp_path)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all({"distill/logits", "distill/hidden", "distill/task"} <= entry.keys() for entry in logged)
    assert all(entry["distill/logits"] > 0 and entry["distill/hidden"] > 0 for entry in logged)
    resumed, *_ = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    with pytest.raises(ValueError, match="the teacher differs"):
        run(tmp_path, seed=1, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer.evaluate(sequences(4))  # no teacher, no hook that fails
    finalize_(model)
    assert verify(model, "4:8-T", exclude="lm_head")


@pytest.mark.transformers
def test_transformers_without_accumulation_steps_on_what_a_plain_loop_computes(tmp_path):
    whole, *_ = run(tmp_path / "trainer", batch=8, accumulate=1)
    from transformers import TrainingArguments
    from transformers.trainer import Trainer

    order = [batch["input_ids"] for batch in _batches(Trainer, TrainingArguments, tmp_path)]
    model = llama()
    teacher = Distillation(model, hidden=1.0)
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(1.05)
    sparsity = sparsify_(model, "4:8-T", refresh=2, decay=FixedDecay(0.01))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    labels = {tuple(one["input_ids"].tolist()): one["labels"] for one in sequences(64)}
    for number, ids in enumerate(order[:6]):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - number / 6)
        target = torch.stack([labels[tuple(row.tolist())] for row in ids])
        teacher.loss(model.train()(input_ids=ids, labels=target).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.allclose(whole.state_dict()[name], value, atol=1e-5), name


def _batches(trainer, arguments, folder):
    """The batches that `run` trains on, in its order."""
    how = arguments(output_dir=str(folder / "order"), per_device_train_batch_size=8, report_to=[], use_cpu=True)
    one = trainer(model=llama(), args=how, train_dataset=sequences(64))
    return list(one.get_train_dataloader())


@pytest.mark.transformers
def test_a_model_without_a_loss_is_refused(tmp_path):
    from transformers import Trainer, TrainingArguments

    from bisparse.training.integrations.transformers import SparsityCallback

    model = llama()
    teacher = Distillation(model)
    sparsity = sparsify_(model, "4:8-T", mode="static")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, label_smoothing_factor=0.1, disable_tqdm=True
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=sequences(8), callbacks=[SparsityCallback(sparsity, distill=teacher)]
    )
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer.train()
    other = Distillation(nn.Linear(4, 4))
    trainer = Trainer(
        model=model, args=arguments, train_dataset=sequences(8), callbacks=[SparsityCallback(sparsity, distill=other)]
    )
    with pytest.raises(ValueError, match="no part of the model"):
        trainer.train()


@pytest.mark.parametrize("returned", ["tensor", "mapping"])
def test_lightning(tmp_path, returned):
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    from bisparse.training.integrations.lightning import SparsityCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

        def training_step(self, batch, _):
            inputs, labels = batch
            loss = nn.functional.cross_entropy(self.net(inputs), labels)
            return loss if returned == "tensor" else {"loss": loss, "other": 1}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(64, 16, generator=generator), torch.randint(0, 8, (64,), generator=generator)
    data = DataLoader(TensorDataset(inputs, labels), batch_size=8)

    def start():
        torch.manual_seed(0)
        module = Module()
        teacher = Distillation(module.net, hidden=1.0, layers="0")
        return module, teacher, sparsify_(module, "4:8-T", refresh=3, decay=FixedDecay(0.1))

    def fit(epochs, checkpoint=None):
        module, teacher, sparsity = start()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[SparsityCallback(sparsity, distill=teacher)],
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module, trainer

    module, trainer = fit(2)
    assert "training_step" not in vars(module) and "distill/logits" in trainer.callback_metrics
    plain, teacher, sparsity = start()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    for _ in range(2):
        for one, other in data:
            teacher.loss(nn.functional.cross_entropy(plain.net(one), other)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in module.state_dict().items())
    _, half = fit(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(2, tmp_path / "half.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in module.state_dict().items())
