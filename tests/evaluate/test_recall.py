"""Recall is counted at the answers, of documents that are drawn anew."""

import contextlib
import io

import jax
import numpy as np
import pytest

from deconstruct.cli import main
from deconstruct.data.prepare import PrepareOptions, prepare
from deconstruct.data.recall import parse_recall
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.restore import restore_model
from deconstruct.run.workdir import Workdir
from tests.evaluate.conftest import train_tiny

MADE = "mqar(pairs=3,queries=5,keys=6,values=3,fillers=4,length=31,documents=60)"


@pytest.fixture(scope="module")
def recalling(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recall")
    data = folder / "prepared"
    prepare(
        PrepareOptions(input=(f"recall:{MADE}",), output=str(data), row_length=32, validation_fraction=0.2, workers=1)
    )
    return train_tiny(data, folder / "run", "standard", 2)


def evaluate(workdir, *words):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["evaluate", f"--workdir={workdir}", "--tasks=recall", *words]) == 0
    return out.getvalue()


def by_hand(model, recall, count):
    """nll and the two accuracies, document by document, in float64."""
    losses, right, right_at_first = [], [], []
    forward = jax.jit(lambda tokens: model(tokens))
    for row in recall.tokens(count, stream=1):
        logits = np.asarray(forward(row[None, :-1]), np.float64)[0]
        seen = set()
        for i, (token, following) in enumerate(zip(row[:-1].tolist(), row[1:].tolist(), strict=True)):
            if recall.words()[token][0] != "k":
                continue
            if token in seen:
                losses.append(np.log(np.exp(logits[i]).sum()) - logits[i, following])
                right.append(logits[i].argmax() == following)
                if row[:i].tolist().count(token) == 1:
                    right_at_first.append(right[-1])
            seen.add(token)
    return len(losses), np.mean(losses), np.mean(right_at_first), np.mean(right)


@pytest.mark.proof
def test_accuracy_is_that_of_the_answers(recalling, run, capsys):
    printed = evaluate(recalling, "--documents=20")
    model = restore_model(recalling)
    answers, *expected = by_hand(model, parse_recall(MADE), 20)
    records = read_jsonl(Workdir(recalling).evaluations)
    assert [r["metric"] for r in records] == ["nll", "accuracy_at_first", "accuracy"]
    assert [r["value"] for r in records] == pytest.approx(expected, rel=1e-5)  # float32 logits
    assert answers == 20 * 5 == records[0]["answers"] and "accuracy " in printed
    # Another difficulty, over the same words; what is not said is as in the data.
    harder = "mqar(pairs=5,queries=6)"
    assert "recall mqar(pairs=5," in evaluate(recalling, "--documents=4", f"--recall={harder}")
    _, *expected = by_hand(model, parse_recall(harder, parse_recall(MADE)), 4)
    assert [r["value"] for r in read_jsonl(Workdir(recalling).evaluations)[3:]] == pytest.approx(expected, rel=1e-5)

    for words, said in [
        ([f"--workdir={recalling}", "--recall=mqar(keys=7)"], "--recall=mqar(keys=7): keys, values and fillers are wo"),
        ([f"--workdir={recalling}", "--recall=mqra"], "recall 'mqra' is unknown; did you mean mqar?"),
        ([f"--workdir={recalling}", "--documents=0"], "--documents=0: must be at least 1"),
        ([f"--workdir={run}"], "is not made for recall; prepare some with --input='recall:mqar(pairs=8)'"),
    ]:
        capsys.readouterr()
        assert main(["evaluate", "--tasks=recall", *words]) == 2
        said_here = capsys.readouterr().err
        assert said in said_here and said_here.count("\n") == 1
