"""Shows what a run does: a progress bar, plain lines, or JSON lines. Is told things and asks nothing."""
