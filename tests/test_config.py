"""Configuration: every file and argument loads, what was said is typed, and each mistake is named."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest

from deconstruct.attention.variants import VARIANTS
from deconstruct.config import (
    PYTHIA_VOCABULARY,
    Config,
    MeshConfig,
    ModelConfig,
    default_config,
    known_keys,
)
from deconstruct.costs import accounting
from deconstruct.experiment import load_config, resolve
from deconstruct.layout import LAYOUTS
from deconstruct.model.language_model import abstract_model
from deconstruct.types import UserError
from tests.tiny import quick

CONFIGS = Path(__file__).parents[1] / "configs"
BASE, PAPER = str(CONFIGS / "base.py"), str(CONFIGS / "paper.py")
HEAD = "from deconstruct.config import default_config\ndef get_config(argument=None):\n    config = default_config()\n"
SIZES = {"70m": (512, 6, 8), "160m": (768, 12, 12), "500m": (896, 24, 14), "1.7b": (2048, 28, 16)}


def paper(**chosen):
    return load_config(f"{PAPER}:" + ",".join(f"{key}={value}" for key, value in chosen.items()))


@pytest.fixture
def file(tmp_path):
    """Writes a config file from the lines that follow `config = default_config()`."""

    def write(*lines, text=None):
        path = tmp_path / "config.py"
        path.write_text(HEAD + "".join(f"    {line}\n" for line in (*lines, "return config")) if text is None else text)
        return str(path)

    return write


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.name)
def test_every_config_file_loads(path, tmp_path):
    argument = ""
    if path.name == "workdir.py":  # reads what a workdir says of itself
        (tmp_path / "config.json").write_text(json.dumps(paper(size="70m").to_dict()))
        argument = f":{tmp_path}"
    config = load_config(f"{path}{argument}")
    assert len(config.model.layers) == config.model.num_layers
    assert config.model.fixed_length == 0 and config.model.vocab_size > 0  # no layer reads a fixed stream


@pytest.mark.parametrize("size", quick(list(SIZES), ["500m"]))
def test_every_argument_of_the_paper(size):
    hidden, layers, heads = SIZES[size]
    for variant, layout, kv in itertools.product(VARIANTS, LAYOUTS, ("mha", "gqa")):
        config = paper(size=size, variant=variant, layout=layout, heads=kv)
        model = config.model
        assert (model.hidden_size, model.num_layers, model.num_heads) == (hidden, layers, heads)
        assert model.block == ("qwen3" if size == "1.7b" else "qwen2")
        assert (model.kv_heads == heads) == (kv == "mha") and heads % model.kv_heads == 0
        assert set(model.layers) <= {variant, "standard"} and len(model.layers) == layers
        assert (config.variant, config.layout) == (variant, layout)
        assert model.vocab_size == PYTHIA_VOCABULARY


@pytest.mark.parametrize(
    ("size", "variant", "width"),
    [
        ("70m", "fixed_seq_qk", 2048),
        ("160m", "rnd_emb_qk", 3072),
        ("500m", "approximate", 4864),
        ("1.7b", "static_emb_qk", 6144),
    ],
)
def test_the_sizes_of_the_paper_can_be_built(size, variant, width):
    """From shapes alone, and with the parameters that counting by hand gives (MHA, tied embeddings of 50,304 rows)."""
    config = paper(size=size, variant=variant, layout="even", heads="mha").model
    assert abstract_model(config).config == config
    d, layers, heads = SIZES[size]
    attention = 4 * d * d + (2 * (d // heads) if size == "1.7b" else 3 * d)
    total = 50_304 * d + layers * (attention + 3 * d * width + 2 * d) + d
    assert accounting.parameters(config)["total"] == total


@pytest.mark.parametrize(
    ("hidden", "intermediate", "layers", "heads", "tied", "total"),
    [
        (1024, 3072, 28, 16, True, 596_049_920),
        (2560, 9728, 36, 32, True, 4_022_468_096),
        (5120, 25_600, 64, 64, False, 32_762_123_264),
    ],
    ids=["0.6B", "4B", "32B"],
)
def test_the_shapes_of_qwen3(hidden, intermediate, layers, heads, tied, total):
    """With 8 key heads of 128, whatever the width; the totals are those of Qwen3ForCausalLM in transformers."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_layers": layers, "num_heads": heads}
    rest = {"num_kv_heads": 8, "head_dim": 128, "block": "qwen3", "tie_embeddings": tied, "vocab_size": 151_936}
    config = load_config(BASE, **{f"model.{key}": value for key, value in (sizes | rest).items()}).model
    assert accounting.parameters(config)["total"] == total


def test_defaults_of_the_paper():
    assert load_config(PAPER).layout == "uniform"
    assert load_config(f"{PAPER}:variant=mlp").layout == "even"
    chosen = load_config(f"{PAPER}:size=70m,variant=mlp,layout=1+5").model.layers
    assert [i for i, name in enumerate(chosen, 1) if name == "standard"] == [1, 5]


def test_there_are_fewer_than_sixty_keys():
    assert len(known_keys()) < 60
    assert {"steps", "batch_size", "sequence_length", "seed", "learning_rate", "variant", "layout", "data"} <= set(
        known_keys()
    )
    assert "model.layers" not in known_keys()


def test_the_config_dict_has_the_keys_of_the_schema():
    keys = set()
    for key, value in default_config().to_dict().items():
        keys |= {f"{key}.{name}" for name in value} if isinstance(value, dict) else {key}
    assert keys == set(known_keys())


def test_there_and_back_through_json():
    config = load_config(PAPER, layout="1,5", variant="rnd_emb_qk", **{"model.remat": False, "mesh.tensor": 2})
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert isinstance(config.model.layers, tuple)
    skipped = config.replace(model=dataclasses.replace(config.model, without_mixers=True))
    assert Config.from_dict(json.loads(json.dumps(skipped.to_dict()))) == skipped
    with pytest.raises(UserError, match=r"config.model.depth is unknown"):
        Config.from_dict({"model": {"depth": 3}})


def test_values_that_follow_from_others(tmp_path):
    fixed = load_config(BASE, variant="rnd_emb_qk", **{"model.fixed_length": 4096})
    assert fixed.model.fixed_length == 4096
    assert load_config(BASE, **{"model.vocab_size": 100}).model.padded_vocab == 128
    assert ModelConfig(vocab_size=128).padded_vocab == 128 and ModelConfig(num_heads=8).kv_heads == 8
    assert ModelConfig(hidden_size=96, num_heads=8).head_size == 12
    wide = load_config(BASE, **{"model.head_dim": 16, "model.num_heads": 5}).model  # 5 does not divide 512
    assert (wide.head_size, wide.kv_heads) == (16, 5)
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": {"vocab_size": 321, "end_of_text": 2}}))
    assert load_config(BASE, data=tmp_path).model.vocab_size == 321
    assert load_config(BASE, data=tmp_path, **{"model.vocab_size": 300}).model.vocab_size == 300
    for text in ("", "null", "[]", "{}", '{"tokenizer": {"vocab_size": "321"}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(
            UserError, match=r"manifest.json: not a manifest of prepare \(it has no tokenizer.vocab_size"
        ):
            load_config(BASE, data=tmp_path)


OVERRIDES = [
    ("steps", "28000", 28000),
    ("steps", 12_000, 12_000),
    ("learning_rate", "1e-3", 1e-3),
    ("learning_rate", 1, 1.0),
    ("optimizer.clip_norm", "0", 0.0),
    ("model.remat", "false", False),
    ("model.remat", "True", True),
    ("model.scan", False, False),
    ("model.tie_embeddings", "0", False),
    ("data", "a b=c,d", "a b=c,d"),
    ("data", "12", "12"),
    ("data", "", ""),
    ("layout", "1,5", "1,5"),
    ("mesh.data", "-1", -1),
]


@pytest.mark.parametrize(("key", "said", "value"), OVERRIDES, ids=lambda x: str(x))
def test_overrides_are_typed(key, said, value):
    others = {"mesh.fsdp": 1} | ({"variant": "rnd_emb_qk"} if key.startswith("model.fixed_") else {})
    for config in (
        load_config(BASE, **{key: said, **others}),
        load_config(BASE, arguments=[f"--config.{key}={said}", *(f"--config.{k}={v}" for k, v in others.items())]),
    ):
        for name in key.split("."):
            config = getattr(config, name)
        assert config == value and type(config) is type(value)


def test_the_last_word_counts(file):
    path = file("config.steps = 5000", "config.learning_rate = 1", "config.mesh.fsdp = 2")
    assert load_config(path).steps == 5000 and load_config(path).learning_rate == 1.0
    assert load_config(path).mesh == MeshConfig(fsdp=2)
    assert load_config(path, arguments=["--config.steps=6000"], steps=7000).steps == 7000


# Key, value, message; said on the command line and, where the value has the key's type, in a file too.
WRONG_VALUES = [
    (
        "model.num_heads",
        7,
        r"model.num_heads=7: does not divide model.hidden_size=512; 4 or 8 would, or any number with a model.head_dim",
    ),
    (
        "model.num_heads",
        512,
        r"model.num_heads=512: gives heads of the odd width 1, which RoPE .*; an even model.head_dim would do",
    ),
    ("model.head_dim", 7, r"model.head_dim=7: is odd, which RoPE cannot rotate; 8 would do"),
    ("model.head_dim", -2, r"model.head_dim=-2: must not be negative"),
    ("model.num_kv_heads", 3, r"model.num_kv_heads=3: does not divide model.num_heads=8; 2 or 4 would"),
    ("model.num_kv_heads", 16, r"model.num_kv_heads=16: does not divide model.num_heads=8; 8 would"),
    ("model.num_kv_heads", -1, r"model.num_kv_heads=-1: must not be negative"),
    ("model.hidden_size", 0, r"model.hidden_size=0: must be at least 1"),
    ("model.num_layers", -6, r"model.num_layers=-6: must be at least 1"),
    ("model.vocab_size", -5, r"model.vocab_size=-5: must not be negative"),
    ("model.fixed_length", 1024, r"model.fixed_length=1024: the fixed stream is shorter than sequence_length=2048"),
    ("model.dtype", "float16", r"model.dtype=float16: expected float32 or bfloat16"),
    ("model.block", "llama", r"model.block=llama: expected qwen2 or qwen3"),
    ("model.init_std", -0.1, r"model.init_std=-0.1: must not be negative"),
    ("model.rope_theta", 0.0, r"model.rope_theta=0.0: must be positive"),
    ("variant", "", r"variant=: expected a name"),
    ("layout", "evne", r"layout='evne' is unknown; one of uniform, even"),
    ("layout", "1,99", r"layout=1,99: there is no layer 99; layers are 1 to 6"),
    ("steps", 0, r"steps=0: must be at least 1"),
    ("batch_size", -8, r"batch_size=-8: must be at least 1"),
    ("accumulation", 3, r"accumulation=3: does not divide batch_size=256; 2 or 4 would"),
    ("checkpoint_every", 0, r"checkpoint_every=0: must be at least 1"),
    ("seed", -1, r"seed=-1: must not be negative"),
    ("learning_rate", -0.5, r"learning_rate=-0.5: must be positive"),
    ("learning_rate", float("nan"), r"learning_rate=nan: must be finite"),
    ("learning_rate", float("inf"), r"learning_rate=inf: must be finite"),
    ("model.init_std", float("inf"), r"model.init_std=inf: must be finite"),
    ("model.norm_epsilon", float("inf"), r"model.norm_epsilon=inf: must be finite"),
    ("optimizer.epsilon", float("nan"), r"optimizer.epsilon=nan: must be finite"),
    ("steps", 2**31, r"steps=2147483648: must be at most 2147483647"),
    ("seed", 2**32, r"seed=4294967296: must be at most 4294967295"),
    ("model.num_layers", 10**6, r"model.num_layers=1000000: must be at most 1000"),
    ("model.num_layers", 10**9, r"model.num_layers=1000000000: must be at most 1000"),
    ("model.hidden_size", 10**9, r"model.hidden_size=1000000000: must be at most 1048576"),
    ("model.vocab_size", 10**12, r"model.vocab_size=1000000000000: must be at most 16777216"),
    ("sequence_length", 10**9, r"sequence_length=1000000000: must be at most 16777216"),
    ("mesh.tensor", -1, r"mesh=.*tensor=-1.*: beside tensor=-1 no other axis can take the rest"),
    ("mesh.tensor", 0, r"mesh.tensor=0: expected a number of devices, or -1"),
    ("mesh.tensor", -2, r"mesh.tensor=-2: expected a number of devices, or -1"),
    ("optimizer.warmup_steps", 30_000, r"optimizer.warmup_steps=30000: the warm-up would not end .* at step 28610"),
    ("optimizer.schedule_steps", 100, r"optimizer.warmup_steps=2000: the warm-up would not end .* at step 100;"),
    ("optimizer.beta2", 1.0, r"optimizer.beta2=1.0: must lie in \[0, 1\)"),
    ("optimizer.weight_decay", -0.1, r"optimizer.weight_decay=-0.1: must not be negative"),
    ("optimizer.epsilon", -1e-8, r"optimizer.epsilon=-1e-08: must not be negative"),
    ("checkpoint.keep", 0, r"checkpoint.keep=0: must be at least 1"),
    ("checkpoint.keep_period", -1, r"checkpoint.keep_period=-1: must not be negative"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG_VALUES)
def test_wrong_values(key, value, message, file):
    with pytest.raises(UserError, match=message) as said:
        load_config(BASE, **{key: value})
    literal = f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)
    with pytest.raises(UserError, match=message) as written:
        load_config(file(f"config.{key} = {literal}"))
    assert str(said.value) == str(written.value)
    assert len(str(said.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.stps=3"], r"config.stps is unknown; did you mean steps\?"),
        (["--config.model.hiden_size=3"], r"config.model.hiden_size is unknown; did you mean model.hidden_size\?"),
        (["--config.hidden_size=3"], r"config.hidden_size is unknown; did you mean model.hidden_size\?"),
        (["--config.model.seed=3"], r"config.model.seed is unknown; did you mean seed\?"),
        (["--config.model.warmup_steps=3"], r"did you mean optimizer.warmup_steps\?"),
        (["--config.model.layers=mlp"], r"config.model.layers is unknown; did you mean model.num_layers\?"),
        (["--config.qqq=3"], r"config.qqq is unknown; keys are variant, layout, data"),
        (["--config.mesh=4"], r"config.mesh is unknown; did you mean mesh"),
        (["--config.steps=1e3"], r"config.steps=1e3: expected a whole number"),
        (["--config.steps="], r"config.steps=: expected a whole number"),
        (["--config.learning_rate=fast"], r"config.learning_rate=fast: expected a number"),
        (["--config.model.remat=yes"], r"config.model.remat=yes: expected true or false"),
        (["--config.steps"], r"--config.steps: expected --config.key=value"),
        (["--steps=3"], r"--steps=3: expected --config.key=value"),
    ],
)
def test_mistakes_on_the_command_line(words, message):
    with pytest.raises(UserError, match=message):
        load_config(BASE, arguments=words)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.stps = 3", r"config.stps is unknown; did you mean steps\?"),
        ("config.hidden_size = 3", r"config.hidden_size is unknown; did you mean model.hidden_size\?"),
        ("config.optimizer.warmup = 3", r"config.optimizer.warmup is unknown; did you mean optimizer.warmup_steps\?"),
        ("config.model.layers = ('mlp',)", r"config.model.layers is unknown; did you mean model.num_layers\?"),
        ("config.steps = 'many'", r"'steps' .*type <class 'str'> .*<class 'int'> \(line 4\)"),
        ("config.steps = 2e4", r"'steps' .*20000.0 .*<class 'int'> \(line 4\)"),
        ("config.model.remat = 1", r"'remat' .*<class 'bool'> \(line 4\)"),
        ("config.model = 3", r"'model' .*3 is of original type <class 'int'>"),
        ("config.steps = None", r"config.steps=None: expected a whole number"),
        ("config = {'steps': 3}", r"get_config returned {'steps': 3}; expected a ConfigDict"),
        ("config = None", r"get_config returned None; expected a ConfigDict"),
        ("return undefined", r"NameError: name 'undefined' is not defined \(line 4\)"),
        ("raise ValueError('its own words')", r"config.py: its own words$"),
        ("import nosuchmodule", r"No module named 'nosuchmodule' \(line 4\)"),
    ],
)
def test_mistakes_in_a_file(line, message, file):
    path = file(line)
    with pytest.raises(UserError, match=message) as raised:
        load_config(path)
    assert len(str(raised.value).splitlines()) == 1


def test_files_that_are_none(file, tmp_path):
    with pytest.raises(UserError, match=r"--config=nowhere.py:size=70m: there is no file nowhere.py"):
        load_config("nowhere.py:size=70m")
    with pytest.raises(UserError, match=r"there is no file .*configs$"):
        load_config(str(CONFIGS))
    with pytest.raises(UserError, match=r"invalid syntax \(line 1\)"):
        load_config(file(text="def get_config(:\n"))
    with pytest.raises(UserError, match=r"the file ends the program \(SystemExit: 0\)"):
        load_config(file(text="import sys\nsys.exit(0)\n"))
    assert load_config(BASE).steps  # a file that was read before lends its get_config to no other
    with pytest.raises(UserError, match=r"no attribute 'get_config'"):
        load_config(file(text="x = 1\n"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("size=7m", r"paper.py:size=7m: size=7m: expected one of 70m, 160m, 500m, 1.7b"),
        ("heads=mqa", r"heads=mqa: expected mha or gqa"),
        ("width=3", r"'width=3': expected size=, variant=, layout=, heads= or mesh=, separated by commas"),
        ("70m", r"'70m': expected size="),
        ("layout=evne", r"layout='evne' is unknown; one of uniform, even"),
        ("layout=1+99", r"layout=1,99: there is no layer 99; layers are 1 to 24"),
    ],
)
def test_unknown_arguments_of_the_paper(argument, message):
    with pytest.raises(UserError, match=message):
        load_config(f"{PAPER}:{argument}")


def test_a_file_that_takes_no_argument():
    with pytest.raises(UserError, match=r"base.py:size=70m: TypeError: get_config\(\) takes 0 positional arguments"):
        load_config(f"{BASE}:size=70m")


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("standrd", r"variant 'standrd' is unknown; did you mean standard\?"),
        ("hidden/tailor", r"variant 'hidden/tailor' is unknown; did you mean hidden/taylor\?"),
        ("qqq", r"variant 'qqq' is unknown; expected one of standard, approximate, .*, or source/form"),
    ],
)
def test_an_unknown_variant_is_named_when_the_config_is_loaded(variant, message):
    with pytest.raises(UserError, match=message):
        load_config(BASE, variant=variant)


def test_two_fixed_sources_are_refused_by_name():
    config = default_config()
    config.layout = "rnd_emb_qk,standard,mlp,fixed_text/taylor,mlp,mlp"
    with pytest.raises(
        UserError, match=r"two fixed streams, fixed_random \(rnd_emb_qk\) and fixed_text \(fixed_text/taylor\)"
    ):
        resolve(config)
