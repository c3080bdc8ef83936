"""The short report says what the files of a run say."""

import json

import pytest

from deconstruct.cli import main
from deconstruct.data.manifest import load_manifest
from deconstruct.report.one_run import report
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError
from tests.evaluate.conftest import prepare_text
from tests.tiny import tiny_config


def test_the_report(tmp_path, capsys):
    prepared, run = prepare_text(tmp_path, 0), tmp_path / "run"
    run.mkdir()
    Workdir(run).write_config(
        tiny_config({"vocab_size": 0}, variant="non_approximate", layout="even", data=str(prepared))
    )
    logged = [{"step": step, "loss": 6.0 - step / 7} for step in (1, 3, 6)]
    Workdir(run).metrics.write_text("".join(json.dumps(record) + "\n" for record in logged))
    with pytest.raises(UserError, match=r"nothing to report yet; run `deconstruct train` and `deconstruct evaluate`"):
        report(str(run))
    records = [
        {"step": step, "task": "perplexity", "metric": metric, "value": value, "tokens": 9, "context": context}
        | {"text": "validation", "skip": skip}
        for step, metric, value, context, skip in [
            (2, "perplexity", 77.0, 32, ""), (6, "nll", 3.0, 32, ""), (6, "perplexity", 20.1, 32, ""),
            (6, "perplexity", 25.2, 16, ""), (6, "perplexity", 99.0, 32, "block"),
        ]
    ]  # fmt: skip
    records.append({"step": 8, "task": "another", "metric": "perplexity", "value": 3.0, "skip": ""})
    Workdir(run).evaluations.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["report", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("2 layers, non_approximate in 1 of them (even)")
    assert "5.857 at step 1, 5.143 at step 6 (chance: 5.704)" in lines[1]  # log 300
    assert f"{load_manifest(prepared).unigram_perplexity:.1f}" in lines[2]
    assert [line.split(" (")[0].strip() for line in lines[3:]] == [
        "validation perplexity 25.2 at context 16", "validation perplexity 20.1 at context 32",
    ]  # fmt: skip
