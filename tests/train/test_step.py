"""The step as a pure function."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deconstruct.distributed.mesh import make_mesh
from deconstruct.model.placement import decay_mask
from deconstruct.train.optimizer import make_optimizer, make_schedule
from deconstruct.train.state import make_state_spec
from deconstruct.train.step import batch_of, make_step
from tests.tiny import PAPER_NAMES, quick, tiny_config


def prepare(config):
    optimizer = make_optimizer(config)
    spec = make_state_spec(config, optimizer, make_mesh(config.mesh))
    return optimizer, spec, spec.init(None)


def ragged_batch(config, seed=0):
    rows = jax.random.randint(jax.random.key(seed), (8, 13), 0, config.model.vocab_size)
    batch = batch_of(rows)
    # Row i has i + 1 targets that count: microbatches weigh differently.
    counted = jnp.arange(12)[None, :] <= jnp.arange(8)[:, None]
    return {**batch, "weights": counted.astype(jnp.float32)}


@pytest.mark.parametrize("parts", quick([2, 8], [2]))
def test_accumulation_is_the_big_batch_with_ragged_weights(parts):
    config = tiny_config({"num_layers": 1}, variant="approximate", mesh={"fsdp": 1, "data": -1}, learning_rate=1e-2)
    optimizer, spec, state = prepare(config)
    batch = ragged_batch(config)

    def after(accumulation):
        step = make_step(spec.graphdef, optimizer, make_schedule(config), accumulation)
        return jax.jit(step)(state, batch)

    (whole, metrics), (parts_state, parts_metrics) = after(1), after(parts)
    assert metrics["tokens"] == parts_metrics["tokens"] == 36  # 1 + 2 + ... + 8
    # float32 sums in another order; Adam's epsilon of the tiny config keeps them from growing.
    np.testing.assert_allclose(metrics["loss"], parts_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], parts_metrics["grad_norm"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.params, parts_state.params)
    # and it does not equal the mean of the microbatches' means, which is the usual mistake
    means = [
        float(jnp.sum(nll * w) / jnp.sum(w))
        for nll, w in zip(
            *(jnp.split(x, parts) for x in (token_losses(spec, state, batch), batch["weights"])), strict=True
        )
    ]
    assert abs(np.mean(means) - metrics["loss"]) > 1e-4


def token_losses(spec, state, batch):
    return nnx.merge(spec.graphdef, state.params, state.frozen).token_losses(batch["tokens"], batch["targets"])


def test_the_loss_is_the_mean_negative_log_likelihood_over_unpadded_ids():
    config = tiny_config({"vocab_size": 40, "init_std": 0.3})
    _, spec, state = prepare(config)
    model = nnx.merge(spec.graphdef, state.params, state.frozen)
    batch = ragged_batch(config)
    logits = np.asarray(model(batch["tokens"]), np.float64)
    assert logits.shape == (8, 12, 40) and model.output_table().shape == (128, config.model.hidden_size)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_p, np.asarray(batch["targets"])[..., None], -1)[..., 0]
    # float32 logits and sums against float64.
    np.testing.assert_allclose(token_losses(spec, state, batch), want, rtol=1e-5)
    total = model.loss(batch["tokens"], batch["targets"], batch["weights"])
    np.testing.assert_allclose(total, (want * np.asarray(batch["weights"])).sum(), rtol=1e-5)


@pytest.mark.parametrize("name", quick(PAPER_NAMES, ["rnd_emb_qk"]))
def test_one_batch_can_be_overfitted(name):
    config = tiny_config(
        {"num_layers": 1, "hidden_size": 32},
        variant=name,
        layout="uniform",
        learning_rate=2e-2,
        steps=60,
        mesh={"fsdp": 1, "data": -1},
    )
    optimizer, spec, state = prepare(config)
    step = jax.jit(make_step(spec.graphdef, optimizer, make_schedule(config)), donate_argnums=0)
    # No token has two successors: also what mixes nothing can learn it by heart.
    rows = jax.random.permutation(jax.random.key(0), 39)[jnp.arange(8)[:, None] * 3 + jnp.arange(13)[None, :]]
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch_of(rows))
        losses.append(float(metrics["loss"]))
    assert losses[0] > 3.4 and losses[-1] < 0.3, losses[::10]  # log(40) = 3.7


def test_the_state_is_donated_and_counts_its_updates():
    config = tiny_config()
    optimizer, spec, state = prepare(config)
    step = jax.jit(
        make_step(spec.graphdef, optimizer, make_schedule(config)),
        donate_argnums=0,
        out_shardings=(spec.shardings, None),
    )
    after, _ = step(state, ragged_batch(config))
    assert int(after.step) == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    # Moments are sharded as their parameters are.
    jax.tree.map(lambda m, p: _same_sharding(m, p), optax.tree_utils.tree_get(after.opt_state, "mu"), after.params)


def _same_sharding(moment, parameter):
    assert moment.sharding == parameter.sharding


def test_schedule():
    config = tiny_config(steps=100, learning_rate=1.0, optimizer={"warmup_steps": 10})
    schedule = make_schedule(config)
    rates = [float(schedule(jnp.array(i))) for i in (0, 9, 10, 55, 100, 200)]
    np.testing.assert_allclose(rates, [0.1, 1.0, 1.0, 0.5, 0.0, 0.0], atol=1e-6)  # float32 cosine
    longer = tiny_config(steps=100, learning_rate=1.0, optimizer={"warmup_steps": 10, "schedule_steps": 190})
    np.testing.assert_allclose(float(make_schedule(longer)(jnp.array(100))), 0.5, atol=1e-6)


def test_norms_and_biases_are_not_decayed():
    mask = decay_mask(tiny_config({"block": "qwen3"}).model)
    flat = {".".join(str(k.key) for k in path): keep for path, keep in jax.tree_util.tree_leaves_with_path(mask)}
    assert {name for name, keep in flat.items() if not keep} == {
        name for name in flat if name.endswith((".scale", ".bias"))
    }
    assert flat["embed.embedding"] and any(name.endswith("q_norm.scale") for name in flat)
