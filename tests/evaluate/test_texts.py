"""The items of a text are its documents, or pieces of them where it has few."""

import numpy as np

from deconstruct.evaluate.texts import PIECE, pieces


def test_a_document_ends_with_its_end_of_text():
    starts, documents = pieces(np.array([5, 5, 0, 7, 0, 0, 9]), end_of_text=0)  # predicted: 5 0 | 7 0 | 0 | 9
    assert (starts.tolist(), documents.tolist()) == ([0, 2, 4, 5], [0, 1, 2, 3])
    starts, documents = pieces(np.append(np.zeros(1), np.ones(2 * PIECE + 3)), end_of_text=0)
    assert (starts.tolist(), documents.tolist()) == ([0, PIECE, 2 * PIECE], [1, 1, 1])
    assert [part.tolist() for part in pieces(np.zeros(0), end_of_text=0)] == [[], []]
