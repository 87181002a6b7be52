"""What every test shares: fresh seeds that a failure prints, NaN in fresh memory, gpu tests only where there is one."""

import os
import secrets
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS warns in the deterministic mode of `poisoned`
if (
    not torch.cuda.is_available()
    and find_spec("triton")
    and tuple(map(int, version("triton").split(".")[:2])) >= (3, 8)
):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported; older interpreters fail on new numpy
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # there is a process for every core already
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start: threads are part of a record's machine

unhurried = [HealthCheck.too_slow, HealthCheck.filter_too_much]  # an engine refuses many of the cases for all engines
settings.register_profile("default", deadline=None, max_examples=20, suppress_health_check=unhurried)
settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="repeat a run with the seed that its failure printed")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def seed(request):
    """A fresh seed, set in torch and printed when the test fails; `--seed N` repeats it."""
    number = request.config.getoption("--seed")
    number = secrets.randbelow(2**31) if number is None else number
    print(f"repeat with --seed {number}")
    torch.manual_seed(number)
    return number


@pytest.fixture
def poisoned():
    """Fresh buffers hold NaN or the largest integer, so that whoever reads before writing is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


if os.environ.get("TRITON_INTERPRET") == "1":
    from pisa import launch

    launch.PROGRAMS = 8  # the interpreter runs programs one after the other; how many there are changes no result
