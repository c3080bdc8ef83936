#!/usr/bin/env python3
"""One run on all workers of a TPU VM pod: the same command on each, over ssh, one log file a worker.

    launch/tpu.py --tpu=NAME --zone=us-east5-b -- --config=configs/paper.py:size=500m --workdir=gs://BUCKET/500m

Workdir and data must be seen by all workers (gs://). Once, to install, in the place that --directory names:

    gcloud compute tpus tpu-vm ssh NAME --worker=all --command='git clone URL deconstruct && cd deconstruct &&
        python3 -m venv .venv && .venv/bin/pip install --editable ".[tpu]"'
"""

from __future__ import annotations

import os
import shlex
import sys

from arguments import make_parser, parse


def main(words: list[str]) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--tpu", required=True, metavar="NAME", help="the TPU VM")
    parser.add_argument("--zone", help="default: gcloud's")
    parser.add_argument("--project", help="default: gcloud's")
    parser.add_argument("--directory", default="deconstruct", help="the checkout on the workers (default: deconstruct)")
    parser.add_argument("--logs", metavar="DIR", help="where the logs go on this machine (default: logs/NAME)")
    arguments, train = parse(parser, words)
    logs = arguments.logs or os.path.join("logs", arguments.tpu)
    remote = shlex.join([".venv/bin/deconstruct", "train", "--distributed", *train])
    where = [f"--{key}={value}" for key in ("zone", "project") if (value := getattr(arguments, key))]
    command = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", arguments.tpu, *where, "--worker=all"]
    command += [f"--output-directory={logs}", f"--command=cd {shlex.quote(arguments.directory)} && exec {remote}"]
    if arguments.dry_run:
        print(shlex.join(command))
        return 0
    os.makedirs(logs, exist_ok=True)
    print(f"tpu.py: each worker writes {logs}/WORKER.log", flush=True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
