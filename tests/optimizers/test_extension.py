"""The extension point: an optimizer written outside the package has every feature."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedopt
from fusedopt.backends import triton as backend
from fusedopt.examples import signum
from fusedopt.kernels.rules import REGISTRY, register
from fusedopt.testing import compare

ROOT = Path(__file__).resolve().parents[2]


def signum_by_hand(p, m, g, group):
    """The published algorithm, in float64, for one tensor."""
    m = group["momentum"] * m + (1 - group["momentum"]) * g
    return p - group["lr"] * torch.sign(m), m


@pytest.mark.parametrize("backend_name", ["triton", "reference"])
def test_signum_is_the_published_algorithm(backend_name, device):
    start = torch.randn(50, dtype=torch.float64, device=device)
    p = torch.nn.Parameter(start.clone())
    hyper = {"lr": 0.1, "momentum": 0.8}
    optimizer = signum.Signum([p], **hyper, backend=backend_name)
    expected, m = start.clone(), torch.zeros_like(start)
    for _ in range(4):
        p.grad = torch.randn_like(p)
        expected, m = signum_by_hand(expected, m, p.grad, hyper)
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], m, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(expected, start)


def test_signum_takes_under_forty_lines_and_touches_nothing_else():
    text = (ROOT / "examples" / "signum.py").read_text()
    assert len([line for line in text.splitlines() if line.strip()]) < 40
    for path in [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "fusedopt").glob("*.py")]:
        assert "signum" not in path.read_text().lower(), path


def test_signum_has_clipping_one_launch_and_checkpoints(monkeypatch, device):
    programs = []
    run = backend.launch

    def counting(kernel, *arguments, **meta):
        programs.append(kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__)
        run(kernel, *arguments, **meta)

    monkeypatch.setattr(backend, "launch", counting)
    params = [torch.nn.Parameter(torch.randn(n, device=device)) for n in (3, 5, 7)]
    groups = [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "momentum": 0.5}]
    optimizer = signum.Signum(groups, clip=fusedopt.GlobalNorm(1.0), backend="triton")
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert sorted(programs) == ["clip_factor", "partial_norms", "update_tensors"]
    norm = torch.cat([p.grad for p in params]).norm()
    torch.testing.assert_close(optimizer.clip.last, norm)
    torch.testing.assert_close(
        optimizer.state[params[0]]["momentum_buffer"],
        0.1 * params[0].grad / norm,
        rtol=1e-5,
        atol=0,
    )

    twins = copy.deepcopy(params)
    other = signum.Signum(twins, backend="triton")
    other.param_groups[:] = []
    other.add_param_group({"params": twins[:1]})
    other.add_param_group({"params": twins[1:]})
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, twins, strict=True):
        q.grad = p.grad
    optimizer.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_signum_is_verified_like_the_built_in_rules(device):
    assert REGISTRY["Signum"] is signum.SIGNUM
    for group in signum.SIGNUM.example_groups:
        found = compare(signum.SIGNUM, group, torch.bfloat16, device)
        assert found.passed and found.moved


def test_two_rules_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="Signum"):
        register(fusedopt.Rule("Signum", None, None, None, None, (), 0))


def test_the_example_in_the_documentation_runs(tmp_path):
    text = (ROOT / "docs/extending.md").read_text()
    (example,) = re.findall(r"```python\n(import torch, fusedopt\n.*?)```", text, re.DOTALL)
    check = """
p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
p.grad = torch.tensor([0.5, -2.0, 0.0, 1e-30])
SignSGD([p], lr=0.5, backend="triton").step()
assert p.tolist() == [0.5, 2.5, 3.0, 3.5], p
SignSGD([p], lr=0.5, backend="reference").step()
assert p.tolist() == [0.0, 3.0, 3.0, 3.0], p
"""
    script = tmp_path / "example.py"
    script.write_text(example + check)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, str(script)], env=environment, check=True)
