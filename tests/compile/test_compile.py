"""`deconstruct compile`: what it refuses, what it measures (on devices that are here), and its table."""

import argparse
import json

import jax
import pytest

from deconstruct.compile import command, table
from deconstruct.compile.topology import Topology, absent, need
from deconstruct.costs import accounting
from deconstruct.model.placement import mesh_for
from deconstruct.types import UserError
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("name", "slices", "message"),
    [
        (
            "v9:2x2",
            1,
            r"--topology=v9:2x2: expected one of v4, v5e, v5p, v6e, tpu7x, h100 and a shape, as in v5e:16x16",
        ),
        ("v5e", 1, r"--topology=v5e: expected one of .* or h100:1x1x8"),
        ("h100:", 1, r"--topology=h100:: expected one of"),
        ("v5e:2x4", 0, r"^--slices=0: must be at least 1"),
        ("h100:1x1x8", 2, r"^--slices=2: is for TPUs; GPUs of several nodes are written h100:1x2x8"),
    ],
)
def test_topologies_that_are_none(name, slices, message):
    with pytest.raises(UserError, match=message):
        absent(name, slices)


@pytest.mark.parametrize("module", ["libnone", "libnone.inside"])
def test_a_compiler_that_is_not_installed(module):
    message = rf"^--topology=v5e:2x4: needs {module}, to go with jax [\d.]+; pip install 'deconstruct\[aot-tpu\]'"
    with pytest.raises(UserError, match=message):
        need(module, "v5e:2x4", "aot-tpu")


def test_programs_that_are_none():
    with pytest.raises(
        UserError, match=r"--programs=train,infer: 'infer' is unknown; expected some of train, evaluate"
    ):
        command.parse_programs("train,infer")


def here(memory):
    return Topology("here", 1, jax.devices(), memory)


def test_what_is_measured():
    config = tiny_config(mesh={"fsdp": 4, "tensor": 2})
    mesh = mesh_for(config.model, config.mesh)
    record = command.measure("decode", config, here(1 << 30), mesh)
    assert record["fits"] and record["devices"] == 8 and record["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    # Eight sequences, one more token of each.
    assert record["flops"] == accounting.decode_flops(config.model, 8, config.sequence_length).needed / 8
    assert record["bytes"]["peak"] >= record["bytes"]["arguments"]
    assert record["collectives"]["all-gather"]["times"] > 0
    assert json.loads(json.dumps(record)) == record
    text = command.as_text(record)
    assert "decode" in text and "data=1 x fsdp=4 x tensor=2" in text and "all-gather" in text


def test_what_a_run_would_refuse_is_refused_alike():
    config = tiny_config(batch_size=12)
    mesh = mesh_for(config.model, config.mesh)
    with pytest.raises(UserError, match=r"config.batch_size=12 does not divide over 8 devices \(mesh data x fsdp\)"):
        command.measure("train", config, here(1 << 30), mesh)
    config = tiny_config({"hidden_size": 12, "num_heads": 2})
    with pytest.raises(UserError, match=r"config.mesh.fsdp=8 does not divide 12, an axis of embed.embedding"):
        command.measure("decode", config, here(1 << 30), mesh)


def asked(path, *configs):
    return argparse.Namespace(table=str(path), config=list(configs), topology=["v9:2x2"], slices=1, overrides=[])


def test_a_table_keeps_what_it_has(tmp_path, capsys):
    path = tmp_path / "table.jsonl"
    assert table.fill(asked(path, "configs/base.py"), ["decode"]) == 0
    kept = path.read_text()
    (record,) = map(json.loads, kept.splitlines())
    assert record["refused"].startswith("--topology=v9:2x2: expected one of v4") and record["program"] == "decode"
    assert table.fill(asked(path, "configs/base.py"), ["decode"]) == 0
    assert path.read_text() == kept
    assert capsys.readouterr().out.count("--topology=v9:2x2: expected") == 2
    path.write_text(kept + "{}\n")
    with pytest.raises(UserError, match=r"table.jsonl: line 2 is no result of compiling; remove it"):
        table.read(path)


def test_several_configs_want_a_table():
    several = argparse.Namespace(**{**vars(asked("", "a.py", "b.py")), "table": None, "programs": "decode"})
    with pytest.raises(UserError, match=r"add --table=FILE.jsonl to compile them all"):
        command.run(several)
