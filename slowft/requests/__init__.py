"""Recorded requests: the file that holds them, what can be asked of it, and what all their prompts share."""
