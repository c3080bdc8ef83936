"""Staged distillation: a model learns from another before it learns from text.

    mixer    steps 1 .. mixer_steps: |mixer(h) - teacher's mixer(h)|^2, h the teacher's hidden states at each layer
    logits   the logit_steps after them: KL(teacher || student) of next-token distributions
    ""       from then on: the ordinary loss, in the ordinary program

In the mixer stage only mixers that are not the teacher's move. Each is shown what the teacher's layer is shown,
whatever the layers below it have learned, so that they learn independently (as in MOHAWK, Bick et al. 2024,
arXiv:2408.10189).
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deconstruct.attention.mixer import Context
from deconstruct.attention.variants import find_variant, fixed_source
from deconstruct.config import Config, DistillConfig, ModelConfig
from deconstruct.distributed.sharding import constrain
from deconstruct.kernels.cross_entropy import chunk_count
from deconstruct.kernels.kl_divergence import kl_divergence
from deconstruct.model.language_model import LanguageModel
from deconstruct.model.placement import abstract_arrays, split_model
from deconstruct.model.stack import RESIDUAL, Block
from deconstruct.paths import is_remote
from deconstruct.plan import slots
from deconstruct.run import checkpoint
from deconstruct.run.restore import restore_model
from deconstruct.run.workdir import Workdir
from deconstruct.train.guard import new_guard
from deconstruct.train.state import TrainState
from deconstruct.train.step import Objective
from deconstruct.types import Streams, UserError

Stage = Literal["mixer", "logits", ""]


def stage_of(distill: DistillConfig, step: int) -> Stage:
    """The stage of update number `step` (from 1)."""
    if step <= distill.mixer_steps:
        return "mixer"
    return "logits" if step <= distill.mixer_steps + distill.logit_steps else ""


def stages_from(config: Config, first: int) -> list[Stage]:
    """The stages of the updates after step `first`, in order."""
    mixers, logits = config.distill.mixer_steps, config.distill.logit_steps
    spans: list[tuple[Stage, int, int]] = [
        ("mixer", 0, mixers),
        ("logits", mixers, mixers + logits),
        ("", mixers + logits, config.steps),
    ]
    return [stage for stage, begin, end in spans if max(begin, first) < min(end, config.steps)]


class Teacher(NamedTuple):
    """A checkpoint to learn from, as the run's mesh and settings have it; its arrays are not read yet."""

    run_dir: Workdir
    step: int
    fingerprint: str  # of the checkpoint
    model: ModelConfig
    graphdef: Any
    abstract: tuple[Any, Any]  # parameters and frozen arrays: shapes and shardings

    @property
    def identity(self) -> dict[str, Any]:
        """What the run's checkpoints say of it."""
        return {"step": self.step, "fingerprint": self.fingerprint}

    def load(self, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
        """Its parameters and frozen arrays."""
        kept = {key: getattr(self.model, key) for key in ("dtype", "impl", "scan", "remat")}
        return split_model(restore_model(self.run_dir.folder, self.step, mesh=mesh, **kept))[1:]


def find_teacher(
    config: Config, run_dir: Workdir, tokenizer: str, before: dict[str, Any] | None, mesh: jax.sharding.Mesh
) -> Teacher:
    """The teacher of a run: the latest checkpoint of its workdir, or the one that the run has learned from `before`.

    tokenizer: sha256 of that of the run's data. Raises UserError, in one line, for one that cannot teach this model.
    """
    key = f"config.distill.teacher={config.distill.teacher}"
    own = Workdir(config.distill.teacher)
    if _same_folder(own, run_dir):
        raise UserError(f"{key}: is this run's own workdir; name the workdir of the original")
    steps = checkpoint.finished_steps(own.checkpoints)
    if not steps:
        raise UserError(f"{key}: no finished checkpoint there; name one that `import` or `train` made")
    step = before["step"] if before else steps[-1]
    if step not in steps:
        raise UserError(f"{key}: this run learns from its checkpoint of step {step}, which is not there; put it back")
    fingerprint = checkpoint.fingerprint(own.checkpoints, step)
    if before and fingerprint != before["fingerprint"]:
        raise UserError(
            f"{key}: its checkpoint of step {step} is {fingerprint[:12]}, and this run learns from "
            f"{before['fingerprint'][:12]}; give that teacher, or another --workdir"
        )
    meta = checkpoint.read_meta(own.checkpoints, step)
    if meta["tokenizer"] and meta["tokenizer"] != tokenizer:
        raise UserError(
            f"{key}: its tokenizer is {meta['tokenizer'][:12]}, that of config.data={config.data} is {tokenizer[:12]}; "
            "a teacher must read the same ids"
        )
    student = config.model
    saved = Config.from_dict(meta["config"]).model
    model = dataclasses.replace(
        saved, dtype=student.dtype, scan=student.scan, remat=student.remat, impl="auto"
    )  # computed as the student is; the student's program of attention may not be one of the teacher's
    _check_shape(key, config, model)
    graphdef, params, frozen = abstract_arrays(model, mesh)
    return Teacher(own, step, fingerprint, model, graphdef, (params, frozen))


def _same_folder(one: Workdir, other: Workdir) -> bool:
    if is_remote(one.folder) or is_remote(other.folder):
        return os.fspath(one.folder).rstrip("/") == os.fspath(other.folder).rstrip("/")
    return os.path.realpath(one.folder) == os.path.realpath(other.folder)


def _check_shape(key: str, config: Config, teacher: ModelConfig) -> None:
    student = config.model
    if fixed_source(teacher.layers) and config.sequence_length > teacher.fixed_length:
        raise UserError(
            f"{key}: its fixed stream has {teacher.fixed_length} positions, fewer than "
            f"config.sequence_length={config.sequence_length}"
        )
    names = ("vocab_size", *(("num_layers", "hidden_size") if config.distill.mixer_steps else ()))
    for name in names:
        if getattr(teacher, name) != getattr(student, name):
            alone = "" if name == "vocab_size" else " in the mixer stage (config.distill.mixer_steps)"
            raise UserError(
                f"{key}: has {name}={getattr(teacher, name)}, and this model {getattr(student, name)}; they must be "
                f"the same{alone}"
            )
    if config.distill.mixer_steps and not replaced_layers(student.layers, teacher.layers):
        raise UserError(
            f"config.distill.mixer_steps={config.distill.mixer_steps}: no layer differs from the teacher's, so "
            "there is no mixer to match; 0 would do"
        )


def replaced_layers(layers: tuple[str, ...], teachers: tuple[str, ...]) -> tuple[int, ...]:
    """The layers (indices from 0) whose mixer is not what the teacher's is."""
    pairs = enumerate(zip(layers, teachers, strict=True))
    return tuple(i for i, (own, other) in pairs if find_variant(own) != find_variant(other))


def moving_rows(model: ModelConfig, replaced: tuple[int, ...], params: Any) -> Any:
    """For each parameter of a model, bool [repeats] or []: which of its layers are mixers that are replaced."""

    def rows(path: tuple[Any, ...], _: Any) -> np.ndarray:
        names = [entry.key for entry in path]
        if names[:2] != ["stack", "segments"] or names[4] != "mixer":
            return np.array(False)
        own = [i for i, slot in enumerate(slots(model.plan)) if [slot.segment, slot.position] == names[2:4]]
        return np.array([i in replaced for i in own])

    return jax.tree_util.tree_map_with_path(rows, params)


def make_objective(stage: Stage, config: Config, teacher: Teacher) -> Objective:
    """(student, batch, teacher's arrays) -> what is minimised, summed over the tokens by weight, float32 []."""
    if stage == "mixer":
        replaced = replaced_layers(config.model.layers, teacher.model.layers)
        return lambda student, batch, arrays: mixer_distance(
            student, nnx.merge(teacher.graphdef, *arrays), batch, replaced
        )
    temperature = config.distill.temperature
    return lambda student, batch, arrays: divergence(student, nnx.merge(teacher.graphdef, *arrays), batch, temperature)


def mixer_distance(
    student: LanguageModel, teacher: LanguageModel, batch: dict[str, jax.Array], replaced: tuple[int, ...]
) -> jax.Array:
    """The sum over tokens, by weight, of |mixer(h) - teacher's mixer(h)|^2, in the mean over the replaced layers."""
    seen = teacher.hidden(batch["tokens"], lambda block, streams, context: (streams.h, block.mix(streams, context).h))
    where = slots(student.config.plan)
    shown = {where[i][:2] for i in replaced}  # layers that are traced together are shown something together
    given = [
        (*of_layer, jnp.float32(i in replaced)) if where[i][:2] in shown else None for i, of_layer in enumerate(seen[1])
    ]

    def measure(block: Block, streams: Streams, context: Context, own: Any) -> jax.Array | None:
        if own is None:
            return None
        h, wanted, counts = own
        fixed = streams.map(jax.lax.stop_gradient)  # the fixed stream comes out of the layers below
        mixed = block.mix(Streams(constrain(h, RESIDUAL), fixed.x), context).h
        distance = jnp.square(mixed.astype(jnp.float32) - constrain(wanted, RESIDUAL).astype(jnp.float32))
        return counts * jnp.sum(batch["weights"] * jnp.sum(distance, axis=-1))

    streams, context = student.start(batch["tokens"])
    _, distances = student.stack(Streams(None, streams.x), context, measure, given)
    return sum((x for x in distances if x is not None), jnp.zeros((), jnp.float32)) / len(replaced)


def divergence(
    student: LanguageModel, teacher: LanguageModel, batch: dict[str, jax.Array], temperature: float
) -> jax.Array:
    """The sum over tokens, by weight, of KL(teacher || student), nats, at a temperature."""
    tokens = batch["tokens"]
    (hidden, _), (taught, _) = student.hidden(tokens), teacher.hidden(tokens)
    chunks = chunk_count(tokens.shape[0], tokens.shape[1], 2 * student.config.padded_vocab)  # two models' logits
    return kl_divergence(
        *(hidden, student.output_table(), taught, teacher.output_table(), batch["weights"]),
        *(student.config.vocab_size, chunks, temperature),
    )


def with_fresh_moments(state: TrainState) -> TrainState:
    """The state after the mixer stage: Adam's moments and what the guard knows of updates begin anew.

    All but the mixers has seen no gradient yet: with the bias correction of so many steps, Adam's first updates of it
    would be up to (1 - beta1) / sqrt(1 - beta2) times as large as they are meant to be.
    """

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    def anew(node: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, node) if is_adam(node) else node

    fresh = new_guard()
    guard = state.guard._replace(norms=fresh.norms, made=fresh.made)
    return state._replace(opt_state=jax.tree.map(anew, state.opt_state, is_leaf=is_adam), guard=guard)
