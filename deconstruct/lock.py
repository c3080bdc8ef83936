"""One writer to a folder, told apart from those that are gone.

Two files say who writes. `.lock` bears a lock of the system (flock), let go of however the process ends, where the file
system has such locks. `.lock.json` names the holder; it is made so that only one process can have made it, and a thread
gives a sign of life in it every BEAT seconds. A holder whose process has ended is no obstacle. One that only another
machine could see is watched: it is dead if it gives no sign for SILENT seconds. No two machines' clocks are compared.

What this guarantees: where flock works, there is one holder. Elsewhere (buckets, some network file systems), one of
those that start together where nobody holds the folder. Two that take over from the same dead holder at once could both
begin there, and a holder that was frozen for longer than SILENT can wake beside its successor: whoever is not named in
the record finds out within BEAT seconds, and `Lock.check` raises.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import psutil
from etils import epath

from deconstruct.duration import clock
from deconstruct.paths import file_system, is_remote, place
from deconstruct.types import RunError, UserError

BEAT = 10.0  # seconds between two signs of life
SILENT = 60.0  # seconds without one after which a holder that cannot be looked at is dead; NFS shows a file that late
SETTLE = 2.0  # seconds in which two that took over at once, or began in a bucket, see each other
RECORD = ".lock.json"
_WITHOUT_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

log = logging.getLogger(__name__)


class LockLostError(RunError):
    """The folder has another writer now, or none that is known: this one must not go on."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who writes. Times are seconds since the epoch."""

    verb: str
    host: str
    machine: str  # what the process number is relative to
    pid: int
    process_started: float
    since: float
    token: str  # of this one hold
    beat: float  # the last sign of life

    def gone(self) -> bool | None:
        """Whether its process has ended. None where it cannot be seen from here."""
        if self.machine != _machine():
            return None
        try:
            process = psutil.Process(self.pid)
            another = abs(process.create_time() - self.process_started) > 2  # the kernel's clock is adjusted at times
            return another or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def age(self) -> float:
        """Seconds since the last sign of life."""
        return max(0.0, time.time() - self.beat)

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"host {self.host}, process {self.pid}, since {since}, last sign of life {clock(self.age())} ago"


def read_holder(folder: os.PathLike[str] | str) -> Holder | None:
    """Who is named as writing to a folder, dead or alive; None where nobody is, or the record cannot be read."""
    seen = _look(place(folder) / RECORD)
    return seen.holder if seen else None


@contextmanager
def alone_in(folder: os.PathLike[str] | str, option: str, verb: str) -> Iterator[Lock]:
    """Holds the lock of a folder that is there, which may be in a bucket.

    Raises UserError, naming the holder, where another process has it, or where the folder cannot be written to.
    """
    lock = Lock(folder, option, verb)
    try:
        lock.acquire()
    except OSError as error:
        lock.release()
        raise UserError(f"{option}={folder}: cannot be written to ({error.strerror or error})") from error
    except BaseException:
        lock.release()
        raise
    try:
        yield lock
    finally:
        lock.release()


class Lock:
    """A hold of one folder. `predecessor` is the dead holder it was taken over from, if there was one."""

    predecessor: Holder | None = None

    def __init__(self, folder: os.PathLike[str] | str, option: str, verb: str):
        path = place(folder)  # absolute: a notebook may change the folder it is in
        self._folder = path if is_remote(path) else epath.Path(os.path.abspath(path))
        self._verb = verb
        self._named = f"{option}={folder}"
        self._path = self._folder / RECORD
        self._token, self._since = uuid.uuid4().hex, time.time()
        self._system: IO[str] | None = None
        self._held = False
        self._lost: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beats, name="lock", daemon=True)

    def check(self) -> None:
        """Raises LockLostError where another process has taken the folder over. Cheap: call it every step."""
        if self._lost is not None:
            raise LockLostError(self._lost)

    def acquire(self) -> None:
        if not is_remote(self._path):
            self._ask_the_system()
        for _ in range(3):
            if self._create():
                break
            self._displace_the_dead()
        else:
            raise self._refusal(_look(self._path))
        self._held = True
        if is_remote(self._path) or (self.predecessor and self._system is None):
            time.sleep(SETTLE)
            self._look_after_it()
            if self._lost is not None:
                raise self._refusal(_look(self._path))
        self._thread.start()

    def _ask_the_system(self) -> None:
        for _ in range(20):
            try:
                self._system = _flock(self._folder / ".lock")
                return
            except BlockingIOError:
                seen = _look(self._path)
                if seen and seen.holder and not seen.holder.gone():
                    raise self._refusal(seen) from None
                time.sleep(0.05)  # it has only just begun, or is about to be gone
        raise self._refusal(_look(self._path))

    def release(self) -> None:
        """Also where it is not held. What cannot be removed is only said: the next writer finds this process gone."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(BEAT)
        if self._held:
            self._held = False
            try:
                if self._is_ours(_look(self._path)):
                    self._path.unlink()
            except OSError as error:
                log.warning("%s could not be removed: %s", self._path, error)
        if self._system is not None:
            self._system.close()
            self._system = None

    def _displace_the_dead(self) -> None:
        """Removes the record of a holder that is dead. Raises UserError for one that lives."""
        seen = _look(self._path)
        if seen is None:
            return  # it has just ended
        gone = seen.holder.gone() if seen.holder else None
        if gone is None:
            who = str(seen.holder) if seen.holder else "whose record cannot be read"
            log.info("%s: waiting up to %.0f s for a sign of life of a %s: %s", self._named, SILENT, self._verb, who)
            gone = self._stays_silent(seen)
        now = _look(self._path)
        if now is None:
            return
        if not gone or now != seen:
            raise self._refusal(now)
        log.warning("%s: taking over from a %s that is gone: %s", self._named, self._verb, seen.holder or "unknown")
        self._path.unlink(missing_ok=True)
        self.predecessor = seen.holder

    def _stays_silent(self, seen: _Seen) -> bool:
        deadline = time.monotonic() + SILENT
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT / 4))
            if _look(self._path) != seen:
                return False
        return True

    def _refusal(self, seen: _Seen | None) -> UserError:
        who = f": {seen.holder}" if seen and seen.holder else " (it has left no record)"
        verb = seen.holder.verb if seen and seen.holder else self._verb
        return UserError(f"{self._named}: another {verb} is writing here{who}; wait for it to end, or end it")

    def _create(self) -> bool:
        """Makes the record, if there is none."""
        text = json.dumps(self._record())
        if not is_remote(self._path):
            try:
                file = open(self._path, "x")  # noqa: SIM115 (what fails from here on is not that it is there)
            except FileExistsError:
                return False
            try:
                with file:
                    file.write(text)
            except OSError:  # the disk is full
                self._path.unlink()
                raise
            return True
        address = os.fspath(self._path)
        try:
            file_system(address).pipe_file(address, text.encode(), mode="create")
        except OSError:  # S3 says it with another error than the others
            if self._path.exists():
                return False
            raise
        return True

    def _record(self) -> dict[str, Any]:
        process = psutil.Process()
        me = Holder(
            verb=self._verb,
            host=socket.gethostname(),
            machine=_machine(),
            pid=process.pid,
            process_started=process.create_time(),
            since=self._since,
            token=self._token,
            beat=time.time(),
        )
        return dataclasses.asdict(me)

    def _beats(self) -> None:
        while not self._ended.wait(BEAT) and self._lost is None:
            try:
                self._look_after_it()
            except Exception as error:  # a bucket may fail in any way, and may be back at the next beat
                log.warning("%s: no sign of life could be given: %s", self._path, error)

    def _look_after_it(self) -> None:
        """Gives a sign of life, or learns that there is another writer."""
        seen = _look(self._path)
        if not self._is_ours(seen):
            who = f"is held by another {self._verb} now: {seen.holder}" if seen else "has lost its record of who writes"
            self._lost = f"{self._named} {who}; this process must not go on"
        elif is_remote(self._path):
            self._path.write_text(json.dumps(self._record()))
        else:
            os.utime(self._path)  # takes no space, and readers never see half a record

    def _is_ours(self, seen: _Seen | None) -> bool:
        return bool(seen and seen.holder and seen.holder.token == self._token)


_KINDS = {
    field.name: {"str": str, "int": int, "float": int | float}[str(field.type)] for field in dataclasses.fields(Holder)
}


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A record at one moment: what it says, and who that is, if it can be read."""

    text: str
    modified: float
    holder: Holder | None


def _look(path: epath.Path) -> _Seen | None:
    """None where there is no record."""
    try:
        if is_remote(path):
            text, modified = path.read_text(), 0.0
        else:
            with open(path) as file:  # opening it makes NFS ask the server
                text, modified = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    try:
        holder = Holder(**json.loads(text))
        if not all(isinstance(getattr(holder, name), kind) for name, kind in _KINDS.items()) or holder.pid < 1:
            raise TypeError
        return _Seen(text, modified, dataclasses.replace(holder, beat=max(holder.beat, modified)))
    except (ValueError, TypeError):
        return _Seen(text, modified, None)


def _flock(path: epath.Path) -> IO[str] | None:
    """The system's lock on a file, or None where there are none. Raises BlockingIOError where another has it."""
    file = open(path, "a")  # noqa: SIM115 (it is open for as long as the lock is held)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(*error.args) from error
        if error.errno not in _WITHOUT_FLOCK:
            raise
        return None
    return file


def _machine() -> str:
    """What process numbers are relative to: this boot of this machine, and the namespace of this process."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()
