"""Indicators are what the maps say, in float64, whatever form they come from; and the verb keeps them by layer."""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconstruct.attention.attention import Attention
from deconstruct.attention.registry import FORMS
from deconstruct.cli import main
from deconstruct.config import MeshConfig
from deconstruct.distributed.mesh import make_mesh, single_device_mesh
from deconstruct.evaluate import qk_spectrum
from deconstruct.evaluate.layer_statistics import EDGES, LayerStatistics, fourth_powers
from deconstruct.model.language_model import build_model
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.restore import restore_model
from deconstruct.run.workdir import Workdir
from tests.tiny import tiny_config

LENGTH, SEQUENCES = 12, 3
FORMS_SMALL = ["hidden/window(size=5)" if form == "window" else f"hidden/{form}" for form in FORMS]
EVERY = [*FORMS_SMALL, "mlp", "static_embedding/taylor", "fixed_random/softmax", "fixed_random/self_gate"]
# Negative entries, one score a key, own scores, a window, no map, one map for the batch.
SOME = ["hidden/taylor_diagonal", "hidden/self_gate", "hidden/gated_delta", "hidden/window(size=5)", "mlp"]
SOME += ["fixed_random/softmax"]
TOKENS = np.random.default_rng(0).integers(0, 40, (SEQUENCES, LENGTH)).astype(np.int32)
# Sums of some hundred float32; taylor_diagonal's entries are large where its sums come near zero.
NEAR = {"rtol": 2e-4, "atol": 1e-5}


def by_hand(a):
    """Of maps float64 [B, heads, L, L]: as the definitions read."""
    length = a.shape[-1]
    cells = [(i, j) for i in range(length) for j in range(i + 1)]
    p = np.abs(a) / np.abs(a).sum(-1, keepdims=True)
    values = np.linalg.svd(a, compute_uv=False)
    logs = np.log(p, where=p > 0, out=np.zeros_like(p))
    found = {
        "entropy": -(p * logs).sum(-1).mean(-1),
        "concentration": np.linalg.norm(a, axis=(-2, -1)),
        "head_diversity": sum(a[:, :, i, j].std(1) for i, j in cells) / len(cells),
        "sink": a[..., 0].mean(-1),
        "map_rank": (values**2).sum(-1) ** 2 / (values**4).sum(-1),
        "top_key": a.mean(-2).max(-1),
        "top_position": a.mean(-2).argmax(-1),
    }
    return found | {f"focus_{n}": np.mean([a[..., i, i - n] for i in range(n, length)], axis=0) for n in range(4)}


def scores_by_hand(name, q, k):
    """The raw scores that are seen, float64 [B, heads, seen], from a layer's queries and keys."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    if "self_gate" in name:
        return (q / (1 + np.exp(-q)) * k).sum(-1).swapaxes(1, 2) / np.sqrt(q.shape[-1])
    if "gated_delta" in name:
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    x = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(q.shape[-1])
    i, j = np.mgrid[:LENGTH, :LENGTH]
    return x[:, :, (j <= i) & (i - j < (5 if "window" in name else LENGTH))]


def read_off(block, streams, context):
    """The stream, and where there is attention its map, queries and keys."""
    if not isinstance(block.mixer, Attention):
        return streams.h, None, None, None
    q, k, _ = block.mixer._inputs(*block._mixer_inputs(streams, context), context).h
    return streams.h, block.maps(streams, context), q, k


@pytest.mark.proof
@pytest.mark.parametrize(("layers", "devices"), [(SOME, 1), (EVERY, 8)])
def test_indicators_against_the_maps_in_float64(layers, devices):
    size = {"num_layers": len(layers), "num_kv_heads": 2, "init_std": 0.3}
    model = build_model(tiny_config(size, layout=",".join(layers)).model, seed=1)
    mesh = single_device_mesh() if devices == 1 else make_mesh(MeshConfig(data=-1, fsdp=1))
    with jax.set_mesh(mesh):
        statistics, cosines = LayerStatistics(mesh)(model, TOKENS)
    read = jax.jit(lambda tokens: model.hidden(tokens, read_off)[1])(TOKENS)
    means = []
    for name, found, (h, a, q, k) in zip(layers, statistics, read, strict=True):
        size = np.abs(np.asarray(h, np.float64))
        expected = {"activation_largest": size.max((1, 2)), "activation_median": np.median(size, axis=(1, 2))}
        where = zip(found["activation_position"].astype(int), found["activation_channel"].astype(int), strict=True)
        assert all(size[b, i, c] == size[b].max() for b, (i, c) in enumerate(where))
        assert ("entropy" in found) == ("logit_std" in found) == (name != "mlp")
        if a is not None:
            a = np.asarray(a, np.float64)
            means.append(np.broadcast_to(a.mean(1), (SEQUENCES, LENGTH, LENGTH)).reshape(SEQUENCES, -1))
            x = scores_by_hand(name, q, k)
            expected |= by_hand(a) | {"logit_mean": x.mean(-1), "logit_std": x.std(-1)}
            expected |= {"logit_least": x.min(-1), "logit_greatest": x.max(-1)}
            expected["logit_below"] = (x[..., None] < EDGES).mean((1, 2))
        for metric, value in expected.items():
            value = np.broadcast_to(value, found[metric].shape)
            np.testing.assert_allclose(found[metric], value, **NEAR, err_msg=f"{name} {metric}")
    units = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in means]
    np.testing.assert_allclose(cosines, [[(x * y).sum(-1).mean() for y in units] for x in units], **NEAR)


def test_fourth_powers_of_singular_values_by_rows():
    a = np.tril(np.random.default_rng(3).standard_normal((2, 3, 11, 11))).astype(np.float32)
    expected = (np.linalg.svd(a.astype(np.float64), compute_uv=False) ** 4).sum(-1)
    for rows in (3, 11, 256):
        np.testing.assert_allclose(fourth_powers(jnp.asarray(a), rows), expected, rtol=1e-5)


def test_the_spectrum_of_the_projections_is_that_of_their_product():
    draw = np.random.default_rng(2)
    w_q, w_k = draw.standard_normal((9, 4, 3)), draw.standard_normal((9, 2, 3))
    w_q[:, 1, 2] = w_q[:, 1, 0]  # a head of rank 2
    singular, eigen = qk_spectrum.singular_values(w_q, w_k), qk_spectrum.eigenvalues(w_q, w_k)
    for head in range(4):
        product = w_q[:, head] @ w_k[:, head // 2].T
        np.testing.assert_allclose(singular[head], np.linalg.svd(product, compute_uv=False)[:3], atol=1e-12)
        expected = np.linalg.eigvals(product)
        expected = sorted(expected[np.argsort(-np.abs(expected))][:3], key=lambda x: (round(x.real, 9), x.imag))
        np.testing.assert_allclose(sorted(eigen[head], key=lambda x: (round(x.real, 9), x.imag)), expected, atol=1e-9)
    assert singular[1, 2] < 1e-12
    np.testing.assert_allclose(qk_spectrum.effective_rank(np.array([[1.0, 1, 1, 1], [5, 0, 0, 0]])), [4, 1])


def evaluate(workdir, *words):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["evaluate", f"--workdir={workdir}", "--tasks=indicators", *words]) == 0
    return out.getvalue().splitlines()


@pytest.mark.proof
def test_the_verb(run, capsys):
    (line,) = evaluate(run, "--sequences=3")
    assert "2 layers with a map" in line and "(3 sequences of 32 tokens; sequences 3)" in line
    records = read_jsonl(Workdir(run).evaluations)
    model = restore_model(run)
    heads = model.config.num_heads
    by = {(r["metric"], r.get("layer")): r for r in records}
    assert len(by) == len(records) and records[-1]["metric"] == "layers_with_map"
    for metric in ("entropy", "sink", "focus_3", "map_rank", "top_key", "logit_largest", "qk_rank", "qk_positive"):
        assert {layer for name, layer in by if name == metric} == {1, 2}
        assert all(len(by[metric, layer]["heads"]) == heads for layer in (1, 2))
    assert by["entropy", 1]["value"] == pytest.approx(np.mean(by["entropy", 1]["heads"]), rel=1e-5)
    similar = by["map_similarity", 1]
    assert similar["with_layers"].keys() == {"1", "2"}
    assert similar["value"] == pytest.approx(similar["with_layers"]["2"], rel=1e-5)
    assert all(isinstance(by[f"activation_{what}", 1]["value"], float) for what in ("largest", "median"))
    assert evaluate(run, "--sequences=3") == []  # nothing is measured twice
    capsys.readouterr()
    assert main(["evaluate", f"--workdir={run}", "--tasks=indicators", "--sequences=0"]) == 2
    assert capsys.readouterr().err == "deconstruct evaluate: --sequences=0: must be at least 1\n"
    assert main(["evaluate", f"--workdir={run}", "--tasks=indicators", "--max-tokens=2"]) == 2
    assert "the text has sequences of 3 tokens; indicators need 4" in capsys.readouterr().err


@pytest.mark.proof
def test_a_layer_without_a_mixer_is_named(run):
    (line,) = evaluate(run, "--sequences=2", "--skip=mixer")
    assert "1 layers with a map" in line and "no map: non_approximate in 1" in line
