"""Base weights: where their bytes lie, how they are read, what of them is in memory, and the arrays made of them."""
