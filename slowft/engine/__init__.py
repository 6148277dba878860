"""One step: forward over the blocks, the head, backward over the blocks, for one or more micro-batches."""
