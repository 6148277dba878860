"""Uses an opened model: generates text and scores it, for as many rows in each reading of the weights as there can be."""
