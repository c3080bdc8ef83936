"""`deconstruct export`: a checkpoint of a workdir as safetensors and config.json.

A standard model loads in `transformers`. One with other layers is written with its layout and a model_type that
`transformers` refuses; `deconstruct import` reads it back as it was.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deconstruct.config import Config
from deconstruct.distributed.mesh import single_device_mesh
from deconstruct.interop import tokenizer_files
from deconstruct.interop.files import (
    SHARD_BYTES,
    Array,
    appearing,
    fresh_folder,
    read_json,
    write_json,
    write_safetensors,
)
from deconstruct.interop.huggingface import (
    OWN_TYPE,
    Stored,
    config_json,
    flat,
    is_standard,
    own_config_json,
    same_variant,
    stored,
)
from deconstruct.interop.listing import spans
from deconstruct.layout import STANDARD
from deconstruct.model.placement import abstract_arrays
from deconstruct.model.restack import to_layers
from deconstruct.run import checkpoint, extensions
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError

PRECISIONS = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--output", required=True, metavar="DIR", help="the checkpoint folder to make")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the latest)")
    parser.add_argument(
        "--dtype", choices=PRECISIONS, default="float32", help="bfloat16 halves the files and rounds (default float32)"
    )
    extensions.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """The verb `export`. Returns the exit status."""
    report = export_checkpoint(
        arguments.workdir,
        arguments.output,
        step=arguments.step,
        dtype=arguments.dtype,
        trust=extensions.trust(arguments),
    )
    print("\n".join(report))
    return 0


def export_checkpoint(
    workdir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    trust: extensions.Trust = extensions.NOTHING,
) -> list[str]:
    """Writes a checkpoint folder; returns the lines that say what it is. One layer is in memory at a time.

    Raises UserError, leaving nothing behind, where the output is not empty or the step is not there.
    """
    if dtype not in PRECISIONS:
        raise UserError(f"--dtype={dtype}: expected {' or '.join(PRECISIONS)}")
    run_dir, folder = Workdir(workdir), fresh_folder("--output", output)
    step = run_dir.step(step)
    meta = checkpoint.read_meta(run_dir.checkpoints, step)
    config = Config.from_dict(meta["config"])
    extensions.load(run_dir, config, trust)
    groups = _groups(config)
    names = {name: entry for group in groups for name, entry in _entries(group, config, dtype).items()}
    described = {entry.name: array for entry, array in names.values()}
    source = Path(os.fspath(run_dir.tokenizer))
    tokens = tokenizer_files.find(source, meta["tokenizer"], f"the checkpoint of step {step}")
    with appearing(folder) as partial:
        files = write_safetensors(partial, described, _arrays(run_dir, step, groups, names), shard_bytes)
        write_json(partial / "config.json", _config_json(config, dtype, run_dir, tokens))
        tokenizer_files.carry(tokens, source, partial)
        said = tokenizer_files.complete(tokens, partial)
    count = sum(math.prod(entry.shape) for name, (entry, _) in names.items() if not name.startswith("frozen/"))
    what = (
        f"{config.model.block}, {config.model.num_layers} layers, {count:,} parameters, {dtype}, {len(files)} file(s)"
    )
    lines = [f"exported     step {step}: {what}", f"tokenizer    {said or tokens.line()}"]
    return lines + _not_standard(config)


def _groups(config: Config) -> list[Any]:
    """The model by layer, as parts to be read one after another: constants, embeddings, layers in order, the rest."""
    _, params, frozen = abstract_arrays(config.model, single_device_mesh())
    model = to_layers(params, config.model.plan)
    layers = [{"params": {"layers": {str(i): model["layers"][str(i)]}}} for i in range(config.model.num_layers)]
    tops = [{"params": {key: model[key]}} for key in ("embed", "norm", "head") if model.get(key) is not None]
    return [group for group in ({"frozen": frozen}, tops[0], *layers, *tops[1:]) if jax.tree.leaves(group)]


def _entries(group: Any, config: Config, dtype: str) -> dict[str, tuple[Stored, Array]]:
    entries = {}
    for names, abstract in flat(group).items():
        entry = stored(names, abstract.shape, config.model.vocab_size)
        # A constant is not rounded: it is what the model was trained with.
        exact = names.startswith("frozen/")
        entries[names] = entry, Array(entry.shape, str(abstract.dtype) if exact else dtype)
    return entries


def _arrays(
    run_dir: Workdir, step: int, groups: list[Any], names: dict[str, tuple[Stored, Array]]
) -> Iterator[tuple[str, np.ndarray]]:
    for group in groups:
        for name, array in flat(checkpoint.load_model(run_dir.checkpoints, step, group, partial=True)).items():
            entry = names[name][0]
            yield entry.name, entry.write(np.asarray(array))


def _config_json(config: Config, dtype: str, run_dir: Workdir, tokens: tokenizer_files.Found) -> dict[str, Any]:
    """With what a checkpoint imported into this workdir said of positions and special ids."""
    imported = run_dir.folder / "imported.json"
    before = read_json(Path(os.fspath(imported))).get("config", {}) if imported.exists() else {}
    ids = {key: before[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in before}
    if not ids and tokens.tokenizer is not None:
        ids = {"eos_token_id": tokens.tokenizer.end_of_text}
    if not is_standard(config.model.layers):
        return own_config_json(config, dtype) | ids
    positions = max(config.sequence_length, before.get("max_position_embeddings") or 0)
    return config_json(config.model, dtype, positions) | ids


def _not_standard(config: Config) -> list[str]:
    layers = config.model.layers
    if is_standard(layers):
        return []
    others = dict.fromkeys(name for name in layers if not same_variant(name, STANDARD))
    which = "; ".join(f"{spans([i + 1 for i, name in enumerate(layers) if name == own])} {own}" for own in others)
    return [
        f"note         transformers cannot run this model (layers {which}): config.json has model_type={OWN_TYPE!r}, "
        "which it refuses; `deconstruct import` reads it back"
    ]
