"""PEFT: LoRA's parameters are trained, those that it adapts stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from clients import ADAMW, Pair, assert_same, decoupled, each_pair, values
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
optimizers = pytest.importorskip("peft.optimizers")

STEPS, BATCH = 5, 4
Make = Callable[[nn.Module], torch.optim.Optimizer]


def _adapted() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    model = transformers.LlamaForCausalLM(config)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]
    )
    return peft.get_peft_model(model, lora)


def _frozen(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if not p.requires_grad]


def _train(make: Make) -> list[Tensor]:
    model = _adapted()
    optimizer = make(model)
    tokens = torch.randint(31, (STEPS, BATCH, 9), generator=torch.Generator().manual_seed(1))
    for batch in tokens:
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    for now, before in zip(_frozen(model), _frozen(_adapted()), strict=True):
        assert torch.equal(now, before)
    return values(model)


@each_pair
def test_as_with_torchs_optimizer(pair: Pair) -> None:
    """The optimizer is handed all parameters, most of which have no gradient."""
    theirs = _train(lambda m: pair.theirs(m.parameters(), **pair.options))
    ours = _train(lambda m: pair.ours(m.parameters(), **pair.own))
    assert_same(ours, theirs, values(_adapted()))


def test_lora_plus() -> None:
    """PEFT constructs the optimizer, in groups with learning rates of their own."""
    ends = []
    for kind, options in ((ADAMW.theirs, ADAMW.options), (ADAMW.ours, ADAMW.own)):

        def make(model: nn.Module, kind=kind, options=options) -> torch.optim.Optimizer:
            return optimizers.create_loraplus_optimizer(
                model, kind, loraplus_lr_ratio=4.0, **options
            )

        ends.append(_train(make))
    assert_same(ends[1], ends[0], values(_adapted()))


def test_squares_of_samples() -> None:
    theirs = _train(lambda m: torch.optim.AdamW(m.parameters(), **ADAMW.options))
    ours = _train(lambda m: decoupled(m, virtual_batch_size=BATCH))
    assert_same(ours, theirs, values(_adapted()))
    single = _train(decoupled)
    assert not torch.allclose(single[0], ours[0], atol=1e-4)
