"""Benches run, at a size where their figures mean nothing."""

import json

import pytest

from deconstruct import cli
from deconstruct.attention.registry import FORMS
from deconstruct.attention.variants import one_of_each
from deconstruct.bench.ceilings import Ceilings
from deconstruct.bench.contexts import context_speed, contexts_as_text
from deconstruct.bench.generation import NEW, Ours, generation_speed
from deconstruct.bench.kernels import PASSES, SHARED, Work, kernel_speed, kernels_as_text
from deconstruct.bench.lengths import length_speed, lengths_as_text
from deconstruct.bench.roofline import draw_roofline
from deconstruct.bench.rounds import Case, ratio, speeds_as_text
from deconstruct.bench.targets import PEERS, target_speed, targets_as_text
from deconstruct.bench.train_step import train_speed
from deconstruct.model.language_model import build_model

TINY = Case("tiny", 2, 8, 64, 16, 24, 1, 2)


def test_train_step():
    found = train_speed(TINY, "mlp", peers=False, rounds=2, steps=1)
    assert found["tokens_per_second"]["deconstruct"] > 0 and "ratio" not in found
    assert speeds_as_text(found).startswith("tiny (batch 2 x 8, d 16, 1 layers, vocabulary 64): deconstruct ")


@pytest.mark.proof
def test_generation():
    ours = Ours(build_model(TINY.config("non_approximate").model), TINY.tokens(4))
    assert ours() > 0 and ours.tokens.shape == (2, NEW)
    found = generation_speed(TINY, 1, "mlp", peers=False, rounds=1)
    assert found["case"]["batch"] == 1 and found["tokens_per_second"]["deconstruct"] > 0


@pytest.mark.proof
def test_contexts():
    found = context_speed(TINY, rounds=1, contexts=(16,))
    assert list(found["variants"]) == one_of_each() and json.loads(json.dumps(found)) == found
    standard = found["variants"]["standard"]
    assert standard["ratio"][0]["median"] == 1 and standard["cache_bytes"] == standard["paper_cache_bytes"] == [1024]
    assert found["variants"]["mlp"]["cache_bytes"] == [0] and found["variants"]["approximate"]["milliseconds"][0] > 0
    assert contexts_as_text(found).count("\nstandard ") == 2


@pytest.mark.proof
def test_lengths(monkeypatch):
    few = ["standard", "mlp", "hidden/gated_linear"]
    monkeypatch.setattr("deconstruct.bench.lengths.one_of_each", lambda: few)
    found = length_speed(TINY, rounds=1, lengths=(16,))
    assert list(found["variants"]) == few and json.loads(json.dumps(found)) == found
    assert found["variants"]["standard"]["ratio"][0]["median"] == 1
    assert lengths_as_text(found).startswith("tiny, d 16, 1 layers, 16 tokens a step")


@pytest.mark.proof
def test_kernels(tmp_path):
    """Every form has a program that runs here, a share of what the machine gives, and a place in the picture."""
    work = Work(16, 2, 8, "float32", (8,))
    found = kernel_speed(work, rounds=1)
    labels = {row["program"] for row in found["rows"]}
    assert labels == {*(f"{name}: xla" for name in FORMS), f"{SHARED}: xla"}
    assert all(row["milliseconds"] > 0 and 0 < row["share"] < 1 for row in found["rows"])
    assert json.loads(json.dumps(found)) == found
    assert kernels_as_text(found).count("\nsoftmax: xla ") == 2
    draw_roofline(found, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.proof
def test_targets(monkeypatch):
    """Every aim has a figure, where what it takes is here: no peer is, and no device whose peak is known."""
    monkeypatch.setattr("deconstruct.bench.targets.VARIANTS", {"standard": "", "mlp": ""})
    found = target_speed(Work(32, 2, 8, "float32", (8, 16)), TINY, rounds=1, peers=False)
    rows = {row["what"]: row for row in found["targets"]}
    assert len(rows) == len(found["targets"]) == len(PEERS) * 2 * 2 + 2 * 2 + 2 + 2 + 1
    measured = {what for what, row in rows.items() if row["measured"] is not None}
    assert measured == {
        *(f"self_gate, share of the roofline, {length} positions, {way}" for length in (8, 16) for way in PASSES),
        *(f"one map for 4 sequences to a map each, 8 positions, {way}" for way in PASSES),
        "tiny mlp to standard",
    }
    assert all(row["reached"] == (row["measured"] >= row["least"]) for row in rows.values() if row["what"] in measured)
    assert targets_as_text(found).count("\nnot measured ") == len(rows) - len(measured)


def test_targets_are_of_a_gpu(capsys):
    assert cli.main(["bench", "targets"]) == 2
    assert "targets are speeds on a GPU, and there is none here" in capsys.readouterr().err


@pytest.mark.parametrize(("flops", "moved", "least"), [(4.0, 1.0, 2.0), (1.0, 9.0, 3.0)])
def test_the_roofline_is_what_takes_longer(flops, moved, least):
    assert Ceilings(flops=2.0, bytes=3.0).seconds(flops, moved) == least


def test_a_ratio_is_taken_round_by_round():
    assert ratio([2.0, 6.0, 20.0], [1.0, 2.0, 4.0]) == {"median": 3.0, "least": 2.0, "most": 5.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--peers", "--variant=mlp"], "--variant=mlp: only standard has a peer"),
        (["contexts", "--peers"], "--peers: contexts compares all variants"),
        (["contexts", "--variant=mlp"], "--variant: contexts compares all variants"),
        (["lengths", "--variant=mlp"], "--variant: lengths compares all variants"),
        (["generate", "--steps=2"], "--steps=2: only train has steps"),
        (["train", "--lengths=5"], "--lengths=5: only lengths and kernels have them"),
        (["kernels", "--lengths=1k"], "--lengths=1k: expected numbers, as in 1024,4096"),
        (["kernels", "--lengths=0"], "--lengths=0: must be at least 1"),
        (["lengths", "--plot=a.png"], "--plot=a.png: only kernels has a roofline"),
        (["--rounds=0"], "--rounds=0: must be at least 1"),
        (["generate", "--variant=nonsense"], "variant 'nonsense' is unknown"),
    ],
)
def test_mistakes(words, message, capsys):
    assert cli.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err
