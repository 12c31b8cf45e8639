"""Console output, the progress line, the sliding rate, MFU, and TensorBoard events."""

import io
import json
import math
import os
import warnings
from typing import NamedTuple

import pytest
import torch

from pcpvt.functional import mixing
from pcpvt.functional.sizes import SizeSchedule, constant
from pcpvt.models import pcpvt as models
from pcpvt.runtime.console import Console, duration
from pcpvt.train import utilisation
from pcpvt.train.history import Rate
from pcpvt.train.writers import ConsoleWriter, TensorBoardWriter, network_input


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the console replaces it: put back afterwards
    return Terminal()


def test_durations_are_short():
    assert [duration(s) for s in (-1, 0.4, 75, 7265, 200000)] == ["0s", "0s", "1m15s", "2h01m", "2d07h"]


def test_rate_forgets_the_first_step_and_what_left_the_window():
    rate = Rate(window=10)
    rate.add(8, 100.0, 50.0)  # compiles
    assert rate.images_per_sec == 0
    for _ in range(20):
        rate.add(8, 2.0, 1.0)
    assert rate.images_per_sec == pytest.approx(4) and rate.waiting == pytest.approx(0.5)
    for _ in range(5):
        rate.add(8, 2.5, 0.0)
    assert rate.images_per_sec == pytest.approx(3.2, rel=0.1) and rate.waiting < 0.1


def test_rate_looks_at_two_steps_even_where_one_is_longer_than_the_window():
    rate = Rate(window=1)
    for seconds in (9.0, 4.0, 6.0, 6.0, 4.0):
        rate.add(10, seconds)
    assert rate.images_per_sec == pytest.approx(2.0)


def test_live_line_is_cut_to_the_terminal_and_makes_way(terminal, capsys):
    console = Console(stream=terminal)
    console.live("x" * 200)
    console.say("stays")
    assert terminal.getvalue() == f"\r\x1b[K{'x' * 59}\r\x1b[Kstays\n"


def test_live_line_shows_on_terminals_only():
    out = io.StringIO()
    Console(stream=out).live("never")
    assert out.getvalue() == ""


def test_other_processes_are_silent_but_for_warnings(capsys):
    console = Console(speaks=False)
    console.say("no")
    console.warn("disk full")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "pcpvt: warning: disk full\n"


def test_warnings_are_one_line_of_printable_text(capsys):
    Console().warn("a\x1b[31m folder\nand its file")
    assert capsys.readouterr().err == "pcpvt: warning: a?[31m folder and its file\n"


def test_stream_that_takes_no_more_is_silenced_and_said_once(capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:  # whose flush at the end would fail too
        console = Console(stream=out)
        console.say("one")
        console.say("two")
    assert capsys.readouterr().err == "pcpvt: warning: standard output is lost from here on (Broken pipe)\n"


def test_python_warnings_are_kept_beside_a_live_line(terminal, capsys):
    console = Console(stream=terminal)
    console.live("running")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = console._show_warning  # catch_warnings restores Python's own
        warnings.warn("odd tensor", UserWarning, stacklevel=1)
    assert terminal.getvalue().endswith("\r\x1b[K") and "UserWarning: odd tensor" in capsys.readouterr().err


class Planned(NamedTuple):
    """The part of a Plan that the console shows."""

    steps: int = 100
    epochs: float = 10
    batch: int = 32
    sizes: SizeSchedule = constant((224, 224))


def test_progress_line_shows_position_speed_and_time_left(terminal):
    writer, rate = ConsoleWriter(Console(stream=terminal), Planned()), Rate()
    writer.record({"kind": "train", "step": 0, "loss": 2.5, "lr": 1e-3})
    for _ in range(40):
        rate.add(32, seconds=2.0, waited=0.5)
    writer.step(40, rate)
    line = writer.line({"step": 40, "loss": 2.5, "lr": 1e-3})
    expected = "epoch 4.00/10  step 40/100  loss 2.5000  lr 1.00e-03  16 images/s  2m00s left  waiting for data 25 %"
    assert line == expected
    assert "MFU 41.0 %  waiting" in writer.line({"step": 40, "loss": 2.5, "lr": 1e-3, "mfu": 0.41})
    assert "[######..........]  step 40/100" in writer.line({"step": 40, "loss": 2.5, "lr": 1e-3}, bar=True)
    assert "step 40/100" in terminal.getvalue()


def test_progress_is_plain_lines_without_a_terminal():
    out, rate = io.StringIO(), Rate()
    writer = ConsoleWriter(Console(stream=out), Planned())
    writer.record({"kind": "train", "step": 10, "loss": 2.5, "lr": 1e-3})
    rate.add(32, 1.0)
    writer.step(11, rate)
    assert out.getvalue() == "epoch 1.00/10  step 10/100  loss 2.5000  lr 1.00e-03\n"


def multiply_adds(spec, size, num_classes):
    """Multiply-adds of one image in the forward pass, summed by hand from the architecture's numbers."""
    (height, width), channels, total = size, 3, 0
    for depth, dim, ratio, reduction, patch in zip(
        spec.depths, spec.dims, spec.mlp_ratios, spec.reductions, spec.patches, strict=True
    ):
        height, width = math.ceil(height / patch), math.ceil(width / patch)
        tokens, keys = height * width, math.ceil(height / reduction) * math.ceil(width / reduction)
        total += tokens * channels * patch**2 * dim + 9 * tokens * dim  # patch embedding, position encoding
        reduce = keys * (dim * reduction) ** 2 if reduction > 1 else 0
        attention = (2 * tokens + 2 * keys) * dim**2 + reduce + 2 * tokens * keys * dim
        total += depth * (attention + 2 * tokens * ratio * dim**2)
        channels = dim
    return total + channels * num_classes


@pytest.mark.parametrize("size", [(224, 224), (97, 65)])
def test_flops_are_twice_the_multiply_adds_of_the_architecture(size):
    model = models.build("pcpvt_s", 1000)
    assert utilisation.forward_flops(model, size) == 2 * multiply_adds(model.spec, size, 1000)


def test_mfu_is_known_for_known_devices_only():
    h200 = utilisation.peak_flops("NVIDIA H200", torch.bfloat16)
    assert h200 == 989e12 and utilisation.mfu(1000, 8 * 10**9, h200, 2) == pytest.approx(6 * 4e12 / (2 * 989e12))
    assert utilisation.peak_flops("NVIDIA H100 PCIe", torch.float16) == 756e12
    assert utilisation.peak_flops("NVIDIA A100-SXM4-80GB", torch.bfloat16) == 312e12
    for older in ("Tesla T4", "Tesla V100-SXM2-16GB", "Tesla V100-PCIE-16GB"):
        assert utilisation.peak_flops(older, torch.float16) and utilisation.peak_flops(older, torch.bfloat16) is None
    for other in ("AMD EPYC, 2 cores", "NVIDIA RTX A1000", "NVIDIA T400 4GB", "Tesla T40", "NVIDIA GH200 480GB"):
        assert utilisation.peak_flops(other, torch.float16) is None


def test_mfu_of_float32_is_not_known_because_tf32_is_never_on():
    for name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "Tesla T4"):
        assert utilisation.peak_flops(name, torch.float32) is None


def test_images_are_shown_as_the_network_sees_them():
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[0, 4, 0, 4], *[[0, 0, 0, 0]] * 3], dtype=torch.int32)
    assert torch.equal(network_input({"image": images}), images)
    grey = network_input({"image": torch.full_like(images, mixing.NOISE_ZERO), "erase": box})
    assert grey[0, 0, 0].tolist() == [124, 116, 104] and grey[0, 5, 5].tolist() == [128] * 3  # noise 0 is the mean
    lam = torch.full((4,), 0.25)
    mixed = network_input({"image": images, "lam": lam, "box": torch.zeros(4, 4, dtype=torch.int32)})
    blend = 0.25 * images[0].float() + 0.75 * images[1].float()
    assert (mixed[0].float() - blend).abs().max() <= 1


def test_events_equal_the_records_also_after_a_resume(pcpvt, nano, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    workdir = tmp_path / "run"
    pcpvt(*nano)
    (workdir / "checkpoints" / "step-00000008.safetensors").unlink()  # the run was killed before it was written
    assert "resumed: step 4" in pcpvt(*nano).stdout

    events = EventAccumulator(str(workdir / "tensorboard")).Reload()
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for kind, name in (("train", "loss"), ("train", "lr"), ("train", "grad_norm"), ("eval", "acc1"), ("eval", "loss")):
        found = [(event.step, event.value) for event in events.Scalars(f"{kind}/{name}")]
        expected = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records if r["kind"] == kind]
        assert found == expected, (kind, name)
    assert [event.step for event in events.Images("train/images")] == [0]  # one grid
    assert b"pcpvt_nano" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_a_board_that_cannot_write_warns_once(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    said = []
    board = TensorBoardWriter(tmp_path, 0, said.append)
    board.record({"kind": "train", "step": 1, "loss": 1.0})
    board.close()
    assert len(said) == 1 and "training goes on" in said[0]
