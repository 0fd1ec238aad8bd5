"""What one does to a model: convert it, look at it, switch it, fuse it, spread it.

    convert    selection (who, and why not) -> reclass (the class changes, nothing else)
    look       report and check, health and observe
    switch     disabled, forward_precision, share_amax, capturable, fixed_weights, after_step
    fuse       norms and MLPs straight into codes
    spread     fp4_all_gather, share_noise

All of it works on modules in place and through ``layer`` alone: parameters, optimisers, hooks and
``state_dict`` stay as they were, and ``revert`` undoes it. Start with ``convert.py``.
"""
