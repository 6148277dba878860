"""Model files in, model files out: prepare, verify, GGUF."""
