"""Lightning: ``python examples/lightning_module.py`` (needs lightning).

Clipping is the optimizer's, which works at every precision; ``gradient_clip_val`` works, too, but
in mixed precision Lightning refuses it for optimizers that unscale by themselves.
"""

import argparse

import lightning
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import fusedopt
from fusedopt.examples.plain_loop import batch


class Spirals(lightning.LightningModule):
    """Tells two spirals apart."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.Sequential(
            nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
        )

    def training_step(self, sample, place):
        """Return the loss of one batch."""
        points, spiral = sample
        loss = F.cross_entropy(self.layers(points), spiral)
        if (place + 1) % max(1, self.steps // 5) == 0:
            print(f"step {place + 1:4d}  loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self):
        """Return the optimizer and its schedule."""
        clip = fusedopt.GlobalNorm(1.0)
        optimizer = fusedopt.AdamW(self.parameters(), lr=1e-2, clip=clip)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main() -> None:
    """Train for one epoch of as many batches as steps."""
    parser = argparse.ArgumentParser(description="Lightning with fusedopt.AdamW.")
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(*batch(64 * steps, torch.Generator().manual_seed(0)))
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Spirals(steps), torch.utils.data.DataLoader(data, batch_size=64))


if __name__ == "__main__":
    main()
