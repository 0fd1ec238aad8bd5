"""Reinforcement learning: rollouts by the very function that is trained, rewards, objectives, one loop."""
