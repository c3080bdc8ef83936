"""Two processes of one run, started by the program itself."""

import os
import subprocess
import sys
from pathlib import Path

import portpicker

ROOT = Path(__file__).parents[2]


class Pair:
    """Two processes of one run, each with options and an environment of its own."""

    def __init__(self, folder, workdir, data):
        self.common = ["--config", str(folder / "tiny.py"), "--workdir", str(workdir), f"--config.data={data}"]
        self.port = portpicker.pick_unused_port()

    def start(self, process, *words, **environment):
        place = (f"--coordinator=localhost:{self.port}", "--num-processes=2", f"--process-id={process}")
        return subprocess.Popen(
            [sys.executable, "-m", "deconstruct.cli", "train", *self.common, *place, *words],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, first, second):
        """(status, last line) of both."""
        processes = [self.start(number, *words) for number, words in enumerate((first, second))]
        return [ended(process) for process in processes]


def ended(process, limit=120):
    out, _ = process.communicate(timeout=limit)
    return process.returncode, ["", *out.strip().splitlines()][-1]
