"""Shared set-up: the kernels run in Triton's interpreter, and fresh memory is poisoned."""

from __future__ import annotations

import os

# Before anything imports Triton: the decorator decides by it. On a machine with a GPU,
# FUSEDOPT_TEST_DEVICE=cuda runs the same tests on compiled kernels.
DEVICE = os.environ.get("FUSEDOPT_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from fusedopt.examples.signum import SIGNUM  # noqa: E402
from fusedopt.kernels.rules import register  # noqa: E402

# A rule from outside the package: whatever runs over the registry must take it as it is.
register(SIGNUM)

# Tolerances are those of float32, on a GPU too.
torch.backends.cudnn.allow_tf32 = False

# Two test processes share two cores: more threads would wait for each other.
torch.set_num_threads(1)


@pytest.fixture
def device() -> torch.device:
    """The device that parameters live on in this run."""
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised memory with nan (or the largest integer), so that reading it shows."""

    def poisoned(function):
        def allocate(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.device.type == "meta" or tensor.layout != torch.strided:
                return tensor
            with torch.no_grad():
                if tensor.is_floating_point() or tensor.is_complex():
                    tensor.fill_(float("nan"))
                elif tensor.dtype in (torch.int16, torch.int32, torch.int64):
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return allocate

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        # Not its keywords, among which are names of folders: a checkout may be in one called gpu.
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
