"""Meshes, where every parameter lies on them, and that a model on eight devices is the model on one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from deconstruct.attention.registry import FORMS
from deconstruct.config import MeshConfig
from deconstruct.distributed.mesh import check_batch, make_mesh, parse_mesh, single_device_mesh
from deconstruct.distributed.sharding import RULES, batch_spec, constrain, spec, state_shardings
from deconstruct.experiment import load_config
from deconstruct.model.language_model import abstract_model
from deconstruct.model.placement import abstract_arrays, mesh_for
from deconstruct.types import UserError
from tests.tiny import MIXER_NAMES, PAPER_NAMES, PARTS, PARTS_AND_CROSSED, quick, tiny_config


def mesh_of(data, fsdp, tensor):
    return make_mesh(MeshConfig(data, fsdp, tensor))


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((-1, -1, 1), (1, 8, 1)),
        ((-1, -1, 2), (1, 4, 2)),
        ((8, 1, -1), (8, 1, 1)),
        ((2, 4, 1), (2, 4, 1)),
    ],
)
def test_meshes(asked, sizes):
    mesh = mesh_of(*asked)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and tuple(mesh.shape.values()) == sizes
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_one_device_and_some():
    assert single_device_mesh().size == 1
    assert make_mesh(MeshConfig(fsdp=-1, tensor=3), jax.devices()[:6]).shape["fsdp"] == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            (3, -1, 1),
            r"config.mesh: data=3 x fsdp=-1 x tensor=1 does not make 8 devices; what is fixed does not divide",
        ),
        ((-1, -1, 3), r"config.mesh: data=-1 x fsdp=-1 x tensor=3 does not make 8 devices; what is fixed does not"),
        ((1, 4, 1), r"config.mesh: data=1 x fsdp=4 x tensor=1 does not make 8 devices; set one axis to -1"),
        ((16, -1, 1), r"does not make 8 devices"),
    ],
)
def test_meshes_that_are_none(asked, message):
    with pytest.raises(UserError, match=message):
        mesh_of(*asked)


@pytest.mark.parametrize(
    ("width", "tensor", "sizes", "said"),
    [
        (12, 1, (2, 4, 1), "data=2, fsdp=4, tensor=1 (8 does not divide 12"),
        (14, 1, (4, 2, 1), "data=4, fsdp=2, tensor=1 (8 does not divide 14"),
        (12, 2, (1, 4, 2), ""),
        (16, 1, (1, 8, 1), ""),
    ],
)
def test_the_default_mesh_fits_the_model_and_says_so(width, tensor, sizes, said, caplog):
    caplog.set_level("INFO")
    config = tiny_config({"hidden_size": width, "num_heads": 2, "head_dim": 4}).model
    mesh = mesh_for(config, MeshConfig(tensor=tensor))
    assert tuple(mesh.shape.values()) == sizes
    assert said in caplog.text and bool(said) == bool(caplog.text)
    abstract_arrays(config, mesh)
    if sizes[0] > 1:  # asked for by name, what does not divide is refused
        with pytest.raises(UserError, match=r"config.mesh.fsdp=8 does not divide"):
            abstract_arrays(config, mesh_for(config, MeshConfig(data=1)))


def test_what_tensor_parallelism_leaves_whole_is_said(caplog):
    caplog.set_level("INFO")
    mesh_for(tiny_config(variant="mlp", layout="even").model, MeshConfig(tensor=2))
    assert "tensor=2 leaves MLPs of matched width (22) whole on each device" in caplog.text


@pytest.mark.parametrize(("text", "sizes"), [("fsdp=4,tensor=2", (-1, 4, 2)), ("data=2, fsdp=-1", (2, -1, 1))])
def test_a_mesh_on_the_command_line(text, sizes):
    assert parse_mesh(text) == MeshConfig(*sizes)


@pytest.mark.parametrize("text", ["", "4", "fsdp", "fsdp=0", "rows=2", "tensor=-1", "fsdp=4;tensor=2"])
def test_a_mesh_on_the_command_line_that_is_none(text):
    with pytest.raises(UserError, match=rf"--mesh={text}: expected sizes of data, fsdp, tensor, as in fsdp=4,tensor=2"):
        parse_mesh(text)


def test_presets_of_meshes():
    for name in ("v5e", "v6e", "v5p", "tpu7x", "h100", "h200"):
        mesh = load_config(f"configs/paper.py:size=70m,mesh={name}").mesh
        assert mesh.data == -1 and mesh.fsdp in (8, 16) and mesh.tensor == 1
    with pytest.raises(UserError, match=r"mesh=v9: expected one of v5e, v6e"):
        load_config("configs/paper.py:mesh=v9")


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "message"),
    [
        (12, 1, None),
        (16, 1, None),
        (16, 4, None),
        (16, 8, r"config.batch_size=16 / accumulation=8 does not .*; 32 would, or config.mesh.tensor=4$"),
        (2, 1, r"config.batch_size=2 does not divide over 4 devices \(mesh data x fsdp\); 4 would"),
        (30, 3, r"config.batch_size=30 / accumulation=3 does not .*; 24 would"),
    ],
)
def test_batches_over_devices(batch_size, accumulation, message):
    config, mesh = tiny_config(batch_size=batch_size, accumulation=accumulation), mesh_of(2, 2, 2)
    if message is None:
        check_batch(config, mesh)
        return
    with pytest.raises(UserError, match=message) as raised:
        check_batch(config, mesh)
    proposed = int(re.search(r"(\d+) would", str(raised.value))[1])
    check_batch(config.replace(batch_size=proposed), mesh)
    if "tensor=4" in str(raised.value):
        check_batch(config, mesh_of(1, 2, 4))


def test_specs():
    assert spec(("embed", "heads", None), 3) == PartitionSpec("fsdp", "tensor", None)
    assert spec(("embed", "mlp"), 3) == PartitionSpec(None, "fsdp", "tensor")  # stacked layers in front
    assert spec(("batch", None), 2) == PartitionSpec(("data", "fsdp"), None)
    assert set(RULES.values()) <= {None, "data", "fsdp", "tensor", ("data", "fsdp")}


def test_constrain_leaves_whole_what_does_not_divide():
    axes = ("batch", None)

    def sharded_like(count):
        return jax.jit(lambda x: constrain(x, axes))(jnp.zeros((count, 3))).sharding.spec

    x = jnp.zeros((1, 3))
    assert constrain(x, axes) is x  # without a mesh
    with jax.set_mesh(mesh_of(2, 4, 1)):
        assert sharded_like(16)[0] == ("data", "fsdp")
        assert all(part is None for part in sharded_like(1))


def parameters_of(config):
    """name -> variable, of shapes alone."""
    _, state = nnx.split(abstract_model(config))
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, nnx.Param)}


@pytest.mark.parametrize("block", quick(["qwen2", "qwen3"], ["qwen3"]))
@pytest.mark.parametrize("name", quick(list(dict.fromkeys([*PAPER_NAMES, *MIXER_NAMES])), PARTS))
def test_every_parameter_names_its_axes_and_nothing_large_is_replicated(name, block):
    """Large: more than 2**12 numbers in one layer, at a width of 512. Norms and biases are smaller."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_heads": 8, "vocab_size": 5000, "tie_embeddings": False}
    config = tiny_config({**sizes, "block": block}, variant=name, layout="even").model
    mesh = mesh_of(1, 4, 2)
    found = parameters_of(config)
    assert len(found) > 10
    large = 0
    for path, parameter in found.items():
        axes = parameter.get_metadata().get("axes")
        stacked = int("segments" in path)
        assert axes is not None and len(axes) == len(parameter.shape) - stacked, path
        assert all(axis is None or axis in RULES for axis in axes), path
        if np.prod(parameter.shape[stacked:]) > 2**12:
            large += 1
            assert any(RULES[axis] for axis in axes if axis), f"{path} {parameter.shape} is on every device whole"
    assert large >= 9  # two embeddings, four projections, three of the MLP
    _, params, _ = abstract_arrays(config, mesh)
    split = [x for x in jax.tree.leaves(params) if not x.sharding.is_fully_replicated]
    assert len(split) >= large
    # A device holds little more than an eighth or a quarter: what is sharded by tensor too, and what is not.
    whole = sum(np.prod(x.shape) for x in jax.tree.leaves(params))
    held = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(params))
    assert 1 / 8 <= held / whole < 1 / 4


@pytest.mark.parametrize(
    ("model", "asked", "message"),
    [
        (
            {"hidden_size": 12, "num_heads": 2},
            (1, 8, 1),
            r"config.mesh.fsdp=8 does not divide 12, an axis of embed.embedding \(128, 12\); "
            r"data=4,fsdp=2 or data=2,fsdp=4 would fit",
        ),
        (
            {"num_heads": 4, "num_kv_heads": 2},
            (1, 2, 4),
            r"config.mesh.tensor=4 does not divide 2, an axis of stack.segments.0.0.mixer.k_proj.* \(.*\); "
            r"data=4,tensor=1 or data=2,tensor=2 would fit",
        ),
        (
            {"intermediate_size": 6},
            (2, 1, 4),
            r"config.mesh.tensor=4 does not divide 6, an axis of stack.segments.0.0.mlp.* \(.*\); "
            r"data=8,tensor=1 or data=4,tensor=2 would fit",
        ),
        ({"hidden_size": 14, "num_heads": 7}, (1, 1, 8), r"config.mesh.tensor=8 does not divide 7, .*data=8,tensor=1"),
    ],
)
def test_a_mesh_that_does_not_divide_is_named_with_meshes_that_do(model, asked, message):
    config = tiny_config(model).model
    with pytest.raises(UserError, match=message) as raised:
        abstract_arrays(config, mesh_of(*asked))
    proposals = re.findall(r"data=(\d+),(fsdp|tensor)=(\d+)", str(raised.value))
    assert proposals
    for data, axis, size in proposals:
        sizes = dict(zip(("data", "fsdp", "tensor"), asked, strict=True)) | {"data": int(data), axis: int(size)}
        abstract_arrays(config, make_mesh(MeshConfig(**sizes)))


def test_the_paper_on_256_devices_is_refused_before_anything_is_compiled():
    """896 over 256, asked for by name, from an abstract mesh: no such machine is here."""
    config = load_config("configs/paper.py:size=500m").model
    _, params = nnx.split(abstract_model(config))
    mesh = jax.sharding.AbstractMesh((1, 256, 1), ("data", "fsdp", "tensor"))
    message = r"config.mesh.fsdp=256 does not divide 896, .*data=4,fsdp=64 or data=2,fsdp=128"
    with pytest.raises(UserError, match=message):
        state_shardings(params, mesh)
    fits = jax.sharding.AbstractMesh((2, 128, 1), ("data", "fsdp", "tensor"))
    assert jax.tree.leaves(state_shardings(params, fits))


def random_arrays(config, draw):
    """Parameters and frozen arrays, drawn without compiling anything: everywhere different from zero and one."""
    graphdef, *abstract = abstract_arrays(config, single_device_mesh())
    params, frozen = (
        jax.tree.map(
            lambda x: (
                draw.integers(0, config.vocab_size, x.shape).astype(np.int32)
                if x.dtype == jnp.int32
                else (0.3 * draw.normal(size=x.shape)).astype(x.dtype)
            ),
            tree,
        )
        for tree in abstract
    )
    return graphdef, params, frozen


@pytest.mark.parametrize("name", quick(PARTS_AND_CROSSED, ["hidden/softmax", "fixed_text/softmax"]))
def test_eight_devices_compute_what_one_does(name):
    """On the mesh that splits batch, width and heads at once."""
    check_eight_devices(tiny_config({"num_layers": 1}, variant=name, layout="uniform").model, ((2, 4),))


@pytest.mark.proof
@pytest.mark.parametrize("name", ["hidden/softmax", "hidden/gated_linear", "fixed_text/softmax"])
def test_other_meshes_compute_the_same(name):
    check_eight_devices(tiny_config({"num_layers": 1}, variant=name, layout="uniform").model, ((8, 1), (4, 2)))


@pytest.mark.proof
@pytest.mark.parametrize("form", FORMS)
def test_eight_devices_with_grouped_queries(form):
    """Two key heads for four query heads, one on each of two tensor devices."""
    sizes = {"num_layers": 2, "num_kv_heads": 2}
    check_eight_devices(tiny_config(sizes, variant=f"hidden/{form}", layout="even").model, ((4, 2),))


@pytest.mark.proof
def test_eight_devices_where_heads_do_not_share_out_the_width():
    """Four heads of 6 in a width of 16."""
    config = tiny_config({"num_layers": 2, "block": "qwen3", "head_dim": 6}, variant="rnd_emb_qk", layout="even").model
    check_eight_devices(config, ((2, 4), (8, 1), (4, 2)))


def check_eight_devices(config, meshes):
    draw = np.random.default_rng(0)
    graphdef, params, frozen = random_arrays(config, draw)
    rows = draw.integers(0, config.vocab_size, (8, 13)).astype(np.int32)
    weights = draw.uniform(size=(8, 12)).astype(np.float32)

    def loss(params, frozen, rows):
        return nnx.merge(graphdef, params, frozen).loss(rows[:, :-1], rows[:, 1:], weights)

    want, want_gradients = jax.device_get(jax.jit(jax.value_and_grad(loss))(params, frozen, rows))
    assert all(np.abs(gradient).max() > 0 for gradient in jax.tree.leaves(want_gradients))
    for fsdp, tensor in meshes:
        mesh = mesh_of(1, fsdp, tensor)
        _, *abstract = abstract_arrays(config, mesh)
        shardings, frozen_shardings = jax.tree.map(lambda x: x.sharding, abstract)
        with jax.set_mesh(mesh):
            step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
            got, gradients = step(
                jax.device_put(params, shardings),
                jax.device_put(frozen, frozen_shardings),
                jax.device_put(rows, jax.NamedSharding(mesh, batch_spec())),
            )
        assert sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(gradients)) >= 7
        # The same float32 sums, of hundreds of terms, in another order. A wrong sum over devices is wrong by a factor.
        np.testing.assert_allclose(got, want, rtol=2e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max()),
            jax.device_get(gradients),
            want_gradients,
        )
