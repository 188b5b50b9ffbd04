"""Which cases, rules, types and contenders are run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import OURS, models
from .codecs import CODECS
from .contenders import CONTENDERS
from .measure import Group, Key
from .rules import RULES

FAST = (OURS, "torch-foreach", "torch-fused")
EAGER = (OURS, "torch-for-loop", "torch-foreach", "torch-fused")
COMPILED = (*FAST, "torch-compiled")
ALL = tuple(CONTENDERS)


@dataclass(frozen=True)
class Choice:
    """A few rows of a set.

    Attributes:
        case, rules, types, contenders: names.
        clip, scaler: with which of these.
    """

    case: str
    rules: Sequence[str]
    types: Sequence[str]
    contenders: Sequence[str]
    clip: Sequence[bool] = (False,)
    scaler: Sequence[bool] = (False,)


BOTH = (False, True)
EXTERNAL = tuple(name for name in ALL if name not in EAGER and name != "torch-compiled")

# On a GPU in about a minute and a half: see ``estimate``.
CORE = (
    Choice("gpt2", ["AdamW"], ["fp32", "bf16"], FAST, BOTH),
    Choice("gpt2", ["AdamW"], ["fp32", "bf16"], ["torch-compiled", "torch-for-loop", *EXTERNAL]),
    Choice("gpt2", ["AdamW"], ["fp32"], FAST, BOTH, (True,)),
    Choice("gpt2", ["SGD-momentum", "RMSprop"], ["fp32"], FAST),
    Choice("gpt2", ["BatchDecoupledAdam"], ["fp32"], [OURS]),
    Choice("llama-3.2-1b", ["AdamW"], ["fp32", "bf16"], FAST, BOTH),
    Choice("llama-3.2-1b", ["AdamW"], ["bf16+fp32-states"], [OURS]),
    Choice("llama-3-8b-shard", ["AdamW"], ["fp32", "bf16"], FAST, BOTH),
    Choice("many", ["AdamW"], ["fp32"], FAST, BOTH),
    Choice("odd", ["AdamW"], ["fp32"], FAST),
    Choice("conv", ["SGD-momentum"], ["fp32"], FAST),
    # Last: no kernel works any more in a process where one has left its tensor.
    Choice("huge", ["AdamW"], ["bf16"], (OURS, "torch-fused")),
)
_LARGE = ("AdamW", "SGD-momentum", "RMSprop")
FULL = (
    Choice("gpt2", list(RULES), list(CODECS), ALL, BOTH, BOTH),
    Choice("llama-3.2-1b", _LARGE, list(CODECS), ALL, BOTH),
    Choice("llama-3-8b-shard", _LARGE, list(CODECS), ALL, BOTH),
    Choice("many", _LARGE, list(CODECS), ALL, BOTH),
    Choice("odd", _LARGE, list(CODECS), ALL, BOTH),
    Choice("conv", _LARGE, list(CODECS), ALL, BOTH),
    Choice("huge", ["AdamW", "SGD-momentum"], ["bf16"], FAST, BOTH),
)
# Without a GPU: what a processor does in about two minutes.
CPU = (
    Choice("conv", ["AdamW"], ["fp32", "bf16"], EAGER, BOTH),
    Choice("conv", ["SGD-momentum", "RMSprop", "BatchDecoupledAdam"], ["fp32"], EAGER),
    Choice("odd", ["AdamW"], ["fp32"], FAST),
    Choice("many", ["AdamW"], ["fp32"], FAST),
    Choice("gpt2", ["AdamW"], ["fp32"], FAST),
)
_QUICK = (*EAGER, *EXTERNAL)
QUICK = (
    Choice("gpt2", list(RULES), list(CODECS), EAGER, BOTH),
    Choice("gpt2", ["AdamW"], ["fp32"], _QUICK, BOTH, BOTH),
    *(Choice(name, ["AdamW"], list(CODECS), EAGER, BOTH) for name in models.CASES[1:]),
)
SETS = {"core": CORE, "full": FULL, "cpu": CPU, "quick": QUICK}


@dataclass(frozen=True)
class Filters:
    """What the command line asks for; an empty entry asks for whatever the set has."""

    cases: Sequence[str] = ()
    rules: Sequence[str] = ()
    types: Sequence[str] = ()
    contenders: Sequence[str] = ()
    clip: bool | None = None
    scaler: bool | None = None


def groups(name: str, filters: Filters, missing: Sequence[str] = ()) -> list[Group]:
    """Return what a set has of what is asked for.

    A case, rule or mix of types that the set does not have is run nevertheless, with AdamW in
    float32 on GPT-2 for what is not said.

    Args:
        name: of a set.
        filters: what is asked for.
        missing: contenders that cannot run.
    """
    found = list(_filtered(SETS[name], filters))
    if not found:
        contenders = list(filters.contenders) or (EAGER if name in ("cpu", "quick") else COMPILED)
        asked = [
            Choice(case, filters.rules or ["AdamW"], filters.types or ["fp32"], contenders)
            for case in filters.cases or ["gpt2"]
        ]
        found = list(_filtered(asked, filters))
    keys: dict[tuple[str, str, str], dict[Key, None]] = {}
    for identity, key in found:
        if key.contender not in missing:
            keys.setdefault(identity, {})[key] = None
    case = models.tiny if name == "quick" else models.case
    return [Group(case(c), rule, types, tuple(own)) for (c, rule, types), own in keys.items()]


def _filtered(
    choices: Sequence[Choice], filters: Filters
) -> Iterator[tuple[tuple[str, str, str], Key]]:
    for choice in choices:
        clips = choice.clip if filters.clip is None else (filters.clip,)
        scalers = choice.scaler if filters.scaler is None else (filters.scaler,)
        for identity in _product(choice, filters):
            for clip in clips:
                for scaler in scalers:
                    for contender in choice.contenders:
                        if not filters.contenders or contender in filters.contenders:
                            yield identity, Key(contender, clip, scaler)


def _product(choice: Choice, filters: Filters) -> Iterator[tuple[str, str, str]]:
    if filters.cases and choice.case not in filters.cases:
        return
    for rule in choice.rules:
        for types in choice.types:
            if (not filters.rules or rule in filters.rules) and (
                not filters.types or types in filters.types
            ):
                yield choice.case, rule, types


def estimate(chosen: Sequence[Group], rounds: int, seconds: float) -> float:
    """Return about how many seconds the groups take on an H100.

    Memory at 2 TB/s, two draws and two steps for the comparison; then every step twice a round,
    for a while at most, with flushes in between; and compilations.
    """
    total = 0.0
    for group in chosen:
        for key in group.keys:
            moved = 84 if key.contender in ("torch-for-loop", "torch-foreach") else 34
            step = moved * group.case.parameters / 2e12 + 1e-5 * len(group.case.shapes)
            total += 0.3 + 12 * step + min(seconds, rounds * (2 * step + 2e-3))
            total += 12.0 * (key.contender == "torch-compiled")
    return total
