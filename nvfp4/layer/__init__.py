"""One converted layer: its three GEMMs, its noise, the codes of its weight."""
