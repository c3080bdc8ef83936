"""A trained run's checkpoint over eight devices, on the command line: the text and the perplexity of one device."""

import json

import pytest

from deconstruct.cli import main
from deconstruct.run.workdir import Workdir

pytestmark = pytest.mark.proof


def test_generate(trained, capsys):
    texts = []
    for words in ([], ["--mesh=fsdp=4,tensor=2"], ["--mesh=tensor=4"], ["--mesh=fsdp=-1"]):
        assert main(["generate", f"--workdir={trained}", "--prompt=fog under", "--max-new-tokens=8", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert len(texts[0]) > len("fog under\n") and set(texts) == {texts[0]}
    assert main(["generate", f"--workdir={trained}", "--prompt=fog", "--mesh=tensor=8"]) == 2
    assert "config.mesh.tensor=8 does not divide" in capsys.readouterr().err


def test_evaluate(run):
    path, perplexities = Workdir(run).evaluations, []
    for mesh in ("fsdp=1", "fsdp=2,tensor=2", "tensor=4"):
        path.unlink(missing_ok=True)
        assert main(["evaluate", f"--workdir={run}", "--max-tokens=320", f"--mesh={mesh}"]) == 0
        records = [json.loads(line) for line in path.read_text().splitlines()]
        perplexities.append([record["value"] for record in records if record["metric"] == "perplexity"])
    for split in perplexities[1:]:  # float32 sums in another order
        assert split == pytest.approx(perplexities[0], rel=1e-5)
