"""The notebooks: pairs that agree, with pictures, whose cells run in order and come to what they tell of.

Each runs in a kernel of its own, in a copy of its folder, for fewer steps than what is stored.
"""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
MOST = 300_000  # bytes of a notebook
STEPS = 40  # of the trained models, where what is stored had 300


def load_render():
    spec = importlib.util.spec_from_file_location("render_notebooks", ROOT / "notebooks" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = load_render()
every_notebook = pytest.mark.parametrize("name", render.NAMES)


def stored(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def outputs(name):
    return [output for cell in stored(name).cells if cell.cell_type == "code" for output in cell.outputs]


def said(name):
    """All text that is stored as output."""
    found = []
    for output in outputs(name):
        data = output.get("data", {})
        found += [output.get("text", ""), data.get("text/plain", ""), data.get("text/markdown", "")]
    return "\n".join(found)


def test_all_of_them_are_rendered():
    files = (ROOT / "notebooks").iterdir()
    pairs = sorted(f.name for f in files if f.suffix in (".py", ".ipynb") and f.name != "render.py")
    assert pairs == sorted(f"{name}.{end}" for name in render.NAMES for end in ("py", "ipynb"))


@every_notebook
def test_a_notebook_and_its_script_agree(name):
    """What is read, and what is shown."""
    nbformat.validate(stored(name))
    script = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    cells = [(cell.cell_type, cell.source) for cell in stored(name).cells]
    assert cells == [(cell.cell_type, cell.source) for cell in script.cells], "make notebooks renders them again"


@every_notebook
def test_what_is_stored_was_run_and_shows_nothing_of_its_machine(name):
    code = [cell for cell in stored(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for o in outputs(name) if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs(name)) >= 3
    assert not re.findall(r"/(?:home|root|tmp|work|usr)/|\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d|[Ww]arning", said(name))
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < MOST


@every_notebook
def test_figures_in_the_prose_are_those_of_the_outputs(name):
    """Numbers with a decimal point, and percentages, stand in what the cells have printed."""
    prose = "\n".join(cell.source for cell in stored(name).cells if cell.cell_type == "markdown")
    prose = re.sub(r"\$.*?\$|`.*?`|\(.*?\)", "", prose, flags=re.DOTALL)
    told = set(re.findall(r"(?<![\d.])-?\d[\d,]*\.\d+|\d+(?= ?%)", prose))
    printed = set(re.findall(r"-?\d[\d,]*\.?\d*", said(name)))
    assert "TODO" not in prose and not told - printed


def run_notebook(name, folder, *variables):
    """Runs NAME.py beside a copy of the configurations; the values of some of its variables."""
    (folder / "notebooks").mkdir(exist_ok=True)
    shutil.copytree(ROOT / "configs", folder / "configs", dirs_exist_ok=True)
    values = ", ".join(f"{variable!r}: {variable}" for variable in variables)
    last = f"\n# %%\nimport json\n\nprint(json.dumps({{{values}}}, default=lambda x: x.tolist()))\n"
    source = folder / "notebooks" / f"{name}.py"
    source.write_text((ROOT / "notebooks" / f"{name}.py").read_text() + last)
    return json.loads(render.execute(source).cells[-1].outputs[0].text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all: they share the text, and a run that two of them train."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setenv("STEPS", str(STEPS))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiling is most of it


@pytest.mark.proof
def test_new_form(folder):
    found = run_notebook("new_form", folder, "checked.passed", "parameters", "powers")
    assert found["checked.passed"]
    assert {name: n - found["parameters"]["standard"] for name, n in found["parameters"].items()} == {
        "standard": 0,
        "approximate": 0,
        "student_t": 4 * 4,  # a power for each head of each layer
    }
    powers = np.array(list(found["powers"].values()))
    assert powers.shape == (2, 4, 4) and (powers > 0).all() and powers.std() > 0.01  # they have moved from 1


@pytest.mark.proof
def test_look_inside(folder):
    found = run_notebook("look_inside", folder, "sums", "depends", "curves", "effective")
    for variant, losses in found["curves"].items():
        assert losses[0][1] > 6 and losses[-1][1] < 5.6, variant  # log(512) = 6.2
    for variant, (least, most) in found["sums"].items():
        one = variant != "hidden/gated_delta"
        assert (abs(least - 1) < 1e-4 and abs(most - 1) < 1e-4) == one, variant
    assert min(np.min(layer) for layer in found["effective"]) < 0
    alone, same = ({name: of[i] for name, of in found["depends"].items()} for i in (0, 1))
    assert alone == {name: name == "non_approximate" for name in alone}
    del same["non_approximate"]  # its even weights are the same whatever came before; more training moves them
    assert same == {name: name == "static_emb_qk" for name in same}


@pytest.mark.proof
def test_layouts_and_costs(folder, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # it measures programs
    found = run_notebook("layouts_and_costs", folder, "described", "ratios", "crossings", "cache", "counts", "measured")
    for name, one in found["described"].items():  # MLPs take up what mixers add, to half a unit of their width
        assert all(abs(difference) <= 3 * 896 / 2 for difference in one["difference_per_layer"]), name
    assert found["crossings"] == {
        "approximate": 4544,
        "non_approximate": 64,
        "mlp": 64,
        "hidden/window(size=256)": 320,
        "hidden/gated_delta": 384,
    }
    for name, of in found["cache"].items():
        grows = name == "standard"
        assert (of[-1] == 512 * of[0]) if grows else (of[-1] == of[0]), name
    ends = {name: row["ratio"][-1]["median"] for name, row in found["measured"]["variants"].items()}
    assert ends.pop("standard") == 1 and all(ratio < 0.5 for ratio in ends.values()), ends  # 0.06 to 0.13 by the count
    assert all(
        row[-1] < 0.2 * found["counts"]["standard"][-1] for name, row in found["counts"].items() if name != "standard"
    )


@pytest.mark.proof
def test_surgery(folder):
    found = run_notebook("surgery", folder, "original", "after", "trained", "recovery", "drawn")
    assert found["drawn"] == {name: ["nothing"] for name in found["after"]}  # a source and a form take what is there
    assert found["after"].keys() < found["trained"].keys()
    assert found["after"]["approximate, uniform"] > found["original"]
    for name, value in found["after"].items():
        assert found["trained"][name] < value < 1.5 * found["original"], name
    for way, points in found["recovery"].items():
        assert points[-1][1] < points[0][1] == found["after"]["approximate, uniform"], way
