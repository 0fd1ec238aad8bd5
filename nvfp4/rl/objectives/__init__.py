"""What is maximised: one small file for each published objective, over one loop."""
