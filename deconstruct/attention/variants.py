"""The paper's names, and what a layer of any name is made of."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from flax import nnx

# Forms and mixers register themselves when their file is imported: one line each.
from deconstruct.attention import gated_mlp  # noqa: F401
from deconstruct.attention.attention import Attention
from deconstruct.attention.base import FORMS, MIXERS, Form, Mixer
from deconstruct.attention.forms import self_gate, softmax, taylor, taylor_diagonal  # noqa: F401
from deconstruct.attention.source import SOURCES, Source
from deconstruct.config import ModelConfig
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


def one_of_each() -> list[str]:
    """The paper's variants, then every other form (over hidden states) and every other mixer there is."""
    forms = [name for name in FORMS if f"hidden/{name}" not in VARIANTS.values()]
    return [*VARIANTS, *forms, *(name for name in MIXERS if name not in VARIANTS)]


class Variant(NamedTuple):
    """What a name stands for: a source and a form, or a mixer of its own."""

    source: type[Source] | None
    form: type[Form] | None
    mixer: type[Mixer] | None


def find_variant(name: str) -> Variant:
    """Looks up a paper's name, `source/form`, a form's name (over hidden states) or a mixer's. Raises UserError."""
    spelled = VARIANTS.get(name, name)
    if spelled in MIXERS:
        return Variant(None, None, MIXERS[spelled])
    source, slash, form = spelled.rpartition("/")
    source = source if slash else "hidden"
    if source in SOURCES and form in FORMS:
        return Variant(SOURCES[source], FORMS[form], None)
    known = [*VARIANTS, *(mixer for mixer in MIXERS if mixer not in VARIANTS)]
    pairs = [f"{s}/{f}" for s in SOURCES for f in FORMS]
    near = difflib.get_close_matches(name, known + pairs, n=1, cutoff=0.6)
    advice = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}, or source/form"
    raise UserError(f"variant {name!r} is unknown; {advice} (sources: {', '.join(SOURCES)}; forms: {', '.join(FORMS)})")


def make_mixer(name: str, config: ModelConfig, rngs: nnx.Rngs) -> Mixer:
    variant = find_variant(name)
    if variant.mixer is not None:
        return variant.mixer(config, rngs)
    assert variant.source is not None and variant.form is not None
    return Attention(config, variant.source, variant.form, rngs)


def fixed_source(layers: tuple[str | None, ...]) -> str | None:
    """The fixed source that the layers of a model read, by name; None where none does.

    A model has one second stream: raises UserError where two are asked for.
    """
    found: dict[str, str] = {}
    for name in layers:
        variant = find_variant(name) if name else Variant(None, None, None)
        if variant.source is not None and variant.source.fixed:
            found.setdefault(variant.source.name, str(name))
        elif variant.mixer is not None and variant.mixer.fixed_source:
            found.setdefault(variant.mixer.fixed_source, str(name))
    if len(found) > 1:
        raise UserError(
            f"the layout reads two fixed streams, {' and '.join(f'{s} ({n})' for s, n in found.items())}; "
            "a model has at most one"
        )
    return next(iter(found), None)


def reads_static(layers: tuple[str | None, ...]) -> bool:
    """Whether any layer reads the token embeddings."""
    for name in filter(None, layers):
        variant = find_variant(name)
        if (variant.source is not None and variant.source.static) or (variant.mixer and variant.mixer.reads_static):
            return True
    return False
