"""Train a tiny language model in NVFP4 and in BF16 on Python's own standard library.

    python examples/pretrain_tiny.py [FOLDER]     any CPU

What it shows: ``pretrain`` is a function of a config; two configs that differ in the recipe alone
start from the same weights and see the same batches, so their difference is the recipe's; the
export is an ordinary Hugging Face model. ``nvfp4 compare`` does it at length.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nvfp4.train.config import PretrainConfig
from nvfp4.train.loop import pretrain


def main(folder: Path) -> dict[str, float]:
    """Train both, print the comparison, and return held-out bits per byte by recipe."""
    base = PretrainConfig(
        recipe="bf16",
        out=str(folder / "bf16"),
        overwrite=True,
        depth=1,
        width=64,
        seq_len=64,
        batch=8,
        steps=60,
        warmup=20,
        lr=4e-3,
        final_eval_bytes=8192,
        eval_bytes=2048,
        sample_tokens=40,
        device="cpu",
    )

    # The same run twice, but for the recipe.
    results = {}
    for recipe in ("bf16", "quartet2"):
        config = dataclasses.replace(base, recipe=recipe, out=str(folder / recipe))
        results[recipe] = pretrain(config)["val_bpb"]
    gap = 100 * (results["quartet2"] / results["bf16"] - 1)
    print(
        f"\nbits per byte: bf16 {results['bf16']:.4f}, quartet2 {results['quartet2']:.4f}, gap "
        f"{gap:+.2f} %"
    )

    # The export needs no nvfp4.
    model = AutoModelForCausalLM.from_pretrained(folder / "quartet2" / "export")
    tokenizer = AutoTokenizer.from_pretrained(folder / "quartet2" / "export")
    prompt = tokenizer("import ", return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    print("the exported model, in plain transformers:", repr(tokenizer.decode(answer[0])))
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/pretrain_tiny"))
