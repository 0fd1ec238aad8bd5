"""Quantise one matrix with every quantiser, and see error and bias for yourself.

    python examples/look_at_a_quantiser.py    seconds on a CPU

    error of one draw    |q(x) - x|^2 / |x|^2          what a forward pass sees
    of the mean of 256   |mean q(x) - x|^2 / |x|^2     what is left of it after many steps

An unbiased quantiser's noise averages out: the second falls with the number of draws. What a biased
one loses stays lost, which is why gradients are rounded stochastically.
"""

import torch

import nvfp4


def main() -> None:
    """Print both relative squared errors of each quantiser."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    print(
        f"{'quantiser':16} {'one draw':>9} {'mean of 256':>12}   (x 1e-3; the mean of an "
        "unbiased one keeps falling)"
    )
    for name, quantizer in nvfp4.QUANTIZERS.items():
        # a deterministic one gives the same codes every time: its mean is one draw
        draws = 1 if quantizer.claims(quantizer.check(seed=0)).deterministic else 256
        decoded = [nvfp4.quantize(x, name, seed=i).dequantize() for i in range(draws)]
        one, mean = (
            (d - x).square().mean() / x.square().mean()
            for d in (decoded[0], torch.stack(decoded).mean(0))
        )
        print(f"{name:16} {one.item() * 1e3:9.2f} {mean.item() * 1e3:12.3f}")

    # What is stored: two codes per byte, and a byte of scale per 16 elements.
    q = nvfp4.quantize(x, "scale_search")
    print(
        f"codes {tuple(q.codes.shape)}, block scales {tuple(q.block_scale.shape)}: "
        f"{q.nbytes * 8 / x.numel():.2f} bits"
    )


if __name__ == "__main__":
    main()
