"""Attention taken apart: language models whose token mixing is relaxed one principle at a time.

The notebook's names. They are imported when first used, so that `import deconstruct` is quick and starts no
accelerator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deconstruct.attention.attention import Attention as Attention
    from deconstruct.attention.check import check as check
    from deconstruct.attention.form import Flops as Flops
    from deconstruct.attention.form import Form as Form
    from deconstruct.attention.form import Kernel as Kernel
    from deconstruct.attention.form import Shape as Shape
    from deconstruct.attention.mixer import Context as Context
    from deconstruct.attention.mixer import Mixer as Mixer
    from deconstruct.attention.registry import register_form as register_form
    from deconstruct.attention.registry import register_mixer as register_mixer
    from deconstruct.attention.registry import register_source as register_source
    from deconstruct.attention.source import FixedSource as FixedSource
    from deconstruct.attention.source import Source as Source
    from deconstruct.costs.describe import describe as describe
    from deconstruct.draw.curves import draw_curves as draw_curves
    from deconstruct.draw.curves import draw_perplexity as draw_perplexity
    from deconstruct.draw.maps import draw_maps as draw_maps
    from deconstruct.draw.maps import read_maps as read_maps
    from deconstruct.experiment import load_config as load_config
    from deconstruct.kernels.mask import Mask as Mask
    from deconstruct.kernels.reference import apply_weights as apply_weights
    from deconstruct.kernels.reference import logits as logits
    from deconstruct.layers import Linear as Linear
    from deconstruct.layers import constant_param as constant_param
    from deconstruct.layers import normal_param as normal_param
    from deconstruct.model.language_model import build_model as build_model
    from deconstruct.notebook import compare_runs as compare_runs
    from deconstruct.notebook import evaluate_run as evaluate_run
    from deconstruct.notebook import prepare_text as prepare_text
    from deconstruct.notebook import train_run as train_run
    from deconstruct.run.restore import restore_model as restore_model
    from deconstruct.types import Streams as Streams
    from deconstruct.types import UserError as UserError

_HOMES = {
    "load_config": "deconstruct.experiment",
    "build_model": "deconstruct.model.language_model",
    "restore_model": "deconstruct.run.restore",
    # A study: text, runs, what they have learned and cost, and pictures of it.
    "prepare_text": "deconstruct.notebook",
    "train_run": "deconstruct.notebook",
    "evaluate_run": "deconstruct.notebook",
    "compare_runs": "deconstruct.notebook",
    "describe": "deconstruct.costs.describe",
    "read_maps": "deconstruct.draw.maps",
    "draw_maps": "deconstruct.draw.maps",
    "draw_curves": "deconstruct.draw.curves",
    "draw_perplexity": "deconstruct.draw.curves",
    # What forms, mixers and sources of one's own are built on, and whether they keep to their contract.
    "check": "deconstruct.attention.check",
    "register_form": "deconstruct.attention.registry",
    "register_mixer": "deconstruct.attention.registry",
    "register_source": "deconstruct.attention.registry",
    "Form": "deconstruct.attention.form",
    "Kernel": "deconstruct.attention.form",
    "Flops": "deconstruct.attention.form",
    "Shape": "deconstruct.attention.form",
    "Mask": "deconstruct.kernels.mask",
    "logits": "deconstruct.kernels.reference",
    "apply_weights": "deconstruct.kernels.reference",
    "Mixer": "deconstruct.attention.mixer",
    "Attention": "deconstruct.attention.attention",
    "Context": "deconstruct.attention.mixer",
    "Source": "deconstruct.attention.source",
    "FixedSource": "deconstruct.attention.source",
    "Linear": "deconstruct.layers",
    "normal_param": "deconstruct.layers",
    "constant_param": "deconstruct.layers",
    "Streams": "deconstruct.types",
    "UserError": "deconstruct.types",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deconstruct' has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
