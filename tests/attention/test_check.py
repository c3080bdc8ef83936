"""dc.check: all that is registered passes it; what is wrong with a form is caught by the row that is about it."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import deconstruct as dc
from deconstruct.attention.forms.softmax import Softmax
from deconstruct.attention.registry import FORMS, MIXERS, SOURCES
from deconstruct.attention.rows import ROWS
from deconstruct.distributed.sharding import RULES
from deconstruct.kernels import reference
from deconstruct.kernels.mask import CAUSAL
from deconstruct.layers import constant_param
from deconstruct.types import Streams, UserError
from tests.tiny import quick


@pytest.fixture(autouse=True)
def nothing_is_left_registered():
    before = dict(FORMS), dict(MIXERS), dict(SOURCES)
    yield
    assert before == (FORMS, MIXERS, SOURCES)


@pytest.mark.parametrize("name", quick([*FORMS, *MIXERS], ["mlp"]))
def test_what_is_registered_keeps_to_its_contract(name):
    report = dc.check(name)
    assert report.passed, report
    assert [row.name for row in report.rows] == list(ROWS)
    assert report["sharding"] == ("sharding", "ok", report["sharding"].detail)  # eight devices: it is not left out
    assert report["documents"].status == "ok" or report["documents"].detail == "not served"
    if name in FORMS:
        assert not [row for row in report.rows if row.status == "not applicable" and row.name != "documents"]


def failures(cls, **options):
    report = dc.check(cls, **options)
    assert not report.passed
    return {name: report[name].detail for name in report.failed}


class Plain(dc.Form):
    """Softmax, by its definition alone: what the forms below are wrong about is their own."""

    name = "plain"
    documents = True

    def weights(self, q, k, mask, **read):
        return reference.softmax_weights(q, k, mask)


def test_a_form_that_sees_the_future():
    class Ahead(Plain):
        def weights(self, q, k, mask):
            seen = jnp.tri(q.shape[1], k=1, dtype=bool)
            return jax.nn.softmax(jnp.where(seen, reference.logits(q, k), -jnp.inf), axis=-1)

    report = dc.check(Ahead)
    assert report.failed == ("causal",)
    assert report["causal"].detail == "the map is not zero above the diagonal: position 0 sees position 1"
    assert report["mix"] == ("mix", "not applicable", "not checked, since causal failed")


@pytest.mark.proof
def test_a_kernel_that_sees_the_future_where_the_definition_does_not():
    class Ahead(Softmax):
        def kernels(self):
            def mix(q, k, v, mask):
                return v.at[:, 3].add(1e-6 * v[:, 9])

            return {"xla": super().kernels()["xla"]._replace(mix=mix)}

    found = failures(Ahead)
    assert list(found) == ["causal"] and found["causal"].startswith("position 3 changes when position 9 does (by up to")


@pytest.mark.proof
def test_what_a_form_says_of_itself_and_is_not():
    """Rows that do not sum to one, borders of documents that are not kept to, a parameter without names."""

    class Says(Plain):
        def __init__(self, config, rngs):
            self.gate = nnx.Param(jnp.ones((config.num_heads,)))

        def weights(self, q, k, mask):
            return (1.2 + 0 * self.gate[...])[None, :, None, None] * reference.softmax_weights(q, k, CAUSAL)

    found = failures(Says)
    assert list(found) == ["rows", "documents", "parameters"]
    assert found["rows"] == "the row of position 0 sums to one only within 2.0e-01; else normalised=False"
    assert found["documents"].startswith("the document at 5 to 5 is not what it is alone: off by")
    assert found["parameters"].startswith("form.gate (4,): its axes have no names; dc.normal_param")


@pytest.mark.proof
def test_a_program_that_is_not_the_definition_and_decoding_that_forgets():
    class Fast(Softmax):
        documents = False

        def kernels(self):
            softmax = super().kernels()["xla"]

            def mix(q, k, v, mask):
                return softmax.mix(q, k, v, mask).at[:, 4:].multiply(1.1)

            def extend(q, k, v, cache, mask):
                cache = cache if cache.is_new else cache._replace(v=cache.v.at[:, 2].set(0))
                return softmax.extend(q, k, v, cache, mask)

            return {"xla": softmax._replace(mix=mix, extend=extend)}

    found = failures(Fast)
    assert list(found) == ["mix", "extend"]
    assert found["mix"].startswith("xla is not weights @ v: off by") and found["mix"].endswith("first at position 4")
    assert found["extend"].startswith("auto, by 7, is not one pass: off by")
    assert found["extend"].endswith("first at position 7")


@pytest.mark.proof
def test_grouped_queries_that_read_the_wrong_keys_and_a_program_that_knows_where_it_is():
    class Interleaved(Softmax):
        documents = False

        def kernels(self):
            softmax = super().kernels()["xla"]

            def mix(q, k, v, mask):
                k, v = (jnp.tile(x, (1, 1, q.shape[2] // x.shape[2], 1)) for x in (k, v))
                wrong = 1.1 if jax.sharding.get_abstract_mesh().size > 1 else 1.0
                return wrong * softmax.mix(q, k, v, mask)

            return {"xla": softmax._replace(mix=mix)}

    found = failures(Interleaved)
    assert list(found) == ["grouped", "sharding"]
    assert found["grouped"].startswith("auto is not weights @ v: off by")
    assert found["sharding"].startswith("sharded is not single: off by")


def test_what_does_not_run_is_one_row():
    class Crashes(Plain):
        def weights(self, q, k, mask):
            return undefined(q)  # noqa: F821

    report = dc.check(Crashes)
    line = Crashes.weights.__code__.co_firstlineno + 1
    assert report.failed == ("runs",)
    assert report["runs"].detail == f"NameError: name 'undefined' is not defined (test_check.py, line {line})"
    assert {row.detail for row in report.rows[1:]} == {"not checked, since runs failed"}

    class Half(Plain):
        def weights(self, q, k, mask):
            return super().weights(q, k, mask).astype(jnp.bfloat16)

    assert failures(Half) == {"runs": "float32: the map is bfloat16, expected float32"}


class Mean(dc.Mixer):
    """A running mean; `ahead` takes all positions. Its default decoding runs it again over what it has seen."""

    name = "mean"

    def __init__(self, config, rngs, *, ahead: bool = False, keeps: bool = False, axis: str = "embed"):
        self.ahead = ahead
        self.scale = constant_param(1.0, (config.hidden_size,), (axis,))
        self.rngs = rngs if keeps else None

    def __call__(self, streams, static, context):
        def mean(x):
            count = 1 + jnp.arange(x.shape[1], dtype=jnp.float32)[None, :, None]
            if self.ahead:
                return jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)
            return (jnp.cumsum(x.astype(jnp.float32), 1) / count * self.scale[...][None, None]).astype(x.dtype)

        return Streams(*(x if x is None else mean(x) for x in streams))


def test_decoding_that_crashes():
    class Crashes(Mean):
        def extend(self, h, static, cache, constants, context, start):
            raise IndexError("no such\nposition")

    line = Crashes.extend.__code__.co_firstlineno + 1
    assert failures(Crashes) == {"extend": f"IndexError: no such (test_check.py, line {line})"}


@pytest.mark.proof
def test_a_mixer_and_its_options():
    report = dc.check(Mean)
    assert report.passed, report
    assert report["rows"].detail == "it has no map" and report["documents"].detail == "not served"
    assert report["parameters"].detail.startswith("32 at width 32, -4,160; beside its MLP -32")
    assert failures(Mean, ahead=True)["causal"].startswith("position 0 changes when position 14 does")
    known = ", ".join(RULES)
    assert failures(Mean, axis="width") == {
        "parameters": f"scale (32,): the axis 'width' is unknown; expected None, {known}"
    }
    assert failures(Mean, keeps=True)["parameters"].startswith("rngs.params.")


def test_the_table():
    report = dc.check("mlp")
    assert repr(report) == str(report)
    lines = str(report).splitlines()
    assert lines[0].startswith("mlp: passed (") and lines[1] == "" and len(lines) == 2 + len(ROWS)
    assert lines[2] == "runs        ok              float32 and bfloat16, finite"
    assert lines[5] == "mix         not applicable  a mixer of its own has no weights"


def test_mistakes_in_asking():
    with pytest.raises(UserError, match=r"variant 'softmix' is unknown; did you mean softmax\?"):
        dc.check("softmix")
    with pytest.raises(UserError, match=r"check\('window'\): options are spelled in the name, window\(size=...\)"):
        dc.check("window", size=3)
    with pytest.raises(UserError, match=r"check\(Mean\): the option size is unknown; its options are ahead, keeps"):
        dc.check(Mean, size=3)
    with pytest.raises(UserError, match=r"dict: expected a subclass of Form or of Mixer, or the name of a variant"):
        dc.check(dict)
    with pytest.raises(UserError, match=r"check\(3\): expected a class, or the name of a variant"):
        dc.check(3)
