"""Documents packed into one row, in a whole model: each is computed as if it stood alone, and decoded so too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deconstruct.kernels.mask import document_begins
from deconstruct.model.language_model import build_model
from deconstruct.model.placement import split_model
from deconstruct.train.step import batch_of
from tests.model.test_decode import decode
from tests.tiny import quick, tiny_config

END, LENGTH = 39, 24
# Where an end of text stands in each of two rows: documents of 7, 1, 9 and of 13 and 6 tokens, and what is left.
ENDS = ((6, 7, 16), (12, 18))
# What a form or mixer makes of documents is a row of `dc.check`; here it is the model around them.
SERVING = ["mlp", "static_emb_qk", "hidden/softmax", "hidden/gated_delta"]


def model_of(name, **model):
    # Uniform; init_std large enough that what lies across a border would show.
    sizes = {"init_std": 0.3, "end_of_text": END, "num_kv_heads": 2, **model}
    config = tiny_config(sizes, variant=name, sequence_length=LENGTH, document_mask=True).model
    return build_model(config, seed=3)


def packed():
    tokens = np.array(jax.random.randint(jax.random.key(0), (2, LENGTH), 0, END))
    for row, ends in enumerate(ENDS):
        tokens[row, list(ends)] = END
    return jnp.asarray(tokens)


def test_where_documents_begin():
    begins = np.asarray(document_begins(packed(), END))
    assert begins[0].tolist() == [0] * 7 + [7] + [8] * 9 + [17] * 7
    assert begins[1].tolist() == [0] * 13 + [13] * 6 + [19] * 5
    later = document_begins(packed()[:, 3:], END, jnp.array([-3, 0]))
    assert later[0].tolist() == [-3] * 4 + [4] + [5] * 9 + [14] * 7 and later[1, 0] == 0


@pytest.mark.parametrize("name", quick(SERVING, ["hidden/softmax"]))
def test_a_document_in_a_row_is_the_document_alone(name):
    """Logits, and the gradients of all parameters for the loss of one document; then prefill, pieces and tokens."""
    model, tokens = model_of(name), packed()
    graphdef, params, frozen = split_model(model)

    @jax.jit
    def logits_and_gradients(params, tokens, weights):
        def loss(params):
            logits = nnx.merge(graphdef, params, frozen)(tokens)
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
            return jnp.sum(nll * weights), logits

        return jax.grad(loss, has_aux=True)(params)

    begin, end = 8, 17  # the third document of the first row
    weights = jnp.zeros((2, LENGTH)).at[0, begin:end].set(1.0)
    gradients, logits = logits_and_gradients(params, tokens, weights)
    alone_gradients, alone = logits_and_gradients(params, tokens[:1, begin:end], jnp.ones((1, end - begin)))
    # float32 sums in another order; RoPE's angles are those of other positions, and only their differences count.
    scale = float(jnp.abs(alone).max())
    np.testing.assert_allclose(logits[:1, begin:end], alone, atol=2e-4 * scale)
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(alone_gradients), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-3 * max(float(jnp.abs(want).max()), 1e-3))

    other = tokens.at[0, 2].set((tokens[0, 2] + 1) % END)  # another document of that row
    moved = np.abs(np.asarray(logits_and_gradients(params, other, weights)[1] - logits)).max(-1) > 1e-5 * scale
    assert moved[0, 2] and not moved[0, 7:].any() and not moved[1].any()

    chunks = (10, 7, *[1] * 7)  # a prompt that ends within a document, a piece with a border, then token by token
    got = decode(model, tokens, chunks)
    want = np.asarray(logits)[:, np.cumsum(chunks) - 1].swapaxes(0, 1)
    np.testing.assert_allclose(got, want, atol=2e-4 * scale)


def test_without_the_mask_documents_see_each_other():
    config = tiny_config({"init_std": 0.3}, sequence_length=LENGTH).model
    model, tokens = build_model(config, seed=3), packed()
    other = tokens.at[0, 2].set((tokens[0, 2] + 1) % END)
    assert float(jnp.abs(model(tokens) - model(other))[0, 8:].max()) > 1e-4


def test_the_first_token_of_a_document_may_be_left_out_of_the_loss():
    rows = packed()
    assert batch_of(rows)["weights"].min() == 1.0
    weights = np.asarray(batch_of(rows, END)["weights"])
    assert sorted(zip(*np.where(weights == 0), strict=True)) == sorted(
        (r, e) for r, ends in enumerate(ENDS) for e in ends
    )
