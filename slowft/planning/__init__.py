"""What a job needs, what this machine can do, and what to choose."""
