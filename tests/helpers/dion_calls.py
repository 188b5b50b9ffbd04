"""The calls that dion's optimizers make of what they do with AdamW and Lion groups.

As of ``dion/megabatch_base.py``, August 2026: states of every parameter at construction, lr as a
float32 tensor that is filled and never replaced, a task for each group, number-valued checkpoints.
Matrices are stepped by plain descent, and scalars by formulas in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Muon(Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        mu: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: Any = 0.01,
        cautious_wd: bool = False,
        epsilon: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr, "mu": mu, "beta1": betas[0], "beta2": betas[1], "weight_decay": weight_decay,
            "cautious_wd": cautious_wd, "algorithm": "muon", "step": 0, "epsilon": epsilon,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._tensors: dict[int, Tensor] = {}
        for group in self.param_groups:
            for p in group["params"]:
                self._get_or_initialize_state(p, group["algorithm"])
        self._sync_hyperparam_tensors()

    def _get_or_initialize_state(self, param: Tensor, algo: str) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
            if algo == "adamw":
                state["variance"] = torch.zeros_like(param)
        if algo == "adamw" and "step_dev" not in state:
            state["step_dev"] = torch.zeros((), dtype=torch.float32, device=param.device)
        return state

    def _sync_hyperparam_tensors(self) -> None:
        for index, group in enumerate(self.param_groups):
            value, tensor = group["lr"], self._tensors.get(index)
            if value is tensor:
                continue
            if tensor is None:
                device = group["params"][0].device
                tensor = self._tensors[index] = torch.empty((), device=device)
            tensor.fill_(float(value))
            group["lr"] = tensor

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._sync_hyperparam_tensors()
        groups: dict[str, list[dict[str, Any]]] = {"muon": [], "lion": [], "adamw": []}
        for group in self.param_groups:
            group["step"] += 1
            groups[group["algorithm"]].append(group)
        ortho = self._create_ortho_tasks(groups["muon"])
        lion = self._create_lion_tasks(groups["lion"])
        adamw = self._create_adamw_tasks(groups["adamw"])
        for _ in chain(ortho, lion, adamw):
            pass
        return loss

    def _create_ortho_tasks(self, param_groups: list[dict[str, Any]]) -> Iterator[None]:
        for group in param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)
            yield

    def _create_adamw_tasks(self, param_groups: list[dict[str, Any]]) -> Iterator[None]:
        for group in param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._get_or_initialize_state(p, "adamw")
                t = state["step_dev"].add_(1)
                m = state["momentum"].lerp_(p.grad, 1 - group["beta1"])
                v = state["variance"].mul_(group["beta2"])
                v.addcmul_(p.grad, p.grad, value=1 - group["beta2"])
                root = (v / (1 - group["beta2"] ** t)).sqrt() + group["epsilon"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] / (1 - group["beta1"] ** t) * m / root)
            yield

    def _create_lion_tasks(self, param_groups: list[dict[str, Any]]) -> Iterator[None]:
        for group in param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self._get_or_initialize_state(p, "lion")["momentum"]
                sign = m.lerp(p.grad, 1 - group["beta1"]).sign_()
                m.lerp_(p.grad, 1 - group["beta2"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * sign)
            yield

    def state_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = super().state_dict()
        for group in saved["param_groups"]:
            for key, value in group.items():
                if key != "params" and isinstance(value, Tensor) and value.ndim == 0:
                    group[key] = value.item()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._sync_hyperparam_tensors()
