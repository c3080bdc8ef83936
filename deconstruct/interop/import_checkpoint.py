"""`deconstruct import`: a Hugging Face checkpoint becomes a workdir, whole or with some of its layers replaced.

The workdir holds a checkpoint of step 0 without optimizer state: `train` starts from it, `evaluate` and `generate`
use it. A replaced layer keeps what fits (its MLP, its norms, V and O, and Q and K where the new mixer has them in the
same shape); the rest is drawn from the seed, as a model built here would be.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from deconstruct.attention.variants import fixed_source, reads_fixed_text
from deconstruct.config import Config
from deconstruct.distributed.mesh import single_device_mesh
from deconstruct.experiment import resolve
from deconstruct.interop import tokenizer_files
from deconstruct.interop.files import DTYPES, Tensors, appearing, fresh_folder, own_file, read_json, write_json
from deconstruct.interop.huggingface import (
    FIXED,
    OWN_KEY,
    OWN_TYPE,
    Stored,
    flat,
    is_standard,
    layer_and_part,
    same_variant,
    settings_of,
    stored,
)
from deconstruct.interop.listing import listing
from deconstruct.layout import STANDARD
from deconstruct.model.language_model import LanguageModel, init_options
from deconstruct.model.placement import abstract_arrays, split_model
from deconstruct.model.restack import to_layers
from deconstruct.run import extensions
from deconstruct.run.checkpoint import Checkpoints
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError

SEQUENCE_LENGTH = 2048  # of the workdir's configuration, where the checkpoint allows more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a folder with config.json and safetensors (qwen2 or qwen3)"
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the workdir to make")
    parser.add_argument("--layout", default="", help="which layers stay as they are: even, quarter, 1,5,9, ...")
    parser.add_argument("--variant", default="", help="what replaces the others: static_emb_qk, approximate, mlp, ...")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn anew (default 0)")
    parser.add_argument(
        "--sequence-length",
        type=int,
        default=0,
        metavar="N",
        help=f"of the workdir's configuration (default: the checkpoint's longest, at most {SEQUENCE_LENGTH})",
    )
    parser.add_argument(
        "--extension", action="append", default=[], metavar="FILE", help="Python that registers what layers are made of"
    )


def run(arguments: argparse.Namespace) -> int:
    """The verb `import`. Returns the exit status."""
    report = import_checkpoint(
        arguments.checkpoint,
        arguments.workdir,
        layout=arguments.layout,
        variant=arguments.variant,
        seed=arguments.seed,
        sequence_length=arguments.sequence_length,
        extension=tuple(arguments.extension),
    )
    print("\n".join(report))
    return 0


class Origin(NamedTuple):
    """What config.json says: the settings of a Config, and the variant of each layer."""

    settings: dict[str, Any]
    layers: tuple[str, ...]


class Choice(NamedTuple):
    """Which arrays of the new model are read, which are drawn, and which tensors nobody takes."""

    kept: dict[str, Stored]
    drawn: list[str]
    unused: list[str]


def import_checkpoint(
    checkpoint: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    layout: str = "",
    variant: str = "",
    seed: int = 0,
    sequence_length: int = 0,
    extension: tuple[str, ...] = (),
) -> list[str]:
    """Makes a workdir of a checkpoint; returns the lines that say what was kept, drawn and left.

    layout and variant as in a config; without them the layers stay what they are. Raises UserError, leaving nothing
    behind, for a workdir that is not empty, an unsupported model, and missing, damaged or ill-shaped tensors.
    """
    folder, target = Path(checkpoint).expanduser(), fresh_folder("--workdir", workdir)
    if not folder.is_dir():
        raise UserError(f"--checkpoint={checkpoint}: there is no such folder")
    hf = read_json(own_file(folder / "config.json"))
    tensors = Tensors(folder)
    origin = _origin(hf, tensors, str(folder / "config.json"), sequence_length)
    config = _configuration(origin, layout, variant, seed, ",".join(extension))
    _, params, frozen = abstract_arrays(config.model, single_device_mesh())
    tree = {"params": to_layers(params, config.model.plan), "frozen": frozen}
    choice = choose(flat(tree), tensors, origin, config, str(folder))
    tokens = tokenizer_files.find(folder)
    if tokens.tokenizer is not None and tokens.tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokens.tokenizer.vocab_size} ids, but the model only "
            f"vocab_size={config.model.vocab_size}"
        )
    report = [*_report(config, choice, tensors, str(folder)), f"tokenizer    {tokens.line()}"]
    meta = {
        "step": 0,
        "config": config.to_dict(),
        "layout": list(config.model.layers),
        "tokenizer": tokens.tokenizer.fingerprint if tokens.tokenizer else None,
        "data": None,  # none yet: the first run takes its own
        "drawn": choice.drawn,
    }
    with appearing(target) as partial:
        own = Workdir(partial)
        tokenizer_files.carry(tokens, folder, partial / "tokenizer")
        write_json(partial / "imported.json", {"from": str(folder.resolve()), "config": hf, "report": report})
        own.write_config(config)
        extensions.keep(own, config.model.layers)
        arrays = _arrays(tree, choice, tensors, config)
        with Checkpoints(own.checkpoints, every=1, keep=1) as writer:
            writer.save(0, arrays, {"step": np.int32(0)}, meta)
    return report


def _origin(hf: dict[str, Any], tensors: Tensors, where: str, sequence_length: int) -> Origin:
    if hf.get("model_type") == OWN_TYPE:
        entry = hf.get(OWN_KEY)
        if not isinstance(entry, dict) or not isinstance(entry.get("layers"), list):
            raise UserError(f"{where}: has no entry {OWN_KEY!r} with the layers of the model")
        settings = {key: value for key, value in entry.items() if key != "layers"}
        settings["sequence_length"] = sequence_length or settings.get("sequence_length", SEQUENCE_LENGTH)
        return Origin(settings, tuple(entry["layers"]))
    model = settings_of(hf, where)
    # Computed in the precision it is stored in: float16 has no counterpart here.
    written = tensors.arrays.get("model.embed_tokens.weight")
    model["dtype"] = "float32" if written and written.dtype == "float32" else "bfloat16"
    longest = hf.get("max_position_embeddings")
    default = min(longest, SEQUENCE_LENGTH) if isinstance(longest, int) and longest > 0 else SEQUENCE_LENGTH
    settings = {"variant": STANDARD, "layout": "uniform", "sequence_length": sequence_length or default}
    return Origin({**settings, "model": model}, (STANDARD,) * model["num_layers"])


def _configuration(origin: Origin, layout: str, variant: str, seed: int, extension: str) -> Config:
    replaced: dict[str, Any] = {}
    if layout or variant:
        replaced = {"layout": layout or "uniform", "variant": variant or STANDARD}
        if is_standard(origin.layers):  # an MLP that was trained keeps its width, whatever comes to stand beside it
            replaced["model"] = {**origin.settings["model"], "match_parameters": False}
    config = resolve(ConfigDict({**origin.settings, "seed": seed, "data": "", "extensions": extension, **replaced}))
    if not replaced and config.model.layers != origin.layers:
        raise UserError(
            f"config.json: its layers are {','.join(map(str, origin.layers))}, but its layout gives "
            f"{','.join(map(str, config.model.layers))}"
        )
    if layout and not variant and is_standard(config.model.layers):
        raise UserError(f"--layout={layout}: says which layers stay standard; add --variant, what the others become")
    return config


def choose(own: dict[str, Any], tensors: Tensors, origin: Origin, config: Config, where: str) -> Choice:
    """Finds each array of the model in the checkpoint. `own` holds shapes by name, by layer.

    In a layer whose mixer stays the same everything must be there; in a replaced one the mixer takes what fits.
    Raises UserError for a tensor that is missing, has another shape or dtype, or that no such model has.
    """
    layers = zip(config.model.layers, origin.layers, strict=True)
    replaced = {i for i, (now, before) in enumerate(layers) if not same_variant(now, before)}
    same_fixed = fixed_source(config.model.layers) == fixed_source(origin.layers)
    kept: dict[str, Stored] = {}
    drawn = []
    for names, abstract in own.items():
        layer, part = layer_and_part(names)
        optional = not same_fixed if names == FIXED else layer in replaced and part.startswith("mixer/")
        wanted = stored(names, abstract.shape, config.model.vocab_size)
        found = tensors.arrays.get(wanted.name)
        if optional and (found is None or found.shape != wanted.shape or names == FIXED):
            drawn.append(names)
            continue
        if found is None:
            raise UserError(f"{where}: has no tensor {wanted.name}; {list(wanted.shape)} was expected")
        if found.shape != wanted.shape:
            raise UserError(
                f"{tensors.where(wanted.name)}: {wanted.name} is {list(found.shape)}; config.json makes it "
                f"{list(wanted.shape)}"
            )
        integer = jnp.issubdtype(abstract.dtype, jnp.integer)
        if found.dtype not in DTYPES.values() or (found.dtype == "int32") != integer:
            raise UserError(f"{tensors.where(wanted.name)}: {wanted.name} is stored as {found.dtype}, not supported")
        kept[names] = wanted
    taken = {entry.name for entry in kept.values()}
    unused = [name for name in tensors.arrays if name not in taken and not _repeated(name, tensors, config)]
    for name in unused:
        _check_unused(name, replaced, tensors, config)
    return Choice(kept, drawn, unused)


def _repeated(name: str, tensors: Tensors, config: Config) -> bool:
    """Whether a tensor says nothing new: RoPE's frequencies, or the output table of tied embeddings."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    if name != "lm_head.weight" or not config.model.tie_embeddings:
        return False
    if not np.array_equal(tensors.read(name), tensors.read("model.embed_tokens.weight")):
        raise UserError(
            f"{tensors.where(name)}: lm_head.weight is not the embedding table, but config.json says "
            "tie_word_embeddings=true"
        )
    return True


def _check_unused(name: str, replaced: set[int], tensors: Tensors, config: Config) -> None:
    words = name.split(".")
    in_mixer = words[:2] == ["model", "layers"] and len(words) > 4 and words[3] in ("self_attn", "mixer")
    if in_mixer and words[2].isdigit() and int(words[2]) in replaced:
        return
    if words[0] == OWN_KEY and replaced:
        return
    raise UserError(f"{tensors.where(name)}: {name} is not a tensor of the {config.model.block} in config.json")


def _arrays(tree: Any, choice: Choice, tensors: Tensors, config: Config) -> Any:
    """The model's arrays, in the structure of `tree`; one tensor of the checkpoint is in memory beside them."""
    drawn = draw(config, choice.drawn)
    leaves = []
    for names in flat(tree):
        wanted = choice.kept.get(names)
        leaves.append(jnp.asarray(_finite(wanted, tensors)) if wanted else drawn[names])
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _finite(wanted: Stored, tensors: Tensors) -> np.ndarray:
    array = wanted.read(tensors.read(wanted.name))
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise UserError(f"{tensors.where(wanted.name)}: {wanted.name} has {bad:,} numbers that are not finite")
    return array


def draw(config: Config, names: list[str]) -> dict[str, jax.Array]:
    """Some arrays of the model that `build_model(config.model, config.seed)` is; the others are never made."""

    def chosen() -> dict[str, jax.Array]:
        _, params, frozen = split_model(LanguageModel(config.model, jax.random.key(config.seed)))
        arrays = flat({"params": to_layers(params, config.model.plan), "frozen": frozen})
        return {name: arrays[name] for name in names}

    return jax.jit(chosen, compiler_options=init_options())() if names else {}


def _report(config: Config, choice: Choice, tensors: Tensors, where: str) -> list[str]:
    model = config.model
    count = sum(int(np.prod(entry.shape)) for entry in choice.kept.values())
    stored_as = ", ".join(sorted({tensors.arrays[entry.name].dtype for entry in choice.kept.values()}))
    lines = [f"imported     {where}: {model.block}, {model.num_layers} layers, {count:,} parameters kept ({stored_as})"]
    lines += [f"kept         {line}" for line in listing(choice.kept, model.layers)]
    lines += [f"initialised  {line}" for line in listing(choice.drawn, model.layers) or ["nothing"]]
    lines += [f"not used     {line}" for line in listing(choice.unused, model.layers)]
    if FIXED in choice.drawn and reads_fixed_text(model.layers):
        lines.append("note         the fixed text is random until `train` puts the text of its run in place")
    return lines
