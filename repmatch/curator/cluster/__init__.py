"""Work on many machines: the engine is Ray's, an optional extra; what is computed is what one process computes."""
