"""A small prepared folder: 40 training windows of 12 tokens, so that a batch of 8 ends an epoch every 5 steps."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from deconstruct.data.pipeline import Windows
from deconstruct.data.prepare import PrepareOptions, prepare

WINDOWS = 40


def prepare_text(folder: Path, seed: int) -> Path:
    draw = random.Random(seed)
    words = ["fog", "sea", "ship", "lamp", "under", "and", "the", "slowly"]
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for number in range(12):
        (texts / f"{number}.txt").write_text(" ".join(draw.choices(words, k=20)) + "\n")
    prepared = folder / "prepared"
    prepare(
        PrepareOptions(
            input=(str(texts),), output=str(prepared), vocab_size=280, row_length=12, validation_fraction=0.2, workers=1
        )
    )
    assert len(Windows(prepared, "train", 12)) > 0
    return prepared


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    return prepare_text(tmp_path_factory.mktemp("text"), 0)


@pytest.fixture(scope="session")
def other_prepared(tmp_path_factory) -> Path:
    return prepare_text(tmp_path_factory.mktemp("other"), 1)
