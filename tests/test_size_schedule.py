"""Progressive image size: the size is a function of the step, and every resume and every figure follows it."""

from __future__ import annotations

import dataclasses
import io
import json
from types import SimpleNamespace

import miniature
import pytest
import torch
from test_compile import CountingBackend, device
from test_config import config, planned
from test_data_stream import digest, joined
from test_data_stream import train_batches as stream
from test_step import nano_state

from pcpvt.config import resolve
from pcpvt.data.augment import AugmentSpec, at_size
from pcpvt.data.loader import Loader
from pcpvt.devices import compile
from pcpvt.distributed.signals import PREEMPTED
from pcpvt.errors import UserError
from pcpvt.functional import optim, schedules
from pcpvt.functional import state as states
from pcpvt.functional.objective import make_objective
from pcpvt.functional.sizes import SizeSchedule
from pcpvt.functional.step import make_step
from pcpvt.models import pcpvt as models
from pcpvt.models.layers import PLAIN
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console
from pcpvt.train import parameters, preflight, preparation, setup, utilisation
from pcpvt.train.history import History, Rate, train_record
from pcpvt.train.writers import ConsoleWriter

SCHEDULE = "16@0,32@0.5"  # of miniature.RECIPE's 12 steps: it changes after 6
GROWS = SizeSchedule((0, 3, 5), ((8, 8), (12, 12), (16, 16)), (0.2, 0.5, 1.0))


def words(workdir, arg: str = "cpu", **fields) -> list[str]:
    return miniature.words(workdir, arg, **{"size_schedule": SCHEDULE, "ema": 0.9, **fields})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with averages, mixing and drop path."""
    workdir = tmp_path_factory.mktemp("whole")
    ended = miniature.run(words(workdir))
    assert ended.code == 0 and ended.err == "", ended.err
    (workdir / "stdout.txt").write_text(ended.out)
    return workdir


def test_a_run_equals_a_plain_loop_over_batches_of_both_sizes(whole, tmp_path):
    fields = {name: value for name, value in miniature.RECIPE.items() if name != "steps"}
    c = config("cpu", **fields, steps=12, epochs=None, ema=0.9)
    session = sessions.start(c, tmp_path)
    data, _ = sessions.open_training_data(session)
    model = sessions.build_model(c, 10)
    plan = setup.plan_run(session, model, len(data))
    large = setup.train_batches(session, model, data)
    # 3 pixels of padding before the crop are 1.5 at half the size, rounded to 2.
    small = dataclasses.replace(large, spec=large.spec._replace(size=(16, 16), crop_padding=2))
    params, _ = parameters.init_params(session, model)
    groups = parameters.param_groups(session, params)
    optimizer = setup.optimizer(session, plan, groups)
    state = setup.init_state(session, params, groups, optimizer)
    step = setup.train_step(session, model, plan, optimizer)
    for i in range(12):
        state, _ = step(state, (small if i < 6 else large)[i])
    trained = miniature.newest(whole).tensors
    assert all(torch.equal(trained[f"params/{name}"], value) for name, value in state.params.items())
    assert all(torch.equal(trained[f"ema/{name}"], value) for name, value in state.ema.items())


@pytest.mark.parametrize(
    ("stops", "workers"),
    [((4, 6), 0), pytest.param((6,), 2, marks=pytest.mark.slow), pytest.param((3, 8), 1, marks=pytest.mark.slow)],
)
def test_stops_before_at_and_after_the_change_change_no_bit(stops, workers, whole, tmp_path):
    done = 0
    for stop in stops:
        stopped = {"at": "step", "do": "SIGTERM", "n": stop - done}
        ended = miniature.run(words(tmp_path, data__workers=workers), stopped)
        assert ended.code == PREEMPTED, ended.err
        done = miniature.newest(tmp_path).meta["step"]
        assert done == stop
    assert miniature.run(words(tmp_path, data__workers=1 - min(workers, 1))).code == 0
    miniature.assert_same_run(tmp_path, whole)


def test_two_processes_and_their_audits_see_the_same_samples_across_the_change(whole, tmp_path):
    ended = miniature.run(words(tmp_path, "cpu2", audit_every=1, audit_action="end"))
    assert ended.code == 0 and "audit of step" not in ended.err, ended.err
    theirs, ours = miniature.newest(whole), miniature.newest(tmp_path)
    for name, value in theirs.tensors.items():  # float32 sums in another order
        torch.testing.assert_close(ours.tensors[name], value, rtol=2e-3, atol=2e-4)
    losses = [[r["loss"] for r in miniature.records(folder) if r["kind"] == "train"] for folder in (tmp_path, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_batches_are_the_same_at_any_world_size_and_number_of_workers(world):
    alone = [stream(sizes=GROWS)[step] for step in range(7)]
    assert [len(batch["image"][0]) for batch in alone] == [8, 8, 8, 12, 12, 16, 16]
    for step, batch in enumerate(alone):
        assert digest(joined([stream(rank, world, sizes=GROWS)[step] for rank in range(world)])) == digest(batch)
        assert digest(stream(1, world, sizes=GROWS).of_rank(step, 0)) == digest(stream(0, world, sizes=GROWS)[step])
        unchanged = stream()[step]
        for name in ("id", "label", "drop_path_scale"):  # samples and their order do not know the size
            assert torch.equal(batch[name], unchanged[name])
        sides = batch["box"][:, [1, 3]].max(), batch["erase"][:, [1, 3]].max()
        assert max(map(int, sides)) <= len(batch["image"][0])
    read = list(Loader(stream(sizes=GROWS), range(2, 7), 2))
    assert list(map(digest, read)) == list(map(digest, alone[2:]))


def test_evaluation_checkpoints_and_exports_know_the_last_size_only(whole, pcpvt, tmp_path):
    result = json.loads((whole / "result.json").read_text())
    assert miniature.newest(whole).meta["image_size"] == [32, 32]
    pcpvt("--mode=eval", f"--workdir={whole}")
    evaluated = json.loads((whole / "result-eval.json").read_text())
    assert (evaluated["acc1"], evaluated["image_size"]) == (result["acc1"], [32, 32])
    pcpvt("--mode=eval", f"--workdir={whole}", "--config.image_size=48")  # the schedule is the training's
    assert json.loads((whole / "result-eval.json").read_text())["image_size"] == [48, 48]


def test_the_log_says_the_sizes_and_the_records_have_that_of_their_step(whole):
    flops = [utilisation.forward_flops(models.build("pcpvt_nano", 10), (side, side)) for side in (16, 32)]
    saving = 2 * flops[1] / sum(flops)
    line = f"sizes: 16x16 from step 0, 32x32 from step 6: {saving:.3g}x fewer operations than all steps at the last"
    assert line in (whole / "stdout.txt").read_text().splitlines()
    train = [record for record in miniature.records(whole) if record["kind"] == "train"]
    assert [record["image_size"] for record in train] == [16, 16, 32, 32]
    page = (whole / "report.html").read_text()
    assert "Image height in training" in page


def test_128_to_224_px_need_1_57_times_fewer_operations():
    model = models.build("pcpvt_s", 1000)
    plan = setup.make_plan(
        config("cpu1", size_schedule="128@0,160@0.25,192@0.5,224@0.75", steps=400, epochs=None, image_size=224),
        examples=1000, num_classes=1000, micro_batch=8, operations=lambda s: utilisation.forward_flops(model, s),
    )  # fmt: skip
    assert plan.sizes.starts == (0, 100, 200, 300)
    assert plan.steps / plan.sizes.cost(0, 400) == pytest.approx(1.57, abs=0.005)
    assert sum(plan.sizes.cost(i, i + 1) for i in range(400)) == pytest.approx(plan.sizes.cost(0, 400))
    assert plan.sizes.cost(150, 250) == pytest.approx(50 * plan.sizes.costs[1] + 50 * plan.sizes.costs[2])


def test_speed_mfu_and_the_time_left_are_those_of_the_present_size():
    plan = SimpleNamespace(
        sizes=SizeSchedule((0, 50), ((16, 16), (32, 32)), (0.25, 1.0)), steps=100, batch=10, eval_every=0,
        examples=100, epochs=10, schedule=lambda step: 0.1,
    )  # fmt: skip
    # 2 s a step now, 8 s at the last size: 48 * 2 + 50 * 8 s, and from step 60 on 40 * 8 s.
    assert "expected duration: 8m16s" in preflight.expectation(plan, 2, 0, 1.0, 2.0, (1, 1))
    assert "expected duration: 5m20s" in preflight.expectation(plan, 60, 0, 1.0, 8.0, (1, 1))
    plan.eval_every = 98  # 30 images, each a third of 0.8 s
    assert "expected duration: 8m24s" in preflight.expectation(plan, 2, 30, 1.0, 2.0, (1, 1))

    rate = Rate()
    for _ in range(5):
        rate.add(10, 1.0)
    writer = ConsoleWriter(Console(stream=io.StringIO()), plan)
    writer.step(5, rate)
    assert "  4m05s left" in writer.line({"step": 5})  # 45 + 50 * 4 s
    rate.restart()
    rate.add(10, 4.0)
    assert rate.images_per_sec == 2.5  # not the mean of 10 and 2.5
    assert train_record(History(), plan, 50, rate, None)["image_size"] == 16
    assert train_record(History(), plan, 51, rate, None)["image_size"] == 32

    model, world = models.build("pcpvt_nano", 10), SimpleNamespace(size=1)
    run = SimpleNamespace(plan=plan, model=model, peak_flops=1e9, session=SimpleNamespace(world=world))
    for step, size in ((49, (16, 16)), (50, (32, 32))):
        share = 3 * utilisation.forward_flops(model, size) * 2.5 / 1e9
        assert setup.TrainSetup.mfu(run, 2.5, step) == pytest.approx(share)


@pytest.mark.parametrize(
    ("choice", "step", "tried"),
    [("inductor", 0, {12, 16}), ("inductor", 3, {16}), ("none", 0, {16}), ("inductor", 5, set())],
)
def test_sizes_to_come_are_tried_once_before_the_first_step_is_done(choice, step, tried):
    session = SimpleNamespace(device=None, config=SimpleNamespace(compile=choice))
    inspect, seen = preparation.together([preparation.of_sizes(session, GROWS, step)]), []
    batch = stream(sizes=GROWS)[step]
    for _ in range(2):
        inspect(None, batch, [], lambda other: seen.append(other))
    assert sorted(other["image"].shape[1] for other in seen) == sorted(tried)
    assert all(len(other["image"]) == 16 and other["lam"] is batch["lam"] for other in seen)


def test_after_the_first_step_no_size_compiles_anything_and_the_result_is_the_same(monkeypatch):
    count = CountingBackend()
    monkeypatch.setattr(compile, "_GENERATES_CODE", (count,))
    session = SimpleNamespace(device=device(count), config=SimpleNamespace(compile="auto"))
    model, params = nano_state(torch.float32)
    groups = optim.groups(params, 0.0)
    own = optim.lay_out(params, groups)
    optimizer = optim.chain(optim.adamw(schedules.constant(1e-3), groups))
    sizes, ends, graphs = SizeSchedule((0, 1), ((32, 32), (64, 64)), (0.25, 1.0)), [], []
    compiled = compile.compiled_blocks(PLAIN, session.device, "auto")
    torch._dynamo.reset()
    for kernels, inspect in ((compiled, preparation.of_sizes(session, sizes, 0)), (PLAIN, None)):
        objective = make_objective(model, kernels=kernels)
        step = make_step(objective, optimizer, global_batch=4, inspect=inspect)
        state = states.create(own.clone(), optimizer.init(own), {}, ema=False)
        for i in range(2):
            images = torch.full((4, *sizes.at(i), 3), 40 * i, dtype=torch.uint8)
            state, _ = step(state, {"image": images, "label": torch.arange(4)})
            graphs.append(count.graphs)
        ends.append(state)
    torch._dynamo.reset()
    assert graphs == [8, 8, 8, 8]  # four stages by size, all of them in the first step
    assert torch.equal(ends[0].params.flat, ends[1].params.flat)


@pytest.mark.parametrize(("policy", "smaller"), [
    ("rand-m9-mstd0.5-inc1", "rand-m5-mstd0.5-inc1"), ("rand", "rand-m6"), ("rand-n3-mmax12-m8", "rand-n3-mmax12-m5"),
    ("3a", "3a"), ("", ""),
])  # fmt: skip
def test_augmentation_follows_the_size_if_asked(policy, smaller):
    spec = AugmentSpec((224, 224), randaugment=policy, erase_prob=0.25, crop_padding=4)
    assert at_size(spec, (224, 224)) is spec
    fixed = at_size(spec, (128, 128))
    assert fixed == spec._replace(size=(128, 128), crop_padding=2)
    assert at_size(spec._replace(by_size=True), (128, 128)) == fixed._replace(
        by_size=True, randaugment=smaller, erase_prob=0.25 * 128 / 224
    )


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("abc", "'abc' is no size with a start: write SIZE@START"),
        ("16@0,32", "'32' is no size"),
        ("16@0,32@soon", "'32@soon' is no size"),
        ("16@0,32@-1", "'32@-1' is no size"),
        ("16@0.1,32@0.5", "'16@0.1' comes first"),
        ("16@0,32@1", "'32@1' starts at the end of the run"),
        ("0@0,32@0.5", "'0@0' has no pixels"),
        ("16@0,24@0.6,32@0.5", "'32@0.5' does not start after '24@0.6'"),
        ("16@0,24@9 steps,32@0.5", "'32@0.5' does not start after '24@9 steps' before it: sort them by their starts; "),
        ("16@0,32@0.3,32@0.5", "'32@0.5' is not larger"),
        ("16@0,48@0.3,32@0.5", "'32@0.5' is not larger"),
        ("16@0,24@0.5", "'24@0.5' comes last and config.image_size=32"),
        ("16@0,32x48@0.5", "'32x48@0.5' comes last and config.image_size=32"),
        ("16@0,32@12 steps", "'32@12 steps' starts after 12 steps and the run has 12"),
        ("16@0,32@5 epochs", "'32@5 epochs' starts after 50 steps and the run has 12"),
    ],
)
def test_wrong_schedules_are_one_line_that_names_the_size(schedule, said):
    with pytest.raises(UserError, match=r"^config\.size_schedule: ") as error:
        planned("cpu", examples=100, size_schedule=schedule, steps=12, epochs=None, batch_size=10)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_starts_are_fractions_epochs_steps_or_examples():
    fields = {"image_size": 48, "image_width": 64, "steps": 101, "epochs": None, "batch_size": 10}
    text = "16x32@0, 24x32@0.1,32x48@2 epochs ,40x64@250 examples,48x64@50 steps"
    _, plan = planned("cpu", examples=100, size_schedule=text, **fields)
    assert plan.sizes.starts == (0, 11, 20, 25, 50)
    assert plan.sizes.sizes == ((16, 32), (24, 32), (32, 48), (40, 64), (48, 64)) and plan.size == (48, 64)
    assert plan.sizes.following(20) == ((40, 64), (48, 64))
    with pytest.raises(UserError, match="not divisible by 32: use sizes that are or"):
        fields |= {"image_size": 64, "image_width": 64, "model.pad": "error"}
        planned("cpu", size_schedule="32@0,48x64@0.1,64@0.5", **fields)


def test_a_resumed_run_keeps_its_schedule_and_other_modes_have_none(whole, tmp_path):
    ended = miniature.run(words(whole, size_schedule="24@0,32@0.5"))
    assert ended.code == 2 and "config.size_schedule: '24@0,32@0.5' but " in ended.error
    get_config = lambda arg: config("cpu", size_schedule=SCHEDULE, **{"augment.by_size": True})  # noqa: E731
    with pytest.raises(UserError, match=r"augment\.by_size: True but config\.size_schedule is empty: set it, or"):
        planned("cpu", **{"augment.by_size": True})
    for mode, noted in (("bench", 1), ("eval", 0), ("train", 0)):
        found, notes = resolve.resolve(get_config, "cpu", {}, mode=mode)
        assert found.augment.by_size == (mode == "train")
        assert found.size_schedule == (SCHEDULE if mode == "train" else "")
        assert sum("config.size_schedule: left out" in note for note in notes) == noted
