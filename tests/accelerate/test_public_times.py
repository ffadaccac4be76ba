"""Predictions from public measurements: their own numbers where they were measured, and a word wherever they were not."""

import pytest

from bisparse.accelerate import PUBLIC_DEVICES, LayerShape, predict_products


def test_a_measured_product_is_returned_as_it_was_measured() -> None:
    (found,) = predict_products([LayerShape("own", (2048, 8192))], 64, device="A100")
    (layer,) = found.layers
    assert (layer.dense_us, layer.sparse_us) == (34.284, {"2:4": 25.805, "4:6": 37.929, "6:8": 38.871})
    assert layer.note == found.note == "" and layer.measured_shape == (2048, 8192)
    assert found.speedup["2:4"] == pytest.approx(34.284 / 25.805)


def test_between_measured_tokens_times_lie_between() -> None:
    shape = [LayerShape("own", (2048, 8192))]
    (low,), (middle,), (high,) = (predict_products(shape, tokens, device="H100") for tokens in (4096, 6000, 8192))
    assert low.dense_us < middle.dense_us < high.dense_us and not middle.layers[0].note


def test_what_was_not_measured_is_said() -> None:
    shapes = [LayerShape("near", (4000, 4096)), LayerShape("far", (64, 50000)), LayerShape("own", (2048, 8192))]
    (few,) = predict_products(shapes, 3, device="h100")
    near = few.layers[0]
    rows, columns = near.measured_shape
    assert near.note.startswith(f"{rows} x {columns}, the nearest shape that was measured, scaled; at 64 tokens")
    assert "far from it" in few.layers[1].note and few.layers[2].note == "at 64 tokens, the fewest that were measured"
    (many,) = predict_products(shapes, 1 << 20, device="H100")
    assert many.layers[2].note == "at 16384 tokens, the most that were measured, scaled"
    assert few.note == "3 of 3 layers were not measured as they are"
    (own,) = predict_products(shapes[2:], 16384, device="H100")
    assert many.layers[2].dense_us == pytest.approx(64 * own.dense_us)


def test_a_model_is_the_sum_of_its_layers_and_wins_from_a_number_of_tokens() -> None:
    shapes = [LayerShape("a", (4096, 4096)), LayerShape("b", (2048, 8192))]
    for found in predict_products(shapes, 4096):
        assert found.dense_us == pytest.approx(sum(one.dense_us for one in found.layers))
        for pattern, first in found.wins_from.items():
            for tokens in (64, 256, 1024, 4096, 16384):
                (there,) = predict_products(shapes, tokens, device=found.device)
                if first is not None and tokens >= first:
                    assert there.speedup[pattern] > 1.0, (found.device, pattern, tokens)
    assert [one.device for one in predict_products(shapes, 4096)] == list(PUBLIC_DEVICES)
    assert predict_products([], 64)[0].speedup["2:4"] == 1.0


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="there are public times for A100"):
        predict_products([], 64, device="V100")
    with pytest.raises(ValueError, match=r"for .*, not for fp4"):
        predict_products([], 64, dtype="fp4", device="A100")
    with pytest.raises(ValueError, match="at least 1"):
        predict_products([], 0)
    with pytest.raises(ValueError, match="expected one of bfloat16"):
        predict_products([], 64, dtype="float64")
