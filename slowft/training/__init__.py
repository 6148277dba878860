"""Trains an opened model's adapter: configuration, batches in order, optimizer, evaluation, saving."""
