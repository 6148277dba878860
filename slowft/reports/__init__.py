"""Shows what a run does: a progress bar, plain lines, or JSON lines. A report is called; it never asks the run."""
