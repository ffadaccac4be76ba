"""Train from scratch with 4:8-T masks in a Lightning Trainer."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bisparse
from bisparse.training.integrations.lightning import SparsityCallback


class Classifier(lightning.LightningModule):
    """A small network without any code for sparsity."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 2)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.head(self.layers(inputs)), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main(epochs: int = 5) -> bisparse.verification.Verification:
    lightning.seed_everything(0, verbose=False)
    inputs = torch.randn(512, 16)
    data = DataLoader(TensorDataset(inputs, (inputs[:, :8].sum(1) > 0).long()), batch_size=32, shuffle=True)
    module = Classifier()
    sparsity = bisparse.sparsify_(module, "4:8-T", refresh=10)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[SparsityCallback(sparsity)],
    )  # fmt: skip
    trainer.fit(module, data)
    print({name: round(float(number), 4) for name, number in trainer.callback_metrics.items()})
    bisparse.finalize_(module)
    result = bisparse.verify(module, "4:8-T")
    print(result.message)
    return result


if __name__ == "__main__":
    main()
