"""Text made for the tests, and options small enough for it."""

from __future__ import annotations

import random
from pathlib import Path

from deconstruct.data.prepare import PrepareOptions

WORDS = [
    "the", "a", "of", "and", "to", "in", "fog", "sea", "ship", "under", "lamp", "harbour", "captain", "slowly", "said",
    "never", "morning", "rope", "12", "Ahoy", "é",
]  # fmt: skip


def make_documents(count: int = 40, words: int = 150, seed: int = 0) -> list[str]:
    """Documents of random words, with the whitespace that tokenizers like to lose."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        gaps = draw.choices([" ", "\n", "  ", "\t", ", ", ".\r\n"], [20, 3, 1, 1, 2, 1], k=words)
        made.append(
            f"{number}: " + "".join(word + gap for word, gap in zip(draw.choices(WORDS, k=words), gaps, strict=True))
        )
    return made


def write_texts(folder: Path, documents: list[str]) -> Path:
    """One .txt a document."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, document in enumerate(documents):
        (folder / f"{number:04d}.txt").write_bytes(document.encode())
    return folder


def options(output: Path, *inputs: Path | str, **others) -> PrepareOptions:
    """Options small enough for the tests' text."""
    small = {"vocab_size": 300, "row_length": 48, "validation_fraction": 0.1, "workers": 1}
    return PrepareOptions(output=str(output), input=tuple(map(str, inputs)), **{**small, **others})
