"""Threads for MLX work on which nothing is traced.

MLX's tracing state is per thread: on a tracing thread, everything evaluated from a traced array keeps its graph (427 MB
a block forward, 738 MB backward, measured). So what has to be evaluated during a trace goes to a separate thread, and
the tracing one waits for it.
"""

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import mlx.core as mx

from ..errors import SlowftError


class Worker:
    """A thread for MLX work. It runs functions one after the other.

    A thread that is no longer needed waits for the next worker, because MLX keeps the threads of its streams, one or
    two per thread, until the process ends, and wakes all of them again and again (30 opened models made a tiny step
    take twice as long).

    This is not a `ThreadPoolExecutor`: MLX aborts the process when a thread that owns streams ends at exit without
    having destroyed them, and the executor's threads end before any exit handler can ask them to do so.
    """

    def __init__(self, name: str):
        thread = _idle.pop() if _idle else _Thread()
        thread.name = name
        self._jobs = thread.jobs
        self.close = weakref.finalize(self, _retire, thread)

    @property
    def is_open(self) -> bool:
        return self.close.alive

    def submit(self, function: Callable[[], Any]) -> Future:
        if not self.is_open:
            raise SlowftError("the model is closed. Open it again")
        future: Future = Future()
        self._jobs.put((function, future))
        return future

    def run(self, function: Callable[[], Any]) -> Any:
        """Returns `function()`, called on this thread."""
        return self.submit(function).result()


class _Thread(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        atexit.register(self._end)
        self.start()

    def run(self) -> None:
        while (job := self.jobs.get()) is not None:
            function, future = job
            try:
                result = function()
            except BaseException as e:
                future.set_exception(e)
            else:
                future.set_result(result)
            job = function = future = result = None  # keep no array alive while waiting for the next job
        mx.clear_streams()

    def _end(self) -> None:
        self.jobs.put(None)
        self.join()


_idle: list[_Thread] = []


def _retire(thread: _Thread) -> None:
    """Wait until the thread has run all its jobs, and keep it for the next worker."""
    if not thread.is_alive():  # the interpreter exits
        return
    if thread is not threading.current_thread():
        done: Future = Future()
        thread.jobs.put((lambda: None, done))
        done.result()
    _idle.append(thread)
