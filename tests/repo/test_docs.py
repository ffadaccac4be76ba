"""Every code block of README and docs runs, and prints what the page says it prints.

* ``python``: run in the page's order, in one namespace; a ``text`` block directly below is what it must print.
* ``console``: each ``$ `` line is run by bash; the lines below it are what it must print.
* ``...`` in an expected output stands for any text.
* ``<!-- not run: REASON -->`` directly above a block: it needs what a test machine has not, such as a GPU.

Pages run in an empty folder that holds `my-model/`, a small BERT as transformers saves it.
"""

import contextlib
import doctest
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import bisparse

pytestmark = pytest.mark.docs

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CODE_OF_CONDUCT")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"(?P<above>[^\n]*)\n?\n(?P<indent> *)```(?P<language>\S*)\n(?P<body>.*?)\n? *```(?=\n|$)", re.DOTALL)
LANGUAGES = {"python", "console", "text", "toml", "json", "mermaid", "{eval-rst}"}


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    """Where it starts on the page."""
    reason_not_run: str


def blocks_of(page: str) -> list[Block]:
    found = []
    for match in FENCE.finditer("\n" + page):
        reason = re.fullmatch(r"\s*<!-- not run: (.+) -->", match["above"])
        body = "\n".join(line.removeprefix(match["indent"]) for line in match["body"].split("\n"))
        found.append(
            Block(match["language"], body, page.count("\n", 0, match.start("body") - 1) + 1, reason[1] if reason else "")
        )
    return found


def agrees(expected: str, printed: str) -> bool:
    def tidy(text: str) -> str:
        return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"

    return doctest.OutputChecker().check_output(tidy(expected), tidy(printed), doctest.ELLIPSIS)


def commands_of(block: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with what it should print; a command goes on where its line ends in a backslash."""
    pairs: list[tuple[str, str]] = []
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE):
        match = re.match(r"((?:[^\n]*\\\n)*[^\n]*)\n?(.*)", part, re.DOTALL)
        assert match is not None
        if match[1].strip():
            pairs.append((match[1], match[2]))
    return pairs


@pytest.fixture(scope="module")
def my_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("pages") / "my-model"
    torch.manual_seed(0)
    config = BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    BertModel(config).save_pretrained(folder)
    return folder


def check_setup_command(command: str) -> bool:
    """Commands that set up a machine are not run; that what they name exists is checked instead."""
    if command.startswith("make "):
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        words = command.split("#")[0].split()[1:]
        assert words and all(word in targets or re.fullmatch(r"[A-Z_]+=\S+", word) for word in words), (
            f"no such target: {command}"
        )
        return True
    if command.startswith("pip install"):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for named in re.findall(r"\[([\w,]+)\]", command):
            assert set(named.split(",")) <= set(extras), f"no such extra: {command}"
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_page_run(page: Path, my_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(my_model, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "120")
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed: str | None = None
    for block in blocks_of(page.read_text()):
        where = f"{page.relative_to(ROOT)}, line {block.line}"
        assert block.language in LANGUAGES, f"{where}: a block of {block.language!r} would never be run; use one of {LANGUAGES}"
        if block.reason_not_run:
            printed = None
        elif block.language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
            printed = output.getvalue()
        elif block.language == "console":
            printed = None
            for command, expected in commands_of(block.text):
                if check_setup_command(command):
                    continue
                done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
                assert done.returncode in (0, 1), f"{where}: {command}\n{done.stdout}{done.stderr}"
                assert not expected.strip() or agrees(expected, done.stdout), (
                    f"{where}: {command}\nprinted\n{done.stdout}{done.stderr}"
                )
        elif block.language == "text" and printed is not None:
            assert agrees(block.text, printed), f"{where}: the block above printed\n{printed}"
            printed = None
        elif block.language == "toml":
            tomllib.loads(block.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_project_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", prose):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"


def test_the_runner_itself_fails_where_it_should() -> None:
    page = "text\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n"
    page += "<!-- not run: needs a GPU -->\n```console\n$ a \\\n  b\nc\n$ d\n```\n"
    blocks = blocks_of(page)
    assert [(b.language, b.text, b.reason_not_run) for b in blocks] == [
        ("python", "print(1)", ""),
        ("text", "1", ""),
        ("console", "$ a \\\n  b\nc\n$ d", "needs a GPU"),
    ]
    assert [page.split("\n")[b.line - 1] for b in blocks] == ["print(1)", "1", "$ a \\"]
    assert commands_of(blocks[2].text) == [("a \\\n  b", "c\n"), ("d", "")]
    assert agrees("a ...\nc", "a b\nc\n") and not agrees("a ... c", "a b d")
    with pytest.raises(AssertionError):
        check_setup_command("make nonsense")


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 94.4), ("4:8", 96.7), ("8:16", 98.2), ("16:32", 99.1)])
def test_what_the_readme_says_a_transposable_mask_keeps(pattern: str, share: float) -> None:
    scores = torch.randn(1024, 1024).abs()
    measured = 100 * bisparse.solve(scores, f"{pattern}-T").value / bisparse.solve(scores, pattern).value
    assert measured == pytest.approx(share, abs=0.08)
    assert f"{pattern}-T {share} %" in (ROOT / "README.md").read_text()


def public_modules() -> list[str]:
    """Modules with an ``__all__`` that are meant to be imported: the subpackages, and those that `bisparse` takes names from."""
    folder = ROOT / "src" / "bisparse"
    packages = {path.parent.name for path in folder.glob("*/__init__.py") if "__all__" in path.read_text()} - {"cli"}
    sources = {getattr(bisparse, name).__module__ for name in bisparse.__all__ if hasattr(getattr(bisparse, name), "__module__")}
    roots = {source.split(".")[1] for source in sources if source.startswith("bisparse.")}
    return sorted(packages | {root for root in roots if not root.startswith("_")} - {"errors"})


def test_every_public_name_is_on_a_page_of_the_api() -> None:
    pages = {path.stem: path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")}
    described = set(re.findall(r"automodule:: (\S+)", "".join(pages.values())))
    missing = [name for name in bisparse.__all__ if f"{{py:obj}}`{name} <" not in pages["index"]]
    assert not missing
    for name, target in re.findall(r"\{py:obj\}`(\w+) <(\S+)>`", pages["index"]):
        module, _, last = target.rpartition(".")
        assert target == "bisparse.solve" or (module in described and last in importlib.import_module(module).__all__), name
    left_out = [name for name in public_modules() if f"bisparse.{name}" not in described]
    assert not left_out, f"no page of docs/api describes {left_out}: add them to tools/api_pages.py"


def test_nothing_tells_users_to_install_from_an_index_that_does_not_have_the_package() -> None:
    texts = [
        *PAGES,
        ROOT / "CHANGELOG.md",
        *(path for folder in ("src", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
    ]
    wrong = [path for path in texts if re.search(r"pip install\W+bisparse", path.read_text())]
    assert not wrong, "the package is installed from a clone: use bisparse.errors.install_extra"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for path in texts for name in re.findall(r"""install_extra\(["'](\w+)""", path.read_text())}
    assert named and named <= set(extras)


def test_the_tests_that_the_page_of_faults_names_exist() -> None:
    page = (ROOT / "docs" / "faults.md").read_text()
    written = {name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| |  kind", "|---"))]
    named = {row: re.findall(r"`(test_\w+)`", row) for row in rows if " kind | now | test " not in row}
    assert len(named) > 80
    assert not [row for row, tests in named.items() if not tests and not row.endswith(" open |")]
    assert {name for tests in named.values() for name in tests} <= written, "a test was renamed or is gone"
