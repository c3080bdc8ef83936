"""How names with options are spelled: `source/form(option=value)`, and lists of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from deconstruct.types import UserError


def split_list(text: str, separator: str = ",") -> list[str]:
    """The entries of a list, stripped, empty ones left out; a separator inside parentheses separates nothing."""
    entries, depth, begin = [], 0, 0
    for i, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == separator and depth <= 0:
            entries.append(text[begin:i])
            begin = i + 1
    return [entry for entry in (entry.strip() for entry in [*entries, text[begin:]]) if entry]


def parse_call(text: str, what: str = "variant") -> tuple[str, dict[str, str]]:
    """`name(option=value, ...)` -> (name, options as text). Raises UserError, which says `what` it is, where it is
    spelled otherwise."""
    name, parenthesis, rest = text.strip().partition("(")
    if not parenthesis:
        return name, {}
    if not rest.endswith(")") or rest.count("(") + 1 != rest.count(")"):
        raise UserError(f"{what} {text!r}: a parenthesis is not closed; expected {name}(option=value, ...)")
    options: dict[str, str] = {}
    for entry in split_list(rest[:-1]):
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not key.isidentifier() or not value:
            raise UserError(f"{what} {text!r}: {entry!r} is not an option; expected option=value")
        if key in options:
            raise UserError(f"{what} {text!r}: the option {key} is given twice")
        options[key] = value
    return name.strip(), options


def parse_argument(argument: str | None, defaults: dict[str, str]) -> dict[str, str]:
    """A config file's argument, `key=value,key=value`, over its defaults: `configs/paper.py:size=70m,variant=mlp`.

    Commas inside parentheses belong to the value. Raises ValueError for a key that has no default.
    """
    chosen = dict(defaults)
    for entry in split_list(argument or ""):
        key, equals, value = (part.strip() for part in entry.partition("="))
        if key not in defaults or not equals:
            *others, last = (f"{name}=" for name in defaults)
            keys = f"{', '.join(others)} or {last}" if others else last
            raise ValueError(f"{entry!r}: expected {keys}, separated by commas")
        chosen[key] = value
    return chosen


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known name that is spelled most alike; "" where none is."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), "")
