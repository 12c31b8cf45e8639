"""Hostile bytes: a reader returns exactly what was written or raises an error of one line."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from pcpvt.checkpoints import checkpoint
from pcpvt.checkpoints.checkpoint import CheckpointError
from pcpvt.config import resolve, stored
from pcpvt.config.fields import base
from pcpvt.errors import UserError, printable
from pcpvt.functional import state
from pcpvt.runtime import records
from pcpvt.runtime.console import Console
from pcpvt.train import resume

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TENSORS = {
    "step": torch.tensor(7), "params/w": torch.arange(12.0).reshape(3, 4), "opt/mu/w": torch.ones(3, 4).bfloat16(),
    "scale/good": torch.tensor(2, dtype=torch.int32), "ema/none": torch.zeros(0, 2),
}  # fmt: skip
METRICS = {"acc1": 50.0, "acc5": 90.0, "loss": 1.25, "seen": 8}
META = {
    "step": 7, "config": {"seed": 0, "model.name": "pcpvt_nano"}, "classes": ["a", "b"], "image_size": [32, 32],
    "examples": 20, "metrics": METRICS, "best": {**METRICS, "step": 7}, "records": 3,
    "window": {"loss": 0.5, "steps": 2, "skipped": 0, "grad_norm": 1.0},
    "clock": {"steps": 7, "seconds": 1.0, "elapsed": 2.0},
}  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    path = checkpoint.save(folder, TENSORS, META)
    return path, path.read_bytes()


def refused(path, data: bytes) -> bool:
    """Whether bytes are refused as a checkpoint, by one line that names the file; otherwise checks what was read."""
    path.write_bytes(data)
    try:
        found = checkpoint.read(path)
    except CheckpointError as error:
        assert str(path) in printable(str(error))
        return True
    assert {k: v for k, v in found.meta.items() if k not in ("format", "digest")} == META
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[name], TENSORS[name]) for name in TENSORS)
    return False


def test_every_truncation_is_refused(written):
    path, data = written
    for length in [*range(0, len(data), 7), len(data) - 1]:
        assert refused(path, data[:length]), length


def test_every_flipped_bit_of_a_number_and_every_flipped_byte_is_noticed(written):
    path, data = written
    header = 8 + struct.unpack("<Q", data[:8])[0]
    passed = []
    for i in range(len(data)):
        for flip in (1, 128) if i >= header else (1, 4, 32):
            changed = bytearray(data)
            changed[i] ^= flip
            if not refused(path, bytes(changed)):
                passed.append(bytes(changed[i : i + 1]))
    # Only white space in the header's padding may change, which is not content.
    assert set(passed) <= {b"\t", b"\r", b"\n", b" ", b"!", b"$", b"\x00"} and len(passed) < 40, passed


@QUICK
@given(data=st.data())
def test_swapped_and_repeated_pieces_are_noticed(written, data):
    path, original = written
    edges = sorted(data.draw(st.lists(st.integers(0, len(original)), min_size=3, max_size=3, unique=True)))
    a, b, c = edges
    pieces = [original[:a], original[a:b], original[b:c], original[c:]]
    order = data.draw(st.sampled_from([(0, 2, 1, 3), (3, 1, 2, 0), (0, 1, 1, 3), (0, 1, 2, 3, 3), (0, 1, 3)]))
    refused(path, b"".join(pieces[i] for i in order))  # or hold the same content, which it asserts


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(written, data):
    assert refused(written[0], data)


@QUICK
@given(header=JSON)
def test_any_json_as_header_is_refused(written, header):
    text = json.dumps(header).encode()
    assert refused(written[0], struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize("depth", [1000, 200_000])
def test_deep_json_is_refused(written, depth):
    for text in (b"[" * depth, b'{"__metadata__":' * depth):
        assert refused(written[0], struct.pack("<Q", len(text)) + text)


@QUICK
@given(field=st.sampled_from([*META, "format", "extra"]), value=JSON)
def test_fields_of_a_wrong_type_are_refused_despite_a_valid_checksum(written, tmp_path, field, value):
    """A stranger can compute checksums, so the types of all values in the JSON are checked, down to the config."""
    path = tmp_path / "x.safetensors"
    meta = {"format": checkpoint.FORMAT, **META, field: value}
    meta["digest"] = checkpoint.digest(meta, sorted(TENSORS.items()))
    path.write_bytes(save(TENSORS, {checkpoint.KEY: json.dumps(meta)}))
    session = type("S", (), {"checkpoints": tmp_path, "config": base(), "workdir": tmp_path, "command": None})
    target = path
    if isinstance(meta["step"], int) and 0 <= meta["step"] < 10**8:
        target = path.rename(tmp_path / checkpoint.name_of(meta["step"]))
    try:
        checkpoint.by_score(tmp_path)
        checkpoint.read_meta(target)
        found = resume.newest(session, Console(speaks=False))
        if found is not None:
            resume.check_compatible(session, found.meta, ["a", "b"], 20)
        config = base()
        stored.apply_config(config, stored.nested(checkpoint.read(target).meta["config"]), "x")
        resolve.check(config)
    except UserError:
        pass
    finally:
        target.unlink()


@QUICK
@given(
    name=st.sampled_from(["model.name", "image_size", "lr", "model", "augment.scale", "a", "model.name.x", ""]),
    value=JSON,
)
def test_any_value_in_a_stored_config_is_taken_or_refused_in_one_line(name, value):
    config = base()
    config.epochs = 1.0
    try:
        stored.apply_config(config, stored.nested({"seed": 1, name: value}), "config.json")
        resolve.check(config)
    except UserError as error:
        assert "config" in str(error)


@QUICK
@given(name=st.sampled_from(list(TENSORS)), kind=st.sampled_from(["gone", "shape", "dtype"]))
def test_tensors_of_another_run_are_refused_by_name(name, kind):
    flat = {n: t.clone() for n, t in TENSORS.items()}
    template = state.TrainState(*[{}] * 6)._replace(
        step=flat["step"], params={"w": flat["params/w"]}, opt={"mu": {"w": flat["opt/mu/w"]}},
        scale={"good": flat["scale/good"]}, ema={"none": flat["ema/none"]},
    )  # fmt: skip
    found = dict(TENSORS)
    value = found.pop(name)
    if kind != "gone":
        found[name] = value.double() if kind == "dtype" else value[None]
    if kind == "gone" and name.startswith("scale/"):
        return  # a run that changed its precision
    with pytest.raises(CheckpointError, match=name):
        resume.restore(checkpoint.Checkpoint("file", META, found), template)


@QUICK
@given(value=JSON)
def test_manifest_of_any_content_does_not_prevent_reading(written, value):
    path, data = written
    path.write_bytes(data)
    file = path.parent / checkpoint.MANIFEST
    for content in (value, {"checkpoints": value, "checksum": checkpoint._checksum(value)}):
        file.write_text(json.dumps(content))
        assert checkpoint.read(path).meta["metrics"] == METRICS
    entry = {path.name: {"digest": checkpoint.read(path).meta["digest"], "metrics": value, "best": value}}
    file.write_text(json.dumps({"checkpoints": entry, "checksum": checkpoint._checksum(entry)}))
    try:
        found = checkpoint.read(path).meta["metrics"]
        assert found is None or "acc1" in found
    except CheckpointError:
        pass
    checkpoint.by_score(path.parent)
    file.unlink()


@QUICK
@given(st.binary(max_size=60), st.integers(0, 3))
def test_metrics_file_of_any_content_can_be_read_and_continued(tmp_path, data, keep):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(data)
    records.read_metrics(path)
    file = records.MetricsFile(path, keep)
    file.write({"step": 1})
    file.close()
    assert path.read_bytes().endswith(b'{"step": 1}\n') and path.read_bytes().count(b"\n") == file.count <= keep + 1
