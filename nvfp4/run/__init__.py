"""What every training run needs, whoever trains: options, folder, checkpoints, loop, comparison.

    options -> fields                       what a person may say, and how it is checked and saved
    folder  -> files, log                   where a run writes, and how nothing there is ever half
            -> checkpoint, state            what it saves, to go on to the last bit
    corpus  -> tokens                       the text
    model   -> causal, precision, attention what is trained, and in which precision its parts are
    processes                               one process or several, and what they agree on
    parts                                   the record of all of these that a step is given
    loop    -> update, optim, signals       steps, and what is due between them
            -> progress                     what a person sees of them
    arms    -> children, forks, plots       many runs, each a process, and their differences
    errors                                  what ends a run in one sentence

An arrow leads from a task to the files that do its parts. This room knows no loss: ``train/``
(next tokens) and ``rl/`` (rewards) each say what one step is; everything around it is here, once.
"""
