"""A run of any trainer: its folder, checkpoints, log, signals, optimiser, model and tokens."""
