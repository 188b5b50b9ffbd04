"""Shared set-up: the kernels run in Triton's interpreter, and fresh memory is poisoned."""

from __future__ import annotations

import os
import sys
from types import ModuleType

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


def pytest_configure(config: pytest.Config) -> None:
    """Let builds for a device warn of what others do not; what this package does stays an error."""
    if DEVICE != "cpu":
        # The last that matches holds.
        config.addinivalue_line("filterwarnings", "default")
        config.addinivalue_line("filterwarnings", r"error:::fusedopt(\..*)?$")


# Before pytest-xdist's own, which reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none, and on one those that use it for nothing.

    Those that share a fixture of their module are put on one worker, which builds it once.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None and shares_fixture(item):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
        # Not its keywords, among which are names of folders: a checkout may be in one called gpu.
        is_marked = item.get_closest_marker("gpu") is not None
        if is_marked and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if DEVICE != "cpu" and not is_marked and not uses_device(item):
            item.add_marker(pytest.mark.skip(reason="has nothing on the device"))


def shares_fixture(item: pytest.Item) -> bool:
    """Whether a test asks for a fixture of its module's scope, by itself or through another.

    One that is there for all tests of a file (autouse) is no such: those are cheap.
    """
    fixtures = getattr(item, "_fixtureinfo", None)
    if fixtures is None:
        return False
    left, seen = list(fixtures.argnames), set()
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for fixture in fixtures.name2fixturedefs.get(name, ()):
            # Those of plugins have no place.
            if fixture.baseid and fixture.scope in ("module", "session"):
                return True
            left += fixture.argnames
    return False


def uses_device(item: pytest.Item) -> bool:
    """Whether a test puts tensors on the device of this run, by itself or by a helper."""
    if "device" in getattr(item, "fixturenames", ()):
        return True
    module = getattr(item, "module", None)
    values = list(vars(module).values())
    homes = {getattr(value, "__module__", None) for value in values}
    homes |= {value.__name__ for value in values if isinstance(value, ModuleType)}
    named = [module, *(sys.modules.get(str(home)) for home in homes - {module.__name__})]
    # Of this folder: what they call so is the device of the run.
    return any(
        isinstance(getattr(one, "DEVICE", None), torch.device) for one in named if one is not None
    )
