"""The model card: `README.md` in a pruned folder, as the Hugging Face Hub shows it, and figures measured on that folder.

bisparse writes a section between two marks, and replaces only that section; the rest of the source's README, or text that a user
added, is not changed. In the metadata at the head of the file two tags are added, and a ``model-index`` is removed, since its
figures are those of the dense model.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bisparse.apart import read_text
from bisparse.arguments import check_json
from bisparse.atomic_file import atomic_file
from bisparse.checkpoint.sidecar import SIDECAR, Sidecar, read_sidecar
from bisparse.errors import CheckpointError, install_extra, printable
from bisparse.results import PruneReport

__all__ = ["CARD", "record_evaluation", "write_card"]

CARD = "README.md"
BEGIN = "<!-- bisparse: begin (bisparse replaces this section; write outside of it) -->"
END = "<!-- bisparse: end -->"
SECTION = re.compile(r"<!-- bisparse: begin\b(?:(?!<!-- bisparse: begin\b).)*?<!-- bisparse: end -->", re.DOTALL)
TAGS = ("bisparse", "sparse")
METADATA = re.compile(r"\A\s*---[ \t]*\r?\n(?P<yaml>(?:.*\n)*?)---[ \t]*(\r?\n|\Z)")
COMMENTS = re.compile(r"(?:^[ \t]*(?:#.*)?\r?\n)+\Z", re.MULTILINE)
"""Lines at the end that are empty or comments."""
REASONS = 12
"""Maximum number of reasons for dense layers that a card lists."""
METRICS = {
    "perplexity": ("perplexity", "perplexity_error"),
    "similarity": ("spearman", None),
    "classification": ("accuracy", "accuracy_error"),
    "agreement": ("agreement", "agreement_error"),
}
"""By kind of evaluation, the names of the figure and of its standard error."""


def write_card(folder: Path, sidecar: Sidecar, previous: Path | None = None) -> Sidecar:
    """Write the section on sparsity into a folder's `README.md`. Returns the sidecar, with a note if that is not possible.

    Args:
        previous: the folder that is replaced; if its README has the section, the text around it is kept.
    """
    path = folder / CARD
    try:
        text = _existing(path, previous)
        content = _with_section(text, sidecar, folder)
    except ImportError:
        note = f"no model card was written, since huggingface_hub is not installed; {install_extra('hub')}"
        return replace(sidecar, report=replace(sidecar.report, notes=(*sidecar.report.notes, note)))
    except UnicodeDecodeError:
        note = f"{CARD} was copied without a section on the pruning, since it is not UTF-8 text"
        return replace(sidecar, report=replace(sidecar.report, notes=(*sidecar.report.notes, note)))
    with atomic_file(path) as written:
        written.write_bytes(content.encode("utf-8"))
    return sidecar


def record_evaluation(folder: str | Path, figures: Iterable[Mapping[str, Any]]) -> Sidecar:
    """Record figures in the `bisparse.json` and `README.md` of a pruned folder. Returns the new sidecar.

    Args:
        figures: results of `as_dict` in `bisparse.evaluation`, each with "when": "before" pruning or "after", the default. A
            figure replaces an earlier one of the same protocol.

    Raises:
        CheckpointError: the folder has no readable sidecar.
        ValueError: figures that JSON cannot hold.
    """
    folder = Path(folder)
    sidecar = read_sidecar(folder)
    if sidecar is None:
        raise CheckpointError(folder, f"holds no {SIDECAR} to record figures in", "prune with bisparse, or leave out --record")
    held = list(sidecar.evaluation)
    for figure in figures:
        check_json("figures", figure)
        new = {"when": "after", **figure}
        held = [one for one in held if _protocol(one) != _protocol(new)] + [new]
    sidecar = replace(sidecar, evaluation=tuple(held))
    text = sidecar.to_json()
    with atomic_file(folder / SIDECAR) as written:
        written.write_text(text, encoding="utf-8")
        write_card(folder, sidecar)  # if it cannot be written, the sidecar stays as it is
    return sidecar


def _protocol(figure: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a figure that identify it: everything but the results, which are floats or, for lm-eval, by task."""
    return {
        key: sorted(value) if isinstance(value, dict) else value
        for key, value in figure.items()
        if not isinstance(value, float) and value is not None and not key.endswith("_error")
    }


def _existing(path: Path, previous: Path | None) -> str:
    """The README to extend: that of the replaced folder if it has the section, otherwise the source's."""
    old = None if previous is None else previous / CARD
    if old is not None and old.is_file() and not old.is_symlink():
        found = old.read_bytes().decode("utf-8", errors="replace")
        if SECTION.search(found) and "\ufffd" not in found:
            return found
    return path.read_bytes().decode("utf-8-sig") if path.exists() else ""


def _with_section(text: str, sidecar: Sidecar, folder: Path) -> str:
    from huggingface_hub import ModelCard  # a missing package must fail before the text is changed

    own_title = f"# {_plain(sidecar.source or 'A sparse model')}, pruned"
    title = "" if text.strip() else f"{own_title}\n\n"
    around = METADATA.sub("", SECTION.sub("", text)).strip()
    ours = f"{BEGIN}\n{_section(sidecar, folder, dense_readme=around not in ('', own_title))}\n{END}"
    if SECTION.search(text):
        text = SECTION.sub(lambda found: ours, text, count=1)
    else:
        text = f"{title}{text.rstrip()}{chr(10) * 2 if text.strip() else ''}{ours}\n"
    if not METADATA.match(text):
        text = f"---\n---\n{text}"
    try:
        tagged = _tagged(text)
        tags = ModelCard(tagged, ignore_metadata_errors=True).data.tags
        return tagged if set(TAGS) <= set(tags or ()) else text
    except Exception as error:
        if not _is_bad_metadata(error):
            raise
        return text  # invalid metadata is left to the user


def _tagged(text: str) -> str:
    """The text, with our tags in its metadata and without a model-index. The other metadata stay as they are written.

    They are not parsed and written again, which would drop comments and turn `no`, the Norwegian language, into `false`.
    """
    import yaml

    found = METADATA.match(text)
    assert found is not None
    inner = found["yaml"]
    root = yaml.compose(inner, yaml.SafeLoader)
    if root is not None and (not isinstance(root, yaml.MappingNode) or root.flow_style):
        raise ValueError("the metadata are no mapping in lines")
    entries = [] if root is None else root.value
    empty = any(key.value == "tags" and value.tag.endswith(":null") for key, value in entries)
    tags = [] if empty else (yaml.load(inner, yaml.BaseLoader) or {}).get("tags") or []  # as texts
    ours = yaml.safe_dump(
        {"tags": list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *TAGS]))}, allow_unicode=True
    )
    if "\r\n" in text:
        ours = ours.replace("\n", "\r\n")
    for key, value in reversed(entries):  # so that the positions of those before stay right
        if key.value not in ("tags", "model-index"):
            continue
        first, last = key.start_mark.index, value.end_mark.index
        # A value of several lines ends where the next key begins.
        last = first + len(COMMENTS.sub("", inner[first:last])) if inner[last - 1] == "\n" else inner.index("\n", last) + 1
        inner = inner[:first] + (ours if key.value == "tags" else "") + inner[last:]
    if not any(key.value == "tags" for key, _ in entries):
        inner += ours
    return text[: found.start("yaml")] + inner + text[found.end("yaml") :]


def _is_bad_metadata(error: Exception) -> bool:
    import yaml

    return isinstance(error, ValueError | TypeError | yaml.YAMLError)


def _section(sidecar: Sidecar, folder: Path, *, dense_readme: bool) -> str:
    quantised = "quantization_config" in _config(folder)
    parts = ["## Sparsity", _what_was_done(sidecar, dense_readme=dense_readme, quantised=quantised), _facts(sidecar)]
    if sidecar.evaluation:
        parts.append(_figures(sidecar.evaluation))
    if sidecar.report.left_dense:
        parts.append(_left_dense(sidecar.report))
    parts.append(_how_to_load(folder))
    return "\n\n".join(parts)


def _what_was_done(sidecar: Sidecar, *, dense_readme: bool, quantised: bool) -> str:
    stored = "quantised, as config.json describes, and zeros are stored as zeros" if quantised else "stored dense, with zeros"
    said = (
        "This model was pruned with bisparse. N:M keeps at most N of every M weights along a layer's inputs, and with -T along "
        "its outputs too, so that the transposed weight of the backward pass obeys the pattern as well. The weights are "
        f"{stored}. `{SIDECAR}` says what was done to each layer."
    )
    if dense_readme:
        said += " The rest of this page was not written by bisparse, and may describe the model before pruning."
    return said


def _facts(sidecar: Sidecar) -> str:
    report = sidecar.report
    patterns = Counter(layer.pattern for layer in report)
    rows = [
        ("pattern", ", ".join(f"{_plain(name)} ({count} layers)" for name, count in patterns.most_common())),
        ("pruned from", _plain(sidecar.source)),
        ("weights in pruned layers", f"{report.weights:,}" + _fraction_of(report)),
        ("non-zero weights among those", f"{report.density:.2%}"),
        ("method", _plain(report.method)),
        ("calibration data", _calibration(sidecar.provenance)),
    ]
    return _table(("", ""), [row for row in rows if row[1]])


def _fraction_of(report: PruneReport) -> str:
    return "" if report.fraction is None else f" of {report.parameters:,} parameters ({report.fraction:.1%})"


def _calibration(provenance: Mapping[str, Any]) -> str:
    """The calibration data, as text, with file names but without the paths of the machine that pruned."""
    found = provenance.get("calibration")
    if not isinstance(found, Mapping):
        return "none"
    files = found.get("files")
    names = [str(one["name"]) for one in files if isinstance(one, Mapping) and "name" in one] if isinstance(files, list) else []
    name = ", ".join(map(os.path.basename, names or [str(found.get("file") or "")])) or str(found.get("function") or "")
    counts = [f"{found[key]} {key}" for key in ("sequences", "batches") if isinstance(found.get(key), int)]
    length = f"at most {found['length']} tokens each" if isinstance(found.get("length"), int) else ""
    return _plain(", ".join(filter(None, [name, *counts, length])))


def _figures(evaluation: Sequence[Mapping[str, Any]]) -> str:
    """A table with a row per protocol, and the figures before and after."""
    rows: dict[str, dict[str, str]] = {}
    for figure in evaluation:
        for label, value in _labelled(figure):
            rows.setdefault(label, {})[str(figure.get("when"))] = value
    return "### Measured\n\n" + _table(
        ("", "before pruning", "after"), [(label, row.get("before", "-"), row.get("after", "-")) for label, row in rows.items()]
    )


def _labelled(figure: Mapping[str, Any]) -> list[tuple[str, str]]:
    if figure.get("kind") == "lm-eval":
        suffix = f" (lm-eval {figure.get('version')}" + (f", {figure['limit']} samples)" if figure.get("limit") else ")")
        tasks = figure.get("tasks")
        return [
            (_plain(f"{task}: {name}{suffix}"), _number(value))
            for task, metrics in (tasks.items() if isinstance(tasks, Mapping) else ())
            for name, value in metrics.items()
        ]
    metric, error = METRICS.get(str(figure.get("kind")), (None, None))
    if metric is None:
        return []
    settings = [
        f"{key} {value}" if key not in ("corpus", "dtype") else str(value)
        for key, value in figure.items()
        if key in ("corpus", "tokens", "context", "stride", "pairs", "samples", "pooling", "against", "dtype") and value
    ]
    spread = "" if error is None or figure.get(error) is None else f" ± {figure[error]:.2g}"
    return [(_plain(f"{metric} ({', '.join(settings)})"), _number(figure.get(metric)) + spread)]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not finite"


def _left_dense(report: PruneReport) -> str:
    reasons: dict[str, list[str]] = {}
    for one in report.left_dense:
        reasons.setdefault(one.reason, []).append(one.name)
    rows = [
        (f"`{_plain(names[0])}`" + (f" and {len(names) - 1} more" if len(names) > 1 else ""), _plain(reason))
        for reason, names in list(reasons.items())[:REASONS]
    ]
    if len(reasons) > REASONS:
        rows.append((f"{sum(map(len, list(reasons.values())[REASONS:]))} more", f"see `{SIDECAR}`"))
    return "### Left dense\n\n" + _table(("layers", "why"), rows)


def _how_to_load(folder: Path) -> str:
    kind = _architecture(folder)
    if kind is None:
        load = "from bisparse.checkpoint import load\n\nload(model, folder)  # your model; the folder of this file"
    else:
        load = (
            f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained(folder, dtype="auto")  # the folder of this file'
        )
    return f"### How to load\n\n```python\n{load}\n```\n\n`bisparse verify FOLDER` checks every pruned layer against its pattern."


def _architecture(folder: Path) -> str | None:
    """The transformers class that config.json names."""
    named = _config(folder).get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) and first.isidentifier() else None


def _config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json; empty if it has none that can be read."""
    try:
        config = json.loads(read_text(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _plain(text: str) -> str:
    """A given text, escaped for a table cell: without markup, line breaks or section marks."""
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
