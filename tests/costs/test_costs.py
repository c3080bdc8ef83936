"""Formulas against compiled programs, caches that exist, and the paper's own tables."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from deconstruct import cli
from deconstruct.attention.form import Form
from deconstruct.attention.registry import FORMS
from deconstruct.attention.variants import find_variant, one_of_each
from deconstruct.costs import accounting, programs, side_by_side
from deconstruct.costs.paper import PAPER_COSTS, without_formulas
from deconstruct.kernels import reference
from deconstruct.model.decode import Decoder, cache_bytes
from deconstruct.model.language_model import build_model
from tests.tiny import PARTS_AND_CROSSED, PARTS_QUICKLY, quick, tiny_config

BATCH, LENGTH = 2, 512


def sized(name, **more):
    """Heads of 128, as in 1.7b: per cell of a map the element-wise operations are then few beside the matmuls."""
    sizes = {"hidden_size": 256, "num_heads": 2, "intermediate_size": 256, "num_layers": 2, "vocab_size": 256, **more}
    return tiny_config(sizes, variant=name, sequence_length=LENGTH).model


def check_dense(config, name):
    dense = programs.abstract_block(config, name).mixer.flops(BATCH, LENGTH).dense
    program = programs.mixer_program(dataclasses.replace(config, impl="reference"), name, BATCH, LENGTH)
    # Element-wise work is in some formulas, and in no count.
    assert programs.counted_flops(program) == pytest.approx(dense, rel=0.05)
    assert programs.counted_flops(programs.with_gradients(program)) / 3 == pytest.approx(dense, rel=0.05)


def check_decoding(config, name):
    formula = programs.abstract_block(config, name).mixer.decode_flops(BATCH, LENGTH).needed
    program = programs.mixer_decode_program(config, name, BATCH, LENGTH)
    assert programs.counted_flops(program) == pytest.approx(formula, rel=0.05)


@pytest.mark.parametrize("name", PARTS_QUICKLY)
def test_flops_are_those_of_the_programs(name):
    """The definition's, the fast path's and one more token's. In the fast path chunks on the diagonal are computed
    whole: at this length an eighth of the causal half, or the like; a form without one needs what its definition
    takes."""
    config = sized(name)
    check_dense(config, name)
    mixer = programs.abstract_block(config, name).mixer
    needed = mixer.flops(1, 2048).needed
    found = programs.counted_flops(programs.mixer_program(config, name, 1, 2048))
    # A band is computed in chunks as wide as itself, twice its cells; the projections are beside it.
    assert 0.95 * needed < found < (1.4 if mixer.reach else 1.2) * needed
    # At the width of 500m: adding to a state is element-wise, and small beside the projections.
    check_decoding(sized(name, hidden_size=896, num_heads=14), name)


@pytest.mark.parametrize("name", ["hidden/cubic", "fixed_random/cubic"])
def test_a_form_that_only_has_weights_is_counted(name, monkeypatch):
    class Cubic(Form):
        name = "cubic"

        def weights(self, q, k, mask):
            x = reference.logits(q, k)
            series = jnp.where(mask.dense(*x.shape[-2:]), 1 + x + x * x / 2 + x * x * x / 6, 0)
            return series / series.sum(-1, keepdims=True)

    monkeypatch.setitem(FORMS, "cubic", Cubic)
    check_dense(sized(name), name)
    check_decoding(sized(name), name)


def test_products_in_loops_are_counted_as_often_as_they_are_done():
    def program(x, y):
        def body(carry, _):
            return carry @ y, jnp.einsum("ij,kj->ik", carry, carry)

        return jax.lax.scan(jax.checkpoint(body), x, None, length=7)

    x = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    y = jax.ShapeDtypeStruct((5, 5), jnp.float32)
    assert programs.counted_flops(programs.Program(program, x, (y,))) == 7 * 2 * (3 * 5 * 5 + 3 * 3 * 5)


@pytest.mark.parametrize("name", ["standard", "rnd_emb_qk", "mlp"])
def test_totals_are_those_of_the_model(name):
    """XLA's own count of the compiled program too, which is unrolled here."""
    config = dataclasses.replace(sized(name, hidden_size=512, num_heads=4, num_layers=2), layers=(name, "standard"))
    plain = dataclasses.replace(config, impl="reference")
    prefill = programs.model_prefill_program(plain, BATCH, LENGTH)
    dense = accounting.prefill_flops(config, BATCH, LENGTH).dense
    assert programs.counted_flops(prefill) == pytest.approx(dense, rel=0.02)
    assert programs.compiled_flops(prefill) == pytest.approx(dense, rel=0.05)
    train = programs.counted_flops(programs.model_train_program(plain, BATCH, LENGTH))
    assert train == pytest.approx(accounting.train_flops(config, BATCH, LENGTH).dense, rel=0.02)
    decoded = programs.counted_flops(programs.model_decode_program(config, BATCH, LENGTH))
    assert decoded == pytest.approx(accounting.decode_flops(config, BATCH, LENGTH).needed, rel=0.02)


@pytest.mark.parametrize("name", quick(PARTS_AND_CROSSED, ["fixed_random/softmax"]))
def test_cache_bytes_are_those_of_a_cache(name):
    config = tiny_config({"num_kv_heads": 2, "scan": False}, variant=name, layout="even").model
    _, cache, _ = Decoder(build_model(config), 3, 12).prefill(jnp.zeros((3, 2), jnp.int32))
    held = sum(x.nbytes for x in jax.tree.leaves(cache) if x.ndim)
    assert held == accounting.cache_bytes(config, 3, 12) == cache_bytes(cache)


def test_bytes_kept_for_the_backward_pass():
    """sin keeps cos(x), the matmul keeps sin(x) and its weights; weights and what is made of them do not count."""

    def program(parameters, x):
        return jnp.sin(x) @ (2 * parameters)

    weights, x = jax.ShapeDtypeStruct((5, 7), jnp.float32), jax.ShapeDtypeStruct((3, 5), jnp.float32)
    assert programs.kept_bytes(programs.Program(program, weights, (x,))) == 2 * 3 * 5 * 4


def test_rope_tables_are_not_differentiated():
    """Their gradients would need q and k before rotation, in float32."""
    program = programs.mixer_program(sized("standard"), "standard", 1, 64)
    differentiated = program._replace(inputs=program.inputs + program.constants, constants=())
    queries_and_keys = 2 * 64 * 2 * 128 * 4
    assert programs.kept_bytes(differentiated) == programs.kept_bytes(program) + queries_and_keys


def test_a_static_layer_below_a_fixed_one():
    config = dataclasses.replace(sized("standard", num_layers=3), layers=("static_emb_qk", "standard", "rnd_emb_qk"))
    assert min(accounting.layer_activation_bytes(config, BATCH, LENGTH)) > 0
    assert accounting.forward_flops(config, BATCH, LENGTH).needed > 0


def test_remat_keeps_the_streams_and_one_layer():
    plain = sized("standard", remat=False, num_layers=6)
    one = programs.kept_bytes(programs.block_program(plain, "standard", BATCH, LENGTH))
    assert accounting.activation_bytes(plain, BATCH, LENGTH) == 6 * one
    stream = LENGTH * 256 * 4
    remat = dataclasses.replace(plain, remat=True)
    assert accounting.activation_bytes(remat, BATCH, LENGTH) == 6 * BATCH * stream + one
    fixed = dataclasses.replace(
        remat, layers=("standard", "rnd_emb_qk", "standard", "standard", "standard", "standard")
    )
    first, second = accounting.layer_activation_bytes(fixed, BATCH, LENGTH)[:2]
    assert first == programs.kept_bytes(programs.block_program(fixed, "standard", BATCH, LENGTH, with_x=True)) > one
    assert accounting.activation_bytes(fixed, BATCH, LENGTH) == (6 * BATCH + 2) * stream + max(first, second)


B, L, D, H = 3, 40, 24, 4
# Ours minus the paper's: FLOPs of prefill, of one more token.
DIFFERENCES = {
    "standard": (2 * B * L * D**2, 2 * B * D**2),
    "static_emb_qk": (2 * B * L * D**2, 2 * B * D**2),
    "rnd_emb_qk": (4 * L * D**2 - 2 * B * L * D**2, -2 * B * D**2),
    "fixed_seq_qk": (4 * L * D**2 - 2 * B * L * D**2, -2 * B * D**2),
    "mlp": (2 * B * L * D**2 + 6 * B * L * D, 2 * B * D**2 + 6 * B * D),  # one unit of width for the three biases
    "non_approximate": (2 * B * L * D**2 + 5 * B * L * D, 2 * B * D**2 + 5 * B * D),
    "taylor_diagonal": (
        L * (2 * B * D**2 + 8 * B * D**2 // H + 8 * B * D - 8 * B * D**2),
        2 * B * D**2 + 8 * B * D**2 // H + 8 * B * D - 4 * B * D**2,
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_papers_tables_but_for_the_differences_that_are_told(name):
    config = tiny_config({"hidden_size": D, "num_heads": H, "num_layers": 1}, variant=name, sequence_length=L).model
    mixer, paper, (prefill, decode) = programs.abstract_block(config, name).mixer, PAPER_COSTS[name], DIFFERENCES[name]
    forward = mixer.flops(B, L)
    # The paper counts recurrences as such, and every other map whole.
    ours = forward.needed if name in ("non_approximate", "taylor_diagonal") else forward.dense
    assert ours - paper.prefill(B, L, D, H) == prefill
    assert mixer.decode_flops(B, L).needed - paper.decode(B, L, D, H) == decode
    assert paper.differs


@pytest.mark.parametrize("name", PAPER_COSTS)
def test_cache_bytes_of_the_paper(name):
    """Keys and values in bfloat16; a state is float32 here, twice the bytes."""
    sizes = {"hidden_size": D, "num_heads": H, "num_layers": 1, "dtype": "bfloat16"}
    config = tiny_config(sizes, variant=name, sequence_length=L).model
    ours, paper = accounting.cache_bytes(config, B, L), PAPER_COSTS[name].cache(B, L, D, H)
    form = find_variant(name).form
    if form is None or form.name == "softmax":
        assert ours == paper
    elif name == "taylor_diagonal":
        assert ours == 2 * paper + 4 * B  # and a count of positions
    else:
        assert ours == 2 * paper


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({}, ""),
        pytest.param(
            {"num_kv_heads": 2},
            "as many key heads as query heads; this configuration has fewer.",
            marks=pytest.mark.proof,
        ),
        pytest.param(
            {"head_dim": 6}, "this configuration has 4 heads of 6, together 24, and d = 16.", marks=pytest.mark.proof
        ),
        (
            {"head_dim": 6, "num_kv_heads": 2},
            "has fewer. The paper's formulas are for heads that share out the width d",
        ),
    ],
)
def test_shapes_that_the_paper_does_not_speak_of(sizes, reason):
    config = tiny_config(sizes).model
    row = side_by_side.layer_costs(config, "standard", 1, 8)
    assert all((row[key]["paper"] is None) == bool(sizes) for key in ("prefill", "decode", "cache", "activations"))
    said = side_by_side._notes([row], without_formulas(config))[0]
    assert reason in said and ("measured is all JAX keeps" in said) == (not sizes)


@pytest.mark.parametrize("name", ["standard", "approximate", "mlp", "rnd_emb_qk"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_formulas_where_heads_do_not_share_out_the_width(name, head_dim):
    """Two heads of 64 or 256 in a width of 256."""
    config = sized(name, head_dim=head_dim, block="qwen3")
    check_dense(config, name)
    decoded = programs.abstract_block(config, name).mixer.decode_flops(BATCH, LENGTH).needed
    program = programs.mixer_decode_program(config, name, BATCH, LENGTH)
    # Element-wise work (states, norms) is small beside the projections, as above, but these are smaller.
    assert programs.compiled_flops(program) == pytest.approx(decoded, rel=0.1)


def test_kernels_of_another_device_are_counted_as_those_of_xla():
    plain = sized("standard")
    cudnn = dataclasses.replace(plain, impl="cudnn", dtype="bfloat16")
    kept = accounting.activation_bytes(cudnn, BATCH, LENGTH)
    assert kept == accounting.activation_bytes(dataclasses.replace(cudnn, impl="xla"), BATCH, LENGTH) > 0


@pytest.mark.proof
def test_describe_prints_them_side_by_side(tmp_path, capsys):
    arguments = ["--config=configs/quickstart.py", "--config.sequence_length=8", "--config.model.num_layers=1"]
    assert cli.main(["describe", "--costs", "--json", "--batch=2", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)["costs"]
    assert [row["variant"] for row in found["layer"]] == one_of_each()
    text = side_by_side.as_text(found)
    for row in found["layer"]:
        assert row["cache"]["formula"] == row["cache"]["measured"]
        assert text.count(f"\n{row['variant']} ") >= 4
    assert found["model"]["train"]["compiled"] > found["model"]["train"]["needed"] > 0
    assert "in the paper the output projection is left out" in text
    assert "measured is all JAX keeps" in text and "The paper's formulas are for" not in text
    assert "bytes of the fixed stream beside its cache" in text
