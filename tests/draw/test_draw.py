"""Pictures show the numbers they are made of, and the verb says what it cannot draw."""

import json

import numpy as np
import pytest

from deconstruct import cli
from deconstruct.draw.curves import draw_curves, draw_perplexity
from deconstruct.draw.maps import draw_maps, label
from deconstruct.run.workdir import Workdir
from tests.need import need
from tests.tiny import tiny_config

need("matplotlib", extra="plot")
from matplotlib import pyplot as plt  # noqa: E402

from tests.evaluate.conftest import fixed, prepared  # noqa: E402, F401  fixtures

TOKENS = ["a", " b", "\n", "long as a name"]


@pytest.fixture(autouse=True)
def closed():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def panels_of(figure):
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title() != "weight"}


def test_a_panel_is_its_map_and_its_axes_are_the_tokens():
    maps = np.tril(np.random.default_rng(0).uniform(size=(2, 4, 4)))
    figure = draw_maps([[("one", maps[0]), ("two", maps[1])], [("mlp", None)]], TOKENS)
    found = panels_of(figure)
    assert list(found) == ["one", "two", "mlp"]
    for title, want in zip(("one", "two"), maps, strict=True):
        image = found[title].images[0]
        np.testing.assert_array_equal(image.get_array(), want)
        assert image.norm.vmin == 0 and image.norm.vmax == maps.max()  # one scale for all
    assert [text.get_text() for text in found["one"].get_yticklabels()] == ["a", "·b", "↵", "long·as·…"]
    assert [text.get_text() for text in found["two"].get_xticklabels()] == ["a", "·b", "↵", "long·as·…"]
    assert found["mlp"].texts[0].get_text() == "nothing is mixed" and not found["mlp"].images


def test_negative_weights_have_a_colour_of_their_own():
    figure = draw_maps([[("signed", np.array([[1.0, 0.0], [-2.0, 3.0]]))]], ["a", "b"])
    image = panels_of(figure)["signed"].images[0]
    assert (image.norm.vmin, image.norm.vmax) == (-3, 3) and image.cmap.name == "RdBu_r"


def test_a_dollar_sign_begins_no_formula():
    assert label("$x$") == r"\$x\$"


def test_curves_are_the_losses_the_worst_at_the_top_of_the_legend():
    figure = draw_curves({"good": [(1, 3.0), (2, 1.0)], "bad": [(1, 4.0), (3, 2.5)]})
    (axis,) = figure.axes
    assert {line.get_label(): line.get_xydata().tolist() for line in axis.lines} == {
        "bad  2.50": [[1, 4.0], [3, 2.5]],
        "good  1.00": [[1, 3.0], [2, 1.0]],
    }
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["bad  2.50", "good  1.00"]


def written_run(folder, losses, **top):
    """A workdir as far as curves read it."""
    folder.mkdir()
    Workdir(folder).write_config(tiny_config(**top))
    lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_the_verb_draws_curves_of_runs(tmp_path, capsys):
    one = written_run(tmp_path / "one", [3.0, 2.0])
    two = written_run(tmp_path / "two", [3.0, 2.5], variant="mlp", layout="even")
    output = tmp_path / "pictures" / "curves.svg"
    assert cli.main(["draw", "curves", f"--workdir={one}", f"--workdir={two}", f"--output={output}"]) == 0
    assert capsys.readouterr().out == f"{output}: standard; mlp, even\n"
    assert output.read_text().count("<svg") == 1


def test_perplexity_is_a_line_over_steps_and_a_run_of_one_point_a_line_across():
    (axis,) = draw_perplexity({"mlp": [(0, 90.0), (4, 30.0)], "standard": [(7, 20.0)]}, 8).axes
    assert {line.get_label(): list(line.get_ydata()) for line in axis.lines} == {
        "mlp  30.00": [90.0, 30.0],
        "standard  20.00": [20.0, 20.0],
    }
    assert axis.lines[1].get_linestyle() == "--" and axis.get_ylabel() == "perplexity (context 8)"


def test_the_verb_draws_perplexity_over_steps(tmp_path, capsys):
    def evaluated(name, values, **top):
        folder = written_run(tmp_path / name, [], **top)
        records = [
            {
                "step": step,
                "task": "perplexity",
                "metric": "perplexity",
                "value": value,
                "skip": skip,
                "context": context,
            }
            for step, context, skip, value in values
        ]
        lines = [json.dumps({**r, "text": "validation", "windows": "non-overlapping"}) + "\n" for r in records]
        Workdir(folder).evaluations.write_text("".join(lines))
        return folder

    one = evaluated("one", [(4, 8, "", 30.0), (0, 8, "", 90.0), (0, 4, "", 95.0), (4, 8, "mixer", 1.0)], variant="mlp")
    original = evaluated("original", [(7, 8, "", 20.0)])
    words = ["draw", "perplexity", f"--workdir={one}", f"--workdir={original}"]
    assert cli.main([*words, f"--output={tmp_path / 'a.svg'}"]) == 0
    drawn = (tmp_path / "a.svg").read_text()
    # As text, or in comments beside the shapes of its letters.
    assert all(said in drawn for said in ("mlp  30.00", "standard  20.00", "perplexity (context 8)"))
    capsys.readouterr()
    assert cli.main([*words, "--context=4", f"--output={tmp_path / 'b.png'}"]) == 2
    assert "--context=4: not all runs were evaluated at it; all were at 8" in capsys.readouterr().err


@pytest.mark.proof
def test_the_verb_draws_the_maps_of_a_run(fixed, tmp_path, capsys):  # noqa: F811
    words = ["draw", "maps", f"--workdir={fixed}", "--text=fog under the sea"]
    assert cli.main([*words, f"--output={tmp_path / 'maps.png'}"]) == 0
    picture = plt.imread(tmp_path / "maps.png")
    assert picture.shape[1] > 400 and picture[..., :3].std() > 0.05  # not one colour
    assert cli.main([*words, "--layer=3", f"--output={tmp_path / 'no.png'}"]) == 2
    assert "--layer=3: there is no such layer; layers are 1 to 2" in capsys.readouterr().err
    assert cli.main([*words, "--head=5", f"--output={tmp_path / 'no.png'}"]) == 2
    assert "--head=5: there is no such head; heads are 1 to 4" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["curves", "--output=a.png", "--text=a"], "--text: only maps have it; leave --text out"),
        (["maps", "--output=a.png"], "--text: maps are drawn over a text"),
        (["curves", "--output=a.words"], "--output=a.words: expected a name that ends in .png, .svg or .pdf"),
        (["curves", "--output=a.png", "--dpi=0"], "--dpi=0: must be at least 1"),
        (["curves", "--output=a.png"], "no step is logged there yet"),
    ],
)
def test_mistakes(words, message, tmp_path, capsys):
    run = written_run(tmp_path / "run", [])
    assert cli.main(["draw", *words, f"--workdir={run}"]) == 2
    assert message in capsys.readouterr().err
