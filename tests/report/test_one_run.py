"""The short report says what the files of a run say."""

import json

import pytest

from deconstruct.data.manifest import load_manifest
from deconstruct.evaluate.report import report
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError


def test_the_report(run, prepared):
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
    lines = report(str(run)).splitlines()
    assert lines[0].endswith("2 layers, non_approximate in 1 of them (even)")
    losses = [record["loss"] for record in read_jsonl(Workdir(run).metrics)]
    assert f"{losses[0]:.3f} at step 1, {losses[-1]:.3f} at step 6 (chance: 5.704)" in lines[1]  # log 300
    assert f"{load_manifest(prepared).unigram_perplexity:.1f}" in lines[2]
    assert [line.split(" (")[0].strip() for line in lines[3:]] == [
        "validation perplexity 25.2 at context 16", "validation perplexity 20.1 at context 32",
    ]  # fmt: skip
