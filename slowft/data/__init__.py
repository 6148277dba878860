"""Text on disk to token batches with masks, in the formats and the order of mlx-lm."""
