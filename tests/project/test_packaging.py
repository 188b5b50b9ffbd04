"""What an installation contains, and what it leaves alone.

The kernels live at the top of the repository and reach the package through a link, so each way to
install has its own way to lose them, or to put a top-level ``kernels`` or ``tests`` on a user's
import path. Every installation is therefore made for real, in an environment of its own, and
looked at from an empty directory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("packaging")

ROOT = Path(__file__).resolve().parents[2]
# Directories of the repository that must not become top-level packages of a user's environment.
PRIVATE = ["bench", "cmake", "docs", "examples", "experiments", "kernels", "native", "tests"]
PRIVATE += ["tools"]
# What a tree without git leaves out of a copy; with git, .gitignore decides.
GENERATED = [".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"]

for _tool in ("pip", "setuptools"):
    if importlib.util.find_spec(_tool) is None:
        pytest.skip(f"building needs {_tool}", allow_module_level=True)


def attempt(*command, cwd, **settings):
    """Run a command that sees none of this process's Python and pip settings."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | offline | {"PYTHONDONTWRITEBYTECODE": "1"} | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run(*command, cwd, **settings):
    """Run a command as ``attempt`` does, which has to succeed; return its stdout."""
    done = attempt(*command, cwd=cwd, **settings)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_repository(target):
    """Copy what git has or would add, links as links: a build litters the tree it runs in."""
    if not (ROOT / ".git").exists():
        shutil.copytree(ROOT, target, symlinks=True, ignore=shutil.ignore_patterns(*GENERATED))
        return
    # The clone may belong to another user, as in a container.
    git = ["git", "-c", f"safe.directory={ROOT}"]
    listing = run(*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listing.split("\0")):
        source = ROOT / name
        if source.is_symlink() or source.exists():  # else deleted, but not yet in the index
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    target = tmp_path_factory.mktemp("checkout") / "repository"
    copy_repository(target)
    return target


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory):
    """A directory with everything importable here but fusedopt.

    Links to the packages and not the directories that hold them: what is installed there of
    fusedopt itself would answer in place of the installation under test.
    """
    target = tmp_path_factory.mktemp("dependencies")
    for directory in map(Path, sys.path):
        if directory.name not in ("site-packages", "dist-packages"):
            continue
        for entry in directory.iterdir():
            ours = entry.name.startswith(("fusedopt", "__editable__", "__pycache__"))
            if not ours and entry.name not in PRIVATE and entry.suffix != ".pth":
                link = target / entry.name
                if not link.is_symlink():
                    link.symlink_to(entry)
    return target


@pytest.fixture(scope="module")
def new_environment(tmp_path_factory, dependencies):
    """Make an environment that has the dependencies, and return its interpreter."""

    def make(name):
        target = tmp_path_factory.mktemp(f"environment-{name}")
        venv.create(target, with_pip=False, symlinks=True)
        (site_packages,) = target.glob("lib/python3*/site-packages")
        (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
        return target / "bin" / "python"

    return make


def to_wheel(source, target):
    """Return the command that builds a wheel."""
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", target]
    return sys.executable, "-m", "pip", "wheel", *options, source


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    run(*to_wheel(checkout, target), cwd=target)
    (built,) = target.glob("*.whl")
    return built


def to_sdist(target):
    """Return the command that builds a source archive of the current directory."""
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    return sys.executable, "-c", build, target


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    target = tmp_path_factory.mktemp("sdist")
    run(*to_sdist(target), cwd=checkout)
    (built,) = target.glob("*.tar.gz")
    return built


LOOK = """
import importlib.metadata, importlib.resources, importlib.util, json, sys
import fusedopt
from fusedopt.kernels import launch_config
if importlib.util.find_spec("triton"):
    import fusedopt.kernels.multi_tensor
entries = importlib.metadata.entry_points(group="console_scripts", name="fusedopt")
print(json.dumps({
    "package": fusedopt.__file__,
    "kernels": fusedopt.kernels.__file__,
    "version": fusedopt.__version__,
    "installed version": importlib.metadata.version("fusedopt"),
    "typed": importlib.resources.files("fusedopt").joinpath("py.typed").is_file(),
    "launch configs": launch_config.load(launch_config.TUNED),
    "commands": [callable(entry.load()) for entry in entries],
    "exposed": [name for name in sys.argv[1:] if importlib.util.find_spec(name)],
}))
"""


@pytest.fixture(scope="module", params=["wheel", "sdist", "editable"])
def installed(request, checkout, new_environment, tmp_path_factory):
    """Install in one of the ways, and return what Python sees from an empty directory."""
    editable = request.param == "editable"
    what = ["-e", checkout] if editable else [request.getfixturevalue(request.param)]
    python = new_environment(request.param)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    options = ["--no-deps", "--no-build-isolation", "--no-compile"]
    run(python, "-m", "pip", "install", *options, *what, cwd=elsewhere)
    # -I leaves the current directory and the environment's variables out of the import path.
    seen = json.loads(run(python, "-I", "-c", LOOK, *PRIVATE, cwd=elsewhere))
    home = checkout if editable else python.parents[1]
    return seen, home


def test_kernels_are_installed_inside_the_package(installed):
    seen, home = installed
    assert Path(seen["package"]).is_relative_to(home)
    assert Path(seen["kernels"]) == Path(seen["package"]).parent / "kernels" / "__init__.py"


def test_version_is_the_package_s(installed):
    seen, _ = installed
    assert seen["version"] == seen["installed version"]


def test_types_are_announced(installed):
    seen, _ = installed
    assert seen["typed"]


def test_the_table_of_launch_configs_is_installed(installed, checkout):
    seen, _ = installed
    table = checkout / "kernels" / "tuned.json"
    assert seen["launch configs"] == json.loads(table.read_text())["entries"]


def test_command_is_installed(installed):
    seen, _ = installed
    assert seen["commands"] == [True]


def test_no_other_package_is_exposed(installed):
    seen, _ = installed
    assert seen["exposed"] == []


def python_files(checkout, directory):
    return {str(path.relative_to(checkout)) for path in (checkout / directory).rglob("*.py")}


def test_wheel_holds_the_package_and_nothing_else(wheel, checkout):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert {name.split("/")[0] for name in names} == {"fusedopt", info}
    assert f"{info}/licenses/LICENSE" in names
    linked = python_files(checkout, "kernels") | python_files(checkout, "examples")
    assert len(linked) > 1
    assert {f"fusedopt/{name}" for name in linked} <= names
    assert "fusedopt/kernels/tuned.json" in names
    assert not [name for name in names if "tests" in name.split("/") or name.endswith(".pyc")]


def test_sdist_holds_the_project(sdist, checkout):
    with tarfile.open(sdist) as archive:
        members = archive.getnames()
    names = {name.partition("/")[2] for name in members}
    files = {"LICENSE", "README.md", "CONTRIBUTING.md", "Makefile", "constraints.txt"}
    files |= {"constraints-ecosystem.txt", "CMakeLists.txt", "setup.py", "docs/batch_size.md"}
    folders = "fusedopt", "kernels", "tests", "bench", "experiments", "tools"
    assert files.union(*(python_files(checkout, name) for name in folders)) <= names
    left_out = {".venv", ".venv-ecosystem", ".git", "build", "dist"}
    assert not left_out & {name.split("/")[0] for name in names}


@pytest.mark.parametrize("lost", [("kernels", "examples"), ("kernels",), ("examples",)])
def test_a_checkout_without_its_links_is_not_built(lost, tmp_path):
    # Catches a wheel without kernels, in silence: where links are not allowed, an archive or git
    # leaves text files in their place.
    source, target = tmp_path / "repository", tmp_path / "built"
    target.mkdir()
    copy_repository(source)
    for name in lost:
        link = source / "fusedopt" / name
        text = os.readlink(link)
        link.unlink()
        link.write_text(text)
    for command, cwd in ((to_wheel(source, target), tmp_path), (to_sdist(target), source)):
        done = attempt(*command, cwd=cwd)
        assert done.returncode != 0
        (line,) = [x for x in (done.stdout + done.stderr).splitlines() if "cannot be built" in x]
        assert f"fusedopt/{lost[0]} has to be a link to {lost[0]}" in line
        assert not any(target.iterdir())


@pytest.fixture(scope="module")
def from_checkout(checkout, new_environment, tmp_path_factory):
    """Run code with the checkout on PYTHONPATH, nothing installed, from an empty directory."""
    python = new_environment("bare")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []

    def run_code(code):
        return run(python, *safe_path, "-c", code, cwd=elsewhere, PYTHONPATH=str(checkout))

    return run_code


def test_checkout_works_without_an_install(from_checkout, checkout):
    code = "import fusedopt.kernels.multi_tensor as m; print(m.__name__, m.__file__)"
    name, file = from_checkout(code).split()
    assert name == "fusedopt.kernels.multi_tensor"
    assert Path(file) == checkout / "fusedopt" / "kernels" / "multi_tensor.py"


WITHOUT_TRITON = """
import sys
# An import of a name that is None here fails as it does where the module is not installed.
sys.modules["triton"] = None
import fusedopt, torch
missing = [name for name in fusedopt.__all__ if not hasattr(fusedopt, name)]
assert not missing, missing
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
fusedopt.AdamW([p], lr=0.5, weight_decay=0.0).step()
assert torch.allclose(p, torch.full((3,), 0.5)), p
"""


def test_works_without_triton(from_checkout):
    from_checkout(WITHOUT_TRITON)


def test_import_is_light(from_checkout):
    # The command line and the demo need these; a training script that imports fusedopt does not.
    code = "import fusedopt, sys; print([m for m in ('matplotlib', 'rich') if m in sys.modules])"
    assert from_checkout(code).strip() == "[]"
