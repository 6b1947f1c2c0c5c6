"""Prefetch: a bounded number of batches made ahead by threads, delivered in order.

    consumer   | take 0 | take 1 |   ...            at most `depth` batches are begun and not yet taken:
    threads    | parts of 0, 1, 2 | parts of 3 ...  a slow consumer stops the threads, a fast one waits for them

A batch is begun by one task; that adds one task for each of its parts (images); the last part to end begins another
round of parts, or finishes the batch. Free threads take tasks of the oldest batch first.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from heapq import heappop, heappush
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

T = TypeVar("T")
Result = TypeVar("Result", covariant=True)


Task = Callable[[], None]


class Work(Protocol[Result]):
    """A batch to be made; each method runs in some thread of the pool."""

    def begin(self) -> int:
        """Prepare, and return the number of parts of the first round; 0 if it has none."""

    def make(self, part: int) -> None:
        """Make one part of the round; parts run beside each other."""

    def go_on(self) -> int:
        """Return, after all parts of a round are made, the number of parts of the next; 0 if there is none."""
        return 0

    def finish(self) -> Result:
        """Return the batch after all rounds."""


class _Job(Generic[T]):
    """A work on its way: its result, and how many parts of its round are still to come."""

    def __init__(self, work: Work[T], submit: Callable[[Task], None]) -> None:
        self.work = work
        self.result: Future[T] = Future()
        self.stopped = False
        self._submit = submit
        self._left = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin in the pool."""
        self._submit(partial(self._guard, lambda: self._make_all(self.work.begin())))

    def stop(self) -> None:
        """Do nothing more for it; whoever still waits for the result gets `CancelledError`."""
        self.stopped = True
        self.result.cancel()

    def _make_all(self, num_parts: int) -> None:
        """Begin a round of so many parts; where there is none, the work ends."""
        if num_parts == 0 and (num_parts := self.work.go_on()) == 0:
            self.result.set_result(self.work.finish())
            return
        self._left = num_parts
        for part in range(num_parts):
            self._submit(partial(self._guard, partial(self._make, part)))

    def _make(self, part: int) -> None:
        self.work.make(part)
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._make_all(0)

    def _guard(self, task: Task) -> None:
        """Run a task unless the job was stopped; hand its exception to the consumer, the first one only."""
        if self.stopped:
            return
        try:
            task()
        except BaseException as error:
            with self._lock:
                first = not self.stopped
                self.stopped = True
            if first:
                self.result.set_exception(error)


class Prefetcher:
    """A pool of `num_threads` threads that stays up to `depth` batches ahead of the consumer."""

    def __init__(self, num_threads: int, depth: int) -> None:
        assert num_threads >= 1
        assert depth >= 1
        self.num_threads = num_threads
        self.depth = depth
        self._open: list[deque[_Job[Any]]] = []
        self._tasks: list[tuple[int, int, Task]] = []
        """A heap: number of the job, number of the task."""
        self._lock = threading.Lock()
        self._job_numbers, self._task_numbers = count(), count()
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="paceline-data")

    def stream(self, works: Iterable[Work[T]]) -> Generator[T, None, None]:
        """Deliver the results of `works` in order; an exception of a thread is raised here.

        Works that are on their way when the consumer stops are dropped.
        """
        coming = iter(works)
        jobs: deque[_Job[T]] = deque()
        self._open.append(jobs)
        try:
            for work in islice(coming, self.depth):
                jobs.append(self._start(work))
            while jobs:
                result = jobs[0].result.result()
                jobs.popleft()
                for work in islice(coming, 1):
                    jobs.append(self._start(work))
                yield result
        finally:
            self._open.remove(jobs)
            for job in jobs:
                job.stop()

    def ready(self) -> bool:
        """Whether the next result of the stream that was opened last is there, so that nobody has to wait for it."""
        return bool(self._open and self._open[-1]) and self._open[-1][0].result.done()

    def close(self) -> None:
        """Stop all threads, and wait until they have: at most as long as one image takes."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        for jobs in self._open:
            for job in jobs:
                job.stop()

    def _start(self, work: Work[T]) -> _Job[T]:
        job = _Job(work, partial(self._submit, next(self._job_numbers)))
        job.start()
        return job

    def _submit(self, job: int, task: Task) -> None:
        with self._lock:
            heappush(self._tasks, (job, next(self._task_numbers), task))
        self.pool.submit(self._run_next)

    def _run_next(self) -> None:
        with self._lock:
            _, _, task = heappop(self._tasks)
        task()
