"""How a block of compute precision is kept in memory, and nothing of what is computed with it.

``cast`` converts on load and rounds to nearest on store. Its twin in PyTorch is
``fusedopt/memory/dtypes.py``.
"""

from .cast import compute_type, decode, encode

__all__ = ["compute_type", "decode", "encode"]
