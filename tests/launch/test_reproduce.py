"""The reproduction: what it would run and how long, and that the same command goes on where it was."""

import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deconstruct.run.jsonl import read_jsonl
from tests.need import need
from tests.tiny import CONFIG_FILE

need("statsmodels", extra="compare")
WORDS = ["fog", "sea", "ship", "under", "lamp", "harbour", "captain", "slowly", "said", "never", "rope"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def reproduce(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "launch" / "reproduce.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "size", ["cpu", pytest.param("gpu", marks=pytest.mark.proof), pytest.param("paper", marks=pytest.mark.proof)]
)
def test_what_it_would_do(reproduce, tmp_path, capsys, monkeypatch, size):
    if size == "cpu":  # fewer files to read
        monkeypatch.setattr(reproduce, "VARIANTS", "mlp")
    assert reproduce.main([f"--size={size}", f"--output={tmp_path / 'out'}", "--seeds=1", "--dry-run"]) == 0
    first, *commands = capsys.readouterr().out.splitlines()
    runs = 11 + 6 if size == "cpu" else 21 + 16
    assert re.fullmatch(
        rf"{runs} runs, {runs} to go: about [\d:]+ one after the other \(.* FLOPs at .*, which is a guess\)", first
    )
    assert [command.split()[:2] for command in commands] == [
        ["deconstruct", "prepare"], *[["launch/sweep.py", command.split()[1]] for command in commands[1:4]],
        ["deconstruct", "evaluate"],
        ["deconstruct", "prepare"], *[["launch/sweep.py", command.split()[1]] for command in commands[6:8]],
        ["deconstruct", "evaluate"], ["deconstruct", "report"],
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_quarter_of_the_layers_is_not_the_last_one(reproduce):
    """In the models of every size: the two layouts are compared with each other."""
    from deconstruct.experiment import load_config

    for size in reproduce.SIZES.values():
        both = {
            load_config(_spec(reproduce, size, layout), arguments=[*size.overrides, "--config.data="]).model.layers
            for layout in ("quarter", "last")
        }
        assert len(both) == 2


def _spec(reproduce, size, layout):
    file, _, given = size.config.partition(":")
    return f"{reproduce.CONFIGS / file}:{','.join(filter(None, [given, 'variant=mlp', f'layout={layout}']))}"


def test_mistakes(reproduce, tmp_path, capsys):
    assert reproduce.main(["--size=cpu", f"--output={tmp_path}", "--seeds=0"]) == 2
    assert capsys.readouterr().err == "reproduce.py: --seeds=0: must be at least 1\n"


@pytest.mark.proof
def test_from_text_to_the_page_and_again(tmp_path, environment):
    """A study of four tiny runs on text and four of recall, by the script itself; its second call trains and evaluates
    nothing."""
    (text := tmp_path / "texts").mkdir()
    draw = random.Random(0)
    for number in range(200):
        (text / f"{number}.txt").write_text(" ".join(draw.choices(WORDS, k=60)) + "\n")
    config = CONFIG_FILE.replace('{"variant": "standard"}', '{"variant": "standard", "layout": "uniform"}')
    (tmp_path / "tiny.py").write_text(config)
    (tmp_path / "recall.py").write_text(config)
    script = tmp_path / "reproduce_tiny.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'launch')!r})\n"
        "import reproduce as r\nfrom pathlib import Path\n"
        f"r.CONFIGS, r.VARIANTS, r.LAYOUTS = Path({str(tmp_path)!r}), 'mlp', 'odd'\n"
        "r.STATES = 'hidden/window(size=4)'\n"
        "r.RECALL = r.parse_recall('recall:mqar(pairs=2,queries=3,keys=4,values=4,length=11,documents=200)')\n"
        "r.SIZES = {'cpu': r.Size('tiny.py', ('--config.sequence_length=16',), 300, 32, '8,16', 1e9, 1.0)}\n"
        "sys.exit(r.main(sys.argv[1:]))\n"
    )
    command = [
        sys.executable,
        str(script),
        "--size=cpu",
        f"--output={tmp_path / 'out'}",
        f"--input={text}",
        "--seeds=1",
    ]
    first = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("8 runs, 8 to go: about ") and "report.html" in first.stdout
    recalled = [read_jsonl(ledger) for ledger in (tmp_path / "out" / "recall").glob("*/eval.jsonl")]
    assert len(recalled) == 4 and all({record["task"] for record in found} == {"recall"} for found in recalled)
    assert "## Recall" in (tmp_path / "out" / "report" / "report.md").read_text()
    ledgers = sorted((tmp_path / "out" / "runs").glob("*/eval.jsonl"))
    records = [read_jsonl(ledger) for ledger in ledgers]
    of_perplexity = [sum(record["task"] == "perplexity" for record in found) for found in records]
    assert len(ledgers) == 4 and set(of_perplexity) == {4, 6}
    assert all({record["task"] for record in found} == {"perplexity", "indicators"} for found in records)
    before = [ledger.read_text() for ledger in ledgers]
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0 and again.stdout.startswith("8 runs, 0 to go: about 0:00 one after the other (0 FLOPs")
    assert [ledger.read_text() for ledger in ledgers] == before
