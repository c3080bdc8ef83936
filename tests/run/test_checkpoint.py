"""Checkpoints on disk: what comes back is what was saved, bit for bit, whatever happens to the processes."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconstruct.run import checkpoint
from deconstruct.run.checkpoint import CheckpointGoneError, Checkpoints, CheckpointSaveError, finished_steps
from deconstruct.run.checksums import checksums
from deconstruct.types import UserError

Moments = namedtuple("Moments", "count mean empty")
Nothing = namedtuple("Nothing", "")

# What the processes below and this one agree on: the arrays of a step, so that each can check the others' work.
COMMON = """
import sys
import numpy as np, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from deconstruct.run import checkpoint

def arrays(step, megabytes):
    bits = np.random.default_rng(step).integers(0, 2**31, (4, megabytes * 65536), np.int32)
    return {"layers": [{"w": row} for row in bits], "half": jnp.arange(64.0, dtype=jnp.bfloat16).reshape(8, 8)}

def abstract(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

def check(loaded, expected):
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
"""
common: dict = {}
exec(COMMON, common)
arrays, abstract, check = common["arrays"], common["abstract"], common["check"]


def here():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def start(code, *arguments, devices=1):
    head = f"import jax; jax.config.update('jax_num_cpu_devices', {devices})\n"
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(Path(checkpoint.__file__).parents[2]))
    command = [sys.executable, "-c", head + COMMON + code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(code, *arguments, devices=1, status=0):
    """Runs `code` to its end, within a minute, and returns what it wrote to standard error."""
    process = start(code, *arguments, devices=devices)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status, err
    return err


# Orbax leaves coroutines and an event loop behind when it fails.
orbax_fails = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def small():
    return {"layers": {"0": {"w": jnp.arange(6.0).reshape(2, 3)}, "1": {"w": jnp.ones((2, 3))}}}, {"step": jnp.int32(3)}


def save(folder, steps, trees, **options):
    with Checkpoints(folder, every=1, **({"keep": 100} | options)) as writer:
        for step in steps:
            assert writer.save(step, *trees, {"step": step})


def test_every_kind_of_leaf_and_container_comes_back_bit_for_bit(tmp_path):
    special = np.array([0x7F7F0000, 0x80000000, 0xFF7F0000, 1], np.uint32).view(np.float32)  # largest, -0, denormal
    model = {
        "f": jnp.asarray(special),
        "h": jnp.asarray(special).astype(jnp.bfloat16),
        "i": jnp.int32([[-1, 2**31 - 1]]),
    }
    moments = Moments(jnp.int32(7), [jnp.zeros(3), {"a.b/c": jnp.ones(1)}], Nothing())
    train = {"adam": moments, "none": None, "step": 12, "rate": 0.1, "key": jax.random.key_data(jax.random.key(5))}
    meta = {"only": "strings", "nested": {"x": [1, 2.5, None, True, "é"]}}
    with Checkpoints(tmp_path / "a" / "b", every=1, keep=1) as writer:
        writer.save(12, model, train, meta)
    folder = str(tmp_path / "a" / "b")
    check(checkpoint.load_model(folder, 12, abstract(model, here())), model)
    expected = train | {"step": jnp.int32(12), "rate": jnp.float32(0.1)}
    loaded = checkpoint.load_train(folder, 12, abstract(expected, here()))
    check(loaded, expected)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected) and loaded["adam"].empty == Nothing()
    assert checkpoint.read_meta(folder, 12) == meta


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_not_finite_is_not_saved(tmp_path, small, value):
    model, train = small
    model["layers"]["1"]["w"] = model["layers"]["1"]["w"].at[1, 2].set(value)
    with Checkpoints(tmp_path, every=1, keep=1) as writer:
        with pytest.raises(FloatingPointError, match=r"checkpoint 1 was not saved: model/layers/1/w is not finite"):
            writer.save(1, model, train, {"step": 1})
        assert writer.steps == frozenset()
    assert not list(tmp_path.iterdir())


@orbax_fails
def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    """In each file of a checkpoint, at places drawn anew: what is read is what was saved, or nothing is."""
    draw = np.random.default_rng(0)
    model = {"w": jnp.asarray(draw.normal(size=(20, 30)), jnp.float32), "h": jnp.ones((7, 5), jnp.bfloat16)}
    train = {"mu": jnp.asarray(draw.normal(size=(20, 30)), jnp.float32), "step": jnp.int32(3)}
    save(tmp_path, [3], (model, train))
    noticed = []
    for path in sorted(p for p in (tmp_path / "3").rglob("*") if p.is_file() and p.stat().st_size):
        whole = path.read_bytes()
        for place in draw.choice(8 * len(whole), 4):
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            path.write_bytes(damaged)
            try:
                check(checkpoint.load_model(tmp_path, 3, abstract(model, here())), model)
                check(checkpoint.load_train(tmp_path, 3, abstract(train, here())), train)
                assert checkpoint.read_meta(tmp_path, 3) == {"step": 3}
            except UserError as error:
                assert "\n" not in str(error)
                noticed.append(str(error))
        path.write_bytes(whole)
    assert any("is not what was saved (its checksum); there is none before it" in message for message in noticed)


def test_a_checksum_is_that_of_the_numbers_and_not_of_their_mesh():
    draw = np.random.default_rng(1)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = [draw.normal(size=(16, 3)).astype(np.float32), draw.integers(-9, 9, (5,)).astype(np.int32), np.float32(2)]
    split = [jax.device_put(arrays[0], jax.NamedSharding(mesh, jax.P("x"))), *arrays[1:]]
    wanted, finite = checksums(arrays)
    assert checksums(split) == (wanted, finite) and finite == [True] * 3
    words = arrays[0].view(np.uint32).ravel().astype(object)
    assert wanted[0] == sum(int(word) * (2 * place + 1) for place, word in enumerate(words)) % 2**32
    other = arrays[0][[1, 0, *range(2, 16)]]  # the same numbers in another place
    assert checksums([other])[0] != wanted[:1]


def test_due_and_retention_and_saving_twice(tmp_path, small):
    with Checkpoints(tmp_path, every=10, keep=2, keep_period=40) as writer:
        assert [s for s in range(41) if writer.due(s)] == [10, 20, 30, 40]
        for step in range(10, 100, 10):
            assert writer.save(step, *small, {})
            assert not writer.save(step, *small, {"other": 1})
    assert finished_steps(tmp_path) == [40, 80, 90]
    assert checkpoint.read_meta(tmp_path, 90) == {}
    with Checkpoints(tmp_path, every=10, keep=1) as writer:  # another run, other settings
        assert not writer.save(80, *small, {})
        assert writer.save(100, *small, {})
    assert finished_steps(tmp_path) == [100] and sorted(p.name for p in tmp_path.iterdir()) == ["100"]
    for bad in ({"every": 0, "keep": 1}, {"every": 1, "keep": 0}, {"every": 1, "keep": 1, "keep_period": 0}):
        with pytest.raises(UserError, match="must be at least 1"):
            Checkpoints(tmp_path, **bad)


def test_only_finished_checkpoints_are_listed_and_strangers_left_alone(tmp_path, small):
    assert finished_steps(tmp_path / "none") == [] and checkpoint.latest_step(tmp_path / "none") is None
    save(tmp_path, [5, 30], small)
    for folder in ("7", "8.orbax-checkpoint-tmp", "notes", "007", "x.orbax-checkpoint-tmp"):
        (tmp_path / folder).mkdir()
    for file in ("12", "README"):
        (tmp_path / file).write_text("mine")
    assert finished_steps(tmp_path) == [5, 30] and checkpoint.latest_step(tmp_path) == 30
    save(tmp_path, [7, 8], small)  # where something unfinished stands
    assert finished_steps(tmp_path) == [5, 7, 8, 30]
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"5", "7", "8", "30", "notes", "007", "x.orbax-checkpoint-tmp", "12", "README"}


def test_a_part_of_the_model_and_what_does_not_match(tmp_path, small):
    save(tmp_path, [1], small)
    model = abstract(small[0], here())
    one = {"layers": {"1": model["layers"]["1"]}}
    loaded = checkpoint.load_model(tmp_path, 1, one, partial=True)
    check(loaded, {"layers": {"1": small[0]["layers"]["1"]}})
    assert checkpoint.load_model(tmp_path, 1, {}, partial=True) == {}

    def leaf(shape, dtype="float32"):
        return {"layers": {"0": {"w": jax.ShapeDtypeStruct(shape, dtype, sharding=here())}}}

    for tree, partial, words in (
        (one, False, r"layers/0/w, float32\[2, 3\], which was not expected"),
        (leaf((2, 4)), True, r"layers/0/w as float32\[2, 3\]; float32\[2, 4\] was expected"),
        (leaf((2, 3), "bfloat16"), True, r"layers/0/w as float32\[2, 3\]; bfloat16\[2, 3\] was expected"),
        (model | {"extra": model["layers"]["0"]["w"]}, True, r"has no extra; float32\[2, 3\] was expected"),
    ):
        with pytest.raises(UserError, match=words):
            checkpoint.load_model(tmp_path, 1, tree, partial=partial)
    with pytest.raises(TypeError, match="layers/0/w: a sharding"):
        checkpoint.load_model(tmp_path, 1, abstract(small[0], None))
    with pytest.raises(CheckpointGoneError, match=r"finished steps: 1$"):
        checkpoint.read_meta(tmp_path, 2)


def test_a_checkpoint_deleted_under_the_reader_is_gone(tmp_path, small, monkeypatch):
    save(tmp_path, [1, 2], small)
    load = checkpoint.ocp.load

    def late(path, *arguments, **options):
        checkpoint.remove(path.parent, int(path.name))
        return load(path, *arguments, **options)

    monkeypatch.setattr(checkpoint.ocp, "load", late)
    with pytest.raises(CheckpointGoneError, match=r"step 1 .* finished steps: 2"):
        checkpoint.load_model(tmp_path, 1, abstract(small[0], here()))


@orbax_fails
@pytest.mark.parametrize("part", ["model", "train", ""])
def test_a_lost_or_cut_file_is_reported_and_never_read_as_numbers(tmp_path, part):
    model, train = {"w": jax.random.normal(jax.random.key(0), (100, 50)), "z": jnp.zeros(9)}, {"mu": jnp.ones((40, 50))}
    save(tmp_path, [1], (model, train))
    top = tmp_path / "1"
    files = [p for p in (top / part).rglob("*") if p.is_file() and (part or p.parent == top)]
    complaints = 0
    for file in files:
        whole = file.read_bytes()
        for damage in (None, whole[: len(whole) // 2], b""):
            file.unlink() if damage is None else file.write_bytes(damage)
            try:
                check(checkpoint.load_model(tmp_path, 1, abstract(model, here())), model)
                check(checkpoint.load_train(tmp_path, 1, abstract(train, here())), train)
            except UserError as error:
                complaints += 1
                assert f"{top} is damaged: " in str(error) and "\n" not in str(error)
            file.write_bytes(whole)
    assert complaints >= (8 if part else 1)
    check(checkpoint.load_model(tmp_path, 1, abstract(model, here())), model)


def test_saving_is_in_the_background_and_donation_does_not_touch_what_is_saved(tmp_path):
    expected = arrays(1, 64)
    host = np.arange(1000)
    state = jax.tree.map(jnp.array, expected)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    jax.block_until_ready(overwrite(jax.tree.map(jnp.array, state)))  # compiled beforehand
    meta = {"list": [1]}
    with Checkpoints(tmp_path, every=1, keep=3) as writer:
        writer.save(1, state, {"host": host.astype(np.int32), "mutable": (mutable := host.astype(np.float32))}, meta)
        mutable[:] = -1
        meta["list"].append(2)
        assert finished_steps(tmp_path) == []
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
    check(checkpoint.load_model(tmp_path, 1, abstract(expected, here())), expected)
    train = {"host": host.astype(np.int32), "mutable": host.astype(np.float32)}
    check(checkpoint.load_train(tmp_path, 1, abstract(train, here())), train)
    assert checkpoint.read_meta(tmp_path, 1) == {"list": [1]}


@orbax_fails
def test_a_failure_in_the_background_surfaces_at_the_next_check(tmp_path, small):
    large = arrays(2, 4)
    writer = Checkpoints(tmp_path, every=1, keep=1)
    writer.save(1, *small, {})
    writer.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # as if the disk were full
        writer.save(2, large, small[1], {})
        with pytest.raises(CheckpointSaveError, match=f"checkpoint 2 could not be saved in {tmp_path}: "):
            for _ in range(3000):
                writer.check_errors()
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert finished_steps(tmp_path) == [1]
    writer.check_errors()  # said once
    assert writer.save(2, large, small[1], {})
    writer.close()
    writer.close()
    assert finished_steps(tmp_path) == [2]
    check(checkpoint.load_model(tmp_path, 2, abstract(large, here())), large)


SAVE_FOREVER = """
folder, first = sys.argv[1], int(sys.argv[2])
with checkpoint.Checkpoints(folder, every=1, keep=100) as writer:
    for step in range(first, first + 100):
        tree = jax.tree.map(jnp.asarray, arrays(step, 32))
        assert writer.save(step, tree, {"step": step}, {"step": step})
"""


@pytest.mark.proof
def test_a_killed_writer_leaves_earlier_checkpoints_and_its_successor_goes_on(tmp_path):
    delays = random.Random(0)
    for attempt in range(3):
        first = (checkpoint.latest_step(tmp_path) or 0) + 1
        writer = start(SAVE_FOREVER, tmp_path, first)
        deadline = time.monotonic() + 30
        unfinished = tmp_path / f"{first + 1}.orbax-checkpoint-tmp"
        with contextlib.suppress(FileNotFoundError):
            while not unfinished.exists() and time.monotonic() < deadline and writer.poll() is None:
                time.sleep(0.001)
        time.sleep(0 if attempt == 0 else delays.uniform(0, 0.1))
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL, writer.communicate()
        if attempt == 0:
            assert unfinished.exists() and finished_steps(tmp_path) == [first]
        steps = finished_steps(tmp_path)
        assert steps == list(range(1, steps[-1] + 1)) and steps[-1] >= first
        for step in {first, steps[-1]}:
            expected = arrays(step, 32)
            check(checkpoint.load_model(tmp_path, step, abstract(expected, here())), expected)
    again = steps[-1] + 1
    save(tmp_path, [again], (arrays(again, 1), {"step": 0}))
    assert checkpoint.latest_step(tmp_path) == again
    assert all(p.name.isdigit() for p in tmp_path.iterdir())


INTERRUPTED = """
with checkpoint.Checkpoints(sys.argv[1], every=1, keep=1) as writer:
    writer.save(1, arrays(1, 32), {"step": 1}, {})
    raise SystemExit("interrupted")
"""


def test_an_interrupted_process_finishes_the_save_and_ends(tmp_path):
    assert run(INTERRUPTED, tmp_path, status=1) == "interrupted\n"
    assert finished_steps(tmp_path) == [1]


ON_EIGHT = """
mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
tree = arrays(1, 1)
tree["layers"] = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in
                  zip([layer["w"] for layer in tree["layers"]], [P("a"), P(("a", "b")), P("b"), P()])]
tree["half"] = jax.device_put(tree["half"], NamedSharding(mesh, P("b", "a")))
with jax.set_mesh(mesh), checkpoint.Checkpoints(sys.argv[1], every=1, keep=1) as writer:
    writer.save(1, tree, {"step": 1}, {})
"""
ON_FOUR = """
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
tree = arrays(1, 1)
tree["layers"] = [layer["w"] for layer in tree["layers"]]
wanted = abstract(tree, NamedSharding(mesh, P("y")))
wanted["half"] = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16, sharding=NamedSharding(mesh, P("x", "y")))
with jax.set_mesh(mesh):
    loaded = checkpoint.load_model(sys.argv[1], 1, wanted)
check(loaded, tree)
assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(wanted)))
"""


def test_saved_on_eight_devices_loads_on_one_and_on_another_mesh_in_silence(tmp_path):
    assert run(ON_EIGHT, tmp_path, devices=8) == ""
    assert run(ON_FOUR, tmp_path, devices=4) == ""
    tree = arrays(1, 1)
    tree["layers"] = [layer["w"] for layer in tree["layers"]]
    check(checkpoint.load_model(tmp_path, 1, abstract(tree, here())), tree)
