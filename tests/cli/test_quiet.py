"""`--quiet` silences results and progress, and nothing else; shells can complete the commands."""

import json

import pytest
from typer.testing import CliRunner

from bisparse.cli import app


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def test_quiet_prints_no_result_and_keeps_the_exit_code() -> None:
    assert run("--quiet", "info", "2:4") == (0, "", "")
    assert run("info", "2:4")[1], "the next command is not quiet"


def test_quiet_prints_errors_and_json() -> None:
    code, printed, errors = run("-q", "info", "5:4")
    assert code == 2 and not printed and "5:4" in errors
    code, printed, _ = run("-q", "info", "2:4", "--json")
    assert code == 0 and json.loads(printed)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_names_the_program(shell: str) -> None:
    from typer.completion import get_completion_script

    assert "bisparse" in get_completion_script(prog_name="bisparse", complete_var="_BISPARSE_COMPLETE", shell=shell)
    assert "--show-completion" in run("--help")[1]
