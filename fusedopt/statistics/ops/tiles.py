"""What the wrappers of kernels that own tiles of a weight share: device facts, results, splits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ...kernels.launch import launch
from ...kernels.per_sample import tiles
from ...kernels.per_sample.linear import has_tf32

# Within a tile, the way from column to column is formed in int32: 128 of them, this far apart.
MAX_STRIDE = 2**31 // 128


@cache
def capability(device: torch.device) -> int:
    """Compute capability times 10, or 0 where the device is not an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """Processors that run programs side by side; 1 in the interpreter."""
    if device.type == "cpu":
        return 1
    module = torch.get_device_module(device)
    facts = module.get_device_properties(device)
    return int(getattr(facts, "multi_processor_count", 0) or facts.gpu_subslice_count)


@cache
def fastest_precision(device: torch.device) -> str:
    """The fastest way to form products of float32 that Triton has for a device."""
    amd = None
    if device.type == "cuda" and torch.version.hip is not None:
        amd = torch.cuda.get_device_properties(device).gcnArchName
    return "tf32" if has_tf32(amd) else "ieee"


def precision(device: torch.device) -> str:
    """How products of float32 are formed, as torch is told to form its own."""
    # The old function raises where the attribute, which torch 2.9 introduced, was set.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if setting not in ("tf32", "ieee"):
        setting = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return fastest_precision(device) if setting == "tf32" else "ieee"


def convolution_precision(device: torch.device) -> str:
    """The same for convolutions, of which torch is told apart: its default for them is tf32."""
    # Not cudnn.allow_tf32: it writes this attribute, too, and raises where the attribute was set.
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    tf32 = conv.fp32_precision == "tf32"
    return fastest_precision(device) if tf32 else "ieee"


def common_type(a: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Give a layer's input and the gradient of its output one type.

    Under autocast the input may be float32 where the gradient is narrow; then the layer itself has
    seen the narrow input.
    """
    if a.dtype == e.dtype:
        return a, e
    if e.dtype.itemsize == 2:
        return a.to(e.dtype), e
    return a.to(torch.float32), e.to(torch.float32)


def near(x: Tensor) -> Tensor:
    """Return a tensor whose columns a tile can reach: a copy where they lie enormously far off."""
    return x.contiguous() if x.stride(-1) >= MAX_STRIDE else x


def reduce_tiles(
    kernel: Callable[[Tensor | None, Tensor, bool], None],
    shape: tuple[int, ...],
    splits: int,
    device: torch.device,
    dtype: torch.dtype | None,
    squares: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Run a kernel that writes a gradient and squares, through partial results where it is split.

    Args:
        kernel: called with where to write the gradient (or None) and the squares, and with whether
            to add to the squares.
        shape: of the results.
        splits: programs that share a tile. More than one write ``float32 [splits, ...]``.
        device: of the results.
        dtype: of the gradient, or None to leave it out.
        squares: accumulated into and returned; or None.
    """
    gradient = None if dtype is None else torch.empty(shape, dtype=dtype, device=device)
    # The kernels write contiguous memory.
    accumulate = squares is not None and squares.is_contiguous()
    if squares is not None and accumulate:
        target = squares
    else:
        target = torch.empty(shape, dtype=torch.float32, device=device)
    if target.numel() == 0:
        return gradient, target if squares is None else squares
    if splits == 1:
        kernel(gradient, target, accumulate)
    else:
        partials = torch.empty(
            (1 if dtype is None else 2, splits, *shape), dtype=torch.float32, device=device
        )
        kernel(None if dtype is None else partials[0], partials[-1], False)
        launch(
            tiles.reduce_partials, -(-target.numel() // tiles.REDUCE_BLOCK), tiles.REDUCE_THREADS,
            device, partials, gradient, target, splits, target.numel(),
            **tiles.reduce_partials_constants(accumulate),
        )  # fmt: skip
    if squares is None:
        return gradient, target
    return gradient, squares if accumulate else squares.add_(target)
