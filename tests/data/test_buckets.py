"""Text, prepared data and runs in s3:// and gs://, against emulators on this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import portpicker
import pytest
from made_text import make_documents, options

from deconstruct.data.manifest import load_manifest
from deconstruct.data.pipeline import Windows
from deconstruct.data.prepare import prepare
from deconstruct.paths import file_system, place
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.restore import restore_model
from deconstruct.run.workdir import Workdir
from deconstruct.types import RunError, UserError
from tests.need import need

need("s3fs", extra="s3")
need("gcsfs", extra="gcs")
need("moto", "gcp_storage_emulator", extra="emulators")
pytestmark = pytest.mark.proof

SETTINGS = {
    "s3": {
        "AWS_ENDPOINT_URL": "{}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    },
    # gcsfs, ArrayRecord and TensorStore each have a name for it.
    "gs": dict.fromkeys(("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT", "TENSORSTORE_GCS_HTTP_URL"), "{}")
    | {"NO_GCE_CHECK": "true", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"},  # nor ask Google about an emulator
}  # fmt: skip
PROGRAMS = {
    "s3": "from moto.server import main; main(['-H', '127.0.0.1', '-p', '{}'])",
    "gs": "from gcp_storage_emulator.__main__ import main\n"
    "main(['start', '--host=127.0.0.1', '--port={}', '--in-memory'])",
}


# A process of its own: tensorboardX's writer uploads once more when its process ends, and tries for minutes.
TRAIN = """
import sys
from deconstruct.train.loop import train
from tests.tiny import tiny_config

data, workdir, steps = sys.argv[1:]
config = tiny_config(
    {"vocab_size": 0, "num_layers": 1}, data=data, variant="approximate", layout="uniform",
    steps=int(steps), sequence_length=48, checkpoint_every=2, log_every=1, optimizer={"schedule_steps": 6},
)
sys.exit(train(config, workdir))
"""


@contextlib.contextmanager
def emulator(scheme, folder):
    """A server of such buckets, and what to set in an environment to reach it."""
    port = portpicker.pick_unused_port()
    url = f"http://127.0.0.1:{port}"
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-c", PROGRAMS[scheme].format(port)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(url, timeout=1)
                break
            except urllib.error.HTTPError:
                break  # it answers
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        yield server, {name: value.format(url) for name, value in SETTINGS[scheme].items()}
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request, tmp_path_factory):
    """An empty bucket of an emulator that runs meanwhile."""
    with (
        emulator(request.param, tmp_path_factory.mktemp("emulator")) as (_, settings),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in settings.items():
            patch.setenv(name, value)
        file_system(f"{request.param}://any").mkdir("proof")
        yield f"{request.param}://proof"


@pytest.fixture(scope="module")
def prepared_there(bucket, texts):
    """The texts of the other tests, carried into the bucket and prepared from there to there by two processes."""
    for path in texts.iterdir():
        place(f"{bucket}/texts/{path.name}").write_bytes(path.read_bytes())
    prepare(options(f"{bucket}/prepared", f"{bucket}/texts", workers=2))
    return f"{bucket}/prepared"


def names(folder):
    return sorted(path.rpartition("prepared/")[2] for path in file_system(folder).find(folder))


def test_the_bytes_are_those_of_a_local_folder(prepared_there, prepared):
    own = sorted(path.relative_to(prepared).as_posix() for path in prepared.rglob("*") if path.is_file())
    assert names(prepared_there) == [name for name in own if name != ".lock"]  # and nothing of .partial
    for name in names(prepared_there):
        if name != "manifest.json":
            assert place(f"{prepared_there}/{name}").read_bytes() == (prepared / name).read_bytes(), name
    assert load_manifest(prepared_there).fingerprint == load_manifest(prepared).fingerprint


def test_again_and_changed(bucket, prepared_there, capsys):
    prepare(options(prepared_there, f"{bucket}/texts", workers=1))
    assert "is complete already" in capsys.readouterr().err
    with pytest.raises(UserError, match="--row-length=50: was 48 there"):
        prepare(options(prepared_there, f"{bucket}/texts", row_length=50))
    place(f"{bucket}/changing/0.txt").write_text("\n".join(make_documents(20)))
    prepare(options(f"{bucket}/changed", f"{bucket}/changing/*.txt"))
    place(f"{bucket}/changing/0.txt").write_text("\n".join(make_documents(20, seed=1)))
    with pytest.raises(UserError, match="--input: not the text that was prepared there"):
        prepare(options(f"{bucket}/changed", f"{bucket}/changing/*.txt"))


def test_files_of_somebody_else(bucket):
    place(f"{bucket}/taken/thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"--output=.*taken: holds thesis.tex, which prepare has not put there"):
        prepare(options(f"{bucket}/taken", f"{bucket}/texts"))
    assert names(f"{bucket}/taken") == ["proof/taken/thesis.tex"]


def test_a_run_that_was_ended_goes_on(bucket, tmp_path, prepared_there, prepared, monkeypatch, capsys):
    """Ended where the tokens of all units are there and none of the shards."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("deconstruct.data.prepare.Packer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(options(f"{bucket}/ended", f"{bucket}/texts"))
    with pytest.raises(UserError, match="prepare has not finished here"):
        load_manifest(f"{bucket}/ended")
    prepare(options(f"{bucket}/ended", f"{bucket}/texts"))
    assert "1 of 1 parts are there from an earlier run" in capsys.readouterr().err
    assert load_manifest(f"{bucket}/ended").fingerprint == load_manifest(prepared).fingerprint
    assert not place(f"{bucket}/ended/.partial").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/", "no such file or folder"), ("nowhere/x.txt", "no such file or folder"),
        ("texts/*.csv", "no file matches"), ("prepared/manifest.json", "unknown kind of file"),
    ],
)  # fmt: skip
def test_inputs_that_are_not_there(bucket, prepared_there, tmp_path, path, message):
    with pytest.raises(UserError, match=message):
        prepare(options(tmp_path / "out", f"{bucket}/{path}"))


def test_a_run_in_a_bucket(bucket, prepared_there, prepared, tmp_path):
    """gs:// trains, is resumed and evaluated there as in a folder; s3:// is refused with what would do."""
    if bucket.startswith("s3:"):
        with pytest.raises(UserError, match=r"s3://proof/prepared: rows are read from files or gs://.*copy the folder"):
            Windows(prepared_there, "train", 48)
        with pytest.raises(UserError, match=r"--workdir=s3://proof/run: Orbax keeps checkpoints in files or in gs://"):
            Workdir(f"{bucket}/run")
        return
    theirs, own = (Windows(folder, "train", 48) for folder in (prepared_there, prepared))
    assert (theirs.read(range(len(theirs))) == own.read(range(len(own)))).all()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    losses = []
    for data, workdir in ((prepared_there, f"{bucket}/run"), (str(prepared), str(tmp_path / "run"))):
        for steps in (4, 6):
            subprocess.run([sys.executable, "-c", TRAIN, data, workdir, str(steps)], env=environment, check=True)
        losses.append([record["loss"] for record in read_jsonl(Workdir(workdir).metrics)])
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    assert Workdir(f"{bucket}/run").load_tokenizer(6).fingerprint == load_manifest(prepared).tokenizer["sha256"]
    tokens = np.arange(48, dtype=np.int32)[None]
    logits = [np.asarray(restore_model(run)(tokens)) for run in (f"{bucket}/run", tmp_path / "run")]
    assert (logits[0] == logits[1]).all()


def test_a_shard_that_cannot_be_read(bucket, prepared_there):
    """A bucket's errors are not told from damage: neither is a reason to delete what lies there."""
    if bucket.startswith("s3:"):
        return  # rows are not read from there
    for name in names(prepared_there):
        place(f"{bucket}/broken/{name}").write_bytes(place(f"{prepared_there}/{name}").read_bytes())
    shard = f"{bucket}/broken/{load_manifest(prepared_there).train.shards[0].name}"
    place(shard).write_bytes(bytes(len(place(shard).read_bytes())))
    with pytest.raises(RunError, match=rf"^{shard}: cannot be read \(.*\); the same command tries again$"):
        Windows(f"{bucket}/broken", "train", 48).read([0])


# Writes a file of several requests, and reads it from its first document on.
READER = """
import json, sys
from deconstruct.data.sources import documents, work_units
from deconstruct.paths import file_system, place
from deconstruct.types import UserError

path = sys.argv[1]
file_system(path).mkdir("proof")
place(path).write_text("".join(json.dumps({"text": "fog " * 2000}) + "\\n" for _ in range(2500)))
found = documents(work_units([path])[0])
next(found)
print("reading", flush=True)
sys.stdin.readline()
try:
    print(sum(1 for _ in found), "more documents")
except UserError as error:
    print(error)
"""


def test_a_bucket_that_goes_away_in_the_middle_of_a_file(tmp_path):
    path = "gs://proof/a.jsonl"
    with emulator("gs", tmp_path) as (server, settings):
        environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        reader = subprocess.Popen(
            [sys.executable, "-c", READER, path], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert reader.stdout.readline() == "reading\n"
        server.kill()
        server.wait()
        said, noise = reader.communicate("\n", timeout=300)
    assert reader.returncode == 0 and said.startswith(f"{path}: ") and "onnect" in said and said.count("\n") == 1, said
    assert noise == ""


def test_without_the_library(tmp_path):
    """Where s3fs is not installed, the line says what to install."""
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from deconstruct.data.prepare import PrepareOptions, prepare\n"
        "prepare(PrepareOptions(output=sys.argv[1], input=('s3://bucket/x.txt',)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "s3://bucket/x.txt: needs s3fs; pip install 'deconstruct[s3]'" in run.stderr.splitlines()[-1]
