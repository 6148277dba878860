"""The one place that knows the operating system: BLAS, file cache, memory."""

import subprocess
import sys

import pytest

from slowft import platform

MATMUL = """
import time
import mlx.core as mx
a, b = mx.random.normal((1024, 1024)), mx.random.normal((1024, 1024))
mx.eval(a, b, a @ b)
best = float("inf")
for _ in range(3):
    begin = time.perf_counter()
    mx.eval(a @ b)
    best = min(best, time.perf_counter() - begin)
print(best)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="only MLX's Linux wheel brings the reference BLAS")
def test_float32_matmul_is_ten_times_the_reference_librarys():
    reference, preloaded = float(run(MATMUL)), float(run("import slowft\n" + MATMUL))
    assert reference / preloaded >= 10, f"{reference:.3f} s against {preloaded:.3f} s: {platform.BLAS_FIX}"


@pytest.mark.skipif(sys.platform != "linux", reason="only MLX's Linux wheel brings the reference BLAS")
def test_reference_blas_is_warned_of_once_with_the_fix(llama):
    code = f"""
import ctypes, warnings
real = ctypes.CDLL
def without_blas(name, *args):
    if name is not None and "blas" in name:
        raise OSError
    return real(name, *args)
ctypes.CDLL = without_blas
import slowft
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    slowft.open_model({str(llama)!r}); slowft.open_model({str(llama)!r})
print(len(caught), caught[0].message)
"""
    out = run(code)
    assert out.startswith("1 ") and platform.BLAS_FIX in out


def test_importing_slowft_imports_neither_mlx_nor_numpy():
    assert run("import sys, slowft; print('mlx.core' in sys.modules, 'numpy' in sys.modules)") == "False False\n"


def test_threads_end_with_the_process(llama):
    """MLX aborts a process whose threads end without destroying their streams; nothing need be closed by hand."""
    code = f"""
import slowft, mlx.core as mx
model = slowft.open_model({str(llama)!r}).add_lora(rank=4)
model.loss_and_grads([(mx.array([[1, 2, 3, 4]]), mx.array([[1, 3]]))] * 2)
print("done")
"""
    assert run(code) == "done\n"
