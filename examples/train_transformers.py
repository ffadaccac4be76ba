"""Fine-tune with static 4:8-T masks in the transformers Trainer; the saved model still obeys them."""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import bisparse
from bisparse.training.integrations.transformers import SparsityCallback


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    """Token sequences, labelled by whether token 7 occurs: in place of your data set."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 40, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": (row == 7).any().long()} for row in tokens]


def main(output: Path, steps: int = 60) -> bisparse.verification.Verification:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = BertForSequenceClassification(config)  # in place of from_pretrained
    sparsity = bisparse.sparsify_(model, "4:8-T", mode="static", exclude="*pooler*")
    print(sparsity)
    arguments = TrainingArguments(
        output_dir=str(output / "run"), max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-3,
        logging_steps=20, save_steps=steps // 2, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=sentences(512), callbacks=[SparsityCallback(sparsity)])
    trainer.train()
    bisparse.finalize_(model)
    model.save_pretrained(output / "model")
    again = BertForSequenceClassification.from_pretrained(output / "model")
    result = bisparse.verify(again.bert.encoder, "4:8-T")
    print(result.message)
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if main(Path(folder)) else 1)
