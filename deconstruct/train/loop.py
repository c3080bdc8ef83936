"""The training run: from a configuration and a workdir to a trained, checkpointed model.

The loop never waits for the step it has just dispatched: it reads the metrics of the one before, so the device
always has work queued. Running the same command again resumes from the latest finished checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from deconstruct.attention.extensions import without_file
from deconstruct.attention.trial import sees_the_future
from deconstruct.attention.variants import reads_fixed_text
from deconstruct.config import Config
from deconstruct.costs import accounting
from deconstruct.data import pipeline, tokenizer
from deconstruct.data.manifest import Manifest, load_manifest
from deconstruct.distributed import runtime
from deconstruct.distributed.agreement import agree
from deconstruct.distributed.lifeline import told_to_the_others
from deconstruct.distributed.mesh import check_batch
from deconstruct.distributed.sharding import batch_spec
from deconstruct.distributed.stop import StopSignal
from deconstruct.distributed.watchdog import Watchdog
from deconstruct.experiment import load_config
from deconstruct.model.placement import mesh_for
from deconstruct.paths import is_remote
from deconstruct.run import extensions
from deconstruct.run.checkpoint import Checkpoints
from deconstruct.run.clock import Clock
from deconstruct.run.session import Session, session
from deconstruct.run.workdir import Workdir
from deconstruct.train.ahead_of_time import lower_step
from deconstruct.train.distillation import (
    Stage,
    Teacher,
    find_teacher,
    stage_of,
    stages_from,
    with_fresh_moments,
)
from deconstruct.train.optimizer import make_optimizer
from deconstruct.train.report import Report, SkippedTooOftenError
from deconstruct.train.resume import RunCheckpoints, check_same_run, latest_readable, make_meta
from deconstruct.train.state import StateSpec, TrainState, make_state_spec
from deconstruct.types import UserError

STOPPED = 75  # EX_TEMPFAIL: saved after SIGTERM or Ctrl-C, to be run again

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:ARGUMENT]", help="a config file, such as configs/quickstart.py"
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="the folder of this run; a run found there is resumed"
    )
    runtime.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """The verb `train`. Returns the exit status."""
    config = load_config(arguments.config, arguments=arguments.overrides)
    runtime.start(arguments)
    with told_to_the_others():
        return train(config, arguments.workdir)


def train(config: Config, workdir: os.PathLike[str] | str) -> int:
    """Trains to `config.steps`. Returns 0, or 75 where SIGTERM or Ctrl-C ended it early with a checkpoint saved.

    Raises UserError for what the user can mend, FloatingPointError where too many updates in a row were not finite (or
    spikes), CheckpointSaveError where a checkpoint could not be written.
    """
    manifest = load_manifest(config.data)
    _check_data(config, manifest)
    mesh = mesh_for(config.model, config.mesh)
    check_batch(config, mesh)
    run_dir = Workdir(workdir)
    agree("run", lambda: _same_everywhere(config, manifest, run_dir))
    # A resumed run then starts without compiling again.
    if jax.default_backend() != "cpu" and not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", os.fspath(run_dir.folder / "compilation_cache"))
    keep_period = config.checkpoint.keep_period or None
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        stack.enter_context(jax.set_mesh(mesh))
        run = Run(config, manifest, mesh, run_dir)  # a mistake of the user's ends here, before anything is written
        if run.is_done():
            return 0
        run_dir.make()
        turn = stack.enter_context(session(run_dir, run.clock))
        agree("workdir", dict)  # process 0 may have been refused, and no other waits for it then
        if latest_readable(run_dir)[0] != run.latest:  # another trainer has saved more, and ended, meanwhile
            clock, run = run.clock, Run(config, manifest, mesh, run_dir)
            run.clock = clock
            if run.is_done():
                return 0
        writer = stack.enter_context(
            Checkpoints(run_dir.checkpoints, config.checkpoint_every, config.checkpoint.keep, keep_period)
        )
        watchdog = stack.enter_context(Watchdog(config.faults.no_step_for, run_dir.folder))
        return run.train(writer, turn, stop, watchdog)


def _same_everywhere(config: Config, manifest: Manifest, run_dir: Workdir) -> dict[str, Any]:
    """What all processes must have been given alike, by the names a user knows. `data` may lie elsewhere on each
    machine; what is in it may not differ."""
    values = {**config.to_dict(), "extensions": config.code, "data": f"fingerprint {manifest.fingerprint[:12]}"}
    flat = {f"config.{key}": value for key, value in values.items() if key != "code" and not isinstance(value, dict)}
    groups = {name: group for name, group in values.items() if isinstance(group, dict)}
    flat |= {f"config.{name}.{key}": value for name, group in groups.items() for key, value in group.items()}
    folder = run_dir.folder if is_remote(run_dir.folder) else run_dir.folder.resolve()
    return {"--workdir": os.fspath(folder), **flat}


def _check_data(config: Config, manifest: Manifest) -> None:
    if manifest.tokenizer["vocab_size"] > config.model.vocab_size:  # fewer: imported models keep rows in reserve
        raise UserError(
            f"config.model.vocab_size={config.model.vocab_size}: the tokenizer of {config.data} has "
            f"{manifest.tokenizer['vocab_size']} pieces; 0 takes the tokenizer's"
        )


def _check_code(config: Config) -> None:
    """Raises UserError for a layer that no other process could run again."""
    name = without_file(config.model.layers)
    if name is not None:
        raise UserError(
            f"variant {name!r}: it is defined in no file (a notebook's cell?), so the run could not be opened again; "
            "put it into a file and name that with config.extensions"
        )


def _check_causal(config: Config) -> None:
    """Raises UserError for a layer that sees what it is to foretell: it would train well, and know nothing."""
    for name in dict.fromkeys(config.model.layers):
        leak = sees_the_future(name, config.model)
        if leak is not None:
            raise UserError(
                f"variant {name!r}: position {leak.position} changes when position {leak.future} does: it sees the "
                f"future; dc.check({name!r}) says more"
            )


def _of_step(stage: Stage) -> str:
    return f"program of the step ({stage} stage)" if stage else "program of the step"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Run:
    """One process's part in a run. Making it checks all that the user can have got wrong, and writes nothing."""

    def __init__(self, config: Config, manifest: Manifest, mesh: jax.sharding.Mesh, run_dir: Workdir):
        self.config, self.manifest, self.mesh, self.run_dir = config, manifest, mesh, run_dir
        self.clock = Clock()
        self.spec: StateSpec = make_state_spec(config, make_optimizer(config), mesh)
        self.rows = jax.sharding.NamedSharding(mesh, batch_spec())
        self.latest, self.meta = latest_readable(run_dir)
        meta = self.meta
        if meta is not None:
            check_same_run(config, meta, manifest.fingerprint, manifest.tokenizer["sha256"])
        _check_code(config)
        self.tokenizer = tokenizer.of_prepared(config.data, manifest)
        # A new run chooses its fixed text, and so does one that starts from an imported checkpoint without any.
        chooses = meta is None or (meta["data"] is None and "frozen/fixed" in meta["drawn"])
        self.fixed_tokens = self._fixed_tokens() if chooses else None
        pipeline.Windows(config.data, "train", config.sequence_length)
        if meta is None:
            _check_causal(config)
        self.teacher: Teacher | None = None
        self.taught_by = meta.get("teacher") if meta is not None else None
        self.lowered: dict[Stage, jax.stages.Lowered] = {}
        self._lower(self.latest or 0)
        flops = accounting.train_flops(config.model, config.batch_size, config.sequence_length).needed
        peak = accounting.peak_flops(mesh.devices.flat[0])
        self.utilisation_per_rate = flops / (peak * mesh.size) if peak else None  # MFU at one step a second

    def _lower(self, first: int) -> None:
        """Finds the teacher and lowers the step of each stage after `first`, where that is not done yet."""
        missing = [stage for stage in stages_from(self.config, first) if stage not in self.lowered]
        if any(missing) and self.teacher is None:
            self.teacher = find_teacher(
                self.config, self.run_dir, self.manifest.tokenizer["sha256"], self.taught_by, self.mesh
            )
            identity = self.taught_by = self.teacher.identity
            agree("teacher", lambda: {"config.distill.teacher": f"step {identity['step']}, {identity['fingerprint']}"})
        with self.clock.measure("compile"):
            for stage in missing:
                teacher = self.teacher if stage else None
                self.lowered[stage] = lower_step(self.config, self.spec, self.mesh, stage, teacher)
        if missing:
            agree("program", lambda: {_of_step(s): _sha256(self.lowered[s].as_text()) for s in missing})

    def is_done(self) -> bool:
        """Whether no step is left, which is said."""
        if self.latest is None or self.latest < self.config.steps:
            return False
        log.info("step %d of config.steps=%d: nothing left to do", self.latest, self.config.steps)
        return True

    def train(self, writer: Checkpoints, turn: Session, stop: StopSignal, watchdog: Watchdog) -> int:
        config = self.config
        checkpoints = RunCheckpoints(writer, self.run_dir.checkpoints, self.spec, config)
        state, first = self._start(checkpoints)
        self._lower(first)  # the latest checkpoint may have been damaged, and one before it be an earlier stage's
        stages = stages_from(config, first)
        compiled = {}
        for stage in stages:
            watchdog.fed()
            with self.clock.measure("compile"):
                compiled[stage] = self.lowered[stage].compile()
        watchdog.fed()
        taught = self._teachers_arrays() if any(stages) else ()
        agree("compiled", dict)  # from here on they wait for each other without a limit
        turn.begin(first)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        owed = False  # a checkpoint that was due while updates were skipped
        status = 0
        with contextlib.ExitStack() as stack:
            batches = stack.enter_context(contextlib.closing(self._batches(first)))
            report = stack.enter_context(contextlib.closing(self._report(batches, first)))
            stack.enter_context(self._useless_set_aside(writer))
            for step in range(first + 1, config.steps + 1):
                watchdog.fed()
                with self.clock.measure("data"):
                    rows = self._to_devices(next(batches))
                stage = stage_of(config.distill, step)
                if step - 1 == config.distill.mixer_steps > 0:
                    state = self._after_mixers(state)
                if not stage:
                    taught = ()  # their memory is free again
                with self.clock.measure("step"):
                    state, metrics = compiled[stage](state, rows, *taught)
                    if pending:
                        report(*pending)
                pending = (step, metrics)
                writer.check_errors()
                turn.check()
                stopping = stop.reached(self.mesh)
                last = stopping or step == config.steps
                if last or owed or writer.due(step):
                    with self.clock.measure("step"):
                        report(*pending)  # what is saved has been logged
                    pending = None
                    owed = report.in_a_row > 0 and not last
                    if not owed:
                        with self.clock.measure("checkpoint"):
                            checkpoints.save(step, state, self._meta(step))
                        turn.save(step)
                if stopping and step < config.steps:
                    status = STOPPED
                    break
        with self.clock.measure("checkpoint"):
            writer.wait()
        turn.end(status, step)
        if status == STOPPED:
            log.info("saved step %d; run the same command to go on", step)
        return status

    def _teachers_arrays(self) -> tuple[Any, ...]:
        assert self.teacher is not None
        log.info("learning from step %d of %s", self.teacher.step, self.teacher.run_dir.folder)
        with self.clock.measure("restore"):
            return (self.teacher.load(self.mesh),)

    def _after_mixers(self, state: TrainState) -> TrainState:
        return jax.jit(with_fresh_moments, donate_argnums=0, out_shardings=self.spec.shardings)(state)

    def _start(self, checkpoints: RunCheckpoints) -> tuple[TrainState, int]:
        """The state to go on from, and the step it is at."""
        config = self.config
        if runtime.is_main():
            extensions.keep(self.run_dir, config.model.layers)
            self.tokenizer.save(self.run_dir.tokenizer)
            self.run_dir.write_config(config)  # last: an evaluator waits for it
        if self.latest is None or self.meta is None:
            return self.spec.init(self.fixed_tokens), 0
        with self.clock.measure("restore"):
            if self.meta["data"] is None:  # imported: a model, and no optimizer state yet
                return checkpoints.begin(self.latest, self.fixed_tokens), self.latest
            state, step = checkpoints.restore(self.latest)
        log.info("resuming from step %d", step)
        return state, step

    def _report(self, batches: pipeline.Batches, first: int) -> Report:
        return Report(
            *(self.config, self.run_dir, self.clock, batches, first),
            utilisation_per_rate=self.utilisation_per_rate,
            writes=runtime.is_main(),
        )

    @contextlib.contextmanager
    def _useless_set_aside(self, writer: Checkpoints) -> Iterator[None]:
        """A state from which no update could be made is no checkpoint to go on from, though its numbers are finite."""
        try:
            yield
        except SkippedTooOftenError as error:
            writer.wait()
            said = ""
            if error.first - 1 in writer.steps:
                writer.set_aside(error.first - 1, "useless")
                said = f"; the checkpoint of step {error.first - 1}, where it began, is set aside"
            left = max(writer.steps, default=None)
            then = "there is no good one" if left is None else f"the latest good one is of step {left}"
            raise FloatingPointError(f"{error}{said}; {then}; a lower config.learning_rate may help") from error

    def _fixed_tokens(self) -> jax.Array | None:
        """What the fixed_text stream reads: a file, or the first tokens of the training rows."""
        model = self.config.model
        if not reads_fixed_text(model.layers):
            return None
        if model.fixed_text:
            if not epath.Path(model.fixed_text).exists():
                raise UserError(f"config.model.fixed_text={model.fixed_text}: there is no such file")
            try:
                text = epath.Path(model.fixed_text).read_bytes().decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"config.model.fixed_text={model.fixed_text}: not UTF-8 at byte {error.start}"
                ) from None
            tokens = self.tokenizer.encode(text)[: model.fixed_length]
            where = f"config.model.fixed_text={model.fixed_text}"
        else:
            tokens = list(pipeline.tokens_at(self.config.data, model.fixed_length))
            where = f"config.data={self.config.data}"
        if len(tokens) < model.fixed_length:
            raise UserError(
                f"{where}: {len(tokens)} tokens, but the fixed stream has model.fixed_length={model.fixed_length}"
            )
        return jnp.asarray(tokens, jnp.int32)

    def _batches(self, first: int) -> pipeline.Batches:
        """This process's rows of each batch from step `first` on: those its devices hold."""
        config = self.config
        shape = (config.batch_size, config.sequence_length + 1)
        slices = [
            index[0].indices(shape[0]) for index in self.rows.addressable_devices_indices_map(shape).values() if index
        ]
        start, stop = min(s[0] for s in slices), max(s[1] for s in slices)
        share = stop - start
        if shape[0] % share or start % share:
            raise UserError(
                f"config.mesh: process {jax.process_index()} would hold rows {start} to {stop} of a batch, not a block"
            )
        return pipeline.train_batches(
            config.data,
            config.sequence_length,
            config.batch_size,
            config.seed,
            start_step=first,
            host=start // share,
            hosts=shape[0] // share,
        )

    def _to_devices(self, rows: np.ndarray) -> jax.Array:
        shape = (self.config.batch_size, self.config.sequence_length + 1)
        return jax.make_array_from_process_local_data(self.rows, rows, shape)

    def _meta(self, step: int) -> dict[str, Any]:
        return make_meta(
            self.config, step, self.manifest.fingerprint, self.manifest.tokenizer["sha256"], self.taught_by
        )
