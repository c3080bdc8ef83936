"""A small config file, and two prepared texts."""

import pytest

from tests.tiny import CONFIG_FILE
from tests.train.conftest import prepare_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    (folder / "tiny.py").write_text(CONFIG_FILE)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return [prepare_text(folder / f"text{seed}", seed) for seed in (0, 1)]
