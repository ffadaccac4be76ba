"""Build the sdist and the wheel, check them, and install the wheel in an empty environment.

    python tools/check_release.py [--torch REQUIREMENT] [--torch-index ADDRESS] [--folder out/release]

The wheel is built from the sdist, so that a file that the sdist lacks is found. `twine check --strict` reads the metadata. In an
environment with nothing but torch, the wheel and its dependencies, the version is printed, a matrix is pruned, and the command
line says what it needs; with the extra `cli` it prunes a checkpoint and verifies it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from set_up import CPU_BUILD, ROOT

USED = """
import importlib.metadata, torch, bisparse
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
report = bisparse.prune_(model, "2:4-T")
assert len(report) == 2 and bisparse.verify(model, "2:4-T")
bisparse.save(model, "pruned", report=report)
torch.save({name: torch.randn(64, 64) for name in ("a.weight", "b.weight")}, "dense.pt")
print("bisparse", importlib.metadata.version("bisparse"), "from", bisparse.__file__)
"""


def run(*command: str | Path, cwd: Path | None = None, code: int = 0) -> str:
    """The output of a command; ends the program if its exit code is not `code`."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != code:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}, not {code}:\n{done.stdout}")
    return done.stdout.strip()


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist and the wheel that is built from it, checked by twine."""
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    print(run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel))
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """Every module is in both, with the licence and the marker of types; the wheel has nothing else."""
    package = ROOT / "src"
    meant = {one.relative_to(package).as_posix() for one in package.rglob("*") if one.suffix in (".py", ".typed")}
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    if lacking := sorted(meant - held):
        sys.exit(f"{wheel.name} lacks {', '.join(lacking[:5])}")
    if others := sorted(one for one in held if not one.startswith("bisparse")):
        sys.exit(f"{wheel.name} has files that are not bisparse's: {', '.join(others[:5])}")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    if lacking := sorted(({f"src/{one}" for one in meant} | {"LICENSE", "README.md", "pyproject.toml"}) - held):
        sys.exit(f"{sdist.name} lacks {', '.join(lacking[:5])}")
    for one in (sdist, wheel):
        print(f"{one.name}: {one.stat().st_size / 1e6:.2f} MB")


def check_installed(wheel: Path, torch: str, index: str) -> None:
    """Install the wheel in an empty environment, and use it from another folder."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        venv.create(place / "venv", with_pip=True)
        python = place / "venv" / "bin" / "python"
        pip = (python, "-m", "pip", "--disable-pip-version-check", "-q", "install")
        run(*pip, *(["--extra-index-url", index] if index else []), torch)
        run(*pip, wheel)
        print(run(python, "-c", USED, cwd=place))
        said = run(python, "-m", "bisparse", "--version", cwd=place, code=2)
        if "typer" not in said:
            sys.exit(f"without the extra cli, the command line does not say what it needs:\n{said}")
        run(*pip, f"{wheel}[cli]")
        command = place / "venv" / "bin" / "bisparse"
        print(run(command, "--version", cwd=place))
        run(command, "prune", "dense.pt", "out", "-p", "2:4", cwd=place)
        run(command, "verify", "out", cwd=place)
        run(python, "-m", "pip", "check", cwd=place)


def main() -> None:
    """Build, check and install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default=CPU_BUILD, help="what pip installs before the wheel")
    parser.add_argument("--torch-index", default="", help="address of an index of torch wheels")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "release")
    options = parser.parse_args()
    sdist, wheel = build(options.folder)
    check_contents(sdist, wheel)
    check_installed(wheel, options.torch, options.torch_index)
    print("The release installs and runs.")


if __name__ == "__main__":
    main()
