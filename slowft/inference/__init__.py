"""Uses an opened model: generates and scores text, for as many rows in each reading of the weights as there can be."""
