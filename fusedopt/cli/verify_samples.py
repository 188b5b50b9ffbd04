"""The per-sample kernels against float64, for ``python -m fusedopt verify``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fusedopt.statistics.ops import reference
from fusedopt.statistics.ops.samples import Samples

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# As a share of the same sum over magnitudes: rounding of float32 sums of some hundred terms.
TOLERANCE = 4e-6
# tf32 keeps 11 bits of each factor: of the squares of 16-bit rows, and of float32 convolutions as
# torch's own are by default. Tensor cores cut the others off and do not round: a factor is off by
# up to 2^-10, a product by 2^-9 (1.7e-3 measured on an H200, and 1e-6 from a model that cuts off).
TF32_TOLERANCE = 2.0**-9
# Of one row a sample, squares of 16-bit operands are rounded to bfloat16, both of a product.
ROWS_TOLERANCE = 2.0**-7

Operation = Callable[[Any, torch.dtype, Tensor, Tensor], tuple[Tensor, Tensor]]


def _ids(e: Tensor) -> Tensor:
    """Ids with repetitions, the same for every type of errors."""
    count = e.shape[0] * e.shape[1]
    return (torch.arange(count, device=e.device) * 7 % 11).view(e.shape[:2])


def _segments(e: Tensor) -> Samples:
    """Segments of the flattened rows, one of them empty."""
    rows = e.shape[0] * e.shape[1]
    bounds = [0, rows // 3, rows // 3, rows]
    return Samples(3, torch.tensor(bounds, dtype=torch.int32, device=e.device))


def _image(x: Tensor) -> Tensor:
    return x[:, :24, :36].reshape(x.shape[0], 4, 6, 36)[..., :6]


OPERATIONS: dict[str, Operation] = {
    "linear, sequences": lambda ops, dtype, a, e: ops.linear(a, e, Samples(len(a)), dtype),
    "linear, rows": lambda ops, dtype, a, e: ops.linear(
        a[:, :1], e[:, :1], Samples(len(a)), dtype
    ),
    "linear, segments": lambda ops, dtype, a, e: ops.linear(
        a.flatten(0, 1), e.flatten(0, 1), _segments(a), dtype
    ),
    "bias": lambda ops, dtype, a, e: ops.vector(e, Samples(len(e)), dtype),
    "gain": lambda ops, dtype, a, e: ops.affine(
        a, a, None, torch.full(a.shape[:2], 0.5, device=a.device), Samples(len(a)), dtype
    ),
    "embedding": lambda ops, dtype, a, e: ops.embedding(
        _ids(e), e, Samples(len(e)), 11, 3, dtype
    ),
    "convolution": lambda ops, dtype, a, e: ops.convolution(
        _image(a), _image(e), (3, 3), (1, 1), (1, 1), (1, 1), 2, dtype
    ),
}  # fmt: skip


def compare_all(device: torch.device) -> Iterator[dict[str, Any]]:
    """Run every operation in every type by kernels, and in float64 by PyTorch.

    Yields:
        A row for the table; ``worst`` is the largest distance of a gradient or a sum of squares, as
        a share of the same sum over magnitudes.
    """
    from fusedopt.statistics.ops import triton_all

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 37, 40, generator=generator)
    e = torch.randn(3, 37, 40, generator=generator)
    for name, operation in OPERATIONS.items():
        for dtype in DTYPES:
            operands = a.to(device, dtype), e.to(device, dtype)
            got = operation(triton_all, torch.float32, *operands)
            a64, e64 = (x.double() for x in operands)
            want = operation(reference, torch.float64, a64, e64)
            size = operation(reference, torch.float64, a64.abs(), e64.abs())
            worst = max(
                float(((x.double() - y).abs() / z.clamp_min(1e-30)).max())
                for x, y, z in zip(got, want, size, strict=True)
            )
            narrow = dtype != torch.float32
            in_tf32 = narrow if name == "linear, rows" else name == "convolution" and not narrow
            tolerance = TF32_TOLERANCE if in_tf32 else TOLERANCE
            if narrow and name == "linear, rows":
                tolerance = ROWS_TOLERANCE
            yield {
                "operation": name,
                "dtype": str(dtype).removeprefix("torch."),
                "worst": worst,
                "tolerance": tolerance,
                "passed": worst <= tolerance,
            }
