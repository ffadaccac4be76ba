"""The report: true figures, nothing from the network, nothing that a name could inject, readable without a mouse or colours."""

from __future__ import annotations

import dataclasses
import html.parser
import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from safetensors.torch import load_file, save_file

from bisparse import mask_diversity, prune_, solve
from bisparse.checkpoint import SIDECAR, CheckpointError, load_masks, prune_checkpoint, read_sidecar, save
from bisparse.report import Task, plot_diversity, read_figures, write_comparison, write_report
from bisparse.report.plot import GAUSSIAN_RETAINED, LIGHT, STRUCTURES, _draw, _overlap, diversity_points, diversity_svg
from bisparse.report.svg import chart_of_layers, picture_of_tile
from bisparse.solvers import Greedy

INJECTION = "encoder.1.<script>alert(1)</script>\"'&amp;"
VOID = {"meta", "link", "input", "br", "wbr", "img", "hr"}


class Page(html.parser.HTMLParser):
    """A page as a reader's program sees it; fails on tags that do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.text += data
        if self.rows and ({"td", "th"} & set(self.open)):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The cells of the table row whose first cell is `name`."""
        (found,) = [row for row in self.rows if row and (row[0].strip() + " ").startswith(name + " ")]
        return [cell.strip() for cell in found]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a Linear, a convolution, an embedding, a head and names that want to be markup."""
    folder = tmp_path_factory.mktemp("models") / "tiny <b onclick=x>model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "encoder.0.query.weight": (32, 64),
        "encoder.0.conv.weight": (16, 16, 3, 3),
        f"{INJECTION}.weight": (24, 40),
        "embed_tokens.weight": (100, 32),
        "lm_head.weight": (100, 32),
        "encoder.0.query.bias": (32,),
    }
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def pruned(dense: Path) -> dict[str, Path]:
    """That checkpoint at several patterns."""
    folders = {}
    for pattern in ("4:8-T", "2:4", "2:4-seq", "4:8-paired", "50%", "16:32-T"):
        folders[pattern] = dense.parent / f"pruned {pattern.replace(':', '-').replace('%', '')} <i>"
        prune_checkpoint(dense, folders[pattern], pattern)
    return folders


@pytest.fixture(scope="module")
def page(pruned: dict[str, Path], dense: Path) -> Page:
    return Page(write_report(pruned["4:8-T"], dense.parent / "report.html", against=dense))


@pytest.fixture(scope="module")
def comparison(pruned: dict[str, Path], dense: Path) -> Page:
    task = Task("agreement <u>", 0.75, (0.5, 0.625, 0.7), "Pearson & co")
    folders = [pruned[pattern] for pattern in ("2:4", "4:8-T", "16:32-T")]
    return Page(write_comparison(folders, dense.parent / "all.html", against=dense, tasks=[task]))


# ---- the figures are true -------------------------------------------------------------------------------------------


def test_rows_of_the_table_are_what_masks_and_weights_say(page: Page, pruned: dict[str, Path], dense: Path) -> None:
    masks = load_masks(pruned["4:8-T"])
    before, after = load_file(dense / "model.safetensors"), load_file(pruned["4:8-T"] / "model.safetensors")
    assert set(masks) == {"encoder.0.query.weight", "encoder.0.conv.weight", f"{INJECTION}.weight"}
    for name, mask in masks.items():
        weight = before[name].double()
        cells = page.row(name.removesuffix(".weight"))
        assert cells[1] == " × ".join(map(str, weight.shape))
        assert cells[2] == f"{100 * mask.double().mean():.2f} %"
        assert cells[3] == f"{100 * weight[mask].abs().sum() / weight.abs().sum():.2f} %"
        assert float(cells[4] or "nan") < 1e-6
        assert [cells[5], cells[6]] == ["✓ holds", "✓ holds"]
        assert cells[7] == f"{100 * (after[name].double() - weight).norm() / weight.norm():.1f} %"
    weights = torch.cat([before[name].flatten() for name in masks]).double()
    everything = torch.cat([mask.flatten() for mask in masks.values()])
    assert page.row("All layers")[1:3] == [f"{len(everything):,}", f"{100 * everything.double().mean():.2f} %"]
    assert f"{100 * (weights * ~everything).norm() / weights.norm():.1f} %" in page.row("All layers")


def test_headline_says_what_was_done(page: Page) -> None:
    text = re.sub(r"\s+", " ", page.text)
    assert "tiny <b onclick=x>model at 4:8-T" in text
    assert "At most 4 of every 8 weights are kept, along the rows of each weight matrix and along its columns." in text
    assert "Each mask is proved to be the best for its scores." in text
    assert re.search(r"✓W holds on all [\d,]+ groups", text) and re.search(r"✓Wᵀ holds on all [\d,]+ groups", text)
    assert "every kept weight is exactly as it was" in text


def test_layers_left_dense_stand_with_their_reasons(page: Page, pruned: dict[str, Path]) -> None:
    sidecar = read_sidecar(pruned["4:8-T"])
    assert sidecar is not None and {one.name for one in sidecar.report.left_dense} == {"embed_tokens", "lm_head"}
    for skipped in sidecar.report.left_dense:
        assert skipped.name in page.text and skipped.reason in page.text


def test_a_model_with_layers_that_are_never_pruned_is_not_said_to_be_wholly_pruned(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(16, 16), "bilinear": torch.nn.Bilinear(16, 16, 16)})
    model.register_parameter("own", torch.nn.Parameter(torch.randn(16, 16)))
    save(model, tmp_path / "all", report=prune_(model, "2:4"))
    text = Page(write_report(tmp_path / "all", tmp_path / "all.html")).text
    assert "bilinear layer: no single matrix" in text
    assert "give its layout" in text
    del model["bilinear"]
    del model.own
    save(model, tmp_path / "some", report=prune_(model, "2:4"))
    assert "None: every prunable layer was pruned." in Page(write_report(tmp_path / "some", tmp_path / "some.html")).text


def test_a_damaged_weight_is_found_and_named(pruned: dict[str, Path], dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    prune_checkpoint(dense, folder, "4:8-T")
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["encoder.0.query.weight"]
    row, column = 5, 9
    full = weight[row, 8:16] != 0
    assert full.sum() == 4
    column = 8 + int((~full).nonzero()[0])
    weight[row, column] = 1.0
    save_file(tensors, folder / "model.safetensors")

    figures = read_figures(folder, dense)
    assert not figures.holds
    assert [layer.result.name for layer in figures.layers if not layer.holds] == ["encoder.0.query"]
    assert (figures.rows.violations, figures.rows.first) == (1, "encoder.0.query: W, row 5, group 1 keeps 5")
    assert figures.columns is not None and figures.columns.violations <= 1
    assert figures.change is not None and figures.change.altered == 1
    page = Page(write_report(folder, tmp_path / "report.html", against=dense))
    assert page.row("encoder.0.query")[5] == "✗ 1"
    assert "encoder.0.query: W, row 5, group 1 keeps 5" in page.text
    assert "holds on all" not in page.text.split("Wᵀ")[0]
    assert "1 kept weights were changed too" in re.sub(r"\s+", " ", page.text)


def test_the_transpose_of_a_plain_pattern_is_shown_without_blame(pruned: dict[str, Path], tmp_path: Path) -> None:
    figures = read_figures(pruned["2:4"])
    assert figures.holds and figures.columns is not None and figures.columns.violations > 0
    weights = load_file(pruned["2:4"] / "model.safetensors")
    broken = total = 0
    for layer in figures.layers:
        weight = weights[layer.result.parameter]
        matrices = weight.permute(2, 3, 0, 1).flatten(0, 1) if weight.ndim == 4 else weight[None]
        groups = (matrices != 0).transpose(1, 2).unflatten(-1, (-1, 4)).sum(-1)
        broken, total = broken + int((groups > 2).sum()), total + groups.numel()
    assert (figures.columns.violations, figures.columns.groups) == (broken, total)
    page = Page(write_report(pruned["2:4"], tmp_path / "plain.html"))
    assert f"not asked for: {100 * broken / total:.0f} % of its groups break 2:4" in re.sub(r"\s+", " ", page.text)
    assert "✗" not in page.text


@pytest.mark.parametrize("pattern", ["2:4-seq", "4:8-paired", "50%", "16:32-T"])
def test_every_structure_has_a_page(pattern: str, pruned: dict[str, Path], tmp_path: Path) -> None:
    path = write_report(pruned[pattern], tmp_path / "deep" / "er" / "report.html")
    page = Page(path)
    assert f"at {pattern}" in re.sub(r"\s+", " ", page.text)
    assert path.stat().st_size < 1_000_000
    assert "holds on all" in page.text and "✗" not in page.text


def test_what_is_not_known_is_left_blank(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "greedy"
    prune_checkpoint(dense, folder, "2:4-T", solver=Greedy())
    sidecar = read_sidecar(folder)
    assert sidecar is not None
    layers = tuple(dataclasses.replace(layer, retained=None, value=None, note="from <elsewhere>") for layer in sidecar.report)
    report = dataclasses.replace(sidecar.report, layers=layers, method="SparseGPT", notes=("a <note>",))
    (folder / SIDECAR).write_text(dataclasses.replace(sidecar, report=report, samples=()).to_json())
    page = Page(write_report(folder, tmp_path / "report.html"))
    assert page.row("encoder.0.query")[3:5] == ["–", "–"]
    assert "from <elsewhere>" in page.text and "a <note>" in page.text
    assert "proved" not in page.text.split("Layer by layer")[0] and "Real tiles" not in page.text


def test_a_comparison_has_a_row_a_folder_and_a_column_a_task(comparison: Page, pruned: dict[str, Path]) -> None:
    assert comparison.row("dense")[1] == "0.750"
    for pattern, score in (("2:4", "0.500"), ("4:8-T", "0.625"), ("16:32-T", "0.700")):
        report = read_figures(pruned[pattern]).report
        cells = comparison.row(f"● {pattern}")
        assert cells[4] == f"{100 * report.retained:.1f} %" and cells[1] == score
    assert "Pearson & co" in comparison.text
    shares = [
        f"{100 * read_figures(pruned[pattern]).report['encoder.0.query'].retained:.2f} %"
        for pattern in ("2:4", "4:8-T", "16:32-T")
    ]
    assert comparison.row("encoder.0.query")[2:] == shares


def test_a_comparison_refuses_scores_that_fit_no_folder(pruned: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 scores for 1 folders"):
        write_comparison([pruned["2:4"]], tmp_path / "x.html", tasks=[Task("t", 1.0, (1.0, 2.0))])
    with pytest.raises(ValueError, match="at least one"):
        write_comparison([], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


# ---- safe and self-contained ----------------------------------------------------------------------------------------


def test_names_cannot_become_markup(page: Page, comparison: Page) -> None:
    for one in (page, comparison):
        assert sum(tag == "script" for tag, _ in one.tags) == 1
        assert not {"b", "i", "u"} & {tag for tag, attributes in one.tags if attributes.get("onclick")}
        assert INJECTION in one.text.replace("\u200b", "")
    # Names also stand in attributes, as labels of pictures, where quotes must not end them.
    labels = [str(attributes["aria-label"]) for tag, attributes in page.tags if tag == "svg" and "aria-label" in attributes]
    assert any(INJECTION in label for label in labels)


def test_pages_ask_the_network_for_nothing(page: Page, comparison: Page, dense: Path) -> None:
    for one in (page, comparison):
        for tag, attributes in one.tags:
            for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                target = attributes.get(name)
                assert target is None or target.startswith(("#", "data:")), (tag, name, target)
            assert not any(name.startswith("on") for name in attributes)
        policies = [
            attributes for tag, attributes in one.tags if tag == "meta" and "content-security-policy" in str(attributes).lower()
        ]
        assert policies and "default-src 'none'" in str(policies[0]["content"])
    for name in ("report.html", "all.html"):
        text = (dense.parent / name).read_text()
        urls = set(re.findall(r"https?://[^\s\"'<)]+", text))
        assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        assert not re.search(r"url\((?!#)", text) and "@import" not in text


def test_pages_are_readable_without_eyes_or_mouse(page: Page, comparison: Page) -> None:
    for one in (page, comparison):
        assert one.tags[0][0] == "html" and one.tags[0][1]["lang"] == "en"
        assert sum(tag == "h1" for tag, _ in one.tags) == 1
        for tag, attributes in one.tags:
            if tag == "svg" and "viewbox" in attributes and attributes.get("class") in ("tile", "chart"):
                assert attributes.get("role") == "img" and attributes.get("aria-label")
            if tag == "th":
                assert attributes.get("scope") in ("row", "col")
        ids = [attributes["id"] for _, attributes in one.tags if attributes.get("id")]
        assert len(ids) == len(set(ids))
        targets = {str(attributes["href"])[1:] for tag, attributes in one.tags if tag == "a"}
        assert targets <= set(ids)


def test_a_failed_report_leaves_the_old_one(pruned: dict[str, Path], dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    output.write_text("<html>old")
    other = tmp_path / "other"
    other.mkdir()
    save_file({"encoder.0.query.weight": torch.zeros(8, 8)}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder\.0\.conv\.weight is in bisparse.json, but not"):
        write_report(pruned["2:4"], output, against=other)
    with pytest.raises(CheckpointError, match=r"no bisparse\.json"):
        write_report(dense, output)
    assert output.read_text() == "<html>old" and {path.name for path in tmp_path.iterdir()} == {"report.html", "other"}
    with pytest.raises(ValueError, match="is a folder"):
        write_report(pruned["2:4"], tmp_path)


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_extra_says_what_to_install(
    missing: str, pruned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}.*\.\[report\]"):
        write_report(pruned["2:4"], tmp_path / "report.html")


def test_progress_counts_bytes_to_the_end(pruned: dict[str, Path]) -> None:
    calls: list[tuple[str, int, int]] = []
    read_figures(pruned["2:4"], progress=lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    assert done == sorted(done) and done[0] == 0 and calls[-1][1] == calls[-1][2] == 4 * (32 * 64 + 16 * 16 * 9 + 24 * 40)


# ---- drawings -------------------------------------------------------------------------------------------------------


def test_a_tile_has_one_cell_a_weight_in_its_place(pruned: dict[str, Path]) -> None:
    figures = read_figures(pruned["4:8-T"])
    (sample,) = [one for one in figures.samples if one.layer == "encoder.0.query"]
    picture = picture_of_tile(sample, figures.structure)
    cells = {
        (float(x), float(y)): name for name, data in picture.paths for x, y in re.findall(r"M([\d.]+) ([\d.]+)h9v9h-9z", data)
    }
    assert len(cells) == picture.total == 256

    def place(index: int) -> float:
        return 10 * index + 5 * (index // 8)

    for row, column in itertools.product(range(16), repeat=2):
        assert cells[place(column), place(row)].startswith("kept" if sample.kept[row][column] else "pruned")
    ranked = sorted(itertools.product(range(16), repeat=2), key=lambda at: abs(sample.weights[at[0]][at[1]]))
    shades = [int(cells[place(column), place(row)][-1]) for row, column in ranked]
    assert shades == sorted(shades) and (shades[0], shades[-1]) == (0, 5)
    assert picture.kept == sum(name.startswith("kept") for name in cells.values())


def test_dots_of_the_chart_lie_at_their_share(pruned: dict[str, Path]) -> None:
    figures = read_figures(pruned["4:8-T"])
    chart = chart_of_layers([figures], [0.7431])
    assert chart is not None
    ((name, dots),) = chart.series
    assert name == "4:8-T" and [dot.layer for dot in dots] == [layer.result.name for layer in figures.layers]
    (y0, low), (y1, high) = chart.ticks[0], chart.ticks[-1]
    for dot, layer in zip(dots, figures.layers, strict=True):
        share = float(low[:-2]) + (dot.y - y0) / (y1 - y0) * (float(high[:-2]) - float(low[:-2]))
        assert layer.result.retained is not None and share == pytest.approx(100 * layer.result.retained, abs=1e-6)
        assert chart.frame.left < dot.x < chart.frame.right and chart.frame.top <= dot.y <= chart.frame.bottom
    assert [span.label for span in chart.spans] == ["0", "1"] or [span.label for span in chart.spans] == ["1", "0"]


def test_points_of_the_plot_are_the_counts(page: Page) -> None:
    points = {str(point.structure): point for point in diversity_points()}
    assert set(points) == set(STRUCTURES)
    for text, point in points.items():
        assert point.exact == mask_diversity(text, 1024 * 1024).log2_per_weight
        assert point.paper == mask_diversity(text, 1024 * 1024, "paper").log2_per_weight


@pytest.mark.parametrize("highlight", [(), ("4:8-T",), ("2:4", "2:4-T", "4:8-T", "8:16-T", "16:32-T"), ("1:4-T", "32:64-T")])
def test_labels_of_the_plot_do_not_overlap(highlight: tuple[str, ...]) -> None:
    figure = _draw(STRUCTURES, highlight, LIGHT, {}, "A title")
    figure.canvas.draw()  # type: ignore[attr-defined]
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    axes = figure.axes[0]
    names = {*STRUCTURES, *highlight}
    labels = [text for text in axes.texts if text.get_text() in names]
    assert len(labels) == len(names)
    boxes = [text.get_window_extent(renderer) for text in labels]
    boxes.append(figure.legends[0].get_window_extent(renderer))
    for one, other in itertools.combinations(boxes, 2):
        assert _overlap(one, other) == 0
    frame = figure.bbox
    for box in boxes:
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


@pytest.mark.parametrize(("suffix", "head"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_plot_is_written_in_the_format_of_its_name(suffix: str, head: bytes, tmp_path: Path) -> None:
    path = plot_diversity(tmp_path / "new" / f"plot{suffix}", ("2:4", "2:4-T"), dark=suffix == ".png")
    assert path.read_bytes().startswith(head)


def test_a_page_that_cannot_be_written_goes_by_the_name_that_its_user_gave(
    pruned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", refused)
    with pytest.raises(CheckpointError, match=r"page\.html could not be written: permission denied"):
        write_report(pruned["2:4"], tmp_path / "page.html")


def test_the_plot_replaces_only_pictures(tmp_path: Path) -> None:
    for name in ("plot.png", "plot.svg"):
        for _ in range(2):
            plot_diversity(tmp_path / name, ("2:4", "2:4-T"))
        (tmp_path / name).write_bytes(b"weights")
        with pytest.raises(ValueError, match="exists and is not a picture, so it is not replaced"):
            plot_diversity(tmp_path / name, ("2:4", "2:4-T"))
        assert (tmp_path / name).read_bytes() == b"weights"


def test_the_plot_refuses_formats_it_does_not_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf"):
        plot_diversity(tmp_path / "plot.jpg")


def test_the_plot_takes_its_colours_from_the_page() -> None:
    svg = diversity_svg(("50%", "2:4", "2:4-T", "2:4-seq", "4:8-paired"), highlight=("2:4-T",))
    assert svg.startswith("<svg") and "var(--ink)" in svg and all(f"var(--plot-{index})" in svg for index in range(5))
    assert not set(re.findall(r"(?<![\w&])#[0-9a-f]{6}\b", svg)) - {"#000000", "#ffffff"}
    assert svg == diversity_svg(("50%", "2:4", "2:4-T", "2:4-seq", "4:8-paired"), highlight=("2:4-T",))


@pytest.mark.parametrize("text", [name for name in GAUSSIAN_RETAINED if "32" not in name])
def test_the_stored_shares_are_what_solve_keeps_of_gaussian_scores(text: str) -> None:
    scores = torch.randn(512, 512, generator=torch.Generator().manual_seed(11)).abs()
    # Over seeds the share of 512 x 512 scores has a standard deviation below 0.0006.
    assert solve(scores, text).retained == pytest.approx(GAUSSIAN_RETAINED[text], abs=0.002)


def test_the_stored_shares_of_plain_patterns_are_those_of_order_statistics() -> None:
    # A score x is kept where fewer than n of the m - 1 others are larger.
    x = np.linspace(0, 9, 20_001)
    for n, m in ((1, 2), (2, 4), (4, 8), (8, 16), (16, 32)):
        kept = x * scipy.stats.halfnorm.pdf(x) * scipy.stats.binom.cdf(n - 1, m - 1, scipy.stats.halfnorm.sf(x))
        assert GAUSSIAN_RETAINED[f"{n}:{m}"] == round(scipy.integrate.trapezoid(kept, x) / scipy.stats.halfnorm.mean(), 4)
    assert GAUSSIAN_RETAINED["50%"] == round(math.exp(-(scipy.stats.norm.ppf(0.75) ** 2) / 2), 4)


def test_json_of_the_sidecar_is_not_trusted_for_the_verdict(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "liar"
    prune_checkpoint(dense, folder, "2:4")
    document = json.loads((folder / SIDECAR).read_text())
    document["pattern"] = "2:4-T"
    for layer in document["layers"]:
        layer["pattern"] = "2:4-T"
    (folder / SIDECAR).write_text(json.dumps(document))
    assert not read_figures(folder).holds
    assert "✗" in Page(write_report(folder, tmp_path / "report.html")).text


def test_figures_of_a_job_with_data_stand_in_the_table(tmp_path: Path) -> None:
    """Violation, both errors and damping of each layer, as the report of the conversion has them."""
    from torch import nn

    from bisparse import convert_, prune_
    from bisparse.checkpoint import save

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    prune_(model, "4:8")
    mixing = torch.randn(32, 32)  # inputs that make good for each other: else there is nothing to fit
    report = convert_(model, "2:4", batches=[torch.randn(64, 32) @ mixing for _ in range(6)])
    save(model, tmp_path / "out", report=report)
    page = Page(write_report(tmp_path / "out", tmp_path / "report.html"))
    head = [cell.strip() for cell in next(row for row in page.rows if "Damping" in row)]
    for layer in report:
        cells = dict(zip(head, page.row(layer.name), strict=True))
        chance = f"unstructured {100 * layer.unstructured_weights:.1f} %, 4:8 {100 * 9 / 70:.1f} %"
        assert cells["Violation"] == f"{100 * layer.violated_weights:.1f} %{chance}"
        chance = f"unstructured {100 * layer.unstructured_groups:.1f} %, 4:8 {100 * 17 / 70:.1f} %"
        assert cells["Groups violated"] == f"{100 * layer.violated_groups:.1f} %{chance}"
        assert (cells["Fits"], cells["Fitted before"]) == ("2:4", layer.fitted)
        assert cells["Error masked"] == f"{100 * layer.error_before:.1f} %"
        assert cells["Output error"] == f"{100 * layer.error:.1f} %"
        assert cells["Damping"] == f"{layer.damping:g}"


@pytest.mark.parametrize("pattern", ["2:4", "4:8-T", "16:32-T", "4:8-paired", "50%"])
def test_the_sparsest_pattern_that_fits_is_found_in_the_file(pattern: str, pruned: dict[str, Path], tmp_path: Path) -> None:
    from bisparse.pruning import sparsest_pattern

    figures = read_figures(pruned[pattern])
    page = Page(write_report(figures, tmp_path / "report.html"))
    head = [cell.strip() for cell in next(row for row in page.rows if "Density" in row)]
    weights = load_file(pruned[pattern] / "model.safetensors")
    for layer in figures.layers:
        m = int(re.search(r":(\d+)|$", pattern)[1] or 8)
        weight = weights[layer.result.parameter]
        expected = sparsest_pattern(weight, m, transposable=pattern.endswith("-T"), layout=layer.result.layout)
        assert layer.fits == expected
        assert dict(zip(head, page.row(layer.result.name), strict=True))["Fits"] == str(expected or "–")
    if pattern == "2:4":
        assert {str(layer.fits) for layer in figures.layers} == {"2:4"}


def test_columns_that_no_layer_has_a_figure_for_are_left_out(page: Page) -> None:
    assert not {"Violation", "Groups violated", "Fitted before", "Error masked", "Output error", "Damping"} & {
        cell.strip() for row in page.rows for cell in row
    }


def test_charts_of_a_job_with_data_are_errors_and_are_drawn_again_for_narrow_screens(tmp_path: Path) -> None:
    from torch import nn

    from bisparse import prune_
    from bisparse.checkpoint import save

    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    save(model, tmp_path / "out", report=prune_(model, "2:4", "adaprune", [torch.randn(64, 32) for _ in range(6)]))
    text = write_report(tmp_path / "out", tmp_path / "report.html").read_text()
    first = text.index("Relative output error of each layer")
    assert first < text.index("Fraction of the score that each layer keeps")
    widths = [int(float(one)) for one in re.findall(r'class="for-(?:wide|narrow)"><svg[^>]*viewBox="0 0 ([\d.]+)', text)]
    assert len(widths) == 4 and widths[1] == widths[3] <= 400 < widths[0] == widths[2], widths
