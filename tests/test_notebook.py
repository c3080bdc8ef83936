"""A study from a notebook: what comes back is what the verbs leave behind, and what is wrong is said."""

import math

import numpy as np
import pytest

import deconstruct as dc
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.workdir import Workdir
from tests.evaluate.conftest import prepared  # noqa: F401  a fixture
from tests.need import need
from tests.tiny import tiny_config


def small(data, **changes):
    changes = {"steps": 2, "sequence_length": 32, "data": str(data), **changes}
    return tiny_config({"vocab_size": 0, "num_layers": 2}, **changes)


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory):  # noqa: F811
    """Two variants, each trained for two steps by `dc.train_run`."""
    folder = tmp_path_factory.mktemp("runs")
    for variant in ("standard", "mlp"):
        curve = dc.train_run(small(prepared, variant=variant), folder / variant)
        assert [step for step, _ in curve] == [1, 2] and all(loss > 0 for _, loss in curve)
    return folder


def test_a_run_that_is_done_gives_its_curve_again(runs, prepared):  # noqa: F811
    before = read_jsonl(Workdir(runs / "mlp").metrics)
    assert dc.train_run(small(prepared, variant="mlp"), runs / "mlp") == [(r["step"], r["loss"]) for r in before]
    assert read_jsonl(Workdir(runs / "mlp").metrics) == before


def test_what_is_measured_comes_back_and_stands_in_the_ledger(runs):
    need("scipy", "statsmodels", extra="compare")
    for variant in ("standard", "mlp"):
        records = dc.evaluate_run(runs / variant, contexts="8,32")
        assert records == read_jsonl(Workdir(runs / variant).evaluations)
        assert [(r["metric"], r["context"]) for r in records if r["metric"] == "nll"] == [("nll", 8), ("nll", 32)]
        assert dc.evaluate_run(runs / variant, contexts="8,32") == records  # not measured again
    comparisons = dc.compare_runs(runs)
    assert [one.measure.get("context") for one in comparisons] == [8, 32]
    rows = {row.group.config.variant: row for row in comparisons[1].rows}
    assert comparisons[1].baseline is rows["standard"].group
    wanted = [r["value"] for r in dc.evaluate_run(runs / "mlp") if (r["metric"], r["context"]) == ("nll", 32)]
    assert rows["mlp"].scores.mean == pytest.approx(wanted[0], abs=1e-4)  # items are kept to four digits
    assert [one.baseline.config.variant for one in dc.compare_runs([runs], baseline="variant=mlp")] == ["mlp"] * 2


def test_maps_are_the_models_own_with_the_tokens_of_its_text(runs):
    text = "fog sea ship"
    maps = dc.read_maps(runs / "standard", text)
    assert "".join(maps.tokens).split() == text.split()
    model = dc.restore_model(runs / "standard")
    tokenizer = Workdir(runs / "standard").load_tokenizer(2)
    for ours, theirs in zip(maps.layers, model.attention_maps(np.array([tokenizer.encode(text)])), strict=True):
        assert ours.shape == (4, len(maps.tokens), len(maps.tokens))
        np.testing.assert_allclose(ours, theirs[0], atol=1e-6)  # compiled, and not
    assert dc.read_maps(runs / "mlp", text).layers == [None, None]


def test_prepared_text_is_that_of_the_verb(prepared, tmp_path):  # noqa: F811
    (tmp_path / "a.txt").write_text("fog and sea\n" * 400)
    options = {"vocab_size": 280, "row_length": 16, "validation_fraction": 0.2, "workers": 1}
    manifest = dc.prepare_text(tmp_path / "out", input=(str(tmp_path / "a.txt"),), **options)
    assert manifest["row_length"] == 16 and math.isfinite(manifest["unigram_perplexity"])


def test_what_is_wrong_is_said(runs, tmp_path):
    with pytest.raises(dc.UserError, match="prepare_text: there is no option vocabulary; options are output, input"):
        dc.prepare_text(tmp_path, vocabulary=8)
    with pytest.raises(dc.UserError, match="evaluate_run: perplexity has no option context; options are contexts"):
        dc.evaluate_run(runs / "mlp", context=8)
    with pytest.raises(dc.UserError, match="compare_runs: match='time'; expected one of end, steps"):
        dc.compare_runs(runs, match="time")
    with pytest.raises(dc.UserError, match="the text is empty"):
        dc.read_maps(runs / "mlp", "")
