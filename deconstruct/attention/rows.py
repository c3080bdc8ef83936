"""What `check` checks of a form or mixer, a row each: it is tried inside its mixer, small, against its definition.

A row is a function of a `Subject`. It returns a line of detail, or raises FailedError, NotApplicableError, or whatever
the user's code raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deconstruct.attention.form import Site, platform
from deconstruct.attention.parameters import count_parameters, mixer_parameters, width_beside
from deconstruct.attention.registry import SOURCES
from deconstruct.attention.subject import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LENGTH,
    NEAR,
    NEAR_BFLOAT16,
    PIECE,
    FailedError,
    NotApplicableError,
    Subject,
    Tried,
    dotted,
    gradients_off,
    off,
)
from deconstruct.attention.trial import compiled, first_leak
from deconstruct.config import MeshConfig
from deconstruct.distributed.mesh import make_mesh
from deconstruct.distributed.sharding import RULES, batch_spec, state_shardings
from deconstruct.kernels.mask import CAUSAL, Mask
from deconstruct.layers import Frozen
from deconstruct.layout import STANDARD
from deconstruct.types import UserError

# Where the documents of each packed row begin.
BORDERS = ([0, 5, 6], [0, 1, 9], [0], [0, 14])


def runs(subject: Subject) -> str:
    for dtype in ("float32", "bfloat16"):
        trial = subject.trial() if dtype == "float32" else subject.trial(dtype=dtype)
        out, map_, gradients = trial.whole()
        if out.shape != (BATCH, LENGTH, trial.config.hidden_size) or out.dtype != dtype:
            raise FailedError(f"{dtype}: gives {out.dtype}{list(out.shape)} for {dtype}{list(trial.cotangent.shape)}")
        if map_ is not None:
            batch = 1 if getattr(trial.abstract, "shared", False) else BATCH
            if map_.dtype != np.float32:
                raise FailedError(f"{dtype}: the map is {map_.dtype}, expected float32")
            if map_.ndim != 4 or map_.shape[2:] != (LENGTH, LENGTH):
                raise FailedError(
                    f"{dtype}: the map is {list(map_.shape)}, expected [{batch}, heads, {LENGTH}, {LENGTH}]"
                )
        for what, values in (("outputs", out), ("the map", map_), ("gradients", gradients)):
            if not all(np.isfinite(x.astype(np.float32)).all() for x in jax.tree.leaves(values)):
                raise FailedError(f"{dtype}: {what} are not finite")
    return "float32 and bfloat16, finite" + ("; the map is float32" if map_ is not None else "")


def causal(subject: Subject) -> str:
    trial = subject.trial()
    before, map_, _ = trial.whole()
    above = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
    if map_ is not None and np.any(map_[..., above]):
        i, j = np.argwhere((map_ != 0).any((0, 1)) & above)[0]
        raise FailedError(f"the map is not zero above the diagonal: position {i} sees position {j}")
    changed = np.zeros((LENGTH, LENGTH), bool)
    largest = 0.0
    for p in range(1, LENGTH):
        early = np.arange(LENGTH)[None, :, None] < p
        out, _, (_, gradients) = trial.whole(trial.changed(p), np.where(early, trial.cotangent, np.float32(0)))
        # The same program on the same past: not even the rounding is another.
        changed[p] = (out != before).any((0, 2))
        largest = max(largest, float(np.abs(out - before)[:, :p].max()))
        for name, gradient in gradients._asdict().items():
            if gradient is not None and np.any(gradient[:, p:]) and not changed[p, :p].any():
                seen = p + int(np.argmax((gradient[:, p:] != 0).any((0, 2))))
                raise FailedError(f"outputs before position {p} have a gradient in {name} at position {seen}")
    leak = first_leak(changed)
    if leak is not None:
        raise FailedError(f"position {leak.position} changes when position {leak.future} does (by up to {largest:.1e})")
    return "nothing before a position changes with it, not even rounding; gradients of the future are zero"


def rows(subject: Subject) -> str:
    trial = subject.trial()
    _, map_, _ = trial.whole()
    reach, normalised = trial.abstract.reach, trial.abstract.normalised
    last = np.where(np.arange(LENGTH)[None, :, None] == LENGTH - 1, trial.cotangent, np.float32(0))
    _, _, (_, gradients) = trial.whole(cotangent=last)
    if reach is not None and np.any(gradients.h[:, : LENGTH - reach]):
        j = int(np.argmax((gradients.h != 0).any((0, 2))))
        raise FailedError(f"reach is {reach}, but position {LENGTH - 1} sees position {j}")
    if map_ is None:
        if reach is None:
            raise NotApplicableError("it has no map")
        return f"it has no map; reach {reach}"
    beyond = np.tri(LENGTH, k=-(reach or LENGTH), dtype=bool)
    if np.any(map_[..., beyond]):
        i, j = np.argwhere((map_ != 0).any((0, 1)) & beyond)[0]
        raise FailedError(f"reach is {reach}, but position {i} sees position {j}")
    sums = np.abs(map_.sum(-1) - 1)
    error = float(sums.max())
    if normalised and not error <= NEAR:
        i = int(np.argmax((sums > NEAR).any((0, 1))))
        raise FailedError(f"the row of position {i} sums to one only within {error:.1e}; else normalised=False")
    if not normalised and error <= NEAR:
        raise FailedError("rows sum to one, though normalised=False")
    said = f"they sum to one within {error:.1e}" if normalised else "they need not sum to one, and do not"
    return said + ("" if reach is None else f"; zero beyond the reach of {reach}")


def mix(subject: Subject) -> str:
    if subject.form is None:
        raise NotApplicableError("a mixer of its own has no weights")
    form = subject.trial().abstract.form
    own, notes = form.resolved_impl(), []
    for impl, kernel in (form.kernels() or {"reference": None}).items():
        refusals = [
            kernel and kernel.why_not(Site(dtype, HEAD_DIM, subject.trial().abstract.shared, False, platform()))
            for dtype in ("float32", "bfloat16")
        ]
        if None not in refusals:
            notes.append(f"{impl} is not for {platform()}")
            continue
        dtype = "float32" if refusals[0] is None else "bfloat16"
        near = NEAR if dtype == "float32" else NEAR_BFLOAT16
        changes: dict[str, Any] = {} if impl == own else {"impl": impl}
        if dtype != "float32":
            changes["dtype"] = dtype
        trial = subject.trial(**changes)
        notes.append(f"{'its definition alone' if kernel is None else impl}: off by {_mixed(trial, impl, near):.1e}")
    return "; ".join(notes)


def _mixed(trial: Tried, what: str, near: float = NEAR) -> float:
    (got, _, gradients), (want, _, wanted) = trial.whole(), trial.whole(by_definition=True)
    error = off(got, want, f"{what} is not weights @ v", near)
    return max(error, gradients_off(gradients, wanted, f"{what} is not weights @ v", near))


def extend(subject: Subject) -> str:
    trial = subject.trial()
    want = subject.definition(trial)[0]
    error = max(_extended(trial, piece, want, "auto") for piece in (LENGTH, PIECE, 1))
    said = f"all at once, by {PIECE} and one by one"
    if subject.form is not None and trial.abstract.form.resolved_impl() != "reference":
        error = max(error, _extended(subject.trial(impl="reference"), PIECE, want, "reference"))
        said += f"; by its definition by {PIECE}"
    return f"{said}: off by {error:.1e}"


def _extended(trial: Tried, piece: int, want: np.ndarray, what: str, begins: np.ndarray | None = None) -> float:
    how = {LENGTH: "all at once", 1: "one by one"}.get(piece, f"by {piece}")
    return off(trial.extended(piece, begins), want, f"{what}, {how}, is not one pass")


def grouped(subject: Subject) -> str:
    if subject.form is None:
        raise NotApplicableError("a mixer of its own has no queries")
    try:
        trial = subject.trial(kv_heads=KV_HEADS)
    except UserError as error:
        raise NotApplicableError(f"not served: {error}") from None
    errors = [0.0]
    if "mix" not in subject.failed:
        errors.append(_mixed(trial, "auto"))
    if "extend" not in subject.failed:
        errors.append(_extended(trial, PIECE, trial.whole(by_definition=True)[0], "auto"))
    return f"{HEADS} heads over {KV_HEADS} of keys and values: off by {max(errors):.1e}"


def sources(subject: Subject) -> str:
    if subject.form is None:
        raise NotApplicableError("a mixer of its own reads what it reads")
    kinds: dict[Any, list[Any]] = {}
    for source in SOURCES.values():  # two that read alike are one program
        kinds.setdefault((source.read, source.fixed, source.static), []).append(source)
    each: list[str] = []
    shared: list[str] = []
    refused: list[str] = []
    for alike in kinds.values():
        names = ", ".join(source.name for source in alike)
        try:
            trial = subject.trial(None if subject.variant.source in alike else alike[0])
        except UserError as error:
            refused.append(f"refuses {names}: {error}")
            continue
        _one_source(subject, trial, names)
        (shared if trial.abstract.shared else each).append(names)
    said = [("a map for each sequence", each), ("one map", shared)]
    return "; ".join([*(f"{', '.join(names)}: {what}" for what, names in said if names), *refused])


def _one_source(subject: Subject, trial: Tried, names: str) -> None:
    own, fixed = trial is subject.trial(), bool(trial.abstract.fixed_source)
    gradients = own or fixed  # compiled already, or needed below
    out, map_, _ = trial.whole(gradients=gradients)
    batch = 1 if trial.abstract.shared else BATCH
    if map_.shape[0] != batch:
        raise FailedError(f"over {names}, the map has a batch of {map_.shape[0]}, expected {batch}")
    after = trial.whole(trial.changed(PIECE), gradients=gradients)[0]
    if np.any(out[:, :PIECE] != after[:, :PIECE]):
        raise FailedError(f"over {names}, a position before {PIECE} changes when those from {PIECE} on do")
    if fixed and not own and "mix" not in subject.failed:
        _mixed(trial, f"over {names}, auto")
    if fixed and not own and "extend" not in subject.failed:
        _extended(trial, PIECE, out, f"over {names}")


def documents(subject: Subject) -> str:
    if not subject.trial().abstract.documents:
        raise NotApplicableError("not served")
    if subject.trial().abstract.fixed_source:
        raise NotApplicableError("not served: one map for every text")
    alone, packed = subject.trial(), subject.trial(document_mask=True)
    begins = np.stack([np.repeat(starts, np.diff([*starts, LENGTH])) for starts in BORDERS]).astype(np.int32)
    mask = Mask(jnp.asarray(begins))
    out, _, (_, gradients) = packed.whole(mask=mask)
    pieces = [
        (row, begin, end)
        for row, starts in enumerate(BORDERS)
        for begin, end in zip(starts, [*starts[1:], LENGTH], strict=True)
    ]
    each = {piece: _alone(alone, *piece) for piece in pieces}
    error = 0.0
    for (row, begin, end), (own, _) in each.items():
        what = f"the document at {begin} to {end - 1} is not what it is alone"
        error = max(error, off(out[row : row + 1, begin:end], own, what))
    for (row, begin, end), (_, owns) in each.items():
        what = f"the gradient of the document at {begin} to {end - 1} is not what it is alone"
        for got, want in zip(jax.tree.leaves(gradients), owns, strict=True):
            error = max(error, off(got[row : row + 1, begin:end], want, what))
    if subject.form is not None and "mix" not in subject.failed:
        want = packed.whole(mask=mask, by_definition=True, gradients=False)[0]
        error = max(error, off(out, want, "with documents, the program is not weights @ v"))
    if "extend" not in subject.failed:
        error = max(error, _extended(packed, PIECE, out, "with documents", begins))
    return f"packed is alone, in outputs and gradients, and extended by {PIECE}: off by {error:.1e}"


def _alone(trial: Tried, row: int, begin: int, end: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Outputs of a document and its gradients, at the beginning of rows whose remainder it cannot see, with the
    tables of the positions it had."""
    size = end - begin

    def placed(own: np.ndarray, other: np.ndarray) -> np.ndarray:
        document = np.broadcast_to(own[row : row + 1, begin:end], (BATCH, size, own.shape[2]))
        return np.concatenate([document, other[:, size:]], axis=1)

    inputs = jax.tree.map(placed, trial.inputs, trial.other)
    cotangent = placed(trial.cotangent, np.zeros_like(trial.cotangent))
    out, _, (_, gradients) = trial.whole(inputs, cotangent, start=begin)
    return out[:1, :size], [gradient[:1, :size] for gradient in jax.tree.leaves(gradients)]


def parameters(subject: Subject) -> str:
    config, mixer = subject.config(), subject.trial().abstract
    state = nnx.state(mixer)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        _check_parameter(dotted(path), leaf)
    count, standard, d = count_parameters(mixer), mixer_parameters(config, STANDARD), config.hidden_size
    width = width_beside(config, count, subject.name)
    left = count - standard + 3 * d * (width - config.intermediate_size)
    if abs(left) > 3 * d / 2:
        raise FailedError(f"a block has {left:+,} parameters against a standard one")
    if count == standard:
        return f"{count:,} at width {d}, as standard has; all axes are named"
    return f"{count:,} at width {d}, {count - standard:+,}; beside its MLP {left:+,}; all axes are named"


def _check_parameter(name: str, leaf: Any) -> None:
    if isinstance(leaf, Frozen):
        return
    if not isinstance(leaf, nnx.Param):
        raise FailedError(f"{name} is a {type(leaf).__name__}, and only nnx.Param and Frozen are placed and saved")
    shape, axes = tuple(leaf.shape), leaf.get_metadata().get("axes")
    if axes is None:
        raise FailedError(f"{name} {shape}: its axes have no names; dc.normal_param and its like give them")
    if len(axes) != len(shape):
        raise FailedError(f"{name} {shape}: {len(axes)} names, {axes}, for {len(shape)} axes")
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise FailedError(f"{name} {shape}: the axis {unknown[0]!r} is unknown; expected None, {', '.join(RULES)}")
    if leaf.dtype != jnp.float32:
        raise FailedError(f"{name} is {leaf.dtype}; parameters are float32")


def sharding(subject: Subject) -> str:
    devices = jax.local_devices()
    count = 1 << (min(len(devices), 8).bit_length() - 1)
    if count == 1:
        raise NotApplicableError("not checked: one device")
    tensor, fsdp = 2, 2 if count >= 4 else 1
    mesh = make_mesh(MeshConfig(data=count // (tensor * fsdp), fsdp=fsdp, tensor=tensor), devices[:count])
    trial = subject.trial()
    shapes = nnx.split(trial.abstract, nnx.Param, ...)[1:]
    inputs, cotangent, tables = trial.inputs.cut(0, LENGTH), trial.cotangent, trial.tables(LENGTH)
    with jax.set_mesh(mesh):
        state = tuple(
            jax.tree.map(lambda x, sharding: jax.device_put(np.asarray(x), sharding), own, state_shardings(shape, mesh))
            for own, shape in zip(trial.state, shapes, strict=True)
        )
        by_rows = jax.sharding.NamedSharding(mesh, batch_spec())
        inputs = jax.tree.map(lambda x: x if x.shape[0] == 1 else jax.device_put(x, by_rows), inputs)
        program = compiled(functools.partial(trial.run, False, True))
        got, _, gradients = jax.tree.map(np.asarray, program(state, inputs, cotangent, CAUSAL, tables))
    want, _, wanted = trial.whole()
    error = max(off(got, want, "sharded is not single"), gradients_off(gradients, wanted, "sharded is not single"))
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{sizes}: off by {error:.1e}"


# In order. A row is left out where one that it rests on has failed: its failure would say nothing new.
ROWS: dict[str, tuple[Callable[[Subject], str], tuple[str, ...]]] = {
    "runs": (runs, ()),
    "causal": (causal, ("runs",)),
    "rows": (rows, ("runs",)),
    "mix": (mix, ("runs", "causal")),
    "extend": (extend, ("runs", "causal")),
    "grouped": (grouped, ("runs", "causal")),
    "sources": (sources, ("runs", "causal")),
    "documents": (documents, ("runs", "causal")),
    "parameters": (parameters, ("runs",)),
    "sharding": (sharding, ("runs", "parameters")),
}
