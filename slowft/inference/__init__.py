"""What a model is used for once it is trained, within the same memory as training: scoring of texts, generation."""
