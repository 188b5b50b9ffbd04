"""What the processes of ``precompile`` do: find the variants of a target, and compile one."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from . import modules
from .fake_driver import NoLauncher, fake_driver


@dataclass(frozen=True)
class Settings:
    """What every process is to know.

    Attributes:
        cache: directory of the Triton cache.
        imports: modules that register rules.
        statistics: whether kernels of per-sample squares are wanted.
        precision: options that steps are taken with.
        library: directory of a driver library to link C modules against, or None to build none.
    """

    cache: str
    imports: tuple[str, ...] = ()
    statistics: bool = False
    precision: Mapping[str, Any] = field(default_factory=dict)
    library: str | None = None


@dataclass(frozen=True)
class Task:
    """A variant to compile, and the case that launches it.

    Attributes:
        target: as ``aot.parse_target`` reads it.
        case: name of the case.
        key: of the launch.
        kernel: name of the kernel.
        launchers: whether the C module of the kernel's signature is wanted, too.
    """

    target: str
    case: str
    key: str
    kernel: str
    launchers: bool = False


_settings = Settings("")


def prepare(settings: Settings) -> None:
    """Prepare a new process; whatever it compiles from now on goes into the cache."""
    global _settings
    import torch

    _settings = settings
    os.environ["TRITON_CACHE_DIR"] = settings.cache
    torch.set_num_threads(1)
    for name in settings.imports:
        importlib.import_module(name)
    if settings.library is not None:
        modules.build_without_loading(Path(settings.library))


@cache
def _cases() -> dict[str, Any]:
    from . import cases, per_sample

    # Slow ones first, so that no process is left with one at the end.
    wanted = list(per_sample.cases()) if _settings.statistics else []
    wanted += cases.all_cases(_settings.precision)
    by_name = {case.name: case for case in wanted}
    if len(by_name) != len(wanted):
        raise RuntimeError("two cases have one name")
    return by_name


def find(
    target_name: str, rules: Collection[str], types: Collection[str]
) -> tuple[list[Task], list[dict[str, Any]]]:
    """Run every case that filters let pass, compile nothing, and list what would be compiled.

    Args:
        target_name: as ``aot.parse_target`` reads it.
        rules: names of rules, or nothing for all.
        types: names of element types, or nothing for all.

    Returns:
        The variants, each once, and rows like those of ``compile_task`` for cases that failed.
    """
    from ..kernels import aot

    found: dict[str, Task] = {}
    failed: list[dict[str, Any]] = []
    running = ""

    def note(key: str, kernel: str) -> bool:
        found.setdefault(key, Task(target_name, running, key, kernel))
        return False

    with fake_driver(aot.parse_target(target_name)), _compiling_only(note):
        for case in _cases().values():
            if case.is_chosen(rules, types):
                running = case.name
                try:
                    case.run()
                except Exception as error:  # noqa: BLE001 - a rule of the user's may raise anything
                    failed.append(_row(target_name, case.name, "", error))
    return list(found.values()), failed


def _row(
    target: str, case: str, kernel: str, error: Exception | str = "", **results: Any
) -> dict[str, Any]:
    message = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else error
    return {
        "target": target,
        "variant": f"{case}: {kernel}" if kernel else case,
        "kernel": kernel,
        "cached": False,
        "seconds": 0.0,
        "bytes": 0,
        "error": message[:600],
        **results,
    }


@contextmanager
def _compiling_only(chosen: Callable[[str, str], bool]) -> Iterator[None]:
    """Let the launcher compile what ``chosen(key, kernel's name)`` says, and skip the rest."""
    from triton.runtime.jit import JITFunction

    # Not jit_cache_hook, which stands at the same place: it has every constant written as JSON,
    # and a tuple of types cannot be.
    compile_kernel = JITFunction._do_compile

    def consider(self: Any, key: Any, *arguments: Any, **options: Any) -> Any:
        name = self.fn.__name__
        own = hashlib.sha256(f"{self.fn.__module__}:{name}:{key}".encode()).hexdigest()
        # None makes the launcher return without launching.
        return compile_kernel(self, key, *arguments, **options) if chosen(own, name) else None

    JITFunction._do_compile = consider
    try:
        yield
    finally:
        JITFunction._do_compile = compile_kernel


def build_utilities() -> str:
    """Build the C module that loads machine code; return what went wrong, or nothing."""
    try:
        modules.build_utilities()
    except Exception as error:  # noqa: BLE001 - a compiler without Python.h, a full disk, ...
        return f"{type(error).__name__}: {error}"
    return ""


def compile_task(task: Task) -> dict[str, Any]:
    """Compile a variant, unless the cache has it, and say what it took.

    Returns:
        ``target``, ``variant``, ``kernel``; ``cached``, whether it was there; ``seconds`` in the
        compiler; ``bytes`` of the entry; ``error``, empty on success.
    """
    from triton import knobs

    from ..kernels import aot

    place = task.target, task.case, task.kernel
    events: list[dict[str, Any]] = []
    target = aot.parse_target(task.target)
    launcher = modules.launcher() if task.launchers and target.backend == "cuda" else NoLauncher
    previous = knobs.compilation.listener
    knobs.compilation.listener = lambda **event: events.append(event)
    try:
        with fake_driver(target, launcher), _compiling_only(lambda key, _: key == task.key):
            _cases()[task.case].run()
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises is a finding
        return _row(*place, error)
    finally:
        knobs.compilation.listener = previous
    if len(events) != 1:
        return _row(*place, f"compiled {len(events)} times, not once")
    (event,) = events
    return _row(
        *place,
        cached=event["cache_hit"],
        seconds=0.0 if event["cache_hit"] else event["times"].total / 1e6,
        bytes=_size(list(event["metadata_group"].values())),
    )


def _size(files: Sequence[str]) -> int:
    return sum(os.path.getsize(file) for file in files)
