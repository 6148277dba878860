"""Benchmarks that people can run: `slowft bench`. Each is a function from a job to a dict of figures.

What is measured runs in processes of its own (`worker`), alone or in control groups, so that peaks are its own.
"""
