"""The items of a text are its documents: kept beside the ledger, the same at every context, and its numbers in sum."""

import contextlib
import io

import numpy as np
import pytest

from deconstruct.data.manifest import load_manifest
from deconstruct.evaluate import follower
from deconstruct.evaluate.ledger import read_items
from deconstruct.evaluate.texts import PIECE, pieces
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.workdir import Workdir
from tests.evaluate.test_follower import arguments


def test_a_document_ends_with_its_end_of_text():
    starts, documents = pieces(np.array([5, 5, 0, 7, 0, 0, 9]), end_of_text=0)  # predicted: 5 0 | 7 0 | 0 | 9
    assert (starts.tolist(), documents.tolist()) == ([0, 2, 4, 5], [0, 1, 2, 3])
    # What has few documents, such as a text file, is cut into pieces.
    starts, documents = pieces(np.append(np.zeros(1), np.ones(2 * PIECE + 3)), end_of_text=0)
    assert (starts.tolist(), documents.tolist()) == ([0, PIECE, 2 * PIECE], [1, 1, 1])
    assert [part.tolist() for part in pieces(np.zeros(0), end_of_text=0)] == [[], []]


def test_they_add_up_to_the_ledger(run, prepared):
    with contextlib.redirect_stdout(io.StringIO()):
        assert follower.run(arguments(run, "--contexts=16,32")) == 0
    ledger = read_jsonl(Workdir(run).evaluations)
    documents = []
    for nll, last in (ledger[:2], ledger[2:]):
        items = read_items(run / last["items_file"])
        tokens = [item["tokens"] for item in items]
        assert sum(tokens) == nll["tokens"] and "items_file" not in nll
        # Each is rounded to 1e-4 nats.
        assert -sum(item["logliks"][0] for item in items) / sum(tokens) == pytest.approx(nll["value"], abs=1e-5)
        documents.append([(item["id"], item["tokens"]) for item in items])
    assert documents[0] == documents[1]
    # The rows may end within the last document, and then the split holds more tokens than they.
    assert abs(len(documents[0]) - load_manifest(prepared).validation.documents) <= 1
