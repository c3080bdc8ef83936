"""What devices send each other in a compiled program, and the hand-written kernels in it, read off the text of its HLO.

A collective in a loop counts as often as the loop runs. Compilers for TPUs spread one collective over several fused
operations, which share its channel: it counts once.
"""

from __future__ import annotations

import collections
import math
import re
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f4e2m1fn": 0.5}

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations|called_computations|"
    r"true_computation|false_computation)=\{?((?:%?[\w.\-]+(?:, )?)+)"
)


_KERNEL = re.compile(r"%?([\w\-]+?)(?:\.\d+)* = .*custom_call_target=\"[\w$]*(?:tpu_custom_call|mosaic_gpu|fmha)")


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


class Sent(NamedTuple):
    """How many times, and the bytes of one device's larger side: of a gathered array all, of a scattered one what is
    summed."""

    times: int
    bytes: int


def kernels(text: str) -> dict[str, int]:
    """Pallas' and cuDNN's kernels by name, and how often each stands in the program; one in a loop counts once."""
    found = collections.Counter(match[1] for match in map(_KERNEL.search, text.splitlines()) if match)
    return dict(sorted(found.items()))


def collectives(text: str) -> dict[str, Sent]:
    """By kind, of one run of the program on one device. Loops of unknown length count once."""
    computations, entry = _computations(text)
    seen: dict[str, tuple[str, float, float]] = {}  # channel -> kind, times, bytes
    for computation, times in _times(computations, entry).items():
        types = {instruction.name: instruction.type for instruction in computations[computation]}
        for instruction in computations[computation]:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if "all-reduce-scatter" in computation:
                kind = "reduce-scatter"
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = channel[1] if channel else f"{computation} {instruction.name}"
            before = seen.get(key, (kind, 0.0, 0.0))
            seen[key] = kind, max(times, before[1]), max(_moved(instruction, types), before[2])
    totals: dict[str, Sent] = {}
    for kind, times, size in seen.values():
        so_far = totals.get(kind, Sent(0, 0))
        totals[kind] = Sent(so_far.times + int(times), so_far.bytes + int(times * size))
    return dict(sorted(totals.items()))


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the first."""
    found: dict[str, list[Instruction]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            inside = found.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif inside is not None:
            instruction = _INSTRUCTION.match(line)
            if instruction:
                inside.append(Instruction(*instruction.groups()))
    return found, entry


def _times(computations: dict[str, list[Instruction]], entry: str) -> dict[str, float]:
    """How often each computation runs in one run of the program."""
    calls: dict[str, list[tuple[str, float]]] = {}
    for name, instructions in computations.items():
        calls[name] = []
        for instruction in instructions:
            turns = _turns(instruction, computations) if instruction.opcode == "while" else 1
            for group in _CALLED.findall(instruction.rest):
                calls[name] += [(callee.strip().lstrip("%"), turns) for callee in group.split(",") if callee.strip()]
    times = dict.fromkeys(computations, 0.0)

    def visit(name: str, factor: float) -> None:
        times[name] += factor
        for callee, turns in calls[name]:
            if callee in calls:
                visit(callee, factor * turns)

    visit(entry, 1.0)
    return {name: factor for name, factor in times.items() if factor}


def _turns(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """As the compiler says, or as the condition compares a counter from zero on."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    inside = computations.get(condition[1], []) if condition else []
    constants = {i.name: int(i.rest.split(")")[0]) for i in inside if i.opcode == "constant" and i.type[0] in "su"}
    for instruction in inside:
        if instruction.opcode == "compare" and "direction=LT" in instruction.rest:
            bounds = [constants[name] for name in _operands(instruction) if name in constants]
            return bounds[0] if bounds else 1
    return 1


def _operands(instruction: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])


def _moved(instruction: Instruction, types: dict[str, str]) -> float:
    operands = sum(_size(types.get(name, "")) for name in _operands(instruction))
    results = _size(instruction.type)
    if instruction.opcode.endswith("-start") and instruction.type.startswith("("):
        results -= operands  # the type of a start holds both
    return max(operands, results)


def _size(type_: str) -> float:
    arrays = _ARRAY.findall(type_)
    sizes = (BYTES.get(name, 1) * math.prod(map(int, filter(None, dims.split(",")))) for name, dims in arrays)
    return sum(sizes)
