"""Attention taken apart: language models whose token mixing is relaxed one principle at a time.

The notebook's names. They are imported when first used, so that `import deconstruct` is quick and starts no
accelerator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deconstruct.attention.base import Form as Form
    from deconstruct.attention.base import Mixer as Mixer
    from deconstruct.attention.base import register_form as register_form
    from deconstruct.attention.base import register_mixer as register_mixer
    from deconstruct.config import load_config as load_config
    from deconstruct.model.language_model import build_model as build_model
    from deconstruct.run.restore import restore_model as restore_model

_HOMES = {
    "load_config": "deconstruct.config",
    "build_model": "deconstruct.model.language_model",
    "restore_model": "deconstruct.run.restore",
    "register_form": "deconstruct.attention.base",
    "register_mixer": "deconstruct.attention.base",
    "Form": "deconstruct.attention.base",
    "Mixer": "deconstruct.attention.base",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deconstruct' has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
