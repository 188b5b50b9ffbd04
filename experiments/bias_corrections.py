"""What the moments' averages say in the first steps, without a bias correction and with two.

An average that starts from 0 and has seen t values is too small by the factor 1 - beta^t. Adam
divides by it (Kingma and Ba, arXiv 1412.6980, algorithm 1); a running mean gives the t-th value the
weight 1 / min(t, N), N = 1 / (1 - beta) (McAllester, TTIC 31230, "RMSProp and Adam"). On gradients
of known mean and variance, independent from step to step, both are unbiased from the first step on.
The running mean's variance is the smaller one at every step but the first: up to t = N it is the
plain mean, which has the least variance of all unbiased averages, where Adam's correction prefers
the latest values. The gain is at most 7 % of the standard deviation, at t = 1.7 N, and the
trainings can hardly be told apart. Its price is a lag, where the mean moves: the values in a plain
mean are (t - 1) / 2 steps old on average, those in Adam's average fewer.

Without a correction, the update is (1 - beta1^t) / sqrt(1 - beta2^t) times Adam's: 3.2 times in the
first step, up to 6.6 times soon after, and 3.2 times after 100 steps. RMSprop, with no first moment
to shrink it, makes a first step of 1 / sqrt(1 - alpha) = 10 lr. That is another schedule of the
learning rate, and no worse for it: the best lr is smaller.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

import fusedopt

from . import bias_figure
from .arms import backend, distance
from .digits_task import Digits

TITLE = "Bias corrections: what do the first steps see?"
FULL = {
    "steps": 100,
    "betas": (0.9, 0.999),
    "alpha": 0.99,
    "eps": 1e-8,
    # Synthetic gradients.
    "replicas": 50_000,
    "mean": 0.5,
    "variance": 1.0,
    # Digits; the losses of every step at the lr named.
    "seeds": [0, 1, 2, 3, 4],
    "batch": 32,
    "lr": 1e-3,
    "sweep": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
}
REDUCED = {"replicas": 20_000, "seeds": [0, 1], "sweep": [1e-3]}


# The optimizer and its ``bias_correction``.
ARMS: dict[str, tuple[str, str | bool | None]] = {
    "none": ("AdamW", None),
    "adam": ("AdamW", "adam"),
    "running_mean": ("AdamW", "running_mean"),
    "rmsprop_none": ("RMSprop", False),
    "rmsprop": ("RMSprop", True),
}
CORRECTED = ("adam", "running_mean", "rmsprop")


def _optimizer(
    settings: dict[str, Any], name: str, params: Any, lr: float
) -> torch.optim.Optimizer:
    optimizer, correction = ARMS[name]
    params = list(params)
    common = {
        "lr": lr,
        "eps": settings["eps"],
        "weight_decay": 0.0,
        "bias_correction": correction,
        "backend": backend(params[0].device),
    }
    if optimizer == "RMSprop":
        return fusedopt.RMSprop(params, alpha=settings["alpha"], **common)
    return fusedopt.AdamW(params, betas=settings["betas"], **common)


def run(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Follow every arm on synthetic gradients, then on the digits."""
    trainings = len(ARMS) * len({*settings["sweep"], settings["lr"]}) * len(settings["seeds"])
    bar = progress.add_task("", total=len(ARMS) + trainings)
    synthetic: dict[str, Any] = {}
    losses: dict[str, Any] = {}
    last: dict[str, Any] = {}
    for name in ARMS:
        synthetic[name] = _synthetic(settings, name)
        progress.advance(bar)
    for name in ARMS:
        last[name] = {}
        for lr in sorted({*settings["sweep"], settings["lr"]}):
            curves = [_train(settings, name, lr, seed) for seed in settings["seeds"]]
            last[name][lr] = [curve[-1] for curve in curves]
            if lr == settings["lr"]:
                losses[name] = curves
            progress.advance(bar, len(curves))
    decays = _decays(settings, "adam")
    return {
        "synthetic": synthetic,
        "ratios": {moment: _ratios(synthetic, moment) for moment in decays},
        "theory": {moment: _theory(beta, settings["steps"]) for moment, beta in decays.items()},
        "losses": losses,
        "last": last,
    }


def _synthetic(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Feed the same gradients to every arm; a replica is an element of one parameter.

    Returns:
        ``step``, the root mean square of the update over lr; ``off``, how far the update is at most
        from that of the moments; and for each moment its ``mean`` over the truth, that mean's
        ``standard_error``, and its ``deviation``: one value a step.
    """
    generator = torch.Generator().manual_seed(0)
    mean, variance = settings["mean"], settings["variance"]
    x = torch.nn.Parameter(
        torch.zeros(settings["replicas"], dtype=torch.float64, device=settings["device"])
    )
    optimizer = _optimizer(settings, name, [x], lr=1.0)
    truth = {"first": mean, "second": mean**2 + variance}
    found: dict[str, Any] = {"step": [], "off": []}
    for step in range(1, settings["steps"] + 1):
        noise = torch.randn(len(x), generator=generator, dtype=torch.float64).to(x.device)
        x.grad = mean + math.sqrt(variance) * noise
        before = x.detach().clone()
        optimizer.step()
        update = before - x.detach()
        moments = _moments(settings, name, optimizer.state[x], step)
        ratio = moments.get("first", x.grad) / (moments["second"].sqrt() + settings["eps"])
        found["step"].append(update.square().mean().sqrt().item())
        found["off"].append((update - ratio).abs().max().item())
        for moment, values in moments.items():
            entry = found.setdefault(moment, {"mean": [], "standard_error": [], "deviation": []})
            deviation = values.std().item() / truth[moment]
            entry["mean"].append(values.mean().item() / truth[moment])
            entry["standard_error"].append(deviation / math.sqrt(len(values)))
            entry["deviation"].append(deviation)
    return found


def _moments(
    settings: dict[str, Any], name: str, state: dict[str, Tensor], step: int
) -> dict[str, Tensor]:
    """Return the moments as the update uses them."""
    states = {"first": "exp_avg", "second": "exp_avg_sq"}
    if "square_avg" in state:
        states["second"] = "square_avg"
    divided = ARMS[name][1] in ("adam", True)
    return {
        moment: state[states[moment]] / (1 - beta**step if divided else 1)
        for moment, beta in _decays(settings, name).items()
    }


def _ratios(synthetic: dict[str, Any], moment: str) -> list[float]:
    """Return the standard deviation of the running mean over that of Adam's correction."""
    deviations = (synthetic[name][moment]["deviation"] for name in ("running_mean", "adam"))
    return [ours / theirs for ours, theirs in zip(*deviations, strict=True)]


def _theory(beta: float, steps: int) -> list[float]:
    """Return what these ratios are for values independent from step to step."""
    ratios, running = [], 0.0
    for step in range(1, steps + 1):
        weight, power = max(1 / step, 1 - beta), beta**step
        running = (1 - weight) ** 2 * running + weight**2
        corrected = (1 - beta) / (1 + beta) * (1 + power) / (1 - power)
        ratios.append(math.sqrt(running / corrected))
    return ratios


def _train(settings: dict[str, Any], name: str, lr: float, seed: int) -> list[float]:
    """Return the loss of all training images after every step."""
    steps, batch = settings["steps"], settings["batch"]
    task = Digits(math.ceil(steps * batch / Digits.interval), seed, settings["device"])
    model = task.model()
    optimizer = _optimizer(settings, name, model.parameters(), lr)
    losses = []
    for samples in task.order.split(batch)[:steps]:
        optimizer.zero_grad()
        task.loss(model, samples).backward()
        optimizer.step()
        losses.append(task.evaluate(model))
    return losses


def _decays(settings: dict[str, Any], name: str) -> dict[str, float]:
    """Return the decay of each moment that an arm keeps."""
    if ARMS[name][0] == "RMSprop":
        return {"second": settings["alpha"]}
    return dict(zip(("first", "second"), settings["betas"], strict=True))


def claims(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Return what the figures must show, over all steps."""
    settings, figures = result["settings"], result["figures"]
    synthetic, losses = figures["synthetic"], figures["losses"]
    bias = max(_bias(settings, synthetic, name) for name in CORRECTED)
    none = max(_bias(settings, synthetic, name) for name in ("none", "rmsprop_none"))
    ratios = figures["ratios"]
    spread, gain = max(map(max, ratios.values())), min(ratios["first"])
    off = max(
        abs(ratio - theory)
        for moment, values in ratios.items()
        for ratio, theory in zip(values, figures["theory"][moment], strict=True)
    )
    used = max(max(synthetic[name]["off"]) for name in ARMS)
    first = max(abs(synthetic[name]["step"][0] / _first(settings, name) - 1) for name in ARMS)
    adam = losses["adam"]
    near = max(1e-12, *(distance(*p) for p in zip(losses["running_mean"], adam, strict=True)))
    far = min(distance(*p) for p in zip(losses["none"], adam, strict=True))
    return [
        ("the update is lr m / (sqrt(v) + eps), off by", used, 1e-9, used <= 1e-9),
        ("corrected moments: bias, standard errors, at most", bias, 4.5, bias <= 4.5),
        ("uncorrected: off from (1 - beta^t) truth, errors, at most", none, 4.5, none <= 4.5),
        ("running mean's deviation over Adam's, at most", spread, 1.001, spread <= 1.001),
        ("first moment: where it gains most, at most", gain, 0.94, gain <= 0.94),
        ("both moments: off from theory by", off, 0.02, off <= 0.02),
        ("length of the first step, off from theory by", first, 1e-3, first <= 1e-3),
        ("digits: M1 of none over running mean's, at least", far / near, 3.0, far / near >= 3.0),
    ]


def _bias(settings: dict[str, Any], synthetic: dict[str, Any], name: str) -> float:
    """Return how far the moments' means are from what theory says, in standard errors."""
    worst = 0.0
    for moment, beta in _decays(settings, name).items():
        entry = synthetic[name][moment]
        pairs = zip(entry["mean"], entry["standard_error"], strict=True)
        for step, (mean, error) in enumerate(pairs, 1):
            truth = 1.0 if name in CORRECTED else 1 - beta**step
            worst = max(worst, abs(mean - truth) / error)
    return worst


def _first(settings: dict[str, Any], name: str) -> float:
    """Return the length of the first update over lr."""
    if name in CORRECTED:
        return 1.0
    if name == "rmsprop_none":
        return 1 / math.sqrt(1 - settings["alpha"])
    return (1 - settings["betas"][0]) / math.sqrt(1 - settings["betas"][1])


def draw(result: dict[str, Any]) -> Figure:
    """Plot bias, spread, step length and losses."""
    return bias_figure.draw(result)
