"""Several processes are one: the losses of a run, and its checkpoints, do not depend on who computed them."""

import shutil

import jax
import numpy as np
import portpicker
import pytest
from flax import nnx

from deconstruct.attention.registry import FORMS
from deconstruct.config import MeshConfig
from deconstruct.distributed.mesh import make_mesh
from deconstruct.run.checkpoint import finished_steps
from deconstruct.run.restore import restore_model
from tests.train.test_run import Launch, run_config, trajectory

pytestmark = pytest.mark.proof

# taylor_diagonal divides by sums that may be near zero: a last bit of its inputs moves gradients by a thousandth. What
# it may be told to divide by instead is not.
STEADY = {"taylor_diagonal": "taylor_diagonal(normalise=jointly)"}
# All forms and all sources, in models of as many layers; a model has at most one fixed source.
MODELS = {
    "forms": [f"hidden/{STEADY.get(name, name)}" for name in FORMS] + ["fixed_random/softmax"],
    "sources": ["static_embedding/softmax", "fixed_text/softmax", "mlp", "static_embedding/gated_linear"],
}


def config_of(data, layers, steps, devices):
    """With steps so small that Adam does not make of the last bits of a gradient what can be seen in the next."""
    model = {"num_layers": len(layers), "intermediate_size": 32}
    mesh = {"data": 2, "fsdp": devices // 2}
    layout = ",".join(layers)
    top = {"variant": "standard", "layout": layout, "learning_rate": 1e-3, "checkpoint_every": 4}
    return run_config(data, model, steps=steps, mesh=mesh, **top)


def cluster(launch, workdir, processes):
    port = portpicker.pick_unused_port()
    launch.finish(*(launch.start(workdir, 2, (port, processes, i)) for i in range(processes)))


@pytest.mark.parametrize("model", MODELS)
def test_processes_are_as_many_devices_of_one(prepared, tmp_path, model):
    for processes in (2, 4):
        devices = 2 * processes
        launch = Launch(tmp_path / f"launch-{processes}", config_of(prepared, MODELS[model], 8, devices))
        one, several = tmp_path / f"one-{processes}", tmp_path / f"several-{processes}"
        launch.finish(launch.start(one, devices))
        cluster(launch, several, processes)
        alone, shared = trajectory(one), trajectory(several)
        assert [record["step"] for record in shared] == list(range(1, 9))
        for a, b in zip(alone, shared, strict=True):
            assert a["tokens"] == b["tokens"] and a["learning_rate"] == b["learning_rate"]
            # The same float32 sums over devices, which gloo may add up in another order; what that makes of the first
            # update's last bits, the next ones carry on. A sum over too few devices would be off by a factor.
            rtol = 2e-6 if a["step"] == 1 else 1e-4
            np.testing.assert_allclose((b["loss"], b["grad_norm"]), (a["loss"], a["grad_norm"]), rtol=rtol)
        assert finished_steps(several / "checkpoints") == [4, 8]

    # What four processes have saved, on one, two and eight devices here.
    arrays = []
    for count in (1, 2, 8):
        mesh = make_mesh(MeshConfig(1, count, 1), jax.devices()[:count])
        restored = restore_model(tmp_path / "several-4", mesh=mesh)
        arrays.append([np.asarray(x) for x in jax.tree.leaves(nnx.state(restored))])
    for other in arrays[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, arrays[0])

    # The rest by one process of eight devices, of two, and by two processes: the same data in the same order.
    ends = []
    for name, start in (
        ("eight", lambda launch, run: launch.finish(launch.start(run, 8))),
        ("two", lambda launch, run: launch.finish(launch.start(run, 2))),
        ("pair", lambda launch, run: cluster(launch, run, 2)),
    ):
        run = tmp_path / name
        shutil.copytree(tmp_path / "several-4", run)
        devices = {"eight": 8, "two": 2, "pair": 4}[name]
        start(Launch(tmp_path / f"rest-{name}", config_of(prepared, MODELS[model], 12, devices)), run)
        ends.append([(record["step"], record["loss"]) for record in trajectory(run)][8:])
    for end in ends[1:]:
        assert [step for step, _ in end] == [9, 10, 11, 12]
        np.testing.assert_allclose([x for _, x in end], [x for _, x in ends[0]], rtol=1e-4)  # as above
