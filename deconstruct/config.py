"""The configuration: every key with its type, default and meaning, and the checks that precede a run.

A config file starts from `default_config()` and changes what it wants. `complete` checks the whole against the
dataclasses below and returns them frozen: what the rest of the house reads. Files, the command line, and what names
mean are the job of `experiment`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from typing import Any

from ml_collections import ConfigDict

from deconstruct import layout as layouts
from deconstruct import plan as plans
from deconstruct.paths import place
from deconstruct.types import UserError

PYTHIA_VOCABULARY = 50_277
# What is larger is a slip of the finger, and would end in an overflow or never: steps and seeds are 32-bit, and
# folding the layers takes longer the more there are.
LARGEST = {
    "steps": 2**31 - 1,
    "seed": 2**32 - 1,
    "batch_size": 2**24,
    "sequence_length": 2**24,
    "accumulation": 2**24,
    "model.hidden_size": 2**20,
    "model.intermediate_size": 2**24,
    "model.num_layers": 1000,
    "model.num_heads": 2**20,
    "model.num_kv_heads": 2**20,
    "model.head_dim": 2**20,
    "model.vocab_size": 2**24,
    "model.fixed_length": 2**24,
    "optimizer.warmup_steps": 2**31 - 1,
    "optimizer.schedule_steps": 2**31 - 1,
    "distill.mixer_steps": 2**31 - 1,
    "distill.logit_steps": 2**31 - 1,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1: those that remain. Where data and fsdp are both -1, fsdp is the largest that
    divides the model's width, within a slice, and data the rest."""

    data: int = -1  # parameters replicated
    fsdp: int = -1  # parameters sharded, gathered when used
    tensor: int = 1  # heads, MLP width and vocabulary sharded


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model; a resolved one is all that `build_model` needs."""

    block: str = "qwen2"  # qwen2: bias on q, k, v; qwen3: RMSNorm on q and k instead
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 0  # 0: as many as heads (MHA)
    head_dim: int = 0  # width of a head; 0: hidden_size / num_heads
    vocab_size: int = 0  # 0: the tokenizer's of `data`; Pythia's 50,277 where nothing is prepared
    tie_embeddings: bool = True
    rope_theta: float = 1e6
    norm_epsilon: float = 1e-6
    init_std: float = 0.02  # of every matrix and embedding
    fixed_std: float = 0.02  # of the fixed random stream (fixed_random)
    fixed_length: int = 0  # length of the fixed stream, the longest context it serves; 0: sequence_length
    fixed_text: str = ""  # a text file for fixed_text; "": the first tokens of the training rows
    end_of_text: int = -1  # the id that ends a document; -1: that of the tokenizer of `data`
    match_parameters: bool = True  # a block's MLP takes up what its mixer has more or less than standard attention
    dtype: str = "bfloat16"  # of activations and matmul inputs; parameters, norms, softmax and loss are float32
    impl: str = "auto"  # the program of attention, in every layer: auto | reference | xla | cudnn | splash | pallas_tpu
    scan: bool = True  # fold repeating layers into lax.scan; off: every layer is compiled by itself
    remat: bool = True  # recompute each layer in the backward pass instead of keeping its activations
    # Derived from variant, layout and document_mask, or set when a model is restored; not keys of a config file.
    layers: tuple[str, ...] = dataclasses.field(default=(), metadata={"derived": True})
    document_mask: bool = dataclasses.field(default=False, metadata={"derived": True})
    # Whether layers that are not standard have lost their mixers (`restore_model(skip="mixer")`).
    without_mixers: bool = dataclasses.field(default=False, metadata={"derived": True})

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def padded_vocab(self) -> int:
        """The vocabulary rounded up to a multiple of 128; the ids past `vocab_size` are masked."""
        return -(-self.vocab_size // 128) * 128

    @property
    def plan(self) -> plans.Plan:
        return plans.plan(self.layers) if self.scan else plans.unrolled(self.layers)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and half-cosine decay to zero."""

    warmup_steps: int = 2000
    schedule_steps: int = 0  # the step at which the cosine reaches zero; 0: steps
    beta1: float = 0.9
    beta2: float = 0.9999
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # not on norms and biases
    clip_norm: float = 1.0  # of the global gradient; 0: no clipping


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    keep: int = 3  # latest checkpoints kept
    keep_period: int = 0  # also keep every step that this divides; 0: none


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """What is done about updates that are not finite, spikes, and a run that no longer gets on."""

    in_a_row: int = 8  # updates skipped one after the other that end the run
    spike: float = 0.0  # also skip an update larger than so many times the mean of the last 128; 0: none
    no_step_for: int = 1800  # seconds without a step that end the process, its stacks in the workdir; 0: wait for ever


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Stages before the ordinary loss, in which a run learns from another model, as a function of the step alone."""

    teacher: str = ""  # a workdir, whose latest checkpoint teaches; "": nobody
    mixer_steps: int = 0  # first so many steps: the mixers that differ from the teacher's learn its mixers' outputs
    logit_steps: int = 0  # then so many: the model learns the teacher's next-token distribution
    temperature: float = 1.0  # of both distributions


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. `experiment.load_config` makes one from a config file."""

    variant: str = "standard"  # a name of the paper, or source/form such as static_embedding/taylor
    layout: str = "uniform"  # uniform, even, odd, top, middle, bottom, quarter, first, last, bilateral, or a list
    data: str = "prepared"  # a folder made by `deconstruct prepare`
    steps: int = 28_610  # optimizer updates
    batch_size: int = 256  # sequences per update, over all devices
    sequence_length: int = 2048  # tokens
    seed: int = 0  # of the initial parameters and of the order of the data
    learning_rate: float = 4e-4  # peak
    checkpoint_every: int = 1000  # steps; the last step is always saved
    log_every: int = 10  # steps
    accumulation: int = 1  # microbatches per update; divides batch_size
    document_mask: bool = False  # no position sees across an end of text
    border_loss: bool = True  # the first token of a document counts in the loss, though nothing before it foretells it
    extensions: str = ""  # Python files that register forms, mixers or sources, separated by commas
    mesh: MeshConfig = MeshConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    distill: DistillConfig = DistillConfig()
    # The files outside the package that define its layers, each NAME:SHA256; not a key of a config file.
    code: tuple[str, ...] = dataclasses.field(default=(), metadata={"derived": True})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`, also after a trip through JSON. Raises UserError on an unknown key."""
        return _from_dict(cls, values)

    def replace(self, **changes: Any) -> Config:
        return dataclasses.replace(self, **changes)


def default_config() -> ConfigDict:
    """Every key at its default, for a config file to change."""
    return ConfigDict(_settable(Config()))


def complete(config: ConfigDict) -> Config:
    """Checks a ConfigDict against the schema and fills in what is derived. Raises UserError.

    What names of variants mean is not known on this floor: `experiment.resolve` goes on from here.
    """
    resolved = _from_dict(Config, config.to_dict(), derived=False)
    model = resolved.model
    _check_values(resolved)
    model = dataclasses.replace(
        model,
        layers=layouts.layer_variants(resolved.layout, resolved.variant, model.num_layers),
        fixed_length=model.fixed_length or resolved.sequence_length,
        vocab_size=model.vocab_size or _of_tokenizer(resolved.data, "vocab_size") or PYTHIA_VOCABULARY,
        document_mask=resolved.document_mask,
        end_of_text=_end_of_text(resolved),
    )
    return resolved.replace(model=model)


def _settable(value: Any) -> dict[str, Any]:
    fields = [f for f in dataclasses.fields(value) if not f.metadata.get("derived")]
    return {
        f.name: _settable(getattr(value, f.name)) if dataclasses.is_dataclass(f.default) else getattr(value, f.name)
        for f in fields
    }


def known_keys(cls: type = Config, prefix: str = "") -> dict[str, type]:
    """Every key that a config file or the command line may set, with its type."""
    hints = typing.get_type_hints(cls)
    keys: dict[str, type] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            keys |= known_keys(type(field.default), f"{prefix}{field.name}.")
        elif not field.metadata.get("derived"):
            keys[prefix + field.name] = hints[field.name]
    return keys


def unknown_key(key: str) -> UserError:
    known = list(known_keys())
    last = key.rpartition(".")[2]
    # A key is often right but for its group.
    near = [k for k in known if k.rpartition(".")[2] == last] or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(last, known, n=1, cutoff=0.5)
    advice = f"; did you mean {near[0]}?" if near else f"; keys are {', '.join(known)}"
    return UserError(f"config.{key} is unknown{advice}")


def describe_type(expected: type) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[expected]


def _from_dict(cls: type, values: dict[str, Any], prefix: str = "", *, derived: bool = True) -> Any:
    """`derived`: whether the keys that are not a config file's may be among the values."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in fields or (fields[name].metadata.get("derived") and not derived):
            raise unknown_key(prefix + name)
        default = fields[name].default
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise UserError(f"config.{prefix}{name}={value!r}: expected a group of keys")
            arguments[name] = _from_dict(type(default), value, f"{prefix}{name}.", derived=derived)
        elif fields[name].metadata.get("derived"):
            arguments[name] = tuple(value) if isinstance(value, list | tuple) else value
        else:
            arguments[name] = _typed(prefix + name, value, hints[name])
    return cls(**arguments)


def _typed(key: str, value: Any, expected: type) -> Any:
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, expected) and not (expected is int and isinstance(value, bool)):
        return value
    raise UserError(f"config.{key}={value!r}: expected {describe_type(expected)}")


def _of_tokenizer(data: str, entry: str) -> int | None:
    """An entry of the manifest about the tokenizer in a prepared folder; None where there is none yet."""
    manifest = place(data) / "manifest.json"
    if not data or not manifest.exists():
        return None
    try:
        found = json.loads(manifest.read_bytes())["tokenizer"][entry]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if type(found) is not int:
        raise UserError(
            f"{manifest}: not a manifest of prepare (it has no tokenizer.{entry}); prepare the text again, in a new "
            "folder"
        )
    return found


def _end_of_text(config: Config) -> int:
    given = config.model.end_of_text
    found = _of_tokenizer(config.data, "end_of_text") if given < 0 else given
    if found is None:
        for key in ("document_mask", "border_loss"):
            if getattr(config, key) != getattr(Config(), key):
                raise UserError(
                    f"config.{key}={str(getattr(config, key)).lower()}: needs the id that ends a document, and "
                    f"config.data={config.data!r} is not prepared; prepare it, or set config.model.end_of_text"
                )
        return -1
    return found


def _check_values(config: Config) -> None:
    """Raises UserError for the first key whose value cannot be had, alone or beside the others."""
    for key, kind in known_keys().items():
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        _require(kind is not float or math.isfinite(value), key, value, "must be finite")
        _require(key not in LARGEST or value <= LARGEST[key], key, value, f"must be at most {LARGEST.get(key)}")
    _check_run(config)
    _check_model(config)
    _check_mesh(config.mesh)
    _check_optimizer(config)
    _check_distill(config)


def _require(holds: bool, key: str, value: Any, what: str) -> None:
    if not holds:
        raise UserError(f"config.{key}={value}: {what}")


def _check_run(config: Config) -> None:
    for key in ("steps", "batch_size", "sequence_length", "checkpoint_every", "log_every", "accumulation"):
        _require(getattr(config, key) >= 1, key, getattr(config, key), "must be at least 1")
    _require(config.variant != "", "variant", "", "expected a name, such as standard")
    _require(config.seed >= 0, "seed", config.seed, "must not be negative")
    _require(config.learning_rate > 0, "learning_rate", config.learning_rate, "must be positive")
    _require(
        config.batch_size % config.accumulation == 0,
        "accumulation",
        config.accumulation,
        f"does not divide batch_size={config.batch_size}; {_divisors(config.batch_size, config.accumulation)} would",
    )
    keep, period, faults = config.checkpoint.keep, config.checkpoint.keep_period, config.faults
    _require(keep >= 1, "checkpoint.keep", keep, "must be at least 1")
    _require(period >= 0, "checkpoint.keep_period", period, "must not be negative")
    _require(faults.in_a_row >= 1, "faults.in_a_row", faults.in_a_row, "must be at least 1")
    _require(faults.spike == 0 or faults.spike > 1, "faults.spike", faults.spike, "must be more than 1, or 0: none")
    _require(faults.no_step_for >= 0, "faults.no_step_for", faults.no_step_for, "must not be negative")


def _check_model(config: Config) -> None:
    model = config.model
    for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads"):
        _require(getattr(model, key) >= 1, f"model.{key}", getattr(model, key), "must be at least 1")
    _require(model.end_of_text >= -1, "model.end_of_text", model.end_of_text, "expected an id, or -1: the tokenizer's")
    for key in ("num_kv_heads", "head_dim", "vocab_size", "fixed_length", "init_std", "fixed_std"):
        _require(getattr(model, key) >= 0, f"model.{key}", getattr(model, key), "must not be negative")
    for key in ("rope_theta", "norm_epsilon"):
        _require(getattr(model, key) > 0, f"model.{key}", getattr(model, key), "must be positive")
    _require(model.block in ("qwen2", "qwen3"), "model.block", model.block, "expected qwen2 or qwen3")
    _require(model.dtype in ("float32", "bfloat16"), "model.dtype", model.dtype, "expected float32 or bfloat16")
    _require(
        model.head_dim != 0 or model.hidden_size % model.num_heads == 0,
        "model.num_heads",
        model.num_heads,
        f"does not divide model.hidden_size={model.hidden_size}; "
        f"{_divisors(model.hidden_size, model.num_heads)} would, or any number with a model.head_dim that is not 0",
    )
    _require(
        model.head_dim % 2 == 0,
        "model.head_dim",
        model.head_dim,
        f"is odd, which RoPE cannot rotate; {model.head_dim + 1} would do",
    )
    _require(
        model.head_size % 2 == 0,
        "model.num_heads",
        model.num_heads,
        f"gives heads of the odd width {model.head_size}, which RoPE cannot rotate; an even model.head_dim would do",
    )
    _require(
        model.num_heads % model.kv_heads == 0,
        "model.num_kv_heads",
        model.num_kv_heads,
        f"does not divide model.num_heads={model.num_heads}; {_divisors(model.num_heads, model.kv_heads)} would",
    )
    _require(
        model.fixed_length == 0 or model.fixed_length >= config.sequence_length,
        "model.fixed_length",
        model.fixed_length,
        f"the fixed stream is shorter than sequence_length={config.sequence_length}; 0 would do",
    )


def _check_mesh(mesh: MeshConfig) -> None:
    for axis in dataclasses.fields(mesh):
        size = getattr(mesh, axis.name)
        _require(size == -1 or size >= 1, f"mesh.{axis.name}", size, "expected a number of devices, or -1 for the rest")
    _require(
        mesh.tensor != -1 or -1 not in (mesh.data, mesh.fsdp),
        "mesh",
        mesh,
        "beside tensor=-1 no other axis can take the rest (-1)",
    )


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    for key in ("beta1", "beta2"):
        value = getattr(optimizer, key)
        _require(0 <= value < 1, f"optimizer.{key}", value, "must lie in [0, 1)")
    for key in ("warmup_steps", "schedule_steps", "epsilon", "weight_decay", "clip_norm"):
        _require(getattr(optimizer, key) >= 0, f"optimizer.{key}", getattr(optimizer, key), "must not be negative")
    end = optimizer.schedule_steps or config.steps
    _require(
        optimizer.warmup_steps <= end,
        "optimizer.warmup_steps",
        optimizer.warmup_steps,
        f"the warm-up would not end before the schedule does, at step {end}; a smaller number would do",
    )


def _check_distill(config: Config) -> None:
    distill, warmup = config.distill, config.optimizer.warmup_steps
    for key in ("mixer_steps", "logit_steps"):
        _require(getattr(distill, key) >= 0, f"distill.{key}", getattr(distill, key), "must not be negative")
    _require(distill.temperature > 0, "distill.temperature", distill.temperature, "must be positive")
    stages = distill.mixer_steps + distill.logit_steps
    _require(
        not distill.teacher or stages > 0,
        "distill.teacher",
        distill.teacher,
        "neither distill.mixer_steps nor distill.logit_steps asks for it, so it would be ignored; set one of them",
    )
    for key in ("mixer_steps", "logit_steps"):
        value = getattr(distill, key)
        _require(distill.teacher != "" or value == 0, f"distill.{key}", value, "needs a distill.teacher, a workdir")
    _require(
        distill.logit_steps > 0 or distill.temperature == 1,
        "distill.temperature",
        distill.temperature,
        "distill.logit_steps=0, so it would be ignored; leave it at 1.0",
    )
    end = config.optimizer.schedule_steps or config.steps
    _require(
        stages <= end,
        "distill.mixer_steps" if distill.mixer_steps > end else "distill.logit_steps",
        distill.mixer_steps if distill.mixer_steps > end else distill.logit_steps,
        f"the stages would end at step {stages}, after the schedule, at step {end}; smaller numbers would do",
    )
    # The mixer stage and what comes after it have a schedule each.
    shortest = min([steps for steps in (distill.mixer_steps, end - distill.mixer_steps) if steps > 0])
    _require(
        not distill.mixer_steps or warmup <= shortest,
        "optimizer.warmup_steps",
        warmup,
        f"the mixer stage has {distill.mixer_steps} steps and what comes after it {end - distill.mixer_steps}, and "
        f"each begins with the warm-up; at most {shortest} would do",
    )


def _divisors(number: int, near: int) -> str:
    """The divisors of `number` next to `near`, as text."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below = [n for n in divisors if n < near][-1:]
    above = [n for n in divisors if n > near][:1]
    return " or ".join(str(n) for n in below + above)
