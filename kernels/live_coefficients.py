"""The coefficients of a step whose numbers live on the device: one launch for all parameters.

Counts of steps are advanced, and the rows that the update kernel reads are formed of them, all in
float64. Every operation is rounded by itself, as PyTorch's are, so that rows agree with those to
the bit but for powers, which each library rounds in its own way, within two units in the last
place of float64.
"""

from __future__ import annotations

from .formula import Formula
from .lang import jit, power, tl

BLOCK = 128
THREADS = 128


@jit(do_not_specialize=["count", "width"])
def live_coefficients(
    table,  # int64 [3, count]: row of the coefficients, address of the count, row of ``inputs``
    count,  # int32
    inputs,  # float64 [groups, width]: inputs of the formula, then its constants
    width,  # int32
    stages,  # float64 [rows]: what a rule reads for the step that counts none
    control,  # float64 [2]: the second, whether the step is skipped
    values,  # float64 [rows, STRIDE], written
    OPERATIONS: tl.constexpr,  # of the formula, as the next four: see ``formula.py``
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    RESULTS: tl.constexpr,
    N_VALUES: tl.constexpr,  # its inputs and constants
    STRIDE: tl.constexpr,
    COUNT_TYPE: tl.constexpr,  # of the counts, or None where there are none
    COUNTS_STEPS: tl.constexpr,  # whether the rule reads them
    WITH_STEP: tl.constexpr,  # whether the last column is the count
    BLOCK: tl.constexpr,
):
    """Advance the count of each parameter, and write its coefficients."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    some = lanes < count
    # What is beyond the last does as the last, and writes nothing.
    lanes = tl.minimum(lanes, count - 1)
    row = tl.load(table + lanes)
    step = tl.load(stages + row)
    counted = step
    if COUNT_TYPE is not None:
        place = tl.load(table + count + lanes).to(tl.pointer_type(COUNT_TYPE))
        skipped = tl.load(control + 1) != 0
        number = tl.load(place)
        number = tl.where(skipped, number, number + 1.0)
        tl.store(place, number, some)
        counted = number.to(tl.float64)
        if COUNTS_STEPS:
            # Of a step that is skipped nobody reads the numbers, and its count may be 0.
            step = tl.where(skipped, 1.0, counted)
        if WITH_STEP:
            tl.store(values + row * STRIDE + (STRIDE - 1), counted, some)
    own = inputs + tl.load(table + 2 * count + lanes) * width
    found = (step, counted)
    for i in tl.static_range(N_VALUES):
        found = found + (tl.load(own + i),)
    for i in tl.static_range(len(OPERATIONS)):
        found = found + (_operation(found[LEFT[i]], found[RIGHT[i]], OPERATIONS[i]),)
    for i in tl.static_range(len(RESULTS)):
        tl.store(values + row * STRIDE + i, found[RESULTS[i]], some)


@jit
def _operation(a, b, NAME: tl.constexpr):
    if NAME == "add":
        return a + b
    elif NAME == "sub":
        return a - b
    elif NAME == "mul":
        return a * b
    elif NAME == "div":
        return a / b
    elif NAME == "pow":
        return power(a, b)
    else:
        return tl.where(a > b, 1.0, 0.0).to(tl.float64)


# Below the kernels, whose lines are a part of their keys in Triton's cache.


def live_coefficients_constants(
    formula: Formula, stride: int, count_type, counts_steps: bool, with_step: bool
) -> dict[str, object]:
    """State what ``live_coefficients`` is compiled for: whoever launches or compiles it asks here.

    Args:
        formula: of the coefficients.
        stride: columns of the coefficients.
        count_type: Triton's type of the counts, or None where there are none.
        counts_steps: whether the rule reads them.
        with_step: whether the last column of the coefficients is the count.
    """
    return {
        "OPERATIONS": formula.operations,
        "LEFT": formula.left,
        "RIGHT": formula.right,
        "RESULTS": formula.results,
        "N_VALUES": formula.n_inputs + len(formula.constants),
        "STRIDE": stride,
        "COUNT_TYPE": count_type,
        "COUNTS_STEPS": counts_steps,
        "WITH_STEP": with_step,
        "BLOCK": BLOCK,
    }
