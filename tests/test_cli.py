"""The program: its verbs, and what it says to a mistake."""

import argparse
import importlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from deconstruct.cli import VERBS, main
from deconstruct.costs.describe import describe
from deconstruct.experiment import load_config

ROOT = Path(__file__).parents[1]
SMALL, QUICKSTART = str(ROOT / "configs" / "small.py"), str(ROOT / "configs" / "quickstart.py")


@pytest.fixture
def program(capsys):
    """Runs the program in this process: (status, stdout, stderr)."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level

    def run(*words):
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    yield run
    logger.handlers[:] = handlers  # the program sets up logging for itself
    logger.setLevel(level)


def test_help_of_the_program(program):
    status, out, err = program("--help")
    assert status == 0 and not err
    for verb, (_, what) in VERBS.items():
        assert verb in out and what.split()[0] in out


@pytest.mark.parametrize("verb", list(VERBS))
def test_help_of_a_verb_names_its_flags(program, verb):
    status, out, err = program(verb, "--help")
    assert status == 0 and not err
    parser = argparse.ArgumentParser()
    importlib.import_module(VERBS[verb][0]).add_arguments(parser)
    flags = [flag for action in parser._actions for flag in action.option_strings or [action.metavar or ""]]
    assert len(flags) > 2  # more than --help
    missing = [flag for flag in flags if flag not in out]
    assert not missing


CONTRACT = {
    "prepare": ["--input", "--output"],
    "train": ["--config", "--workdir"],
    "evaluate": ["--workdir", "--step", "--follow", "--tasks", "--contexts", "--skip"],
    "report": ["DIR"],
    "table": ["DIR"],
    "describe": ["--config", "--json"],
}


@pytest.mark.parametrize("verb", list(CONTRACT))
def test_flags_that_others_rely_on(program, verb):
    _, out, _ = program(verb, "--help")
    assert all(flag in out for flag in CONTRACT[verb])


MISTAKES = {
    "no verb": ([], "VERB"),
    "unknown verb": (["trane"], "'trane' (choose from"),
    "unknown flag": (["describe", "--config", SMALL, "--jsn"], "--jsn"),
    "abbreviated flag": (["describe", "--conf", SMALL], "--config"),
    "required flag": (["train", "--config", SMALL], "--workdir"),
    "type of a flag": (["describe", "--config", SMALL, "--batch=two"], "--batch: invalid int value: 'two'"),
    "range of a flag": (["describe", "--config", SMALL, "--batch=0"], "--batch=0: must be at least 1"),
    "choice of a flag": (["evaluate", "--workdir=w", "--skip=layer"], "--skip: invalid choice: 'layer'"),
    "config file": (["describe", "--config=nowhere.py"], "there is no file nowhere.py"),
    "config argument": (["describe", f"--config={SMALL}:size=1"], "'size=1': expected variant= or layout="),
    "unknown key": (["describe", "--config", SMALL, "--config.stps=3"], "config.stps is unknown; did you mean steps?"),
    "type of a key": (
        ["describe", "--config", SMALL, "--config.steps=3.5"],
        "config.steps=3.5: expected a whole number",
    ),
    "key without value": (["describe", "--config", SMALL, "--config.steps"], "--config.steps: expected"),
    "unknown variant": (["describe", f"--config={SMALL}:variant=mpl"], "variant 'mpl' is unknown; did you mean mlp?"),
    "overrides of evaluate": (
        ["evaluate", "--workdir=w", "--config.steps=3"],
        "--config.steps=3: evaluate takes no --config.key=value",
    ),
    "overrides of prepare": (
        ["prepare", "--output=w", "--config.seed=3"],
        "--config.seed=3: prepare takes no --config.key=value",
    ),
    "missing data": (
        ["train", "--config", SMALL, "--workdir=w", "--config.data=gone"],
        "gone: no prepared data here (no manifest.json); run: deconstruct prepare --output=gone",
    ),
    "missing workdir": (["evaluate", "--workdir=w"], "w: no config.json there; `deconstruct train` makes"),
    "step of all steps": (["evaluate", "--workdir=w", "--follow", "--step=3"], "--follow evaluates every step"),
    "negative poll": (["evaluate", "--workdir=w", "--follow", "--poll=-1"], "--poll=-1.0: must be positive"),
    "report of nothing": (["report", "w"], "w: there is no such folder"),
    "status of nothing": (["status", "w"], "w: there is no such folder"),
    "negative watch": (["status", "w", "--watch=-1"], "--watch=-1.0: must be positive"),
    "too many layers": (
        ["describe", "--config", SMALL, "--config.model.num_layers=1000000"],
        "config.model.num_layers=1000000: must be at most 1000",
    ),
    "table of nothing": (["table", "w"], "w: there is no such folder"),
    "negative tokens": (["evaluate", "--workdir=w", "--max-tokens=-1"], "--max-tokens=-1: must not be negative"),
    "missing input": (["prepare", "--output=w", "--input=gone.txt"], "gone.txt"),
    "lonely coordinator": (
        ["train", "--config", SMALL, "--workdir=w", "--coordinator=localhost:1"],
        "--coordinator, --num-processes and --process-id go together",
    ),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_one_line_and_leaves_nothing_behind(program, mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, message = MISTAKES[mistake]
    status, out, err = program(*words)
    assert status == 2 and not out
    assert len(err.splitlines()) == 1, err
    assert err.startswith("deconstruct") and message in err
    assert list(tmp_path.iterdir()) == []


def test_the_exit_status_of_the_process(tmp_path):
    def run(*words):
        command = [sys.executable, "-m", "deconstruct.cli", *words]
        environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    wrong = run("train", f"--config={SMALL}", "--workdir=w", "--config.data=gone")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("deconstruct train: gone: no prepared data") and wrong.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert run("--help").returncode == 0


def test_describe_as_json(program):
    status, out, err = program("describe", f"--config={SMALL}:variant=rnd_emb_qk,layout=even", "--json", "--batch=3")
    assert status == 0 and not err
    found = json.loads(out)
    assert {"layers", "plan", "parameters", "difference_from_standard", "flops", "cache_bytes"} <= set(found)
    assert found["layers"] == ["rnd_emb_qk", "standard"] * 2
    assert sum(len(segment["unit"]) * segment["repeats"] for segment in found["plan"]) == 4
    assert {"total", "embedding", "mixer_per_layer"} <= set(found["parameters"])
    assert found["parameters"]["mixer_per_layer"] == [4 * 128 * 128 + 3 * 128] * 4
    assert found["difference_from_standard"] == 0 and found["flops"]["batch"] == 3
    # 256 positions of float32 keys and values; keys of the two fixed layers are there once, not for each of the three.
    row = 256 * 128 * 4
    assert found["cache_bytes"] == row * (2 * (3 + 3) + 2 * (1 + 3))


def test_describe_takes_overrides_wherever_they_stand(program):
    status, out, _ = program("--config.model.num_layers=5", "describe", "--json", f"--config={SMALL}")
    assert status == 0 and len(json.loads(out)["layers"]) == 5


def test_describe_as_text(program):
    status, out, err = program("describe", f"--config={SMALL}:variant=mlp,layout=2")
    assert status == 0 and not err
    assert "plan        1 x (mlp, standard, mlp, mlp)" in out
    found = describe(load_config(f"{SMALL}:variant=mlp,layout=2"))
    assert f"parameters  {found['parameters']['total']:,} (embedding" in out
    assert found["difference_from_standard"] == 3 * (3 * 128 * 172 - 4 * 128 * 128 - 3 * 128)
    assert f"{found['difference_from_standard']:+,} against standard" in out
    rows = [line.split() for line in out.splitlines()[-4:]]
    assert [row[:2] for row in rows] == [["1", "mlp"], ["2", "standard"], ["3", "mlp"], ["4", "mlp"]]
    assert rows[0][2:5] == ["66,048", "+128", "+128"] and rows[1][2:5] == ["65,920", "+0", "+0"]
    layer = found["per_layer"]
    for row, *costs in zip(rows, *(layer[key] for key in ("forward_flops", "decode_flops")), strict=True):
        assert [float(x) for x in row[5:7]] == [float(f"{cost:.4g}") for cost in costs]
    for row, *sizes in zip(rows, *(layer[key] for key in ("cache_bytes", "activation_bytes")), strict=True):
        assert row[7:] == [f"{size:,}" for size in sizes]


def test_what_does_not_fit_into_memory_is_one_line(program, monkeypatch):
    """What Python, NumPy and XLA raise for it; any other error is a fault, and keeps its traceback."""
    import jax.numpy as jnp
    import numpy as np

    from deconstruct.run import status

    for ask in (lambda _: [0] * 2**60, lambda _: np.zeros(2**50), lambda _: jnp.zeros(2**43)):
        monkeypatch.setattr(status, "run", ask)
        ended, _, err = program("status", "w")
        assert ended == 1 and err.count("\n") == 1 and "deconstruct status: out of memory (" in err
    monkeypatch.setattr(status, "run", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        program("status", "w")
