"""``python -m fusedopt demo``: the same training with torch.optim.AdamW and with fusedopt.AdamW."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fusedopt
from fusedopt import backends
from fusedopt.examples import char_gpt

from . import demo_kernels, demo_report
from .demo_runs import SIZES, Corpus, Trainee, agreement
from .progress import progress

DEFAULT_OUT = Path("demo-out")
SAMPLE = 300  # characters
MEASURED = 100  # steps of which norms are drawn


class InputError(Exception):
    """What the user asked for cannot be done; the message is one line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--steps", type=int, default=600, help="steps of each run (600)")
    parser.add_argument("--seed", type=int, default=0, help="of the model and the batches (0)")
    parser.add_argument("--device", default=default, help=f"cpu, cuda, cuda:1, ... ({default})")
    parser.add_argument("--text", type=Path, help="UTF-8 file (Python's language reference)")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help=f"folder for PNG and JSON ({DEFAULT_OUT})"
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="tiny is for a quick try")
    parser.add_argument("--json", action="store_true", help="machine-readable output, nothing else")


def run(options: argparse.Namespace) -> int:
    """Train twice, compare, report; 1 where runs or kernels disagree, 2 for bad input."""
    begin = time.perf_counter()
    try:
        corpus = check(options)
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    with one_thread(options.device):
        result = collect(options, corpus)
    result["seconds"] = time.perf_counter() - begin
    write(result, options.out)
    if options.json:
        print(demo_report.to_json(result))
    else:
        from rich.console import Console

        demo_report.print_report(result, Console())
    return 0 if result["ok"] else 1


def check(options: argparse.Namespace) -> Corpus:
    """Check everything the user gave before the first step, and read the text.

    Raises:
        InputError: for the first thing that is wrong.
    """
    if options.steps < 1:
        raise InputError(f"--steps must be at least 1, got {options.steps}")
    if not 0 <= options.seed < 2**63:
        raise InputError(f"--seed must be between 0 and 2**63 - 1, got {options.seed}")
    options.device = usable_device(options.device)
    try:
        text = char_gpt.read_text(options.text)
    except UnicodeDecodeError as error:
        raise InputError(f"--text {options.text} is not UTF-8: {error.reason}") from None
    except OSError as error:
        raise InputError(f"--text {options.text}: {error.strerror}") from None
    except ModuleNotFoundError:
        raise InputError("this Python ships without pydoc_data.topics; use --text FILE") from None
    source = str(options.text or "the Python language reference")
    try:
        corpus = Corpus(source, *char_gpt.encode(text, SIZES[options.size]["context"]))
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {options.out}: {error.strerror}") from None
    if not os.access(options.out, os.W_OK):
        raise InputError(f"--out {options.out}: not writable")
    return corpus


def usable_device(name: str) -> torch.device:
    """Return the device of that name if tensors can be made there and read back.

    Raises:
        InputError: if not.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    # torch raises whatever the device's module does: RuntimeError, AssertionError, ImportError.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"--device {name} cannot be used: {reason}") from None
    return device


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Compute with one thread on a CPU.

    These matrices are too small to share out: more threads spend their time waiting for each
    other, and with one the result does not depend on the number of cores.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def training_backend(device: torch.device) -> tuple[str, str]:
    """Choose as "auto" does, except that nothing is trained in Triton's interpreter."""
    backend, reason = backends.choose(device)
    if backend == "triton" and device.type == "cpu":
        return "reference", "training in Triton's interpreter would take hours"
    return backend, reason


def collect(options: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """Train, compare the runs, run the kernels, and gather it all."""
    backend, reason = training_backend(options.device)
    torchs = Trainee(torch.optim.AdamW, options, corpus)
    telemetry = fusedopt.Telemetry(every=max(1, options.steps // MEASURED))
    fused = Trainee(fusedopt.AdamW, options, corpus, backend=backend, telemetry=telemetry)
    train_in_turn(torchs, fused, options.steps, options.json)
    parameters = list(torchs.model.parameters()), list(fused.model.parameters())
    apart = agreement((torchs.losses, fused.losses), parameters)
    kernels = kernel_step(torchs.optimizer, (backend, reason), options.json)
    runs = {"torch": asdict(torchs.result()), "fusedopt": asdict(fused.result())}
    # There is nothing to draw from the probabilities of a model that diverged.
    learned = math.isfinite(runs["fusedopt"]["held_out_loss"])
    return {
        # None where no kernel could run, which is no failure and no success either.
        "ok": apart.ok and kernels["ok"] is not False,
        "steps": options.steps,
        "seed": options.seed,
        "device": str(options.device),
        "backend": backend,
        "backend_reason": reason,
        "parameters": sum(p.numel() for p in parameters[0]),
        "text": {
            "source": corpus.source,
            "characters": len(corpus.codes) + len(corpus.held_out),
            "vocabulary": len(corpus.vocabulary),
        },
        "runs": runs,
        # Of the fusedopt run: |update| / |parameter| by layer.
        "update_ratios": vars(fused.ratios),
        "agreement": asdict(apart),
        "kernels": kernels,
        "sample": fused.sample(SAMPLE) if learned else "",
    }


def train_in_turn(theirs: Trainee, ours: Trainee, steps: int, quiet: bool) -> None:
    """Take the steps of both runs alternately, so that a busy machine slows both alike."""
    with progress("training", quiet, transient=False) as show:
        pairs = zip(theirs.train(steps), ours.train(steps), strict=True)
        for done, pair in enumerate(pairs, 1):
            show("loss: torch {:.3f}, fusedopt {:.3f}".format(*pair), done, steps)


def kernel_step(
    optimizer: torch.optim.Optimizer, chosen: tuple[str, str], quiet: bool
) -> dict[str, Any]:
    """Continue a trained run by one step of the kernels and one of the reference backend."""
    start = demo_kernels.snapshot(optimizer)
    backend, reason = chosen
    on_cpu = start["parameters"][0].device.type == "cpu"
    missing = demo_kernels.missing_reason() if on_cpu else None
    if not on_cpu and backend != "triton":
        missing = reason
    if missing is not None:
        return {"ok": None, "not_run": missing}
    if not on_cpu:
        return asdict(demo_kernels.compare_backends(start))
    what = f"one step of {len(start['parameters'])} tensors in Triton's interpreter"
    with progress(what, quiet) as show:
        show("")
        try:
            return asdict(demo_kernels.compare_in_interpreter(start))
        except demo_kernels.KernelError as error:
            return {"ok": False, "not_run": str(error)}


def write(result: dict[str, Any], folder: Path) -> None:
    """Write the PNG and the JSON, and note in the result where they are."""
    curves, numbers = folder / "demo.png", folder / "demo.json"
    result |= {"json": str(numbers), "png": str(curves), "png_skipped": None}
    try:
        demo_report.draw(result, curves)
    except ImportError:
        result |= {"png": None, "png_skipped": "matplotlib is not installed"}
    numbers.write_text(demo_report.to_json(result) + "\n", encoding="utf-8")
