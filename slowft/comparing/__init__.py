"""Compares models, adapters and prompts on scenarios: a suite in YAML, answers, checks, a judge, a table and a page.

`run` has the order of it all. Answers are kept by a hash of all that decides them: what was asked before costs nothing.
"""
