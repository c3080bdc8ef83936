"""Validation is a share of the tokens, whatever the sizes of the documents and the parts they come in."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from deconstruct.data.encode import TABLE
from deconstruct.data.manifest import load_manifest
from deconstruct.data.prepare import add_arguments, run
from deconstruct.data.split import last_validation_draw


def table(draws, tokens):
    made = np.zeros(len(draws), TABLE)
    made["draw"], made["tokens"] = draws, tokens
    return made


def chosen(tables, fraction):
    last = last_validation_draw(lambda: iter(tables), fraction)
    return {int(draw) for part in tables for draw in part["draw"] if draw <= last}


def by_definition(draws, tokens, fraction):
    """Document after document, in whole numbers, until there is enough; one draw at least stays for training."""
    held, taken = 0, set()
    distinct = sorted(set(draws))
    for draw in distinct[:-1]:
        held += sum(t for d, t in zip(draws, tokens, strict=True) if d == draw)
        taken.add(draw)
        if held >= fraction * sum(tokens):
            break
    return taken


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("spread", [2**64, 2**50, 12])  # over all buckets; over a few; in one, and with equal draws
def test_the_first_documents_in_hashed_order_that_hold_enough(fraction, spread):
    random = np.random.default_rng(0)
    draws = [int(d) % spread for d in random.integers(0, 2**64, 60, dtype=np.uint64)]
    tokens = [int(t) for t in (random.pareto(0.7, 60) * 20 + 1)]  # some documents are most of the text
    expected = by_definition(draws, tokens, fraction)
    assert expected
    for cuts in ([], [0, 7, 7, 40], range(60)):
        pieces = zip(np.split(np.array(draws, np.uint64), cuts), np.split(tokens, cuts), strict=True)
        parts = [table(*piece) for piece in pieces]
        assert chosen(parts, fraction) == expected
    order = random.permutation(60)
    assert chosen([table(np.array(draws, np.uint64)[order], np.array(tokens)[order])], fraction) == expected


def test_one_large_document_among_small_ones():
    """Its share of the documents is nothing; where its draw is the first, it is all the validation there is."""
    small = table(np.arange(1, 1001, dtype=np.uint64) << np.uint64(40), 10)
    assert len(chosen([small], 0.05)) == 50
    assert len(chosen([small, table([2**64 - 1], 10_000)], 0.05)) == 100
    assert chosen([small, table([0], 10_000)], 0.05) == {0}


def test_prepare_says_the_share(tmp_path, texts, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [f"--input={texts}", f"--output={tmp_path / 'out'}", "--workers=1", "--row-length=48", "--vocab-size=300"]
    assert run(parser.parse_args([*words, "--validation-fraction=0.25"])) == 0
    manifest = load_manifest(tmp_path / "out")
    tokens = [manifest.train.tokens, manifest.validation.tokens]
    assert 0.25 <= tokens[1] / sum(tokens) < 0.25 + 2 / 40  # forty documents of much the same size
    assert f"{tokens[1]:,} tokens ({tokens[1] / sum(tokens):.2%}), " in capsys.readouterr().out
