"""Who does the work of prepare: processes of this machine, or the workers of a Dask cluster. Both are executors of
concurrent.futures."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from pathlib import Path
from typing import Any

from deconstruct.data.progress import Progress
from deconstruct.paths import place
from deconstruct.types import UserError

DASK = "dask:"
PROCESSES = "processes"
POLL_SECONDS = 0.25
CONNECT_SECONDS = 10
TELL_CHARACTERS = 200_000

_counter: Any = None  # shared by the processes of this machine: documents, characters


class Crew:
    """Runs jobs on an executor. `width()`: how many it does at once, by now."""

    def __init__(self, executor: Executor, width: Callable[[], int], counted: Callable[[], tuple[int, int]]):
        self._executor, self._width, self._counted = executor, width, counted

    def map(
        self, function: Callable[..., Any], jobs: Iterable[tuple], total: int, what: str,
        take: Callable[[Any], object] = bool,
    ) -> None:  # fmt: skip
        """Hands function(*job, tell=...) of each job to `take`, in the order in which they end, and shows progress.

        A job is asked for when there is somebody to do it: two for each at work are under way at any time, whatever
        their number is in all.
        """
        waiting: set[Future] = set()
        coming = iter(jobs)
        before, done, more = self._counted(), 0, True
        with Progress(what, total) as progress:
            while more or waiting:
                most = 2 * self._width()
                while more and len(waiting) < most:
                    job = next(coming, None)
                    if job is None:
                        more = False
                    else:
                        waiting.add(self._executor.submit(_told, function, job))
                finished, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                done += len(finished)
                while finished:
                    take(finished.pop().result())
                progress.show(done, *(now - then for now, then in zip(self._counted(), before, strict=True)))


def check_engine(engine: str, workers: int) -> None:
    """Raises UserError for another engine than `processes` and `dask:ADDRESS`."""
    if engine == PROCESSES:
        return
    if not engine.removeprefix(DASK) or not engine.startswith(DASK):
        raise UserError(f"--executor={engine}: expected {PROCESSES}, or {DASK}ADDRESS such as {DASK}tcp://host:8786")
    if workers:
        raise UserError(f"--workers={workers}: the workers are those of --executor={engine}; leave it out")


@contextlib.contextmanager
def open_crew(engine: str, workers: int, folder: str) -> Iterator[Crew]:
    """The crew of an engine (see `check_engine`); leaving the context sends it home.

    `folder`: where all of them will write. Raises UserError for a cluster that does not answer, or whose workers have
    another version of this package or do not see the folder.
    """
    if engine != PROCESSES:
        with _dask(engine, folder) as crew:
            yield crew
        return
    global _counter
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    counter = context.Array("q", 2)
    executor: Executor
    if workers == 1:
        executor = ThreadPoolExecutor(1, initializer=_begin, initargs=(counter, False))
    else:
        executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(counter, True))
    try:
        yield Crew(executor, lambda: workers, lambda: (counter[0], counter[1]))
    except BrokenExecutor:
        raise UserError(
            f"--workers={workers}: one of them was killed (is there memory for so many?); the same command goes on "
            "from what is done"
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _dask(engine: str, folder: str) -> Iterator[Crew]:
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise UserError(f"--executor={engine}: needs the extra dask: pip install 'deconstruct[dask]'") from None
    address = engine.removeprefix(DASK)
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise UserError(f"--executor={engine}: no scheduler answers there ({type(error).__name__}: {said})") from None
    with client:
        _check_workers(client, engine, folder)
        try:
            executor = client.get_executor(pure=False)
            yield Crew(executor, lambda: max(1, sum(client.nthreads().values())), lambda: (0, 0))
        except KilledWorker as error:
            raise UserError(
                f"--executor={engine}: a unit has ended one worker after another (have they the memory for it?): "
                f"{str(error).splitlines()[0]}"
            ) from None


def _check_workers(client: Any, engine: str, folder: str) -> None:
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError:
        raise UserError(f"--executor={engine}: the scheduler has no worker; start one: dask worker ADDRESS") from None
    try:
        found = client.run(look, folder)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--executor={engine}: its workers cannot import this version of deconstruct ({error}); install it there"
        ) from None
    for worker, (code, sees) in found.items():
        if code != own_code():
            raise UserError(f"--executor={engine}: {worker} has another version of deconstruct; install this one there")
        if not sees:
            raise UserError(
                f"--output={folder}: {worker} does not see this folder; give one that all machines share, or gs://, s3://"
            )


def look(folder: str) -> tuple[str, bool]:
    """What a worker says of itself: the code it would run, and whether it sees a folder."""
    return own_code(), place(folder).exists()


@functools.cache
def own_code() -> str:
    """sha256 of what decides what comes out: the files of this folder, and the versions of what it tokenizes with."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for library in ("sentencepiece", "tokenizers"):
        digest.update(importlib.metadata.version(library).encode())
    return digest.hexdigest()


def _told(function: Callable[..., Any], job: tuple) -> Any:
    tell = _Teller()
    result = function(*job, tell=tell)
    tell.now()
    return result


def _begin(counter: Any, is_process: bool) -> None:
    global _counter
    _counter = counter
    if is_process:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for each core already
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


class _Teller:
    """Adds to the counter that is shared, if there is one, and not oftener than its lock allows without cost."""

    def __init__(self) -> None:
        self._documents = self._characters = 0

    def __call__(self, characters: int) -> None:
        self._documents += 1
        self._characters += characters
        if self._characters >= TELL_CHARACTERS:
            self.now()

    def now(self) -> None:
        if _counter is not None:
            with _counter.get_lock():
                _counter[0] += self._documents
                _counter[1] += self._characters
        self._documents = self._characters = 0
