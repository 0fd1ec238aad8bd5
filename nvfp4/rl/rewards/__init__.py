"""Reward functions that need not be trusted: each call in a process of its own, confined and limited."""
