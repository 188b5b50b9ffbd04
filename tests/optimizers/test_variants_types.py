"""The optional forms in every type, and copies and checkpoints of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import OWN, assert_same_bits
from marks import both_backends
from variants_by_hand import DEVICE, VARIANTS, Beside, beside, run_all

import fusedopt

each_variant = pytest.mark.parametrize("variant", VARIANTS)


# Types


TYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32-bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16-float32": (torch.bfloat16, torch.float32),
    "float64-float32": (torch.float64, torch.float32),
}


@pytest.mark.parametrize("types", TYPES)
@each_variant
@both_backends
def test_types(backend: str, variant: str, types: str) -> None:
    # Catches arithmetic in the stored type, a state rounded twice, and a velocity that is rounded
    # before it is used.
    stored, gradient_type = TYPES[types]
    run = beside(variant, backend=backend, dtype=stored, gradient_type=gradient_type, groups=1)
    run.step(1)
    run.check()
    run.step(2)
    run.check()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@each_variant
@both_backends
def test_complex(backend: str, variant: str, dtype: torch.dtype) -> None:
    # Catches moments of the complex number instead of its parts.
    run = beside(variant, backend=backend, dtype=dtype, groups=1)
    run.step(4)
    run.check()


@each_variant
@both_backends
def test_types_in_one_optimizer(backend: str, variant: str) -> None:
    # Catches a launch that takes one type's or one form's coefficients for another's.
    name, options = VARIANTS[variant]
    runs = [beside(variant, backend=backend, dtype=d, groups=1) for d in
            (torch.float32, torch.bfloat16, torch.float64)]  # fmt: skip
    params = [p for run in runs for p in run.params]
    together = getattr(fusedopt, name)(params, **options, backend=backend)
    for _ in range(3):
        for run in runs:
            gradients = run.gradients()
            run.give(gradients)
            run.loops_step(gradients)
            run.optimizer = together
        together.step()
    for run in runs:
        run.check()


# Checkpoints and copies


def _reloaded(run: Beside, **arguments: Any) -> Any:
    """An optimizer with default options over copies of the parameters, loaded from the run's."""
    name = type(run.optimizer).__name__
    groups = [{"params": [torch.nn.Parameter(p.detach().clone())]} for p in run.params]
    twin = getattr(fusedopt, name)(groups, **arguments)
    twin.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    return twin


def _deepcopied(run: Beside, **_: Any) -> Any:
    return copy.deepcopy(run.optimizer)


def _pickled(run: Beside, **_: Any) -> Any:
    return pickle.loads(pickle.dumps(run.optimizer))


@pytest.mark.parametrize("how", [_reloaded, _deepcopied, _pickled])
@each_variant
@both_backends
def test_a_copy_goes_on(backend: str, variant: str, how: Callable[..., Any]) -> None:
    # Catches an option that is not saved: the rest of the run would be of the default form.
    run = beside(variant, backend=backend)
    run.step(2)
    run.optimizer = how(run, backend=backend)
    for p in run.params:
        p.grad = None
    run.params = [group["params"][0] for group in run.optimizer.param_groups]
    run.step(2)
    run.check()


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@each_variant
def test_distributed_checkpoint_functions(variant: str, flat: bool) -> None:
    # Catches an option that does not survive as an entry of its own per parameter: a word, a None.
    from torch.distributed.checkpoint import state_dict as dcp

    name, hyper = VARIANTS[variant]
    settings = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = torch.nn.Linear(3, 4).to(DEVICE)
    first = getattr(fusedopt, name)(model.parameters(), **hyper, backend="reference")
    run_all([first], 3)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, first, options=settings))
    twin = copy.deepcopy(model)
    # Of the same form where it must be: the functions step a new optimizer before they load.
    second = getattr(fusedopt, name)(twin.parameters(), **hyper, backend="reference")
    dcp.set_optimizer_state_dict(twin, second, saved, options=settings)
    run_all([first, second], 3, first=3)
    assert_same_bits(list(twin.parameters()), list(model.parameters()))
    for key in OWN[name]:
        assert second.param_groups[0][key] == first.param_groups[0][key]
