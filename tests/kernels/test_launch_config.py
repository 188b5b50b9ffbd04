"""The table of block and thread numbers: what is read, refused, written, and used by launches."""

from __future__ import annotations

import json

import pytest
import torch

import fusedopt
from fusedopt.backends import triton as backend
from fusedopt.kernels import aot, launch_config, multi_tensor
from fusedopt.kernels.aot import update
from fusedopt.kernels.launch_config import LaunchConfig, update_launch_config
from fusedopt.kernels.rules import REGISTRY

ENTRY = {"architecture": "cuda:90", "rule": "Adam", "types": "fp32", "block": 2048, "threads": 256}
FP32 = ("fp32",) * 4
DEFAULT = LaunchConfig(multi_tensor.BLOCK, multi_tensor.THREADS)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A table with one entry, in the place of the committed one."""
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(launch_config, "TUNED", path)
    launch_config.save(path, [ENTRY])
    yield path
    launch_config._tuned.cache_clear()


def test_the_committed_table_is_of_rules_that_there_are():
    for entry in launch_config.load(launch_config.TUNED):
        assert entry["rule"] in REGISTRY
        assert aot.architecture(aot.parse_target(entry["architecture"])) == entry["architecture"]


def test_an_entry_is_for_its_architecture_rule_and_types_alone(tuned):
    # Catches a key that leaves one of the three out, or a tuned shape for scalar accesses.
    assert update_launch_config("cuda:90", "Adam", FP32, True) == LaunchConfig(2048, 256)
    assert update_launch_config("cuda:80", "Adam", FP32, True) == DEFAULT
    assert update_launch_config("", "Adam", FP32, True) == DEFAULT
    assert update_launch_config("cuda:90", "SGD", FP32, True) == DEFAULT
    mixed = ("fp32", "bf16", "fp32", "fp32")
    assert update_launch_config("cuda:90", "Adam", mixed, True) == DEFAULT
    unaligned = update_launch_config("cuda:90", "Adam", FP32, False)
    assert unaligned == LaunchConfig(multi_tensor.UNALIGNED_BLOCK, multi_tensor.THREADS)


def test_what_is_compiled_ahead_of_time_is_what_is_launched(tuned):
    variants = {v.name: v for v in update.variants("cuda:90")}
    adam = variants["Adam fp32"]
    assert (adam.constants["BLOCK"], adam.block, adam.threads) == (2048, 2048, 256)
    others = {v.name: v for v in update.variants("cuda:80")}
    assert others["Adam fp32"].threads == DEFAULT.threads
    assert variants["SGD fp32"].constants["BLOCK"] == DEFAULT.block


def test_launches_take_it(tuned, monkeypatch):
    """Values, number of programs and threads are those of the entry, over whole and cut chunks."""
    monkeypatch.setattr(backend, "device_architecture", lambda device: "cuda:90")
    launches = []
    real = backend.launch

    def launch(kernel, programs, threads, *arguments, **meta):
        launches.append((programs, threads, meta["BLOCK"]))
        real(kernel, programs, threads, *arguments, **meta)

    monkeypatch.setattr(backend, "launch", launch)
    start = [torch.randn(n) for n in (2048, 2049, 5)]
    gradients = [torch.randn_like(x) for x in start]
    results = []
    for name in ("triton", "reference"):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient.clone()
        fusedopt.Adam(params, backend=name).step()
        results.append(params)
    assert launches == [(4, 256, 2048)]
    for ours, reference, before in zip(*results, start, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-7)
        assert not torch.equal(ours, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 1000}, "power of two"),
        ({"threads": 32}, "power of two from 64"),
        ({"threads": 1024, "block": 2048}, "less than 16 bytes"),
        ({"types": "bf16", "block": 1024}, "less than 16 bytes"),
        ({"types": "fp32/bf16/fp32/fp32", "block": 1024}, "less than 16 bytes"),
        ({"types": "fp33"}, "fp33"),
        ({"block": "2048"}, "power of two"),
        ({"threads": True}, "power of two"),
    ],
)
def test_what_no_kernel_could_run_with_is_refused(tuned, change, message):
    before = tuned.read_text()
    with pytest.raises(ValueError, match=message):
        launch_config.save(tuned, [ENTRY, {**ENTRY, "rule": "SGD", **change}])
    assert tuned.read_text() == before
    tuned.write_text(json.dumps({"entries": [{**ENTRY, **change}]}))
    with pytest.raises(ValueError, match=r"tuned\.json is no table"):
        launch_config.load(tuned)


def test_two_entries_for_one_thing_are_refused(tuned):
    with pytest.raises(ValueError, match="two entries"):
        launch_config.save(tuned, [ENTRY, {**ENTRY, "block": 4096}])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": [{"rule": "Adam"}]}'])
def test_a_file_that_is_no_table_is_named(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json"):
        launch_config.load(path)


def test_what_is_saved_is_read_back_in_order_and_with_where_it_comes_from(tuned):
    first = {**ENTRY, "architecture": "cuda:100", "device": "a GPU", "ratio": 0.9}
    launch_config.save(tuned, [ENTRY, first])
    assert launch_config.load(tuned) == [first, ENTRY]
    # Catches a cache that outlives the file.
    assert update_launch_config("cuda:100", "Adam", FP32, True).threads == 256
