"""An imported workdir is one like any other: `train` starts from it, `evaluate` measures it."""

import json
import math

import numpy as np
import pytest

from deconstruct.cli import main
from deconstruct.data.prepare import PrepareOptions, prepare
from deconstruct.experiment import load_config
from deconstruct.interop.export_checkpoint import export_checkpoint
from deconstruct.interop.huggingface import flat
from deconstruct.interop.import_checkpoint import import_checkpoint
from deconstruct.run import checkpoint
from deconstruct.run.checksums import sign, unsigned
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.restore import restore_model
from deconstruct.run.workdir import Workdir
from deconstruct.train.loop import train
from deconstruct.types import UserError
from tests.interop.made import arrays_of, make_config, make_workdir
from tests.tiny import quick

STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """prepared/ with a tokenizer.json of 40 ids, and export/ with the same and a vocabulary of 50."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    folder = tmp_path_factory.mktemp("train")
    letters = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz .\n0123456789"[:39]]
    made = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    draw = np.random.default_rng(0)
    texts = folder / "texts"
    texts.mkdir()
    for i in range(12):
        (texts / f"{i}.txt").write_text(" ".join(draw.choice(["fog", "sea", "ship", "lamp"], 30)) + "\n")
    options = {"row_length": 12, "validation_fraction": 0.2, "workers": 1, "tokenizer": str(folder / "tokenizer.json")}
    prepare(PrepareOptions(input=(str(texts),), output=str(folder / "prepared"), **options))
    model = {"vocab_size": 50, "num_layers": 2, "block": "qwen3", "head_dim": 6}  # 4 heads in a width of 16
    export_checkpoint(make_workdir(folder / "workdir", make_config(model)), folder / "export")
    (folder / "export" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return folder


def run_config(workdir, data, **changes):
    settings = {"batch_size": 8, "steps": STEPS, "log_every": 1, "checkpoint_every": 2, "optimizer.warmup_steps": 1}
    return load_config(f"configs/workdir.py:{workdir}", **{**settings, "data": str(data), **changes})


@pytest.mark.proof
@pytest.mark.parametrize("variant", quick(["standard", "fixed_seq_qk"], ["standard"]))
def test_train_starts_from_an_import(folder, tmp_path, variant):
    options = {} if variant == "standard" else {"layout": "even", "variant": variant}
    import_checkpoint(folder / "export", tmp_path / "w", **options, seed=3)
    before = flat(arrays_of(restore_model(tmp_path / "w")))
    config = run_config(tmp_path / "w", folder / "prepared", learning_rate=1e-9, sequence_length=12)
    assert train(config, tmp_path / "w") == 0
    assert checkpoint.finished_steps(tmp_path / "w" / "checkpoints") == [0, STEPS]
    after = flat(arrays_of(restore_model(tmp_path / "w")))
    for name, x in before.items():
        if name == "frozen/fixed":
            assert not np.array_equal(x, after[name])  # the first tokens of the data, no longer random ones
        else:  # two updates of at most 1e-9 each
            np.testing.assert_allclose(after[name], x, atol=1e-8, err_msg=name)
    assert [record["step"] for record in read_jsonl(Workdir(tmp_path / "w").metrics)] == [1, 2]
    # The trained workdir goes on as any run does, and out again with its hybrid's own text.
    assert train(run_config(tmp_path / "w", folder / "prepared"), tmp_path / "w") == 0
    export_checkpoint(tmp_path / "w", tmp_path / "out")
    import_checkpoint(tmp_path / "out", tmp_path / "again")
    left, right = (flat(arrays_of(restore_model(tmp_path / name))) for name in ("w", "again"))
    for name, x in left.items():
        rows = 50 if name == "params/embed/embedding" else len(x)
        np.testing.assert_array_equal(x[:rows], right[name][:rows], err_msg=name)


def test_what_an_import_does_not_go_with(folder, tmp_path):
    import_checkpoint(folder / "export", tmp_path / "w")
    with pytest.raises(UserError, match=r"config.model.num_layers=3, but this workdir holds a run with 2"):
        train(run_config(tmp_path / "w", folder / "prepared", **{"model.num_layers": 3}), tmp_path / "w")
    meta_file = tmp_path / "w" / "checkpoints" / "0" / "meta" / "data.json"
    meta, sums = unsigned(json.loads(meta_file.read_text()))
    meta_file.write_text(json.dumps(sign({**meta, "tokenizer": "f" * 64}, sums)))
    with pytest.raises(UserError, match=r"its tokenizer is .*, the checkpoint was trained with ffffffffffff"):
        train(run_config(tmp_path / "w", folder / "prepared"), tmp_path / "w")


def test_the_verbs(folder, tmp_path, capsys):
    w, out = str(tmp_path / "w"), str(tmp_path / "out")
    export = str(folder / "export")
    assert main(["import", f"--checkpoint={export}", f"--workdir={w}", "--layout=even", "--variant=mlp"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("imported ") and any(line.startswith("initialised  layer 1 (mlp)") for line in said)
    assert main(["evaluate", f"--workdir={w}", f"--data={folder / 'prepared'}", "--contexts=12"]) == 0
    perplexity = [r["value"] for r in read_jsonl(Workdir(w).evaluations) if r["metric"] == "perplexity"]
    assert len(perplexity) == 1 and math.isfinite(perplexity[0])
    assert main(["export", f"--workdir={w}", f"--output={out}", "--dtype=bfloat16"]) == 0
    assert "transformers cannot run this model (layers 1 mlp)" in capsys.readouterr().out
    for words, message in (
        (["import", f"--checkpoint={export}", f"--workdir={w}"], "exists and is not an empty folder"),
        (["import", "--checkpoint=nowhere", f"--workdir={w}2"], "--checkpoint=nowhere: there is no such folder"),
        (["export", f"--workdir={w}", f"--output={w}2", "--step=7"], "no checkpoint of step 7"),
        (["evaluate", f"--workdir={w}"], "an imported model names no data; give --data or --text"),
    ):
        assert main(words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0], lines
