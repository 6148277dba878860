"""Compiles what pyproject.toml cannot name: on Linux, where MLX's CPU backend dequantizes slowly, C functions for it.

Without a compiler slowft is installed all the same, and leaves that to MLX.
"""

import sys

from setuptools import Extension, setup

quantized = Extension(
    "slowft.weights._quantized",  # no Python module, but a library that weights/quantized.py loads with ctypes
    ["slowft/weights/quantized.c"],
    extra_compile_args=["-O3", "-ffp-contract=off"],
    optional=True,
)
setup(ext_modules=[quantized] if sys.platform == "linux" else [])
