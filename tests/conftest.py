"""Every test runs on one thread, offline, from a fixed seed, in an empty working directory."""

import atexit
import functools
import gc
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
if "PYTHONPATH" in os.environ:  # for processes that tests start, whose working directory is another
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(one) for one in os.environ["PYTHONPATH"].split(os.pathsep))

import pytest
from hypothesis import settings

settings.register_profile("fast", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("explore", max_examples=1000, deadline=None)  # pytest --hypothesis-profile=explore
settings.load_profile("fast")


ROOT = Path(__file__).parents[1]
IN_MEMORY = "/dev/shm"
"""Where temporary files go, if there is plenty of it: waiting for a disk takes up to a third of the time."""
if (
    "TMPDIR" not in os.environ  # the workers have it from the process that starts them
    and os.access(IN_MEMORY, os.W_OK)
    and shutil.disk_usage(IN_MEMORY).free > 4 * 2**30
    and not os.statvfs(IN_MEMORY).f_flag & os.ST_NOEXEC
):
    tempfile.tempdir = os.environ["TMPDIR"] = OWN_FOLDER = tempfile.mkdtemp(prefix="bisparse-tests-", dir=IN_MEMORY)
    os.chmod(OWN_FOLDER, 0o755)  # some tests become another user
else:
    OWN_FOLDER = None


@pytest.fixture(scope="session")
def _working_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """New empty folders; `mktemp` also replaces a link to the latest one, which waits for the disk before every test."""
    parent = tmp_path_factory.mktemp("working")
    return (parent / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _elsewhere(request: pytest.FixtureRequest, _working_folders: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, such as bad values that a test passes as one, are no paths in the repository."""
    if not request.path.is_relative_to(ROOT / "tests" / "repo"):
        folder = next(_working_folders)
        folder.mkdir()
        monkeypatch.chdir(folder)


@pytest.fixture(autouse=True, scope="session")
def _commands_built_once() -> Iterator[None]:
    """typer's runner builds every command again for each one that it runs, which takes longer than many of them."""
    import typer.main

    with mock.patch("typer.testing._get_command", functools.cache(typer.main.get_command)):
        yield


@pytest.fixture(scope="session")
def operators_listed_once() -> Iterator[None]:
    """torch's ONNX exporter makes the list of all operators that it knows for each export, which takes longer than the export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib))):
        yield


@pytest.fixture(autouse=True, scope="session")
def _nothing_new_in_the_repository() -> Iterator[None]:
    before = {path for folder in (ROOT, ROOT / "tests") for path in folder.iterdir()}
    yield
    after = {path for folder in (ROOT, ROOT / "tests") for path in folder.iterdir()}
    new = sorted(path.name for path in after - before if not path.name.startswith((".", "__pycache__")))
    assert not new, f"tests wrote {new} into the repository"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    import torch

    torch.manual_seed(0)
    if "torch._dynamo.convert_frame" in sys.modules:  # what an earlier test compiled must not count against this one's limit
        torch._dynamo.reset()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """What collecting the tests imports stays until the end; the garbage collector would search all of it again and again.

    Torch is imported here and not above: the process that only starts others, which wait for it, has no use for it.
    """
    if session.config.getoption("dist", "no") != "no":
        return (yield)
    gc.disable()
    import torch

    torch.set_num_threads(1)
    if not torch.accelerator.is_available():  # seeds for devices that are not there cost a stack trace each
        for device in (torch.cuda, torch.mtia, torch.xpu):
            device.manual_seed_all = lambda seed: None
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        gc.set_threshold(2000, 10, 50)  # what tests import stays too, and all of it is searched in every 500th search
        atexit.register(gc.unfreeze)  # libraries that count their objects at the exit would report what is frozen


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Give the memory of temporary files back, unless a test failed and somebody may want to look at its files."""
    if OWN_FOLDER is not None and not getattr(config, "some_failed", False):
        # At the exit, after multiprocessing has removed its own folder in there, which it does at priority -100.
        Finalize(None, shutil.rmtree, args=[OWN_FOLDER], kwargs={"ignore_errors": True}, exitpriority=-200)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """What `pytest_unconfigure` asks."""
    session.config.some_failed = exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the GPU are skipped, with the reason, where there is none."""
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device; on a machine with one, `make test-gpu` runs this")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
