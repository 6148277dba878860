"""Describes the machine that figures were measured on, for people to compare: processor, memory, system, versions."""

import datetime
import importlib.metadata
import os
import platform as python_platform
from typing import Any

from .. import __version__, platform


def describe() -> dict[str, Any]:
    """What one has to know about this machine to read a figure. (It does not import MLX.)"""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": platform.cpu_name(),
        "cores": platform.cores(),
        "memory_nbytes": platform.memory_limit(),
        "system": f"{python_platform.system()} {python_platform.release()} {python_platform.machine()}",
        "python": python_platform.python_version(),
        "slowft": __version__,
        "blas": os.path.basename(platform.blas_library() or "") or None,
        **{name: _version(name) for name in ("mlx", "mlx-lm")},
    }


def one_line(system: dict[str, Any], device: str | None = None) -> str:
    on = f", MLX on {device}" if device else ""
    return (
        f"{system['cpu']}, {system['cores']} cores, {system['memory_nbytes'] / 1e9:.0f} GB of memory, "
        f"{system['system']}{on}; slowft {system['slowft']}, mlx {system['mlx']}, mlx-lm {system['mlx-lm']}"
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
