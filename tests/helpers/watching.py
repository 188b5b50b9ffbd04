"""What the host does in a step: reads of values, and memory made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Operations(TorchDispatchMode):
    """Note operations that return a number, or memory that they were not given."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage(leaf) not in given:
                self.log.append(f"{func} allocates")
            elif isinstance(leaf, (bool, int, float)):
                self.log.append(f"{func} reads")
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Calls(TorchFunctionMode):
    """Note calls that read or create memory without an operation that a dispatch mode sees."""

    READS = {
        "tolist", "numpy", "item", "cpu", "__bool__", "__float__", "__int__", "__index__",
        "__array__", "equal", "allclose", "is_nonzero", "__contains__",
    }  # fmt: skip
    CREATES = {"tensor", "as_tensor", "from_numpy", "scalar_tensor"}

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.READS or name in self.CREATES:
            self.log.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[list[str]]:
    """Log reads and allocations of what runs inside."""
    log: list[str] = []
    with _Operations(log), Calls(log):
        yield log
