"""Draw the pictures of README and docs from masks that are solved here; with --check only compare with the committed files.

docs/images/both-ways.svg   one weight matrix under 4:8 and under 4:8-T, with the number of weights kept per group
docs/images/flow.svg        the same tile as a network of flow, with the best flow
docs/images/certificate.svg a tile of 4 x 4 scores, its best 2:4-T mask, and the prices that prove it
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import bisparse

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
CELL, GAP = 14, 6
KEPT, PRUNED, GOOD, BAD, INK = "#1f6feb", "#e6e9ee", "#1a7f37", "#cf222e", "#24292f"


def text(x: float, y: float, words: object, fill: str = INK, size: int = 11, anchor: str = "middle", bold: bool = False) -> str:
    """One line of text; `y` is its baseline. 11 px and centred unless stated."""
    more = f' font-size="{size}"' if size != 11 else ""
    more += f' text-anchor="{anchor}"' if anchor != "middle" else ""
    more += ' font-weight="700"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}"{more}>{words}</text>'


def picture(width: float, height: float, title: str, parts: list[str]) -> str:
    """A whole SVG file on a light card, so that it is readable on dark pages too."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    card = f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#fff"/>'
    return (
        "\n".join(
            [
                f'{head} font-family="sans-serif" font-size="11" text-anchor="middle" role="img">',
                f"<title>{title}</title>",
                card,
                *parts,
                "</svg>",
            ]
        )
        + "\n"
    )


def place(index: int, m: int) -> int:
    """Where a row or column of cells begins: groups have a gap between them."""
    return CELL * index + GAP * (index // m)


def panel(mask: torch.Tensor, m: int, left: float, top: float, title: str, pattern: str) -> list[str]:
    """A mask with the number of weights kept per row group (right of it) and per column group (above and below it)."""
    side = mask.shape[0]
    width = place(side - 1, m) + CELL
    cells = {KEPT: "", PRUNED: ""}
    for row in range(side):
        for column in range(side):
            x, y = left + place(column, m) + 1, top + place(row, m) + 1
            cells[KEPT if mask[row, column] else PRUNED] += f"M{x:g} {y:g}h{CELL - 2}v{CELL - 2}h-{CELL - 2}z"
    parts = [f'<path d="{path}" fill="{colour}"/>' for colour, path in cells.items()]
    n = bisparse.Pattern.parse(pattern).n
    by_row = mask.view(side, -1, m).sum(2)
    by_column = mask.view(-1, m, side).sum(1)
    for row in range(side):
        for group, kept in enumerate(by_row[row].tolist()):
            x = left - 10 if group == 0 else left + width + 10
            parts.append(text(x, top + place(row, m) + 11, kept, GOOD if kept <= n else BAD))
    for group, line in enumerate(by_column.tolist()):
        for column, kept in enumerate(line):
            y = top - 5 if group == 0 else top + width + 13
            parts.append(text(left + place(column, m) + CELL / 2, y, kept, GOOD if kept <= n else BAD, bold=kept > n))
    broken = int((by_column > n).sum())
    columns = "holds on W^T" if not broken else f"{broken} of {by_column.numel()} groups break it on W^T"
    middle = left + width / 2
    return [
        *parts,
        text(middle, top - 27, title, size=15, bold=True),
        text(middle, top + width + 36, "holds on W", GOOD, 13),
        text(middle, top + width + 54, columns, BAD if broken else GOOD, 13),
    ]


def both_ways() -> str:
    """The same matrix, kept along its rows only and kept both ways."""
    side, m = 16, 8
    scores = torch.randn(side, side, generator=torch.Generator().manual_seed(3)).abs()
    width = place(side - 1, m) + CELL
    parts = []
    for index, pattern in enumerate(("4:8", "4:8-T")):
        mask = bisparse.solve(scores, pattern).mask
        kept = f"{100 * float((scores * mask).sum() / scores.sum()):.1f} % of |w|"
        parts += panel(mask, m, 40 + index * (width + 80), 55, f"{pattern}: keeps {kept}", pattern)
    return picture(
        2 * width + 160, width + 125, "One weight matrix under 4:8 and under 4:8-T; numbers are weights kept per group", parts
    )


def certificate() -> str:
    """The tile of docs/mathematics.md with its mask and its prices."""
    scores = torch.tensor([[9, 7, 1, 2], [8, 6, 3, 1], [2, 1, 5, 4], [1, 3, 4, 6]])
    solution = bisparse.solve(scores, "2:4-T")
    proof = solution.certificate
    scale = 2.0 ** -int(proof.exponent[0])
    u, v = (proof.u[0] * scale).tolist(), (proof.v[0] * scale).tolist()
    rest = [[max(0.0, float(scores[i, j]) - u[i] - v[j]) for j in range(4)] for i in range(4)]
    bound = 2 * (sum(u) + sum(v)) + sum(map(sum, rest))
    size, left, top, parts = 48, 96, 64, []
    for i in range(4):
        for j in range(4):
            x, y, kept = left + size * j, top + size * i, bool(solution.mask[i, j])
            parts.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{size - 2}" height="{size - 2}" rx="4" fill="{KEPT if kept else PRUNED}"/>'
            )
            parts.append(text(x + size / 2, y + 30, int(scores[i, j]), "#fff" if kept else INK, 18))
        parts.append(text(left - 14, top + size * i + 30, f"{u[i]:g}", GOOD, 15, "end"))
        parts.append(text(left + size * i + size / 2, top - 10, f"{v[i]:g}", GOOD, 15))
    parts.append(text(left - 14, top - 10, "prices", GOOD, 12, "end"))
    right = left + 4 * size + 32
    lines = [
        ("Blue: the best mask, at most 2 per row and column", INK),
        (f"It keeps {solution.value:g}.", KEPT),
        ("No mask keeps more than", INK),
        ("2 x (sum of all prices)", GOOD),
        ("+ what each score exceeds its two prices by", INK),
        (f"= 2 x {sum(u) + sum(v):g} + {sum(map(sum, rest)):g} = {bound:g}.", GOOD),
        ("The two are equal, so the mask is optimal.", INK),
    ]
    parts += [text(right, top + 16 + 28 * k, words, colour, 14, "start") for k, (words, colour) in enumerate(lines)]
    return picture(right + 330, top + 4 * size + 24, "A tile of scores, its best 2:4-T mask and the prices that prove it", parts)


def flow() -> str:
    """The tile of the certificate as a network: source, rows, columns, sink; what the best mask keeps is drawn strong."""
    scores = torch.tensor([[9, 7, 1, 2], [8, 6, 3, 1], [2, 1, 5, 4], [1, 3, 4, 6]])
    mask = bisparse.solve(scores, "2:4-T").mask
    left, right, top, step = 170, 450, 60, 62
    heights = [top + step * i for i in range(4)]
    middle = (heights[0] + heights[-1]) / 2
    parts = [
        f'<path d="M{left} {heights[i]}L{right} {heights[j]}" stroke="{(PRUNED, KEPT)[kept]}" stroke-width="{2 + 2 * kept}"/>'
        for kept in (False, True)
        for i in range(4)
        for j in range(4)
        if bool(mask[i, j]) == kept
    ]
    for i in range(4):
        parts += [
            f'<path d="M40 {middle:g}L{left} {heights[i]}M{right} {heights[i]}L580 {middle:g}" stroke="{INK}" fill="none"/>'
        ]
    for i in range(4):
        for j in range(4):
            if mask[i, j]:
                at = 0.3 if (i + j) % 2 else 0.62
                x, y = left + at * (right - left), heights[i] + at * (heights[j] - heights[i])
                parts += [
                    f'<circle cx="{x:g}" cy="{y:g}" r="10" fill="#fff"/>',
                    text(x, y + 4, int(scores[i, j]), KEPT, bold=True),
                ]
    for x, y, words in (
        (40.0, middle, "source"),
        (580.0, middle, "sink"),
        *((float(left), float(heights[i]), f"row {i + 1}") for i in range(4)),
        *((float(right), float(heights[j]), f"col {j + 1}") for j in range(4)),
    ):
        parts += [f'<circle cx="{x:g}" cy="{y:g}" r="23" fill="#fff" stroke="{INK}"/>', text(x, y + 4, words)]
    parts += [
        text(105, 24, "at most 2 units per row", size=12),
        text(310, 24, "one unit at most per entry, which pays its score", size=12),
    ]
    parts += [
        text(520, 44, "at most 2 per column", size=12),
        text(310, 294, "Blue: the flow that pays most, 49. It is the best mask.", KEPT, 13),
    ]
    return picture(620, 310, "A tile of scores as a network of flow from rows to columns", parts)


def main() -> None:
    """Write the pictures, or say which one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a picture is not up to date")
    check = parser.parse_args().check
    for name, draw in (("both-ways.svg", both_ways), ("certificate.svg", certificate), ("flow.svg", flow)):
        path = IMAGES / name
        if not check:
            path.write_text(draw())
        elif not path.exists() or path.read_text() != draw():
            sys.exit(f"{path} is out of date: run `make fix`")


if __name__ == "__main__":
    main()
