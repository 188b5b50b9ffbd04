"""The documentation: its code runs, its commands exist, and its links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedopt

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "native/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


def blocks(page: str, kind: str) -> list[str]:
    """Return what stands between fences of a kind."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def applied(diff: str) -> str:
    """Return the code that a diff leads to; what it leaves out is left out."""
    lines = [line for line in diff.splitlines() if line and line[0] in " +"]
    return "\n".join(line[1:] for line in lines if line.strip() != "...")


def python_of(page: str) -> Iterator[str]:
    yield from blocks(page, "python")
    yield from map(applied, blocks(page, "diff"))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    # Catches a file that was moved without the pages that name it.
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [target for target in targets if "://" not in target]
    missing = [t for t in local if not ((ROOT / page).parent / t).exists()]
    assert not missing


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group, as torchrun would have made one."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if any(python_of(page))])
def test_python_runs(page: str, request: pytest.FixtureRequest) -> None:
    """Block after block, as a reader would paste them, with a model and batches at hand."""
    if any("torch.distributed" in code for code in python_of(page)):
        request.getfixturevalue("one_process")
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    space = {
        "torch": torch,
        "fusedopt": fusedopt,
        "model": model,
        "pairs_of_batches": [(torch.randn(5, 4), torch.randn(5, 4))],
    }

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().mean()

    for code in python_of(page):
        # What the text has before it: a loss, and where squares are asked for, a batch that is in.
        space["loss"] = loss_of if "loss(first)" in code else loss_of(torch.randn(5, 4))
        if "noise_scale" in code and "statistics" in space:
            loss_of(torch.randn(5, 4)).backward()
        exec(compile(code, page, "exec"), space)
        statistics = space.pop("statistics", None)
        if isinstance(statistics, fusedopt.PerSampleSquares):
            if "noise_scale" not in "".join(python_of(page)):
                statistics.remove()
            else:
                space["statistics"] = statistics


def commands() -> list[str]:
    shell = [line for page in PAGES for kind in ("", "sh", "bash") for line in _shell(page, kind)]
    return sorted(set(shell))


def _shell(page: str, kind: str) -> list[str]:
    lines = [
        line.split("#")[0].strip() for block in blocks(page, kind) for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith(("make ", "python -m "))]


@pytest.mark.parametrize("command", commands())
def test_commands_exist(command: str) -> None:
    # Catches a target or a module that was renamed.
    words = command.split()
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[2] == "fusedopt":
        assert words[3] in importlib.import_module("fusedopt.__main__").COMMANDS
    else:
        sys.path.append(str(ROOT))
        assert importlib.util.find_spec(words[2]) is not None


C = """
#include <stdint.h>
#include <stdio.h>
#include <fusedopt.h>
void run(fusedopt_context *context, size_t n, int64_t *numel, void **params, void **grads,
         void **exp_avg, void **exp_avg_sq, int64_t step, void *stream)
{
%s
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "c")])
def test_c_compiles(page: str, tmp_path: Path) -> None:
    for code in blocks(page, "c"):
        if "fusedopt_context *context;" in code:
            code = code.replace("fusedopt_context *context;", "")
        (tmp_path / "page.c").write_text(C % code)
        command = ["cc", "-std=c11", "-fsyntax-only", f"-I{ROOT}/native/include"]
        done = subprocess.run([*command, tmp_path / "page.c"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
