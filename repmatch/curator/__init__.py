"""Rows, base models, the factor engine, training, scoring: the only home of torch and transformers."""
