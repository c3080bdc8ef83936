#!/usr/bin/env python3
"""One run as a managed job of SkyPilot: on spot machines of whatever cloud has them, and on others when they are lost.

    launch/skypilot.py --accelerators=H100:8 --nodes=2 -- --config=configs/paper.py:size=500m --workdir=s3://BUCKET/500m

This folder is copied to the machines and installed there. Workdir and data must outlive them (s3://, gs://). A machine
that is lost, and status 75 (saved, to go on), start the job elsewhere, where it resumes; a mistake (status 2) ends it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile

from arguments import make_parser, name_of_run, parse

TASK = """\
name: {name}
num_nodes: {nodes}
workdir: .
resources:
  accelerators: {accelerators}
  use_spot: {spot}
  job_recovery:
    max_restarts_on_errors: 0
    recover_on_exit_codes: [75]
setup: |
  python3 -m venv ~/venv
  ~/venv/bin/pip install --quiet --editable ".[{extra}]"
run: |
  exec ~/venv/bin/{command}
"""


def main(words: list[str]) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--accelerators", required=True, metavar="TYPE:N", help="of each machine, such as H100:8")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    parser.add_argument("--name", help="of the job (default: the last part of --workdir)")
    parser.add_argument("--on-demand", action="store_true", help="machines that are not taken away, at their price")
    parser.add_argument("--extra", default="cuda12", help="of deconstruct, to install (default: cuda12)")
    arguments, train = parse(parser, words)
    task = TASK.format(
        name=name_of_run(parser, arguments.name, train),
        nodes=arguments.nodes,
        accelerators=json.dumps(arguments.accelerators),
        spot=json.dumps(not arguments.on_demand),
        extra=arguments.extra,
        command=shlex.join(["deconstruct", "train", "--distributed", "--process-per=node", *train]),
    )
    if arguments.dry_run:
        print("# sky jobs launch --yes --detach-run FILE, where FILE holds", task, sep="\n", end="")
        return 0
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(task)
        file.flush()
        return subprocess.run(["sky", "jobs", "launch", "--yes", "--detach-run", file.name]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
