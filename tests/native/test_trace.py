"""What the C sources of libfusedopt are made of, without a compiler."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import checkout  # noqa: F401  # native.generate is imported from it
import pytest

from fusedopt.kernels.codecs import format
from native.generate import images, sources
from native.generate.table import LIBRARY, codecs, rows
from native.generate.trace import Symbol, leaf, literal, statements

A, B = leaf("a"), leaf("b")


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (A + 1, "(a + 1.0)"),
        (1 - A, "(1.0 - a)"),
        (A - B - 2, "((a - b) - 2.0)"),
        (A - (B - 2), "(a - (b - 2.0))"),
        (2 / A, "(2.0 / a)"),
        (A / B, "(a / b)"),
        (-A * B, "((-a) * b)"),
        (A**0.5, "pow(a, 0.5)"),
        (0.9**A, "pow(0.9, a)"),
        (1.0 * (A > B), "(1.0 * (a > b))"),
        (True * A, "(1.0 * a)"),
    ],
)
def test_expressions(expression, text):
    assert statements([expression], ["x"]) == [f"x = {text};"]


def test_what_is_used_twice_is_computed_once():
    power = A**B
    assert statements([1 - power, (A**B) ** 0.5], ["x", "y"]) == [
        "const double t0 = pow(a, b);",
        "x = (1.0 - t0);",
        "y = pow(t0, 0.5);",
    ]


def test_a_result_that_another_needs_is_computed_once():
    total = A + B
    assert statements([total, total * A], ["x", "y"]) == [
        "const double t0 = (a + b);",
        "x = t0;",
        "y = (t0 * a);",
    ]


@pytest.mark.parametrize("number", [0.1, 1e-300, 5e-324, 1 / 3, -2.5, 10**15])
def test_constants_are_read_back_as_they_are(number):
    assert float(literal(number)) == number
    assert "." in literal(number) or "e" in literal(number)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_no_constant_is_not_finite(number):
    with pytest.raises(ValueError, match="constant"):
        literal(number)


def test_a_branch_on_a_number_is_an_error():
    with pytest.raises(TypeError, match="branched on a number"):
        if A > 0:
            pass


def test_a_step_count_that_is_not_in_the_struct_is_an_error():
    (adam,) = (entry for entry in LIBRARY if entry.name == "adam")
    without = type(adam)(**{**vars(adam), "counts_steps": False})
    with pytest.raises(ValueError, match="must count steps"):
        sources.coefficients(without, dict.fromkeys(adam.flags, False))


def test_each_kernel_is_listed_once():
    listed = list(rows("cuda:90"))
    names = [row.variant.name for row in listed]
    assert len(names) == len(set(names))
    keys = [
        (row.variant.kernel.__name__, row.rule, row.options, row.types, row.aligned)
        for row in listed
    ]
    assert len(keys) == len(set(keys))


PTX = """
.version 8.7
.target sm_90a
.visible .entry clip_factor(
\t.param .u64 .ptr .global .align 1 clip_factor_param_0,
\t.param .u32 clip_factor_param_1,
\t.param .align 8 .b8 clip_factor_param_2
)
"""


def test_parameters_of_a_kernel():
    assert images.entry_parameters(PTX, "clip_factor") == ["u64", "u32", "b8"]
    with pytest.raises(RuntimeError, match="no entry other"):
        images.entry_parameters(PTX, "other")


def _compiled(**changes):
    """A compiled load_scaler, as Triton describes it."""
    types = changes.pop("types", ["u64"] * 6)
    body = ",\n".join(f".param .{kind} p{i}" for i, kind in enumerate(types))
    metadata = {
        "name": "load_scaler", "num_ctas": 1, "num_warps": 1, "global_scratch_size": 0,
        "profile_scratch_size": 0, **changes,
    }  # fmt: skip
    return SimpleNamespace(
        asm={"ptx": f".entry {metadata['name']}({body})"}, metadata=SimpleNamespace(**metadata)
    )


SCALER = list(rows("cuda:90"))[-1]


@pytest.mark.parametrize("scratch", [0, 1, 2])
def test_scratch_addresses_are_counted(scratch):
    assert images._interface(SCALER, _compiled(types=["u64"] * (4 + scratch))) == (scratch, [])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"types": ["u64"] * 3}, "parameters"),
        ({"types": ["u64", "u32", "u64", "u64"]}, "parameters"),
        ({"types": ["u64"] * 7}, "parameters"),
        ({"types": ["u64"] * 4 + ["u32"]}, "parameters"),
        ({"global_scratch_size": 128}, "global_scratch_size is 128"),
        ({"profile_scratch_size": 1}, "profile_scratch_size is 1"),
        ({"num_warps": 4}, "4 warps"),
        ({"num_ctas": 2}, "clusters"),
        ({"name": "load_scaler_1"}, "symbol"),
    ],
)
def test_a_kernel_that_the_library_could_not_call_is_named(changes, words):
    _, wrong = images._interface(SCALER, _compiled(**changes))
    assert any(words in text for text in wrong), wrong


@pytest.mark.parametrize(
    ("machine", "version", "capability", "exact", "cuda"),
    [
        ("sm_80", "8.7", (8, 0), False, 12000),
        ("sm_90a", "8.7", (9, 0), True, 12000),
        ("sm_100a", "9.1", (10, 0), True, 13000),
        ("sm_121a", "9.0", (12, 1), True, 13000),
    ],
)
def test_where_code_runs(machine, version, capability, exact, cuda):
    image = images.Image("cuda", 0, b"", machine, version, 0, None, ())
    assert (image.capability, image.exact, image.cuda) == (capability, exact, cuda)


def test_symbols_are_not_compared_by_accident():
    """== makes an expression, so that a symbol in a dict or set would never be found."""
    assert isinstance(A == A, Symbol)
    with pytest.raises(TypeError):
        hash(A)


def test_the_codecs_that_there_are_not_are_named():
    # Catches a codec of the kernels' of which nobody has said whether the library has it, and one
    # that is said to be offered by no kernel.
    readme = (Path(__file__).resolve().parents[2] / "native/README.md").read_text(encoding="utf-8")
    limits = readme.partition("## Limits")[2].partition("##")[0]
    found = codecs()
    for kind, known in (("parameters", format.PARAMETERS), ("states", format.STATES)):
        own = found[kind]
        assert sorted(own["offered"] + own["not_offered"]) == sorted(known)
        for name in known:
            assert f"`{name}`" in limits, name
    kept = {
        (row.variant.constants["PARAMETER"], *row.variant.constants["STATES"])
        for row in rows("cuda:90")
        if "PARAMETER" in row.variant.constants
    }
    assert {own[0] for own in kept} == set(found["parameters"]["offered"])
    assert {name for own in kept for name in own[1:]} == set(found["states"]["offered"])


def test_no_state_or_companion_is_left_out_of_the_list():
    # Every name that the file of codecs has is in one of the two lists.
    names = {v for k, v in vars(format).items() if k.isupper() and isinstance(v, str)}
    assert names == {*format.PARAMETERS, *format.STATES}
