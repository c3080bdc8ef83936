"""The harness's tasks by our model and by the harness's own, of the same weights: the same numbers, item by item."""

import contextlib
import dataclasses
import gzip
import io
import json
import math
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from deconstruct.cli import main
from deconstruct.data import tokenizer
from deconstruct.distributed.mesh import single_device_mesh
from deconstruct.evaluate.evaluation import EVALUATIONS, HARNESS_TASKS
from deconstruct.evaluate.harness import TASKS
from deconstruct.interop.export_checkpoint import export_checkpoint
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.restore import restore_model
from deconstruct.run.workdir import Workdir
from tests.evaluate.task_items import ITEMS, QUESTIONS, SPLITS, write_items
from tests.interop.made import make_config, make_workdir
from tests.need import need

need("lm_eval", "torch", "transformers", extra="eval and peers")
pytestmark = pytest.mark.proof

LENGTH = 64  # tokens: shorter than most prompts here, so that some are cut and pages take several windows


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """workdir/ of a random Qwen2 with a byte-level tokenizer, its export/, and data/ of the nine tasks."""
    folder = tmp_path_factory.mktemp("harness")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([json.dumps(ITEMS), *(q for q, _, _ in QUESTIONS)], trainer)
    config = make_config({"vocab_size": 300, "num_layers": 2}, sequence_length=LENGTH)
    workdir = make_workdir(folder / "workdir", config)
    (folder / "workdir" / "tokenizer").mkdir()
    made.save(str(folder / "workdir" / "tokenizer" / "tokenizer.json"))
    export_checkpoint(workdir, folder / "export")
    write_items(folder / "data")
    return folder


def evaluate(workdir, *words):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["evaluate", f"--workdir={workdir}", *words]) == 0
    return [line for line in out.getvalue().splitlines() if line.startswith("step ")]


@pytest.fixture(scope="module")
def measured(folder):
    """The nine tasks by the verb: the records by task and metric, and the items by task."""
    lines = evaluate(folder / "workdir", f"--tasks={','.join(HARNESS_TASKS)}", f"--task-data={folder / 'data'}")
    assert len(lines) == 9
    records = {(r["task"], r["metric"]): r for r in read_jsonl(Workdir(folder / "workdir").evaluations)}
    items = {}
    for record in records.values():
        if "items_file" in record:
            lines = gzip.decompress((folder / "workdir" / record["items_file"]).read_bytes()).decode().splitlines()
            items[record["task"]] = [json.loads(line) for line in lines]
    return records, items


def test_the_same_numbers_as_the_harness_own_model(folder, measured, monkeypatch):
    import torch
    import transformers
    from lm_eval.evaluator import evaluate as their_evaluate
    from lm_eval.models.huggingface import HFLM

    from deconstruct.evaluate.harness import _load

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    torch.set_num_threads(1)
    peer = HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "export" / "tokenizer.json"), eos_token="<|endoftext|>"
        ),
        max_length=LENGTH,
        batch_size=3,
        device="cpu",
    )
    records, items = measured
    tasks = {name: _load(name, str(folder / "data"))[0] for name in TASKS}
    results = their_evaluate(peer, {"tasks": tasks, "groups": {}, "group_map": {}}, bootstrap_iters=10)
    worst = 0.0
    for name in TASKS:
        theirs = results["samples"][name]
        assert [item["id"] for item in items[name]] == [sample["doc_id"] for sample in theirs]
        for ours, sample in zip(items[name], theirs, strict=True):
            logliks = [x[0] if isinstance(x, tuple) else x for x in sample["filtered_resps"]]
            worst = max(worst, *np.abs(np.subtract(ours["logliks"], logliks)))
            for metric in ("acc", "acc_norm"):
                assert ours.get(metric) == sample.get(metric)
        found = results["results"][name]
        for metric in tasks[name].aggregation():
            record = records[name, metric]
            near = 0 if metric.startswith("acc") else 1e-4
            assert record["value"] == pytest.approx(found[f"{metric},none"], rel=near, abs=0), (name, metric)
            assert record["items"] == len(theirs) and record["harness"] and record["data"]
            assert record["split"] == SPLITS.get(name, "validation")
            assert (record["stderr"] is None) == (found[f"{metric}_stderr,none"] == "N/A")
    print(f"largest difference of a log-likelihood: {worst:.1e}")
    assert worst < 1e-3  # the contract: sums over tokens in float32, some of them -200


def test_results_do_not_hang_on_batches_and_lengths(folder):
    from lm_eval.api.instance import Instance

    from deconstruct.evaluate.harness_model import HarnessModel

    model, text = restore_model(folder / "workdir"), tokenizer.load(folder / "workdir" / "tokenizer")
    pairs = [(f"Question: {q}\nAnswer:", f" {c}") for q, choices, _ in QUESTIONS for c in choices]
    pairs += [("", "fog"), ("the lamp ", "is lit" * 9), ("long " * 90, "ship")]
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    pages = [Instance("loglikelihood_rolling", {}, (row["page"],), n) for n, row in enumerate(ITEMS["wikitext"])]
    found = []
    for tokens_per_batch, lengths in ((1 << 14, None), (LENGTH, None), (3 * LENGTH, [48, LENGTH])):
        harness_model = HarnessModel(text, LENGTH, single_device_mesh(), tokens_per_batch)
        harness_model.model = model
        harness_model._lengths = lengths or harness_model._lengths
        found.append(
            (harness_model.loglikelihood(asked, disable_tqdm=True), harness_model.loglikelihood_rolling(pages))
        )
    for answers, texts in found[1:]:
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in found[0][0]]
        # float32 products in batches of another shape
        np.testing.assert_allclose([x for x, _ in answers], [x for x, _ in found[0][0]], rtol=1e-5)
        np.testing.assert_allclose(texts, found[0][1], rtol=1e-5)
    # Against every logit of the page in one window after the other, by hand.
    tokens = [text.end_of_text, *text.encode(ITEMS["wikitext"][1]["page"])]
    assert len(tokens) < LENGTH
    logits = np.asarray(jax.jit(lambda tokens: model(tokens))(jnp.array([tokens[:-1]])), np.float64)[0]
    nats = sum(row[token] - np.log(np.exp(row).sum()) for row, token in zip(logits, tokens[1:], strict=True))
    assert found[0][1][1] == pytest.approx(nats, rel=1e-5)


def test_greedy_text_is_what_the_logits_say(folder):
    from lm_eval.api.instance import Instance

    from deconstruct.evaluate.harness_model import HarnessModel

    model, text = restore_model(folder / "workdir"), tokenizer.load(folder / "workdir" / "tokenizer")
    harness_model = HarnessModel(text, LENGTH, single_device_mesh())
    harness_model.model = model
    prompt = text.encode("the captain of the ship")
    tokens, forward = list(prompt), jax.jit(lambda tokens: model(tokens))
    for _ in range(9):
        padded = np.pad(tokens, (0, LENGTH - len(tokens)))[None]
        tokens.append(int(forward(padded)[0, len(tokens) - 1].argmax()))
    expected = text.decode(tokens[len(prompt) :])
    assert text.end_of_text not in tokens

    def generate(**settings):
        return harness_model.generate_until([Instance("generate_until", {}, (text.decode(prompt), settings), 0)])[0]

    assert generate(until=[], max_gen_toks=9) == expected
    stop = expected[4:6]
    assert generate(until=[stop, "never there"], max_gen_toks=9) == expected.partition(stop)[0]


def test_the_ledger(folder, measured, tmp_path):
    records, items = measured
    assert {task for task, _ in records} == set(HARNESS_TASKS) == set(TASKS) <= set(EVALUATIONS)
    accuracy = records["arc_easy", "acc"]
    values = [item["acc"] for item in items["arc_easy"]]
    assert accuracy["value"] == np.mean(values) and (accuracy["limit"], accuracy["items"]) == (0, 4)
    assert accuracy["stderr"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(4))
    assert records["arc_easy", "acc_norm"]["items_file"] == f"eval_items/3.arc_easy.data_{accuracy['data']}.jsonl.gz"
    words = ("--tasks=arc_easy,wikitext", f"--task-data={folder / 'data'}")
    assert evaluate(folder / "workdir", *words) == []  # never twice
    (line,) = evaluate(folder / "workdir", "--tasks=arc_easy", f"--task-data={folder / 'data'}", "--limit=3")
    assert "arc_easy  acc " in line and "limit 3" in line
    other = write_items(tmp_path / "other", ["arc_easy"])
    file = other / "arc_easy" / "validation.jsonl"
    file.write_text(file.read_text().replace("sea", "lake"))
    assert len(evaluate(folder / "workdir", "--tasks=arc_easy", f"--task-data={other}")) == 1  # other data


def test_mistakes(folder, tmp_path, capsys, monkeypatch):
    data = write_items(tmp_path / "data", ["copa", "piqa"])
    (data / "copa" / "validation.jsonl").rename(data / "copa" / "train.jsonl")
    (data / "piqa" / "validation.jsonl").write_text('{"goal": "to stop"}\n')

    def refused(*words):
        capsys.readouterr()
        assert main(["evaluate", f"--workdir={folder / 'workdir'}", *words]) == 2
        said = capsys.readouterr().err
        assert said.count("deconstruct evaluate: ") == 1
        return said[said.index("deconstruct evaluate: ") :].removeprefix("deconstruct evaluate: ").strip()

    assert refused("--tasks=copa", f"--task-data={data}") == (
        f"--task-data={data}: copa needs {data / 'copa' / 'validation.jsonl'}, in the columns of the task on the hub"
    )
    assert refused("--tasks=piqa", f"--task-data={data}").startswith(f"--task-data={data}: piqa cannot be loaded: ")
    assert refused("--tasks=copa", f"--task-data={tmp_path / 'x'}").endswith("there is no such folder")
    assert refused("--tasks=copa", "--limit=-1") == "--limit=-1: must not be negative; 0 takes all"
    assert "; --task-data=DIR reads files instead" in refused("--tasks=copa")  # the hub is not reached here
    fewer = shutil.copytree(folder / "workdir", tmp_path / "fewer")
    config = Workdir(fewer).read_config()
    Workdir(fewer).write_config(config.replace(model=dataclasses.replace(config.model, vocab_size=200)))
    capsys.readouterr()
    assert main(["evaluate", f"--workdir={fewer}", "--tasks=boolq", f"--task-data={folder / 'data'}"]) == 2
    assert "its tokenizer has 300 ids, and the model 200" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert refused("--tasks=copa") == "--tasks=copa: needs the extra eval (lm_eval): pip install 'deconstruct[eval]'"
