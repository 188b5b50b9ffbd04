"""GPT-2, to be trained for a few steps: what it learns does not matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True)
class Size:
    """Sizes of a GPT; those of GPT-2 small unless said otherwise.

    Attributes:
        layers: blocks.
        heads: of attention, in each block.
        width: of the residual stream.
        vocabulary: tokens, rounded up from 50257 to a multiple of 128.
        length: of a sequence.
        tied: whether the head's weight is the embedding's.
    """

    layers: int = 12
    heads: int = 12
    width: int = 768
    vocabulary: int = 50304
    length: int = 1024
    tied: bool = False


# Shows that a benchmark works, and nothing else.
TINY = Size(layers=2, heads=2, width=16, vocabulary=64, length=8)


class Block(nn.Module):
    """Causal attention, then a perceptron of two layers, both residual."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, length, width]`` to the same shape."""
        split = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.expand(self.mlp_norm(x)), approximate="tanh")
        return x + self.contract(hidden)


class GPT(nn.Module):
    """Logits of the next token at each position."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.length, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        if size.tied:
            self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """Map codes ``[batch, length]`` to logits ``[batch, length, vocabulary]``."""
        places = torch.arange(codes.shape[1], device=codes.device).expand(codes.shape)
        return self.head(self.norm(self.blocks(self.tokens(codes) + self.positions(places))))


def backward(model: GPT, codes: Tensor) -> Tensor:
    """Form gradients from ``[batch, length + 1]`` codes, in bfloat16 on a GPU; return the loss."""
    kind = codes.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu"):
        logits = model(codes[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def draw_codes(size: Size, batch: int, device: torch.device) -> Tensor:
    """Draw sequences ``[batch, length + 1]`` to train on, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(size.vocabulary, (batch, size.length + 1), generator=generator)
    return codes.to(device)


class Training:
    """A GPT that is trained, with the same weights whoever its optimizer is.

    Attributes:
        optimizer: of the model, which whoever inherits makes.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, size: Size, device: torch.device) -> None:
        with torch.random.fork_rng(), device:
            torch.manual_seed(0)
            self.model = GPT(size)
        self.params = list(self.model.parameters())
        self.device = device

    def backward(self, codes: Tensor) -> Tensor:
        """Form the gradients of codes ``[batch, length + 1]``; return the loss."""
        self.optimizer.zero_grad()
        return backward(self.model, codes)

    def update(self) -> None:
        """Do all that stands between the backward pass and the next forward pass."""
        self.optimizer.step()

    def step(self, codes: Tensor) -> Tensor:
        """Train on a batch; return the loss before."""
        loss = self.backward(codes)
        self.update()
        return loss
