"""Names of arrays as a person reads them: by layer (ids from 1, as layouts have them), alike layers on one line."""

from __future__ import annotations

from collections.abc import Iterable

from deconstruct.interop.huggingface import layer_and_part


def listing(names: Iterable[str], layers: tuple[str, ...]) -> list[str]:
    """Lines such as `layers 1,3-5 (mlp): mlp, mlp_norm, mixer_norm`. Names of ours or of transformers."""
    tops: dict[str, None] = {}
    parts: dict[int, dict[str, None]] = {}
    for name in names:
        layer, part = _place(name)
        if layer is None:
            tops[part] = None
        else:
            parts.setdefault(layer, {})[part] = None
    groups: dict[tuple[str | None, tuple[str, ...]], list[int]] = {}
    for layer, own in sorted(parts.items()):
        variant = layers[layer] if layer < len(layers) else None
        groups.setdefault((variant, tuple(own)), []).append(layer + 1)
    lines = [", ".join(tops)] if tops else []
    return lines + [
        f"layer{'s' if len(ids) > 1 else ''} {spans(ids)} ({variant}): {', '.join(own)}"
        for (variant, own), ids in groups.items()
    ]


def _place(name: str) -> tuple[int | None, str]:
    """The layer of an array, and its module without the last word (kernel, bias, scale, weight)."""
    if "/" in name:
        layer, part = layer_and_part(name)
        if layer is None:
            return None, name.split("/")[1]
        return layer, part.rpartition("/")[0].replace("/", ".")
    words = name.split(".")
    if words[:2] == ["model", "layers"] and len(words) > 3 and words[2].isdigit():
        return int(words[2]), ".".join(words[3:-1])
    return None, name


def spans(ids: list[int]) -> str:
    """1,3-5 for [1, 3, 4, 5]; the list is ascending."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
