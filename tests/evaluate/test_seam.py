"""An evaluation that the package does not know: it is measured, kept and drawn as perplexity is, by its name alone."""

import contextlib
import gzip
import io
import json
import struct
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tensorboardX.proto.event_pb2 import Event

from deconstruct.cli import main
from deconstruct.evaluate.evaluation import EVALUATIONS, Evaluation, Measurement, parse_tasks
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.restore import restore_model
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError

TOKENS = np.arange(48, dtype=np.int32).reshape(8, 6)


class LogitNorm(Evaluation):
    """The norm of the logits at the first positions, and their mean: a record a position, and one of all."""

    options: ClassVar = {"--norm-order": {"type": int, "default": 2}, "--positions": {"default": "3"}}
    qualifiers: ClassVar = {"positions": 3, "norm_order": 2, "position": None}
    last = "mean_norm"

    def __init__(self, name, subject, options):
        super().__init__(name, subject, options)
        self._settings = [
            {"positions": int(count), "norm_order": options.norm_order} for count in options.positions.split(",")
        ]

    def settings(self):
        return self._settings

    def measure(self, model, setting):
        assert jax.sharding.get_mesh().size == self.subject.mesh.size == 8
        arrays = jax.tree.leaves(nnx.state(model))
        assert any(not x.sharding.is_fully_replicated for x in arrays) == (self.subject.mesh.shape["fsdp"] > 1)
        norms = jnp.linalg.norm(model(jnp.asarray(TOKENS)), axis=-1, ord=setting["norm_order"]).mean(0)
        for position, norm in enumerate(norms[: setting["positions"]]):
            items = [{"id": n, "first": row.tolist()[0]} for n, row in enumerate(TOKENS)] if position == 1 else ()
            yield Measurement("norm", float(norm), {"position": position, "rows": len(TOKENS)}, items)
        yield Measurement("mean_norm", float(norms[: setting["positions"]].mean()), {"rows": len(TOKENS)})


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(EVALUATIONS, "logit_norm", f"{__name__}:LogitNorm")


def evaluate(workdir, *words):
    """The command. Returns what it printed, a line a setting."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["evaluate", f"--workdir={workdir}", "--poll=0.02", *words]) == 0
    return out.getvalue().splitlines()


def refused(capsys, *words):
    capsys.readouterr()
    assert main(["evaluate", *words]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    return err.removeprefix("deconstruct evaluate: ").strip()


def ledger(workdir):
    return read_jsonl(Workdir(workdir).evaluations)


def points(workdir):
    """(curve, step, value) of all events of the evaluator. In a file: length (8), checksum (4), event, checksum (4)."""
    found = []
    for file in sorted((workdir / "tensorboard" / "eval").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            if at + length + 16 > len(data):
                break  # a torn end
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += length + 16
    return found


def by_hand(workdir, step, order=2):
    logits = np.asarray(restore_model(workdir, step)(jnp.asarray(TOKENS)), np.float64)
    return (np.abs(logits) ** order).sum(-1) ** (1 / order)


@pytest.mark.proof
def test_followed_over_all_steps_beside_perplexity(run):
    printed = evaluate(run, "--follow", "--tasks=logit_norm,perplexity", "--positions=3,2", "--max-tokens=64")
    assert [line.split()[:3] for line in printed] == [
        ["step", str(step), word] for step in (2, 4, 6) for word in ("logit_norm", "logit_norm", "context")
    ]
    own = [record for record in ledger(run) if record["task"] == "logit_norm"]
    assert len(own) == 3 * (4 + 3) and len(ledger(run)) == len(own) + 3 * 2
    assert all((r["skip"], r["norm_order"], r["rows"]) == ("", 2, 8) and "context" not in r for r in own)
    for step in (2, 4, 6):
        norms = by_hand(run, step).mean(0)
        for count in (3, 2):
            found = [r for r in own if (r["step"], r["positions"]) == (step, count)]
            assert [r["metric"] for r in found] == ["norm"] * count + ["mean_norm"]
            # float32 logits, and sums over eight devices in another order
            expected = [*norms[:count], norms[:count].mean()]
            assert [r["value"] for r in found] == pytest.approx(expected, rel=1e-5)
    assert "logit_norm  norm " in printed[1] and printed[1].endswith("  (positions 2)")

    before = Workdir(run).evaluations.read_text()
    assert evaluate(run, "--follow", "--tasks=logit_norm", "--positions=2,3") == []
    assert len(evaluate(run, "--tasks=logit_norm", "--norm-order=4")) == 1  # of the latest step
    assert Workdir(run).evaluations.read_text().startswith(before)
    assert ledger(run)[-1]["value"] == pytest.approx(by_hand(run, 6, 4)[:, :3].mean(), rel=1e-5)
    evaluate(run, "--tasks=logit_norm", "--skip")
    files = [record.get("items_file") for record in ledger(run) if record["task"] == "logit_norm"]
    assert files[1] == "eval_items/2.logit_norm.position_1.jsonl.gz" and files[0] is files[2] is None
    assert "eval_items/6.logit_norm.position_1.skip_block.jsonl.gz" in files
    kept = gzip.decompress((run / files[1]).read_bytes()).decode().splitlines()
    assert [json.loads(line) for line in kept] == [{"id": n, "first": 6 * n} for n in range(8)]
    last = ledger(run)[-1]
    assert last["skip"] == "block" and last["value"] != pytest.approx(by_hand(run, 6)[:, :3].mean(), rel=1e-3)


@pytest.mark.proof
def test_a_setting_that_was_cut_short_is_completed_without_repeating_itself(run):
    evaluate(run, "--tasks=logit_norm")
    path = Workdir(run).evaluations
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    for torn in ("", lines[2][:30]):
        path.write_text("".join(lines[:2]) + torn)
        assert len(evaluate(run, "--tasks=logit_norm")) == 1
        assert path.read_text() == whole


@pytest.mark.proof
def test_parameters_split_over_devices_give_the_same_numbers(run):
    words = ("--tasks=perplexity,logit_norm", "--max-tokens=320", "--contexts=8,32")
    evaluate(run, *words)
    whole = ledger(run)
    Workdir(run).evaluations.unlink()
    evaluate(run, *words, "--mesh=fsdp=4")
    split = ledger(run)
    keys = [{key: value for key, value in record.items() if key != "value"} for record in whole]
    assert keys == [{key: value for key, value in record.items() if key != "value"} for record in split]
    # Sums over two ways of splitting a batch and a parameter, in float32.
    assert [r["value"] for r in split] == pytest.approx([r["value"] for r in whole], rel=1e-5)


def test_the_steps_that_are_named(run, capsys):
    words = ("--tasks=logit_norm",)
    assert [line.split()[1] for line in evaluate(run, *words, "--step=6,2")] == ["2", "6"]
    assert [line.split()[1] for line in evaluate(run, *words, "--step=all")] == ["4"]
    before = Workdir(run).evaluations.read_text()
    # What is not there is said before anything is measured.
    message = refused(capsys, f"--workdir={run}", *words, "--positions=1", "--step=2,5")
    assert message.startswith("no checkpoint of step 5 in") and message.endswith("finished steps: 2, 4, 6")
    assert Workdir(run).evaluations.read_text() == before


def test_curves_are_the_ledger_each_point_once(run):
    evaluate(run, "--step=2,4", "--contexts=8,16", "--max-tokens=64", "--tasks=perplexity,logit_norm")
    evaluate(run, "--step=4", "--skip=mixer", "--windows=sliding", "--stride=3", "--contexts=8")
    drawn = points(run)
    curves = {curve for curve, _, _ in drawn}
    assert len(drawn) == len({point[:2] for point in drawn}) == len(ledger(run))
    assert {
        "perplexity/nll/context_8/max_tokens_64", "perplexity/perplexity/context_16/max_tokens_64",
        "perplexity/perplexity/context_8/windows_sliding/stride_3/skip_mixer", "logit_norm/mean_norm",
        "logit_norm/norm/position_1",
    } <= curves  # fmt: skip
    (value,) = [r["value"] for r in ledger(run) if (r["step"], r["metric"]) == (4, "mean_norm")]
    assert ("logit_norm/mean_norm", 4, pytest.approx(value, rel=1e-6)) in drawn  # events hold float32
    evaluate(run, "--step=2,4", "--contexts=8,16", "--max-tokens=64", "--tasks=perplexity,logit_norm")
    assert points(run) == drawn

    # A crash between the ledger and the curves, a torn event, a ledger of an older version: the next call catches up.
    (file, *others) = sorted((run / "tensorboard" / "eval").iterdir())
    for other in others:
        other.unlink()
    file.write_bytes(file.read_bytes()[:-10])
    old = {"step": 1, "task": "perplexity", "metric": "perplexity", "value": 9.5, "tokens": 3, "context": 8}
    with Workdir(run).evaluations.open("a") as out:
        out.write(json.dumps(old) + "\n")
    evaluate(run, "--step=2", "--contexts=8", "--max-tokens=64", "--tasks=perplexity,logit_norm")
    assert sorted(points(run), key=str) == sorted([*drawn, ("perplexity/perplexity/context_8", 1, 9.5)], key=str)


def test_mistakes(run, capsys, monkeypatch):
    workdir = f"--workdir={run}"
    assert refused(capsys, workdir, "--norm-order=3") == (
        "--norm-order is an option of logit_norm, which --tasks=perplexity does not ask for"
    )
    assert refused(capsys, workdir, "--tasks=logit_norm", "--max-tokens=0") == (
        "--max-tokens is an option of perplexity, which --tasks=logit_norm does not ask for"
    )
    assert refused(capsys, workdir, "--tasks=perplexity,logitnorm") == (
        "--tasks=perplexity,logitnorm: 'logitnorm' is unknown; did you mean logit_norm?"
    )
    with pytest.raises(UserError, match="--tasks=,: expected names, such as perplexity"):
        parse_tasks(",")
    for steps in ("x", "-2", "2,", "all,2"):
        assert refused(capsys, workdir, f"--step={steps}").startswith(f"--step={steps}: expected steps, such as 200")
    for mesh in ("0", "fsdp=0", "4", "fsdp=2,rows=4", "tensor=-1"):
        assert refused(capsys, workdir, f"--mesh={mesh}").startswith(f"--mesh={mesh}: expected sizes of data, fsdp, t")
    for mesh, said in (("fsdp=3", "data=-1 x fsdp=3 x tensor=1"), ("data=1,fsdp=16", "data=1 x fsdp=16 x tensor=1")):
        assert refused(capsys, workdir, f"--mesh={mesh}").startswith(f"--mesh: {said} does not make 8 devices")
    # Before the run has begun, and so before --follow waits for it.
    assert refused(capsys, "--workdir=gone", "--follow", "--contexts=0").startswith("--contexts=0: expected lengths")
    # A mistake of who writes an evaluation: the setting would be measured for ever.
    monkeypatch.setattr(LogitNorm, "last", "norm")
    with pytest.raises(ValueError, match="logit_norm must measure 'norm' once, and last"):
        evaluate(run, "--tasks=logit_norm")
    monkeypatch.setattr(LogitNorm, "options", {"--contexts": {"type": int}})
    with pytest.raises(ValueError, match="--contexts of logit_norm is declared otherwise by another evaluation"):
        evaluate(run)
    assert not Workdir(run).evaluations.exists()
