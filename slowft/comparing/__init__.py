"""Compares models, adapters and prompts on scenarios: a suite in YAML, answers, checks, a judge, a table and a page.

`run` calls the parts in order. Answers are kept under a hash of all that decides them, so that nothing is asked twice.
"""
