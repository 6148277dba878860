"""MLX's limits on memory: one owner, and as they were once slowft is done."""

import ast
from pathlib import Path

import mlx.core as mx
import pytest

import slowft
from conftest import LLAMA, must_run, save_random
from slowft.memory import limits

SETTERS = {"set_memory_limit", "set_cache_limit", "set_wired_limit", "clear_cache"}
MB = 1 << 20


def found() -> tuple[int, int]:
    """(memory limit, cache limit) as they are."""
    both = mx.set_memory_limit(1 << 60), mx.set_cache_limit(1 << 60)
    mx.set_memory_limit(both[0])
    mx.set_cache_limit(both[1])
    return both


def test_nothing_but_memory_py_sets_mlx_limits():
    package = Path(slowft.__file__).parent
    callers = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in SETTERS
    }
    assert callers == {"memory.py"}


def test_a_closed_model_leaves_the_users_limits(tmp_path):
    directory = save_random(tmp_path / "m", LLAMA)
    users = (3 << 30) + 1, 77 * MB
    mx.set_memory_limit(users[0])
    mx.set_cache_limit(users[1])
    for _ in range(2):
        model = slowft.open_model(directory).add_lora(num_layers=-1, rank=4)
        model.plan(2, 24, memory="1GB", follow=True)
        model.loss_and_grads(mx.ones((2, 25), mx.int32), mx.array([[1, 24]] * 2))
        assert found() != users
        model.close()
        assert found() == users


@pytest.fixture
def freed() -> int:
    """Bytes in 16 buffers that MLX keeps and nobody uses."""
    if mx.default_device() != mx.Device(mx.cpu):
        must_run("on Metal, MLX's cache has what other work left there")
    limits().give_back()
    limits().keep_freed(64 * MB)
    mx.eval([mx.zeros((MB,), mx.uint8) + 1 for _ in range(16)])
    assert mx.get_cache_memory() >= 16 * MB
    return mx.get_cache_memory()


def test_lower_limit_gives_back_what_is_above_it(freed):
    limits().keep_freed(10 * MB)
    assert 8 * MB < mx.get_cache_memory() <= 10 * MB


def test_what_is_kept_already_can_be_cut_apart_from_the_limit(freed):
    limits().keep_freed(64 * MB, of_those_kept=4 * MB)
    assert mx.get_cache_memory() <= 4 * MB
    mx.eval([mx.zeros((MB,), mx.uint8) + 1 for _ in range(16)])
    assert mx.get_cache_memory() > 12 * MB


def test_freeing_to_the_system_keeps_what_was_kept(freed):
    array = mx.zeros((32 * MB,), mx.uint8) + 1
    mx.eval(array)
    cached = mx.get_cache_memory()
    with limits().freeing_to_the_system():
        del array
        mx.synchronize()
        assert mx.get_cache_memory() == cached
    assert found()[1] == 64 * MB
