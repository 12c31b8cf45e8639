"""Weights are matched to the model by name and shape; an error lists the differences and the field to set."""

from __future__ import annotations

import pytest
import torch
from foreign import assert_same, leaves

from pcpvt.checkpoints.load import match_params
from pcpvt.errors import UserError


def _fit(found: dict, expected: dict, head: str = "replace") -> tuple[dict, list[str]]:
    shapes = {name: getattr(value, "shape", value) for name, value in expected.items()}
    return match_params(found, shapes, path="file.pth", exact=head == "exact")


def _misfit(found: dict, expected: dict, head: str = "replace") -> str:
    with pytest.raises(UserError) as caught:
        _fit(found, expected, head)
    assert str(caught.value).startswith("file.pth: ") and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("head", ["replace", "exact"])
def test_equal_names_and_shapes_fit_in_the_order_of_the_model(head):
    sizes = {name: value.shape for name, value in reversed(leaves().items())}
    found, notes = _fit(leaves(), sizes, head)
    assert list(found) == list(sizes)
    assert_same(found, dict(reversed(leaves().items())))
    assert notes == (["head: kept, 3 classes in the file and here"] if head == "replace" else [])


def test_head_of_another_class_count_is_left_out_and_noted():
    expected = {**leaves(), "head.weight": torch.zeros(10, 4), "head.bias": torch.zeros(10)}
    found, notes = _fit(leaves(), expected)
    assert list(found) == ["norm.weight", "blocks.0.0.attn.q.weight"]
    assert notes == ["head: 3 classes in the file, 10 here: replaced by a fresh one"]
    message = _misfit(leaves(), expected, "exact")
    assert "head.weight is (3, 4), not (10, 4)" in message and "config.num_classes=3" in message


def test_file_without_a_head_gets_a_fresh_one_only_when_it_may():
    headless = {name: value for name, value in leaves().items() if not name.startswith("head.")}
    found, notes = _fit(headless, leaves())
    assert found.keys() == headless.keys() and "fresh" in notes[0]
    assert "missing head.weight; missing head.bias" in _misfit(headless, leaves(), "exact")
    assert _fit(leaves(), headless)[0].keys() == headless.keys()


def test_head_of_another_width_is_a_misfit_not_a_new_head():
    assert "head.weight is (3, 5), not (3, 4)" in _misfit({**leaves(), "head.weight": torch.ones(3, 5)}, leaves())
    half = {name: value for name, value in leaves().items() if name != "head.weight"}
    assert "missing head.weight" in _misfit(half, leaves())


def test_16_bit_weights_become_float32_with_a_note_and_float64_stays():
    double = {name: value.double() for name, value in leaves().items()}
    found, notes = _fit(double, leaves())
    assert_same(found, double)
    assert all(value.dtype == torch.float64 for value in found.values()) and notes[1:] == []
    found, notes = _fit({**leaves(), "norm.weight": torch.ones(4, dtype=torch.bfloat16)}, leaves(), "exact")
    assert found["norm.weight"].dtype == torch.float32 and "bfloat16" in notes[0]


def test_integer_tensors_are_not_weights():
    found = {**leaves(), "norm.weight": torch.ones(4, dtype=torch.int64)}
    assert "norm.weight is (4,) int64, not (4,)" in _misfit(found, leaves())


def test_misfits_of_every_kind_are_listed_ten_at_most():
    found = {f"theirs.{i}": torch.ones(1) for i in range(30)} | {"shared": torch.ones(2)}
    expected = {f"ours.{i}": torch.ones(1) for i in range(16)} | {"shared": torch.ones(3)}
    message = _misfit(found, expected, "exact")
    listed = message.split("does not fit the model: ")[1].split(": ")[0].split("; ")
    assert len(listed) == 11 and listed[-1] == "... and 37 more"
    assert listed[:3] == ["missing ours.0", "unexpected theirs.0", "shared is (2,), not (3,)"]


def _sized(depths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"blocks.{s}.{i}.norm1.weight": torch.ones(2) for s, n in enumerate(depths) for i in range(n)}


@pytest.mark.parametrize(
    ("depths", "name"),
    [((3, 4, 6, 3), "pcpvt_s"), ((3, 4, 18, 3), "pcpvt_b"), ((3, 8, 27, 3), "pcpvt_l"), ((2, 1, 1, 1), "pcpvt_nano")],
)
def test_another_size_of_the_family_is_named_with_the_field_to_set(depths, name):
    message = _misfit(_sized(depths), _sized((1, 1, 1, 1)))
    assert message.endswith(f"looks like {name}: use --config.model.name={name}")


def test_unknown_depths_are_listed_and_equal_depths_suggest_no_model():
    assert "the file has (1, 2) blocks per stage, the model (3, 4, 6, 3)" in _misfit(
        _sized((1, 2)), _sized((3, 4, 6, 3))
    )
    message = _misfit(_sized((3, 4, 6, 3)) | {"extra": torch.ones(1)}, _sized((3, 4, 6, 3)))
    assert "looks like" not in message and message.endswith("or give a Twins-PCPVT file")
