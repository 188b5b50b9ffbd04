"""Hugging Face Trainer: ``python examples/hugging_face.py`` (needs transformers and accelerate).

The Trainer makes the optimizer by its own groups (no decay of biases and norms), schedules it,
clips by ``max_grad_norm`` and saves it. The model is tiny, from its configuration.
"""

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fusedopt


def main() -> None:
    """Train a tiny Llama on random text that repeats itself."""
    parser = argparse.ArgumentParser(description="Hugging Face Trainer with fusedopt.AdamW.")
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    texts = torch.randint(16, (512, 8)).repeat(1, 4)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            LlamaForCausalLM(config),
            TrainingArguments(
                folder,
                max_steps=steps,
                use_cpu=not torch.cuda.is_available(),
                per_device_train_batch_size=16,
                learning_rate=1e-2,
                max_grad_norm=1.0,
                logging_steps=max(1, steps // 5),
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": text, "labels": text} for text in texts],
            optimizer_cls_and_kwargs=(fusedopt.AdamW, {"lr": 1e-2, "betas": (0.9, 0.95)}),
        )
        trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']:4d}  loss {float(entry['loss']):.4f}")


if __name__ == "__main__":
    main()
