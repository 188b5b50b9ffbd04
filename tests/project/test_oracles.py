"""What the other tests lean on: the source oracle and the comparison in ulps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import ForeignName, source_of
from tolerances import (
    STEP,
    Tolerance,
    assert_close_ulps,
    assert_equal,
    assert_travelled_alike,
    assert_untouched,
    distance,
    ulp,
)

from fusedopt.kernels.lang import jit, sqrt, tl

GLOBAL = 2.0


def _honest(p, inputs, states, coefficients, OPTIONS):
    return p - coefficients[0] * inputs[0] / sqrt(inputs[0] * inputs[0]), states


def _reads_global(p, inputs, states, coefficients, OPTIONS):
    return p - GLOBAL * inputs[0], states


def _reads_global_in_dead_code(p, inputs, states, coefficients, OPTIONS):
    if OPTIONS[0]:
        p = p - GLOBAL
    return p, states


def _asks_where_it_is(p, inputs, states, coefficients, OPTIONS):
    return p * tl.program_id(0), states


def _reads_memory(p, inputs, states, coefficients, OPTIONS):
    return tl.load(inputs[0]), states


def _casts(p, inputs, states, coefficients, OPTIONS):
    return p.to(inputs[0].dtype), states


def _calls_python(p, inputs, states, coefficients, OPTIONS):
    return max(p, inputs[0]), states


def test_source_oracle_runs_an_elementwise_function() -> None:
    one = torch.ones(1, dtype=torch.float64)
    p, states = source_of(jit(_honest))(3 * one, (-2 * one,), (), (0.5 * one,), (False,))
    assert p.item() == 3.5
    assert states == ()


@pytest.mark.parametrize(
    "function",
    [
        _reads_global, _reads_global_in_dead_code, _asks_where_it_is, _reads_memory, _casts,
        _calls_python,
    ],
)  # fmt: skip
def test_source_oracle_refuses_all_but_arguments(function: Callable[..., Any]) -> None:
    # Catches an oracle that lends a rule what the rule must not have.
    with pytest.raises(ForeignName):
        source_of(jit(function))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ulp_is_the_distance_to_the_next_value(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 1.5, 2.0, 3.999, 1e-3, 300.0, 2.0**-14], dtype=dtype)
    above = torch.nextafter(values, torch.tensor(torch.inf, dtype=dtype))
    gap = above.double() - values.double()
    assert torch.equal(ulp(values.double(), dtype), gap)
    # Below the normal range the spacing stays the same.
    tiny = torch.finfo(dtype).tiny
    small = torch.tensor([0.0, tiny / 8, tiny], dtype=torch.float64)
    assert ulp(small, dtype).unique().tolist() == [tiny * torch.finfo(dtype).eps]


def test_distance_of_what_is_not_finite() -> None:
    inf, nan = torch.inf, torch.nan
    a = torch.tensor([inf, -inf, nan, inf, nan, 1.0, inf])
    b = torch.tensor([inf, -inf, nan, -inf, 1.0, nan, 1.0])
    expected = [0.0, 0.0, 0.0, inf, inf, inf, inf]
    assert distance(a, b, torch.ones(7, dtype=torch.float64)).tolist() == expected


def test_comparison_fails_where_it_must() -> None:
    one, two = torch.ones(4), torch.full((4,), 2.0)
    off = two.clone()
    off[3] += 5 * torch.finfo(torch.float32).eps * 2
    assert_close_ulps(off, two, one, Tolerance(5, ""), "p")
    with pytest.raises(AssertionError, match=r"p\[3\]: .*5 ulps.*1 of 4"):
        assert_close_ulps(off, two, one, STEP[torch.float32], "p")
    with pytest.raises(AssertionError, match="leaving it unchanged would pass for 100%"):
        assert_close_ulps(two, two, two, STEP[torch.float32], "p")
    with pytest.raises(AssertionError, match="torch.float64 instead of torch.float32"):
        assert_close_ulps(two.double(), two, one, STEP[torch.float32], "p")
    with pytest.raises(AssertionError, match="leaving it unchanged"):
        assert_equal(two, two, two, "p")
    with pytest.raises(AssertionError, match="1 of 1 elements changed"):
        assert_untouched(torch.tensor([0.0]), torch.tensor([-0.0]), "hole")


def test_cancellation_is_measured_at_the_size_of_what_cancelled() -> None:
    # 1 - (1 - 2^-20), where the subtrahend carries a rounding error of one ulp of its own.
    before, expected = torch.tensor([1.0]), torch.tensor([2.0**-20])
    actual = expected + 2.0**-24
    assert_close_ulps(actual, expected, before, STEP[torch.float32], "p")
    with pytest.raises(AssertionError):
        assert_close_ulps(actual, expected, torch.zeros(1), STEP[torch.float32], "p")


def test_share_of_the_way() -> None:
    start = torch.zeros(3, dtype=torch.bfloat16)
    end = torch.ones(3, dtype=torch.bfloat16)
    assert_travelled_alike(end * 1.06, end, start, "p")
    for other in (start, end * 1.2):
        with pytest.raises(AssertionError, match="of the way apart"):
            assert_travelled_alike(other, end, start, "p")
