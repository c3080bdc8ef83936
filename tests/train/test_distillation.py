"""Staged distillation: each stage minimises what it says, moves what it may, and a run goes on from anywhere in it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deconstruct.config import CheckpointConfig, DistillConfig, MeshConfig
from deconstruct.distributed.mesh import make_mesh, single_device_mesh
from deconstruct.interop.export_checkpoint import export_checkpoint
from deconstruct.interop.import_checkpoint import import_checkpoint
from deconstruct.model.language_model import build_model
from deconstruct.model.placement import split_model
from deconstruct.model.restack import to_layers
from deconstruct.run.checkpoint import finished_steps, read_meta
from deconstruct.run.jsonl import read_jsonl
from deconstruct.run.metric_writer import training_losses
from deconstruct.run.restore import restore_model
from deconstruct.run.workdir import Workdir
from deconstruct.train.ahead_of_time import lower_step
from deconstruct.train.distillation import (
    Teacher,
    divergence,
    find_teacher,
    mixer_distance,
    replaced_layers,
    stage_of,
    stages_from,
    with_fresh_moments,
)
from deconstruct.train.loop import train
from deconstruct.train.optimizer import make_optimizer, make_schedule
from deconstruct.train.state import make_state_spec
from deconstruct.train.step import batch_of
from deconstruct.types import Streams, UserError
from tests.interop.made import make_workdir
from tests.tiny import quick, tiny_config

MODEL = {"vocab_size": 0, "num_layers": 4, "init_std": 0.2}
EVEN = {"variant": "static_emb_qk", "layout": "even"}
STEPS = 9
STAGES = {"mixer_steps": 3, "logit_steps": 3, "temperature": 2.0}


def config_of(data, model=None, **top):
    optimizer = {"schedule_steps": 20, "warmup_steps": 2}
    settings = {"steps": STEPS, "learning_rate": 5e-3, "checkpoint_every": 1, **top}
    return tiny_config({**MODEL, **(model or {})}, data=str(data), **{"optimizer": optimizer, **settings})


def learning(config, teacher, **stages):
    wanted = stages or STAGES
    config = config.replace(distill=DistillConfig(str(teacher), **wanted), checkpoint=CheckpointConfig(keep=20))
    return config


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, prepared):
    """A standard model of random numbers."""
    return make_workdir(tmp_path_factory.mktemp("teacher") / "original", config_of(prepared))


def with_layers_replaced(teacher, folder, **replaced):
    export_checkpoint(teacher, folder / "exported")
    import_checkpoint(folder / "exported", folder / "student", **(replaced or EVEN), sequence_length=12)
    return folder / "student"


def students_config(data, teacher, model=None, stages=STAGES, **top):
    config = config_of(data, {"match_parameters": False, **(model or {})}, **{**EVEN, **top})
    return learning(config, teacher, **stages)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, prepared, teacher):
    """An undisturbed run through all three stages, every checkpoint kept; on a mesh of eight devices."""
    workdir = with_layers_replaced(teacher, tmp_path_factory.mktemp("whole"))
    assert train(students_config(prepared, teacher), workdir) == 0
    return workdir


def arrays(workdir, step=None):
    """{name: array}, by layer."""
    model = restore_model(workdir, step)
    _, params, frozen = split_model(model)
    return by_name({"params": to_layers(params, model.config.plan), "frozen": frozen})


def by_name(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def trajectory(workdir):
    timing = ("tokens_per_second", "seconds", "mfu")
    return [{k: v for k, v in r.items() if k not in timing} for r in read_jsonl(Workdir(workdir).metrics)]


def test_the_stages_are_a_function_of_the_step():
    distill = DistillConfig("t", mixer_steps=2, logit_steps=3)
    assert [stage_of(distill, step) for step in range(1, 8)] == ["mixer"] * 2 + ["logits"] * 3 + [""] * 2
    assert [stage_of(DistillConfig(), step) for step in (1, 100)] == ["", ""]
    for stages in ((2, 3), (0, 3), (2, 0), (0, 9), (9, 9), (0, 0)):
        config = tiny_config(steps=7).replace(distill=DistillConfig("t", *stages))
        for first in range(8):
            passed = [stage_of(config.distill, step) for step in range(first + 1, 8)]
            assert stages_from(config, first) == list(dict.fromkeys(passed)), (stages, first)


@pytest.mark.proof
def test_what_a_run_says_and_which_parameters_move(whole):
    records = read_jsonl(Workdir(whole).metrics)
    assert [r.get("stage") for r in records] == ["mixer"] * 3 + ["logits"] * 3 + [None] * 3
    assert list(training_losses(Workdir(whole))) == [7, 8, 9]
    imported, after_mixers, later = (arrays(whole, step) for step in (0, 3, 4))
    for name, x in imported.items():
        moves = "['mixer']" in name and any(f"['layers']['{i}']" in name for i in (0, 2))
        assert (x.tobytes() != after_mixers[name].tobytes()) == moves, name
        assert after_mixers[name].tobytes() != later[name].tobytes(), name
    assert read_meta(Workdir(whole).checkpoints, 9)["teacher"]["step"] == 3


@pytest.mark.proof
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6, 8])
def test_a_run_goes_on_from_any_step_as_if_undisturbed(whole, prepared, teacher, tmp_path, stop):
    """Inside each stage and between them. After the mixer stage, the moments begin anew also where the run does."""
    broken = shutil.copytree(whole, tmp_path / "broken")
    for step in range(stop + 1, STEPS + 1):
        shutil.rmtree(broken / "checkpoints" / str(step))
    assert train(students_config(prepared, teacher), broken) == 0
    assert trajectory(broken) == trajectory(whole)
    want = arrays(whole)
    assert all(want[name].tobytes() == x.tobytes() for name, x in arrays(broken).items())


@pytest.mark.proof
def test_a_damaged_checkpoint_may_lead_back_into_an_earlier_stage(whole, prepared, teacher, tmp_path):
    broken = shutil.copytree(whole, tmp_path / "broken")
    for step in (8, 9):
        shutil.rmtree(broken / "checkpoints" / str(step))
    for step in range(3, 8):
        path = max((broken / "checkpoints" / str(step) / "train" / "d").iterdir(), key=lambda p: p.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    assert train(students_config(prepared, teacher), broken) == 0
    assert trajectory(broken) == trajectory(whole)


@pytest.mark.proof
def test_the_last_stage_needs_no_teacher(whole, prepared, tmp_path):
    done = students_config(prepared, tmp_path / "nowhere", steps=STEPS + 1)
    config = students_config(prepared, tmp_path / "nowhere", steps=STEPS)
    assert stages_from(done, STEPS) == [""]
    assert train(config, whole) == 0  # nothing is left to do, and nobody asks for the teacher


# What is minimised.


def direct_distance(student, teacher, batch, replaced):
    """The definition, layer by layer: float64 sums of what float32 mixers give."""

    @jax.jit
    def outputs(tokens):
        (streams, context), (own, own_context), found = teacher.start(tokens), student.start(tokens), []
        fixed = Streams(None, own.x)
        for i in range(len(teacher.config.layers)):
            block, other = student.stack.layer(i), teacher.stack.layer(i)
            if i in replaced:
                shown = Streams(streams.h, fixed.x).map(block.mixer_norm)
                static = own_context.static.map(block.mixer_norm) if block.mixer.reads_static else Streams(None)
                got = block.mixer(shown, static, own_context).h
                static = context.static.map(other.mixer_norm) if other.mixer.reads_static else Streams(None)
                found.append((got, other.mixer(streams.map(other.mixer_norm), static, context).h))
            streams, fixed = other(streams, context), block(fixed, own_context)
        return found

    weights = np.asarray(batch["weights"], np.float64)
    pairs = [[np.asarray(x, np.float64) for x in pair] for pair in outputs(batch["tokens"])]
    return np.mean([(weights * np.square(got - want).sum(-1)).sum() for got, want in pairs])


def a_batch(config, seed=0):
    rows = jax.random.randint(jax.random.key(seed), (8, 13), 0, config.model.vocab_size)
    weights = jax.random.uniform(jax.random.key(seed + 1), (8, 12)).round(1)
    return {**batch_of(rows), "weights": weights}


PAIRS = [  # variant and layout of the student; of the teacher; layers
    "static_emb_qk even standard uniform 4",
    "fixed_seq_qk top standard uniform 4",
    "rnd_emb_qk even standard uniform 4",
    "mlp uniform approximate quarter 4",
    "static_emb_qk uniform static_emb_qk even 2",  # of the layers traced together only some are replaced
    "hidden/window(size=4) even fixed_seq_qk even 4",
]


@pytest.mark.parametrize("pair", quick(PAIRS, [PAIRS[4]]))
def test_the_mixer_stage_minimises_the_distance_at_the_teachers_hidden_states(pair):
    *words, layers = pair.split()
    model = {"num_layers": int(layers), "init_std": 0.3, "match_parameters": False}
    own, teachers = (tiny_config(model, variant=v, layout=lay) for v, lay in (words[:2], words[2:]))
    student, teacher = build_model(own.model, 1), build_model(teachers.model, 2)
    batch = a_batch(own)
    replaced = replaced_layers(own.model.layers, teachers.model.layers)
    want = direct_distance(student, teacher, batch, replaced)
    graphdef, params, frozen = split_model(student)

    def of(layers):
        def distance(params):
            return mixer_distance(nnx.merge(graphdef, params, frozen), teacher, batch, layers)

        return jax.jit(jax.value_and_grad(distance))(params)

    value, gradient = of(replaced)
    # float32 against float64 sums of some hundred squares
    np.testing.assert_allclose(value, want, rtol=1e-5)
    # A layer hears of nothing but its own distance: alone, it has the same gradient.
    together, alone = (by_name(to_layers(g, own.model.plan)) for g in (gradient, of(replaced[-1:])[1]))
    names = [name for name in together if f"['layers']['{replaced[-1]}']['mixer']" in name]
    assert any(np.any(alone[name]) for name in names)
    for name in names:
        atol = 1e-5 * np.abs(alone[name]).max()
        np.testing.assert_allclose(together[name] * len(replaced), alone[name], rtol=1e-4, atol=atol)


def test_the_logit_stage_minimises_the_divergence_of_two_live_models():
    model = {"init_std": 0.4, "num_layers": 1}
    own, teachers = tiny_config(model), tiny_config({**model, "hidden_size": 8})
    student, teacher = build_model(own.model, 1), build_model(teachers.model, 2)
    batch = a_batch(own)

    def log_softmax(model):  # float64
        logits = np.asarray(jax.jit(lambda tokens: model(tokens))(batch["tokens"]), np.float64) / 1.5
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    log_q, log_p = log_softmax(student), log_softmax(teacher)
    want = 1.5**2 * (np.asarray(batch["weights"])[..., None] * np.exp(log_p) * (log_p - log_q)).sum()
    got = jax.jit(lambda batch: divergence(student, teacher, batch, 1.5))(batch)
    np.testing.assert_allclose(got, want, rtol=1e-5)  # float32 logits and sums


# The step, on meshes and in microbatches.


def two_stages(data, teacher, mesh, accumulation=1):
    """Metrics of an update in the mixer stage and of one in the logit stage after it, and the parameters then."""
    config = students_config(data, teacher, accumulation=accumulation, faults={"spike": 10.0})
    with jax.set_mesh(mesh):
        spec = make_state_spec(config, make_optimizer(config), mesh)
        taught = find_teacher(config, Workdir(data), "", None, mesh)
        loaded, state, found = taught.load(mesh), spec.init(None), []
        for stage in ("mixer", "logits"):
            step = lower_step(config, spec, mesh, stage, taught).compile()
            rows = jax.random.randint(jax.random.key(4), (8, 13), 0, 280)
            rows = jax.device_put(rows, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"))))
            state, metrics = step(state, rows, loaded)
            found.append({name: float(value) for name, value in metrics.items()})
            if stage == "mixer":
                state = jax.jit(with_fresh_moments, out_shardings=spec.shardings)(state)
        same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), loaded, taught.abstract)
        assert all(jax.tree.leaves(same))  # the teacher lies on the mesh as the same table says
        return found, by_name(to_layers(state.params, config.model.plan))


@pytest.fixture(scope="module")
def on_one_device(prepared, teacher):
    return two_stages(prepared, teacher, single_device_mesh())


@pytest.mark.proof
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_two_devices_take_the_steps_of_one(on_one_device, prepared, teacher, axis):
    mesh = make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | {axis: 2}), jax.devices()[:2])
    assert_same_steps(on_one_device, two_stages(prepared, teacher, mesh))


@pytest.mark.proof
def test_microbatches_take_the_steps_of_the_batch(on_one_device, prepared, teacher):
    assert_same_steps(on_one_device, two_stages(prepared, teacher, single_device_mesh(), accumulation=2))


def assert_same_steps(one, other):
    for want, got in zip(one[0], other[0], strict=True):
        assert want.keys() == got.keys() and want["grad_norm"] > 0
        for name in want:  # float32 sums in another order
            np.testing.assert_allclose(got[name], want[name], rtol=2e-4, err_msg=name)
    for name, x in one[1].items():
        np.testing.assert_allclose(other[1][name], x, atol=1e-4, err_msg=name)


def test_after_the_mixers_adam_begins_anew_and_the_schedule_goes_on():
    config = tiny_config(steps=20, learning_rate=1.0, optimizer={"warmup_steps": 4})
    spec = make_state_spec(config, make_optimizer(config), single_device_mesh())
    state = jax.tree.map(lambda x: x + 1 if x.dtype != jnp.uint32 else x, spec.init(None))
    after = with_fresh_moments(state)
    mu, nu = (optax.tree_utils.tree_get(after.opt_state, name) for name in ("mu", "nu"))
    assert all(not np.any(x) for x in jax.tree.leaves((mu, nu, after.guard.norms, after.guard.made)))
    counts = [int(x) for _, x in optax.tree_utils.tree_get_all_with_path(after.opt_state, "count")]
    assert sorted(counts) == [0, 1]  # Adam's own; the schedule's
    assert (int(after.step), int(after.guard.skipped)) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_a_mixer_stage_has_a_schedule_to_itself():
    config = tiny_config(steps=20, learning_rate=1.0, optimizer={"warmup_steps": 4})
    staged = config.replace(distill=DistillConfig("t", mixer_steps=8, logit_steps=6))
    rates = [float(make_schedule(staged)(jnp.array(i))) for i in range(20)]
    runs = [make_schedule(config.replace(steps=steps)) for steps in (8, 12)]
    assert rates == [float(run(jnp.array(i))) for run, steps in zip(runs, (8, 12), strict=True) for i in range(steps)]


@pytest.mark.proof
def test_without_a_mixer_stage_the_last_stage_is_the_ordinary_program(prepared, teacher):
    """Byte for byte."""
    config = students_config(prepared, teacher, stages={"logit_steps": 3})
    spec = make_state_spec(config, make_optimizer(config), single_device_mesh())
    alone = config.replace(distill=DistillConfig())
    texts = [lower_step(c, spec, single_device_mesh()).as_text() for c in (config, alone)]
    assert texts[0] == texts[1]


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"num_layers": 2}},
            r"teacher=.*: has num_layers=4, and this model 2; they must be the same in t",
        ),
        ({"model": {"hidden_size": 32}}, r"teacher=.*: has hidden_size=16, and this model 32; .* in the mixer stage"),
        ({"model": {"vocab_size": 300}}, r"teacher=.*: has vocab_size=280, and this model 300; they must be the same$"),
        ({"variant": "hidden/softmax"}, r"mixer_steps=3: no layer differs from the teacher's, so there is no mixer"),
    ],
)
def test_a_teacher_that_does_not_fit(prepared, teacher, changes, message):
    with pytest.raises(UserError, match=message):
        find_teacher(students_config(prepared, teacher, **changes), Workdir("runs/a"), "", None, single_device_mesh())


def test_a_teacher_for_its_logits_alone_may_have_another_shape(prepared, teacher):
    config = students_config(prepared, teacher, {"num_layers": 2, "hidden_size": 32}, stages={"logit_steps": 3})
    assert find_teacher(config, Workdir(prepared), "", None, single_device_mesh()).step == 3


def test_teachers_that_are_none(prepared, teacher, tmp_path):
    def refused(name, workdir=tmp_path / "run", tokenizer=""):
        with pytest.raises(UserError) as error:
            find_teacher(students_config(prepared, name), Workdir(workdir), tokenizer, None, single_device_mesh())
        return str(error.value)

    assert refused(tmp_path / "nowhere").endswith(
        "no finished checkpoint there; name one that `import` or `train` made"
    )
    assert "is this run's own workdir" in refused(teacher, teacher)
    (tmp_path / "link").symlink_to(teacher)
    assert "is this run's own workdir" in refused(tmp_path / "link", teacher)


@pytest.mark.proof
def test_another_tokenizer(whole, prepared):
    """The student's checkpoints name the tokenizer of the data."""
    config = students_config(prepared, whole)
    with pytest.raises(UserError, match=r"its tokenizer is \w{12}, that of config.data=.* is ffffffffffff; a teacher"):
        find_teacher(config, Workdir(prepared), "f" * 64, None, single_device_mesh())


@pytest.mark.proof
def test_another_teacher_when_a_run_goes_on(whole, prepared, teacher, tmp_path):
    before = read_meta(Workdir(whole).checkpoints, 4)["teacher"]
    moved = shutil.copytree(teacher, tmp_path / "moved")
    other = make_workdir(tmp_path / "other", config_of(prepared), seed=1)
    later = make_workdir(tmp_path / "later", config_of(prepared), step=5)

    def found(folder):
        return find_teacher(students_config(prepared, folder), Workdir(whole), "", before, single_device_mesh())

    assert found(moved).identity == before  # it may lie elsewhere
    with pytest.raises(UserError, match=r"teacher=.*other: its checkpoint of step 3 is \w{12}, and this run learns"):
        found(other)
    with pytest.raises(
        UserError, match=r"teacher=.*later: this run learns from its checkpoint of step 3, which is not"
    ):
        found(later)
    for change, message in (
        ({"mixer_steps": 2, "logit_steps": 3, "temperature": 2.0}, r"distill.mixer_steps=2, but .* with 3"),
        ({"mixer_steps": 3, "logit_steps": 4, "temperature": 2.0}, r"distill.logit_steps=4, but .* with 3"),
        ({"mixer_steps": 3, "logit_steps": 3}, r"distill.temperature=1.0, but .* with 2.0"),
    ):
        with pytest.raises(UserError, match=message):
            train(students_config(prepared, teacher, stages=change), whole)
    assert finished_steps(Workdir(whole).checkpoints)[-1] == STEPS
    assert json.loads(Workdir(whole).config_file.read_text())["distill"]["mixer_steps"] == 3


# What it is for.


def rows_of(seed, count=32):
    """Each token is the one two before it, nineteen times in twenty."""
    draw = np.random.default_rng(seed)
    rows = draw.integers(0, 40, (count, 13))
    for i in range(2, 13):
        rows[:, i] = np.where(draw.random(count) < 0.95, rows[:, i - 2], rows[:, i])
    return jnp.asarray(rows, jnp.int32)


class Course:
    """Runs of one configuration over `rows_of`, its programs compiled once."""

    def __init__(self, config, teacher=None):
        mesh = single_device_mesh()
        self.config, self.spec = config, make_state_spec(config, make_optimizer(config), mesh)
        self.programs = {
            stage: lower_step(config, self.spec, mesh, stage, teacher if stage else None).compile()
            for stage in stages_from(config, 0)
        }

    def run(self, state, taught=()):
        for step in range(1, self.config.steps + 1):
            stage = stage_of(self.config.distill, step)
            if step - 1 == self.config.distill.mixer_steps > 0:
                state = with_fresh_moments(state)
            state, _ = self.programs[stage](state, rows_of(step), *(taught if stage else ()))
        return state

    def loss(self, state):
        batch = batch_of(rows_of(10**6, 256))
        model = nnx.merge(self.spec.graphdef, state.params, state.frozen)
        return float(jax.jit(model.token_losses)(batch["tokens"], batch["targets"]).mean())


@pytest.mark.proof
@pytest.mark.parametrize("seed", [0, 1])
def test_a_hybrid_with_mixers_drawn_anew_comes_near_the_original(seed):
    """On rows that neither has seen. Over four seeds the original had 1.14 to 1.23 nats and the hybrid 0.21 to 0.25
    more; with text alone for as many steps 0.21 to 0.29 more, so which of the two is better is not asserted."""
    settings = {"batch_size": 32, "learning_rate": 1e-2, "optimizer": {"warmup_steps": 10}}
    model = {"num_layers": 4, "scan": False, "match_parameters": False}
    original = Course(tiny_config(model, steps=600, **settings))
    shapes, plain = original.spec.abstract, original.config.model
    taught = original.run(original.spec.begin(*split_model(build_model(plain, seed))[1:]))
    teacher = Teacher(Workdir("t"), 0, "", plain, original.spec.graphdef, (shapes.params, shapes.frozen))
    config = tiny_config(model, variant="static_emb_qk", layout="even", steps=100, **settings)
    course = Course(learning(config, "t", mixer_steps=60, logit_steps=35), teacher)
    params, frozen = split_model(build_model(config.model, 100 + seed))[1:]
    anew, kept = params["stack"]["segments"][0], jax.tree.map(jnp.copy, taught.params)
    for i in replaced_layers(config.model.layers, plain.layers):
        kept["stack"]["segments"][0][i]["mixer"] = anew[i]["mixer"]
    before = course.loss(course.spec.begin(jax.tree.map(jnp.copy, kept), frozen))
    after = course.loss(course.run(course.spec.begin(kept, frozen), ((taught.params, taught.frozen),)))
    assert original.loss(taught) < 1.4 and before > after + 1 and after < original.loss(taught) + 0.4
