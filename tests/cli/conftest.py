"""A tiny language model on disk."""

from pathlib import Path

import pytest
import torch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny language model with its tokenizer, and a text next to it."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.setattr("bisparse.checkpoint.atomic_folder._fsync", lambda path: None)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(62)} | {"[UNK]": 62}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]").save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(" ".join(f"w{7 * i % 61}" for i in range(2000)))
    return tmp_path / "dense"
