#!/usr/bin/env python3
"""One run on Google Kubernetes Engine, as a JobSet: a job a slice, a pod a machine, all started again when one is lost.

    launch/gke.py --image=IMAGE --tpu=tpu-v5-lite-podslice --topology=4x4 --nodes=4 -- --config=... --workdir=gs://...
    launch/gke.py --image=IMAGE --gpu=nvidia-h100-80gb --chips=8 --nodes=2 -- --config=... --workdir=gs://...

IMAGE has `deconstruct` installed. A mistake in the arguments (status 2) is not tried again; a failure, a lost machine
and status 75 (saved, to go on) are. Logs: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from arguments import make_parser, name_of_run, parse

PORT = 8476
JOBSET = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
  annotations: {annotations}
spec:
  network:
    enableDNSHostnames: true
  failurePolicy:
    maxRestarts: {restarts}
    rules:
    - name: mistake
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: {slices}
    template:
      spec:
        completionMode: Indexed
        completions: {nodes}
        parallelism: {nodes}
        backoffLimit: 0  # one pod alone cannot go on: the whole set is started again
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values: [2]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120  # to save in, after TERM
            nodeSelector: {selector}
            containers:
            - name: train
              image: {image}
              command: {command}
              resources:
                limits: {limits}
"""


def main(words: list[str]) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--image", required=True)
    parser.add_argument("--name", help="of the JobSet (default: the last part of --workdir)")
    parser.add_argument("--tpu", metavar="TYPE", help="the node pool's cloud.google.com/gke-tpu-accelerator")
    parser.add_argument("--topology", help="the node pool's cloud.google.com/gke-tpu-topology")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="TPU slices (default: 1)")
    parser.add_argument("--gpu", metavar="TYPE", help="the node pool's cloud.google.com/gke-accelerator")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="machines, of each slice")
    parser.add_argument("--chips", type=int, metavar="N", help="chips, or GPUs, of a machine (default: 4, or 8)")
    parser.add_argument("--restarts", type=int, default=100, metavar="N", help="default: 100")
    arguments, train = parse(parser, words)
    if (arguments.tpu is None) == (arguments.gpu is None):
        parser.error("expected --tpu=TYPE or --gpu=TYPE")
    if arguments.tpu and not arguments.topology:
        parser.error("--tpu: expected --topology, such as 4x4")
    if arguments.gpu and (arguments.slices > 1 or arguments.topology):
        parser.error("--gpu: --slices and --topology are a TPU's; leave them out")
    name = name_of_run(parser, arguments.name, train)
    yaml = job_set(name, arguments, train)
    if arguments.dry_run:
        print(yaml, end="")
        return 0
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=yaml, text=True).returncode


def job_set(name: str, arguments: argparse.Namespace, train: list[str]) -> str:
    """The JobSet. JSON is YAML: what holds a user's words is written as such."""
    gke = "cloud.google.com/gke-"
    if arguments.tpu:
        chips = arguments.chips or 4
        place = ["--distributed"]  # GKE tells a TPU's machines about each other
        selector = {f"{gke}tpu-accelerator": arguments.tpu, f"{gke}tpu-topology": arguments.topology}
        limits = {"google.com/tpu": chips}
        annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": f"{gke}nodepool"}
    else:
        chips = arguments.chips or 8
        place = [f"--coordinator={name}-slice-0-0.{name}:{PORT}", f"--num-processes={arguments.nodes}"]
        place += ["--process-id=$(JOB_COMPLETION_INDEX)", "--process-per=node"]
        place += [f"--expect-devices={arguments.nodes * chips}"]
        selector = {f"{gke}accelerator": arguments.gpu}
        limits = {"nvidia.com/gpu": chips}
        annotations = {}
    words = [word.replace("$(", "$$(") for word in train]  # Kubernetes would put a variable there
    return JOBSET.format(
        name=name,
        annotations=json.dumps(annotations),
        restarts=arguments.restarts,
        slices=arguments.slices,
        nodes=arguments.nodes,
        selector=json.dumps(selector),
        image=json.dumps(arguments.image),
        command=json.dumps(["deconstruct", "train", *place, *words]),
        limits=json.dumps(limits),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
