"""Pretraining: one typed config, deterministic data, a loop that resumes bit for bit, the
comparison of recipes."""
