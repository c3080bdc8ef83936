"""Saving a run and going on with it: what identifies a run, and what must be the same when it is continued."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from deconstruct.attention.variants import fixed_source
from deconstruct.config import Config
from deconstruct.model.restack import to_segments
from deconstruct.run import checkpoint
from deconstruct.run.checkpoint import CheckpointDamagedError, CheckpointGoneError, Checkpoints
from deconstruct.run.workdir import Workdir
from deconstruct.train.guard import new_guard
from deconstruct.train.state import StateSpec, TrainState, running_form, saved_form
from deconstruct.types import UserError

log = logging.getLogger(__name__)

# Model settings that change how the arrays are computed, not what they are.
FREE_MODEL_KEYS = ("dtype", "impl", "scan", "remat", "init_std", "fixed_std", "fixed_text")
# Where 0 and the number that it stands for are the same model: the numbers are compared.
RESOLVED_MODEL_KEYS = {"num_kv_heads": "kv_heads", "head_dim": "head_size"}
# With the data's fingerprint these determine every batch.
DATA_KEYS = ("seed", "batch_size", "sequence_length")
# With the teacher's checkpoint these determine every stage of distillation.
DISTILL_KEYS = ("mixer_steps", "logit_steps", "temperature")


def make_meta(
    config: Config,
    step: int,
    data_fingerprint: str,
    tokenizer_fingerprint: str,
    teacher: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a checkpoint says of itself. `data.position` counts the training windows consumed; `teacher` is the
    checkpoint that the run has learned from, if there is one."""
    return {
        "step": step,
        "config": config.to_dict(),
        "layout": list(config.model.layers),
        "tokenizer": tokenizer_fingerprint,
        "data": {"fingerprint": data_fingerprint, "position": step * config.batch_size},
        **({} if teacher is None else {"teacher": teacher}),
    }


def check_same_run(config: Config, meta: dict[str, Any], data_fingerprint: str, tokenizer_fingerprint: str) -> None:
    """Raises UserError, naming the difference, where a checkpoint is not of the run that `config` describes.

    An imported checkpoint has no data (`meta["data"]` is None): the run takes its own, over the same model.
    """
    saved = Config.from_dict(meta["config"])
    trained = meta["data"] is not None
    if meta["tokenizer"] not in (tokenizer_fingerprint, None):
        raise UserError(
            f"config.data={config.data}: its tokenizer is {tokenizer_fingerprint[:12]}, the checkpoint was trained "
            f"with {meta['tokenizer'][:12]}; give the data it was trained on, or another --workdir"
        )
    if trained and meta["data"]["fingerprint"] != data_fingerprint:
        raise UserError(
            f"config.data={config.data}: its fingerprint is {data_fingerprint[:12]}, the checkpoint was trained "
            f"on {meta['data']['fingerprint'][:12]} ({saved.data}); give that data, or another --workdir"
        )
    differing = [(key, getattr(config, key), getattr(saved, key)) for key in DATA_KEYS if trained]
    free = FREE_MODEL_KEYS if fixed_source(config.model.layers) else (*FREE_MODEL_KEYS, "fixed_length")
    differing += [
        (f"model.{field.name}", getattr(config.model, field.name), getattr(saved.model, field.name))
        for field in dataclasses.fields(config.model)
        if field.name not in (*free, *RESOLVED_MODEL_KEYS)
    ]
    differing += [
        (f"model.{key}", getattr(config.model, resolved), getattr(saved.model, resolved))
        for key, resolved in RESOLVED_MODEL_KEYS.items()
    ]
    differing += [("border_loss", config.border_loss, saved.border_loss)] if trained else []
    differing += [
        (f"distill.{key}", getattr(config.distill, key), getattr(saved.distill, key)) for key in DISTILL_KEYS if trained
    ]
    differing.append(("extensions", config.code, saved.code))
    for key, now, before in differing:
        if now != before:
            key = {"model.layers": "layout", "model.document_mask": "document_mask"}.get(key, key)
            raise UserError(
                f"config.{key}={_short(now)}, but this workdir holds a run with {_short(before)}; "
                "set it back, or give another --workdir"
            )


def _short(value: Any) -> str:
    return ",".join(str(entry) for entry in value) if isinstance(value, tuple) else str(value)


def latest_readable(run_dir: Workdir) -> tuple[int | None, dict[str, Any] | None]:
    """The latest finished step whose meta can be read, and that; as process 0 sees it, since a shared file system may
    show the others an older listing. Raises CheckpointDamagedError where there are some and none can be read."""
    found, meta = _latest_readable_here(run_dir) if jax.process_index() == 0 else (-1, None)
    if jax.process_count() > 1:
        found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if jax.process_index() != 0 and found >= 0:
            meta = checkpoint.read_meta(run_dir.checkpoints, found)
    return (None, None) if found < 0 else (found, meta)


def _latest_readable_here(run_dir: Workdir) -> tuple[int, dict[str, Any] | None]:
    error = None
    for step in reversed(checkpoint.finished_steps(run_dir.checkpoints)):
        try:
            return step, checkpoint.read_meta(run_dir.checkpoints, step)
        except CheckpointGoneError:  # a trainer is at work there: later ones have taken its place
            return _latest_readable_here(run_dir)
        except CheckpointDamagedError as damage:
            log.warning("%s", damage)
            error = damage
    if error is not None:
        raise error
    return -1, None


def _everywhere(holds: bool) -> bool:
    """Whether it holds on every process."""
    return holds if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(holds)).min())


class RunCheckpoints:
    """The checkpoints of one run: TrainStates in, TrainStates out, on the run's own mesh."""

    def __init__(self, writer: Checkpoints, folder: Any, spec: StateSpec, config: Config):
        self._writer, self._folder, self._spec = writer, folder, spec
        plan = config.model.plan
        self._saved_form = jax.jit(lambda state: saved_form(state, plan))
        self._running_form = jax.jit(
            lambda model, train: running_form(model, train, plan), out_shardings=spec.shardings
        )
        self._begin = jax.jit(
            lambda model: spec.begin(to_segments(model["params"], plan), model["frozen"]), out_shardings=spec.shardings
        )
        self._abstract = saved_form(spec.abstract, plan)

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> bool:
        """Starts to save; the state may be donated when this returns. False where the step is saved already."""
        model, train = self._saved_form(state)
        return self._writer.save(step, model, train, meta)

    def begin(self, step: int, fixed_tokens: jax.Array | None) -> TrainState:
        """Step 0 from an imported checkpoint: its model and a fresh optimizer. `fixed_tokens` replace a fixed text."""
        model = checkpoint.load_model(self._folder, step, self._abstract[0])
        if fixed_tokens is not None:
            model["frozen"]["fixed"] = jax.device_put(fixed_tokens, model["frozen"]["fixed"].sharding)
        return self._begin(model)

    def restore(self, step: int) -> tuple[TrainState, int]:
        """The state of a step, or of the latest before it that is what was saved; and which that is. The steps after it
        are set aside, and said. Raises CheckpointDamagedError where there is none."""
        state, error = None, None
        try:
            state = self._restore(step)
        except CheckpointDamagedError as damage:
            log.warning("%s", damage)
            error = damage
        if _everywhere(error is None) and state is not None:
            for later in [s for s in self._writer.steps if s > step]:
                self._writer.set_aside(later, "damaged")
                log.warning(
                    "%s is set aside as %d.damaged; going on from step %d", self._folder / str(later), later, step
                )
            return state, step
        earlier = max((s for s in self._writer.steps if s < step), default=None)
        if earlier is None:
            raise error or CheckpointDamagedError(f"{self._folder / str(step)} is damaged, as another process finds")
        return self.restore(earlier)

    def _restore(self, step: int) -> TrainState:
        model, train = (
            checkpoint.load_model(self._folder, step, self._abstract[0]),
            checkpoint.load_train(self._folder, step, self._abstract[1], may_lack="guard"),
        )
        if train["guard"].skipped is None:  # of a version that skipped nothing
            train["guard"] = new_guard()
        return self._running_form(model, train)
