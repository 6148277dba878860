"""The thread that computes, and the micro-batches that take turns with it.

MLX's tracing state is per thread: on a tracing thread, everything evaluated from a traced array keeps its
graph (427 MB a block forward, 738 MB backward, measured). So blocks run on one compute thread that never
traces the whole model, while each micro-batch's trace lives on a thread of its own. Only one of them runs
at any moment, in a fixed order: a step is deterministic.
"""

import atexit
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import mlx.core as mx

from ..errors import SlowftError


class Worker:
    """A thread for MLX work: runs functions one after the other.

    A thread that is no longer needed waits for the next worker: MLX keeps the threads of its streams, one or two a
    thread, until the process ends, and wakes all of them again and again (30 opened models made a tiny step take
    twice as long).

    Not a `ThreadPoolExecutor`: MLX aborts the process when a thread that owns streams ends at exit without
    having destroyed them, and the executor's threads are gone before any exit handler can ask them to.
    """

    def __init__(self, name: str):
        thread = _idle.pop() if _idle else _Thread()
        thread.name = name
        self._jobs = thread.jobs
        self.close = weakref.finalize(self, _rest, thread)

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
        """The result of `function()`, called on this thread."""
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


def _rest(thread: _Thread) -> None:
    """Have the thread do what it was asked to, and then wait for another worker."""
    if not thread.is_alive():  # the interpreter exits
        return
    if thread is not threading.current_thread():
        done: Future = Future()
        thread.jobs.put((lambda: None, done))
        done.result()
    _idle.append(thread)


class _Stopped(BaseException):
    """Unwinds a micro-batch whose step has failed elsewhere."""


class MicroBatches:
    """Runs one function per micro-batch so that they meet at every unit they visit.

    Each function runs on its own thread until it wants a unit's weights (`meet`). When all have got there
    the unit is served to them together, so its weights come once for all micro-batches.
    """

    def __init__(self):
        self._workers: list[Worker] = []
        self._local = threading.local()

    @property
    def index(self) -> int | None:
        """Which micro-batch the calling thread works on; None on any other thread."""
        turn = getattr(self._local, "turn", None)
        return None if turn is None else turn.index

    def run(self, functions: Sequence[Callable[[], Any]], serve: Callable[[Any, list[Callable]], list]) -> list:
        """The functions' results, in order.

        Args:
            serve: called with a unit and the jobs of the micro-batches that wait for it; returns their results.
        """
        while len(self._workers) < len(functions):
            self._workers.append(Worker(f"slowft-micro-batch-{len(self._workers)}"))
        turns = [_Turn(i) for i in range(len(functions))]
        for worker, turn, function in zip(self._workers, turns, functions):
            turn.future = worker.submit(lambda turn=turn, function=function: self._take_part(turn, function))
        try:
            ready, waiting = list(turns), []
            while ready or waiting:
                for turn in ready:
                    turn.resume()
                    if turn.wants is None:
                        turn.future.result()  # finished: raises what it raised
                    else:
                        waiting.append(turn)
                ready = []
                if waiting:
                    unit = waiting[0].wants[0]
                    ready = [turn for turn in waiting if turn.wants[0] is unit]
                    waiting = [turn for turn in waiting if turn.wants[0] is not unit]
                    for turn, result in zip(ready, serve(unit, [turn.wants[1] for turn in ready])):
                        turn.answer = result
            return [turn.future.result() for turn in turns]
        except BaseException:
            for turn in turns:
                turn.stop()
            raise

    def meet(self, unit: Any, job: Callable[[], Any]) -> Any:
        """Called by a micro-batch: wait for the others, then have `job` run with the unit's weights in place."""
        return self._local.turn.ask(unit, job)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def _take_part(self, turn: "_Turn", function: Callable[[], Any]) -> Any:
        self._local.turn = turn
        try:
            turn.begin()
            return function()
        except _Stopped:
            return None
        finally:
            self._local.turn = None
            turn.end()


class _Turn:
    """Hands control back and forth between the coordinator and one micro-batch's thread."""

    def __init__(self, index: int):
        self.index = index
        self.future: Future
        self.wants: tuple[Any, Callable] | None = None
        self.answer: Any = None
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._stopped = False

    # the coordinator's side
    def resume(self) -> None:
        """Let the micro-batch run until it wants a unit or ends."""
        self.wants = None
        self._go.release()
        self._paused.acquire()

    def stop(self) -> None:
        self._stopped = True
        self._go.release()
        self.future.exception()

    # the micro-batch's side
    def begin(self) -> None:
        self._go.acquire()
        if self._stopped:
            raise _Stopped

    def ask(self, unit: Any, job: Callable[[], Any]) -> Any:
        self.wants = (unit, job)
        self._paused.release()
        self.begin()
        answer, self.answer = self.answer, None
        return answer

    def end(self) -> None:
        self._paused.release()
