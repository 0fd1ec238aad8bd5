"""What one does to a model: convert it, look at it, spread it over processes."""
