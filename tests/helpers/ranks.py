"""Work that several processes do together, over gloo on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Seconds that a process waits for another; far more than a busy machine needs.
LIMIT = 300


def in_ranks(world: int, directory: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Call ``work(rank, *arguments)`` in ``world`` processes of one group; raise what one raised.

    They meet over a file: a port that was free a moment ago may be taken by another worker of the
    suite.
    """
    meeting = f"file://{directory / 'meeting'}"
    mp.spawn(_rank, (world, meeting, work, arguments), nprocs=world)


def _rank(
    rank: int, world: int, meeting: str, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    # One that waits for a process which never comes fails, instead of hanging for half an hour.
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT)
    )
    work(rank, *arguments)
    dist.barrier()
    # Nothing is torn down: gloo's threads may still hold tensors of the last collective, and one
    # that lets go of them while the interpreter finalizes asks for the GIL, is ended there by
    # Python 3.11 and takes the process with it (SIGABRT). All results are with the parent.
    os._exit(0)
