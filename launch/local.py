#!/usr/bin/env python3
"""One run as several processes on this machine, for instance one for each GPU.

    launch/local.py --processes=4 -- --config=configs/quickstart.py --workdir=runs/four

Process I sees GPU I. TERM, INT and HUP are passed on once, as TERM. When one process fails the others are stopped. The
exit status is that of the first process that ended with another than 0.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time

from arguments import make_parser, parse

GRACE = 60  # seconds for the others to save, once one has ended


def main(words: list[str]) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--processes", type=int, required=True, metavar="N")
    parser.add_argument("--port", type=int, help="where process 0 listens (default: one that is free)")
    arguments, train = parse(parser, words)
    if arguments.processes < 1:
        parser.error(f"--processes={arguments.processes}: must be at least 1")
    place = [f"--coordinator=localhost:{arguments.port or free_port()}", f"--num-processes={arguments.processes}"]
    commands = [["deconstruct", "train", *train, *place, f"--process-id={n}"] for n in range(arguments.processes)]
    if arguments.dry_run:
        for number, command in enumerate(commands):
            print(f"JAX_LOCAL_DEVICE_IDS={number}", shlex.join(command))
        return 0
    return run(commands)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def run(commands: list[list[str]]) -> int:
    # In sessions of their own: a Ctrl-C in the terminal reaches this process alone, which passes it on once.
    children = [
        subprocess.Popen(command, env={**os.environ, "JAX_LOCAL_DEVICE_IDS": str(number)}, start_new_session=True)
        for number, command in enumerate(commands)
    ]

    def stop(*_: object) -> None:
        for child in children:
            child.terminate()  # does nothing to one that has ended

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    status, deadline = 0, float("inf")
    while any([child.poll() is None for child in children]):
        failed = next((child.returncode for child in children if child.returncode), 0)
        if failed and not status:
            status, deadline = failed, time.monotonic() + GRACE
            if failed != 75:  # with 75 they have all agreed to end
                stop()
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.1)
    status = status or next((child.returncode for child in children if child.returncode), 0)
    return status if status >= 0 else 128 - status  # as a shell says that a signal ended it


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
