"""Compiles what pyproject.toml cannot name: on Linux, where MLX's CPU backend dequantizes slowly, a C function for it.

Without a compiler slowft is installed all the same, and leaves dequantizing to MLX.
"""

import sys

from setuptools import Extension, setup

dequantize = Extension(
    "slowft.models._dequantize",  # no Python module, but a library that models/dequantize.py loads with ctypes
    ["slowft/models/dequantize.c"],
    extra_compile_args=["-O3", "-ffp-contract=off"],
    optional=True,
)
setup(ext_modules=[dequantize] if sys.platform == "linux" else [])
