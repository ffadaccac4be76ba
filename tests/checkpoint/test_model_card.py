"""The README of a pruned folder: what it says, what of the user's it keeps, and figures recorded later."""

import json
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import nn

import bisparse
from bisparse.checkpoint import CheckpointError, prune_checkpoint, read_sidecar, record_evaluation, save

FIGURE = {
    "kind": "perplexity",
    "corpus": "news|.txt",
    "tokens": 64,
    "context": 8,
    "stride": 8,
    "perplexity": 20.5,
    "perplexity_error": 0.5,
}
DENSE_README = """---
license: mit
tags:
- chat
model-index:
- name: dense
  results:
  - task: {type: text-generation}
    dataset: {name: Text, type: text}
    metrics: [{type: perplexity, value: 3.0}]
---
# My model

Written by hand.
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("bisparse.checkpoint.atomic_folder._fsync", lambda path: None)
    folder = tmp_path / "model"
    folder.mkdir()
    weights = {f"layers.{i}.up.weight": torch.randn(16, 24) for i in range(3)}
    save_file({**weights, "lm_head.weight": torch.randn(8, 24)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return folder


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_a_card_says_what_was_done_and_how_to_load(source: Path, tmp_path: Path) -> None:
    report = prune_checkpoint(source, tmp_path / "out", "2:4", patterns={"layers.1*": "4:8-T"})
    found = card(tmp_path / "out")
    assert {"bisparse", "sparse"} <= set(found.data.tags)
    for said in (
        "2:4 (2 layers), 4:8-T (1 layers)",
        f"{report.weights:,} of {report.parameters:,} parameters ({report.fraction:.1%})",
        "| method | magnitude |",
        "| pruned from | model |",
        "`lm_head`",
        report.left_dense[0].reason,
        "LlamaForCausalLM.from_pretrained(",
    ):
        assert said in found.text
    assert not report.notes or "no model card" not in " ".join(report.notes)


def test_text_of_the_source_stays_and_its_figures_go(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text(DENSE_README)
    prune_checkpoint(source, tmp_path / "out", "2:4")
    found = card(tmp_path / "out")
    assert found.text.startswith("# My model\n\nWritten by hand.") and "may describe the model before pruning" in found.text
    assert found.data.license == "mit" and found.data.tags == ["chat", "bisparse", "sparse"]
    assert "model-index" not in found.content and found.data.eval_results is None
    assert (source / "README.md").read_text() == DENSE_README


def test_pruned_again_there_is_one_section_and_a_replaced_folder_keeps_what_its_user_wrote(source: Path, tmp_path: Path) -> None:
    prune_checkpoint(source, tmp_path / "out", "2:4")
    written = (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / "README.md").write_text(written + "\nMy own remark.\n")
    prune_checkpoint(source, tmp_path / "out", "4:8", overwrite=True)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "My own remark." in text and "4:8 (3 layers)" in text and "2:4 (3 layers)" not in text
    prune_checkpoint(tmp_path / "out", tmp_path / "again", "2:8")
    text = (tmp_path / "again" / "README.md").read_text()
    assert text.count("bisparse: begin") == 1 and "My own remark." in text and "2:8 (3 layers)" in text and "4:8 (" not in text


@pytest.mark.parametrize("metadata", ["---\nfoo: [1,\n---\n", "---\n- a\n---\n", "---\n1: 2\n---\n", "---\ntags: chat\n---\n"])
def test_metadata_that_is_damaged_or_odd_fails_no_job(metadata: str, source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text(metadata + "# Mine\n")
    prune_checkpoint(source, tmp_path / "out", "2:4")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# Mine" in text and "2:4 (3 layers)" in text


TAGS = "tags:\n- bisparse\n- sparse\n"


@pytest.mark.parametrize(
    ("metadata", "written"),
    [
        ("language:\n- no\n- en\n", f"language:\n- no\n- en\n{TAGS}"),  # `no` is false in YAML 1.1, and Norwegian
        ("# mine\nlicense: mit # checked\nversion: 1.10\n", f"# mine\nlicense: mit # checked\nversion: 1.10\n{TAGS}"),
        ("tags: [chat]\n\n# below\nx: {a: 1}\n", "tags:\n- chat\n- bisparse\n- sparse\n\n# below\nx: {a: 1}\n"),
        ("tags:\n- chat\n\n# below\nx: 1\n", "tags:\n- chat\n- bisparse\n- sparse\n\n# below\nx: 1\n"),
        ("model-index:\n- name: dense\n  results: []\n# below\nx: 1\n", f"# below\nx: 1\n{TAGS}"),
        ("tags: null # none yet\nx: 1\n", f"{TAGS}x: 1\n"),
        ("x: 1\ntags: ~\n", f"x: 1\n{TAGS}"),
        ("", TAGS),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_metadata_stay_as_they_are_written(metadata: str, written: str, end: str, source: Path, tmp_path: Path) -> None:
    body = "# Mine\n\n---\n\nA rule is no end of metadata.\n"
    (source / "README.md").write_bytes(f"---\n{metadata}---\n{body}".replace("\n", end).encode())
    prune_checkpoint(source, tmp_path / "out", "2:4")
    text = (tmp_path / "out" / "README.md").read_bytes().decode()
    assert text.startswith(f"---\n{written}---\n{body}".replace("\n", end).rstrip())


def test_a_mark_that_is_not_closed_takes_no_text_with_it(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("# Mine\n<!-- bisparse: begin -->\nMy own remark.\n")
    prune_checkpoint(source, tmp_path / "out", "2:4")
    record_evaluation(tmp_path / "out", [FIGURE])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "My own remark." in text and "20.5" in text


def test_a_readme_that_is_no_text_is_left_alone_and_that_is_said(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("Grüße", encoding="latin-1")
    report = prune_checkpoint(source, tmp_path / "out", "2:4")
    copied = tmp_path / "out" / "README.md"
    if copied.exists():
        assert copied.read_bytes() == "Grüße".encode("latin-1")
        assert any("not UTF-8" in note for note in report.notes)
        assert any("not UTF-8" in note for note in read_sidecar(tmp_path / "out").report.notes)


def test_names_from_a_file_can_neither_end_the_section_nor_break_a_table(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a<!-- bisparse: end --> | b`": nn.Linear(8, 8), "fine": nn.Linear(8, 8)})
    report = bisparse.prune_(model, "2:4", include=["fine"])
    report = type(report)(**{**vars(report), "left_dense": (bisparse.layers.Skipped("a<!-- bisparse: end --> | b`", "x|y\nz"),)})
    save(model, tmp_path / "out", report=report)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.count("<!-- bisparse: end -->") == 1 and "x\\|y\\nz" in text
    assert "load(model, folder)" in text


def test_figures_are_recorded_with_the_model_and_replace_those_of_the_same_protocol(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune_checkpoint(source, out, "2:4")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".safetensors"}
    record_evaluation(out, [{**FIGURE, "when": "before"}, FIGURE])
    record_evaluation(out, [{**FIGURE, "perplexity": 31.25}, {**FIGURE, "tokens": 128, "perplexity": 7.0}])
    found = read_sidecar(out).evaluation
    assert [(one["when"], one["tokens"], one["perplexity"]) for one in found] == [
        ("before", 64, 20.5),
        ("after", 64, 31.25),
        ("after", 128, 7.0),
    ]
    text = (out / "README.md").read_text()
    assert "| perplexity (news\\|.txt, tokens 64, context 8, stride 8) | 20.5 ± 0.5 | 31.25 ± 0.5 |" in text
    assert "| - | 7 ± 0.5 |" in text and "| - | 20.5" not in text
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".safetensors"}
    assert bisparse.verify_checkpoint(out)


def test_figures_need_a_folder_of_ours(source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"bisparse.json"):
        record_evaluation(source, [FIGURE])
    assert not (source / "README.md").exists()


def test_a_sidecar_without_figures_is_read_and_one_with_wrong_ones_is_refused(source: Path, tmp_path: Path) -> None:
    prune_checkpoint(source, tmp_path / "out", "2:4")
    path = tmp_path / "out" / "bisparse.json"
    document = json.loads(path.read_text())
    del document["evaluation"]
    path.write_text(json.dumps(document))
    assert read_sidecar(tmp_path / "out").evaluation == ()
    path.write_text(json.dumps({**document, "evaluation": ["x"]}))
    with pytest.raises(CheckpointError, match="evaluation"):
        read_sidecar(tmp_path / "out")


def test_without_the_hub_library_the_folder_is_written_and_the_missing_card_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    report = prune_checkpoint(source, tmp_path / "out", "2:4")
    assert not (tmp_path / "out" / "README.md").exists()
    assert any("no model card" in note and "[hub]" in note for note in report.notes)


def test_save_gives_the_data_by_name_and_not_by_path(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    calibration = {"file": "/home/someone/data/brown.txt", "sequences": 32, "length": 512}
    save(model, tmp_path / "out", report=bisparse.prune_(model, "2:4-T"), provenance={"calibration": calibration})
    text = (tmp_path / "out" / "README.md").read_text()
    assert "brown.txt, 32 sequences, at most 512 tokens each" in text and "someone" not in text


def test_a_card_that_gets_figures_later_is_still_the_librarys_own(source: Path, tmp_path: Path) -> None:
    prune_checkpoint(source, tmp_path / "out", "2:4")
    record_evaluation(tmp_path / "out", [FIGURE | {"perplexity_error": 1.9224}])
    text = str(card(tmp_path / "out"))
    assert "20.5 ± 1.9 |" in text and "not written by bisparse" not in text
    path = tmp_path / "out" / "README.md"
    path.write_text(path.read_text(encoding="utf-8") + "\nWritten by hand.\n", encoding="utf-8")
    record_evaluation(tmp_path / "out", [FIGURE])
    assert "not written by bisparse" in str(card(tmp_path / "out"))
