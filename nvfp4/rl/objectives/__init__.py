"""What is maximised: one small file for each published objective, over one loop.

    policy_gradient   grpo  dr_grpo  gspo  dapo  delta  prorl  brorl  microcoder
    other losses      rover  reasonmaxxer
    imitation         ssd  rejection_sampling

The parts that they are made of, each with its formulas at its head:

    advantages    A from the rewards of a group        corrections   w, for a foreign sampler
    token_loss    rho, its clip, sums over tokens      divergence    KL to the reference
    lengths       penalties for long completions       controllers   what changes in a long run

base.py says what the loop calls when; the file of an objective says its formula, where each part of
it stands in code, and what its authors did that is done here otherwise.
"""
