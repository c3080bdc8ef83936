"""Two prepared texts, beside the small config file."""

import pytest

from tests.train.conftest import prepare_text


@pytest.fixture(scope="session")
def data(folder):
    return [prepare_text(folder / f"text{seed}", seed) for seed in (0, 1)]
