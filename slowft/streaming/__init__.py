"""Weights come, something is computed, weights go: the thread that computes and what is in memory on it."""
