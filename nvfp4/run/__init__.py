"""What every training run needs, whoever trains: options, folder, checkpoints, loop, comparison.

    options -> fields           what a person may say, and how it is checked and saved
    folder  -> files, log       where a run writes, and how nothing there is ever half
            -> checkpoint, state
    corpus -> tokens -> model   what is trained on what
    loop    -> update, optim    steps, signals, resuming to the last bit
    arms    -> children, plots  many runs, and their differences

This room knows no loss. ``train/`` (next tokens) and ``rl/`` (rewards) each say what one step is;
everything around a step is here, once.
"""
