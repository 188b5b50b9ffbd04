"""How parameters, gradients and states are kept: a row of the benchmark each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Codec:
    """Types of the tensors of a step.

    Attributes:
        name: on the command line and in results.
        param: type of parameters.
        gradient: type of gradients.
        state: type of states.
        bound: ulps of the parameter's type that two steps may lie from float64. Torch's fused
            float32 kernels form 1 - beta in float32, and bfloat16 states are rounded by every
            operation of foreach; a step that is left out is thousands of ulps of float32 and tens
            of bfloat16.
        rewritten: the same where torch clips on a CPU, whose float32 norm of 40 million elements is
            0.3 % off, and of 16-bit gradients in any case: norm, factor and product each are
            rounded to that type, and so is what foreach adds to a gradient in place.
        floor: standard deviations that no gradient is smaller than. The square of a smaller one is
            nothing in float16, whose smallest number is 6e-8, and neither is eps, which torch's
            eager steps add in that type: what such an element does is no question of correctness.
    """

    name: str
    param: torch.dtype
    gradient: torch.dtype
    state: torch.dtype
    bound: float
    rewritten: float
    floor: float = 0.0

    def bound_of(self, ours: bool, clips: bool, device: torch.device) -> float:
        """Return what a contender may be off.

        Args:
            ours: whether it is this library, which rewrites no gradient.
            clips: whether the gradient norm is clipped.
            device: of the tensors.
        """
        loose = self.gradient in (BF16, FP16) or (clips and device.type == "cpu")
        return self.rewritten if loose and not ours else self.bound


_ROWS = (
    Codec("fp32", FP32, FP32, FP32, 256.0, 2.0**16),
    Codec("bf16", BF16, BF16, BF16, 12.0, 12.0),
    Codec("bf16+fp32-states", BF16, BF16, FP32, 12.0, 12.0),
    Codec("fp32+bf16-gradients", FP32, BF16, FP32, 256.0, 2.0**19),
    Codec("fp16", FP16, FP16, FP16, 12.0, 12.0, floor=0.1),
    Codec("fp64", FP64, FP64, FP64, 256.0, 256.0),
)
CODECS = {codec.name: codec for codec in _ROWS}
