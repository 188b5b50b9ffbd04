"""States that ``FullyShardedDataParallel`` (FSDP1) is about to gather, and could never load."""

from __future__ import annotations

from typing import Any

import torch

from ..completion import is_gathering
from ..formats import format_of
from ..step.checks import describe


def check_flattened(optimizer: Any) -> None:
    """Raise where FSDP1 gathers states of whole numbers, which it does not flatten again.

    With ``use_orig_params=False`` it saves them without a word, and refuses the file. With ``True``
    it raises by itself where there are several types.

    Raises:
        ValueError: naming the parameter and the way out; on every rank alike.
    """
    flat = [
        (p, group)
        for group in optimizer.param_groups
        for p in group["params"]
        if getattr(p, "_is_flat_param", False)
    ]
    if not flat or not is_gathering():
        return
    for p, group in flat:
        format = format_of(optimizer.rule, group)
        if format.codecs or format.companion_dtype == torch.int8:
            raise ValueError(
                f"{describe(optimizer, p)}: FullyShardedDataParallel does not load states in 8 bits"
                " once it has gathered them. Give it FSDP.optim_state_dict(model, optimizer,"
                " fusedopt.export_state_dict(optimizer)), which has no masters, or save the"
                " optimizer.state_dict() of each rank"
            )
