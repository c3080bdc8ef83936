"""A study from a notebook: what comes back is what the verbs leave behind, and what is wrong is said."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import deconstruct as dc
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.workdir import Workdir
from tests.evaluate.conftest import prepared, trained  # noqa: F401  fixtures
from tests.need import need
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[1]
TEXT = "fog sea ship"


def small(data):
    return tiny_config({"vocab_size": 0, "num_layers": 1}, data=str(data), variant="mlp", steps=2, sequence_length=16)


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):  # noqa: F811
    """The smallest there is, for what a run leaves behind; without a map."""
    workdir = tmp_path_factory.mktemp("run") / "mlp"
    curve = dc.train_run(small(prepared), workdir)
    assert [step for step, _ in curve] == [1, 2] and all(loss > 0 for _, loss in curve)
    return workdir


def test_a_run_that_is_done_gives_its_curve_again(run, prepared):  # noqa: F811
    before = read_jsonl(Workdir(run).metrics)
    assert dc.train_run(small(prepared), run) == [(r["step"], r["loss"]) for r in before]
    assert read_jsonl(Workdir(run).metrics) == before


def test_what_is_measured_comes_back_and_stands_in_the_ledger(run):
    records = dc.evaluate_run(run, contexts="8")
    assert records == read_jsonl(Workdir(run).evaluations)
    assert [(r["step"], r["metric"], r["context"]) for r in records] == [(2, "nll", 8), (2, "perplexity", 8)]
    assert dc.evaluate_run(run, contexts="8") == records  # not measured again
    assert dc.read_maps(run, TEXT).layers == [None]


@pytest.mark.proof
def test_maps_are_the_models_own_with_the_tokens_of_its_text(trained):  # noqa: F811
    maps = dc.read_maps(trained, TEXT, step=4)
    assert "".join(maps.tokens).split() == TEXT.split()
    ids = Workdir(trained).load_tokenizer(4).encode(TEXT)
    wanted = dc.restore_model(trained, step=4).attention_maps(np.array([ids]))
    for ours, theirs in zip(maps.layers, wanted, strict=True):
        assert ours.shape == (4, len(ids), len(ids))
        np.testing.assert_allclose(ours, theirs[0], atol=1e-6)  # one compiled, the other not


def test_groups_are_compared_in_every_measure(tmp_path):
    need("scipy", "statsmodels", extra="compare")
    from tests.compare.made_runs import made_run

    for variant, loss in (("standard", 3.0), ("mlp", 3.5)):
        for context, gain in ((8, 0.0), (16, 0.25)):
            made_run(tmp_path / variant, losses=loss - gain, context=context, variant=variant)
    comparisons = dc.compare_runs(tmp_path)
    assert [one.measure.get("context") for one in comparisons] == [8, 16]
    assert [(row.group.config.variant, row.scores.mean) for row in comparisons[1].rows] == [
        ("standard", pytest.approx(2.75)),
        ("mlp", pytest.approx(3.25)),
    ]
    folders = [tmp_path / "mlp", tmp_path / "standard"]
    assert dc.compare_runs(folders, baseline="variant=mlp")[0].baseline.config.variant == "mlp"
    with pytest.raises(dc.UserError, match="compare_runs: match='time'; expected one of end, steps"):
        dc.compare_runs(folders, match="time")


def test_text_is_prepared_in_a_script_without_a_guard(tmp_path):
    """As a user's own begins: more processes than one would run it again from its top."""
    for name in ("a", "b"):  # of more than a unit of work each
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i} fog and sea\n" for i in range(70_000)))
    script = tmp_path / "script.py"
    script.write_text(
        "import deconstruct as dc\n"
        "m = dc.prepare_text('out', input=('a.txt', 'b.txt'), vocab_size=300, row_length=16, validation_fraction=0.2)\n"
        "print(m['row_length'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script.name], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "16\n"), done.stderr


def test_prepared_text_is_that_of_the_verb(tmp_path):
    (tmp_path / "a.txt").write_text("fog and sea\n" * 400)
    options = {"vocab_size": 280, "row_length": 16, "validation_fraction": 0.2, "workers": 1}
    manifest = dc.prepare_text(tmp_path / "out", input=(str(tmp_path / "a.txt"),), **options)
    assert manifest["row_length"] == 16 and math.isfinite(manifest["unigram_perplexity"])


def test_what_is_wrong_is_said(run, tmp_path):
    with pytest.raises(dc.UserError, match="prepare_text: there is no option vocabulary; options are output, input"):
        dc.prepare_text(tmp_path, vocabulary=8)
    with pytest.raises(dc.UserError, match="evaluate_run: perplexity has no option context; options are contexts"):
        dc.evaluate_run(run, context=8)
    with pytest.raises(dc.UserError, match="the text is empty"):
        dc.read_maps(run, "")
