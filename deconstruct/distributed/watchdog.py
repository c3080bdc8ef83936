"""Ends a process that no longer gets on, and leaves behind where it stood."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import tempfile
import threading
import time

from etils import epath


class Watchdog:
    """Within it, `fed` must be called at least every `seconds`. Otherwise the stacks of all threads are written to
    FOLDER/stacks-HOST-PROCESS.txt and the process ends with status 1, whatever it was waiting for: one that waits for
    ever for another holds the whole cluster. `seconds` of 0: no watch is kept."""

    def __init__(self, seconds: float, folder: os.PathLike[str] | str):
        self._seconds = seconds
        self._file = epath.Path(folder) / f"stacks-{socket.gethostname()}-{os.getpid()}.txt"
        self._fed = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.fed()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def fed(self) -> None:
        self._fed = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() - self._fed > self._seconds:
                self._end()

    def _end(self) -> None:
        said = f"watchdog: no step for {self._seconds:g} s; "
        try:
            with tempfile.TemporaryFile() as file:  # the stacks need a real file; the folder may be a bucket
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                self._file.write_bytes(file.read())
            said += f"the stacks of all threads are in {self._file}\n"
        except Exception as error:  # the folder may be what hangs or is full
            said += f"the stacks could not be written to {self._file} ({error}):\n"
            os.write(2, said.encode())
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            said = ""
        os.write(2, said.encode())
        os._exit(1)
