"""The items of a text are its documents: kept beside the ledger, the same at every context, and its numbers in sum."""

import contextlib
import io

import numpy as np
import pytest

from deconstruct.data.manifest import load_manifest
from deconstruct.evaluate import follower
from deconstruct.evaluate.evaluation import Item
from deconstruct.evaluate.items import read_items, write_items
from deconstruct.evaluate.texts import PIECE, pieces
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.workdir import Workdir
from tests.evaluate.test_follower import arguments


def evaluate(workdir, *words):
    with contextlib.redirect_stdout(io.StringIO()):
        assert follower.run(arguments(workdir, *words)) == 0
    run_dir = Workdir(workdir)
    return read_items(run_dir, 6, "perplexity"), read_jsonl(run_dir.evaluations)


def test_a_document_ends_with_its_end_of_text():
    starts, documents = pieces(np.array([5, 5, 0, 7, 0, 0, 9]), end_of_text=0)  # predicted: 5 0 | 7 0 | 0 | 9
    assert (starts.tolist(), documents.tolist()) == ([0, 2, 4, 5], [0, 1, 2, 3])
    # What has few documents, such as a text file, is cut into pieces.
    starts, documents = pieces(np.append(np.zeros(1), np.ones(2 * PIECE + 3)), end_of_text=0)
    assert (starts.tolist(), documents.tolist()) == ([0, PIECE, 2 * PIECE], [1, 1, 1])


def test_they_add_up_to_the_ledger(run, prepared):
    items, ledger = evaluate(run, "--contexts=16,32")
    nll = {record["context"]: record for record in ledger if record["metric"] == "nll"}
    documents = {}
    for context in (16, 32):
        own = [item for item in items if item["context"] == context]
        tokens = [item["tokens"] for item in own]
        assert sum(tokens) == nll[context]["tokens"]
        # Each is rounded to 1e-4 nats.
        total = -sum(item["loglikelihoods"][0] for item in own) / sum(tokens)
        assert total == pytest.approx(nll[context]["value"], abs=1e-5)
        documents[context] = [(item["doc_id"], item["tokens"]) for item in own]
        assert all(item["correct"] is None and item["text"] == "validation" and item["skip"] == "" for item in own)
    assert documents[16] == documents[32]
    # The rows may end within the last document, and then the split holds more tokens than they.
    manifest = load_manifest(prepared).validation
    assert abs(len(documents[16]) - manifest.documents) <= 1

    # The items of a setting that is measured again, as after a crash, take the place of the old.
    Workdir(run).evaluations.unlink()
    again, _ = evaluate(run, "--contexts=32")
    assert len(again) == len(items) and sorted(map(str, again)) == sorted(map(str, items))


def test_answers_are_kept_as_they_are(tmp_path):
    run_dir = Workdir(tmp_path)
    write_items(run_dir, 3, "sciq", {"skip": ""}, [Item(7, True, [-1.5, -2.0]), Item(8, False, [-3.0, -1.0])])
    assert read_items(run_dir, 3, "sciq") == [
        {"doc_id": 7, "correct": True, "loglikelihoods": [-1.5, -2.0], "skip": ""},
        {"doc_id": 8, "correct": False, "loglikelihoods": [-3.0, -1.0], "skip": ""},
    ]
    assert read_items(run_dir, 4, "sciq") == []
    write_items(run_dir, 3, "sciq", {"skip": "block"}, [Item(7, True, [-1.0, -1.0])])
    write_items(run_dir, 3, "sciq", {"skip": ""}, [Item(7, False, [-1.0, -1.0])])
    assert [(row["skip"], row["correct"]) for row in read_items(run_dir, 3, "sciq")] == [("block", True), ("", False)]
