"""`deconstruct compile`: a run's programs compiled for devices that are not here, and what they ask of them."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax

from deconstruct.compile import table
from deconstruct.compile.hlo import collectives, kernels
from deconstruct.compile.programs import BY_DEFAULT, PROGRAMS
from deconstruct.compile.topology import Topology, absent
from deconstruct.config import Config
from deconstruct.costs.programs import traced_flops
from deconstruct.experiment import load_config
from deconstruct.model.placement import mesh_for
from deconstruct.types import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, action="append", metavar="FILE.py[:ARGUMENT]")
    parser.add_argument(
        "--topology",
        required=True,
        action="append",
        metavar="KIND:SHAPE",
        help="v4, v5e, v5p, v6e or tpu7x and chips along each axis (v5e:16x16), or h100 and partitions, nodes and GPUs "
        "(h100:1x1x8)",
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="slices of a TPU topology (default: 1)")
    parser.add_argument(
        "--programs",
        default=",".join(BY_DEFAULT),
        metavar="A,B,...",
        help=f"of {', '.join(PROGRAMS)} (default: {', '.join(BY_DEFAULT)})",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each program")
    parser.add_argument(
        "--table",
        metavar="FILE.jsonl",
        help="compile every --config for every --topology, each in a process of its own, and keep the results there; "
        "what it holds is not compiled again",
    )


def run(arguments: argparse.Namespace) -> int:
    names = parse_programs(arguments.programs)
    if arguments.table:
        return table.fill(arguments, names)
    if len(arguments.config) > 1 or len(arguments.topology) > 1:
        raise UserError("--config and --topology are given several times: add --table=FILE.jsonl to compile them all")
    config = load_config(arguments.config[0], arguments=arguments.overrides)
    topology = absent(arguments.topology[0], arguments.slices)
    mesh = mesh_for(config.model, config.mesh, topology.devices)
    unfit = []
    for name in names:
        record = {
            "config": arguments.config[0],
            "overrides": arguments.overrides,
            **measure(name, config, topology, mesh),
        }
        print(json.dumps(record) if arguments.json else as_text(record), flush=True)
        if not record["fits"]:
            unfit.append(f"{name}: {record['reason']}")
    if unfit:
        raise UserError("; ".join(unfit))
    return 0


def parse_programs(text: str) -> list[str]:
    names = [entry.strip() for entry in text.split(",")]
    for name in names:
        if name not in PROGRAMS:
            raise UserError(f"--programs={text}: {name!r} is unknown; expected some of {', '.join(PROGRAMS)}")
    return names


def measure(name: str, config: Config, topology: Topology, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """One program: bytes and FLOPs of a device, collectives of a run of it, seconds of compiling. Raises UserError for
    what a run on these devices would refuse before compiling."""
    start = time.perf_counter()
    traced = PROGRAMS[name](config, mesh)
    lowered = traced.lower()
    before = time.perf_counter()
    record: dict[str, Any] = {
        "topology": topology.name,
        "slices": topology.slices,
        "program": name,
        "devices": mesh.size,
        "device": topology.devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "memory": topology.memory,
        "flops": traced_flops(traced.jaxpr) / mesh.size,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**record, "fits": False, "reason": _of_memory(str(error))}
    done = time.perf_counter()
    needed = _bytes(compiled.memory_analysis())
    fits, text = needed["peak"] <= topology.memory, compiled.as_text()
    return {
        **record,
        "fits": fits,
        "reason": "" if fits else f"needs {needed['peak']:,} bytes of the {topology.memory:,} that a device has",
        "bytes": needed,
        "collectives": {kind: found._asdict() for kind, found in collectives(text).items()},
        "kernels": kernels(text),
        "seconds": {"lower": round(before - start, 1), "compile": round(done - before, 1)},
    }


def _bytes(analysis: Any) -> dict[str, int]:
    """Of one device. What is donated is an argument and no output."""
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    return {**parts, "peak": max(analysis.peak_memory_in_bytes, parts["arguments"] + parts["temporaries"])}


def _of_memory(message: str) -> str:
    """The line in which a compiler says how much it wants."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in lines if "Used" in line or "xceeded" in line), lines[0])


def as_text(record: dict[str, Any]) -> str:
    mesh = " x ".join(f"{axis}={size}" for axis, size in record["mesh"].items())
    lines = [f"{record['program']:<9} {record['devices']} x {record['device']}, {mesh}"]
    if "bytes" not in record:
        return "\n".join([*lines, f"  memory      {record['reason']}"])
    needed = {part: f"{size / 1e9:.3f}" for part, size in record["bytes"].items()}
    sent = record["collectives"]
    kinds = ", ".join(f"{kind} {found['times']} ({found['bytes'] / 1e6:,.1f} MB)" for kind, found in sent.items())
    lines += [
        f"  memory      peak {needed['peak']} of {record['memory'] / 1e9:.1f} GB: arguments {needed['arguments']}, "
        f"temporaries {needed['temporaries']}, code {needed['code']}",
        f"  FLOPs       {record['flops']:.4g} a device, of matrix products, evenly shared",
        f"  collectives {kinds or 'none'}",
        f"  kernels     {', '.join(f'{name} {times}' for name, times in record['kernels'].items()) or 'none'}",
        f"  compiled in {record['seconds']['compile']} s, lowered in {record['seconds']['lower']} s",
    ]
    return "\n".join(lines)
