"""From a config file to a checked experiment: the file is run, its extensions too, and all names are looked up.

A config file is Python with `get_config(argument: str | None) -> ml_collections.ConfigDict`. It starts from
`deconstruct.config.default_config()` and changes what it wants; `--config.key=value` on the command line changes it
again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from deconstruct.attention.extensions import code_of, load_extension
from deconstruct.attention.variants import fixed_source, reads_fixed_text
from deconstruct.config import Config, ModelConfig, complete, describe_type, known_keys, unknown_key
from deconstruct.layout import STANDARD
from deconstruct.model.language_model import check_model
from deconstruct.spelling import split_list
from deconstruct.types import UserError


def load_config(spec: str, *, arguments: Sequence[str] = (), **overrides: Any) -> Config:
    """Reads `FILE.py[:argument]`, applies overrides, checks and resolves.

    `arguments` are command-line words, `--config.model.dtype=float32`; keyword arguments do the same in a notebook:
    `load_config(spec, steps=10, **{"model.dtype": "float32"})`. Raises UserError on whatever is wrong.
    """
    words = [*arguments, *(f"--config.{key}={value}" for key, value in overrides.items())]
    path = spec.partition(":")[0]
    if not epath.Path(path).exists() or epath.Path(path).is_dir():
        raise UserError(f"--config={spec}: there is no file {path}")
    _check_overrides(words)
    command = ["deconstruct", f"--config={spec}", *words]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    # ml_collections loads every file into this one module, where what an earlier file defined would still stand.
    sys.modules.pop("config_config", None)
    try:
        with _neighbours_of(path):
            values(command)
            loaded = values.config
    except SystemExit as error:
        raise UserError(f"--config={spec}: the file ends the program (SystemExit: {error}); it is to return") from error
    except Exception as error:  # a config file is a program: it may fail in any way
        raise UserError(f"--config={spec}: {what_failed(path, error)}") from error
    if not isinstance(loaded, ConfigDict):
        raise UserError(f"--config={spec}: get_config returned {loaded!r}; expected a ConfigDict")
    return resolve(loaded)


def what_failed(path: str, error: Exception) -> str:
    """One line: what a config file said of its argument, or what went wrong in it and on which line."""
    # ml_collections puts a whole traceback of the config file into some of its messages.
    trace = "".join(traceback.format_exception(error))
    message = trace.strip().splitlines()[-1]
    kind, _, said = message.partition(": ")
    if said and kind in ("ValueError", f"{UserError.__module__}.{UserError.__name__}"):
        return said
    numbers = re.findall(rf'File "{re.escape(path)}", line (\d+)', trace)
    return f"{message} (line {numbers[-1]})" if numbers else message


def resolve(config: ConfigDict) -> Config:
    """Checks a ConfigDict: every key, every name and whether all of it goes together. Raises UserError."""
    completed = complete(config)
    for path in split_list(completed.extensions):
        load_extension(path, "config.extensions")
    check_model(completed.model)
    _check_nothing_is_ignored(completed, config.get("model", ConfigDict()))
    code = code_of(completed.model.layers)
    return completed.replace(model=_without_what_nothing_reads(completed), code=code)


def _without_what_nothing_reads(config: Config) -> ModelConfig:
    """Values that follow from others are filled in only where something reads them."""
    model = config.model
    if fixed_source(model.layers) is None:
        model = dataclasses.replace(model, fixed_length=0)
    return model if config.document_mask or not config.border_loss else dataclasses.replace(model, end_of_text=-1)


def _check_nothing_is_ignored(config: Config, given: ConfigDict) -> None:
    """Raises UserError for a setting that was changed and that nothing in this combination reads. `given`: the group
    `model` before what is derived was filled in."""
    source = fixed_source(config.model.layers)
    borders = config.document_mask or not config.border_loss
    readers = {
        "fixed_length": (source is not None, "no layer reads a fixed stream"),
        "fixed_std": (source == "fixed_random", "no layer reads fixed_random"),
        "fixed_text": (reads_fixed_text(config.model.layers), "no layer reads fixed_text"),
        "end_of_text": (borders, "neither document_mask=true nor border_loss=false asks for it"),
    }
    for key, (read, why) in readers.items():
        default = getattr(ModelConfig(), key)
        value = given.get(key, default)
        if not read and value not in (default, config.sequence_length if key == "fixed_length" else default):
            raise UserError(f"config.model.{key}={value}: {why}, so it would be ignored; leave it at {default!r}")
    spelled = split_list(config.layout)
    if len(spelled) > 1 and not spelled[0].isdigit() and config.variant != STANDARD:
        raise UserError(
            f"config.variant={config.variant}: config.layout={config.layout} names every layer, so it would be "
            "ignored; leave it out"
        )


@contextlib.contextmanager
def _neighbours_of(path: str) -> Iterator[None]:
    """A config file may import what lies beside it. It is forgotten afterwards: another file's neighbours may have
    the same names."""
    folder = str(Path(path).resolve().parent)
    before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and str(Path(file).resolve().parent) == folder:
                del sys.modules[name]


def _check_overrides(words: Sequence[str]) -> None:
    known = known_keys()
    for word in words:
        key, equals, text = word.removeprefix("--config.").partition("=")
        if not word.startswith("--config.") or not equals:
            raise UserError(f"{word}: expected --config.key=value")
        if key not in known:
            raise unknown_key(key)
        try:
            _PARSERS[known[key]](text)
        except (KeyError, ValueError) as error:
            raise UserError(f"config.{key}={text}: expected {describe_type(known[key])}") from error


_PARSERS: dict[type, Any] = {
    int: int,
    float: float,
    str: str,
    bool: {"true": True, "True": True, "1": True, "false": False, "False": False, "0": False}.__getitem__,
}
