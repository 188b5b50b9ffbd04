"""Hyper-parameters and state for another batch size, and what follows from them.

A rule keeps the trajectory, as a function of the samples seen, as it was at the batch size that the
hyper-parameters were tuned at. With kappa = to_batch / from_batch, and as many epochs as before:

============  ==============  ====================  ===============  ============
rule          lr              decay of an average   eps              weight decay
============  ==============  ====================  ===============  ============
"decoupled"   lr kappa        beta ** kappa         unchanged        unchanged
"sqrt"        lr sqrt(kappa)  1 - kappa (1 - beta)  eps/sqrt(kappa)  see below
"linear"      lr kappa        unchanged             unchanged        unchanged
"constant"    unchanged       unchanged             unchanged        unchanged
============  ==============  ====================  ===============  ============

"decoupled" is for optimizers whose second moment does not depend on the batch, as that of
``BatchDecoupledAdam``, and for plain SGD (Wang and Aitchison, arXiv 2402.18824, with ``beta **
kappa`` for their 1 - kappa (1 - beta), to which it is equal to first order). "sqrt" is for Adam and
RMSprop where gradient noise dominates (Malladi et al., arXiv 2205.10287). Coupled decay is part of
the gradient, and stays. Decoupled decay, as AdamW's, shrinks weights by lr weight_decay a step,
which has to become kappa times as much: weight_decay is multiplied by sqrt(kappa).

In the middle of a run the optimizer's state has to follow: see ``states``. ``rescale`` is for
hyper-parameters before a run, ``rescale_`` for an optimizer at any time, ``BatchSizeWarmup`` calls
that at milestones, and ``samples_schedule`` makes a learning-rate schedule follow the samples seen
and not the steps.
"""

from __future__ import annotations

from .batch import RULES, rescale, rescale_
from .conversions import (
    average_lr,
    beta_from_half_life,
    beta_from_horizon,
    epsilon_decoupled_lr,
    half_life,
    horizon_from_beta,
    temperature_lr,
)
from .schedule import SamplesSchedule, samples_schedule
from .warmup import BatchSizeWarmup

__all__ = [
    "RULES",
    "BatchSizeWarmup",
    "SamplesSchedule",
    "average_lr",
    "beta_from_half_life",
    "beta_from_horizon",
    "epsilon_decoupled_lr",
    "half_life",
    "horizon_from_beta",
    "rescale",
    "rescale_",
    "samples_schedule",
    "temperature_lr",
]
