"""Qwen2 and Qwen3 as `transformers` writes them: config.json and the names and shapes of tensors, both ways.

A linear map of theirs is [outputs, inputs] with heads folded into one axis; ours is [*inputs, *outputs] with heads
apart. RoPE pairs the same halves, and norms and embeddings are alike but for our vocabulary's padding.

A model with layers that are not standard is written as model_type "deconstruct": what it is stands in the entry
"deconstruct" of config.json and nowhere else, so that no other program finds the sizes of a model it would run with
the wrong attention. Its standard parts keep their names; a mixer's own parameters are `model.layers.N.mixer.PATH`, as
they are here, and constants are `deconstruct.PATH`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from deconstruct.attention.variants import find_variant
from deconstruct.config import LARGEST, Config, ModelConfig
from deconstruct.layout import STANDARD
from deconstruct.types import UserError

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
OWN_TYPE, OWN_ARCHITECTURE, OWN_KEY = "deconstruct", "DeconstructForCausalLM", "deconstruct"
QWEN3_HEAD_DIM = 128  # of a Qwen3Config that is not told; a Qwen2Config has no default
FIXED = "frozen/fixed"  # the constant of a fixed source

# Parts of a block -> their names in transformers, and how many axes of our kernel are inputs.
LINEAR = {
    "mixer/q_proj": ("self_attn.q_proj", 1),
    "mixer/k_proj": ("self_attn.k_proj", 1),
    "mixer/v_proj": ("self_attn.v_proj", 1),
    "mixer/o_proj": ("self_attn.o_proj", 2),
    "mlp/gate_proj": ("mlp.gate_proj", 1),
    "mlp/up_proj": ("mlp.up_proj", 1),
    "mlp/down_proj": ("mlp.down_proj", 1),
}
NORMS = {
    "mixer_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mixer/q_norm": "self_attn.q_norm",
    "mixer/k_norm": "self_attn.k_norm",
}
TOP = {
    "params/embed/embedding": "model.embed_tokens.weight",
    "params/norm/scale": "model.norm.weight",
    "params/head": "lm_head.weight",
}
# Keys of config.json that change what is computed, and the values that mean what is computed here.
MEANT = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "moe_intermediate_size": (None, 0),
    "partial_rotary_factor": (None, 1),
    "use_mrope": (None, False),
    "dual_chunk_attention_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of ours as it stands in a file: `own` is its shape here, `inputs` a kernel's leading input axes."""

    name: str
    shape: tuple[int, ...]
    own: tuple[int, ...]
    inputs: int = 0

    def read(self, x: np.ndarray) -> np.ndarray:
        """From the file's shape to ours, float32 (integers stay). Rows that pad the vocabulary are zero."""
        if x.dtype != np.int32:
            x = x.astype(np.float32)
        if self.inputs:
            x = x.T
        if math.prod(self.shape) < math.prod(self.own):
            padded = np.zeros(self.own, x.dtype)
            padded[: len(x)] = x
            return padded
        return np.ascontiguousarray(x.reshape(self.own))

    def write(self, x: np.ndarray) -> np.ndarray:
        """The inverse."""
        if self.inputs:
            return x.reshape(math.prod(self.own[: self.inputs]), -1).T
        return x[: self.shape[0]] if len(x) > self.shape[0] and x.ndim == len(self.shape) else x.reshape(self.shape)


def stored(names: str, own: tuple[int, ...], vocab_size: int) -> Stored:
    """Where an array of a model by layer (`params/layers/3/mixer/q_proj/kernel`, counted from 0) stands in a file."""
    if names in TOP:
        return Stored(TOP[names], (vocab_size, *own[1:]) if len(own) == 2 else own, own)
    group, _, rest = names.partition("/")
    if group == "frozen":
        return Stored(f"{OWN_KEY}.{rest.replace('/', '.')}", own, own)
    layer, part = layer_and_part(names)
    assert layer is not None, names
    module, _, leaf = part.rpartition("/")
    prefix = f"model.layers.{layer}."
    if module in NORMS and leaf == "scale":
        return Stored(f"{prefix}{NORMS[module]}.weight", own, own)
    if module in LINEAR:
        name, inputs = LINEAR[module]
        if leaf == "bias":
            return Stored(f"{prefix}{name}.bias", (math.prod(own),), own)
        if leaf == "kernel":
            return Stored(f"{prefix}{name}.weight", (math.prod(own[inputs:]), math.prod(own[:inputs])), own, inputs)
    return Stored(prefix + part.replace("/", "."), own, own)


def layer_and_part(names: str) -> tuple[int | None, str]:
    """`params/layers/3/mlp_norm/scale` -> (3, "mlp_norm/scale"); what is in no layer -> (None, names)."""
    group, _, rest = names.partition("/")
    mark, _, rest = rest.partition("/")
    if group != "params" or mark != "layers":
        return None, names
    index, _, part = rest.partition("/")
    return int(index), part


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts by their names joined with slashes, in the order of jax.tree.leaves."""
    return {
        "/".join(jax.tree_util.keystr((key,), simple=True) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def is_standard(layers: tuple[str, ...]) -> bool:
    return all(same_variant(name, STANDARD) for name in layers)


def same_variant(a: str | None, b: str | None) -> bool:
    """Whether two names (`standard`, `hidden/softmax`) mean the same mixer."""
    return a == b or (a is not None and b is not None and find_variant(a) == find_variant(b))


# config.json -> settings


def settings_of(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of `ModelConfig` that a config.json of transformers gives.

    Raises UserError, naming `where` and the key, for another architecture, and for what is not computed here: rope
    scaling, sliding windows in use, mixtures of experts, quantisation.
    """
    kind, architectures = hf.get("model_type"), hf.get("architectures")
    if kind not in ARCHITECTURES:
        raise UserError(f"{where}: model_type={kind!r} is not supported; expected {' or '.join(ARCHITECTURES)}")
    if architectures and architectures != [ARCHITECTURES[kind]]:
        raise UserError(f"{where}: architectures={architectures} is not supported; expected {ARCHITECTURES[kind]}")
    for key, values in MEANT.items():
        if hf.get(key, values[0]) not in values:
            raise UserError(f"{where}: {key}={_short(hf[key])} is not supported")
    if kind == "qwen3" and hf.get("attention_bias"):
        raise UserError(f"{where}: attention_bias=true is not supported: qwen3 blocks have no biases here")
    settings = {
        "block": kind,
        "hidden_size": _whole(hf, "hidden_size", where),
        "intermediate_size": _whole(hf, "intermediate_size", where),
        "num_layers": _whole(hf, "num_hidden_layers", where),
        "num_heads": _whole(hf, "num_attention_heads", where),
        "num_kv_heads": _kv_heads(hf, where),
        "head_dim": _head_dim(hf, where),
        "vocab_size": _whole(hf, "vocab_size", where),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),  # false where transformers is not told either
        "rope_theta": _rope_theta(hf, where),
        "norm_epsilon": _positive(hf.get("rms_norm_eps"), "rms_norm_eps", where),
        "init_std": _positive(hf.get("initializer_range", 0.02), "initializer_range", where),
    }
    heads, kv_heads = settings["num_heads"], settings["num_kv_heads"]
    if heads % kv_heads:
        raise UserError(f"{where}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    _check_windows(hf, settings["num_layers"], where)
    return settings


def _kv_heads(hf: Mapping[str, Any], where: str) -> int:
    """null means as many as heads; a key that is missing does not: versions of transformers differ on it."""
    unset = "num_key_value_heads" in hf and hf["num_key_value_heads"] is None
    return _whole(hf, "num_attention_heads" if unset else "num_key_value_heads", where)


def _head_dim(hf: Mapping[str, Any], where: str) -> int:
    """The width of a head, 0 where it is hidden_size / num_attention_heads.

    A Qwen3 that does not say has heads of 128, whatever its other sizes; a Qwen2 has what the sizes give, and so has
    one that says null.
    """
    hidden, heads = _whole(hf, "hidden_size", where), _whole(hf, "num_attention_heads", where)
    width = hf.get("head_dim", QWEN3_HEAD_DIM if hf["model_type"] == "qwen3" else None)
    if width is None:
        if hidden % heads:
            raise UserError(
                f"{where}: num_attention_heads={heads} does not divide hidden_size={hidden}, and there is no head_dim"
            )
        width = hidden // heads
    else:
        width = _whole({"head_dim": width}, "head_dim", where)
    if width % 2:
        raise UserError(
            f"{where}: heads of the odd width {width} (head_dim) are not supported, RoPE cannot rotate them"
        )
    return 0 if width * heads == hidden else width


def _rope_theta(hf: Mapping[str, Any], where: str) -> float:
    """transformers 4 writes rope_theta (and rope_scaling), 5 rope_parameters; both may be there."""
    found = {"rope_theta": hf.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        group = hf.get(key)
        if group is None:
            continue
        if not isinstance(group, dict):
            raise UserError(f"{where}: {key}={_short(group)}: expected an object")
        meant = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (None, 1)}
        for name, value in group.items():
            if name != "rope_theta" and value not in meant.get(name, ()):
                raise UserError(f"{where}: {key}.{name}={_short(value)} is not supported; RoPE is not scaled here")
        found[f"{key}.rope_theta"] = group.get("rope_theta")
    given = {key: _positive(value, key, where) for key, value in found.items() if value is not None}
    if len(set(given.values())) > 1:
        raise UserError(f"{where}: {' but '.join(f'{key}={value:g}' for key, value in given.items())}")
    if not given:
        raise UserError(f"{where}: has no rope_theta (nor rope_parameters.rope_theta)")
    return next(iter(given.values()))


def _check_windows(hf: Mapping[str, Any], count: int, where: str) -> None:
    """Refuses a window that some layer uses; many configs state one and switch it off."""
    kinds = hf.get("layer_types")
    if kinds is not None:
        other = next((kind for kind in kinds if kind != "full_attention"), None)
        if other is not None:
            raise UserError(f"{where}: layer_types={other!r} is not supported; only full_attention is")
        return
    window, first = hf.get("sliding_window"), hf.get("max_window_layers", 28)
    if hf.get("use_sliding_window") and window is not None and not (isinstance(first, int) and first >= count):
        raise UserError(
            f"{where}: use_sliding_window=true (sliding_window={window}, all but the first {first} of {count} layers) "
            "is not supported"
        )


def _whole(hf: Mapping[str, Any], key: str, where: str) -> int:
    value = hf.get(key)
    if value is None:
        raise UserError(f"{where}: has no {key}")
    largest = LARGEST["model.num_layers"] if key == "num_hidden_layers" else 2**24
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise UserError(f"{where}: {key}={_short(value)}: expected a whole number of at least 1, at most {largest}")
    return value


def _positive(value: Any, key: str, where: str) -> float:
    if value is None:
        raise UserError(f"{where}: has no {key}")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{where}: {key}={_short(value)}: expected a positive number")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# settings -> config.json


def config_json(model: ModelConfig, dtype: str, positions: int) -> dict[str, Any]:
    """The config.json of a standard model, for transformers 4 and 5 alike."""
    return {
        "architectures": [ARCHITECTURES[model.block]],
        "model_type": model.block,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "max_position_embeddings": positions,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    } | ({"attention_bias": False} if model.block == "qwen3" else {})


def own_config_json(config: Config, dtype: str) -> dict[str, Any]:
    """The config.json of a model that transformers does not know."""
    own = {key: getattr(config, key) for key in ("variant", "layout", "sequence_length", "document_mask")}
    # impl and fixed_text speak of the machine; the fixed text's tokens are among the arrays.
    left_out = ("impl", "fixed_text", "document_mask", "without_mixers")
    model = {key: value for key, value in dataclasses.asdict(config.model).items() if key not in left_out}
    return {
        "architectures": [OWN_ARCHITECTURE],
        "model_type": OWN_TYPE,
        "layer_types": list(config.model.layers),  # transformers' own key: it checks these against the kinds it knows
        "dtype": dtype,
        OWN_KEY: {**own, "layers": list(model.pop("layers")), "model": model},
    }
