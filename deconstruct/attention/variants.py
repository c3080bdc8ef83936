"""What a layer of any name is made of: `source/form(option=value)`, a form, a mixer, or a name of the paper."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from flax import nnx

# Forms and mixers register themselves when their file is imported: one line each.
from deconstruct.attention import gated_mlp  # noqa: F401
from deconstruct.attention.attention import Attention
from deconstruct.attention.form import Form
from deconstruct.attention.forms import (  # noqa: F401
    gated_delta,
    gated_linear,
    self_gate,
    softmax,
    taylor,
    taylor_diagonal,
    window,
)
from deconstruct.attention.mixer import Mixer
from deconstruct.attention.registry import FORMS, MIXERS, SOURCES, VARIANTS
from deconstruct.attention.source import Source
from deconstruct.config import ModelConfig
from deconstruct.spelling import nearest, parse_call
from deconstruct.types import UserError


def one_of_each() -> list[str]:
    """The paper's variants, then every other form (over hidden states) and every other mixer there is."""
    forms = [name for name in FORMS if f"hidden/{name}" not in VARIANTS.values()]
    return [*VARIANTS, *forms, *(name for name in MIXERS if name not in VARIANTS)]


class Variant(NamedTuple):
    """What a name stands for: a source and a form, or a mixer of its own; and the options spelled with it."""

    source: type[Source] | None
    form: type[Form] | None
    mixer: type[Mixer] | None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def classes(self) -> tuple[type, ...]:
        return tuple(cls for cls in (self.source, self.form, self.mixer) if cls is not None)


def find_variant(name: str) -> Variant:
    """Looks up a paper's name, `source/form`, a form's name (over hidden states) or a mixer's, each perhaps with
    options. Raises UserError."""
    called, options = parse_call(name)
    spelled = VARIANTS.get(called, called)
    if spelled in MIXERS:
        mixer = MIXERS[spelled]
        return Variant(None, None, mixer, _typed_options(name, mixer, options))
    source, slash, form = spelled.rpartition("/")
    source = source if slash else "hidden"
    if source in SOURCES and form in FORMS:
        return Variant(SOURCES[source], FORMS[form], None, _typed_options(name, FORMS[form], options))
    known = [*VARIANTS, *(mixer for mixer in MIXERS if mixer not in VARIANTS)]
    pairs = [f"{s}/{f}" for s in SOURCES for f in FORMS]
    near = nearest(called, [*known, *FORMS, *pairs])
    advice = f"did you mean {near}?" if near else f"expected one of {', '.join(known)}, or source/form"
    raise UserError(f"variant {name!r} is unknown; {advice} (sources: {', '.join(SOURCES)}; forms: {', '.join(FORMS)})")


def options_of(cls: type) -> dict[str, tuple[Any, Any]]:
    """The options of a form or mixer: its keyword arguments, each with its type and default."""
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    keywords = [p for p in parameters if p.kind == inspect.Parameter.KEYWORD_ONLY]
    return {p.name: (hints.get(p.name, type(p.default)), p.default) for p in keywords}


def _typed_options(name: str, cls: type, given: dict[str, str]) -> tuple[tuple[str, Any], ...]:
    known = options_of(cls) if given else {}
    typed = []
    for key, text in given.items():
        if key not in known:
            near = nearest(key, known, cutoff=0.5)
            offers = f"its options are {', '.join(known)}" if known else f"{cls.name} has no options"  # type: ignore[attr-defined]
            raise UserError(
                f"variant {name!r}: the option {key} is unknown; {f'did you mean {near}?' if near else offers}"
            )
        try:
            typed.append((key, _parse(known[key][0], text)))
        except ValueError:
            raise UserError(f"variant {name!r}: {key}={text}: expected {_describe(known[key][0])}") from None
    return tuple(sorted(typed))


def _parse(expected: Any, text: str) -> Any:
    """Raises ValueError for a text that is not of the type."""
    if typing.get_origin(expected) is Literal:
        values = {str(value): value for value in typing.get_args(expected)}
        if text not in values:
            raise ValueError(text)
        return values[text]
    if expected is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return expected(text)


def _describe(expected: Any) -> str:
    if typing.get_origin(expected) is Literal:
        return " or ".join(str(value) for value in typing.get_args(expected))
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(expected, str(expected))


def variant_of(cls: type, options: Mapping[str, Any] | None = None) -> Variant:
    """What a form (over hidden states) or a mixer stands for, registered or not. Raises UserError for another class."""
    given = tuple(sorted((options or {}).items()))
    if issubclass(cls, Form):
        return Variant(SOURCES["hidden"], cls, None, given)
    if issubclass(cls, Mixer) and cls is not Attention:
        return Variant(None, None, cls, given)
    raise UserError(f"{cls.__name__}: expected a subclass of Form or of Mixer, or the name of a variant")


def make_mixer(name: str, config: ModelConfig, rngs: nnx.Rngs) -> Mixer:
    """The mixer of a layer. Raises UserError where the name, an option, or a setting of the model does not suit it."""
    variant = find_variant(name)
    try:
        return make(variant, config, rngs)
    except UserError as error:
        if variant.options and "config." not in str(error):
            raise UserError(f"variant {name!r}: {error}") from None
        raise error from None


def make(variant: Variant, config: ModelConfig, rngs: nnx.Rngs) -> Mixer:
    """The mixer of what a name stands for."""
    source, form, mixer, options = variant
    if mixer is None:
        assert source is not None and form is not None
        return Attention(config, source, form, rngs, dict(options))
    made = mixer(config, rngs, **dict(options))
    if config.document_mask and not made.documents:
        raise UserError(
            f"config.document_mask=true: mixer '{made.name}' does not keep to the borders of documents; take another, "
            "or leave the mask off"
        )
    return made


def fixed_source(layers: tuple[str, ...]) -> str | None:
    """The fixed source that the layers of a model read, by name; None where none does.

    A model has one second stream: raises UserError where two are asked for.
    """
    found: dict[str, str] = {}
    for name in layers:
        variant = find_variant(name)
        if variant.source is not None and variant.source.fixed:
            found.setdefault(variant.source.name, name)
        elif variant.mixer is not None and variant.mixer.fixed_source:
            found.setdefault(variant.mixer.fixed_source, name)
    if len(found) > 1:
        raise UserError(
            f"the layout reads two fixed streams, {' and '.join(f'{s} ({n})' for s, n in found.items())}; "
            "a model has at most one"
        )
    return next(iter(found), None)


def reads_fixed_text(layers: tuple[str, ...]) -> bool:
    """Whether the fixed stream, if there is one, starts from the ids of a text, which training puts in place."""
    source = fixed_source(layers)
    return source is not None and SOURCES[source].text


def reads_static(layers: tuple[str, ...]) -> bool:
    """Whether any layer reads the token embeddings."""
    for name in layers:
        variant = find_variant(name)
        if (variant.source is not None and variant.source.static) or (variant.mixer and variant.mixer.reads_static):
            return True
    return False
