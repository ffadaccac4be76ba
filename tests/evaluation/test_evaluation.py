"""Figures against what they are by definition, computed another way; and what is refused instead of measured."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from bisparse.evaluation import agreement, classification, perplexity, read_pairs, run_tasks, similarity, text_perplexity


class Counting(nn.Module):
    """A language model that weighs the last tokens: its logits depend on all tokens up to a position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids).cumsum(1)


def by_hand(model: nn.Module, ids: Tensor, context: int, stride: int) -> tuple[float, list[list[float]]]:
    """Losses window by window, a token at a time."""
    windows, end = [], 0
    for start in range(0, len(ids) - context + 1, stride):
        logits = model(input_ids=ids[None, start : start + context])[0].log_softmax(-1)
        scored = range(max(end, start + 1), start + context)
        windows.append([-float(logits.detach()[at - start - 1, ids[at]]) for at in scored])
        end = start + context
    losses = [loss for window in windows for loss in window]
    return sum(losses) / len(losses), windows


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 7), (8, 1), (2, 2)])
def test_perplexity_is_the_mean_over_tokens_that_no_window_scored_before(context: int, stride: int) -> None:
    model, ids = Counting(), torch.randint(11, (45,), generator=torch.Generator().manual_seed(3))
    nats, windows = by_hand(model, ids, context, stride)
    found = perplexity(model, ids, context=context, stride=stride, batch_size=3)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats), rel=1e-5)
    assert (found.windows, found.scored) == (len(windows), sum(map(len, windows)))
    assert found.tokens == (len(windows) - 1) * stride + context <= 45


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_token_ids_are_whole_numbers_of_any_dtype(dtype: torch.dtype) -> None:
    model, ids = Counting(), torch.randint(11, (45,), generator=torch.Generator().manual_seed(3))
    assert perplexity(model, ids.to(dtype), context=8) == perplexity(model, ids, context=8)


def test_error_of_a_perplexity_is_that_of_a_mean_over_windows() -> None:
    model, ids = Counting(), torch.randint(11, (400,), generator=torch.Generator().manual_seed(3))
    _, windows = by_hand(model, ids, 8, 8)
    means = torch.tensor([sum(window) / len(window) for window in windows], dtype=torch.float64)
    found = perplexity(model, ids, context=8)
    assert found.nats_error == pytest.approx(float(means.std() / len(means) ** 0.5), rel=1e-4)
    assert found.perplexity_error == pytest.approx(found.perplexity * found.nats_error)
    assert perplexity(model, ids[:8], context=8).nats_error is None


def test_first_tokens_are_those_of_the_text_and_modes_are_kept() -> None:
    model, ids = Counting(), torch.randint(11, (64,))
    model.table.eval()
    assert perplexity(model, ids, context=8, tokens=16).nats == perplexity(model, ids[:16], context=8).nats
    assert model.training and not model.table.training


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"context": 1}, "context=1"),
        ({"context": 8, "stride": 9}, "stride=9"),
        ({"context": 8, "stride": 0}, "stride=0"),
        ({"context": 128}, "fewer than one window"),
        ({"context": 8, "tokens": 7}, "tokens=7"),
        ({"context": 8, "batch_size": 0}, "batch_size=0"),
    ],
)
def test_perplexity_refuses_settings_without_a_window(settings: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        perplexity(Counting(), torch.zeros(64, dtype=torch.long), **settings)


class Positions(Counting):
    """A language model with a table of 16 positions, as its configuration says under one of the usual names."""

    def __init__(self, name: str | None) -> None:
        super().__init__()
        self.positions = nn.Embedding(16, 11)
        self.config = types.SimpleNamespace(**({name: 16} if name else {}))

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) + self.positions(torch.arange(input_ids.shape[1]))


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions"])
def test_the_default_context_is_no_longer_than_the_model_takes(name: str) -> None:
    model, ids = Positions(name), torch.randint(11, (600,))
    found = perplexity(model, ids)
    assert found.context == found.stride == 16 and "context 16, stride 16" in str(found)
    with pytest.raises(ValueError, match="context=17: the model has only 16 positions; pass a context of at most 16"):
        perplexity(model, ids, context=17)
    with pytest.raises(ValueError, match=r"failed on an input of shape \(4, 32\)"):
        perplexity(Positions(None), ids, context=32)
    assert perplexity(Counting(), ids).context == 512


def test_perplexity_of_a_model_that_returns_nan_is_refused() -> None:
    model = Counting()
    model.table.weight.data[5] = float("nan")
    ids = torch.zeros(24, dtype=torch.long)
    ids[17] = 5
    with pytest.raises(ValueError, match=r"window 2 .* not finite"):
        perplexity(model, ids, context=8, batch_size=2)


def test_perplexity_of_a_model_that_sees_what_follows_is_refused() -> None:
    model = Counting()
    model.can_generate = lambda: False
    with pytest.raises(ValueError, match="not a causal language model"):
        perplexity(model, torch.zeros(24, dtype=torch.long), context=8)


def test_a_perplexity_too_large_for_a_float_is_still_json() -> None:
    model = Counting()
    model.table.weight.data *= 1e4
    found = perplexity(model, torch.arange(22) % 11, context=8)
    assert found.perplexity == math.inf
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["perplexity"] is None


def test_a_text_is_named_in_what_is_said_of_it(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("abcabcabcabcabcabc")

    def tokenizer(text: str, **_: object) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[ord(one) % 11 for one in text]])}

    found = text_perplexity(Counting(), tokenizer, tmp_path / "corpus.txt", context=4)
    assert found.corpus == "corpus.txt" and "first 16 tokens, context 4, stride 4" in str(found)
    with pytest.raises(ValueError, match=r"corpus.txt: .*fewer than one window"):
        text_perplexity(Counting(), tokenizer, tmp_path / "corpus.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        text_perplexity(Counting(), tokenizer, tmp_path / "binary")


# ---- sentences


class Bag(nn.Module):
    """An encoder of letters that also moves with padding: pooled wrongly, it gives other figures."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(128, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.table(input_ids) + 100 * (1 - attention_mask).unsqueeze(-1)}


def letters(texts: list[str], max_length: int, **_: object) -> dict[str, Tensor]:
    rows = [[ord(one) for one in text[:max_length]] for text in texts]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


PAIRS = [(5.0, "abc", "abcd"), (1.0, "xyz", "a"), (3.5, "hello there", "hello"), (0.0, "qq", "zebra"), (2.0, "mno", "opq")]


def test_similarity_pools_over_tokens_and_ranks_cosines() -> None:
    model = Bag()
    cosines = [
        float(
            nn.functional.cosine_similarity(
                *(model.table.weight.detach()[[ord(c) for c in text]].mean(0) for text in pair), dim=0
            )
        )
        for _, *pair in PAIRS
    ]
    found = similarity(model, letters, PAIRS, batch_size=2)
    assert found.spearman == pytest.approx(spearmanr(cosines, [score for score, *_ in PAIRS]).statistic)
    assert found.pairs == 5


def test_pairs_are_read_from_three_columns_and_from_those_of_sts(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text('score\tone\tother\n5.0\ta b\tc "d\n2\te\tf\n')
    assert read_pairs(path) == [(5.0, "a b", 'c "d'), (2.0, "e", "f")]
    path.write_text("main-news\tMSRpar\t2012test\t1\t4.4\ta\tb\tsource\tsource\n")
    assert read_pairs(path) == [(4.4, "a", "b")]
    for text, said in (("1\ta\tb\nx\ta\tb\n", "line 2: 'x' is not a score"), ("1\ta\n", "line 1: 2 columns"), ("\n", "no pairs")):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_pairs(path)


def test_similarity_without_an_order_is_refused() -> None:
    with pytest.raises(ValueError, match="are equal"):
        similarity(Bag(), letters, [(1.0, "a", "b")] * 4)
    with pytest.raises(ValueError, match="at least 3"):
        similarity(Bag(), letters, PAIRS[:2])


# ---- classes


def test_accuracy_and_agreement_are_shares_of_samples() -> None:
    torch.manual_seed(0)
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    inputs, labels = torch.randn(50, 4), torch.randint(3, (50,))
    found = classification(model, inputs, labels, batch_size=7)
    right = sum(int(model(one).argmax()) == int(label) for one, label in zip(inputs, labels, strict=True))
    assert found.accuracy == right / 50
    assert found.error == pytest.approx((right / 50 * (1 - right / 50) / 50) ** 0.5)
    same = sum(int(model(one).argmax()) == int(other(one).argmax()) for one in inputs)
    assert agreement(model, other, inputs).agreement == same / 50
    assert agreement(model, model, inputs).agreement == 1


def test_classes_that_do_not_fit_are_refused() -> None:
    model, inputs = nn.Linear(4, 3), torch.randn(5, 4)
    for labels, said in ((torch.tensor([0, 1, 2, 3, 0]), "classes 0 to 2"), (torch.zeros(4).long(), "a class per input")):
        with pytest.raises(ValueError, match=said):
            classification(model, inputs, labels)
    with pytest.raises(ValueError, match="3 and 2 classes"):
        agreement(model, nn.Linear(4, 2), inputs)
    with pytest.raises(ValueError, match="no samples"):
        classification(model, inputs[:0], torch.zeros(0).long())
    nn.init.constant_(model.bias, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        agreement(model, model, inputs)


# ---- lm-eval


def test_tasks_are_run_by_lm_eval_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    asked: dict[str, object] = {}
    harness, models, hugging = (types.ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"))
    hugging.HFLM = lambda pretrained, tokenizer, batch_size: ("held", pretrained)

    def simple_evaluate(**given: object) -> dict[str, object]:
        asked.update(given)
        metrics = {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": "N/A"}
        return {"results": {"arc_easy": metrics}, "n-shot": {"arc_easy": 0}}

    harness.simple_evaluate, harness.__version__ = simple_evaluate, "0.4.9"
    for name, module in (("lm_eval", harness), ("lm_eval.models", models), ("lm_eval.models.huggingface", hugging)):
        monkeypatch.setitem(sys.modules, name, module)
    found = run_tasks(model, None, ["arc_easy"], limit=10)
    assert asked == {"model": ("held", model), "tasks": ["arc_easy"], "limit": 10}
    assert found.as_dict() == {
        "kind": "lm-eval", "version": "0.4.9", "limit": 10, "shots": {"arc_easy": 0}, "tasks": {"arc_easy": {"acc,none": 0.5}},
    }  # fmt: skip
    monkeypatch.setattr(harness, "simple_evaluate", lambda **_: {"results": {}})
    with pytest.raises(ValueError, match="no figures"):
        run_tasks(model, None, ["arc_easy"])


def test_tasks_without_lm_eval_say_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match="pip install lm-eval"):
        run_tasks(nn.Linear(2, 2), None, ["arc_easy"])


@pytest.mark.parametrize("score", ["nan", "inf", "-Infinity"])
@pytest.mark.parametrize("line", [1, 2])
def test_scores_that_are_not_finite_are_refused(score: str, line: int, tmp_path: Path) -> None:
    lines = ["1\ta\tb", "2\tc\td", "3\te\tf"]
    lines[line - 1] = f"{score}\ta\tb"
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"line {line}: '{score}' is not a score"):
        read_pairs(tmp_path / "pairs.tsv")
    with pytest.raises(ValueError, match="not finite"):
        similarity(Bag(), letters, [(float(score), "a", "b"), *PAIRS])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16, torch.int64])
def test_labels_are_whole_numbers_of_any_dtype(dtype: torch.dtype) -> None:
    inputs = torch.eye(4)
    assert classification(nn.Identity(), inputs, torch.tensor([0, 1, 2, 0]).to(dtype)).accuracy == 0.75
    with pytest.raises(ValueError, match="classes 0 to 3"):
        classification(nn.Identity(), inputs, torch.tensor([0, 1, 2, 4]).to(dtype))


@pytest.mark.parametrize(
    "part",
    [
        (slice(1), slice(None), slice(None)),
        (slice(None), slice(-1, None), slice(None)),
        (slice(None), slice(None), slice(5)),
        (0, slice(None), slice(None)),
    ],
)
def test_logits_of_another_shape_are_refused(part: tuple[slice | int, ...]) -> None:
    class Partly(Counting):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids)[part]

    with pytest.raises(ValueError, match="logits have shape"):
        perplexity(Partly(), torch.arange(33) % 11, context=8)
