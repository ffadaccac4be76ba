"""Which method, how much data, how long: from the results of several files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from record import read_rows
from sections.markdown import table
from sections.pruning import Row

PATTERNS = ("2:4", "4:8-T")


@dataclass(frozen=True)
class Network:
    """How the rows of one results file enter the table."""

    file: str
    name: str
    figure: str
    """The row's key of the quality."""
    digits: int
    what: str
    data: Callable[[Row], str]
    pattern: str = "pattern"
    keep: Callable[[Row], bool] = lambda _: True
    method: Callable[[Row], str] = lambda row: str(row["method"])


def _text(row: Row) -> str:
    if not row.get("sequences"):
        return "none"
    more = f"; network {row['network_sequences']} x {row['length']}" if row.get("network_sequences") else ""
    more += "; spaced as the test text" if row.get("spaced") else ""
    return f"{row['sequences']} x {row['length']} tokens{more}"


def _views(row: Row) -> str:
    judged = f"; judged on {row.get('test_images', row['images'])} of {row['side']} x {row['side']} pixels"
    if row["method"] == "magnitude":
        return f"none{judged}"
    more = f"; network {row['network_images']}, {row['network_epochs']} epochs" if row.get("network_images") else ""
    return f"{row['images']} pictures{more}{judged}"


def _pairs(row: Row) -> str:
    return f"{row['count']} sentences ({row['corpus']})" if row.get("count") else "none"


def _pictures(row: Row) -> str:
    if row["method"] != "magnitude":
        return "400 pictures"
    return "none" if row["batch_norms"] == "as they were" else "400 pictures, for the norms"


NETWORKS = (
    Network(
        "pruning_smollm.jsonl", "SmolLM2-135M", "perplexity", 1, "perplexity on WikiText-2, less is better", _text,
        keep=lambda row: row["tokens"] == 12_288,
    ),
    Network("pruning_minilm.jsonl", "all-MiniLM-L6-v2", "spearman", 4, "Spearman correlation on STS-B", _pairs),
    Network(
        "pruning_resnet.jsonl", "ResNet-20", "accuracy", 2, "top-1 on Fashion-MNIST at 14 x 14 pixels, per cent",
        _pictures, pattern="to",
        keep=lambda row: row["origin"] == "dense" and row.get("method") in (None, "magnitude", "adaprune (b), default", "alps"),
        method=lambda row: f"{row['method'].replace(' (b), default', '')}, batch norms {row['batch_norms']}",
    ),
    Network(
        "pruning_efficientnet.jsonl", "EfficientNet-lite0", "same_class", 3, "fraction of pictures given dense's class",
        _views,
    ),
)  # fmt: skip


def guidance(results: Path) -> list[str]:
    """The table, from the files of a folder."""
    parts = [
        "## Which method, how much data, how long\n",
        "One row per network, pattern, method and amount of calibration data: the mean over draws, in the order of time. Seconds "
        "are wall time of the whole job on machines that differ between rows, so compare orders of magnitude only. The sections "
        "below name them.\n",
        '"short", "own inputs" and "then blocks" are settings in `benchmarks/pruning/experiment.py`.\n',
    ]
    for network in NETWORKS:
        rows = [row for row in read_rows(results / network.file) if network.keep(row)]
        if found := list(_lines(network, rows)):
            parts += [f"**{network.name}**: {network.what}{_dense(network, rows)}\n"]
            parts += [table(["pattern", "method", "calibration data", "draws", "result", "seconds"], found, 3)]
    return parts


def _dense(network: Network, rows: Iterable[Row]) -> str:
    dense = [row[network.figure] for row in rows if row.get("method") is None and network.figure in row]
    return f"; dense {dense[-1]:.{network.digits}f}" if dense else ""


def _lines(network: Network, rows: list[Row]) -> Iterable[list[str]]:
    for pattern in PATTERNS:
        cells: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row.get("method") is not None and row.get(network.pattern) == pattern and network.figure in row:
                cells.setdefault((network.method(row), network.data(row)), []).append(row)
        found = [
            (mean(row["seconds"] for row in own), mean(row[network.figure] for row in own), len(own), *key)
            for key, own in cells.items()
        ]
        for seconds, result, draws, method, data in sorted(found):
            time = f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"
            yield [pattern, method, data, str(draws), f"{result:.{network.digits}f}", time]
