"""The paper's layouts at 24 layers, and explicit lists."""

import pytest

from deconstruct.layout import LAYOUTS, layer_variants
from deconstruct.types import UserError

STANDARD_LAYERS = {
    "uniform": [],
    "even": list(range(2, 25, 2)),
    "odd": list(range(1, 24, 2)),
    "top": list(range(1, 13)),
    "middle": [*range(1, 7), *range(19, 25)],
    "bottom": list(range(13, 25)),
    "quarter": [4, 8, 12, 16, 20, 24],
    "first": [1],
    "last": [24],
    "bilateral": [1, 24],
}


def standard_layers(layout, count):
    return [i for i, name in enumerate(layer_variants(layout, "mlp", count), 1) if name == "standard"]


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts_of_the_paper(layout):
    assert standard_layers(layout, 24) == STANDARD_LAYERS[layout]


@pytest.mark.parametrize(
    ("layout", "layers"), [("even", [2, 4, 6]), ("middle", [1, 5, 6]), ("quarter", [4]), ("top", [1, 2, 3])]
)
def test_layouts_scale(layout, layers):
    assert standard_layers(layout, 6) == layers


def test_lists():
    assert standard_layers("1, 5", 6) == [1, 5]
    assert layer_variants("mlp,standard", "unused", 2) == ("mlp", "standard")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("evne", "layout='evne' is unknown; one of uniform, even"),
        ("1,9", "there is no layer 9; layers are 1 to 6"),
        ("2,2", "listed twice"),
        ("mlp,standard", "names 2 layers, but model.num_layers=6"),
    ],
)
def test_mistakes(layout, message):
    with pytest.raises(UserError, match=message):
        layer_variants(layout, "mlp", 6)
