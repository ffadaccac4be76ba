"""Calibration data from text files: running text, a sample per line, or JSON lines with texts and conversations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bisparse.checkpoint.input_file import open_input
from bisparse.evaluation.model_outputs import fitting_length, has_decoder, positions_of
from bisparse.pruning.calibration.statistics import CalibrationError
from bisparse.user_errors import error_in_one_line

__all__ = ["SEED", "CalibrationFile", "TextBatches", "batches_for", "text_batches", "token_batches", "usable_length"]

SEED = 0
"""Seed of the order of calibration samples."""
RECORDS = (".jsonl", ".ndjson")
"""Suffixes of files that are always read as JSON lines; other files are if their first line is a JSON object."""
CONVERSATIONS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""From the roles in ShareGPT's files to those of chat templates."""
SHOWN = 6
CAUSAL_BATCH = 1
"""Samples per batch for causal models: fits of blocks and of the network take a step per batch."""
LINES = 8
"""Samples per batch for other models, whose samples are single lines."""
LENGTH = 512
"""Tokens per sample where a command has no option for them."""


@dataclass(frozen=True)
class CalibrationFile:
    """A calibration file, as recorded in the sidecar."""

    name: str
    """The path as it was given."""
    sha256: str
    """Digest of its content when it was read."""
    bytes: int
    sequences: int
    """Number of samples taken from it."""


@dataclass(frozen=True)
class TextBatches:
    """Batches for a transformers model, and the files that they were made from."""

    batches: list[dict[str, Tensor]]
    files: tuple[CalibrationFile, ...]

    @property
    def sequences(self) -> int:
        """Number of samples."""
        return sum(len(batch["input_ids"]) for batch in self.batches)

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        masks = (batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in self.batches)
        return sum(int(mask.sum()) for mask in masks)


class _Sample(NamedTuple):
    text: str
    is_chat: bool = False
    """Whether the text comes from the chat template, which has added the special tokens already."""


@dataclass(frozen=True)
class _File:
    """A calibration file and its content."""

    path: Path
    content: bytes

    def described(self, sequences: int) -> CalibrationFile:
        return CalibrationFile(str(self.path), hashlib.sha256(self.content).hexdigest(), len(self.content), sequences)


def token_batches(
    ids: Int[Tensor, " T"], *, sequences: int = 256, length: int = 512, batch_size: int = CAUSAL_BATCH
) -> list[dict[str, Tensor]]:
    """Sequences of `length` tokens, evenly spread over a text, as batches of ``input_ids``.

    Raises:
        CalibrationError: the text has fewer tokens than one sequence.
    """
    return _token_batches([_rows(ids, length, "the calibration text")], sequences, batch_size)[0]


def text_batches(
    tokenizer: Any,
    paths: str | Path | Sequence[str | Path],
    *,
    causal: bool,
    field: str | None = None,
    sequences: int = 256,
    length: int = 512,
    labels: bool = False,
) -> TextBatches:
    """Calibration batches from files. Every file contributes the same number of samples, as far as it has enough.

    A text file is one continuous text for causal models and one sample per line for others. In a file of JSON lines
    (``.jsonl``, or the first line is a JSON object) each line is a sample: its field "text"; or "messages" or "conversations", of
    ``{"role": ..., "content": ...}`` or ``{"from": ..., "value": ...}``, which become text by the tokenizer's chat template.
    For causal models samples are joined, with the token for the end of a text between them.

    Args:
        field: the field to read instead.
        sequences: maximum number of samples.
        length: tokens per sample; the maximum for models that are not causal.
        labels: add each sample as labels, too, as encoder-decoder models that generate need: their decoder reads the same text.

    Raises:
        CalibrationError: a file is empty, too short, or not text; a line is not JSON or lacks the field. Names file and line.
        CheckpointError: a file cannot be read.
    """
    files = [_read(Path(path)) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if field is not None and not any(map(_is_records, files)):
        raise CalibrationError(f"{files[0].path} is plain text, which has no field {field!r}: leave out --text-field")
    if causal:
        rows = [_rows(_ids(tokenizer, one, field, sequences * length), length, str(one.path)) for one in files]
        batches, counts = _token_batches(rows, sequences, CAUSAL_BATCH)
    else:
        samples = [[sample.text for sample in _samples(tokenizer, one, field)] for one in files]
        for one, own in zip(files, samples, strict=True):
            if not own:
                raise CalibrationError(f"{one.path} has no text to calibrate on")
        batches, counts = _padded_batches(tokenizer, samples, sequences, length)
    if labels:
        batches = [batch | {"labels": batch["input_ids"]} for batch in batches]
    return TextBatches(batches, tuple(one.described(count) for one, count in zip(files, counts, strict=True)))


def batches_for(
    model: nn.Module,
    tokenizer: Any,
    paths: str | Path | Sequence[str | Path],
    *,
    field: str | None = None,
    sequences: int,
    length: int | None,
) -> TextBatches:
    """`text_batches` as a transformers model takes them, of at most as many tokens as it has positions.

    Raises:
        CalibrationError, CheckpointError: as `usable_length` and `text_batches` do.
    """
    causal = bool(getattr(model, "can_generate", lambda: False)())
    return text_batches(
        tokenizer,
        paths,
        causal=causal,
        field=field,
        sequences=sequences,
        length=usable_length(model, length, causal=causal),
        labels=causal and has_decoder(model),  # those of classifiers are classes
    )


def _read(path: Path) -> _File:
    file = open_input(path)
    content = bytes(file.read(0, file.size))
    file.check_unchanged()
    return _File(path, content)


def _shares(available: Sequence[int], wanted: int) -> list[int]:
    """How many samples to take from each file: equally many from each, but no more than it has."""
    counts = [0] * len(available)
    for done, place in enumerate(sorted(range(len(available)), key=lambda i: available[i])):
        counts[place] = min(available[place], -(-(wanted - sum(counts)) // (len(available) - done)))
    return counts


def usable_length(model: nn.Module, length: int | None, *, causal: bool) -> int:
    """Tokens per sample for a model: all samples of a causal model have this length, those of another one at most this length.

    Args:
        length: what was asked for; None for 512, or as many as the model has positions if these are fewer.

    Raises:
        CalibrationError: a causal model has fewer positions.
    """
    positions = positions_of(model)
    if length is None:
        return fitting_length(model, None, LENGTH, "length")
    if positions is None or length <= positions:
        return length
    if causal:
        raise CalibrationError(
            f"samples of {length} tokens do not fit the model, which has only {positions:,} positions; pass --length {positions}"
        )
    return positions


def _rows(ids: Int[Tensor, " T"], length: int, what: str) -> Int[Tensor, "S L"]:
    available = ids.numel() // length
    if available == 0:
        raise CalibrationError(
            f"{what} has {ids.numel()} tokens, fewer than one sequence of {length}: use more text or a smaller length"
        )
    return ids[: available * length].view(available, length)


def _token_batches(
    rows: Sequence[Int[Tensor, "S L"]], sequences: int, batch_size: int
) -> tuple[list[dict[str, Tensor]], list[int]]:
    counts = _shares([len(one) for one in rows], sequences)
    chosen = [one[torch.linspace(0, len(one) - 1, count).round().long()] for one, count in zip(rows, counts, strict=True)]
    mixed = torch.cat(chosen)
    # Neighbours in the text go to different batches, so that held-out batches cover the whole text.
    mixed = mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(SEED))]
    return [{"input_ids": part} for part in mixed.split(batch_size)], counts


def _padded_batches(
    tokenizer: Any, samples: Sequence[list[str]], sequences: int, length: int
) -> tuple[list[dict[str, Tensor]], list[int]]:
    counts = _shares([len(one) for one in samples], sequences)
    texts = []
    for own, count in zip(samples, counts, strict=True):
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(SEED))[:count].tolist()
        texts += [own[i] for i in order]
    # Lines of similar length share a batch, to need little padding; then the batches are shuffled.
    texts.sort(key=len)
    batches = [
        dict(tokenizer(texts[i : i + LINES], padding=True, truncation=True, max_length=length, return_tensors="pt"))
        for i in range(0, len(texts), LINES)
    ]
    return [batches[i] for i in torch.randperm(len(batches), generator=torch.Generator().manual_seed(SEED + 1)).tolist()], counts


def _ids(tokenizer: Any, file: _File, field: str | None, enough: int) -> Int[Tensor, " T"]:
    """The tokens of a file, for a causal model; JSON lines are read in random order until there are about `enough` tokens."""
    if not _is_records(file):
        ids: Tensor = tokenizer(_text(file), return_tensors="pt", verbose=False)["input_ids"][0]
        return ids
    samples = list(_samples(tokenizer, file, field))
    found: list[int] = []
    for place in torch.randperm(len(samples), generator=torch.Generator().manual_seed(SEED)).tolist():
        sample = samples[place]
        found += tokenizer(sample.text, verbose=False, add_special_tokens=not sample.is_chat)["input_ids"]
        end = getattr(tokenizer, "eos_token_id", None)
        if end is not None and found and found[-1] != end:
            found.append(end)
        if len(found) >= enough:
            break
    return torch.tensor(found, dtype=torch.long)


def _samples(tokenizer: Any, file: _File, field: str | None) -> Iterator[_Sample]:
    """The samples of a file: its lines or its records."""
    if not _is_records(file):
        yield from (_Sample(line.strip()) for line in _text(file).splitlines() if line.strip())
        return
    for number, line in enumerate(file.content.split(b"\n"), start=1):
        if line.strip():
            sample = _sample(tokenizer, line, field, f"{file.path}, line {number}")
            if sample.text.strip():
                yield sample


def _text(file: _File) -> str:
    try:
        return file.content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = file.content.count(b"\n", 0, error.start) + 1
        raise CalibrationError(
            f"{file.path} is not UTF-8 text (line {line}: {error}): convert it, as by iconv -f latin1 -t utf-8"
        ) from error


def _is_records(file: _File) -> bool:
    """Whether a file is JSON lines.

    Raises:
        CalibrationError: it is a single JSON document, which is neither text nor JSON lines.
    """
    if file.path.suffix.lower() in RECORDS:
        return True
    start = file.content.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:1] not in (b"{", b"["):
        return False
    if isinstance(_json(start.split(b"\n", 1)[0]), dict):
        return True
    if _json(start) is not None:
        raise CalibrationError(f"{file.path} is a single JSON document: write one JSON object per line (.jsonl), or plain text")
    return False


def _json(text: bytes) -> Any:
    """The JSON value of a text; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _sample(tokenizer: Any, line: bytes, field: str | None, where: str) -> _Sample:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else error
        raise CalibrationError(f"{where} is not JSON ({problem}); each line must be one object") from error
    if not isinstance(record, dict):
        raise CalibrationError(f"{where} is a {type(record).__name__}, not a JSON object with a text")
    name = field or next((one for one in ("text", *CONVERSATIONS) if one in record), None)
    if name is None or name not in record:
        wanted = repr(field) if field else "'text', 'messages' or 'conversations'"
        raise CalibrationError(f"{where} has no field {wanted}, only {list(record)[:SHOWN]}: choose one with --text-field")
    value = record[name]
    if isinstance(value, str):
        return _Sample(value)
    if isinstance(value, list):
        return _Sample(_chat(tokenizer, value, f"{where}: {name}"), is_chat=True)
    raise CalibrationError(f"{where}: {name} is a {type(value).__name__}, neither a text nor a list of messages")


def _chat(tokenizer: Any, messages: list[Any], where: str) -> str:
    """A conversation as text, formatted by the tokenizer's chat template."""
    said = []
    for number, message in enumerate(messages, start=1):
        role, content = (
            (message.get("role", message.get("from")), message.get("content", message.get("value")))
            if isinstance(message, dict)
            else (None, None)
        )
        if not isinstance(role, str) or not isinstance(content, str | list):
            raise CalibrationError(f"{where}: message {number} has no role and content (or from and value)")
        said.append({"role": ROLES.get(role, role), "content": content})
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(f"{where} is a conversation, but the model's tokenizer has no chat template: use plain texts")
    try:
        return str(tokenizer.apply_chat_template(said, tokenize=False))
    except Exception as error:
        raise CalibrationError(f"{where}: the tokenizer's chat template fails: {error_in_one_line(error)}") from error
