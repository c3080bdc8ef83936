"""Tiny models that the tests share."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest

from deconstruct.attention.registry import FORMS, MIXERS, SOURCES, VARIANTS
from deconstruct.config import Config, default_config
from deconstruct.experiment import resolve

# Every pair of source and form, and every mixer of its own: a new one is tested by existing.
PAIRS = [f"{source}/{form}" for source in SOURCES for form in FORMS]
MIXER_NAMES = [*PAIRS, *MIXERS]
PAPER_NAMES = list(VARIANTS)
# Every form over hidden states, every source under softmax, every other mixer: the parts that all pairs are made of.
PARTS = [name for name in MIXER_NAMES if name.startswith("hidden/") or name.endswith("/softmax") or "/" not in name]
# And each other form over one of the other sources. What is slow runs these; `dc.check` and decoding run every pair.
OTHER_SOURCES = itertools.cycle(source for source in SOURCES if source != "hidden")
CROSSED = [f"{next(OTHER_SOURCES)}/{form}" for form in FORMS if form != "softmax"]
PARTS_AND_CROSSED = [*PARTS, *CROSSED]


# For what older emitters (tests/conftest.py) do not compute bit for bit as a user's run does.
todays_programs = pytest.mark.skipif(
    "fusion_emitters=false" in os.environ.get("XLA_FLAGS", ""), reason="run by tests/test_emitters.py"
)


def quick(names: list[Any], some: list[Any]) -> list[Any]:
    """`names` as the parameters of a test: those in `some` are run by `make test`, the others by `make proof`."""
    return [name if name in some else pytest.param(*_values(name), marks=pytest.mark.proof) for name in names]


def _values(name: Any) -> tuple[Any, ...]:
    return name if isinstance(name, tuple) else (name,)


PARTS_QUICKLY = quick(PARTS_AND_CROSSED, PARTS)

MODEL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 40,
    "dtype": "float32",
    "remat": False,
}
TOP = {"sequence_length": 12, "batch_size": 8, "steps": 4, "data": "", "log_every": 1, "checkpoint_every": 2}


def tiny_config(model: dict[str, Any] | None = None, **top: Any) -> Config:
    """A resolved configuration; `model` and keyword arguments change it. Adam's epsilon is large enough that sums
    taken in another order do not turn into other signs of an update."""
    config = default_config()
    config.update({**TOP, **{key: value for key, value in top.items() if not isinstance(value, dict)}})
    config.model.update({**MODEL, **(model or {})})
    config.optimizer.update({"warmup_steps": 1, "beta2": 0.99, "epsilon": 1e-4} | top.get("optimizer", {}))
    config.mesh.update({"data": 1, "fsdp": -1, "tensor": 1} | top.get("mesh", {}))
    return resolve(config)


# The same as a config file, for programs that are started: its argument may name another variant.
CONFIG_FILE = """
from deconstruct.config import default_config
from deconstruct.spelling import parse_argument


def get_config(argument=None):
    config = default_config()
    config.update(parse_argument(argument, {"variant": "standard"}))
    config.update({"sequence_length": 12, "batch_size": 8, "steps": 4, "log_every": 1, "checkpoint_every": 2})
    config.model.update({"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4})
    config.model.update({"dtype": "float32", "remat": False})
    config.optimizer.update({"warmup_steps": 1, "beta2": 0.99, "epsilon": 1e-4})
    config.mesh.update({"data": -1, "fsdp": 1})
    return config
"""
