"""``PerSampleSquares`` on models of transformers as they are, from tiny configurations."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from per_sample import assert_near, mean_square_of
from torch import Tensor, nn

from fusedopt import PerSampleSquares

# They warn of what they are about to rename.
pytestmark = pytest.mark.filterwarnings("ignore")
transformers = pytest.importorskip("transformers")

BATCH, LENGTH = 3, 5
LANGUAGE = {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {
    **LANGUAGE, "intermediate_size": 12, "num_key_value_heads": 2, "max_position_embeddings": 16,
    "pad_token_id": 0,
}  # fmt: skip


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=19, n_positions=16, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        **LANGUAGE, intermediate_size=12, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def _opt() -> nn.Module:
    config = transformers.OPTConfig(
        **LANGUAGE, ffn_dim=12, max_position_embeddings=16, word_embed_proj_dim=8, dropout=0.0,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def _qwen3_moe() -> nn.Module:
    """Norms of heads besides those of tokens, and a shared gain for all of them."""
    config = transformers.Qwen3MoeConfig(
        **DECODER, head_dim=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
    )
    return transformers.Qwen3MoeForCausalLM(config)


def _gpt_oss() -> nn.Module:
    """Experts with biases and weights the other way round."""
    config = transformers.GptOssConfig(
        **DECODER, head_dim=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
    )
    # Its attention has a parameter of its own, and cannot be run again with a cache of keys.
    config.use_cache = False
    return transformers.GptOssForCausalLM(config)


def _gemma2() -> nn.Module:
    """Gains that count from one, and a tied head."""
    config = transformers.Gemma2Config(**DECODER, head_dim=2, query_pre_attn_scalar=2)
    return transformers.Gemma2ForCausalLM(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=19, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, relative_attention_num_buckets=8,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    for name, p in model.named_parameters():
        # Its contributions are summed over the batch before any layer sees them.
        p.requires_grad_("relative_attention_bias" not in name)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _gpt2, "llama": _llama, "mixtral": _mixtral, "bert": _bert, "opt": _opt, "vit": _vit,
    "t5": _t5, "qwen3-moe": _qwen3_moe, "gpt-oss": _gpt_oss, "gemma2": _gemma2,
}  # fmt: skip


def inputs_of(name: str, batch: int = BATCH, length: int = LENGTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator)}
    ids = torch.randint(2, 19, (batch, length), generator=generator)
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, 1:].contiguous()}
    return {"input_ids": ids}


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A mean over samples, with an error of its own for each logit."""
    logits = model(**inputs).logits.float()
    target = torch.randn(logits[0].shape, generator=torch.Generator().manual_seed(4))
    return (logits - target).square().flatten(1).sum(1).mean()


def expected_of(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradient and mean square of every trained parameter, sample by sample."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    count = len(next(iter(inputs.values())))
    for i in range(count):
        loss = loss_of(model, {key: x[i : i + 1] for key, x in inputs.items()})
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for (name, p), g in zip(named.items(), gradients, strict=True):
            rows[name].append(torch.zeros_like(p) if g is None else g)
    stacked = {name: torch.stack(own) / count for name, own in rows.items()}
    return {name: (r.sum(0), mean_square_of(r)) for name, r in stacked.items()}


def prepared(name: str, lora: bool) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():
            # Initial weights of these models are tiny, and biases zero.
            p.add_(torch.randn_like(p) * 0.2)
    if lora:
        peft = pytest.importorskip("peft")
        targets = LORA[name]
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_B" in key:
                    p.copy_(torch.randn_like(p) * 0.2)
    return model.train()


def checkpoint(model: nn.Module, kind: str, lora: bool) -> None:
    if kind and lora:
        model.enable_input_require_grads()
    if kind:
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})


LORA = {
    "gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "v_proj", "down_proj"],
    "mixtral": ["q_proj", "v_proj"], "bert": ["query", "value"], "opt": ["q_proj", "fc1", "fc2"],
    "vit": ["q_proj", "v_proj"], "t5": ["q", "v", "wo"], "qwen3-moe": ["q_proj", "v_proj"],
    "gpt-oss": ["q_proj", "v_proj"], "gemma2": ["q_proj", "down_proj"],
}  # fmt: skip
# What goes through torch.func, with a warning: parameters of modules that compute more with them.
SLOW = {
    "vit": ["vit.embeddings"], "mixtral": ["mlp.gate"], "bert": ["cls.predictions"],
    "opt": ["decoder.embed_positions"], "qwen3-moe": ["mlp.gate"],
    "gpt-oss": ["mlp.router", "self_attn"], "gemma2": ["embed_tokens"],
}  # fmt: skip


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", ["", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_squares_of_models(name: str, precision: str, checkpointing: str, lora: bool) -> None:
    model, inputs = prepared(name, lora), inputs_of(name)
    with torch.autocast("cpu", torch.bfloat16, precision == "autocast"):
        expected = expected_of(copy.deepcopy(model), inputs)
        checkpoint(model, checkpointing, lora)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            statistics = PerSampleSquares(model)
        slow = [str(w.message) for w in caught if "torch.func" in str(w.message)]
        assert all(any(part in message for part in SLOW.get(name, ())) for message in slow), slow
        loss = loss_of(model, inputs)
    loss.backward()
    allowed = 1e-4 if precision == "float32" else 0.1
    assert statistics.samples == BATCH
    statistics.check([p for p in model.parameters() if p.grad is not None])
    for key, p in model.named_parameters():
        if p.requires_grad:
            gradient, square = expected[key]
            # A bias of keys has none but rounding: attention does not see it.
            if not key.endswith(("key.bias", "k_proj.bias")):
                assert_near(p.grad, gradient, allowed, f"gradient of {key}")
                assert_near(statistics.mean_square(p), square, allowed, f"mean square of {key}")


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "mixtral", "opt"])
def test_batch_equal_to_length(name: str) -> None:
    """The one is not taken for the other."""
    model, inputs = prepared(name, lora=False), inputs_of(name, 5, 5)
    expected = expected_of(copy.deepcopy(model), inputs)
    statistics = PerSampleSquares(model)
    loss_of(model, inputs).backward()
    for key, p in model.named_parameters():
        if not key.endswith(("key.bias", "k_proj.bias")):
            assert_near(statistics.mean_square(p), expected[key][1], 1e-4, f"mean square of {key}")


@pytest.mark.parametrize("batch", [3, 7])
def test_a_bias_of_relative_positions_is_refused_by_name(batch: int) -> None:
    model = _t5()
    model.requires_grad_(True)
    PerSampleSquares(model)
    with pytest.raises(RuntimeError, match="relative_attention_bias was called"):
        model(**inputs_of("t5", batch, 7))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_implementations_of_experts(implementation: str) -> None:
    model, inputs = prepared("mixtral", lora=False), inputs_of("mixtral")
    model.config._experts_implementation = implementation
    expected = expected_of(copy.deepcopy(model), inputs)
    statistics = PerSampleSquares(model)
    loss_of(model, inputs).backward()
    for key, p in model.named_parameters():
        assert_near(statistics.mean_square(p), expected[key][1], 1e-4, f"mean square of {key}")


def test_experts_that_are_packed() -> None:
    """Two documents in one row: a token's sample is its document."""
    model, inputs = prepared("mixtral", lora=False), inputs_of("mixtral", 1, 6)
    statistics = PerSampleSquares(model)
    with statistics.segments(torch.tensor([0, 4, 6])), pytest.raises(RuntimeError, match="gate"):
        loss_of(model, inputs).backward()
