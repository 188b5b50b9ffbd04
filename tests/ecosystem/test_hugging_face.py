"""Hugging Face Trainer: both ways to hand over an optimizer, clipping, resuming, accumulation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import ADAMW, Pair, assert_same, decoupled, each_pair, values
from torch import Tensor, nn

import fusedopt

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

BATCH, STEPS, SAVED = 4, 4, 2
Make = Callable[[nn.Module], torch.optim.Optimizer]


def _bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    for name, parameter in model.named_parameters():
        # Softmax cancels it: its gradient is rounding noise, which Adam would amplify.
        parameter.requires_grad_(not name.endswith("key.bias"))
    return model


def _data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(31, (2 * BATCH * STEPS, 9), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 2} for row in tokens]


def _train(
    folder: Path,
    *,
    make: Make | None = None,
    named: tuple[type, dict[str, Any]] | None = None,
    resume: Path | None = None,
    **arguments: Any,
) -> list[Tensor]:
    model = _bert()
    handed: dict[str, Any] = (
        {"optimizer_cls_and_kwargs": named} if make is None else {"optimizers": (make(model), None)}
    )
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "save_steps": SAVED,
        "max_grad_norm": 0.3,
        "learning_rate": 1e-2,
    }
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **settings | arguments
        ),
        train_dataset=_data(),
        **handed,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return values(model)


def _by_hand(kind: type, options: Any) -> Make:
    return lambda model: kind(model.parameters(), **options)


@each_pair
def test_optimizers(pair: Pair, tmp_path: Path) -> None:
    """Constructed by the user; clipped by the Trainer."""
    theirs = _train(tmp_path, make=_by_hand(pair.theirs, pair.options))
    ours = _train(tmp_path, make=_by_hand(pair.ours, pair.own))
    assert_same(ours, theirs, values(_bert()))


FORMS = [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}]


@each_pair
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_optimizer_cls_and_kwargs(pair: Pair, form: dict[str, Any], tmp_path: Path) -> None:
    """Constructed by the Trainer, in its groups with and without decay."""
    theirs = _train(tmp_path, named=(pair.theirs, dict(pair.options)), **form)
    ours = _train(tmp_path, named=(pair.ours, pair.own), **form)
    assert_same(ours, theirs, values(_bert()))


@each_pair
def test_resume(pair: Pair, tmp_path: Path) -> None:
    """From a checkpoint of ours and from one of torch's: as without the interruption."""
    start = values(_bert())
    own, foreign = tmp_path / "own", tmp_path / "foreign"
    named = pair.ours, pair.own
    whole = _train(own, named=named)
    _train(foreign, named=(pair.theirs, dict(pair.options)))
    for folder in (own, foreign):
        checkpoint = folder / f"checkpoint-{SAVED}"
        assert (checkpoint / "optimizer.pt").exists()
        resumed = _train(tmp_path / "after", named=named, resume=checkpoint)
        assert_same(resumed, whole, start, what=folder.name)
    # And what ours saved goes on with torch's.
    back = _train(
        tmp_path / "back",
        named=(pair.theirs, dict(pair.options)),
        resume=own / f"checkpoint-{SAVED}",
    )
    assert_same(back, whole, start, what="torch's")


def test_clipping_in_the_step(tmp_path: Path) -> None:
    """``max_grad_norm=0`` leaves clipping to the optimizer."""
    theirs = _train(tmp_path, named=(torch.optim.AdamW, dict(ADAMW.options)))
    options = {**ADAMW.own, "clip": fusedopt.GlobalNorm(0.3)}
    ours = _train(tmp_path, named=(fusedopt.AdamW, options), max_grad_norm=0.0)
    unclipped = _train(tmp_path, named=(fusedopt.AdamW, ADAMW.own), max_grad_norm=0.0)
    # The norm is summed in another order; Adam's first steps grow a last bit of it.
    assert_same(ours, theirs, values(_bert()), atol=1e-5)
    assert not torch.allclose(unclipped[0], ours[0], atol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_squares_of_samples(form: dict[str, Any], tmp_path: Path) -> None:
    """With the real batch as the virtual one it is AdamW; squares follow the Trainer's clipping."""
    size = BATCH * form.get("gradient_accumulation_steps", 1)
    start = values(_bert())
    theirs = _train(tmp_path / "a", make=_by_hand(torch.optim.AdamW, ADAMW.options), **form)
    same = tmp_path / "b"
    ours = _train(same, make=lambda model: decoupled(model, virtual_batch_size=size), **form)
    assert_same(ours, theirs, start)
    # The classes of observed modules are not those of the model that is saved.
    config = json.loads((same / f"checkpoint-{SAVED}" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    single = tmp_path / "c"
    whole = _train(single, make=decoupled, **form)
    resumed = _train(tmp_path / "d", make=decoupled, resume=single / f"checkpoint-{SAVED}", **form)
    assert_same(resumed, whole, start)
    assert not torch.allclose(whole[0], ours[0], atol=1e-4)
