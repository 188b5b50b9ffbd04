"""``python -m fusedopt info --model-parameters``: on paper, in memory, and in the machine code."""

from __future__ import annotations

import json

import pytest
import torch

import fusedopt
from fusedopt import __main__ as cli
from fusedopt.formats import footprint
from fusedopt.kernels import lang

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = ((256, 128), (1000,), (3, 150), (5, 7, 11), (1,), (4096,), (2, 64, 3))


def info(capsys, *arguments: str) -> dict:
    assert cli.main(["info", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "kept", "released", "moved"),
    [
        # Worked out by hand: parameter, gradient, master, two states and their scales of 4 / 128.
        ("--states int8 --master remainder8", 7.0625, 5.0625, 12.125),
        ("--states int8 --rounding stochastic", 6.0625, 4.0625, 10.125),
        ("--states fp8 --rounding kahan", 8.0625, 6.0625, 14.125),
        ("--master remainder", 10, 8, 18),
        ("--master float32 --states fp32", 16, 14, 30),
        ("--states exp_avg=bf16,exp_avg_sq=int8", 7.03125, 5.03125, 12.0625),
        ("--params fp32", 16, 12, 28),
        # An average of the weights: 8 bytes more are moved in float32, 4 in 16 bits.
        ("--params fp32 --average fp32", 20, 16, 36),
        ("--params fp32 --average bf16", 18, 14, 32),
        ("--states int8 --master remainder8 --average bf16", 9.0625, 7.0625, 16.125),
        ("--params fp32 --clip", 16, 12, 32),
        ("--gradient fp32 --states int8", 8.0625, 4.0625, 12.125),
        ("--optimizer sgd --option momentum=0.9 --states int8", 5.03125, 3.03125, 8.0625),
        ("--optimizer SGD", 4, 2, 6),
        ("--optimizer rmsprop --params fp32", 12, 8, 20),
        ("--option amsgrad=True --states exp_avg=int8", 9.03125, 7.03125, 16.0625),
        ("--params bfloat16 --states torch.float32", 12, 10, 22),
        ("--optimizer BatchDecoupledAdam --states int8", 10.0625, 8.0625, 14.125),
    ],
)
def test_bytes_of_a_parameter(capsys, arguments, kept, released, moved):
    found = info(capsys, "--model-parameters", "8e9", *arguments.split())
    assert found["total"]["kept_bytes"] == kept and found["total"]["moved_bytes"] == moved
    assert found["released"]["kept_bytes"] == released
    assert found["total"]["kept_gb"] == kept * 8
    # Clipping apart, gradients are read twice more and written once.
    theirs = found["torch_adamw_float32"]
    assert theirs["kept_bytes"] == 16
    assert theirs["moved_bytes"] == (40 if "--clip" in arguments else 28)
    assert theirs["moved_gb"] == 8 * theirs["moved_bytes"]
    assert sum(row["moved_bytes"] for row in found["tensors"]) == moved


def test_release_leaves_out_what_is_without(capsys):
    found = info(capsys, "--model-parameters", "1e6", "--release")
    assert "total" not in found and found["released"]["kept_bytes"] == 6


def test_the_table_has_the_figures(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    command = "info --model-parameters 8e9 --states int8 --master remainder8"
    assert cli.main(command.split()) == 0
    text = capsys.readouterr().out
    for figure in ("5.0625", "12.125", "40.5", "exp_avg_sq_scale", "224"):
        assert figure in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model-parameters 8e9 --master remainder9", "master must be one of"),
        ("--model-parameters 8e9 --params fp32 --master remainder8", "for parameters of"),
        ("--model-parameters 8e9 --master remainder --rounding kahan", "does not go with"),
        ("--model-parameters 8e9 --optimizer adagrad", "no optimizer 'adagrad'"),
        ("--model-parameters 8e9 --option momentum", "name=value"),
        ("--model-parameters 8e9 --option momentum=0.9", "momentum"),
        ("--model-parameters 0", "more than 0"),
        ("--model-parameters nan", "more than 0"),
        ("--shapes 4096x", "--shapes is like"),
        ("--shapes 4096,0", "--shapes is like"),
        ("--states int8", "--model-parameters or --shapes"),
        ("--model-parameters 8e9 --shapes 10x10", "leave one out"),
        ("--model-parameters 8e9 --option amsgrad=True --states int8", "too coarse"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, message):
    assert cli.main(["info", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


FORMATS = {
    "plain": {},
    "bf16 states": {"state_dtype": BF16},
    "fp32 states": {"state_dtype": FP32},
    "int8": {"state_dtype": "int8"},
    "fp8": {"state_dtype": "fp8"},
    "one of each": {"state_dtype": {"exp_avg": BF16, "exp_avg_sq": "int8"}},
    "stochastic": {"rounding": "stochastic"},
    "kahan": {"rounding": "kahan"},
    "remainder": {"master": "remainder"},
    "remainder8": {"master": "remainder8"},
    "float32": {"master": "float32"},
    "remainder8 + int8": {"master": "remainder8", "state_dtype": "int8"},
    "remainder8, stochastic + fp8": {
        "master": "remainder8", "rounding": "stochastic", "state_dtype": "fp8",
    },
}  # fmt: skip


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shapes", [SHAPES, ((7,),)], ids=["many", "one"])
def test_paper_is_memory(options, shapes):
    """Bytes of whole tensors are those of the tensors that a step has made."""
    params = [torch.nn.Parameter(torch.ones(shape, dtype=BF16)) for shape in shapes]
    optimizer = fusedopt.AdamW(params, backend="reference", **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    group = optimizer.param_groups[0]
    parts = footprint.of_tensors(optimizer.rule, group, BF16, BF16, shapes)
    found: dict[str, int] = {}
    for p in params:
        sizes = {"parameter": p.nbytes, "gradient": p.grad.nbytes}
        sizes |= {name: value.nbytes for name, value in optimizer.state[p].items()}
        for name, size in sizes.items():
            found[name] = found.get(name, 0) + size
    assert {part.name: part.resident for part in parts} == found
    dtypes = {name: value.dtype for name, value in optimizer.state[params[0]].items()}
    kept = {part.name: part.dtype for part in parts}
    assert {name: kept[name] for name in dtypes} == dtypes


@pytest.mark.skipif(lang.triton is None, reason="needs Triton")
def test_paper_is_what_kernels_are_compiled_for():
    """What a step moves on paper is the budget of the machine code, which codegen checks."""
    from fusedopt.formats import format_of
    from fusedopt.kernels.aot import formats, update
    from fusedopt.kernels.launch import TRITON_DTYPES
    from fusedopt.kernels.rules import ADAM

    compiled = {}
    group = ADAM.example_groups[0]
    for kept in formats.every():
        if kept.aligned and not kept.rowwise:
            variant = update.update_kept(ADAM, group, kept)
            constants = variant.constants
            key = constants["PARAMETER"], constants["STATES"], constants["DTYPES"]
            budget = variant.budget
            compiled[key] = (budget.bytes_per_element or 0.0) + sum(budget.narrow.values())
    names = set(FORMATS) - {"plain", "bf16 states"}  # in bfloat16, as torch keeps them
    for name in names:
        own = {**group, **FORMATS[name]}
        parts = footprint.of_element(ADAM, own, BF16, BF16)
        types = tuple(TRITON_DTYPES[part.dtype] for part in parts)
        format = format_of(ADAM, own).device
        key = format.parameter, format.states or ("cast", "cast"), types
        assert compiled.pop(key) == sum(part.moved for part in parts), name
