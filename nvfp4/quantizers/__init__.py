"""One file per quantiser, in reference mathematics; ``registry.py`` lists them.

A file holds the formula in its head, the rule on blocks [m, k, 16] that computes it, and the claims
(unbiased, idempotent, error on N(0, 1)) that the property tests check. ``base.py`` does what is
common to all: padding, rotation, NaN and Inf, encoding. Start with ``rtn.py``, the simplest.

    nearest       rtn, four_over_six, scale_search    one, two or nine candidate scales per block
    stochastic    sr, and NVIDIA's sr_te              unbiased, but for what sr_te clips
    rotated       ms_eden                             nearest elements, a stochastic scale: unbiased
                                                      over signs and rounding, at less error than sr
"""
