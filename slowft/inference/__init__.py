"""Generates and scores text with an opened model. A reading of the weights serves as many rows as memory can hold."""
