"""Hugging Face Trainer in NVFP4: load with a quantization config, train, save, load plainly.

    python examples/train_with_hf_trainer.py    seconds on a CPU

What it shows: ``from_pretrained`` with our config returns a model that ``Trainer`` takes as any
other; what it saves loads with transformers alone.
"""

import tempfile

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import nvfp4
from nvfp4.integrations.trainer import NoiseCallback


def main() -> None:
    """Teach a tiny Llama to count, and check that what was saved is an ordinary checkpoint."""
    folder = tempfile.mkdtemp()
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, bos_token_id=1, eos_token_id=2, **sizes)
    ).save_pretrained(folder)

    # The model comes back converted; the last block is kept in high precision.
    config = nvfp4.NVFP4TrainingConfig(recipe="search_eden", keep_last=1, seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    print(nvfp4.report(model))

    # Sequences that count upwards modulo 60, in tokens 4 to 63.
    rows = (torch.arange(256).unsqueeze(1) + torch.arange(16)) % 60 + 4
    arguments = TrainingArguments(
        output_dir=f"{folder}/run",
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        logging_steps=20,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    # resumes to the last bit
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[NoiseCallback()])
    trainer.train()
    trainer.save_model(f"{folder}/trained")

    # No quantization config was saved, so plain layers come back.
    plain = AutoModelForCausalLM.from_pretrained(f"{folder}/trained")
    assert not any(isinstance(module, nvfp4.Linear) for module in plain.modules())
    with torch.no_grad():
        loss = plain(input_ids=rows[:16], labels=rows[:16]).loss
    print(f"loaded with transformers alone: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
