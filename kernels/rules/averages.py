"""Exponential moving averages from zero, and what makes up for that start.

    x_t = (1 - k) x_{t-1} + k d_t        from x_0 = 0

With k = 1 - beta the weights of t values sum to 1 - beta^t, by which an average is to be divided:
Adam's correction (Kingma and Ba, arXiv 1412.6980, section 3). The running mean instead takes

    k = 1 / min(t, N)                    N = 1 / (1 - beta)

and needs no division: up to t = N it is the plain mean, from then on the ordinary moving average
(McAllester, TTIC 31230, "RMSProp and Adam").
"""

from __future__ import annotations

from ..rule import Scalar

# "adam" divides by the sum of the weights, None leaves the bias in.
CORRECTIONS = ("adam", "running_mean", None)


def weights(beta: Scalar, step: Scalar, correction: str | None) -> tuple[Scalar, Scalar, Scalar]:
    """Return the weights of old and new value, and the sum of all weights so far.

    Args:
        beta: decay of the average.
        step: t, from 1.
        correction: one of ``CORRECTIONS``.

    Returns:
        1 - k, k, and what the average is to be divided by.
    """
    one_minus_beta = 1 - beta
    if correction == "adam":
        return beta, one_minus_beta, 1 - beta**step
    if correction is None:
        return beta, one_minus_beta, 1.0
    inverse = 1 / step
    # Not a branch: on the path that a CUDA graph captures, both live on the device.
    early = 1.0 * (inverse > one_minus_beta)
    k = early * inverse + (1.0 - early) * one_minus_beta
    return 1 - k, k, 1.0
