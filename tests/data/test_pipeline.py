"""Reading back: windows are the stream, batches are a pure function of data, seed and step."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest
from made_text import options

from deconstruct.data import pack
from deconstruct.data.manifest import load_manifest, save_manifest
from deconstruct.data.pipeline import Windows, tokens_at, train_batches
from deconstruct.data.prepare import prepare
from deconstruct.types import UserError

LENGTH, BATCH = 24, 6


def take(folder, count, length=LENGTH, batch_size=BATCH, seed=0, **others):
    with train_batches(folder, length, batch_size, seed, **others) as batches:
        return np.stack([next(batches) for _ in range(count)])


def shared_stream(folder, split="train"):
    windows = Windows(folder, split, 48)
    rows = windows.read(range(len(windows)))
    return np.concatenate([rows[:, :-1].ravel(), rows[-1, -1:]])


@pytest.fixture(scope="module")
def windows(prepared):
    return Windows(prepared, "train", LENGTH)


@pytest.mark.parametrize("length", [1, 5, 24, 48, 49, 96, 100, 333])
def test_windows_cut_the_stream(prepared, length):
    stream = shared_stream(prepared)
    windows = Windows(prepared, "train", length)
    assert len(windows) == (len(stream) - 1) // length
    expected = np.stack([stream[n * length : n * length + length + 1] for n in range(len(windows))])
    got = windows.read(range(len(windows)))
    assert got.dtype == np.int32 and (got == expected).all()
    assert (windows[len(windows) - 1] == expected[-1]).all()
    for outside in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[outside]


def test_several_shards_read_as_one(prepared, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "SHARD_BYTES", 4000)
    folder = tmp_path / "out"
    manifest = prepare(options(folder, texts))
    shards = manifest["train"]["shards"]
    assert len(shards) > 3 and shards[0]["name"] == f"train-00000-of-{len(shards):05d}.array_record"
    assert sum(shard["rows"] for shard in shards) == load_manifest(prepared).train.rows
    for length in (24, 48, 100):
        many, one = Windows(folder, "train", length), Windows(prepared, "train", length)
        order = np.random.default_rng(0).permutation(len(one)).tolist()
        assert len(many) == len(one) and (many.read(order) == one.read(order)).all()
    assert (tokens_at(folder, 1000) == tokens_at(prepared, 1000)).all()


def test_the_first_tokens(prepared):
    stream = shared_stream(prepared)
    for count in (1, 47, 48, 49, 50, 96, 97, 1000, len(stream)):
        tokens = tokens_at(prepared, count)
        assert tokens.dtype == np.int32 and (tokens == stream[:count]).all()
    with pytest.raises(UserError, match="tokens asked for, the train split holds"):
        tokens_at(prepared, len(stream) + 1)


def numbers(windows, batches):
    """Which window each row of some batches is."""
    every = {row.tobytes(): n for n, row in enumerate(windows.read(range(len(windows))))}
    assert len(every) == len(windows)
    return [every[row.tobytes()] for row in batches.reshape(-1, batches.shape[-1])]


def test_each_epoch_has_each_window_once_in_another_order(prepared, windows):
    size = len(windows)
    assert size % BATCH  # so that a batch straddles the epochs
    seen = numbers(windows, take(prepared, 3 * size // BATCH + 1))
    epochs = [seen[e * size : (e + 1) * size] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size)) != epoch
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_hosts_share_the_batch_of_one(prepared, windows):
    steps = len(windows) // BATCH + 3  # across an epoch's end
    whole = take(prepared, steps)
    assert whole.shape == (steps, BATCH, LENGTH + 1) and whole.dtype == np.int32
    for hosts in (2, 3, 6):
        blocks = [take(prepared, steps, host=host, hosts=hosts) for host in range(hosts)]
        assert (np.concatenate(blocks, axis=1) == whole).all()


def test_starting_late_is_skipping(prepared, windows):
    late = len(windows) // BATCH - 1
    whole = take(prepared, late + 8)
    for start in (1, late, late + 3):
        assert (take(prepared, 5, start_step=start) == whole[start : start + 5]).all()
    with train_batches(prepared, LENGTH, BATCH, 0, start_step=10**12) as batches:
        assert next(batches).shape == (BATCH, LENGTH + 1) and batches.step == 10**12 + 1


def test_what_the_order_depends_on(prepared, windows, tmp_path):
    whole = take(prepared, 8)
    assert (whole == take(prepared, 8, threads=1, prefetch=1)).all()
    assert (whole == take(prepared, 8, threads=8, prefetch=64)).all()
    assert not (whole == take(prepared, 8, seed=1)).all()
    shutil.copytree(prepared, tmp_path / "other")
    manifest = load_manifest(prepared)
    other = {**manifest.tokenizer, "sha256": "another"}  # it decides on the fingerprint as well
    save_manifest(tmp_path / "other", dataclasses.replace(manifest, tokenizer=other, fingerprint=""))
    assert not (whole == take(tmp_path / "other", 8)).all()


def test_fewer_windows_than_a_batch_repeat(prepared):
    length = load_manifest(prepared).train.rows * 48 // 2
    windows = Windows(prepared, "train", length)
    assert len(windows) == 2
    assert np.bincount(numbers(windows, take(prepared, 3, length=length, batch_size=10))).tolist() == [15, 15]


def test_an_iterator_left_open_does_not_hold_up_the_end(prepared):
    code = (
        "from deconstruct.data.pipeline import train_batches\n"
        f"batches = train_batches({str(prepared)!r}, 24, 6, 0)\nnext(batches)\nprint('read')"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


def test_closing_ends_it(prepared):
    batches = train_batches(prepared, LENGTH, BATCH, 0)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_mistakes_are_named(prepared, tmp_path):
    with pytest.raises(UserError, match=r"no prepared data here .*; run: deconstruct prepare --output="):
        load_manifest(tmp_path)
    with pytest.raises(UserError, match="batch_size=6: not divisible by the 4 hosts; use batch_size=8"):
        train_batches(prepared, LENGTH, 6, 0, hosts=4)
    with pytest.raises(UserError, match="batch_size=0: must be at least 1"):
        train_batches(prepared, LENGTH, 0, 0)
    with pytest.raises(UserError, match="sequence_length=0: must be at least 1"):
        Windows(prepared, "train", 0)
    with pytest.raises(UserError, match=r"sequence_length=9999: the validation split .* has only \d+ tokens in rows"):
        Windows(prepared, "validation", 9999)
    with pytest.raises(UserError, match="should be 'train' or 'validation'"):
        Windows(prepared, "test", 24)


def test_damaged_folders_are_named(prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    shard = folder / load_manifest(folder).train.shards[0].name
    whole = shard.read_bytes()
    middle = len(whole) // 3
    shard.write_bytes(
        whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 900]) + whole[middle + 900 :]
    )
    with pytest.raises(UserError, match=f"{shard.name}: damaged"):
        windows = Windows(folder, "train", 48)
        windows.read(range(len(windows)))
    shard.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=f"{shard.name}: damaged, .* bytes where the manifest says"):
        Windows(folder, "train", 48)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: this shard is missing; delete .* and run: deconstruct prepare"):
        train_batches(folder, 24, 6, 0)
    (folder / "manifest.json").write_text('{"format": 1')
    with pytest.raises(UserError, match="not a manifest of prepare"):
        load_manifest(folder)
    (folder / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        load_manifest(folder)
