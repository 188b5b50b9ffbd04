"""The option sets that torch tests its own optimizers with.

``torch.testing._internal.common_optimizers`` changes global state when imported and needs packages
that nothing else here does, so the sets are listed, and ``read_from_torch`` reads them in a
process of its own for a test that the list is complete.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import torch

OPTION_SETS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {},
        {"lr": 0.01},
        {"lr": torch.tensor(0.001)},
        {"weight_decay": 0.5},
        {"momentum": 0.9},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
    "RMSprop": [
        {},
        {"lr": 0.001},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"weight_decay": 0.1, "centered": True},
        {"maximize": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "centered": True, "momentum": 0.1},
        {"weight_decay": 0.1, "centered": True, "momentum": 0.1, "maximize": True},
    ],
    "Adam": [
        {},
        {"lr": 0.01},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "amsgrad": True},
    ],
}
OPTION_SETS["AdamW"] = OPTION_SETS["Adam"]

# With torch's own learning rates nothing moves further than rounding does.
LEARNING_RATE = {"SGD": 0.1, "RMSprop": 0.03, "Adam": 0.1, "AdamW": 0.1}


def with_large_steps(name: str) -> list[dict[str, Any]]:
    """Torch's sets at a learning rate that shows, each once, and a few that torch lacks."""
    lr = LEARNING_RATE[name]
    sets = []
    for options in OPTION_SETS[name]:
        is_tensor = isinstance(options.get("lr"), torch.Tensor)
        # In float32, torch's own type of a learning rate, and exact in it.
        sets.append({**options, "lr": torch.tensor(0.125) if is_tensor else lr})
        if set(options) == {"lr"} and not is_tensor:
            sets[-1]["lr"] = lr / 3
    return sets + [{"lr": lr, **options} for options in MORE[name]]


# Kept and ignored, and settings under which every term shows.
MORE: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"foreach": True, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
        {"fused": True, "weight_decay": 0.1},
    ],
    "RMSprop": [
        {"foreach": True, "alpha": 0.6, "momentum": 0.9},
        {"capturable": False, "alpha": 0.7, "eps": 0.1, "centered": True, "momentum": 0.5},
    ],
    "Adam": [
        {"foreach": True, "betas": (0.3, 0.6), "amsgrad": True, "weight_decay": 0.1},
        {"fused": True, "betas": (0.0, 0.5), "eps": 0.1},
    ],
}
MORE["AdamW"] = MORE["Adam"]

_SCRIPT = """
import pickle, sys, types, unittest, warnings
warnings.simplefilter("ignore")
try:
    import expecttest
except ImportError:
    # Needed for the base class of torch's own test cases alone.
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase
from torch.testing._internal.common_optimizers import optim_db
sets = {
    info.optim_cls.__name__: [case.kwargs for case in info.optim_inputs_func("cpu")]
    for info in optim_db
}
names = sys.argv[1:]
sys.stdout.buffer.write(pickle.dumps({name: sets[name] for name in names}))
"""


def read_from_torch() -> dict[str, list[dict[str, Any]]]:
    """Read the option sets out of torch's own tests."""
    command = [sys.executable, "-c", _SCRIPT, *OPTION_SETS]
    sets: dict[str, list[dict[str, Any]]] = pickle.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    )
    return sets
