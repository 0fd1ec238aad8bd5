"""Convert a transformers model, look at what happened, train a few steps, and go back.

    python examples/convert_a_model.py        seconds on a CPU

What it shows: ``convert`` works in place and keeps parameters, so the optimizer is the usual one;
``report`` says which layer runs in which recipe and why one was kept; ``disabled`` runs the same
weights in high precision; ``revert`` gives plain layers back.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nvfp4


def main() -> None:
    """Train the same tiny Llama in BF16 and in NVFP4 on one batch, and print both losses."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    batch = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    for recipe in ("bf16", "search_eden"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        nvfp4.convert(model, recipe, keep_last=1, seed=0)
        if recipe != "bf16":
            print(nvfp4.report(model))

        # Nothing else changes: the usual optimizer, the usual autocast, the usual loop.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(20):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 19 == 0:
                print(f"{recipe:12} step {step:2}  loss {loss.item():.4f}")

    # What the weights know apart from the noise of 4-bit forwards.
    with nvfp4.disabled(model), torch.no_grad():
        print(
            "the same weights in high precision: loss "
            f"{model(input_ids=batch, labels=batch).loss.item():.4f}"
        )
    nvfp4.revert(model)  # plain nn.Linear again, with the same parameters
    assert not any(isinstance(module, nvfp4.Linear) for module in model.modules())


if __name__ == "__main__":
    main()
