"""A character-level GPT on real text: ``python examples/char_gpt.py --optimizer fusedopt``.

The text is the Python language reference that ships with every CPython.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import fusedopt


class Block(nn.Module):
    """One transformer layer: causal attention, then a two-layer perceptron, both residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        # Softmax cancels a key's bias: its gradient is rounding noise, which Adam would amplify.
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (batch, context, width) to the same shape."""
        split = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # (batch, heads, context, width / heads)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.mlp_norm(x))))


class CharGPT(nn.Module):
    """Predicts the next of `vocabulary` characters at each position."""

    def __init__(
        self, vocabulary: int, context: int = 64, width: int = 64, heads: int = 4, layers: int = 2
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        blocks = (Block(width, heads) for _ in range(layers))
        self.body = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.head = nn.Linear(width, vocabulary)
        # The default of 1.0 would drown what the first layers add to the residual stream.
        nn.init.normal_(self.characters.weight, std=0.1)
        nn.init.normal_(self.positions.weight, std=0.1)

    def forward(self, codes: Tensor) -> Tensor:
        """Map `codes` (batch, n <= context) to logits (batch, n, vocabulary)."""
        # Looked up through the module, once a sample: what is read past it has no sample.
        places = torch.arange(codes.shape[1], device=codes.device).expand(codes.shape)
        return self.head(self.body(self.characters(codes) + self.positions(places)))

    def loss(self, codes: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per character, of `codes` (batch, context + 1)."""
        codes = codes.to(self.head.weight.device)
        return F.cross_entropy(self(codes[:, :-1]).flatten(0, 1), codes[:, 1:].flatten())

    @torch.no_grad()
    def sample(self, codes: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Continue `codes` (n,) by `length` characters drawn at temperature 0.7."""
        context = self.positions.num_embeddings
        for _ in range(length):
            probabilities = self(codes[None, -context:])[0, -1].div(0.7).softmax(-1)
            drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator)
            codes = torch.cat([codes, drawn.to(codes.device)])
        return codes


def read_text(path: Path | None = None) -> str:
    """Return the text of a UTF-8 file, or the Python language reference without one."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    # Topics quote each other; a paragraph seen in training must not be held out again.
    return "\n\n".join(dict.fromkeys(part.strip("\n") for part in text.split("\n\n")))


def encode(text: str, context: int) -> tuple[str, Tensor, Tensor]:
    """Return the vocabulary, the codes to train on and the held-out last tenth of them."""
    held_out = len(text) // 10
    if held_out <= context:
        raise ValueError(f"{len(text)} characters of text; {10 * (context + 1)} are needed")
    points = torch.frombuffer(bytearray(text, "utf-32-le"), dtype=torch.int32)
    vocabulary, codes = points.unique(return_inverse=True)
    return "".join(map(chr, vocabulary.tolist())), codes[:-held_out], codes[-held_out:]


def windows(codes: Tensor, context: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield random batches (batch, context + 1) of `codes` for ever, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(codes) - context, (batch, 1), generator=generator)
        yield codes[starts + torch.arange(context + 1)]


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Decay the matrices only: shrinking a bias or a norm's gain does not regularise."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() >= 2]
    vectors = [(name, p) for name, p in model.named_parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def train(
    model: CharGPT, optimizer: torch.optim.Optimizer, batches: Iterator[Tensor], steps: int
) -> Iterator[float]:
    """Yield each step's loss; the learning rate rises to the optimizer's, then falls to 4 %.

    So does weight decay, which begins as the groups have it.
    """
    rise, fall = max(1, steps // 20), math.pi / steps
    falling = [0.52 + 0.48 * math.cos(fall * i) for i in range(steps + 1)]
    factors = [min((i + 1) / rise, factor) for i, factor in enumerate(falling)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    for i, codes in enumerate(itertools.islice(batches, steps)):
        # As any number of a group it may change at each step; no launch is prepared anew.
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay * falling[i]
        optimizer.zero_grad()
        loss = model.loss(codes)
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()


def main() -> None:
    """Train once and print the losses."""
    parser = argparse.ArgumentParser(description="Train a character-level GPT.")
    parser.add_argument("--optimizer", choices=("fusedopt", "torch"), default="fusedopt")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    characters, codes, _ = encode(read_text(), context=64)
    torch.manual_seed(0)
    model = CharGPT(len(characters)).to("cuda" if torch.cuda.is_available() else "cpu")
    adamw = fusedopt.AdamW if args.optimizer == "fusedopt" else torch.optim.AdamW
    optimizer = adamw(decay_groups(model), lr=6e-3, betas=(0.9, 0.99))
    batches = windows(codes, context=64, batch=16, seed=0)
    for step, loss in enumerate(train(model, optimizer, batches, args.steps), 1):
        if step % 50 == 0:
            print(f"step {step:4d}  {loss:.4f} nats per character")


if __name__ == "__main__":
    main()
