"""The table of algorithms, of docs/algorithms.md: ``python -m tools.algorithm_table [--write]``.

Every algorithm that the project has, with the document it comes from, where it lives and what
checks it. The files are found from the code: of a rule from the registry, where the group that
makes it this algorithm has to be among the rule's examples, over which the tests, ``verify`` and
``codegen`` run; of anything else by its name.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusedopt.kernels.rule import Rule
from fusedopt.kernels.rules import REGISTRY
from tools.readme import ROOT, Section

RMSPROP_AND_ADAM = "McAllester, TTIC 31230, RMSProp and Adam"
MOMENTUM = "McAllester, TTIC 31230, SGD with Momentum"
OPTIMIZATION = "Aitchison, EMAT31530 part 6"
SDES = "Malladi et al. 2022, arXiv 2205.10287"


@dataclass(frozen=True)
class Row:
    """An algorithm.

    Attributes:
        name: its number, by the document.
        algorithm: what it is called.
        source: the document.
        use: how it is had, as code.
        checks: tests, as ``file::function`` without folder and ``.py``, and experiments.
        rule: a rule's name in the registry, if it is one.
        group: what of a parameter group makes the rule this algorithm.
        lives: otherwise, the dotted names of what it is in.
    """

    name: str
    algorithm: str
    source: str
    use: str
    checks: tuple[str, ...]
    rule: str | None = None
    group: Mapping[str, Any] = field(default_factory=dict)
    lives: tuple[str, ...] = ()


ROWS = (
    Row(
        "000-a", "RMSProp", RMSPROP_AND_ADAM, "RMSprop(alpha=1 - 1/N)",
        ("test_variants_rmsprop::test_horizon", "test_trajectories::test_reference"),
        rule="RMSprop",
    ),
    Row(
        "000-b", "RMSProp, centred", RMSPROP_AND_ADAM, "RMSprop(centered=True)",
        ("test_trajectories::test_reference", "test_by_hand::test_by_hand"),
        rule="RMSprop", group={"centered": True},
    ),
    Row(
        "000-c", "RMSProp with momentum", RMSPROP_AND_ADAM, "RMSprop(momentum=0.9)",
        ("test_trajectories::test_reference", "test_by_hand::test_by_hand"),
        rule="RMSprop", group={"momentum": any},
    ),
    Row(
        "000-d", "RMSProp (2): divided by the variance", RMSPROP_AND_ADAM,
        'RMSprop(denominator="variance")',
        (
            "test_variants_rmsprop::test_variance_denominator_is_free_of_the_parameters_unit",
            "experiments.denominator",
        ),
        rule="RMSprop", group={"denominator": "variance"},
    ),
    Row(
        "000-e", "Adam", RMSPROP_AND_ADAM, "Adam()",
        ("test_trajectories::test_reference", "test_by_hand::test_by_hand"),
        rule="Adam", group={"bias_correction": "adam", "decoupled_weight_decay": False},
    ),
    Row(
        "000-f", "Adam (simplified): running means", RMSPROP_AND_ADAM,
        'Adam(bias_correction="running_mean")',
        (
            "test_variants_adam::test_running_mean_is_the_plain_mean_up_to_the_horizon",
            "experiments.bias_corrections",
        ),
        rule="Adam", group={"bias_correction": "running_mean"},
    ),
    Row(
        "000-g", "step size decoupled from eps", RMSPROP_AND_ADAM,
        "scaling.epsilon_decoupled_lr(eta0, eps)",
        ("test_conversions::test_epsilon_decoupled_lr",),
        lives=("fusedopt.scaling.epsilon_decoupled_lr",),
    ),
    Row(
        "000-h", "Decoupled Adam: mean of per-sample squares", RMSPROP_AND_ADAM,
        "BatchDecoupledAdam(virtual_batch_size=1)",
        (
            "test_batch_decoupled::test_adam_is_the_mean_over_all_subsets",
            "experiments.digits",
        ),
        rule="BatchDecoupledAdam", group={"mean_weight": 0.0},
    ),
    Row(
        "002-a", "minibatch SGD", OPTIMIZATION, "SGD()",
        ("test_trajectories::test_reference", "test_by_hand::test_by_hand"),
        rule="SGD",
    ),
    Row(
        "002-b", "momentum, lr outside or inside the velocity", f"{OPTIMIZATION}; {MOMENTUM}",
        'SGD(momentum=0.9, momentum_form="velocity")',
        ("test_variants_momentum::test_velocity_is_torchs_form_at_constant_lr_only",),
        rule="SGD", group={"momentum": any, "momentum_form": "velocity"},
    ),
    Row(
        "002-c", "averaged momentum", OPTIMIZATION, 'SGD(momentum=0.9, momentum_form="ema")',
        ("test_variants_momentum::test_averaged_momentum_is_torchs_at_lr_times_one_minus_mu",),
        rule="SGD", group={"momentum": any, "momentum_form": "ema"},
    ),
    Row(
        "002-d", "lr of the average from that of the velocity", OPTIMIZATION,
        "scaling.average_lr(lr, momentum)",
        ("test_conversions::test_average_and_sum_take_the_same_steps",),
        lives=("fusedopt.scaling.average_lr",),
    ),
    Row(
        "002-e", "RMSProp with bias correction", OPTIMIZATION, "RMSprop(bias_correction=True)",
        (
            "test_variants_rmsprop::test_bias_correction_makes_constant_gradients_exact",
            "experiments.bias_corrections",
        ),
        rule="RMSprop", group={"bias_correction": True},
    ),
    Row(
        "002-f", "AdamW", OPTIMIZATION, "AdamW()",
        ("test_trajectories::test_reference", "test_by_hand::test_by_hand"),
        rule="Adam", group={"decoupled_weight_decay": True},
    ),
    Row(
        "002-g", "exponential moving average, its weights' sum", OPTIMIZATION,
        "Adam(bias_correction=None)",
        ("test_variants_adam::test_weights_of_an_average",),
        rule="Adam", group={"bias_correction": None}, lives=("fusedopt.kernels.rules.averages",),
    ),
    Row(
        "003-a", "momentum as a running average over N steps", MOMENTUM,
        "scaling.beta_from_horizon(N), horizon_from_beta(beta)",
        ("test_conversions::test_momentum_is_a_running_average",),
        lives=("fusedopt.scaling.beta_from_horizon",),
    ),
    Row(
        "003-b", "temperature rule", MOMENTUM,
        "scaling.temperature_lr(eta0, momentum, batch_size)",
        ("experiments.temperature",),
        lives=("fusedopt.scaling.temperature_lr",),
    ),
    Row(
        "003-c", "total-effect rule", MOMENTUM,
        "scaling.temperature_lr(eta0, momentum, batch_size)",
        ("test_conversions::test_total_effect_of_one_sample",),
        lives=("fusedopt.scaling.temperature_lr",),
    ),
    Row(
        "004-a", "square-root rule, RMSprop", SDES, 'scaling.rescale(..., rule="sqrt")',
        ("test_scaling::test_four_times_the_batch", "experiments.svag"),
        lives=("fusedopt.scaling.rescale",),
    ),
    Row(
        "004-b", "square-root rule, Adam", SDES, 'scaling.rescale(..., rule="sqrt")',
        ("test_scaling::test_four_times_the_batch", "experiments.square_root"),
        lives=("fusedopt.scaling.rescale",),
    ),
    Row(
        "004-c", "SVAG for adaptive methods", SDES, "SVAG(optimizer, ell)",
        ("test_svag::test_moments_of_the_mixed_gradient", "experiments.svag"),
        rule="SVAG Adam", lives=("fusedopt.SVAG",),
    ),
    Row(
        "004-d", "SDE of RMSprop and Adam", SDES, "python -m experiments svag",
        ("test_experiments_svag::test_solver_on_ornstein_uhlenbeck", "experiments.svag"),
        lives=("experiments.sde",),
    ),
    Row(
        "004-e", "noise against signal", SDES, "statistics.noise_scale()",
        ("test_noise_scale::test_noise_scale_is_unbiased", "experiments.noise_signal"),
        lives=("fusedopt.statistics.Statistics",),
    ),
    Row(
        "2402.18824", "batch-size invariant Adam, micro-batches",
        "Wang and Aitchison 2024, arXiv 2402.18824",
        "BatchDecoupledAdam(statistics=MicroBatchSquares())",
        ("test_variants_statistics::test_micro_batches", "experiments.digits"),
        rule="BatchDecoupledAdam",
        lives=("fusedopt.MicroBatchSquares", "fusedopt.scaling.rescale"),
    ),
    Row(
        "new", "virtual batch", "this project", "BatchDecoupledAdam(virtual_batch_size=b)",
        (
            "test_batch_decoupled::test_adam_is_the_mean_over_all_subsets",
            "test_batch_decoupled::test_whole_batch_is_the_plain_optimizer_bitwise",
            "experiments.digits",
        ),
        rule="BatchDecoupledAdam", group={"mean_weight": any, "square_weight": any},
    ),
    Row(
        "2302.06675", "Lion", "Chen et al. 2023, arXiv 2302.06675", "Lion()",
        ("test_published::test_lion",),
        rule="Lion",
    ),
    Row(
        "2405.15682", "schedule-free AdamW", "Defazio et al. 2024, arXiv 2405.15682",
        "ScheduleFreeAdamW()",
        ("test_published::test_schedule_free", "test_schedule_free::test_there_and_back"),
        rule="ScheduleFreeAdamW", lives=("fusedopt.ScheduleFreeAdamW",),
    ),
    Row(
        "2506.02285", "AdamC: corrected decay", "Defazio 2025, arXiv 2506.02285",
        "AdamC(max_lr=...)",
        ("test_published::test_adam_c", "test_published::test_weights_settle_at_one_size"),
        rule="AdamC", group={"corrected_decay": True}, lives=("fusedopt.kernels.rules.adam_c",),
    ),
)  # fmt: skip


def example(row: Row) -> Mapping[str, Any] | None:
    """Return the example group of the row's rule that is this algorithm, or None."""
    assert row.rule is not None
    for group in REGISTRY[row.rule].example_groups:
        if all(_agrees(group[name], wanted) for name, wanted in row.group.items()):
            return group
    return None


def _agrees(value: Any, wanted: Any) -> bool:
    # Of a number, that it is there at all: its value is a matter of tuning.
    return bool(value) if wanted is any else value == wanted


def files(row: Row) -> list[str]:
    """Return where a row lives, as paths in the repository."""
    found = [file_of_rule(REGISTRY[row.rule])] if row.rule is not None else []
    return [*found, *map(_file_of_name, row.lives)]


def file_of_rule(rule: Rule) -> str:
    """Return where a rule's update is stated."""
    module = rule.update.fn.__module__
    return module.removeprefix("fusedopt.").replace(".", "/") + ".py"


def _file_of_name(name: str) -> str:
    try:
        thing: Any = importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        thing = getattr(importlib.import_module(module), attribute)
    path = Path(inspect.getsourcefile(thing) or "").resolve()
    return str(path.relative_to(ROOT))


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| | algorithm | from | use | lives in | checked by |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        lives = ", ".join(f"[{Path(file).name}]({file})" for file in dict.fromkeys(files(row)))
        checks = ", ".join(_check(check) for check in row.checks)
        cells = row.name, row.algorithm, row.source, f"`{row.use}`", lives, checks
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _check(check: str) -> str:
    if check.startswith("experiments."):
        path = check.replace(".", "/") + ".py"
        return f"[experiment {check.rpartition('.')[2]}]({path})"
    file, _, function = check.partition("::")
    return f"[{function.removeprefix('test_')}]({file_of_tests(file)})"


def file_of_tests(name: str) -> str:
    """Return where tests are, by their file's name, which is one of a kind."""
    (path,) = (ROOT / "tests").rglob(f"{name}.py")
    return path.relative_to(ROOT).as_posix()


SECTION = Section("algorithms", "the table of algorithms", table, "docs/algorithms.md")

if __name__ == "__main__":
    sys.exit(SECTION.main())
