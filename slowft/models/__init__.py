"""mlx-lm models without their weights: loading, seams, adapters, conversion."""
