"""Benchmarks that people can run: `slowft bench`. Each is a function from a workload to a dict of figures.

What is measured runs in a process of its own (`worker`), with or without a control group, so that memory peaks are its
own.
"""
