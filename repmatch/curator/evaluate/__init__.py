"""Evaluation: retraining curves on the user's own data, with baselines, intervals and a check for leaks."""
