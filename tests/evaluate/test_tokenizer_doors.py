"""Whoever reads a run's tokenizer gets the one that its checkpoint was trained with, or one line that says why not."""

from __future__ import annotations

import json
import shutil

import pytest

from deconstruct.cli import main
from deconstruct.data import tokenizer
from deconstruct.data.manifest import load_manifest
from deconstruct.interop.export_checkpoint import export_checkpoint
from deconstruct.report.one_run import report
from deconstruct.run.workdir import Workdir
from deconstruct.train.loop import train
from deconstruct.types import UserError


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A tokenizer of the same size, of other words."""
    words = ["quite other words", "these are, and no fog is among them", "12 34 56 78"] * 30
    return tokenizer.train_sentencepiece(words, 300, tmp_path_factory.mktemp("other"))


def test_another_tokenizer_in_a_workdir(run, other, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("fog and sea")
    other.save(run / "tokenizer")
    message = f"{run}/tokenizer: not the tokenizer of the checkpoint of step 6 (its sha256 is {other.fingerprint[:12]}"
    for words in (
        ["evaluate", f"--workdir={run}", f"--text={text}"],
        ["generate", f"--workdir={run}", "--prompt=fog"],
        ["export", f"--workdir={run}", f"--output={tmp_path / 'out'}"],
        ["draw", "maps", f"--workdir={run}", "--text=fog", f"--output={tmp_path / 'maps.png'}"],
    ):
        assert main(words) == 2, words
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_stale_one_of_the_other_kind_is_not_read(run, tmp_path):
    import tokenizers
    from tokenizers.models import BPE

    own = tokenizer.load(run / "tokenizer")
    made = tokenizers.Tokenizer(BPE({"<|endoftext|>": 0, "a": 1}, []))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(run / "tokenizer" / "tokenizer.json"))
    assert Workdir(run).load_tokenizer(6).fingerprint == own.fingerprint
    export_checkpoint(run, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert tokenizer.load(tmp_path / "out").fingerprint == own.fingerprint


def test_another_tokenizer_in_the_data(run, prepared, other, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    other.save(data / "tokenizer")
    config = Workdir(run).read_config().replace(data=str(data), steps=8)
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"tokenizer.model: not the tokenizer of .*data/manifest.json"):
        train(config, run)
    with pytest.raises(UserError, match=r"tokenizer.model: not the tokenizer of .*data/manifest.json"):
        train(config, tmp_path / "new")
    assert (run / "config.json").read_bytes() == before and not (tmp_path / "new").exists()


def test_ids_beyond_the_models_vocabulary(run, tmp_path, capsys):
    """A config that says less than the tokenizer has: the model of a workdir that was edited."""
    config = json.loads((run / "config.json").read_text())
    config["model"]["vocab_size"] = 200
    (run / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", f"--workdir={run}"]) == 2
    said = capsys.readouterr().err
    assert "its tokens go up to" in said and "the model has the ids 0 to 199" in said
    text = tmp_path / "text.txt"
    text.write_text("fog and sea")
    assert main(["evaluate", f"--workdir={run}", f"--text={text}"]) == 2
    assert f"--text={text}: its tokens go up to" in capsys.readouterr().err


def test_the_report_says_which_text(run, prepared):
    records = [
        {"step": 6, "task": "perplexity", "metric": "perplexity", "value": value, "tokens": 9, "context": 32}
        | {"text": text, "skip": ""}
        for text, value in [("README.md:0123456789ab", 30.0), ("validation", 20.0)]
    ]
    Workdir(run).evaluations.write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [" ".join(line.split()) for line in report(str(run)).splitlines()[3:]]
    assert lines == [
        "validation perplexity 20.0 at context 32 (validation, 9 tokens, step 6)",
        "perplexity of README.md 30.0 at context 32 (README.md:0123456789ab, 9 tokens, step 6)",
    ]
    assert load_manifest(prepared).unigram_perplexity > 1
