"""Reward functions that need not be trusted: each call in a confined process of its own."""
