"""Between the ways to state a learning rate or a decay.

Pure functions of Python numbers, which a tensor of one number is taken for. mu is the momentum, B
the samples of a batch, whose gradient is the mean of theirs.
"""

from __future__ import annotations

import math

from .checks import decay, not_negative, number, positive


def temperature_lr(eta0: float, momentum: float, batch_size: float) -> float:
    """Return the learning rate that keeps the temperature whatever the momentum and batch size.

    lr = (1 - mu) B eta0: one sample's gradient g enters the batch's as g / B, and adds up, over all
    later steps, to lr / (1 - mu) times that, so that it moves the parameter by eta0 g in total.
    That total is what the temperature, the loss reached at a fixed learning rate, is determined by,
    to first order (McAllester, TTIC 31230, "SGD with Momentum", the total effect rule).

    This is for momentum as ``torch.optim.SGD`` has it, and for ``momentum_form="velocity"``. With
    ``momentum_form="ema"`` the buffer is an average and lr is B eta0, whatever the momentum:
    ``average_lr`` of this, or this with momentum 0.

    Args:
        eta0: parameter per gradient of one sample.
        momentum: mu, the decay of the buffer per step, dimensionless.
        batch_size: samples a step.

    Returns:
        lr, in parameter per gradient of a batch.

    Raises:
        ValueError: for a momentum outside [0, 1), a batch size that is not positive, or a negative
            eta0, or numbers whose lr no float can hold.
    """
    eta0 = not_negative("eta0", eta0)
    momentum = decay("momentum", momentum)
    batch_size = positive("batch_size", batch_size)
    return _in_range("lr", (1.0 - momentum) * batch_size * eta0, eta0)


def average_lr(lr: float, momentum: float) -> float:
    """Return the learning rate for an average of gradients where `lr` was for their sum.

    lr / (1 - mu) (Aitchison, EMAT31530 part 6, equation 27): SGD of ``momentum_form="ema"`` then
    takes the steps that it takes as torch has it with `lr`.

    Args:
        lr: parameter per gradient, for ``momentum_form="torch"`` or ``"velocity"``.
        momentum: mu, the decay of the buffer per step, dimensionless.

    Returns:
        lr for ``momentum_form="ema"``, in the same unit.

    Raises:
        ValueError: for a momentum outside [0, 1), a negative lr, or a result that no float can
            hold.
    """
    lr = not_negative("lr", lr)
    return _in_range("lr", lr / (1.0 - decay("momentum", momentum)), lr)


def beta_from_horizon(horizon: float) -> float:
    """Return the decay of the running average over about `horizon` values.

    beta = 1 - 1/N, so that x <- (1 - 1/N) x + x_t / N (McAllester, TTIC 31230, "SGD with Momentum"
    and "RMSProp and Adam").

    Args:
        horizon: N, in steps, at least 1.

    Returns:
        The decay per step, in [0, 1).

    Raises:
        ValueError: for a horizon below 1, or one whose decay would round to 1.
    """
    horizon = number("horizon", horizon)
    if not horizon >= 1:
        raise ValueError(f"horizon must be at least 1 step, got {horizon}")
    return _representable("horizon", horizon, 1.0 - 1.0 / horizon)


def horizon_from_beta(beta: float) -> float:
    """Return the horizon, in steps, of the running average of decay `beta`: 1 / (1 - beta).

    Args:
        beta: decay per step, dimensionless.

    Returns:
        N of ``beta_from_horizon``, in steps, at least 1.

    Raises:
        ValueError: for a decay outside [0, 1).
    """
    return 1.0 / (1.0 - decay("beta", beta))


def half_life(beta: float, tokens_per_step: float) -> float:
    """Return after how many tokens a value has half its weight in a running average.

    tokens_per_step ln(1/2) / ln(beta) (Marek et al., arXiv 2507.07101, who hold that of Adam's
    second moment fixed as the batch size changes).

    Args:
        beta: decay per step, dimensionless.
        tokens_per_step: tokens, or samples, of a batch.

    Returns:
        The half-life, in tokens, or samples.

    Raises:
        ValueError: for a decay outside (0, 1), a number of tokens that is not positive, or a
            half-life that no float can hold.
    """
    beta = number("beta", beta)
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta must be in (0, 1), got {beta}")
    tokens_per_step = positive("tokens_per_step", tokens_per_step)
    tokens = tokens_per_step * (math.log(0.5) / math.log(beta))
    return _in_range("the half-life", tokens, tokens_per_step)


def beta_from_half_life(tokens: float, tokens_per_step: float) -> float:
    """Return the decay whose half-life is so many tokens: the inverse of ``half_life``.

    (1/2) ** (tokens_per_step / tokens).

    Args:
        tokens: the half-life, in tokens, or samples.
        tokens_per_step: tokens, or samples, of a batch.

    Returns:
        The decay per step, in [0, 1).

    Raises:
        ValueError: for numbers that are not positive, or a half-life of so many steps that the
            decay would round to 1.
    """
    tokens = positive("tokens", tokens)
    tokens_per_step = positive("tokens_per_step", tokens_per_step)
    return _representable("tokens", tokens, 0.5 ** (tokens_per_step / tokens))


def epsilon_decoupled_lr(eta0: float, eps: float) -> float:
    """Return the learning rate of RMSprop or Adam that goes with eps so that eta0 need not.

    lr = eta0 eps: where eps dominates the root of the second moment, lr / (sqrt(s) + eps) is eta0,
    the step size of plain SGD, and eps can be tuned without it. McAllester, TTIC 31230, "RMSProp
    and Adam", proposes the parametrisation and prints it as eta0 / eps. Only the product makes eta0
    a step size of SGD, in parameter per gradient, and only the product takes eps out of the step:
    the quotient leaves eta0 / eps^2 in it.

    Args:
        eta0: parameter per gradient.
        eps: of the optimizer, outside the root, in units of the gradient.

    Returns:
        lr, in units of the parameter.

    Raises:
        ValueError: for an eps that is not positive, a negative eta0, or a product that no float
            can hold.
    """
    eta0 = not_negative("eta0", eta0)
    return _in_range("lr", eta0 * positive("eps", eps), eta0)


def _in_range(name: str, value: float, source: float) -> float:
    """Return what is in proportion to `source`; raise where it is inf, or 0 for none of 0."""
    if not value < math.inf or (value == 0 and source != 0):
        raise ValueError(f"{name} would be {value}: the numbers are out of a float's range")
    return value


def _representable(name: str, value: float, beta: float) -> float:
    if not beta < 1.0:
        raise ValueError(f"{name} = {value} is too long: its decay is 1 to the last digit")
    return beta
