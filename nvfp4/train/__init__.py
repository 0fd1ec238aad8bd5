"""Pretraining on next tokens: what only it knows; everything around a step is in ``run/``.

    config -> setup      options, and every object of the run built from them
    data -> step         the batch of a step, and one update on it
    evaluate -> finish   held-out bits per byte, text sample, export, result.json
    loop                 the above as a ``run.loop.Training``
    compare              the same run once per recipe, and what a recipe costs

``nvfp4 pretrain`` is ``loop.pretrain``, ``nvfp4 compare`` is ``compare.compare``.
"""
