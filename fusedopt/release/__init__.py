"""Gradient release: backward updates a parameter once its gradient is there, and frees that."""

from .handle import GradientRelease, gradient_release
from .hook import release_of

__all__ = ["GradientRelease", "gradient_release", "release_of"]
