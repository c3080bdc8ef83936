"""What is asked for and cannot be had is refused in one line, for every name there is; nothing is ignored."""

import dataclasses

import pytest

from deconstruct.attention.registry import FORMS, MIXERS, SOURCES, VARIANTS
from deconstruct.config import default_config
from deconstruct.experiment import resolve
from deconstruct.model.language_model import IMPLS, build_model
from deconstruct.run.restore import restore_model
from deconstruct.types import UserError
from tests.tiny import MIXER_NAMES, tiny_config

NAMES = [*MIXER_NAMES, *(name for name in VARIANTS if name not in MIXERS)]


@pytest.mark.parametrize("name", NAMES)
def test_an_impl_that_is_not_there(name):
    """When the configuration is loaded, when a model is built, and for programs that a form does not have."""
    with pytest.raises(UserError, match=r"config.model.impl=nonsense is unknown; expected auto, reference, xla"):
        tiny_config({"impl": "nonsense"}, variant=name)
    config = tiny_config(variant=name).model
    with pytest.raises(UserError, match=r"config.model.impl=cuddn is unknown; did you mean cudnn\?"):
        build_model(dataclasses.replace(config, impl="cuddn"))
    if name == "mlp":
        for impl in IMPLS[1:]:
            with pytest.raises(UserError, match=rf"impl={impl}: chooses the program of attention"):
                tiny_config({"impl": impl}, variant=name)
        return
    for impl in IMPLS[1:]:
        try:
            tiny_config({"impl": impl}, variant=name)
        except UserError as error:
            said = str(error)
            assert impl not in ("reference", "xla") or "no such program" in said
            assert said.startswith(f"config.model.impl={impl}: form '") and "\n" not in said
            if "no such program" in said:
                assert impl not in said.partition("it has ")[2].split(", ")


@pytest.mark.parametrize("name", NAMES)
def test_a_document_mask_where_it_cannot_be_kept(name):
    def asked():
        return tiny_config({"end_of_text": 3}, variant=name, document_mask=True)

    form = name.rpartition("/")[2].partition("(")[0]
    source = VARIANTS.get(name, name).partition("/")[0]
    if source in SOURCES and SOURCES[source].fixed:
        with pytest.raises(UserError, match=r"document_mask=true: fixed_\w+ has one map for every text"):
            asked()
    elif form in FORMS and not FORMS[form].documents:
        with pytest.raises(UserError, match=rf"document_mask=true: form '{form}' does not keep to the borders"):
            asked()
    else:
        assert asked().model.document_mask


@pytest.mark.parametrize(
    ("model", "top", "message"),
    [
        ({"impl": "cudnn"}, {}, r"impl=cudnn: form 'softmax' computes with it in bfloat16 or float16, not float32"),
        (
            {"impl": "cudnn", "dtype": "bfloat16"},
            {},
            r"needs heads of a width that is .* not 4; use xla",
        ),
        (
            {"impl": "cudnn", "dtype": "bfloat16", "hidden_size": 32},
            {"variant": "rnd_emb_qk"},
            r"form 'softmax' over a fixed source has one map for the batch",
        ),
        (
            {"impl": "cudnn", "dtype": "bfloat16", "hidden_size": 32, "end_of_text": 1},
            {"document_mask": True},
            r"does not keep to the borders of documents with it \(config.document_mask=true\); use xla",
        ),
        (
            {"impl": "cudnn"},
            {"variant": "approximate"},
            r"form 'taylor' has no such program; it has auto, pallas_gpu, pallas_tpu, xla, reference",
        ),
        (
            {},
            {"document_mask": True},
            r"document_mask=true: needs the id that ends a document, and config.data='' is not",
        ),
        ({}, {"border_loss": False}, r"border_loss=false: needs the id that ends a document"),
        ({"end_of_text": 3}, {}, r"end_of_text=3: neither document_mask=true nor border_loss=false asks for it"),
        ({"fixed_length": 99}, {}, r"fixed_length=99: no layer reads a fixed stream, so it would be ignored"),
        ({"fixed_std": 0.5}, {"variant": "fixed_seq_qk"}, r"fixed_std=0.5: no layer reads fixed_random"),
        ({"fixed_text": "a.txt"}, {"variant": "rnd_emb_qk"}, r"fixed_text=a.txt: no layer reads fixed_text"),
        (
            {},
            {"variant": "mlp", "layout": "standard,mlp"},
            r"config.variant=mlp: config.layout=standard,mlp names",
        ),
        ({}, {"variant": "hidden/tailor"}, r"variant 'hidden/tailor' is unknown; did you mean hidden/taylor\?"),
        ({}, {"variant": "taylor_diagonal(normalise=both)"}, r"normalise=both: expected by_order or jointly"),
        ({}, {"variant": "mlp(width=3)"}, r"the option width is unknown; mlp has no options"),
        ({}, {"variant": "window(size=3,size=4)"}, r"the option size is given twice"),
    ],
)
def test_settings_that_do_not_go_together(model, top, message):
    with pytest.raises(UserError, match=message) as refused:
        tiny_config(model, **top)
    assert "\n" not in str(refused.value)


def test_what_a_live_model_refuses(tmp_path):
    import jax.numpy as jnp

    model = build_model(tiny_config().model)
    for tokens, message in (
        (jnp.array([[1, 40]]), r"token 40 is not in the vocabulary; this model has the ids 0 to 39"),
        (jnp.array([[-1, 4]]), r"token -1 is not in the vocabulary"),
        (
            jnp.array([1, 2]),
            r"tokens are int32\[2\]; expected whole numbers \[batch, length\], as in tok",
        ),
        (jnp.array([[0.5]]), r"tokens are float32\[1, 1\]; expected whole numbers"),
    ):
        for call in (model, model.attention_maps):
            with pytest.raises(UserError, match=message):
                call(tokens)
    with pytest.raises(UserError, match=r"no finished checkpoint"):
        restore_model(tmp_path, impl="nonsense")


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"teacher": "runs/a"}, r"distill.teacher=runs/a: neither distill.mixer_steps nor distill.logit_steps asks"),
        ({"mixer_steps": 3}, r"distill.mixer_steps=3: needs a distill.teacher"),
        ({"logit_steps": 3}, r"distill.logit_steps=3: needs a distill.teacher"),
        ({"teacher": "runs/a", "mixer_steps": -1}, r"distill.mixer_steps=-1: must not be negative"),
        ({"teacher": "runs/a", "logit_steps": 3, "temperature": 0.0}, r"distill.temperature=0.0: must be positive"),
        (
            {"teacher": "runs/a", "mixer_steps": 10**6},
            r"distill.mixer_steps=1000000: the stages would end at step 1000000, after the schedule, at step \d+; ",
        ),
        (
            {"teacher": "runs/a", "mixer_steps": 2, "logit_steps": 10**6},
            r"distill.logit_steps=1000000: the stages would end at step 1000002, after the schedule",
        ),
        (
            {"teacher": "runs/a", "mixer_steps": 1000},
            r"optimizer.warmup_steps=2000: the mixer stage has 1000 steps and .* at most 1000 would do",
        ),
        (
            {"teacher": "runs/a", "mixer_steps": 3, "temperature": 2.0},
            r"distill.temperature=2.0: distill.logit_steps=0",
        ),
    ],
)
def test_stages_of_distillation_that_do_not_go_together(distill, message):
    config = default_config()
    config.data = ""
    config.distill.update(distill)
    with pytest.raises(UserError, match=message):
        resolve(config)
