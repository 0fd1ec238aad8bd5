"""Reinforcement learning with verifiable rewards, where the sampler is the very policy that learns.

    config -> setup             options; task, objective, models and optimiser made of them
    one step (loop.py)
      collect                   tasks/ -> prompts -> rollout -> completions -> rewards/ -> Samples
      learn                     score -> objectives/: advantages, loss -> AdamW
      metrics                   rewards, lengths, entropy; how far sampler and trainer are apart
    evaluate, statistics        pass@k on held-out problems
    warmstart                   a new model learns the form of an answer first, from demonstrations
    compare -> report, plots    recipes x seeds with a control, and gates on what came out
    gvendi, prismatic           how diverse problems are, before any training
    samples, vocabulary         the records that pass through a step; between text and token ids
    spurious, norm_noise        rewards as controls; noise on the norms of the sampler
    parts, folder, finish       the objects of a run, where it writes, how it ends

A policy gradient is right for completions that the policy itself has drawn. Two implementations, or
quantisation scales that depend on the other rows of a batch, make two policies of one set of
weights. Here one model does both: recipe ``rl`` gives each row a scale of its own, and attention
sums in float64 (score.py). Measured: log-probabilities sampled over a KV cache equalled the
trainer's to the bit in all 560 steps of ``benchmarks/results/rl.json``.
"""
