"""Two tiny trained runs, made once: an even hybrid of three checkpoints, and one that reads a fixed stream."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path

import pytest

from deconstruct.data.prepare import PrepareOptions, prepare
from deconstruct.train.loop import train
from tests.tiny import tiny_config

WORDS = ["fog", "sea", "ship", "under", "lamp", "harbour", "captain", "slowly", "said", "never", "rope", "é"]


def prepare_text(folder: Path, seed: int) -> Path:
    draw = random.Random(seed)
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for number in range(20):
        (texts / f"{number}.txt").write_text(" ".join(draw.choices(WORDS, k=40)) + "\n", encoding="utf-8")
    prepare(
        PrepareOptions(
            input=(str(texts),),
            output=str(folder / "prepared"),
            vocab_size=300,
            row_length=32,
            validation_fraction=0.2,
            workers=1,
        )
    )
    return folder / "prepared"


def train_tiny(data: Path, workdir: Path, variant: str, steps: int) -> Path:
    config = tiny_config(
        {"vocab_size": 0, "num_layers": 2, "init_std": 0.2},
        data=str(data),
        variant=variant,
        layout="even",
        steps=steps,
        sequence_length=32,
        learning_rate=1e-2,
    )
    assert train(config, workdir) == 0
    return workdir


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    return prepare_text(tmp_path_factory.mktemp("text"), 0)


@pytest.fixture(scope="session")
def trained(prepared, tmp_path_factory) -> Path:
    """Steps 2, 4 and 6 of 6; tests do not write into it."""
    return train_tiny(prepared, tmp_path_factory.mktemp("trained"), "non_approximate", 6)


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy to write into."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="session")
def fixed(prepared, tmp_path_factory) -> Path:
    return train_tiny(prepared, tmp_path_factory.mktemp("fixed"), "rnd_emb_qk", 2)


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """The program sets up logging for itself."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
