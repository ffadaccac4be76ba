"""Calibration files: texts, JSON lines and conversations, several at once, and errors that name file and line."""

import hashlib
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bisparse.cli.calibration_text import text_batches, usable_length
from bisparse.pruning.calibration.statistics import CalibrationError


class Words:
    """A tokenizer: every word w12 is the token 12; 98 begins a text, 99 ends one."""

    eos_token_id = 99
    chat_template = "by role"

    def __call__(self, text: Any, add_special_tokens: bool = True, return_tensors: str | None = None, **options: Any) -> Any:
        if isinstance(text, list):
            rows = [[int(word[1:]) for word in one.split()][: options["max_length"]] for one in text]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            return {"input_ids": ids, "attention_mask": (ids > 0).long()}
        ids = [98] * add_special_tokens + [int(word[1:]) for word in text.split()]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool) -> str:
        if any(message["role"] == "stranger" for message in messages):
            raise KeyError("stranger")
        roles = {"user": "w71", "assistant": "w72", "system": "w73"}
        return " ".join(f"{roles[message['role']]} {message['content']}" for message in messages)


def lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records) + "\n\n")
    return path


def tokens(batches: Any) -> list[int]:
    return sorted(torch.cat([one["input_ids"].flatten() for one in batches.batches]).tolist())


CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
SHARE_GPT = [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.txt"])
@pytest.mark.parametrize(
    ("record", "field", "expected"),
    [
        ({"text": "w1 w2 w3", "id": 4}, None, [1, 2, 3, 98, 99]),
        ({"body": "w1 w2 w3", "text": "w9"}, "body", [1, 2, 3, 98, 99]),
        ({"messages": CHAT}, None, [1, 2, 3, 71, 72, 99]),
        ({"conversations": SHARE_GPT, "id": 1}, None, [1, 2, 3, 71, 72, 99]),
        ({"dialog": SHARE_GPT, "text": "w9"}, "dialog", [1, 2, 3, 71, 72, 99]),
    ],
)
def test_records_are_texts_or_conversations(
    tmp_path: Path, name: str, record: dict[str, Any], field: str | None, expected: list[int]
) -> None:
    path = lines(tmp_path / name, *[record] * 3)
    found = text_batches(Words(), path, causal=True, field=field, sequences=3, length=len(expected))
    assert tokens(found) == sorted(expected * 3)
    (file,) = found.files
    assert (file.name, file.bytes, file.sequences) == (str(path), path.stat().st_size, 3) and found.tokens == 3 * len(expected)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_several_files_give_as_many_samples_each_and_are_mixed(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(" ".join(["w1"] * 4000))
    (tmp_path / "short.txt").write_text(" ".join(["w2"] * 47))
    lines(tmp_path / "records.jsonl", *[{"text": "w3 w3 w3"}] * 500)
    paths = [tmp_path / name for name in ("long.txt", "short.txt", "records.jsonl")]
    found = text_batches(Words(), paths, causal=True, sequences=40, length=8)
    assert [one.sequences for one in found.files] == [17, 6, 17] and found.sequences == 40
    firsts = [int(row[3]) for batch in found.batches for row in batch["input_ids"]]
    assert firsts != sorted(firsts), "mixed"
    again = text_batches(Words(), paths, causal=True, sequences=40, length=8)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found.batches, again.batches, strict=True))
    found = text_batches(Words(), [lines(tmp_path / "a.txt", "w1 w2", "w3"), lines(tmp_path / "b.jsonl", {"text": "w4"})],
                         causal=False, sequences=9, length=2)  # fmt: skip
    assert [one.sequences for one in found.files] == [2, 1] and set(tokens(found)) - {0} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("{oops", r"line 3 is not JSON"),
        ("[" * 100_000, r"line 3 is not JSON"),
        ("[1]", r"line 3 is a list"),
        ({"body": "x"}, r"line 3 has no field 'text', 'messages' or 'conversations', only \['body'\]"),
        ({"text": 5}, r"line 3: text is a int"),
        ({"messages": ["hello"]}, r"line 3: messages: message 1 has no role and content"),
        ({"messages": [*CHAT, {"role": "user"}]}, r"line 3: messages: message 3 has no role and content"),
        (
            {"messages": [{"role": "stranger", "content": "w1"}]},
            r"line 3: messages: the tokenizer's chat template fails: KeyError",
        ),
        ("\udcff", r"line 3 is not JSON"),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_a_bad_line_is_named(tmp_path: Path, bad: object, problem: str, causal: bool) -> None:
    text = bad if isinstance(bad, str) else json.dumps(bad)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "w1"}\n\n' + text.encode("utf-8", "surrogateescape") + b'\n{"text": "w1"}\n')
    with pytest.raises(CalibrationError, match=f"a.jsonl, {problem}"):
        text_batches(Words(), path, causal=causal, sequences=4, length=2)


def test_files_that_are_no_calibration_text_are_named(tmp_path: Path) -> None:
    good = lines(tmp_path / "good.txt", "w1 w2 w3 w4")
    for name, content, problem in (
        ("one.json", b'{\n"text": "w1"}', "one.json is a single JSON document"),
        ("list.json", b'[{"text": "w1"}]', "list.json is a single JSON document"),
        ("latin.txt", b"w1\nw2\nw\xe4", r"latin.txt is not UTF-8 text \(line 3"),
        ("few.txt", b"w1", "few.txt has 2 tokens, fewer than one sequence of 4"),
        ("empty.jsonl", b"\n\n", "empty.jsonl has 0 tokens"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CalibrationError, match=problem):
            text_batches(Words(), [good, tmp_path / name], causal=True, length=4)
    tokenizer = Words()
    tokenizer.chat_template = ""
    with pytest.raises(CalibrationError, match=r"line 1: messages is a conversation.*no chat template"):
        text_batches(tokenizer, lines(tmp_path / "chat.jsonl", {"messages": CHAT}), causal=True, length=2)


def test_samples_are_no_longer_than_the_model_takes() -> None:
    model = nn.Linear(2, 2)
    assert usable_length(model, 600, causal=True) == 600 and usable_length(model, None, causal=True) == 512
    model.config = types.SimpleNamespace(n_positions=24)
    assert [usable_length(model, length, causal=True) for length in (24, 8, None)] == [24, 8, 24]
    with pytest.raises(CalibrationError, match="only 24 positions; pass --length 24"):
        usable_length(model, 25, causal=True)
    assert usable_length(model, 600, causal=False) == 24  # a maximum, by which sentences are truncated


def test_a_field_of_plain_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Some text, one line of it.\n" * 20)
    with pytest.raises(CalibrationError, match="plain text, which has no field 'body'"):
        text_batches(None, tmp_path / "text.txt", causal=True, field="body")
