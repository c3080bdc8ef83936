"""The table: which runs, what tells them apart, and the paper's numbers only beside the paper's runs."""

import json
from pathlib import Path

import pytest

from deconstruct.cli import main
from deconstruct.evaluate.table import PAPER
from deconstruct.experiment import load_config
from deconstruct.run.workdir import Workdir
from tests.tiny import tiny_config

CONFIGS = Path(__file__).parents[2] / "configs"


def record(step, context, value, **others):
    plain = {"text": "validation", "skip": "", "windows": "non-overlapping", "stride": context, "max_tokens": 0}
    head = {"step": step, "task": "perplexity", "metric": "perplexity", "value": value, "tokens": 9}
    return {**head, "context": context, **plain, **others}


def make_run(folder, config, records):
    folder.mkdir(parents=True)
    Workdir(folder).write_config(config)
    if records:
        Workdir(folder).evaluations.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def table(capsys, *folders):
    """(heads, rows by run, in their order; what stands below)."""
    assert main(["table", *map(str, folders)]) == 0
    shown, _, below = capsys.readouterr().out.strip().partition("\n\n")
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in shown.splitlines()]
    return heads, {row[0]: row[1:] for row in rows}, below


def test_runs_that_differ_in_a_seed_and_a_key(tmp_path, capsys):
    make_run(tmp_path / "a", tiny_config(variant="mlp"), [record(4, 8, 30.0), record(4, 16, 31.0)])
    make_run(tmp_path / "b", tiny_config(seed=3), [record(2, 8, 10.0), record(4, 8, 20.125), record(4, 16, 19.0)])
    make_run(tmp_path / "c", tiny_config({"num_heads": 2}), [record(4, 8, 25.0)])
    make_run(tmp_path / "fresh", tiny_config(), [])
    (tmp_path / "notes").mkdir()
    heads, rows, below = table(capsys, tmp_path)
    assert heads == ["run", "seed", "variant", "model.num_heads", "context 8", "context 16"]
    assert rows == {
        "b": ["3", "standard", "4", "20.12", "19.00"],
        "a": ["0", "mlp", "4", "30.00", "31.00"],
        "c": ["0", "standard", "2", "25.00", ""],
    }
    assert list(rows) == ["b", "a", "c"]  # best first, at the longest context
    assert below == "Not evaluated on their validation text: fresh."

    heads, rows, below = table(capsys, tmp_path / "b", tmp_path / "a", tmp_path / "b")
    assert heads == ["run", "seed", "variant", "context 8", "context 16"] and list(rows) == ["b", "a"] and not below
    # One run has nothing to differ from; runs of one name in two folders are told apart.
    assert table(capsys, tmp_path / "a")[0] == ["run", "seed", "context 8", "context 16"]
    again = make_run(tmp_path / "more" / "a", tiny_config(variant="mlp"), [record(4, 8, 29.0)])
    assert set(table(capsys, tmp_path / "a", again)[1]) == {str(tmp_path / "a"), str(again)}


def test_only_what_is_measured_alike_is_compared(tmp_path, capsys):
    """Other texts, windows and tasks are left out, and runs at different steps say at which."""
    others = [
        record(4, 8, 1.0, text="own.txt:12"), record(4, 8, 2.0, windows="sliding", stride=4),
        record(4, 8, 3.0, max_tokens=100), record(4, 8, 4.0, skip="block"), record(9, 8, 5.0, task="another"),
        record(4, 8, 6.0, metric="nll"),
    ]  # fmt: skip
    make_run(tmp_path / "a", tiny_config(), [record(2, 8, 50.0), *others])
    old = {"step": 4, "task": "perplexity", "metric": "perplexity", "value": 40.0, "context": 8} | {
        "text": "validation", "skip": ""
    }  # fmt: skip
    make_run(tmp_path / "old", tiny_config(), [old])
    make_run(tmp_path / "none", tiny_config(), others)
    heads, rows, below = table(capsys, tmp_path)
    assert heads == ["run", "seed", "step", "context 8"]
    assert rows == {"old": ["0", "4", "40.00"], "a": ["0", "2", "50.00"]}
    assert below.endswith(": none.")


def paper_run(folder, spec, *, step=None, **overrides):
    config = load_config(f"{CONFIGS / 'paper.py'}:{spec}", data="", **overrides)
    return make_run(folder, config, [record(step or config.steps, 2048, 40.0)])


def test_the_papers_number_beside_the_papers_run(tmp_path, capsys):
    make_run(tmp_path / "small", tiny_config(), [record(4, 2048, 90.0)])
    even = paper_run(tmp_path / "even", "variant=non_approximate,layout=even")
    heads, rows, _ = table(capsys, tmp_path)
    assert heads[-1] == "paper (500m, WikiText)"
    assert rows["even"][-1] == "39.4" and rows["small"][-1] == ""
    for number, (variant, layout) in enumerate(PAPER):
        run = paper_run(tmp_path / str(number), f"size=500m,variant={variant},layout={layout}")
        assert table(capsys, run)[1][str(number)][-1] == str(PAPER[variant, layout])
    assert table(capsys, even)[0][-1] == "paper (500m, WikiText)"


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        ("size=70m", {}),
        ("size=1.7b", {}),
        ("heads=gqa", {}),
        ("variant=mlp,layout=odd", {}),
        ("variant=static_embedding/taylor", {}),
        ("variant=mlp", {"steps": 1000, "optimizer.warmup_steps": 10}),
        ("variant=mlp", {"batch_size": 128}),
        ("variant=mlp", {"model.num_layers": 12}),
        ("variant=mlp", {"step": 1000}),  # evaluated before its end
    ],
)
def test_no_such_column_beside_another_run(tmp_path, capsys, spec, changes):
    run = paper_run(tmp_path / "run", spec, **changes)
    assert table(capsys, run)[0] == ["run", "seed", "context 2048"]


def test_mistakes(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    fresh = make_run(tmp_path / "fresh", tiny_config(), [])
    for folder, message in [
        (tmp_path / "empty", "no workdir, and none in it; `deconstruct train` makes one"),
        (tmp_path / "gone", "there is no such folder"),
        (fresh, "no run in it was evaluated on its validation text; `deconstruct evaluate` does so"),
    ]:
        assert main(["table", str(folder)]) == 2
        assert capsys.readouterr().err == f"deconstruct table: {folder}: {message}\n"
