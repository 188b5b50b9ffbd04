"""What constructors take by ``**common``: shown in the signature, checked in the class's name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import fusedopt

PLAIN = ("SGD", "RMSprop", "Adam", "AdamW")
DECOUPLED = ("BatchDecoupledAdam", "BatchDecoupledRMSprop")
each_class = pytest.mark.parametrize("name", (*PLAIN, *DECOUPLED))


def _params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2))]


def _needed(name: str) -> dict[str, Any]:
    return {"statistics": fusedopt.MicroBatchSquares()} if name in DECOUPLED else {}


@each_class
def test_the_signature_shows_all_that_is_taken(name: str) -> None:
    # Catches a keyword that is shown and not taken, or taken and not shown.
    cls = getattr(fusedopt, name)
    shown = inspect.signature(cls).parameters
    assert {"backend", "clip", "capturable"} <= set(shown) and "defaults" not in shown
    assert ("statistics" in shown) is (name in DECOUPLED)
    kinds = [p.kind for p in shown.values()]
    assert kinds == sorted(kinds) and inspect.Parameter.VAR_KEYWORD not in kinds
    by_name = {p.name: p.default for p in shown.values() if p.kind is p.KEYWORD_ONLY}
    optimizer = cls(_params(), **{**by_name, **_needed(name)})
    assert optimizer.defaults == cls(_params(), **_needed(name)).defaults


def test_inherited_keywords_are_shown_but_what_the_class_decides() -> None:
    adamw = inspect.signature(fusedopt.AdamW).parameters
    assert "bias_correction" in adamw and "decoupled_weight_decay" not in adamw
    assert {"foreach", "maximize"} <= set(inspect.signature(fusedopt.BatchDecoupledAdam).parameters)
    ours = inspect.signature(fusedopt.BatchDecoupledRMSprop).parameters
    assert {"foreach", "maximize", "denominator"} <= set(ours)


def test_the_signature_of_a_users_subclass_is_its_own() -> None:
    # Catches a signature that is kept on the class, where subclasses find it.
    class Mine(fusedopt.AdamW):
        def __init__(self, params: Any, speed: float) -> None:
            super().__init__(params, lr=speed)

    assert list(inspect.signature(Mine).parameters) == ["params", "speed"]
    assert Mine(_params(), 0.5).param_groups[0]["lr"] == 0.5


@each_class
def test_the_docstring_names_the_common_arguments(name: str) -> None:
    text = inspect.getdoc(getattr(fusedopt, name)) or ""
    assert "``backend``" in text and "``clip``" in text


@each_class
def test_a_typo_is_reported_in_the_name_of_the_class(name: str) -> None:
    # Catches the name of a base class, of which the caller has not heard.
    statistics = _needed(name)
    with pytest.raises(TypeError) as error:
        getattr(fusedopt, name)(_params(), learning_rate=0.1, **statistics)
    assert str(error.value) == f"{name}() got an unexpected keyword argument 'learning_rate'"


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "BatchDecoupledAdam"])
def test_foreach_with_fused_is_torchs_error(name: str) -> None:
    # Catches code that runs here and not with torch's class.
    flags = {"foreach": True, "fused": True}
    messages = []
    for module in (fusedopt, torch.optim):
        cls = getattr(module, "AdamW" if name in DECOUPLED and module is torch.optim else name)
        more = _needed(name) if module is fusedopt else {}
        with pytest.raises(RuntimeError) as error:
            cls(_params(), **flags, **more)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_constructor_that_fails_leaves_the_statistics_alone() -> None:
    statistics = fusedopt.MicroBatchSquares()
    with pytest.raises(RuntimeError, match="fused"):
        fusedopt.BatchDecoupledAdam(_params(), statistics=statistics, foreach=True, fused=True)
    fusedopt.BatchDecoupledAdam(_params(), statistics=statistics)


def test_the_checkpoints_clipping_and_form_win() -> None:
    # What the README says of them; catches either going the other way.
    bound = fusedopt.GlobalNorm(1.0)
    clipping = fusedopt.SGD(_params(), momentum=0.9, momentum_form="ema", clip=bound)
    plain = fusedopt.SGD(_params(), momentum=0.9, momentum_form="velocity")
    plain.load_state_dict(clipping.state_dict())
    assert plain.clip is not None and plain.clip.max_norm == 1.0
    assert plain.param_groups[0]["momentum_form"] == "ema"
    clipping.load_state_dict(fusedopt.SGD(_params(), momentum=0.9).state_dict())
    assert clipping.clip is None and clipping.param_groups[0]["momentum_form"] == "torch"


def test_torchs_sgd_takes_another_forms_buffers_without_complaint() -> None:
    # Should torch ever complain, the README's warning is out of date.
    (p,) = params = _params()
    ours = fusedopt.SGD(params, momentum=0.9, momentum_form="ema", backend="reference")
    p.grad = torch.ones(2)
    ours.step()
    theirs = torch.optim.SGD(_params(), momentum=0.9)
    theirs.load_state_dict(ours.state_dict())
    (state,) = theirs.state.values()
    assert torch.allclose(state["momentum_buffer"], torch.full((2,), 0.1))
