"""The evaluator reads a workdir and keeps a ledger: nothing twice, nothing half, whatever happens beside it."""

import contextlib
import dataclasses
import io
import json
import shutil
import threading
import time

import pytest

from deconstruct.cli import VERBS, Parser
from deconstruct.data.manifest import load_manifest
from deconstruct.data.pipeline import Windows
from deconstruct.evaluate import follower
from deconstruct.evaluate.ledger import read_items
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError
from tests.evaluate.conftest import prepare_text

assert VERBS["evaluate"][0] == follower.__name__


def arguments(workdir, *words):
    parser = Parser()
    follower.add_arguments(parser)
    return parser.parse_args([f"--workdir={workdir}", "--poll=0.02", *words])


def evaluate(workdir, *words):
    """The verb. Returns what it printed, one line a measurement."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert follower.run(arguments(workdir, *words)) == 0
    return out.getvalue().splitlines()


def ledger(workdir):
    return read_jsonl(Workdir(workdir).evaluations)


def values(workdir, **where):
    return {
        (r["step"], r["context"]): r["value"]
        for r in ledger(workdir)
        if r["metric"] == "perplexity" and all(r[key] == value for key, value in where.items())
    }


def test_the_latest_step_at_several_contexts_and_never_twice(run, prepared):
    run_dir = Workdir(run)
    printed = evaluate(run, "--contexts=16,32")
    assert len(printed) == 2 and printed[0].startswith("step 6  context 16  perplexity ")
    records = ledger(run)
    assert [(r["step"], r["context"], r["metric"]) for r in records] == [
        (6, 16, "nll"), (6, 16, "perplexity"), (6, 32, "nll"), (6, 32, "perplexity"),
    ]  # fmt: skip
    tokens = load_manifest(prepared).validation.rows * 32
    assert {r["tokens"] for r in records} == {tokens} and len(Windows(prepared, "validation", 32)) * 32 == tokens
    first = records[0]
    constant = {"task": "perplexity", "text": "validation", "skip": "", "windows": "non-overlapping"}
    assert constant.items() <= first.items()
    assert (first["stride"], first["max_tokens"]) == (16, 0)
    found = values(run)
    assert found[6, 32] < 200  # of 300 pieces: it has learned something of this text

    check_items(run, records, load_manifest(prepared).validation.documents)

    before = run_dir.evaluations.read_text()
    assert evaluate(run, "--contexts=16,32") == []
    assert run_dir.evaluations.read_text() == before

    # A crash in the middle of a line, and one between nll and perplexity: what is missing is measured, once.
    lines = before.splitlines(keepends=True)
    run_dir.evaluations.write_text("".join(lines[:3]) + lines[3][:25])
    assert len(evaluate(run, "--contexts=16,32")) == 1
    assert values(run) == found
    assert run_dir.evaluations.read_text().splitlines(keepends=True)[:3] == lines[:3]
    assert all(json.loads(line) for line in run_dir.evaluations.read_text().splitlines())

    # Another setting is another record: a text, a stride, a number of tokens.
    text = run / "own.txt"
    text.write_text("the fog under the sea, said the captain\n" * 3)
    printed = evaluate(run, f"--text={text}", "--windows=sliding", "--stride=3", "--contexts=16", "--max-tokens=40")
    assert len(printed) == 1 and "(40 tokens of own.txt:" in printed[0] and "sliding by 3" in printed[0]
    last = ledger(run)[-1]
    assert (last["stride"], last["max_tokens"], last["tokens"], last["windows"]) == (3, 40, 40, "sliding")
    text.write_text("another text of the same name, and so not the same measurement\n" * 3)
    assert len(evaluate(run, f"--text={text}", "--contexts=16", "--max-tokens=40")) == 1


def check_items(run, records, count):
    """The losses of documents add up to the ledger's, and are of the same documents at every context."""
    documents = []
    for nll, last in (records[:2], records[2:]):
        items = read_items(run / last["items_file"])
        tokens = [item["tokens"] for item in items]
        assert sum(tokens) == nll["tokens"] and "items_file" not in nll
        # Each is rounded to 1e-4 nats.
        assert -sum(item["logliks"][0] for item in items) / sum(tokens) == pytest.approx(nll["value"], abs=1e-5)
        documents.append([(item["id"], item["tokens"]) for item in items])
    assert documents[0] == documents[1]
    assert abs(len(documents[0]) - count) <= 1  # the rows may end within the last document


class Deleting(io.StringIO):
    """A standard output during whose first line a checkpoint is deleted."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def write(self, text):
        shutil.rmtree(self.folder, ignore_errors=True)
        return super().write(text)


def test_follow_survives_a_checkpoint_deleted_under_it_and_ignores_what_is_not_finished(run):
    """4 is deleted when it has been seen and 2 is being evaluated; two folders look almost like checkpoints."""
    checkpoints = Workdir(run).checkpoints
    shutil.copytree(checkpoints / "2", checkpoints / "3.orbax-checkpoint-tmp")
    (checkpoints / "5" / "model").mkdir(parents=True)
    with contextlib.redirect_stdout(Deleting(checkpoints / "4")) as out:
        assert follower.run(arguments(run, "--follow")) == 0
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["2", "6"]
    assert set(values(run)) == {(2, 32), (6, 32)}
    assert values(run)[6, 32] < values(run)[2, 32]  # it was learning


def test_follow_waits_for_a_run_that_has_not_begun_and_ends_with_it(trained, tmp_path):
    """Nothing is there at first; then the configuration, and one checkpoint after the other, the last of them last."""
    workdir = tmp_path / "later"
    moments = []

    def trainer():
        time.sleep(0.1)
        workdir.mkdir()
        for name in ("tokenizer", "config.json"):
            copy = shutil.copytree if (trained / name).is_dir() else shutil.copy
            copy(trained / name, workdir / name)
        for step in (2, 6):
            time.sleep(0.1)
            unfinished = workdir / "checkpoints" / f"{step}.orbax-checkpoint-tmp"
            shutil.copytree(trained / "checkpoints" / str(step), unfinished)
            moments.append((step, ledger(workdir)))
            unfinished.rename(unfinished.with_name(str(step)))

    thread = threading.Thread(target=trainer)
    thread.start()
    printed = evaluate(workdir, "--follow")
    thread.join()
    assert [line.split()[1] for line in printed] == ["2", "6"]
    assert moments[0] == (2, [])
    assert all(record["step"] == 2 for record in moments[1][1])


def test_follow_yields_each_step_once_oldest_first(run):
    assert list(follower.follow(Workdir(run), 0.01)) == [2, 4, 6]
    # A run that is to go on is followed further: 6 is not its last step any more.
    config = Workdir(run).read_config()
    Workdir(run).write_config(config.replace(steps=8))
    steps = follower.follow(Workdir(run), 0.01)
    assert [next(steps) for _ in range(3)] == [2, 4, 6]
    checkpoints = Workdir(run).checkpoints
    threading.Timer(0.05, shutil.copytree, (checkpoints / "6", checkpoints / "8")).start()
    assert list(steps) == [8]


@pytest.mark.proof
def test_skipping_gives_other_numbers(run, fixed):
    numbers = {}
    for words in ((), ("--skip",), ("--skip=mixer",)):
        (line,) = evaluate(run, *words)
        assert ("skip" in line) == bool(words)
        numbers[words] = values(run, skip={(): "", ("--skip",): "block", ("--skip=mixer",): "mixer"}[words])[6, 32]
    assert len(set(numbers.values())) == 3
    assert min(numbers.values()) == numbers[()]  # the trained model is better whole
    # Without its layers over a fixed stream a model has no fixed stream, and takes any context.
    copy = shutil.copytree(fixed, run / "fixed")
    with pytest.raises(UserError, match=r"--contexts=40: the fixed stream \(fixed_random\) .* only 32 positions"):
        evaluate(copy, "--contexts=40")
    assert len(evaluate(copy, "--contexts=40", "--skip")) == 1


def test_skipping_all_of_a_uniform_model_is_refused(run):
    config = Workdir(run).read_config()
    model = dataclasses.replace(config.model, layers=("non_approximate",) * 2)
    Workdir(run).write_config(config.replace(layout="uniform", model=model))
    with pytest.raises(UserError, match=r"--skip removes every layer that is not standard"):
        evaluate(run, "--skip")
    assert not Workdir(run).evaluations.exists()


def test_other_data_is_refused_and_moved_data_is_not(run, prepared, tmp_path):
    other = prepare_text(tmp_path / "other", 1)
    now, then = (load_manifest(folder).fingerprint[:12] for folder in (other, prepared))
    with pytest.raises(UserError, match=rf"--data=.*other.*: its fingerprint is {now}, the run was trained on {then}"):
        evaluate(run, f"--data={other}")
    moved = shutil.copytree(prepared, tmp_path / "moved")
    assert len(evaluate(run, f"--data={moved}", "--max-tokens=8")) == 1
    assert ledger(run)[-1]["text"] == "validation"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step=3"], r"no checkpoint of step 3 in .*; finished steps: 2, 4, 6"),
        (["--contexts=16,x"], r"--contexts=16,x: expected lengths in tokens, such as 128,256,512"),
        (["--contexts=0"], r"--contexts=0: expected lengths in tokens"),
        (["--stride=4"], r"--stride=4: non-overlapping windows have none; add --windows=sliding"),
        (["--windows=sliding", "--stride=33"], r"--stride=33: expected 1 to the context, 32"),
        (["--windows=sliding", "--stride=0"], r"--stride=0: expected 1 to the context, 32"),
        (["--text=gone.txt"], r"--text=gone.txt: there is no such file"),
        (["--data=gone"], r"gone: no prepared data here"),
        (["--max-tokens=-1"], r"--max-tokens=-1: must not be negative"),
        (["--follow", "--step=2"], r"--follow evaluates every step; leave --step out"),
    ],
)
def test_mistakes(trained, words, message):
    with pytest.raises(UserError, match=message):
        evaluate(trained, *words)
    assert not Workdir(trained).evaluations.exists()


def test_texts_that_are_none(run):
    binary, empty = run / "binary", run / "empty.txt"
    binary.write_bytes(b"fine until \xff here")
    empty.write_text("")
    with pytest.raises(UserError, match=r"--text=.*binary: not UTF-8 at byte 11"):
        evaluate(run, f"--text={binary}")
    with pytest.raises(UserError, match=r"the text has [01] tokens; two are needed to score one"):
        evaluate(run, f"--text={empty}")


def test_a_workdir_without_a_checkpoint(run):
    shutil.rmtree(Workdir(run).checkpoints)
    with pytest.raises(UserError, match=r"/run: no finished checkpoint there yet"):
        evaluate(run)
