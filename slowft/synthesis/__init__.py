"""Makes training data with a large model: seeds, questions, answers, what is left out and why, and the finished set.

One file a step, each a function over rows as they stream by: the pipeline (`make`) and the single commands use the
same.
"""
