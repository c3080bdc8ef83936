"""One small prepared folder for the tests that only read."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_text import make_documents, options, write_texts

from deconstruct.data.prepare import prepare


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents()


@pytest.fixture(scope="session")
def texts(tmp_path_factory, documents) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), documents)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, texts) -> Path:
    """Rows of 48 tokens."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(options(folder, texts))
    return folder
