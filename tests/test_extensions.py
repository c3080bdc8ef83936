"""A user's own file, from a config to a run that is opened again: what is run, what is kept, what is refused."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import portpicker
import pytest

from deconstruct.attention import extensions, registry
from deconstruct.attention.extensions import load_extension
from deconstruct.experiment import load_config
from deconstruct.run.restore import restore_model
from deconstruct.train.loop import train
from deconstruct.types import UserError
from tests.tiny import tiny_config
from tests.train.conftest import prepare_text

ROOT = Path(__file__).parents[1]
FORM = """
import jax
import deconstruct as dc

@dc.register_form
class {cls}(dc.Form):
    name = "{name}"
    def weights(self, q, k, mask):
        x = dc.logits(q, k)
        return jax.nn.softmax(jax.numpy.where(mask.dense(*x.shape[-2:]), {factor} * x, -1e30), axis=-1)
"""
CONFIG = """
from deconstruct.config import default_config
{more}
def get_config():
    config = default_config()
    config.update({{"variant": "{variant}", "data": {data!r}, "steps": 4, "batch_size": 8, "sequence_length": 12}})
    config.update({{"checkpoint_every": 2, "log_every": 1}})
    config.model.update({{"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4}})
    config.model.update({{"dtype": "float32", "remat": False}})
    config.optimizer.warmup_steps = 1
    return config
"""


@pytest.fixture
def clean():
    """What a test registers is forgotten again."""
    kept = [dict(known) for known in (registry.SOURCES, registry.FORMS, registry.MIXERS)]
    loaded = set(extensions._loaded)
    yield
    for known, before in zip((registry.SOURCES, registry.FORMS, registry.MIXERS), kept, strict=True):
        known.clear()
        known.update(before)
    extensions._loaded.clear()
    extensions._loaded.update(loaded)


def write_form(path, name, factor=1.0):
    path.write_text(FORM.format(cls=name.capitalize(), name=name, factor=factor))
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"), 0)


def forget(*names):
    for name in names:
        del registry.FORMS[name]


def run_config(prepared, path, variant):
    return tiny_config({"vocab_size": 0}, data=str(prepared), extensions=str(path), variant=variant, layout="even")


@pytest.mark.proof
def test_a_run_keeps_its_code_and_runs_it_only_when_told(tmp_path, prepared, clean):
    form, run = write_form(tmp_path / "own.py", "owned"), tmp_path / "run"
    config = run_config(prepared, form, "hidden/owned")
    sha256 = hashlib.sha256(form.read_bytes()).hexdigest()
    assert config.code == (f"own.py:{sha256}",)
    assert train(config, run) == 0
    kept = run / "extensions" / "own.py"
    assert kept.read_bytes() == form.read_bytes()
    restore_model(run)  # known in this process, as it was

    forget("owned")
    with pytest.raises(
        UserError, match=rf"needs own.py \(sha256 {sha256[:12]}\).*--extension=FILE .*--allow-extensions"
    ):
        restore_model(run)
    assert "owned" not in registry.FORMS
    extensions._loaded.clear()
    assert restore_model(run, extension=str(form)).config.layers[0] == "hidden/owned"
    forget("owned")
    extensions._loaded.clear()
    assert restore_model(run, allow_extensions=True).config.layers[0] == "hidden/owned"
    forget("owned")

    other = write_form(tmp_path / "other.py", "owned", factor=2.0)
    with pytest.raises(UserError, match=r"trained with a own.py of sha256 .*; .*other.py has "):
        restore_model(run, extension=str(other))
    kept.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"extensions/own.py: changed since the run was trained .*; not run"):
        restore_model(run, allow_extensions=True)
    kept.unlink()
    with pytest.raises(UserError, match=r"own.py: this file of the run is missing; --extension=FILE"):
        restore_model(run, allow_extensions=True)
    with pytest.raises(UserError, match=r"--extension=nowhere.py: there is no such file"):
        restore_model(run, extension="nowhere.py")
    assert "owned" not in registry.FORMS


@pytest.mark.proof
def test_a_run_goes_on_only_with_the_code_it_began_with(tmp_path, prepared, clean):
    form, run = write_form(tmp_path / "own.py", "changing"), tmp_path / "run"
    assert train(run_config(prepared, form, "changing").replace(steps=2), run) == 0
    assert train(run_config(prepared, form, "changing"), run) == 0
    write_form(form, "changing", factor=3.0)
    forget("changing")
    with pytest.raises(UserError, match=r"config.extensions=own.py:.*, but this workdir holds a run with own.py:"):
        train(run_config(prepared, form, "changing").replace(steps=6), run)


def test_a_class_that_no_file_defines_is_not_trained(tmp_path, prepared, clean):
    namespace = {"__name__": "__a_cell__"}
    exec(FORM.format(cls="Celled", name="celled", factor=1.0), namespace)
    with pytest.raises(UserError, match=r"variant 'celled': it is defined in no file .*config.extensions"):
        train(tiny_config({"vocab_size": 0}, data=str(prepared), variant="celled"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_config_file_may_register_and_may_import_its_neighbour(tmp_path, clean):
    write_form(tmp_path / "neighbour_of_it.py", "neighboured")
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(more="import neighbour_of_it", variant="neighboured", data=""))
    for _ in range(2):  # a second load runs the files again
        assert [entry.partition(":")[0] for entry in load_config(str(config)).code] == ["neighbour_of_it.py"]
    assert "neighbour_of_it" not in sys.modules
    own = tmp_path / "own_config.py"
    form = FORM.format(cls="Inside", name="inside", factor=1.0)
    own.write_text(CONFIG.format(more=form, variant="static_embedding/inside", data=""))
    for _ in range(2):
        assert [entry.partition(":")[0] for entry in load_config(str(own)).code] == ["own_config.py"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere_at_all", r"bad.py: ModuleNotFoundError: .*nowhere_at_all.* \(line 1\)"),
        ("x = 1\nx.y", r"bad.py: AttributeError: .* \(line 2\)"),
        (
            FORM.format(cls="Standard", name="standard", factor=1),
            r"form 'standard': the name is taken, it means hidden/",
        ),
        (FORM.format(cls="Softmax", name="softmax", factor=1), r"form 'softmax' is registered already, by deconstruct"),
        (FORM.format(cls="Mlp", name="mlp", factor=1), r"mixer 'mlp' is registered already"),
        (FORM.format(cls="Odd", name="odd/one", factor=1), r"form 'odd/one': a name is made of letters, digits and _"),
    ],
)
def test_a_file_that_fails_is_named_with_its_line(tmp_path, clean, text, message):
    bad = tmp_path / "bad.py"
    bad.write_text(text)
    with pytest.raises(UserError, match=message):
        load_extension(bad, "config.extensions")
    with pytest.raises(UserError, match=r"config.extensions=nowhere.py: there is no such file"):
        load_extension("nowhere.py", "config.extensions")


@pytest.mark.parametrize("name", ["alibi", "temperature"])
def test_the_examples(name, clean):
    variant = {"alibi": "static_embedding/alibi", "temperature": "hidden/temperature(start=0.5)"}[name]
    config = tiny_config(extensions=str(ROOT / "examples" / f"{name}.py"), variant=variant)
    assert config.model.layers == (variant, variant)


@pytest.mark.proof
def test_two_processes_train_what_one_file_defines_and_it_is_opened_again(tmp_path, prepared):
    """The command line, as a user has it: train by two processes, stop, resume, evaluate, generate."""
    form, run = write_form(tmp_path / "own.py", "mine"), tmp_path / "run"
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(more="", variant="hidden/mine", data=str(prepared)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}

    def program(*words):
        command = [sys.executable, "-m", "deconstruct.cli", *map(str, words)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def ended(process, status=0):
        out, err = process.communicate(timeout=180)
        assert process.returncode == status, err
        return out, err

    common = ("train", f"--config={config}", f"--workdir={run}", f"--config.extensions={form}")
    port = portpicker.pick_unused_port()
    cluster = [(f"--coordinator=localhost:{port}", "--num-processes=2", f"--process-id={i}") for i in range(2)]
    for process in [program(*common, "--config.steps=2", "--config.mesh.data=2", *one) for one in cluster]:
        ended(process)
    ended(program(*common))  # resumed by one process
    out, err = ended(program("evaluate", f"--workdir={run}"), status=2)
    assert err.count("\n") == 1 and "needs own.py" in err and "--allow-extensions" in err
    out, _ = ended(program("evaluate", f"--workdir={run}", f"--extension={form}"))
    assert "step 4" in out and "perplexity" in out
    out, _ = ended(program("generate", f"--workdir={run}", "--prompt=fog", "--max-new-tokens=3", "--allow-extensions"))
    assert out.startswith("fog")
    write_form(form, "mine", factor=2.0)
    _, err = ended(program("evaluate", f"--workdir={run}", "--max-tokens=9", f"--extension={form}"), status=2)
    assert "was trained with a own.py of sha256" in err
