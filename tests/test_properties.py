"""Property tests: the order of samples, schedules, checkpoints and the parsing of configs."""

from __future__ import annotations

import math
import string

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pcpvt.checkpoints import checkpoint
from pcpvt.config import plan, recipes, resolve, stored
from pcpvt.config.fields import FIELDS, base
from pcpvt.data import order
from pcpvt.errors import UserError
from pcpvt.functional import schedules, state
from pcpvt.functional.flat import pack
from pcpvt.runtime import records
from pcpvt.train import resume

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS = st.integers(0, 2**32)


# Order.


@QUICK
@given(seed=SEEDS, examples=st.integers(1, 300), batch=st.integers(1, 70), repeats=st.integers(1, 3))
def test_stream_is_one_full_epoch_after_another_at_any_batch_size(seed, examples, batch, repeats):
    epochs = 3
    steps = -(-epochs * examples // batch)
    stream = [draw for step in range(steps) for draw in order.global_batch(seed, step, batch, examples, repeats)]
    assert len(stream) == steps * batch
    for epoch in range(epochs):
        part = stream[epoch * examples : (epoch + 1) * examples]
        assert {draw.epoch for draw in part} == {epoch}
        assert len(set(part)) == examples  # no draw twice
        if repeats == 1:
            assert sorted(draw.index for draw in part) == list(range(examples))
    again = order.global_batch(seed, steps - 1, batch, examples, repeats)
    assert again == stream[-batch:]


@QUICK
@given(
    seed=SEEDS,
    step=st.integers(0, 10**6),
    local=st.integers(1, 8),
    world=st.integers(1, 6),
    examples=st.integers(1, 99),
)
def test_ranks_share_a_batch_without_gap_or_overlap(seed, step, local, world, examples):
    whole = order.global_batch(seed, step, local * world, examples)
    assert [draw for rank in range(world) for draw in order.rank_slice(whole, rank, world)] == whole


@QUICK
@given(examples=st.integers(0, 200), local=st.integers(1, 40), world=st.integers(1, 7))
def test_evaluation_sees_every_sample_once_in_equally_many_batches(examples, local, world):
    parts = [order.evaluation_batches(examples, local, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert all(len(batch) <= local for part in parts for batch in part)
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(examples))


# Schedules.


@QUICK
@given(
    lr=st.floats(1e-5, 1), steps=st.integers(1, 500), share=st.floats(0, 1), low=st.floats(0, 1e-6),
    floor=st.floats(0, 1e-5),
)  # fmt: skip
def test_warmup_rises_and_cosine_falls_between_their_bounds(lr, steps, share, low, floor):
    warmup = int(share * steps)
    schedule = schedules.warmup_cosine(lr, steps, warmup, low, floor)
    values = [schedule(step) for step in range(steps + 1)]
    assert all(min(low, floor) * (1 - 1e-9) <= value <= lr * (1 + 1e-9) for value in values)
    assert values[: warmup + 1] == sorted(values[: warmup + 1])
    assert all(a >= b - 1e-15 for a, b in zip(values[warmup:], values[warmup + 1 :], strict=False))
    if warmup < steps:
        assert math.isclose(values[warmup], lr, rel_tol=1e-9)
        assert math.isclose(values[-1], floor, rel_tol=1e-6, abs_tol=1e-12)


@QUICK
@given(lr=st.floats(1e-5, 1), epochs=st.integers(1, 50), warmup=st.integers(0, 10), per=st.integers(1, 20))
def test_reference_schedule_is_constant_within_an_epoch_and_one_epoch_late(lr, epochs, warmup, per):
    schedule = schedules.reference(lr, epochs, warmup, lambda step: step // per)
    for epoch in range(epochs):
        values = {schedule(step) for step in range(epoch * per, (epoch + 1) * per)}
        assert len(values) == 1 and 0 < values.pop() <= lr * (1 + 1e-9)
    assert schedule(0) == (1e-6 if warmup else lr)


# Checkpoints.

NAMES = st.text(string.ascii_letters + "/._-0é", min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
)  # fmt: skip


@st.composite
def tensor(draw, dtypes: tuple[torch.dtype, ...] = DTYPES) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape)
    dtype = draw(st.sampled_from(dtypes))
    if dtype == torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=dtype).reshape(shape)
    width = torch.zeros((), dtype=dtype).element_size()
    data = bytearray(draw(st.binary(min_size=size * width, max_size=size * width)))  # nan and inf among them
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if size else torch.zeros(shape, dtype=dtype)


@QUICK
@given(tensors=st.dictionaries(NAMES, tensor(), max_size=4), step=st.integers(0, 10**9), note=st.text(max_size=5))
def test_checkpoint_is_read_back_bit_for_bit(tmp_path, tensors, step, note):
    meta = {"step": step, "config": {"note": note, "scale": [0.1, 1 / 3]}, "metrics": None}
    restored = checkpoint.read(checkpoint.save(tmp_path, tensors, meta))
    assert {name: restored.meta[name] for name in meta} == meta
    assert restored.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        got = restored.tensors[name]
        assert (got.dtype, got.shape) == (value.dtype, value.shape)
        assert got.contiguous().reshape(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist()


@QUICK
@given(
    a=st.dictionaries(st.sampled_from("xyz"), tensor(), max_size=3), b=st.dictionaries(st.sampled_from("xyz"), tensor())
)
def test_checksum_differs_exactly_when_states_differ(a, b):
    def content(tensors):
        return {n: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()) for n, t in tensors.items()}

    same = content(a) == content(b)
    assert (checkpoint.digest({}, sorted(a.items())) == checkpoint.digest({}, sorted(b.items()))) == same


@QUICK
@given(params=st.dictionaries(st.sampled_from(["head.bias", "blocks.0.1.norm"]), tensor((torch.float32,)), min_size=1))
def test_state_is_restored_from_its_flat_form(params):
    before, blank = (
        state.create(pack(own), {"count": torch.ones(()), "mu": pack(own)}, {"factor": torch.tensor(8.0)}, ema=True)
        for own in (params, {name: torch.zeros_like(value) for name, value in params.items()})
    )
    flat = {name: value.clone() for name, value in state.flatten(before).items()}
    restored = resume.restore(checkpoint.Checkpoint("file", {}, flat), blank)
    assert checkpoint.digest({}, sorted(state.flatten(restored).items())) == checkpoint.digest({}, sorted(flat.items()))


# Configs.


@QUICK
@given(
    amount=st.floats(0.001, 1e4),
    unit=st.sampled_from(plan.UNITS),
    batch=st.integers(1, 999),
    examples=st.integers(1, 9999),
)
def test_duration_is_rounded_up_to_whole_steps(amount, unit, batch, examples):
    steps = plan.in_steps(amount, unit, batch, examples)
    size = {"steps": batch, "epochs": examples, "examples": 1}[unit]
    assert (steps - 1) * batch < amount * size * (1 + 1e-5) and steps * batch >= amount * size * (
        1 - 1e-5
    ) - 1e-5 * batch


@QUICK
@given(
    st.one_of(
        st.text(max_size=12),
        st.from_regex(r"(cpu|npu|cuda|gpu)\d{0,3}(,(perf|paper|finetune|digit)s?){0,3}", fullmatch=True),
    )
)
def test_any_arg_is_a_config_or_a_one_line_error(arg):
    if not arg.partition(",")[0]:
        return  # depends on the devices of this host
    try:
        config = recipes.from_arg(arg, "pcpvt_s", 0.2)
    except UserError as error:
        assert "ARG" in str(error)
    else:
        resolve.check(config)
        assert (config.device, config.processes) == recipes.parse_arg(arg)[:2]


@QUICK
@given(st.text("0123456789. epochstp-", max_size=12))
def test_any_text_is_a_duration_or_a_one_line_error(text):
    config = base()
    config.epochs, config.eval_every = 1.0, text
    try:
        resolve.check(config)
    except UserError as error:
        assert "config.eval_every" in str(error) and "\n" not in str(error)


@QUICK
@given(data=st.data())
def test_config_comes_back_from_its_file(tmp_path, data):
    config = base()
    config.epochs = 1.0
    for name, field in FIELDS.items():
        if isinstance(field.default, float) and data.draw(st.booleans()):
            config.update_from_flattened_dict({name: data.draw(st.floats(0, 1))})
    records.write_json(tmp_path / "config.json", config.to_dict())
    other = base()
    stored.apply_config(other, stored.read_config(tmp_path / "config.json"), "config.json")
    assert other.to_dict() == config.to_dict()
    third = base()
    stored.apply_config(third, stored.nested(stored.flat(config)), "checkpoint")
    assert third.to_dict() == config.to_dict()


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if not field.unset])
def test_field_with_a_default_cannot_be_unset(name):
    config = base()
    config.epochs = 1.0
    config.update_from_flattened_dict({name: None})
    if FIELDS[name].may_be_unset:
        resolve.check(config)
        return
    with pytest.raises(UserError, match=f"config.{name}"):
        resolve.check(config)
