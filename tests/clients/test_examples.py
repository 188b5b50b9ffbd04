"""The examples that need nothing but torch, as a user runs them, shortened."""

from __future__ import annotations

import re

from scripts import ROOT, losses, run_example

# What tests/ecosystem runs, and what has tests of its own.
ELSEWHERE = {"hugging_face", "lightning_module", "char_gpt", "signum", "dion_scalars"}
HERE = {"plain_loop", "fsdp2", "batch_size"}


def test_every_example_is_run_somewhere() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("[!_]*.py")}
    assert names == HERE | ELSEWHERE


def test_plain_loop() -> None:
    printed = run_example("plain_loop", "--steps", "60")
    seen = losses(printed)
    assert len(seen) == 5 and seen[-1] < 0.5 * seen[0]
    assert len(re.findall(r"norm [\d.]+$", printed, re.MULTILINE)) == 5


def test_fsdp2_in_two_processes() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    seen = losses(run_example("fsdp2", "--steps", "20", launcher=launcher))
    assert len(seen) == 5 and seen[-1] < seen[0]


def test_batch_size() -> None:
    printed = run_example("batch_size", "--samples", "1600")
    root, decoupled = (float(x) for x in re.findall(r"at most ([\d.]+)% apart", printed))
    assert decoupled < 0.2 * root
