"""What the wrappers of kernels that own tiles of a weight share: device facts, results, shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ...kernels.launch import launch
from ...kernels.per_sample import shares as sharing
from ...kernels.per_sample.linear import has_tf32
from ...kernels.per_sample.shapes import SHARE_REGISTERS, Shares, Tile

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


Kernel = Callable[[Tensor | None, Tensor, Tensor | None, bool], None]


def programs_of(shares: Shares, partials: Tensor | None) -> tuple[int, int | None]:
    """Return how many programs a launch has, and what registers a thread of them may take."""
    return (shares.whole, None) if partials is None else (shares.shares, SHARE_REGISTERS)


def reduce_tiles(
    kernel: Kernel,
    shape: tuple[int, ...],
    weight: tuple[int, int],
    tile: Tile,
    shares: Shares,
    device: torch.device,
    dtype: torch.dtype | None,
    squares: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Run a kernel that writes a gradient and squares, and add the partial results of its shares.

    Args:
        kernel: launches programs of whole tiles; called with where to write the gradient (or None)
            and the squares, with None, and with whether to add to the squares. With partial results
            in the place of None it launches shares, which write them alone.
        shape: of the results.
        weight: rows of a group of it, and columns.
        tile: of the kernel.
        shares: of its programs.
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
    if shares.positions == 0:
        # No program would have anything to do.
        if gradient is not None:
            gradient.zero_()
        return gradient, target.zero_() if squares is None else squares
    if shares.whole:
        kernel(gradient, target, None, accumulate)
    if shares.shares:
        size = tile.outputs * tile.inputs
        partials = torch.empty(
            shares.shares * shares.slots * size, dtype=torch.float32, device=device
        )
        kernel(gradient, target, partials, False)
        block = min(sharing.REDUCE_BLOCK, size)
        launch(
            sharing.reduce_shares, shares.left * (size // block), sharing.REDUCE_THREADS, device,
            partials, gradient, target, shares.whole, shares.shares, shares.tiles,
            shares.positions, shares.unit, shares.steps, *weight,
            **sharing.reduce_shares_constants(tile.outputs, tile.inputs, accumulate),
        )  # fmt: skip
    if squares is None:
        return gradient, target
    return gradient, squares if accumulate else squares.add_(target)
