"""dion's optimizers of matrices, whose AdamW and Lion groups fusedopt updates, each in one launch.

    class Muon(FusedScalars, dion.Muon):
        pass

    optimizer = Muon([
        {"params": matrices},
        {"params": embeddings_and_heads, "algorithm": "adamw", "lr": 3e-4},
    ])

For Muon, NorMuon, Dion2, NorDion2 and Dion3. Groups, states, checkpoints and schedulers stay as
they are: fusedopt is handed dion's own tensors at each step, learning rate and step count included,
and reads them on the device.
"""

from __future__ import annotations

from typing import Any

import fusedopt


class FusedScalars:
    """Goes in front of the class of dion's."""

    # backend= and clip= of fusedopt's classes; the norm is that of one algorithm's parameters. What
    # options of precision keep would be in no checkpoint of dion's.
    scalar_options: dict = {}
    _get_or_initialize_state: Any

    def _create_adamw_tasks(self, param_groups):
        self._step_scalars(fusedopt.AdamW, param_groups)
        return iter(())

    def _create_lion_tasks(self, param_groups):
        self._step_scalars(fusedopt.Lion, param_groups)
        return iter(())

    def _step_scalars(self, kind, param_groups):
        groups = [_translated(kind, group) for group in param_groups if group["params"]]
        if not groups:
            return
        more = sorted(self.scalar_options.keys() - {"backend", "clip"})
        if more:
            raise ValueError(f"scalar_options has {more[0]!r}, which dion keeps no state for")
        # In no checkpoint: it has nothing of its own.
        fused = self.__dict__.setdefault("_fused", {})
        if kind not in fused or len(fused[kind].param_groups) != len(groups):
            fused[kind] = kind(groups, capturable=True, **self.scalar_options)
        optimizer = fused[kind]
        for own, group in zip(optimizer.param_groups, groups, strict=True):
            own.update(group)
            for p in group["params"]:
                self._lend(kind, optimizer.state, p)
        optimizer.step()

    def _lend(self, kind, states, p):
        algorithm = "adamw" if kind is fusedopt.AdamW else "lion"
        theirs = self._get_or_initialize_state(p, algorithm)
        lent = {"exp_avg": theirs["momentum"]}
        if algorithm == "adamw":
            lent |= {"exp_avg_sq": theirs["variance"], "step": theirs["step_dev"]}
        state = states.get(p)
        if state is None:
            states[p] = lent
        elif any(state[name] is not value for name, value in lent.items()):
            # A checkpoint was loaded.
            state.update(lent)


def _translated(kind, group):
    if group.get("cautious_wd"):
        raise ValueError(f"cautious_wd is not an option of fusedopt.{kind.__name__}: leave it out")
    names = {"params": "params", "lr": "lr", "weight_decay": "weight_decay"}
    if kind is fusedopt.AdamW:
        names["epsilon"] = "eps"
    found = {ours: group[theirs] for theirs, ours in names.items()}
    return {**found, "betas": (float(group["beta1"]), float(group["beta2"]))}
