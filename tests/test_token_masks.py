"""Masks of real tokens reach every layer in the shape in which it stores positions. Oracle: the number of hidden positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bisparse.layers import find_layers
from bisparse.pruning import Statistic
from bisparse.pruning.calibration.calibrate import calibrate
from bisparse.pruning.calibration.options import Options
from bisparse.pruning.calibration.statistics import Statistics
from bisparse.token_masks import TokenMasks, fitted
from bisparse.training import Distillation

MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
DECODER = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def walked(model: nn.Module, batch, **options) -> dict[str, Statistics]:
    layers, _ = find_layers(model, lambda name, _: bool(name))
    stages = calibrate(model, layers, [batch], frozenset({Statistic.GRAM}), Options(progress=False, **options))
    return {layer.name: one for stage in stages for layer, one in zip(stage.layers, stage.statistics, strict=True)}


class Shapes(nn.Module):
    """The same positions, in the shapes in which transformers' models store them."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.ones, self.turned = (nn.Linear(8, 8) for _ in range(3))
        self.conv, self.strided = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, stride=2)

    def forward(self, x: Tensor, attention_mask: Tensor) -> None:
        self.flat(x.flatten(0, 1))  # the shared expert of Qwen2-MoE and of Llama 4
        self.ones(x[:, None])  # DeepSeek's kv_b_proj
        self.turned(x.transpose(0, 1))  # XLNet
        self.conv(x.transpose(1, 2))  # SqueezeBERT
        self.strided(x.transpose(1, 2))


def test_hidden_positions_are_not_counted_in_any_shape() -> None:
    x = torch.randn(2, 5, 8)
    found = walked(Shapes(), {"x": x, "attention_mask": MASK})
    rows = x[MASK.bool()]
    for name in ("flat", "ones", "turned"):
        assert found[name].columns == 6
        torch.testing.assert_close(found[name].gram[0], rows.T @ rows / 6)
    padded = nn.functional.pad(x, (0, 0, 1, 1))
    windows = torch.stack([padded[:, tap : tap + 5] for tap in range(3)], 2).flatten(2)[MASK.bool()]
    torch.testing.assert_close(found["conv"].gram[0], windows.T @ windows / 6)
    assert found["strided"].columns == 4  # its positions are not those of the mask


@pytest.mark.parametrize("shape", [(10,), (2, 1, 5), (2, 5, 1), (1, 10), (5, 2), (2, 5)])
def test_a_mask_takes_the_shape_of_its_positions(shape: tuple[int, ...]) -> None:
    own = fitted(MASK.bool(), shape)
    assert own is not None and own.shape == shape
    numbers = torch.arange(10).view(2, 5)
    given = numbers.t() if shape == (5, 2) else numbers.view(shape)
    assert set(given[own].tolist()) == set(numbers[MASK.bool()].tolist())


@pytest.mark.parametrize("shape", [(), (2,), (5,), (2, 4), (10, 2), (2, 5, 5)])
def test_other_shapes_are_other_positions(shape: tuple[int, ...]) -> None:
    assert fitted(MASK.bool(), shape) is None


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        return self.q_proj(x) + self.k_proj(states).mean(1, keepdim=True)


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder_attn, self.fc = Attention(), nn.Linear(8, 8)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        return self.fc(self.encoder_attn(x, states))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(2))

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, states)
        return x


class Translator(nn.Module):
    """Encoder and decoder read sequences of equal length, as with ``padding="max_length"``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 8), Decoder()

    def forward(self, x: Tensor, decoder_x: Tensor, attention_mask: Tensor, decoder_attention_mask: Tensor | None = None):
        return self.decoder(decoder_x, self.encoder(x))


def translation(**masks: Tensor) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 5, 8), "decoder_x": torch.randn(2, 5, 8), "attention_mask": MASK, **masks}


@pytest.mark.parametrize("order", ["parallel", "sequential"])
def test_a_decoder_has_a_mask_of_its_own(order: str) -> None:
    for batch, positions in ((translation(), 10), (translation(decoder_attention_mask=DECODER), 8)):
        found = walked(Translator(), batch, order=order)
        expected = {"encoder": 6}
        for number in range(2):
            name = f"decoder.layers.{number}"
            expected |= {f"{name}.encoder_attn.q_proj": positions, f"{name}.encoder_attn.k_proj": 6, f"{name}.fc": positions}
        assert {name: one.columns for name, one in found.items()} == expected


def test_the_decoder_of_a_model_without_encoder_reads_the_attention_mask() -> None:
    masks = TokenMasks.of_batch(nn.Linear(1, 1), {"attention_mask": MASK})
    assert torch.equal(masks.of("model.decoder.layers.0.fc1"), MASK.bool())
    model = nn.Linear(1, 1)
    model.config = type("Config", (), {"is_encoder_decoder": True})()
    masks = TokenMasks.of_batch(model, {"attention_mask": MASK})
    assert masks.of("model.decoder.layers.0.fc1") is None and masks.of("") is None
    for cross in ("decoder.block.0.layer.1.EncDecAttention.v", "decoder.bert.encoder.layer.0.crossattention.self.key"):
        assert torch.equal(masks.of(cross), MASK.bool())
    assert masks.of("decoder.bert.encoder.layer.0.attention.self.key") is None


def test_the_mask_of_a_text_is_not_that_of_pictures() -> None:
    masks = TokenMasks.of_batch(nn.Linear(1, 1), {"attention_mask": MASK, "pixel_values": torch.ones(2, 3, 8, 8)})
    for name in ("vision_model.encoder.layers.0.mlp.fc1", "model.visual.blocks.0.attn.qkv", "vision_tower.layers.1.fc2"):
        assert masks.of(name) is None
    for name in ("text_model.encoder.layers.0.mlp.fc1", "model.language_model.layers.0.mlp.up_proj", ""):
        assert torch.equal(masks.of(name), MASK.bool())


def test_a_student_with_encoder_and_decoder_is_compared_at_the_decoders_positions() -> None:
    student = Translator()
    teacher = Distillation(student, hidden=1.0, layers=["encoder", "decoder.layers.1"])
    with torch.no_grad():
        student.encoder.weight.add_(0.3)
        student.decoder.layers[1].fc.weight.add_(0.3)
    batch = translation(decoder_attention_mask=DECODER)
    loss, keep = [], DECODER.bool()
    for changed in (False, True):
        if changed:  # what is hidden must not count
            batch["decoder_x"] = torch.where(keep[..., None], batch["decoder_x"], 7.0)
        student(**batch)
        loss.append(float(teacher.loss().detach()))
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)
