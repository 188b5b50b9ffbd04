"""What is measured: shapes of a linear layer's operands, and types of arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """A batch of samples, their rows, and the layer's inputs and outputs."""

    batch: int
    length: int
    inputs: int
    outputs: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read ``32x512x4096x4096``."""
        sizes = [int(part) for part in text.split("x")]
        if len(sizes) != 4 or min(sizes) < 1:
            raise ValueError(text)
        return cls(*sizes)

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.inputs}x{self.outputs}"

    @property
    def parameters(self) -> int:
        """Elements of the weight."""
        return self.inputs * self.outputs


# Lengths at one weight; then a wide layer of a large model, of a vision transformer, and a head.
SHAPES = (
    Shape(32, 1, 4096, 4096),
    Shape(32, 64, 4096, 4096),
    Shape(32, 256, 4096, 4096),
    Shape(32, 512, 4096, 4096),
    Shape(8, 2048, 4096, 11008),
    Shape(64, 197, 768, 3072),
    Shape(32, 1024, 768, 50304),
)
QUICK = (Shape(4, 1, 24, 16), Shape(4, 5, 24, 16), Shape(3, 16, 8, 20))


@dataclass(frozen=True)
class Arithmetic:
    """Type of the operands, and how products of float32 are formed.

    Attributes:
        dtype: of input, errors and gradient.
        precision: for ``torch.set_float32_matmul_precision``.
        unit: relative rounding of a product's factors.
    """

    dtype: torch.dtype
    precision: str
    unit: float

    @contextmanager
    def set(self) -> Iterator[None]:
        """Form products this way, whoever forms them."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


ARITHMETIC = {
    "bf16": Arithmetic(torch.bfloat16, "highest", 2.0**-8),
    # Matrix instructions may cut factors off instead of rounding them.
    "tf32": Arithmetic(torch.float32, "high", 2.0**-10),
    "fp32": Arithmetic(torch.float32, "highest", 2.0**-23),
}
