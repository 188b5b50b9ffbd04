"""The operations in Triton, under the names that ``reference`` gives them."""

from __future__ import annotations

from .triton_convolution import convolution
from .triton_embedding import embedding
from .triton_linear import linear
from .triton_vectors import affine, affine_and_bias, vector

__all__ = ["affine", "affine_and_bias", "convolution", "embedding", "linear", "vector"]
