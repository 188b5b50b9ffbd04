"""Work that several processes do together, over gloo on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What a collective waits for the others, and all of the work: many times what is needed.
PATIENCE = timedelta(seconds=120)
LIMIT = 300.0

# Processes are forked from a server that has imported these, and run nothing of them: each is as
# fresh as a new one, which would take seconds of a processor for the imports alone.
IMPORTED = ["numpy", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
            "torch.distributed.tensor", "pytest", "fusedopt"]  # fmt: skip


def in_ranks(
    world: int,
    directory: Path,
    work: Callable[..., None],
    *arguments: Any,
    limit: float = LIMIT,
) -> None:
    """Call ``work(rank, *arguments)`` in ``world`` processes of one group; raise what one raised.

    They meet over a file: a port that was free a moment ago may be taken by another worker of the
    suite.

    Raises:
        TimeoutError: where some are not done after ``limit`` seconds; they are killed.
    """
    # Of its own: who was killed before may leave a file behind, or still write into it.
    meeting = directory / f"meeting-{uuid.uuid4().hex}"
    _spawn(world, _rank, (world, str(meeting), work, arguments), work.__name__, limit)


def in_worlds(
    worlds: Sequence[int],
    directory: Path,
    work: Callable[..., None],
    *arguments: Any,
    limit: float = LIMIT,
) -> None:
    """Call ``work(stop, *arguments)`` at stop after stop, each in a group of so many processes.

    The processes are the same, which costs less than new ones: who is not needed waits. A world of
    1 is one process without a group.

    Raises:
        TimeoutError: as ``in_ranks``.
    """
    given = (tuple(worlds), str(directory), work, arguments)
    _spawn(max(worlds), _travel, given, work.__name__, limit)


def _spawn(world: int, start: Callable[..., None], given: Any, name: str, limit: float) -> None:
    multiprocessing.set_forkserver_preload(IMPORTED)
    given = (dict(os.environ), start, given)
    context = mp.start_processes(_start, given, world, join=False, start_method="forkserver")
    end = time.monotonic() + limit
    while not context.join(timeout=1.0):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
                process.join()
            raise TimeoutError(f"{name} in {world} processes: not done in {limit} s")


def _start(
    rank: int, environment: dict[str, str], start: Callable[..., None], given: tuple[Any, ...]
) -> None:
    # The server has that of the first to ask for it.
    os.environ.clear()
    os.environ.update(environment)
    start(rank, *given)


def _join(world: int, rank: int, meeting: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world,
        timeout=PATIENCE,
    )


def _rank(
    rank: int, world: int, meeting: str, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    _join(world, rank, Path(meeting))
    work(rank, *arguments)
    dist.barrier()
    # Nothing is torn down: gloo's threads may still hold tensors of the last collective, and one
    # that lets go of them while the interpreter finalizes asks for the GIL, is ended there by
    # Python 3.11 and takes the process with it (SIGABRT). All results are with the parent.
    os._exit(0)


def _travel(
    rank: int,
    worlds: Sequence[int],
    directory: str,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    for stop, world in enumerate(worlds):
        done = Path(directory, f"done{stop}")
        if rank >= world:
            while not done.exists():
                time.sleep(0.02)
            continue
        if world > 1:
            _join(world, rank, Path(directory, f"meeting{stop}"))
        work(stop, *arguments)
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
        if rank == 0:
            done.touch()
    os._exit(0)
