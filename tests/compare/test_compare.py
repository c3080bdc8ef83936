"""The verb: which runs are a group, what it says of them, and the files it leaves."""

import csv
import json

import numpy as np
import pytest

from deconstruct.cli import main
from tests.need import need

need("statsmodels", extra="compare")
need("matplotlib", extra="compare")
from deconstruct.compare.groups import read_runs  # noqa: E402
from deconstruct.compare.measures import read_measures  # noqa: E402
from deconstruct.evaluate.evaluation import EVALUATIONS, Evaluation  # noqa: E402
from tests.compare.made_runs import add_records, keep, made_run  # noqa: E402

HARD = np.random.default_rng(0).normal(5.0, 0.5, 40)


def losses(seed, shift=0.0):
    rng = np.random.default_rng(seed)
    return HARD + shift + rng.normal(0, 0.01) + rng.normal(0, 0.02, 40)


@pytest.fixture
def runs(tmp_path):
    """Three seeds of each: standard, one that is as good, and one that is 0.2 nats worse."""
    folder = tmp_path / "runs"
    for number, (variant, shift) in enumerate([("standard", 0.0), ("rnd_emb_qk", 0.0), ("mlp", 0.2)]):
        for seed in range(3):
            for context, gain in ((8, 0.0), (12, 0.1)):
                made_run(
                    folder / f"{variant}-{seed}",
                    losses=losses(10 * number + seed, shift) - gain,
                    context=context,
                    logged=[6.0, 5.5 + shift + 0.01 * seed],
                    variant=variant,
                    seed=seed,
                    log_every=1 + seed,  # says how a run is carried out, and makes no group
                )
    return folder


def compared(capsys, *words):
    assert main(["compare", *map(str, words)]) == 0
    return capsys.readouterr().out


def cells(text, label, nth):
    """The cells of the nth table row that begins with a label."""
    rows = [line for line in text.splitlines() if line.startswith(f"| {label} ")]
    return [cell.strip() for cell in rows[nth].strip("| ").split("|")]


def test_what_it_says(runs, tmp_path, capsys):
    bench = {"contexts": [256, 1024], "variants": {"standard": {"milliseconds": [1.0, 2.0]}}}
    (tmp_path / "bench").write_text(json.dumps(bench) + "\n")
    text = compared(capsys, runs, f"--output={tmp_path / 'out'}", f"--bench={tmp_path / 'bench'}")
    assert text.startswith("9 runs in 3 groups, which differ in variant; at step 4, matched by steps")
    assert cells(text, "mlp", 0)[1] == "3" and "±" in cells(text, "mlp", 0)[2]
    assert "verdict" in text and cells(text, "standard", 1)[-1] == "baseline"
    worse, same = cells(text, "mlp", 1), cells(text, "rnd_emb_qk", 1)
    assert "worse" in worse and float(worse[2]) == pytest.approx(0.2, abs=0.03) and worse[6] == "< 0.001"
    assert "no difference" in same and same[4].startswith("-") and same[5].split(" to ")[1].startswith("+")
    assert "Noise floor: seeds of one configuration have a standard deviation of 0.0" in text

    out = tmp_path / "out"
    names = {"comparison.md", "comparison.csv", "loss.png", "perplexity_by_context.png", "differences.png"}
    assert {file.name for file in out.iterdir()} == {
        *names, "principle_by_layout.png", "time_by_length.png"
    }  # fmt: skip
    assert text.split("\n\n")[1] in (out / "comparison.md").read_text()
    lines = list(csv.DictReader((out / "comparison.csv").open()))
    assert len(lines) == 2 * 3 and {line["items"] for line in lines} == {"40"}
    at_12 = {line["variant"]: line for line in lines if line["setting"] == "context=12"}
    assert at_12["mlp"]["verdict"] == "worse" and float(at_12["mlp"]["difference"]) == pytest.approx(0.2, abs=0.03)
    assert float(at_12["mlp"]["seeds_low"]) < float(at_12["mlp"]["items_low"])  # wider: it knows of the seeds


class Quiz(Evaluation):
    last = "acc_norm"


def test_right_and_wrong_answers(tmp_path, capsys, monkeypatch):
    """Of 20 questions the two answer eight otherwise, one of them rightly where the baseline does not: McNemar."""
    monkeypatch.setitem(EVALUATIONS, "quiz", f"{__name__}:Quiz")
    for variant, right in (("standard", [True] * 19 + [False]), ("mlp", [False] * 7 + [True] * 13)):
        run = made_run(tmp_path / variant, losses=losses(0), variant=variant)
        record = {"task": "quiz", "metric": "acc", "value": float(np.mean(right)), "skip": ""}
        items = [{"id": i, "logliks": [-1.0, -2.0], "acc": float(a)} for i, a in enumerate(right)]
        keep(run, last := {**record, "metric": "acc_norm"}, items, "4.quiz")  # any record of the task may name them
        add_records(run, [record, last])
    text = compared(capsys, tmp_path)
    assert "quiz, less standard (points of a hundred):" in text
    row = cells(text, "mlp", 2)
    assert row[2] == "-30.00" and row[5] == "0.070" and row[6] in ("no difference", "these runs worse")
    assert cells(text, "mlp", 0)[-1] == "65.00" and cells(text, "standard", 0)[-1] == "95.00"


def test_one_seed_each_says_what_it_cannot_know(runs, capsys):
    text = compared(capsys, runs / "mlp-0", runs / "standard-0")
    assert "these runs worse" in text and "Noise floor: unknown" in text
    text = compared(capsys, runs / "mlp-0", runs / "mlp-1")  # one group: there is nothing to compare
    assert "2 runs in 1 groups, which differ in nothing but the seed" in text and "verdict" not in text
    # Another baseline, and a group that has seeds when the others have none.
    text = compared(capsys, runs / "mlp-0", runs / "standard-0", runs / "standard-1", "--baseline=variant=mlp")
    assert "better" in cells(text, "standard", 1)


def test_runs_whose_items_were_not_kept_are_compared_over_seeds(tmp_path, capsys):
    for variant, shift in (("standard", 0.0), ("mlp", 0.2)):
        for seed in range(3):
            made_run(
                tmp_path / f"{variant}{seed}",
                losses=3.0 + shift + 0.01 * seed,
                keep_items=False,
                variant=variant,
                seed=seed,
            )
    row = cells(compared(capsys, tmp_path), "mlp", 1)
    assert row[4] == "" and row[5] == "+0.1773 to +0.2227" and "worse" in row  # 0.2 and 2.776 x 0.01 sqrt(2 / 3)


def test_matched_by_steps_tokens_flops_and_seconds(tmp_path, capsys):
    """A run of twice the batch has had as many tokens after half of the steps."""
    for name, batch, last in (("small", 8, 8), ("large", 16, 8)):
        for step in (2, 4, 8):
            made_run(
                tmp_path / name,
                losses=6.0 - step * batch / 100,
                step=step,
                logged=[6.0] * last,
                batch_size=batch,
                steps=8,
            )
    for match, large in (("steps", 8), ("tokens", 4), ("flops", 4), ("seconds", 8), ("end", 8)):
        text = compared(capsys, tmp_path, f"--match={match}", "--baseline=batch_size=8")
        gap = (8 * 8 - large * 16) / 100
        assert cells(text, "batch_size=16", 1)[2] == f"{gap:+.4f}", match
    made_run(tmp_path / "short", losses=5.0, step=3, steps=3)
    assert main(["compare", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "deconstruct compare: --match=steps: all runs have had 3 steps, and large was not evaluated near that; "
        f"`deconstruct evaluate --workdir={tmp_path / 'large'} --step=3` (or the checkpoint next to it, or --step=all) "
        "does so; --match=end takes the last of each\n"
    )
    assert main(["compare", str(tmp_path / "short"), "--match=seconds"]) == 2
    assert "metrics.jsonl does not say how long its steps took" in capsys.readouterr().err


def test_the_best_learning_rate_of_each(tmp_path, capsys):
    """standard is best in the middle of the sweep, mlp at its edge."""
    for rate, standard, mlp in ((1e-3, 0.2, 0.5), (2e-3, 0.0, 0.4), (4e-3, 0.1, 0.3)):
        for variant, shift in (("standard", standard), ("mlp", mlp)):
            for seed in (0, 1):
                made_run(
                    tmp_path / "runs" / f"{variant}{rate}{seed}",
                    losses=losses(seed, shift),
                    variant=variant,
                    learning_rate=rate,
                    seed=seed,
                )
    text = compared(capsys, tmp_path / "runs", "--best-over=learning_rate", f"--output={tmp_path / 'out'}")
    assert text.startswith("4 runs in 2 groups, which differ in variant, learning_rate")
    assert "| standard      |              0.002 |" in text and "at the edge: widen the sweep" in cells(text, "mlp", 0)
    assert cells(text, "mlp, learning_rate=0.004", 1)[2].startswith("+0.30")
    assert (tmp_path / "out" / "best.png").exists()


def test_mistakes(runs, tmp_path, capsys):
    def refused(*words):
        assert main(["compare", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1
        return err.removeprefix("deconstruct compare: ").strip()

    assert refused(runs, "--baseline=mlp") == "--baseline=mlp: expected KEY=VALUE,..., such as variant=standard"
    assert refused(runs, "--baseline=variant=window").startswith("--baseline=variant=window: fits 0 groups, and should")
    assert refused(runs, "--best-over=steps") == "--best-over=steps: is the same in all runs; variant differs"
    assert refused(runs, "--best-over=variant") == "--best-over=variant: standard is no number"
    assert refused(runs, f"--bench={tmp_path / 'no'}") == f"--bench={tmp_path / 'no'}: there is no such file"
    (tmp_path / "bench").write_text('{"case": 1}\n')
    assert "holds nothing of `deconstruct bench contexts --json`" in refused(runs, f"--bench={tmp_path / 'bench'}")
    twin = made_run(tmp_path / "twin", losses=losses(0), variant="mlp", context=12)
    assert "are of one configuration and one seed (0); leave one of them out" in refused(runs, twin)
    (fresh := tmp_path / "fresh").mkdir()
    (fresh / "config.json").write_text((twin / "config.json").read_text())
    assert refused(fresh) == f"{fresh}: not evaluated yet; `deconstruct evaluate` does so"
    # Other texts, and what was not measured alike.
    other = made_run(tmp_path / "other", losses=losses(0), context=16)
    assert refused(twin, other).startswith("nothing was measured of all runs alike; `deconstruct evaluate --workdir=")


def test_a_file_that_one_variant_needs_makes_no_group_of_its_own(tmp_path, capsys):
    made_run(tmp_path / "a", losses=losses(0))
    made_run(tmp_path / "b", losses=losses(1), variant="temperature", extensions="examples/temperature.py")
    text = compared(capsys, tmp_path)
    assert "2 runs in 2 groups, which differ in variant;" in text
    assert cells(text, "temperature", 0)[:2] == ["temperature", "1"]


def test_another_text_is_not_paired(runs, tmp_path, capsys):
    import gzip

    path = runs / "mlp-0" / "eval_items" / "4.perplexity.context_12.skip_.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    rows[3]["tokens"] += 1
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert main(["compare", str(runs)]) == 2
    assert "were not measured on the same text or questions; compare them apart" in capsys.readouterr().err


@pytest.mark.parametrize(("documents", "items"), [(20, 20), (19, 38)])
def test_pieces_of_a_document_go_together_where_there_are_enough_documents(tmp_path, documents, items):
    run = made_run(tmp_path / "run", losses=3.0, keep_items=False)
    pieces = [{"id": i, "logliks": [-float(n)], "tokens": n} for n in (3, 5) for i in range(documents)]
    record = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    keep(run, record, pieces, "4")
    add_records(run, [record])
    ((measure, found),) = read_measures(read_runs([str(run)])[0], 4).items()
    assert measure.setting == (("context", 8),) and len(found.items) == len(set(found.items)) == items
    assert found.weights.sum() == found.values.sum() == 8 * documents
    assert found.weights.tolist() == ([8.0] * 20 if documents == 20 else [3.0, 5.0] * 19)


def test_without_its_packages_it_says_how_to_get_them(runs, capsys, monkeypatch):
    monkeypatch.setattr("deconstruct.compare.command.PACKAGES", ("scipy", "no_such_package"))
    assert main(["compare", str(runs)]) == 2
    assert capsys.readouterr().err == "deconstruct compare: needs no_such_package; pip install 'deconstruct[compare]'\n"
