"""Checkpoints in a folder: written in the background while training goes on, read back whole, in part, anywhere.

One folder per step, `FOLDER/STEP`, appears at once when everything in it is on disk:

    STEP/model/           an Orbax tree: parameters and frozen arrays
    STEP/train/           an Orbax tree: optimizer state, step, what was skipped
    STEP/meta/data.json   what the arrays are: configuration, layout, tokenizer hash, data fingerprint, ...; and the
                          checksums of all arrays, and of itself
    STEP.damaged/         one that could not be read, set aside, and STEP.useless/, one from which no update could be
                          made; nothing reads them, and nothing deletes them

Arrays are addressed by names alone (`layers/3/mixer/query`): containers become nested dicts on disk, so empty
ones leave no trace, and a reader may ask for some of the names. Shardings are always the reader's, never the
saved ones. `train` is read only when it is asked for.

The saves are Orbax's free functions rather than its `Checkpointer`, because that one (0.12) asks the preemption
service about old steps from a background thread, which can hide a sync point from the training loop, and deletes
retired checkpoints file by file in place, so that a crash leaves a half-deleted one that looks finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from deconstruct.paths import is_remote, place
from deconstruct.run.checksums import checksums, is_signed, sign, unsigned
from deconstruct.run.memory import hand_back
from deconstruct.run.retention import META, delete, meta_file, remove, remove_unfinished
from deconstruct.types import RunError, UserError

_MODEL, _TRAIN = "model", "train"
_STEPS = ocp.path.step.standard_name_format()
_log = logging.getLogger(__name__)

Names = tuple[str, ...]
_NO_LONGER_SAVED = frozenset({("rng",)})
Result = TypeVar("Result")


class CheckpointGoneError(UserError):
    """The step is not in the folder: never saved, not finished, or deleted (also: while it was being read)."""


class CheckpointDamagedError(UserError):
    """The step is there and finished, and is not what was saved. The message says where."""


class NotFiniteError(FloatingPointError):
    """There is something to save that is not a number. The message names the array."""


class CheckpointSaveError(RunError):
    """A checkpoint could not be written. The message names the step and the folder; `__cause__` says why."""


class Checkpoints:
    """The writer of one folder of checkpoints, which is this class's own: all processes construct it alike.

    Keeps the latest `keep` checkpoints and, if `keep_period` is given, every step it divides. A step is due when
    `every` divides it. What an earlier writer left unfinished is removed on construction. A save that takes
    longer than `timeout` seconds has failed. Only one writer may work on a folder at a time.

    Use `with`, or close it, also when training fails: once the main thread has ended, Python starts no more threads,
    Orbax can neither finish a save nor give it up, and the process hangs until `timeout`.
    """

    def __init__(self, folder: Any, every: int, keep: int, keep_period: int | None = None, *, timeout: int = 1200):
        for name, value in (("every", every), ("keep", keep), ("keep_period", keep_period), ("timeout", timeout)):
            if value is not None and value < 1:
                raise UserError(f"checkpoints: {name} is {value}, and must be at least 1")
        self._folder = _resolve(folder)
        self._every, self._keep, self._keep_period = every, keep, keep_period
        # By name: left to Orbax, a dict that holds nothing but strings and numbers would be taken for an array tree.
        handlers = ocp.handlers.local_registry().add(ocp.handlers.JsonHandler, checkpointable_name=META)
        self._context = ocp.Context()
        self._context.checkpointables.registry = handlers
        self._context.asynchronous.timeout_secs = timeout
        self._folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            remove_unfinished(self._folder)
        # Kept here and not read again, so that every process decides alike whatever its file system shows it when.
        self._steps = set(finished_steps(self._folder))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[list[int]]] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def due(self, step: int) -> bool:
        """Whether `step` (completed optimizer updates) is one to save at."""
        return step > 0 and step % self._every == 0

    def save(self, step: int, model: Any, train: Any, meta: dict[str, Any]) -> bool:
        """Starts to save `step` and returns once the arrays are copied to the host: they may then be donated.

        `model` and `train` are pytrees of arrays or numbers, each with at least one; `meta` is JSON. A save under way
        is waited for first, so that at most one copy is held in memory. Returns False, and does nothing, when
        `step` is already saved. All processes must call it, at the same step.

        Raises CheckpointSaveError for an earlier save that failed in the background, or for this one, and
        NotFiniteError, with nothing written, where an array holds a NaN or an infinity.
        """
        self.wait()
        if step in self._steps:
            return False
        named = {_MODEL: _named(model), _TRAIN: _named(train)}
        empty = [item for item in named if not named[item]]
        if empty:
            raise ValueError(f"checkpoint {step}: there are no arrays in '{empty[0]}'")
        said = sign(meta, {item: _checksums(step, item, arrays) for item, arrays in named.items()})
        items = {**{item: _nest(arrays) for item, arrays in named.items()}, META: said}
        try:
            with self._context:
                # The step is not finished, so what may stand in its place is a ruin.
                saving = ocp.save_checkpointables_async(self._folder / str(step), items, overwrite=True)
        except Exception as error:
            raise self._failure(step, error) from error
        self._pending = step, self._thread.submit(self._finish, saving, self._retired_by(step))
        return True

    @property
    def steps(self) -> frozenset[int]:
        """The finished steps in the folder."""
        return frozenset(self._steps)

    def set_aside(self, step: int, what: str) -> None:
        """Takes a finished step out of the folder's checkpoints, as STEP.what, for somebody to look at."""
        if jax.process_index() == 0:
            aside = self._folder / f"{step}.{what}"
            if aside.exists():
                delete(aside)
            (self._folder / str(step)).rename(aside)
        self._steps.discard(step)

    def check_errors(self) -> None:
        """Raises CheckpointSaveError if the latest save failed in the background. Cheap: call it every step."""
        if self._pending is None or not self._pending[1].done():
            return
        (step, future), self._pending = self._pending, None
        error = future.exception()
        if error is not None:
            raise self._failure(step, error) from error
        self._steps.add(step)
        self._steps.difference_update(future.result())

    def wait(self) -> None:
        """Waits until nothing is being saved, then does as `check_errors`."""
        if self._pending is not None:
            self._pending[1].exception()
        self.check_errors()

    def close(self) -> None:
        """Waits as `wait` does and ends the background thread. May be called twice."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _finish(self, saving: Any, retired: list[int]) -> list[int]:
        saving.result()
        # Only now: the old checkpoints are what a crash would fall back on.
        if jax.process_index() == 0:
            for step in retired:
                remove(self._folder, step)
        hand_back()
        return retired

    def _retired_by(self, step: int) -> list[int]:
        steps = sorted(self._steps | {step})
        return [s for s in steps[: -self._keep] if self._keep_period is None or s % self._keep_period]

    def _failure(self, step: int, error: BaseException) -> CheckpointSaveError:
        # Whatever it is called by whom: what the user has to do is the same.
        full = next((said for said in ("No space left on device", "Disk quota exceeded") if said in str(error)), None)
        remedy = f"{full}; make some room, and run the same command to go on from step {max(self._steps, default=0)}"
        return CheckpointSaveError(
            f"checkpoint {step} could not be saved in {self._folder}: {remedy if full else _line(error)}"
        )


def finished_steps(folder: Any) -> list[int]:
    """The steps saved in `folder`, ascending: those that are complete; none if there is no such folder."""
    folder = _resolve(folder)
    if not folder.is_dir():
        return []
    steps = (found.step for found in _STEPS.find_all(folder))
    return sorted(step for step in steps if meta_file(folder, step).exists())


def latest_step(folder: Any) -> int | None:
    """The highest finished step in `folder`, or None."""
    return max(finished_steps(folder), default=None)


def read_meta(folder: Any, step: int) -> dict[str, Any]:
    """The `meta` saved with `step`. Raises CheckpointGoneError, or CheckpointDamagedError."""
    return _read_meta(folder, step)[0]


def fingerprint(folder: Any, step: int) -> str:
    """What tells a checkpoint from every other: the sha256 of its meta, which holds the checksums of its arrays.
    Raises CheckpointGoneError, or CheckpointDamagedError."""
    folder = _require(folder, step)
    return hashlib.sha256(_reading(folder, step, meta_file(folder, step).read_bytes)).hexdigest()


def _read_meta(folder: Any, step: int) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """The meta of `step` as it was given to `save`, and the checksums of the arrays by item and name."""
    folder = _require(folder, step)
    found = _reading(folder, step, lambda: json.loads(meta_file(folder, step).read_text()))
    signed = is_signed(found)  # otherwise it is of a version that wrote no checksums
    if not isinstance(found, dict) or found.get("step", step if signed else None) != step:
        raise _damaged(folder, step, f"{META}/data.json does not speak of step {step}")
    if not signed:
        return found, {}
    said = unsigned(found)
    if said is None:
        raise _damaged(folder, step, f"{META}/data.json is not what was saved (its checksum)")
    return said


def _checksums(step: int, item: str, arrays: dict[Names, Any]) -> dict[str, int]:
    sums, finite = checksums(list(arrays.values()))
    for names, is_finite in zip(arrays, finite, strict=True):
        if not is_finite:
            raise NotFiniteError(f"checkpoint {step} was not saved: {item}/{'/'.join(names)} is not finite")
    return {"/".join(names): value for names, value in zip(arrays, sums, strict=True)}


def load_model(folder: Any, step: int, abstract: Any, *, partial: bool = False) -> Any:
    """The "model" arrays of `step`, in the structure and with the shardings of `abstract`.

    `abstract` is a pytree of jax.ShapeDtypeStruct, each with a sharding (on any devices). It must name every saved
    array, unless `partial`: then only what it names is read. All processes that share the arrays must call it.

    Raises CheckpointGoneError if the step is not there (any more), UserError, naming the array, if names, shapes or
    dtypes differ, and CheckpointDamagedError if the checkpoint cannot be read, or an array is not the one that was
    saved.
    """
    return _load(folder, step, _MODEL, abstract, partial)


def load_train(folder: Any, step: int, abstract: Any, may_lack: str = "") -> Any:
    """The "train" arrays of `step`; as `load_model`, and always whole, but for what only earlier versions saved.

    may_lack: a name at the top of `abstract` that earlier versions did not save; None stands for each of its arrays.
    """
    return _load(folder, step, _TRAIN, abstract, partial=False, dropped=_NO_LONGER_SAVED, may_lack=may_lack)


def _load(
    folder: Any,
    step: int,
    item: str,
    abstract: Any,
    partial: bool,
    dropped: frozenset[Names] = frozenset(),
    may_lack: str = "",
) -> Any:
    folder = _require(folder, step)
    path = folder / str(step)
    asked = wanted = _named(abstract)
    for names, leaf in wanted.items():
        if getattr(leaf, "sharding", None) is None:
            raise TypeError(f"{'/'.join(names)}: a sharding is needed to load it, and {leaf} has none")
    saved = _reading(folder, step, lambda: _named(ocp.metadata(path, item).metadata))
    if not saved:  # Orbax takes the description of the arrays for empty when it cannot be read; none is saved empty
        raise _damaged(folder, step, f"the description of '{item}' cannot be read")
    saved = {names: leaf for names, leaf in saved.items() if names not in dropped}
    if may_lack and not any(names[0] == may_lack for names in saved):
        wanted = {names: leaf for names, leaf in wanted.items() if names[0] != may_lack}
    _compare(f"{path}: '{item}'", wanted, saved, partial)
    if not wanted:
        return abstract
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        nested = _reading(folder, step, lambda: ocp.load(path, _nest(wanted), checkpointable_name=item))
    loaded = _named(nested)
    _verify(folder, step, item, {names: loaded[names] for names in wanted})
    return jax.tree.unflatten(jax.tree.structure(abstract), [loaded.get(names) for names in asked])


def _verify(folder: epath.Path, step: int, item: str, loaded: dict[Names, Any]) -> None:
    """Raises CheckpointDamagedError, naming the array, for one that is not what was saved."""
    saved = _read_meta(folder, step)[1].get(item)
    if saved is None:
        return  # of a version that wrote none
    sums, _ = checksums(list(loaded.values()))
    for names, found in zip(loaded, sums, strict=True):
        if saved.get("/".join(names)) != found:
            raise _damaged(folder, step, f"{item}/{'/'.join(names)} is not what was saved (its checksum)")


def _compare(where: str, wanted: dict[Names, Any], saved: dict[Names, Any], partial: bool) -> None:
    """Raises UserError for the first name on which what is wanted and what is saved differ."""
    for names, leaf in wanted.items():
        if names not in saved:
            raise UserError(f"{where} has no {'/'.join(names)}; {_kind(leaf)} was expected")
        if _kind(leaf) != _kind(saved[names]):
            raise UserError(f"{where} has {'/'.join(names)} as {_kind(saved[names])}; {_kind(leaf)} was expected")
    if not partial:
        for names, leaf in saved.items():
            if names not in wanted:
                raise UserError(f"{where} has {'/'.join(names)}, {_kind(leaf)}, which was not expected")


def _kind(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _reading(folder: epath.Path, step: int, read: Callable[[], Result]) -> Result:
    """`read()`, with what goes wrong told as it is: the step was deleted meanwhile, or it is damaged."""
    try:
        return read()
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # not the checkpoint's fault
    except Exception as error:
        raise _damaged(folder, step, _line(error)) from error


def _damaged(folder: epath.Path, step: int, why: str) -> CheckpointDamagedError:
    _require(folder, step)  # if it was deleted meanwhile, that is why
    earlier = [s for s in finished_steps(folder) if s < step]
    remedy = f"the one before is step {earlier[-1]}" if earlier else "there is none before it"
    return CheckpointDamagedError(f"{folder / str(step)} is damaged: {why}; {remedy}")


def _require(folder: Any, step: int) -> epath.Path:
    folder = _resolve(folder)
    steps = finished_steps(folder)
    if step not in steps:
        there = f"finished steps: {', '.join(map(str, steps))}" if steps else "it holds no finished checkpoint"
        raise CheckpointGoneError(f"no checkpoint of step {step} in {folder}; {there}")
    return folder


def _named(tree: Any) -> dict[Names, Any]:
    """The leaves of a pytree by the names on the way to them, in the order of jax.tree.leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {tuple(jax.tree_util.keystr((key,), simple=True) for key in path) or ("value",): x for path, x in leaves}
    if len(named) != len(leaves):
        raise ValueError("a tree with two leaves of one name cannot be saved or loaded")
    return named


def _nest(named: dict[Names, Any]) -> dict[str, Any]:
    """Nested dicts of the leaves; a number becomes an array, the only kind of leaf there is on disk."""
    tree: dict[str, Any] = {}
    for names, leaf in named.items():
        branch = tree
        for name in names[:-1]:
            branch = branch.setdefault(name, {})
        branch[names[-1]] = np.asarray(leaf, jnp.result_type(leaf)) if np.isscalar(leaf) else leaf
    return tree


def _resolve(folder: Any) -> epath.Path:
    path = place(folder)
    return path if is_remote(path) else path.resolve()  # Orbax wants absolute paths; epath takes a bucket's for local


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
