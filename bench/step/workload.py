"""The tensors of a case: parameters, gradients, squares and states, shared by all contenders.

Elementwise updates do not care what values they move, so that contenders may step the same
parameters in turn; memory then holds one set, however many contenders there are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from .codecs import Codec
from .models import Case
from .rules import Row

# Elements between starts of tensors: an allocator's alignment in every type.
ALIGNMENT = 256
# Of a case, about how many elements are compared with float64.
CHECKED = 2**20
# Samples that squares are of, for the rules that take squares.
SAMPLES = 32


class Arena:
    """Tensors of one type, one behind the other in one piece of memory.

    Args:
        case: whose shapes to make.
        dtype: of the elements.
        device: of the memory.
        shifted: whether to start where the case says, else at aligned addresses.
    """

    def __init__(
        self, case: Case, dtype: torch.dtype, device: torch.device, shifted: bool = True
    ) -> None:
        shift = case.shift if shifted else 0
        self.ranges: list[tuple[int, int]] = []
        stop = 0
        for shape in case.shapes:
            start = -(-stop // ALIGNMENT) * ALIGNMENT + shift
            stop = start + math.prod(shape)
            self.ranges.append((start, stop))
        size = -(-stop // ALIGNMENT) * ALIGNMENT
        self.flat = torch.zeros(size, dtype=dtype, device=device)
        self.views = [
            _view(self.flat[start:stop], shape, case.channels_last)
            for (start, stop), shape in zip(self.ranges, case.shapes, strict=True)
        ]
        self._drawn: dict[int, Tensor] = {}

    def draw(self, seed: int, deviation: float = 1.0) -> None:
        """Fill with normal numbers, the same at every call."""
        self.flat.copy_(self.drawn(seed)).mul_(deviation)

    def drawn(self, seed: int) -> Tensor:
        """Return the standard normal numbers of a seed."""
        if seed in self._drawn:
            return self._drawn[seed]
        generator = torch.Generator(self.flat.device).manual_seed(seed)
        numbers = torch.empty_like(self.flat).normal_(generator=generator)
        if self.flat.device.type == "cpu":
            # Drawing takes a processor longer than the step, and it has the memory.
            self._drawn[seed] = numbers
        return numbers


def _view(memory: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    if channels_last and len(shape) == 4:
        n, c, h, w = shape
        return memory.view(n, h, w, c).permute(0, 3, 1, 2)
    return memory.view(shape)


class Workload:
    """A case in the types of a codec, with the states of a rule."""

    def __init__(self, case: Case, codec: Codec, row: Row, device: torch.device) -> None:
        self.case, self.codec, self.row, self.device = case, codec, row, device
        self.parameters = Arena(case, codec.param, device)
        self.gradients = Arena(case, codec.gradient, device)
        self.squares = Arena(case, torch.float32, device) if row.takes_squares else None
        self.held = Arena(case, codec.gradient, device) if row.takes_pairs else None
        self.states = {
            name: Arena(case, codec.state, device, shifted=False) for name in row.state_names()
        }
        self.params = [torch.nn.Parameter(view) for view in self.parameters.views]
        for i, p in enumerate(self.params):
            if codec.gradient != codec.param:
                p.grad_dtype = None
            if self.squares is not None:
                p.sum_grad_squared = self.squares.views[i]
        self.attach_gradients()
        self._checked = self._choose()
        self._whole_runs = self._runs()

    def attach_gradients(self) -> None:
        """Give every parameter its gradient."""
        for p, gradient in zip(self.params, self.gradients.views, strict=True):
            p.grad = gradient

    def attach_held(self) -> None:
        """Give every parameter the first of its two gradients."""
        assert self.held is not None
        for p, gradient in zip(self.params, self.held.views, strict=True):
            p.grad = gradient

    def keeps_gradients(self) -> bool:
        """Whether every parameter still has its gradient, so that another step is a whole one."""
        pairs = zip(self.params, self.gradients.views, strict=True)
        return all(p.grad is gradient for p, gradient in pairs)

    def restart(self) -> None:
        """Draw the parameters that every contender begins with, and clear the states."""
        self.attach_gradients()
        self.parameters.draw(seed=0)
        for arena in self.states.values():
            arena.flat.zero_()

    def new_gradients(self, seed: int, deviation: float) -> None:
        """Draw gradients, and squares of samples or held gradients of that size."""
        self.gradients.draw(seed, deviation)
        if self.codec.floor:
            gradients = self.gradients.flat
            # With the sign of a zero, too, which a half-precision draw has among millions.
            least = torch.full_like(gradients[:1], self.codec.floor * deviation)
            gradients.add_(torch.copysign(least, gradients))
        if self.held is not None:
            # With the other sign: weights of the two have other signs, and nothing cancels.
            self.held.draw(seed + 2000, deviation)
            self.held.flat.abs_().copysign_(self.gradients.flat).neg_()
        if self.squares is not None:
            self.squares.draw(seed + 1000)
            self.squares.flat.abs_().add_(0.5).mul_(deviation**2 / SAMPLES)

    def gradient_norm(self) -> float:
        """Return the norm of all gradients, summed in float64."""
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.float64) for g in self.gradients.views if len(g)
        ]
        return float(torch.stack(norms).square().sum().sqrt())

    def checked(self, arena: Arena) -> Tensor:
        """Return the elements that are compared with float64."""
        return arena.flat[self._checked].double()

    def still(self) -> int:
        """Count runs of elements of which not one has moved since the restart.

        With the elements compared, which include the end of every tensor, this leaves no part of a
        tensor unseen: a step that skips a chunk anywhere is found.
        """
        start, now = (flat.view(-1, ALIGNMENT) for flat in self._before_and_now())
        count, rows = 0, 2**26 // ALIGNMENT
        for first in range(0, len(now), rows):
            some = slice(first, first + rows)
            still = (start[some] == now[some]).all(1)
            count += int((still & self._whole_runs[some]).sum())
        return count

    def _before_and_now(self) -> tuple[Tensor, Tensor]:
        return self.parameters.drawn(seed=0), self.parameters.flat

    def _choose(self) -> Tensor:
        """Return places in the memory: small tensors, and the ends and a piece of large ones."""
        chance = random.Random(0)
        per = min(4096, max(8, CHECKED // (3 * len(self.params))))
        pieces = []
        for start, stop in self.parameters.ranges:
            if stop - start <= 3 * per:
                pieces.append(torch.arange(start, stop))
                continue
            middle = chance.randrange(start + per, stop - 2 * per + 1)
            for first in (start, middle, stop - per):
                pieces.append(torch.arange(first, first + per))
        return torch.cat(pieces).to(self.device)

    def _runs(self) -> Tensor:
        """Return which rows of the memory lie within one tensor."""
        whole = torch.zeros(len(self.parameters.flat) // ALIGNMENT, dtype=torch.bool)
        for start, stop in self.parameters.ranges:
            whole[-(-start // ALIGNMENT) : stop // ALIGNMENT] = True
        return whole.to(self.device)
