"""How a block of compute precision is kept in memory, and nothing of what is computed with it.

``cast`` converts on load and rounds to nearest on store; ``masters`` keeps a float32 beside a
bfloat16 in one or two bytes more; ``kahan`` keeps what rounding has left over; ``rounding`` is
stochastic rounding and its random bits. Their twins in PyTorch are in ``fusedopt/memory/``, the
cast's in ``dtypes.py``, the others' under their names.
"""

from .cast import compute_type, decode, encode, encode_positive

__all__ = ["compute_type", "decode", "encode", "encode_positive"]
