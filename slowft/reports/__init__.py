"""Shows what a run does: a progress bar, plain lines, or JSON lines. The run calls a report, which never asks back."""
