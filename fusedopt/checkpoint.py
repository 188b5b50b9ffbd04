"""What a checkpoint of an optimizer holds, and whether it fits: looked at before it is loaded.

torch's checkpoints hold torch's options, and distributed checkpoint demands every entry of the
loading optimizer's from the file. Options of fusedopt alone are therefore saved aside: under their
name stands an empty ``OrderedDict`` that carries the value as an attribute. ``torch.save`` (also
for ``weights_only=True``), pickle and ``copy.deepcopy`` keep it; distributed checkpoint, which
flattens containers, finds nothing to write, and asks for nothing. What it leaves out stays what the
constructor was given, on every rank alike.

An option that decides what the states mean must not be left out. ``claim`` makes distributed
checkpoint ask for it, and keeps it from finding what torch's optimizer would ask for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .clipping import GlobalNorm
from .completion import FORMAT, TORCHS, is_creating
from .formats import GroupFormat, check_parameters, format_of, keeps_state
from .formats.convert import COMPANIONS, companion_problem, decoded, fit, is_compressed
from .formats.group import SCALE
from .formats.saved import PLAIN, name_of, restored, shown
from .formats.tensors import problem
from .memory.device import is_capturing
from .memory.storage import local_tensors
from .step.checks import describe, placement_problem
from .step.options import check_numbers
from .step.request import gather_params
from .step.states import create_states

Group = dict[str, Any]
# Neither is absent: None is a value of some options.
_ABSENT = object()
# How apex and deepspeed spell ``bias_correction``.
_SWITCH = {True: "adam", False: None}
_CLAIM = "form"


class IncompleteState(KeyError, ValueError):
    """A state that is partly there, or another algorithm's.

    torch's optimizers raise KeyError for it at the step, and ValueError for what does not fit at
    ``load_state_dict``: code that expects either catches this.
    """

    def __str__(self) -> str:
        # A KeyError alone shows its text in quotes.
        return str(self.args[0])


def put_aside(group: Group, names: Iterable[str]) -> None:
    """Replace options of a saved group, in place, by empty containers that carry them."""
    for name in names:
        # What is put aside for one reason is not to be again for another.
        if name in group and not _is_carrier(group[name]):
            group[name] = _carrier(group[name])


def _carrier(value: Any) -> OrderedDict[str, Any]:
    carrier: OrderedDict[str, Any] = OrderedDict()
    carrier.value = value  # type: ignore[attr-defined]
    return carrier


def _is_carrier(value: Any) -> bool:
    return isinstance(value, OrderedDict) and hasattr(value, "value")


def _carried(value: Any) -> Any:
    """Return what was saved, plainly or aside, or ``_ABSENT`` where distributed checkpoint was."""
    if isinstance(value, Mapping):
        if not value:
            return getattr(value, "value", _ABSENT)
        if value.keys() == {_CLAIM}:
            return value[_CLAIM]
    return value


def claim(group: Group, name: str) -> None:
    """Make a saved group one for optimizers with this option alone, in place.

    Distributed checkpoint then refuses a file without the option, and refuses this group's file for
    an optimizer that has torch's entries: either way a key is missing.
    """
    group[name] = {_CLAIM: _carried(group[name])}
    put_aside(group, [TORCHS])


def show_formats(optimizer: Any, saved: dict[str, Any]) -> None:
    """Put states into the form in which they are saved, and name the format of each group.

    A format that is not torch's is claimed: a file of another one lacks its name, and what is read
    into an optimizer that has torch's lacks an entry of torch's.

    Args:
        optimizer: whose states.
        saved: what torch's ``state_dict()`` returned, which is changed.

    Raises:
        ValueError: for codes without scales; the message names the parameter.
    """
    rule = optimizer.rule
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        format = format_of(rule, own)
        for key, p in zip(group["params"], own["params"], strict=True):
            state = optimizer.state.get(p)
            if state and not (format.is_plain and not is_compressed(state)):
                # Options may have changed since the last step.
                state = dict(state)
                _fit(optimizer, p, state, format)
                saved["state"][key] = shown(p, state, rule)
        name = name_of(format, own["params"])
        if name != PLAIN:
            group[FORMAT] = {name: 1}
            put_aside(group, [TORCHS])


def _fit(optimizer: Any, p: Tensor, state: dict[str, Any], format: GroupFormat) -> None:
    try:
        fit(p, state, format, optimizer.rule)
    except ValueError as error:
        raise ValueError(f"{describe(optimizer, p)}: {error}") from None


def saved_form(group: Mapping[str, Any], name: str) -> Any:
    """Return an option that decides what the states of a saved group mean; None where it is not.

    Raises:
        ValueError: for a group that was put together of two, as torch completes full state dicts by
            what the loading optimizer has.
    """
    value = group.get(name, _ABSENT)
    claimed = isinstance(value, Mapping) and bool(value)
    if claimed and not isinstance(group.get(TORCHS, {}), Mapping):
        raise ValueError(
            f"the checkpoint is one of an optimizer with another {name}, completed by this one's:"
            f" make this one with the {name} of the optimizer that saved it"
        )
    form = _carried(value)
    return None if form is _ABSENT else form


def unpacked(optimizer: Any, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Check a checkpoint, and return it in the form that torch loads.

    Args:
        optimizer: that is to load it.
        state_dict: what its own or torch's ``state_dict()`` returned; it is not changed.

    Returns:
        The state, and the arguments of the clip: None for no clip, ``...`` for nothing said.

    Raises:
        IncompleteState: for a state that is partly there, or another algorithm's.
        ValueError: for what has no meaning otherwise.
    """
    check_form(state_dict)
    groups = [dict(group) for group in state_dict["param_groups"]]
    clip: Any = ...
    for group in groups:
        group.pop(FORMAT, None)
        found = _carried(group.pop("clip", _ABSENT))
        # Clipping spans groups: a checkpoint holds one bound, written into each of them.
        clip = found if clip is ... and found is not _ABSENT else clip
    if clip is not ... and clip is not None:
        GlobalNorm(**clip)
    loaded = {**state_dict, "param_groups": groups}
    if _sizes(groups) == _sizes(optimizer.param_groups):
        # Otherwise torch's error says so.
        _complete(optimizer, groups)
        loaded["state"] = _with_steps(optimizer, groups, state_dict["state"])
        for own, saved in zip(optimizer.param_groups, groups, strict=True):
            _check_states(optimizer, own, saved, loaded["state"])
        loaded["state"] = _without_gaps(optimizer, loaded["state"])
    return loaded, clip


def kept_states(optimizer: Any, loaded: Mapping[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
    """Return the states of a checkpoint that are not to be cast, as their groups have them kept.

    Args:
        optimizer: that loads it.
        loaded: what ``unpacked`` returned.

    Returns:
        Parameters, each with what its state is to have.

    Raises:
        ValueError: for what cannot be kept so; the message names the parameter.
    """
    found = []
    for own, saved in zip(optimizer.param_groups, loaded["param_groups"], strict=False):
        group = {**own, **saved, "params": own["params"]}
        check_parameters(group)
        format = format_of(optimizer.rule, group)
        for key, p in zip(saved["params"], own["params"], strict=False):
            state = loaded["state"].get(key, {})
            if format.is_plain and not is_compressed(state):
                continue
            kept = {
                name: value.to(p.device)
                for name, value in state.items()
                if isinstance(value, Tensor) and name != "step"
            }
            for name, value in kept.items():
                wrong = placement_problem(p, name, value)
                if wrong is not None and name in _tensors_of(state, format):
                    raise ValueError(f"{describe(optimizer, p)}: {wrong}")
            restored(p, kept, optimizer.rule, format)
            # What is kept beside a parameter is the rest of it, which is yet to be loaded, perhaps.
            beside = {name: kept.pop(name) for name in COMPANIONS if name in kept}
            _fit(optimizer, p, kept, format)
            for name, value in (kept | beside).items():
                if name in beside:
                    wrong = companion_problem(p, name, value)
                else:
                    wrong = problem(p, name, value, format) if name in format.names else None
                if wrong is not None:
                    raise ValueError(
                        f"{describe(optimizer, p)}: its state {name!r} of the checkpoint {wrong}"
                    )
            kept |= beside
            found.append((p, kept))
    return found


def _tensors_of(state: Mapping[str, Any], format: GroupFormat) -> set[str]:
    """Return the keys of what is kept of a parameter: others are a user's own."""
    scales = {name for name in state if name.endswith(SCALE)}
    return {*format.names, *COMPANIONS, *scales}


def export_state_dict(optimizer: Any) -> dict[str, Any]:
    """Return the state as torch's optimizer of the same name keeps it, in float32.

    It loads into torch's optimizer, and into ours however that keeps its states. What compressed
    states lose has been lost before: decoding is exact. Of a parameter's master only the parameter
    itself is exported, with the model.

    Args:
        optimizer: one of fusedopt's.

    Returns:
        What ``state_dict()`` of torch's optimizer returns. Tensors are copies, on the same device.

    Raises:
        ValueError: for states that torch's optimizer has no name for, of another form of momentum.
    """
    rule = optimizer.rule
    saved = torch.optim.Optimizer.state_dict(optimizer)
    states: dict[Any, Any] = {}
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        form = optimizer.form
        if form is not None and group.get(form) not in (None, "torch"):
            raise ValueError(
                f"torch's {type(optimizer).__name__} has no {form}={group[form]!r}: its states mean"
                " something else"
            )
        for name in optimizer.extra_options:
            group.pop(name, None)
        for key, p in zip(group["params"], own["params"], strict=True):
            state = optimizer.state.get(p)
            if state:
                states[key] = _exported(p, state, rule, own)
    return {"state": states, "param_groups": saved["param_groups"]}


def _exported(p: Tensor, state: Mapping[str, Any], rule: Any, group: Group) -> dict[str, Any]:
    names = rule.states(group)
    found = {}
    for name, value in state.items():
        if name in names and isinstance(value, Tensor):
            plain = decoded(p, state, name, rule)
            dtype = torch.complex64 if p.is_complex() else torch.float32
            wide = torch.promote_types(plain.dtype, dtype)
            found[name] = plain.to(wide, copy=plain is value)
        elif name == "step" and rule.counts_steps:
            found[name] = value.clone() if isinstance(value, Tensor) else value
    return found


def check_form(state_dict: Any) -> None:
    """Raise for what is no optimizer's ``state_dict()``.

    Raises:
        IncompleteState: without ``"state"`` or ``"param_groups"``.
        ValueError: where they, or the entries of a state, are of another kind.
    """
    for name, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if name not in state_dict:
            raise IncompleteState(
                f"the checkpoint has no {name!r}, but {', '.join(map(repr, state_dict))}: it is not"
                " what an optimizer's state_dict() returns"
            )
        if not isinstance(state_dict[name], kind):
            what = "dictionary" if kind is Mapping else "list"
            raise ValueError(f"{name!r} of the checkpoint is no {what}, but {state_dict[name]!r}")
    for index, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or "params" not in group:
            raise ValueError(
                f"param_groups[{index}] of the checkpoint is no dictionary with 'params', but"
                f" {group!r}"
            )


def _sizes(groups: Iterable[Mapping[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _complete(optimizer: Any, groups: list[Group]) -> None:
    """Give saved groups the optimizer's own options where they lack them, and check the groups."""
    for index, (saved, group) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        for name in {*optimizer.choices, *optimizer.extra_options, TORCHS}:
            value = _carried(saved.get(name, _ABSENT))
            if value is not _ABSENT:
                saved[name] = value
            elif name in group:
                saved[name] = group[name]
            else:
                saved.pop(name, None)
        allowed = optimizer.choices.get("bias_correction", ())
        if "adam" in allowed and isinstance(saved["bias_correction"], bool):
            saved["bias_correction"] = _SWITCH[saved["bias_correction"]]
        missing = [n for n in optimizer.rule.hyper if n in optimizer.defaults and n not in saved]
        if missing:
            raise IncompleteState(
                f"param_groups[{index}] of the checkpoint has no {missing[0]!r}, so it is not"
                f" one of {type(optimizer).__name__}: load it into the optimizer that saved it,"
                " or fill in what is missing"
            )
    # Of all groups: numbers that are put aside have to be back in each.
    check_numbers(optimizer, groups, " of the checkpoint")
    for saved in groups:
        # A checkpoint may be older than an option of torch's, too.
        optimizer.check_group({**optimizer.defaults, **saved})


def _with_steps(optimizer: Any, groups: list[Group], states: Mapping[Any, Any]) -> dict[Any, Any]:
    """Move step counts that a group holds for all of its parameters, as apex's do, to each."""
    states = dict(states)
    if not optimizer.rule.counts_steps:
        return states
    for group in groups:
        if "step" not in group or "step" in optimizer.defaults:
            continue
        step = group.pop("step")
        for key in group["params"]:
            state = states.get(key)
            if isinstance(state, Mapping) and state and "step" not in state:
                number = float(step) if _is_number(step) else step
                states[key] = {**state, "step": number}
    return states


def _is_gap(value: Any) -> bool:
    """Whether torch found nothing for an entry of a flattened state: it fills in an empty dict."""
    return isinstance(value, Mapping) and not value


def _without_gaps(optimizer: Any, states: Mapping[Any, Any]) -> dict[Any, Any]:
    """Leave out the gaps of what the saved options do not ask for."""
    groups = optimizer.rule.example_groups or optimizer.param_groups
    known = {name for group in groups for name in optimizer.rule.states(group)}

    def present(state: Any) -> Any:
        if not isinstance(state, Mapping) or not any(map(_is_gap, state.values())):
            return state
        return {n: v for n, v in state.items() if n not in known or not _is_gap(v)}

    return {key: present(state) for key, state in states.items()}


def _is_number(step: Any) -> bool:
    if isinstance(step, Tensor):
        return step.numel() == 1 and not step.is_complex()
    # Also as a tensor's value.
    return isinstance(step, float) or (isinstance(step, int) and abs(step) < 1 << 63)


def _check_states(optimizer: Any, own: Group, saved: Group, states: Mapping[Any, Any]) -> None:
    """Raise where a saved state does not fit its parameter, by the options saved with it."""
    names = optimizer.rule.states({**own, **saved})
    for key, parameter in zip(saved["params"], own["params"], strict=True):
        state = states.get(key, {})
        place = _Place(optimizer, parameter)
        if not isinstance(state, Mapping):
            raise ValueError(f"{place}: its state is no dictionary, but {state!r}")
        asked = ("step", *names) if optimizer.rule.counts_steps else names
        for name in asked:
            if _is_gap(state.get(name)):
                raise _incomplete(place, name, state)
        step = state.get("step", 0.0)
        # Also where the rule has none: torch and we make a tensor of what stands there.
        if not isinstance(step, Tensor) and not _is_number(step):
            raise ValueError(f"{place}: its state 'step' is no number, but {step!r}")
        _check_complete(optimizer.rule, names, state, place)
        for name in names:
            value = state.get(name)
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"{place}: its state {name!r} is no tensor, but {value!r}")
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{place}: its state {name!r} in the checkpoint has shape"
                    f" {tuple(value.shape)}. Load the optimizer's state after the model's"
                    " parameters have their final shape, in the order in which they were saved"
                )
            problem = placement_problem(parameter, name, value)
            if problem is not None:
                raise ValueError(f"{place}: {problem}")


class _Place:
    """A parameter's name, looked up only for a message."""

    def __init__(self, optimizer: Any, parameter: Tensor) -> None:
        self._of = optimizer, parameter

    def __str__(self) -> str:
        return describe(*self._of)


def _check_complete(rule: Any, names: tuple[str, ...], state: Mapping[str, Any], who: Any) -> None:
    """Raise where a state has some of what the rule keeps, but not all of it.

    Raises:
        IncompleteState: naming the parameter and the first key that is missing.
        ValueError: for a step count that is no number.
    """
    if not any(state.get(name) is not None for name in (*names, "step")):
        # Nothing yet, or only what users keep there.
        return
    missing = [name for name in names if state.get(name) is None]
    if rule.counts_steps:
        if state.get("step") is None:
            missing.insert(0, "step")
        elif not _is_number(state["step"]):
            raise ValueError(f"{who}: its state 'step' is no number, but {state['step']!r}")
    elif len(missing) == len(names):
        # As torch's SGD, whose buffers begin with the first step that has momentum.
        return
    if missing:
        raise _incomplete(who, missing[0], state)


def _incomplete(who: Any, name: str, state: Mapping[str, Any]) -> IncompleteState:
    found = ", ".join(repr(n) for n, value in state.items() if not _is_gap(value))
    return IncompleteState(
        f"{who}: its state has no {name!r}, but {found or 'nothing'}."
        " Going on would start that one from zero beside the others: complete the state, or"
        " remove all of it (optimizer.state.pop(parameter)) to start afresh"
    )


def check_present(
    optimizer: Any,
    parameters: Iterable[Tensor],
    group_of: Iterable[int],
    present: Present,
) -> None:
    """Raise before a step for a state that is partly there.

    Args:
        optimizer: that is to step.
        parameters: that take part.
        group_of: for each, the index of its group.
        present: what was there when it was last looked at.

    Raises:
        IncompleteState: naming the parameter and the key.
        ValueError: for a step count that is no number.
    """
    if not optimizer.state:
        return
    # Not what an option switched on since asks for: that starts at zero, unless it was there.
    rule = optimizer.rule
    # A rule of a user's own need not have examples.
    groups = rule.example_groups or optimizer.param_groups
    base = set.intersection(*(set(rule.states(group)) for group in groups))
    names_of = [_asked(rule, group) for group in optimizer.param_groups]
    for p, index in zip(parameters, group_of, strict=True):
        if p in optimizer.state:
            who = _Place(optimizer, p)
            due = base | present.names(p)
            names = tuple(name for name in names_of[index] if name in due)
            _check_complete(rule, names, optimizer.state[p], who)


def _asked(rule: Any, group: Group) -> tuple[str, ...]:
    """Return the entries that hold what a state and a parameter are, beside their scales."""
    companion = format_of(rule, group).companion
    return rule.states(group) if companion is None else (*rule.states(group), companion)


class Present:
    """Which entries that its options ask for the state of each parameter had when last looked at.

    What is missing later, though its option is still on, was taken away in between.
    """

    def __init__(self) -> None:
        self._names: dict[Tensor, frozenset[str]] = {}
        self._noted: list[tuple[list[Tensor], list[tuple[str, ...]], list[int]]] = []

    def names(self, p: Tensor) -> frozenset[str]:
        """Return the entries of a parameter's state."""
        for params, names_of, group_of in self._noted:
            sets = list(map(frozenset, names_of))
            self._names.update(zip(params, [sets[index] for index in group_of], strict=True))
        self._noted.clear()
        return self._names.get(p, frozenset())

    def note(
        self, params: list[Tensor], names_of: list[tuple[str, ...]], group_of: list[int]
    ) -> None:
        """Note that the states of parameters have all that their groups ask for.

        Looked through when asked for, which is seldom: hashing a tensor is a call into Python.

        Args:
            params: the parameters.
            names_of: for each group, the entries.
            group_of: for each parameter, the index of its group.
        """
        self._noted.append((params, names_of, group_of))

    def forget(self, p: Tensor, names: Iterable[str]) -> None:
        """Leave out entries of a parameter's state."""
        self._names[p] = self.names(p) - set(names)

    def look(self, optimizer: Any) -> None:
        """Look at all states; one that has lost an entry need not have stepped since."""
        found: dict[Tensor, frozenset[str]] = {}
        for group in optimizer.param_groups:
            names = frozenset(optimizer.rule.states(group))
            beside = frozenset(_asked(optimizer.rule, group)) - names
            for p in group["params"] if isinstance(group["params"], (list, tuple)) else ():
                state = optimizer.state.get(p)
                if isinstance(state, Mapping) and state:
                    old = self.names(p)
                    there = {n for n in names | beside if state.get(n) is not None}
                    # A checkpoint may be one of torch's, without what is beside the parameter.
                    found[p] = frozenset(there | (names & old))
        self._names = found


def is_initialising(optimizer: Any) -> bool:
    """Whether a step of an optimizer that has no state yet is only to create states.

    Distributed checkpoint calls ``step()`` of an optimizer without any state, with every lr at 0
    and gradients of zeros. They are looked at, on the host, where the first two hold. Where the
    statistics do have what a step needs, it is the first step of a warm-up. As a step it would
    count one, and weight decay would go into the moments: a run that was asked for its state before
    its first step would go on otherwise than one that was not.

    A rule that reads gradients alone could take such a step in earnest, while another process has
    gradients that are not zero: there, distributed checkpoint has to be the caller.
    """
    rule = optimizer.rule
    if optimizer.state or not any(keeps_state(rule, group) for group in optimizer.param_groups):
        return False
    feeds = optimizer.statistics is not None or len(rule.degrees) > 1
    if not feeds and not is_creating():
        return False
    gradients = list(_gradients(optimizer))
    # Nothing may be read during a capture.
    if not gradients or any(map(is_capturing, {g.device for g in gradients})):
        return False
    if not all(_is_zero(group.get("lr", 0)) for group in optimizer.param_groups):
        return False
    if any(g.layout != torch.strided or g.is_meta for g in gradients):
        return False
    if any(bool(g.count_nonzero()) for g in local_tensors(gradients)):
        return False
    if optimizer.statistics is None:
        return True
    try:
        params, _, _ = gather_params(optimizer)
        optimizer.statistics.check(params)
    except (RuntimeError, ValueError):
        return True
    return not params


def _is_zero(lr: Any) -> bool:
    return bool(lr == 0)


def _gradients(optimizer: Any) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from (p.grad for p in group["params"] if p.grad is not None)


def initialise(optimizer: Any) -> None:
    """Create the states of every parameter with a gradient, at zero, and change nothing else."""
    params: list[Tensor] = []
    group_of: list[int] = []
    for index, group in enumerate(optimizer.param_groups):
        with_gradient = [p for p in group["params"] if p.grad is not None]
        params += with_gradient
        group_of += [index] * len(with_gradient)
    create_states(optimizer, params, local_tensors(params), group_of)
