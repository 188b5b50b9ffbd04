"""Scikit-learn's digits and a small perceptron, in float64: a training of seconds."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

IMAGES = 1024


class Digits:
    """The first 1,024 images of 8 x 8 pixels; network 64-64-10 with tanh; mean cross-entropy.

    The loss is that of all training images, after each epoch. An epoch is a permutation, drawn
    from the seed and the same for every batch size.
    """

    interval = IMAGES

    def __init__(self, epochs: int, seed: int, device: str) -> None:
        data = load_digits()
        self.images = torch.tensor(data.data[:IMAGES] / 16.0, dtype=torch.float64, device=device)
        self.labels = torch.tensor(data.target[:IMAGES], device=device)
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        epochs_of = [torch.randperm(IMAGES, generator=generator) for _ in range(epochs)]
        self.order = torch.cat(epochs_of).to(device)

    def model(self) -> nn.Module:
        """Return the network as PyTorch initialises it."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        return network.to(self.images)

    def loss(self, model: nn.Module, samples: Tensor) -> Tensor:
        """Return the mean cross-entropy of some images, in nats."""
        return F.cross_entropy(model(self.images[samples]), self.labels[samples])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Return the mean cross-entropy of all training images, in nats."""
        return F.cross_entropy(model(self.images), self.labels).item()
