"""Makes training data with a large model: seeds, questions, answers, what is left out and why, and the finished set.

Each step has a file, whose functions take and give rows one at a time. The pipeline (`make`) and the single commands
call the same functions.
"""
