"""One file per quantiser, in reference mathematics; ``registry.py`` lists them."""
