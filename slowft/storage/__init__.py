"""Bytes on disk to MLX buffers: an index from headers, a reader, a cache. Knows nothing of models."""
