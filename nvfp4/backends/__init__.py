"""Who computes: the reference, and backends that equal it to the last bit."""
