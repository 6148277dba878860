"""What a job needs, what this machine can do, and which plan to choose."""
