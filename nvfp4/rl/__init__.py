"""Reinforcement learning: rollouts by the function that is trained, rewards, objectives, a loop."""
