"""Make the virtual environment that `make` works in. Needs Python 3.11 with its venv module, and nothing else.

torch comes first and is then pinned by a constraints file, so that no other package can replace it:

* a torch >= 2.11 that the Python outside already has is used as it is;
* otherwise, with an NVIDIA GPU, the newest torch; without one, a CPU build, so that no CUDA package is downloaded.

An environment whose set-up was interrupted is made again from nothing; a finished one is only brought up to date.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
CPU_BUILD = "torch==2.13.0+cpu"
INSTALL = ("install", "--no-compile")
"""pip compiles modules on one core, which takes a minute of its time here; `compileall` does it on all of them."""

NO_CPU_TORCH = f"""
This machine has no NVIDIA GPU, and pip finds no CPU build of torch here ({CPU_BUILD}). The default torch on Linux brings
gigabytes of CUDA packages, so the set-up stops instead of taking it. Do one of these and run make again:
  * name an index of CPU wheels (the install page of PyTorch shows its address for "CPU"):
        make TORCH_INDEX=<address> demo
  * install torch >= {".".join(map(str, OLDEST_TORCH))} into {sys.executable} in your own way:
    the set-up uses the torch it finds."""


def run(*command: str | Path, check: bool = True, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command with its output on the screen, or captured if quiet."""
    return subprocess.run([str(part) for part in command], check=check, text=True, capture_output=quiet)


def has_gpu() -> bool:
    """Whether the NVIDIA driver answers."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and run(smi, "-L", check=False, quiet=True).returncode == 0


def torch_of(python: str | Path) -> tuple[str, bool] | None:
    """The version of a Python's torch and whether it was built for CUDA; None without one or with one that is too old."""
    found = run(python, "-c", "import torch; print(torch.__version__, torch.version.cuda is not None)", check=False, quiet=True)
    if found.returncode:
        return None
    version, cuda = found.stdout.split()
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None or tuple(map(int, number.groups())) < OLDEST_TORCH:
        return None
    return version, cuda == "True"


def make_environment(folder: Path, share_torch: bool) -> None:
    """An empty environment, which sees the packages outside if their torch is to be used."""
    shutil.rmtree(folder, ignore_errors=True)
    made = run(sys.executable, "-m", "venv", *(["--system-site-packages"] if share_torch else []), folder, check=False)
    if made.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit(f"{sys.executable} cannot make a virtual environment: install its venv module (on Debian a package of its own).")


def install_torch(pip: list[str | Path], gpu: bool, index: str) -> None:
    """torch alone, without what it depends on: that comes under the constraints."""
    if index:
        wanted = ["--index-url", index, f"torch>={'.'.join(map(str, OLDEST_TORCH))}"]
    elif gpu or sys.platform != "linux":
        wanted = ["torch"]
    else:
        wanted = [CPU_BUILD]
    if run(*pip, *INSTALL, "--no-deps", *wanted, check=False).returncode:
        sys.exit(NO_CPU_TORCH if wanted == [CPU_BUILD] else "pip could not install torch; its message is above.")


def needs_cuda_packages(python: Path) -> bool:
    """Whether the environment's torch would pull CUDA packages as its dependencies."""
    script = "import importlib.metadata as m; print(*(m.requires('torch') or []), sep='\\n')"
    return re.search(r"^(nvidia|cuda)", run(python, "-c", script, quiet=True).stdout, re.MULTILINE) is not None


def main() -> None:
    """Set up the environment named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / ".venv")
    parser.add_argument("--torch-index", default="", help="address of an index of torch wheels")
    parser.add_argument("--with", dest="extra", action="append", default=[], metavar="REQUIREMENT", help="install this too")
    arguments = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(f"bisparse needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. Try make PYTHON=python3.12")

    folder = arguments.folder.absolute()
    python = folder / "bin" / "python"
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "-qq"]
    unfinished = folder / "unfinished"
    gpu = has_gpu()

    usable = not unfinished.exists() and python.exists() and not run(*pip, "--version", check=False, quiet=True).returncode
    if not usable:
        outside = torch_of(getattr(sys, "_base_executable", sys.executable))
        share = outside is not None and (outside[1] or not gpu)
        print(f"Making {folder}" + (f", with the torch {outside[0]} found outside" if share and outside else ""), flush=True)
        make_environment(folder, share)
    unfinished.touch()

    torch = torch_of(python)
    if torch is None:
        print("Installing torch: " + ("with CUDA" if gpu else "a CPU build"), flush=True)
        install_torch(pip, gpu, arguments.torch_index)
        if not gpu and needs_cuda_packages(python):
            sys.exit("The torch that was found needs CUDA packages." + NO_CPU_TORCH)
    version = run(python, "-c", "import importlib.metadata as m; print(m.version('torch'))", quiet=True).stdout.strip()
    constraints = folder / "constraints.txt"
    constraints.write_text(f"torch=={version}\n")

    print("Installing bisparse and everything its tests and demo need: one to three minutes the first time", flush=True)
    os.chdir(ROOT)
    run(*pip, *INSTALL, "--constraint", constraints, "--editable", ".[dev]", *arguments.extra)
    run(python, "-m", "compileall", "-qq", "-j", "0", folder, check=False, quiet=True)  # some files are no Python of this version
    run(python, "-c", "import torch, bisparse")
    unfinished.unlink()
    print(f"Ready: {folder}, torch {version}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as failure:
        command = " ".join(map(str, failure.cmd))
        sys.exit(f"The set-up stopped: {command} failed. Run make again to start it anew.\n{failure.stderr or ''}")
