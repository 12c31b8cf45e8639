"""Ensembles: members equal their own evaluation to the bit, averages and soups match their definitions."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from pcpvt.checkpoints import checkpoint
from pcpvt.config import recipes
from pcpvt.errors import UserError
from pcpvt.evaluate import ensemble, run
from pcpvt.functional import metrics
from pcpvt.functional.objective import IMAGENET_MEAN, IMAGENET_STD
from pcpvt.models import pcpvt as models
from pcpvt.models.init import init
from pcpvt.runtime import session as sessions

A, B = 1, 4  # seeds with which no image's two best classes are nearer than 0.003: float32 is off by 6e-6


def params(seed: int, name: str = "pcpvt_nano") -> dict[str, torch.Tensor]:
    """A model that is sure of something, so that an average differs from its members."""
    found = init(models.build(name, 10), seed)
    found["head.weight"] = found["head.weight"] * 20
    return found


@pytest.fixture
def session(tmp_path, monkeypatch):
    """On the digits, with files a.pth and b.pth and a checkpoint c with params and ema."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", A), ("b", B)):
        torch.save(params(seed), f"{name}.pth")
    tensors = {f"params/{n}": v for n, v in params(2).items()} | {f"ema/{n}": v for n, v in params(3).items()}
    meta = {"step": 1, "config": {"batch_size": 64}, "model": "pcpvt_nano", "classes": [str(d) for d in range(10)]}
    checkpoint.save(tmp_path / "checkpoints", tensors, {**meta, "metrics": {"acc1": 1.0}, "examples": 1433})
    config = recipes.from_arg("cpu", "pcpvt_nano", 0.0)
    config.precision = "float32"
    return sessions.start(config, tmp_path)


def result(session, text: str, **fields) -> dict:
    session.config.eval.ensemble = text
    session.config.update(fields)
    assert run.run(session) == 0
    return json.loads((session.workdir / "result-eval.json").read_text())


def test_the_figures_are_those_of_plain_code(session):
    found = result(session, "a.pth,b.pth")
    assert [m["checkpoint"] for m in found["ensemble"]["members"]] == ["a.pth", "b.pth"]

    source = sessions.open_data(session, "val")
    labels = torch.from_numpy(source.labels)
    x = (torch.from_numpy(source.images) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    model = models.build("pcpvt_nano", 10)
    both = [params(A), params(B)]
    alone = [models.apply(model, p, x) for p in both]
    mean = torch.stack([logits.softmax(-1) for logits in alone]).mean(0)
    blend = models.apply(model, {n: (both[0][n] + both[1][n]) / 2 for n in both[0]}, x)
    members, average, soup = (found["ensemble"][name] for name in ("members", "average", "soup"))
    for figures, logits in ((members[0], alone[0]), (members[1], alone[1]), (average, mean.log()), (soup, blend)):
        assert figures["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert figures["acc1"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item() * 100)
    assert found["loss"] == average["loss"] < (members[0]["loss"] + members[1]["loss"]) / 2
    assert found["seen"] == 364 and found["checkpoint"] == "a.pth,b.pth"


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_member_has_the_figures_of_its_own_evaluation_to_the_bit(session, precision):
    session.config.precision = precision
    here = sessions.start(session.config, session.workdir)
    members = result(here, "a.pth,b.pth")["ensemble"]["members"]
    for name, member in zip(("a.pth", "b.pth"), members, strict=True):
        alone = result(here, "", checkpoint=name)
        assert {n: alone[n] for n in ("acc1", "acc5", "loss")} == {n: member[n] for n in ("acc1", "acc5", "loss")}


def test_members_with_their_classes_in_another_order_are_aligned_by_name(session):
    names, rows = [str(d) for d in range(10)], list(range(9, -1, -1))
    for word, seed, order in (("x", A, range(10)), ("y", B, rows)):
        tensors = {f"params/{n}": v for n, v in params(seed).items()}
        for name in ("params/head.weight", "params/head.bias"):
            tensors[name] = tensors[name][list(order)]
        meta = {"step": 1, "model": "pcpvt_nano", "classes": [names[i] for i in order]}
        checkpoint.save(session.workdir / word, tensors, meta)
    files = [f"{word}/step-00000001.safetensors" for word in ("x", "y")]
    plain = result(session, "a.pth,b.pth")["ensemble"]
    aligned = result(session, ",".join(files))["ensemble"]
    for kind in ("average", "soup"):
        assert aligned[kind]["loss"] == pytest.approx(plain[kind]["loss"], rel=1e-6)
    meta = {"step": 1, "model": "pcpvt_nano", "classes": [*names[:9], "ten"]}
    checkpoint.save(session.workdir / "z", {f"params/{n}": v for n, v in params(A).items()}, meta)
    with pytest.raises(UserError, match="give members of the same classes"):
        result(session, f"{files[0]},z/step-00000001.safetensors")


def test_ema_means_the_raw_and_the_averaged_weights_of_the_workdirs_best(session):
    found = result(session, "ema")["ensemble"]["members"]
    assert [m["weights"] for m in found] == ["params", "ema"]
    assert len({m["checkpoint"] for m in found}) == 1 and found[0]["loss"] != found[1]["loss"]
    picked = ensemble.members(session)
    torch.testing.assert_close([p.params for p in picked], [params(2), params(3)], rtol=0, atol=0)


def test_workdirs_files_and_words_can_be_mixed(session):
    session.config.eval.ensemble = f"params, a.pth ,{session.workdir}"
    session.config.checkpoint = str(session.workdir / "checkpoints" / "step-00000001.safetensors")
    picked = ensemble.members(session)
    assert [p.which for p in picked] == ["params", "params", "ema"]
    torch.testing.assert_close([p.params for p in picked], [params(2), params(A), params(3)], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("text", "fields", "said"),
    [
        ("a.pth", {}, "name two or more"),
        ("a.pth,b.pth", {"checkpoint": "c.pth"}, "is without c.pth"),
        ("a.pth,missing.pth", {}, "missing.pth: no such file"),
        ("a.pth,other.pth", {}, "other.pth: does not fit the model"),
        ("a.pth,ema", {"weights": "ema"}, "a.pth: holds no EMA weights"),
    ],
)
def test_ensemble_that_cannot_be_is_one_line(session, text, fields, said):
    torch.save(params(A) | {"head.weight": torch.zeros(4, 64), "head.bias": torch.zeros(4)}, "other.pth")
    with pytest.raises(UserError, match=said) as caught:
        result(session, text, **fields)
    assert "\n" not in str(caught.value)


def test_average_is_normalised_and_survives_certainty():
    sure = torch.tensor([[1e4, 0.0], [0.0, 3.0]])
    unsure = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    found = metrics.average_probabilities([sure, unsure]).exp()
    torch.testing.assert_close(found, (sure.softmax(-1) + unsure.softmax(-1)) / 2)
    torch.testing.assert_close(found.sum(-1), torch.ones(2))


def test_command_line_takes_the_config_of_the_first_file(pcpvt, session):
    for word in ("x", "y"):
        flat = {"model.name": "pcpvt_nano", "data.name": "digits", "image_size": 32, "epochs": 1.0, "eval.crop": 1.0}
        flat |= {"warmup_epochs": None}
        tensors = {f"params/{n}": v for n, v in params(len(word)).items()}
        meta = {"config": flat, "model": "pcpvt_nano", "classes": [str(d) for d in range(10)], "examples": 1}
        checkpoint.save(session.workdir / word, tensors, {"step": 1, **meta})
    files = [str(session.workdir / word / "step-00000001.safetensors") for word in ("x", "y")]
    done = pcpvt("--mode=eval", f"--config.eval.ensemble={','.join(files)}", f"--workdir={session.workdir / 'new'}")
    assert "evaluating 2 members on 364 images of digits, split val: 32x32 px, crop 1, " in done.stdout
    assert done.stdout.count("top-1") == 4
