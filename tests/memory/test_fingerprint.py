"""A prepared launch is reused only for tensors that it is right for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedopt.memory import layout

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "type": lambda t: t.double(),
    "shape": lambda t: t.reshape(3, 2),
    "strides": lambda t: t.t().contiguous().t(),
    "conjugate": lambda t: t.conj(),
    "negative": lambda t: torch.complex(t.real, t.real).conj().imag,
    "alignment": lambda t: torch.zeros(9)[1:7].view(2, 3),
}


@pytest.fixture(params=["torch's guards", "without them"], autouse=True)
def _both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without them":
        monkeypatch.setattr(layout, "TensorGuards", None)
    else:
        assert layout.TensorGuards is not None, "this torch has none: step() will be slower"


def _fits(print_: layout.Fingerprint, tensors: list[Tensor]) -> bool:
    return print_.match(tensors) == [t.data_ptr() for t in tensors]


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_seen(change):
    dtype = torch.complex64 if change == "conjugate" else torch.float32
    tensors = [torch.randn(4), torch.randn(2, 3, dtype=dtype), torch.randn(())]
    print_ = layout.Fingerprint(tensors)
    assert _fits(print_, tensors)
    changed = [tensors[0], CHANGES[change](tensors[1]), tensors[2]]
    assert not _fits(print_, changed)


def test_moved_tensors_of_the_same_layout_fit():
    tensors = [torch.randn(4), torch.randn(3, 2).t(), torch.empty(0)]
    print_ = layout.Fingerprint(tensors)
    moved = [torch.randn(4), torch.randn(3, 2).t(), torch.empty(0)]
    assert moved[0].data_ptr() != tensors[0].data_ptr()
    assert _fits(print_, moved)


def test_sparse_tensors_have_no_fingerprint():
    with pytest.raises(RuntimeError):
        layout.Fingerprint([torch.zeros(3).to_sparse()])
