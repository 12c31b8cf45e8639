"""What may differ between a run and its continuation: fields, data and precision, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest
from absl import flags

from pcpvt.checkpoints import checkpoint
from pcpvt.config import cli, stored
from pcpvt.config.fields import base
from pcpvt.errors import UserError
from pcpvt.functional import state
from pcpvt.functional.flat import pack
from pcpvt.train import resume


class Session:
    workdir = Path("runs/x")
    command = None

    def __init__(self, **fields):
        self.config = base()
        self.config.update_from_flattened_dict(fields)


def meta(**fields):
    flat = {**stored.flat(base()), **fields}
    return {"config": flat, "classes": ["a", "b"], "examples": 7, "step": 1}


def test_harmless_changes_pass_and_are_noted():
    changes = {"data.workers": 3, "epochs": 7.0, "processes": 4, "device": "npu", "eval.batch_size": 8, "keep": 5}
    notes = resume.check_compatible(Session(**changes), meta(), ["a", "b"], 7)
    assert len(notes) == len(changes) and "config.keep: 2 -> 5" in notes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1),
        ("batch_size", 8),
        ("model.drop_path", 0.5),
        ("ema", 0.9),
        ("augment.scale", (0.5, 1.0)),
        ("lr", 0.1),
    ],
)
def test_incompatible_change_names_the_field_and_both_values(field, value):
    before = stored.flat(base())[field]
    shown = list(value) if isinstance(value, tuple) else value
    with pytest.raises(UserError) as error:
        resume.check_compatible(Session(**{field: value}), meta(), ["a", "b"], 7)
    message = str(error.value)
    assert message.startswith(f"config.{field}: {shown!r} ") and repr(before) in message and "--workdir" in message


def test_weights_given_to_a_run_that_began_without_are_refused_not_ignored():
    with pytest.raises(UserError, match=r"config\.finetune: 'a\.pth' but runs/x was trained with ''.*--workdir=DIR"):
        resume.check_compatible(Session(finetune="a.pth"), meta(), ["a", "b"], 7)
    with pytest.raises(UserError, match=r"config\.weights: 'params' but .* 'ema'"):
        resume.check_compatible(Session(weights="params"), meta(finetune="a.pth", weights="ema"), ["a", "b"], 7)
    assert resume.check_compatible(Session(), meta(finetune="a.pth", weights="ema"), ["a", "b"], 7) == []


def test_other_data_are_refused():
    for classes, examples in ((["a", "c"], 7), (["a", "b"], 8)):
        with pytest.raises(UserError, match=r"config\.data\.path"):
            resume.check_compatible(Session(), meta(), classes, examples)


def test_field_that_a_newer_version_added_has_its_default():
    stored = meta()
    del stored["config"]["keep"], stored["config"]["label_smoothing"]
    assert resume.check_compatible(Session(), stored, ["a", "b"], 7) == []
    with pytest.raises(UserError, match=r"config\.label_smoothing: 0\.3 .* 0\.1"):
        resume.check_compatible(Session(label_smoothing=0.3), stored, ["a", "b"], 7)


def message(session: Session, *words: str, classes=("a", "b"), examples=7, **stored) -> str:
    """What the command `words` is told where the workdir has a run with these stored fields."""
    session.command = cli.parse(["pcpvt", *words], ["train"], flags.FlagValues())
    with pytest.raises(UserError) as error:
        resume.check_compatible(session, meta(**stored), [*classes], examples)
    return str(error.value)


def test_a_field_that_the_command_line_does_not_give_is_the_sign_of_another_run(tmp_path):
    session = Session(lr=0.5)
    session.workdir = tmp_path / "my runs"
    session.workdir.mkdir()
    (tmp_path / "my runs-2").mkdir()
    (session.workdir / "environment.json").write_text('{"started": "2026-03-01T12:34:56Z"}')
    words = ["--config.lr=0.5", f"--workdir={session.workdir}"]
    changed = {"augment.crop_pad": 3, "data.name": "digits", "lr": 0.1, "ema": 0.9, "seed": 3}
    assert message(session, *words, **changed) == (
        f"--workdir: {session.workdir} holds another run, pcpvt_s on digits (7 images of 2 classes), last started "
        "2026-03-01 12:34 UTC (config.augment.crop_pad 3 there, 0 here; config.data.name 'digits' there, '' here; "
        f"config.ema 0.9 there, 0.0 here and 2 fields more): go on with it by --workdir={session.workdir} alone, or "
        f"start anew with: python -m pcpvt.main --config.lr=0.5 --workdir='{tmp_path}/my runs-3'"
    )
    # A value that the command line gives is what is wrong, if all others are the run's.
    assert message(session, *words, lr=0.1).startswith("config.lr: 0.5 but ")
    for other in ({"classes": ["a", "c"]}, {"examples": 8}):
        text = message(session, *words, lr=0.5, **other)
        assert text.startswith("config.data.path: ") and text.endswith(f"--workdir='{tmp_path}/my runs-3'")


def test_precision_may_change_and_brings_its_own_loss_scale():
    import torch

    params = pack({"w": torch.ones(3)})
    opt = {"count": torch.zeros(())}
    scale = {"factor": torch.tensor(8.0), "good": torch.tensor(2, dtype=torch.int32)}
    with_scale = state.create(params, opt, scale, ema=False)
    without = state.create(pack({"w": torch.zeros(3)}), {"count": torch.zeros(())}, {}, ema=False)
    loaded = checkpoint.Checkpoint(None, {}, {n: t.clone() for n, t in state.flatten(with_scale).items()})
    assert resume.restore(loaded, without).params["w"].tolist() == [1, 1, 1]
    loaded = checkpoint.Checkpoint(None, {}, {n: t.clone() for n, t in state.flatten(without).items()})
    assert resume.restore(loaded, with_scale).scale["factor"] == 8.0
