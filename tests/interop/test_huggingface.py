"""Import and export of Hugging Face checkpoints, without torch: round trips, replaced layers, and what is refused."""

import dataclasses
import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deconstruct.data.tokenizer import load as load_tokenizer
from deconstruct.interop.export_checkpoint import export_checkpoint
from deconstruct.interop.huggingface import flat, settings_of
from deconstruct.interop.import_checkpoint import import_checkpoint
from deconstruct.model.language_model import build_model
from deconstruct.run import checkpoint
from deconstruct.run.restore import restore_model
from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError
from tests.interop.made import arrays_of, make_config, make_workdir

TENSORS = "model.safetensors"


@pytest.fixture(scope="session")
def standard(tmp_path_factory):
    """workdir/ and its export/: qwen2, GQA, tied."""
    folder = tmp_path_factory.mktemp("standard")
    workdir = make_workdir(folder / "workdir", make_config())
    export_checkpoint(workdir, folder / "export")
    return folder


@pytest.fixture
def export(standard, tmp_path):
    """A copy of the export to spoil."""
    return shutil.copytree(standard / "export", tmp_path / "export")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del config[key]
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def same_arrays(a, b, vocab_size):
    """Bit for bit, but for the rows that pad the vocabulary, which nothing reads."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        if name in ("params/embed/embedding", "params/head"):
            x, y = x[:vocab_size], y[:vocab_size]
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize(
    ("model", "top"),
    [
        ({"num_layers": 2, "tie_embeddings": False, "num_kv_heads": 4, "rope_theta": 1e4}, {}),
        ({"num_layers": 2, "block": "qwen3"}, {"variant": "fixed_seq_qk", "layout": "even"}),
        ({"num_layers": 1, "block": "qwen3", "head_dim": 6}, {}),  # 4 heads of 6 in a width of 16
        pytest.param({}, {}, marks=pytest.mark.proof),
        pytest.param({"block": "qwen3", "tie_embeddings": False}, {}, marks=pytest.mark.proof),
        pytest.param({}, {"layout": "approximate,mlp,standard,static_emb_qk"}, marks=pytest.mark.proof),
        pytest.param({"head_dim": 2, "tie_embeddings": False}, {}, marks=pytest.mark.proof),
        pytest.param(
            {"block": "qwen3", "head_dim": 6},
            {"layout": "approximate,mlp,standard,rnd_emb_qk"},
            marks=pytest.mark.proof,
        ),
        pytest.param({"num_layers": 1, "hidden_size": 18, "head_dim": 6}, {}, marks=pytest.mark.proof),  # 4 heads
        pytest.param({"num_layers": 1}, {"variant": "rnd_emb_qk"}, marks=pytest.mark.proof),
    ],
)
def test_export_and_import_give_the_model_back(tmp_path, model, top):
    config = make_config(model, **top)
    workdir = make_workdir(tmp_path / "workdir", config)
    said = export_checkpoint(workdir, tmp_path / "export")
    import_checkpoint(tmp_path / "export", tmp_path / "again")
    before, after = restore_model(workdir), restore_model(tmp_path / "again")
    same_arrays(arrays_of(before), arrays_of(after), config.model.vocab_size)
    assert dataclasses.replace(after.config, remat=before.config.remat) == before.config
    assert Workdir(tmp_path / "again").step(None) == 0
    assert any("transformers cannot run" in line for line in said) == ("variant" in top or "layout" in top)


def test_shards_hold_what_one_file_holds(standard, tmp_path):
    export_checkpoint(standard / "workdir", tmp_path / "shards", shard_bytes=20_000)
    index = json.loads((tmp_path / "shards" / f"{TENSORS}.index.json").read_text())
    whole = load_file(standard / "export" / TENSORS)
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    for name, x in whole.items():
        np.testing.assert_array_equal(load_file(tmp_path / "shards" / index["weight_map"][name])[name], x)
    import_checkpoint(tmp_path / "shards", tmp_path / "again")
    model = arrays_of(restore_model(tmp_path / "again"))
    same_arrays(model, arrays_of(restore_model(standard / "workdir")), 261)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_goes_through_bit_for_bit(standard, tmp_path, dtype):
    export_checkpoint(standard / "workdir", tmp_path / "first", dtype=dtype)
    import_checkpoint(tmp_path / "first", tmp_path / "workdir")
    assert restore_model(tmp_path / "workdir").config.dtype == dtype
    export_checkpoint(tmp_path / "workdir", tmp_path / "second", dtype=dtype)
    for name in (TENSORS, "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    exact = load_file(standard / "export" / TENSORS)
    for name, x in load_file(tmp_path / "first" / TENSORS).items():
        assert x.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(x, exact[name].astype(x.dtype))


def test_a_checkpoint_is_exported_by_its_step(standard, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint of step 4 .*finished steps: 3"):
        export_checkpoint(standard / "workdir", tmp_path / "x", step=4)
    assert not list(tmp_path.iterdir())
    assert "step 3" in export_checkpoint(standard / "workdir", tmp_path / "x", step=3)[0]


@pytest.mark.proof
def test_replaced_layers_keep_what_fits(standard, tmp_path):
    layout = "standard,mlp,static_emb_qk,rnd_emb_qk"
    said = import_checkpoint(standard / "export", tmp_path / "hybrid", layout=layout, seed=5)
    model = restore_model(tmp_path / "hybrid")
    assert model.config.layers == tuple(layout.split(","))
    arrays = flat(arrays_of(model))
    source = flat(arrays_of(restore_model(standard / "workdir")))
    drawn = flat(arrays_of(build_model(model.config, seed=5)))
    for name, x in arrays.items():
        expected = source.get(name, drawn[name])
        rows = 261 if name == "params/embed/embedding" else len(x)
        np.testing.assert_array_equal(x[:rows], expected[:rows], err_msg=name)
    fresh = sorted(arrays.keys() - source.keys())
    assert fresh == [
        "frozen/fixed",
        *(f"params/layers/1/mixer/mlp/{part}_proj/kernel" for part in ("down", "gate", "up")),
    ]
    meta = checkpoint.read_meta(tmp_path / "hybrid" / "checkpoints", 0)
    assert sorted(meta["drawn"]) == fresh and meta["data"] is None and meta["tokenizer"] is None
    attention = "k_proj, {0}o_proj, {0}q_proj, {0}v_proj"
    mixer = f"mixer.{attention.format('mixer.')}, mixer_norm, mlp.down_proj, mlp.gate_proj, mlp.up_proj, mlp_norm"
    assert [line for line in said if not line.startswith(("imported", "tokenizer"))] == [
        "kept         embed, norm",
        f"kept         layer 1 (standard): {mixer}",
        "kept         layer 2 (mlp): mixer_norm, mlp.down_proj, mlp.gate_proj, mlp.up_proj, mlp_norm",
        f"kept         layer 3 (static_emb_qk): {mixer}",
        f"kept         layer 4 (rnd_emb_qk): {mixer}",
        "initialised  fixed",
        "initialised  layer 2 (mlp): mixer.mlp.down_proj, mixer.mlp.gate_proj, mixer.mlp.up_proj",
        f"not used     layer 2 (mlp): self_attn.{attention.format('self_attn.')}",
    ]


@pytest.mark.proof
def test_a_hybrid_can_be_replaced_again(standard, tmp_path):
    import_checkpoint(standard / "export", tmp_path / "mlp", layout="even", variant="mlp")
    export_checkpoint(tmp_path / "mlp", tmp_path / "export")
    import_checkpoint(tmp_path / "export", tmp_path / "back", layout="uniform", variant="standard", seed=1)
    model = restore_model(tmp_path / "back")
    arrays, source = flat(arrays_of(model)), flat(arrays_of(restore_model(standard / "workdir")))
    drawn = flat(arrays_of(build_model(model.config, seed=1)))
    for layer, expected in ((0, drawn), (1, source)):
        name = f"params/layers/{layer}/mixer/q_proj/kernel"
        np.testing.assert_array_equal(arrays[name], expected[name])


def test_the_config_is_what_transformers_writes(standard):
    config = json.loads((standard / "export" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["vocab_size"] == 261
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    four = {key: value for key, value in config.items() if key != "rope_parameters"} | {"rope_scaling": None}
    five = {key: value for key, value in config.items() if key != "rope_theta"}
    assert settings_of(four, "") == settings_of(five, "") == settings_of(config, "")
    # A window that is stated but not in use, as in Qwen2.5's own configs.
    for idle in (
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4},
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 4},
    ):
        assert settings_of({**config, **idle}, "") == settings_of(config, "")


def test_the_width_of_a_head(standard):
    """What a config.json means that does not say it: in Qwen3 128, as in transformers, in Qwen2 what the sizes give."""
    config = json.loads((standard / "export" / "config.json").read_text())
    assert config["head_dim"] == 4 and settings_of(config, "")["head_dim"] == 0
    three = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    silent = {key: value for key, value in config.items() if key != "head_dim"}
    for changed, width in (
        (silent, 0),
        ({**silent, **three}, 128),
        ({**silent, **three, "hidden_size": 512}, 0),
        ({**config, **three}, 0),
        ({**config, "head_dim": None}, 0),
        ({**config, **three, "head_dim": None}, 0),
        ({**config, "head_dim": 6}, 6),
        ({**config, **three, "head_dim": 6, "hidden_size": 18}, 6),
    ):
        assert settings_of(changed, "")["head_dim"] == width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_moe"}, "model_type='qwen2_moe' is not supported; expected qwen2 or qwen3"),
        ({"model_type": "llama"}, "model_type='llama' is not supported; expected qwen2 or qwen3"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
        ({"num_experts": 8}, "num_experts=8 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type='yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}}, "rope_parameters.rope_type='linear'"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta=1e\\+06 but rope_parameters.rope_theta=10000"),
        ({"rope_parameters": ..., "rope_theta": ...}, "has no rope_theta"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, "use_sliding_window=true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types='sliding_attention'"),
        ({"head_dim": 8}, r"self_attn.k_proj.bias is \[8\]; config.json makes it \[16\]"),
        ({"head_dim": 3}, r"heads of the odd width 3 \(head_dim\) are not supported, RoPE cannot rotate them"),
        ({"head_dim": 4.0}, "head_dim=4.0: expected a whole number of at least 1"),
        ({"head_dim": 0}, "head_dim=0: expected a whole number of at least 1"),
        ({"head_dim": ..., "hidden_size": 12}, "heads of the odd width 3"),
        ({"hidden_size": ...}, "has no hidden_size"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps=inf: expected a positive number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: expected a whole number of at least 1, at most"),
        ({"hidden_size": 16.5}, "hidden_size=16.5: expected a whole number"),
        (
            {"num_attention_heads": 3, "head_dim": ...},
            "num_attention_heads=3 does not divide hidden_size=16, and there is no head_dim",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "attention_bias=true"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "no tensor .*self_attn.k_norm.weight"),
        ({"model_type": "deconstruct"}, "no entry 'deconstruct'"),
        ({"vocab_size": 262}, r"embed_tokens.weight is \[261, 16\]; config.json makes it \[262, 16\]"),
        ({"num_hidden_layers": 3}, "model.layers.3.input_layernorm.weight is not a tensor of the qwen2"),
        ({"num_hidden_layers": 5}, r"no tensor model.layers.4.self_attn.k_proj.bias; \[8\] was expected"),
        ({"tie_word_embeddings": False}, "no tensor lm_head.weight"),
    ],
)
def test_what_the_config_asks_for_and_we_cannot(export, tmp_path, changes, message):
    edit_config(export, **changes)
    assert_refused(export, tmp_path, message)


def assert_refused(export, tmp_path, message, **options):
    with pytest.raises(UserError, match=message) as error:
        import_checkpoint(export, tmp_path / "workdir", **options)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_damaged_tensors(export, tmp_path):
    path = export / TENSORS
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert_refused(export, tmp_path, f"{TENSORS}: truncated or not a safetensors file")
    path.write_bytes(whole)
    name = "model.layers.2.self_attn.q_proj.weight"
    edit_tensors(export, lambda tensors: tensors.pop(name))
    assert_refused(export, tmp_path, f"has no tensor {name}; \\[16, 16\\] was expected")
    edit_tensors(export, lambda tensors: tensors.update({name: np.zeros((16, 8), np.float32)}))
    assert_refused(export, tmp_path, f"{name} is \\[16, 8\\]; config.json makes it \\[16, 16\\]")
    edit_tensors(export, lambda tensors: tensors.update({name: np.zeros((16, 16), np.int8)}))
    assert_refused(export, tmp_path, f"{name} is stored as I8, not supported")
    edit_tensors(export, lambda tensors: tensors.update({name: np.zeros((16, 16), np.int32)}))
    assert_refused(export, tmp_path, f"{name} is stored as int32, not supported")
    edit_tensors(export, lambda tensors: tensors.update({name: np.full((16, 16), np.nan, np.float32)}))
    assert_refused(export, tmp_path, f"{TENSORS}: {name} has 256 numbers that are not finite")
    edit_tensors(export, lambda tensors: tensors.update({name: np.zeros((16, 16), np.float16)}))
    import_checkpoint(export, tmp_path / "workdir")


def test_tensors_that_say_nothing_new(export, tmp_path):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    edit_tensors(export, add)
    import_checkpoint(export, tmp_path / "workdir")
    table = load_file(export / TENSORS)["model.embed_tokens.weight"]
    imported = np.asarray(restore_model(tmp_path / "workdir").embed.embedding[...])
    np.testing.assert_array_equal(imported[: len(table)], table)
    shutil.rmtree(tmp_path / "workdir")
    edit_tensors(export, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    assert_refused(export, tmp_path, "lm_head.weight is not the embedding table")
    edit_tensors(export, lambda tensors: tensors.update({"lm_head.bias": tensors.pop("lm_head.weight")}))
    assert_refused(export, tmp_path, "lm_head.bias is not a tensor of the qwen2")


def test_folders_that_are_no_checkpoint(export, standard, tmp_path):
    (export / TENSORS).rename(export / "pytorch_model.bin")
    assert_refused(export, tmp_path, "pytorch_model.bin: a pickle runs whatever code it holds")
    (export / "pytorch_model.bin").unlink()
    assert_refused(export, tmp_path, f"holds neither {TENSORS} nor {TENSORS}.index.json")
    index = export / f"{TENSORS}.index.json"
    for content, message in (
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "has no weight_map"),
        (json.dumps({"weight_map": {"a": "../b.safetensors"}}), "'../b.safetensors' is not the name"),
        (json.dumps({"weight_map": {"a": "b.safetensors"}}), "b.safetensors: no such file"),
    ):
        index.write_text(content)
        assert_refused(export, tmp_path, message)
    shutil.copyfile(standard / "export" / TENSORS, export / "b.safetensors")
    assert_refused(export, tmp_path, "b.safetensors: has no tensor a, which .* places there")
    (export / "config.json").unlink()
    assert_refused(export, tmp_path, "config.json: no such file")
    assert_refused(tmp_path / "nowhere", tmp_path, "there is no such folder")


def test_options_that_do_not_fit(export, tmp_path):
    assert_refused(export, tmp_path, "--layout=even: .*add --variant", layout="even")
    assert_refused(
        export, tmp_path, "variant 'static_emb' is unknown; did you mean static_emb_qk", variant="static_emb"
    )
    assert_refused(export, tmp_path, "there is no layer 9; layers are 1 to 4", layout="9", variant="mlp")
    assert_refused(export, tmp_path, "two fixed streams", layout="standard,rnd_emb_qk,fixed_seq_qk,mlp")


def test_nothing_is_overwritten(export, standard, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--workdir=.*full: exists and is not an empty folder"):
        import_checkpoint(export, tmp_path / "full")
    with pytest.raises(UserError, match=r"--output=.*full: exists and is not an empty folder"):
        export_checkpoint(standard / "workdir", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    import_checkpoint(export, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_failure_in_the_middle_leaves_nothing(standard, tmp_path):
    """The layers of a checkpoint are read while the export is written: here the third is gone."""
    workdir = shutil.copytree(standard / "workdir", tmp_path / "workdir")
    for path in (workdir / "checkpoints" / "3" / "model").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        export_checkpoint(workdir, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["workdir"]


def test_tokenizer_files_are_carried(standard, export, tmp_path):
    import tokenizers
    from tokenizers.models import BPE

    pieces = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
    made = tokenizers.Tokenizer(BPE(pieces, [("a", "b")]))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(export / "tokenizer.json"))
    (export / "chat_template.jinja").write_text("{{ x }}")
    (export / "training_args.bin").write_bytes(b"no part of a tokenizer")
    said = import_checkpoint(export, tmp_path / "workdir")
    assert "tokenizer    carried tokenizer.json, chat_template.jinja; 4 ids" in said
    fingerprint = checkpoint.read_meta(tmp_path / "workdir" / "checkpoints", 0)["tokenizer"]
    assert load_tokenizer(tmp_path / "workdir" / "tokenizer").fingerprint == fingerprint
    export_checkpoint(tmp_path / "workdir", tmp_path / "again")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (export / name).read_bytes()
    settings = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>"
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == 0
    # One that our own class refuses travels all the same.
    (export / "tokenizer.json").write_text("{}")
    said = import_checkpoint(export, tmp_path / "other")
    assert "not usable here: " in said[-1] and (tmp_path / "other" / "tokenizer" / "tokenizer.json").exists()
    assert checkpoint.read_meta(tmp_path / "other" / "checkpoints", 0)["tokenizer"] is None
    made = tokenizers.Tokenizer(BPE({"<|endoftext|>": 0, "a": 300}, []))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(export / "tokenizer.json"))
    with pytest.raises(UserError, match="its tokenizer has 301 ids, but the model only vocab_size=261"):
        import_checkpoint(export, tmp_path / "third")


def test_links_that_lead_out_are_not_followed(export, tmp_path, tmp_path_factory):
    """A stranger's folder: what its links name would be read, and the tokenizer's files be copied into the workdir."""
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.json"
    secret.write_text(json.dumps({"model_type": "secret"}))
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", TENSORS):
        own = (export / name).read_bytes() if (export / name).exists() else None
        (export / name).unlink(missing_ok=True)
        (export / name).symlink_to(secret)
        assert_refused(export, tmp_path, f"{name}: a link to .*secret.json, outside the checkpoint")
        (export / name).unlink()
        if own is not None:
            (export / name).write_bytes(own)


def test_links_within_a_cache_of_the_hub(export, tmp_path):
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "1234", tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in export.iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    import_checkpoint(snapshot, tmp_path / "workdir")
    assert (tmp_path / "workdir" / "config.json").exists()
