"""The registries of sources, forms and mixers, and the names of the paper that stand for pairs of them."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from deconstruct.types import UserError

# The seven variants of arXiv:2510.11602. mlp is a mixer of its own.
VARIANTS = {
    "standard": "hidden/softmax",
    "approximate": "hidden/taylor",
    "non_approximate": "hidden/self_gate",
    "rnd_emb_qk": "fixed_random/softmax",
    "fixed_seq_qk": "fixed_text/softmax",
    "static_emb_qk": "static_embedding/softmax",
    "mlp": "mlp",
}

SOURCES: dict[str, Any] = {}  # name -> subclass of source.Source
FORMS: dict[str, Any] = {}  # of form.Form
MIXERS: dict[str, Any] = {}  # of mixer.Mixer
_REGISTRIES: dict[str, dict[str, Any]] = {"source": SOURCES, "form": FORMS, "mixer": MIXERS}

C = TypeVar("C", bound=type)


class Origin(NamedTuple):
    """The file a registered class was defined in, as it was then."""

    path: Path
    sha256: str


_ORIGINS: dict[type, Origin] = {}


def register_form(cls: C) -> C:
    """Class decorator: makes the form available under its `name`. A name twice is an error."""
    return _register("form", ("weights",), cls)


def register_mixer(cls: C) -> C:
    """Class decorator: makes the mixer available under its `name`. A name twice is an error."""
    return _register("mixer", ("extend", "maps"), cls)


def register_source(cls: C) -> C:
    """Class decorator: makes the source available under its `name`. A name twice is an error."""
    return _register("source", ("read",), cls)


def origin(cls: type) -> Origin | None:
    """Where a registered class comes from; None for the package's own and for a class that no file defines."""
    return _ORIGINS.get(cls)


def loaded_code() -> set[str]:
    """The sha256 of every file outside the package that has registered something that is known now."""
    known = [cls for registry in _REGISTRIES.values() for cls in registry.values()]
    return {_ORIGINS[cls].sha256 for cls in known if cls in _ORIGINS}


def in_package(cls: type) -> bool:
    """Whether a class is one of the package's own."""
    return cls.__module__.split(".")[0] == "deconstruct"


def _register(kind: str, contract: tuple[str, ...], cls: C) -> C:
    name, registry = getattr(cls, "name", None), _REGISTRIES[kind]
    if not (isinstance(cls, type) and all(hasattr(cls, method) for method in contract)) or not isinstance(name, str):
        raise UserError(f"{cls!r}: expected a subclass of {kind.capitalize()} with a `name`")
    if not name.isidentifier():
        raise UserError(f"{kind} {name!r}: a name is made of letters, digits and _")
    if VARIANTS.get(name, name) != name:
        raise UserError(f"{kind} {name!r}: the name is taken, it means {VARIANTS[name]}; choose another")
    found = _origin(cls)
    for other_kind, other in _REGISTRIES.items():
        if name in other and (kind == other_kind or "source" not in (kind, other_kind)):
            same = found is not None and origin(other[name]) is not None and _same_code(other[name], cls, found)
            if not (same and kind == other_kind):
                raise UserError(f"{other_kind} {name!r} is registered already, by {other[name].__module__}")
    registry[name] = cls
    if found is not None:
        _ORIGINS[cls] = found
    return cls


def _same_code(known: type, cls: type, found: Origin) -> bool:
    """Whether a class is the same one again: its file was run a second time (a config file is, at each load)."""
    before = _ORIGINS[known]
    return (before.path, known.__qualname__) == (found.path, cls.__qualname__) and known.__qualname__.isidentifier()


def _origin(cls: type) -> Origin | None:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if in_package(cls) or file is None or not Path(file).is_file():
        return None
    path = Path(file).resolve()
    return Origin(path, hashlib.sha256(path.read_bytes()).hexdigest())
