"""libfusedopt through ctypes, with tensors in the stand-in driver's memory."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy


def _struct(name: str, numbers: str, flags: str, counts_steps: bool = True) -> Any:
    fields: list[tuple[str, Any]] = [(field, c_double) for field in numbers.split()]
    fields += [(flag, c_int) for flag in flags.split()]
    fields += [("step", c_int64)] * counts_steps
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# As native/include/fusedopt.h has them.
GROUPS = {
    "adam": _struct("Adam", "lr beta1 beta2 eps weight_decay", "amsgrad maximize"),
    "adamw": _struct("AdamW", "lr beta1 beta2 eps weight_decay", "amsgrad maximize"),
    "sgd": _struct("SGD", "lr momentum dampening weight_decay", "nesterov maximize"),
    "rmsprop": _struct(
        "RMSprop", "lr alpha eps weight_decay momentum", "centered maximize", counts_steps=False
    ),
}
FLOAT32 = 1


class Tensors(ctypes.Structure):
    _fields_ = [
        ("count", c_size_t), ("numel", POINTER(c_int64)), ("param", POINTER(c_void_p)),
        ("grad", POINTER(c_void_p)), ("state", POINTER(c_void_p) * 3), ("group", POINTER(c_uint32)),
        ("param_type", c_int), ("grad_type", c_int), ("state_type", c_int),
    ]  # fmt: skip


class Control(ctypes.Structure):
    _fields_ = [
        ("max_norm", c_double), ("norm_type", c_int), ("norm", c_void_p),
        ("grad_scale", c_void_p), ("found_inf", c_void_p),
    ]  # fmt: skip


class Device:
    """Memory of the stand-in driver."""

    def __init__(self, path: Path) -> None:
        self.driver = ctypes.CDLL(str(path))
        context = c_void_p()
        assert self.driver.cuInit(0) == 0
        assert self.driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
        assert self.driver.cuCtxPushCurrent_v2(context) == 0

    def put(self, values: Any) -> int:
        """Copy an array to new memory, and return its address."""
        address = ctypes.c_uint64()
        assert self.driver.cuMemAlloc_v2(ctypes.byref(address), c_size_t(values.nbytes)) == 0
        self.write(address.value, values)
        return address.value

    def write(self, address: int, values: Any) -> None:
        size = c_size_t(values.nbytes)
        source = values.ctypes.data_as(c_void_p)
        assert self.driver.cuMemcpyHtoD_v2(ctypes.c_uint64(address), source, size) == 0

    def get(self, address: int, like: Any) -> Any:
        """Copy an array of this shape and type back."""
        values = numpy.empty_like(like)
        size = c_size_t(values.nbytes)
        target = values.ctypes.data_as(c_void_p)
        assert self.driver.cuMemcpyDtoH_v2(target, ctypes.c_uint64(address), size) == 0
        return values


class Library:
    """The library, and a context on the driver that FUSEDOPT_DRIVER names."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.fusedopt_last_error.restype = ctypes.c_char_p
        self.context = c_void_p()
        self.check(self.library.fusedopt_init(ctypes.byref(self.context), 0))

    def check(self, status: int) -> None:
        assert status == 0, self.library.fusedopt_last_error().decode()

    def step(self, name: str, tensors: Tensors, groups: list[Any], control: Control) -> None:
        """Call a step function with one set, on the default stream."""
        function = getattr(self.library, f"fusedopt_{name}_step")
        array = (GROUPS[name] * len(groups))(*groups)
        self.check(
            function(
                self.context, ctypes.byref(tensors), c_size_t(1), array, c_size_t(len(groups)),
                ctypes.byref(control), None,
            )
        )  # fmt: skip

    def close(self) -> None:
        self.library.fusedopt_destroy(self.context)


def addresses(values: list[int]) -> Any:
    """An array of addresses."""
    return (c_void_p * len(values))(*values)
