"""The two training runs of the demo, and how far apart they end."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fusedopt
import fusedopt.telemetry
from fusedopt.examples import char_gpt

ADAMW: dict[str, Any] = {"lr": 6e-3, "betas": (0.9, 0.99)}
BATCH = 16
# "tiny" is for a smoke test of a few seconds.
SIZES = {
    "small": {"context": 64, "width": 64, "heads": 4, "layers": 2},
    "tiny": {"context": 16, "width": 16, "heads": 2, "layers": 1},
}

# Rounding every update differently by one unit in the last place moves this training's loss by 1e-6
# in 600 steps and its parameters by 3e-5; a learning rate that is off by 0.1 % moves them by 1.5e-3
# and 8e-3, an eps of 1e-7 by 1e-4 and 7e-3. In 2000 steps all of these grow about tenfold.
LOSS_TOLERANCE = 1e-4  # nats per character, at any step
PARAMETER_TOLERANCE = 1e-3


@dataclass
class Run:
    """One training run. Losses are in nats per character, times in milliseconds."""

    losses: list[float]
    held_out_loss: float
    step_ms: float
    state_bytes_per_parameter: float
    least_traffic_per_parameter: float  # bytes a step has to read and write


@dataclass
class Agreement:
    """How far two runs are apart, and whether that is within the tolerances."""

    loss: float
    parameter: float
    loss_tolerance: float
    parameter_tolerance: float
    ok: bool


class StepTimer:
    """Times every step of an optimizer: on a GPU by events on its stream, else by the clock."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        optimizer.register_step_pre_hook(self._mark)
        optimizer.register_step_post_hook(self._mark)

    def _mark(self, *_: Any) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def median_ms(self) -> float:
        """Median over all steps, so that the first one, which allocates, does not count."""
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return statistics.median(start.elapsed_time(end) for start, end in pairs)
        return statistics.median(1e3 * (end - start) for start, end in pairs)


@dataclass
class Corpus:
    """A text as codes of its characters."""

    source: str
    vocabulary: str
    codes: Tensor
    held_out: Tensor


class Ratios:
    """Norms of updates over norms of parameters, by layer, as an optimizer's telemetry has them.

    Attributes:
        steps: that were measured, from 1.
        layers: for each layer, the ratio at each of them.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.layers: dict[str, list[float]] = {}

    def note(self, telemetry: fusedopt.Telemetry, step: int) -> None:
        """Read the norms of a step; those of a layer are of all its parameters together."""
        self.steps.append(step)
        found: dict[str, list[fusedopt.telemetry.Norms]] = {}
        for name, norms in telemetry.table().items():
            found.setdefault(name.rpartition(".")[0], []).append(norms)
        for layer, own in found.items():
            sizes = (math.hypot(*column) for column in zip(*own, strict=True))
            self.layers.setdefault(layer, []).append(fusedopt.telemetry.Norms(*sizes).ratio)


class Trainee:
    """A model with its optimizer; two of the same seed start equal and see the same batches."""

    def __init__(self, adamw: Any, options: argparse.Namespace, corpus: Corpus, **extra: Any):
        self.corpus = corpus
        self.size = SIZES[options.size]
        self.seed = options.seed
        torch.manual_seed(self.seed)
        self.model = char_gpt.CharGPT(len(corpus.vocabulary), **self.size).to(options.device)
        self.optimizer = adamw(char_gpt.decay_groups(self.model), **ADAMW, **extra)
        self.timer = StepTimer(self.optimizer, options.device)
        self.losses: list[float] = []
        self.ratios = Ratios()

    def train(self, steps: int) -> Iterator[float]:
        """Yield the loss of each step."""
        batches = char_gpt.windows(self.corpus.codes, self.size["context"], BATCH, self.seed)
        for loss in char_gpt.train(self.model, self.optimizer, batches, steps):
            self.losses.append(loss)
            telemetry = getattr(self.optimizer, "telemetry", None)
            if telemetry is not None and telemetry.measured:
                self.ratios.note(telemetry, len(self.losses))
            yield loss

    def result(self) -> Run:
        """Summarise the run, with the loss of one large batch of held-out text."""
        batch = next(char_gpt.windows(self.corpus.held_out, self.size["context"], 256, 0))
        with torch.no_grad():
            held_out = self.model.loss(batch).item()
        count = state = moved = 0
        for p in self.model.parameters():
            tensors = [t for t in self.optimizer.state[p].values() if isinstance(t, Tensor)]
            count += p.numel()
            state += sum(t.nbytes for t in tensors)
            # Parameter and state are read and written, the gradient is read.
            moved += 3 * p.nbytes + 2 * sum(t.nbytes for t in tensors if t.shape == p.shape)
        return Run(self.losses, held_out, self.timer.median_ms(), state / count, moved / count)

    def sample(self, length: int) -> str:
        """Return what the model writes after a line break."""
        characters = self.corpus.vocabulary
        start = torch.tensor([max(0, characters.find("\n"))], device=self.model.head.weight.device)
        generator = torch.Generator().manual_seed(self.seed)
        codes = self.model.sample(start, length, generator)[1:]
        return "".join(characters[code] for code in codes.tolist())


def agreement(
    losses: tuple[Sequence[float], Sequence[float]],
    parameters: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> Agreement:
    """Compare two runs' losses and final parameters; a nan in either is a disagreement."""
    ours, theirs = (torch.tensor(values, dtype=torch.float64) for values in losses)
    loss = (ours - theirs).abs().max().item()
    # torch's maximum keeps a nan, Python's may drop it.
    worst = [(a.detach() - b.detach()).abs().max() for a, b in zip(*parameters, strict=True)]
    parameter = torch.stack(worst).max().item()
    ok = loss <= LOSS_TOLERANCE and parameter <= PARAMETER_TOLERANCE
    return Agreement(loss, parameter, LOSS_TOLERANCE, PARAMETER_TOLERANCE, ok)
