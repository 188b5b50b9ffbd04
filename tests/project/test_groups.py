"""Tests that share an expensive fixture run on one worker: each other would build it again."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _for_all() -> None:
    pass


@pytest.fixture(scope="module")
def shared() -> object:
    return object()


@pytest.fixture
def of_it(shared: object) -> object:
    return shared


def group(request: pytest.FixtureRequest) -> str | None:
    mark = request.node.get_closest_marker("xdist_group")
    return mark and mark.args[0]


def test_one_that_asks_for_it(shared: object, request: pytest.FixtureRequest) -> None:
    assert group(request) == __name__


@pytest.mark.parametrize("case", [1, 2])
def test_one_that_has_it_through_another(
    case: int, of_it: object, request: pytest.FixtureRequest
) -> None:
    assert group(request) == __name__


@pytest.mark.parametrize("case", [1, 2])
def test_one_without_is_free(case: int, tmp_path: object, request: pytest.FixtureRequest) -> None:
    # A fixture that all have, or one of pytest's own, would make one group of everything.
    assert group(request) is None


@pytest.mark.xdist_group("a group of its own")
def test_a_mark_stays(shared: object, request: pytest.FixtureRequest) -> None:
    assert group(request) == "a group of its own"


def test_groups_reach_the_scheduler(shared: object, request: pytest.FixtureRequest) -> None:
    # Catches a pytest under which pytest-xdist's groups do nothing. It tells them at the end of a
    # test's name, where it is told to mind them.
    minded = request.config.getoption("loadgroup", default=False)
    assert request.node.nodeid.endswith(f"@{__name__}") == bool(minded)
