"""Fully sharded training: ``torchrun --nproc-per-node 2 examples/fsdp2.py``.

Parameters, gradients and states are DTensors; the optimizer is made after ``fully_shard`` and
updates what lies on each rank.
"""

import argparse
import os

import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812

import fusedopt
from fusedopt.examples.char_gpt import Block, CharGPT


def main() -> None:
    """Train a small GPT on random text that repeats itself."""
    parser = argparse.ArgumentParser(description="FSDP2 with fusedopt.AdamW.")
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    rank = dist.get_rank()
    torch.manual_seed(0)  # the same parameters on every rank, before they are cut
    model = CharGPT(vocabulary=16, context=32, width=32, heads=2, layers=2).to(device)
    for block in model.modules():
        if isinstance(block, Block):
            fully_shard(block)
    fully_shard(model)
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(rank)  # other samples on each
    for step in range(1, steps + 1):
        codes = torch.randint(16, (8, 8), generator=generator).repeat(1, 4).to(device)
        optimizer.zero_grad()
        logits = model(codes[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 5) == 0:
            mean = loss.detach()
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step:4d}  loss {mean.item() / dist.get_world_size():.4f}")
    dist.barrier()  # a rank that ends while another still speaks with it takes that one along
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
