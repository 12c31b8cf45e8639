"""Distillation: the losses are Hinton's, DeiT's and timm's; a teacher sees the student's images in its own way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import nano, nchw, timm_model
from test_compile import CountingBackend, device, recipe_batches

from pcpvt.devices import compile
from pcpvt.functional import mixing, optim, precision, schedules, state, tasks
from pcpvt.functional.distillation import Distillation, make_loss, renormalise, resize
from pcpvt.functional.objective import IMAGENET_MEAN, IMAGENET_STD, make_objective, training_images
from pcpvt.functional.step import (
    autograd_value_and_grad,
    functional_value_and_grad,
    make_step,
    with_teacher,
)
from pcpvt.models import pcpvt

import timm  # isort: skip

HERE, HALF = (IMAGENET_MEAN, IMAGENET_STD), ((0.5,) * 3, (0.5,) * 3)
NANO = {"depths": (2, 1, 1, 1), "embed_dims": (16, 32, 40, 64), "mlp_ratios": (2, 2, 2, 2)}
FLOAT64 = precision.parse("float64")


def resnet(classes: int = 10) -> torch.nn.Module:
    """timm's miniature ResNet, normalised by 0.5, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = timm.create_model("test_resnet", num_classes=classes).double().eval()
        with torch.no_grad():
            model.fc.weight.mul_(30)  # of an untrained one all classes would be as probable
    return model


def asking(teacher: torch.nn.Module):
    """The teacher's logits of a batch."""

    @torch.no_grad()
    def logits(batch):
        return teacher(nchw(renormalise(training_images(batch, 3).double(), HERE, HALF)))

    return logits


class TwoHeads(torch.nn.Module):
    """A student whose only head is also that of timm's token distillation."""

    def __init__(self, model):
        super().__init__()
        self.model, self.num_classes, self.in_chans = model, 10, 3
        self.pretrained_cfg = model.pretrained_cfg

    def set_distilled_training(self, enable=True):
        pass

    def forward(self, x):
        logits = self.model(x)
        return logits, logits


@pytest.mark.parametrize(("mode", "temperature"), [("soft", 3.0), ("hard", 1.0)])
def test_twenty_steps_equal_timms_distillation(mode, temperature):
    """In float64, with a teacher of another architecture and normalisation; the loss to 1e-9, parameters to 1e-7."""
    task = pytest.importorskip("timm.task", reason="timm has no distillation here")
    student, teacher = timm_model("pcpvt_s", 10, **NANO).double(), resnet()
    model = pcpvt.build("pcpvt_nano", 10)
    params = {name: value.detach().clone() for name, value in student.named_parameters()}
    assert params.keys() == pcpvt.shapes(model).keys()
    options = {
        "criterion": torch.nn.CrossEntropyLoss(label_smoothing=0.1), "task_loss_weight": 0.3,
        "temperature": temperature, "dtype": torch.float64, "verbose": False,
    }  # fmt: skip
    if mode == "soft":
        theirs = task.LogitDistillationTask(student, teacher, **options)
    else:
        theirs = task.TokenDistillationTask(TwoHeads(student), teacher, distill_type="hard", **options)
    theirs.teacher.mean_kd, theirs.teacher.std_kd = theirs.teacher.mean_kd.double(), theirs.teacher.std_kd.double()
    torch_optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-8)

    groups = optim.groups(params, 0.0)
    optimizer = optim.chain(optim.adamw(schedules.constant(1e-3), groups, (0.9, 0.999), 1e-8))
    objective = make_objective(model, smoothing=0.1, policy=FLOAT64, distill=Distillation(mode, temperature, 0.7))
    taught = with_teacher(autograd_value_and_grad, asking(teacher))
    step = make_step(objective, optimizer, global_batch=8, grad_accum_steps=2, policy=FLOAT64, value_and_grad=taught)
    laid_out = optim.lay_out(params, groups)
    ours = state.create(laid_out, optimizer.init(laid_out), {}, ema=False)
    for i in range(20):
        batch = {name: recipe_batches(model, 4, 8)[i % 4][name] for name in ("image", "label")}
        ours, metrics = step(ours, batch)
        found = theirs(nchw(mixing.decode_images(batch["image"], None, *HERE).double()), batch["label"])
        torch_optimizer.zero_grad()
        found["loss"].backward()
        torch_optimizer.step()
        assert metrics["loss"].item() == pytest.approx(found["loss"].item(), rel=1e-9)
    for name, value in student.named_parameters():
        assert (ours.params[name] - value).norm() <= 1e-7 * value.norm(), name


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_the_loss_is_the_written_out_one_on_erased_and_mixed_images(mode):
    model, params = nano()
    batch, teacher = recipe_batches(model, 1, 8)[0], resnet()
    seen = training_images(batch, 3)
    x = mixing.decode_images(batch["image"], batch["erase"], *HERE)
    assert torch.equal(seen, mixing.mix_images(x, batch["lam"], batch["box"]))
    objective = make_objective(model, smoothing=0.1, policy=FLOAT64, distill=Distillation(mode, 2.0, 0.25))
    logits = asking(teacher)(batch)
    factor = torch.tensor(1 / 8, dtype=torch.float64)
    value = objective(params, {**batch, "teacher": logits}, factor)
    own = pcpvt.apply(model, params, seen.double(), batch["drop_path_scale"])
    labels = mixing.mix_targets(batch["label"], batch["lam"], 10, 0.1, torch.float64)
    towards = F.cross_entropy(own, logits.argmax(-1))
    if mode == "soft":  # Hinton et al. 2015: at temperature T, times T squared
        p, q = (logits / 2).softmax(-1), (own / 2).softmax(-1)
        towards = (p * (p / q).log()).sum(-1).mean() * 4
    torch.testing.assert_close(value, 0.75 * F.cross_entropy(own, labels) + 0.25 * towards, rtol=1e-12, atol=1e-12)

    plain = make_objective(model, smoothing=0.1, policy=FLOAT64)
    torch.testing.assert_close(plain(params, batch, factor), F.cross_entropy(own, labels))
    for gradient in (autograd_value_and_grad, functional_value_and_grad):  # the second is the one that is compiled
        found, grads = with_teacher(gradient, asking(teacher))(objective)(params, batch, factor)
        assert found.item() == pytest.approx(value.item(), rel=1e-12) and grads.keys() == params.keys()


def test_class_weights_are_those_of_the_labels_only():
    model, params = nano()
    batch = {
        **recipe_batches(model, 1, 4)[0],
        "teacher": torch.randn(4, 10, generator=torch.Generator().manual_seed(0)),
    }
    one = torch.tensor(1.0, dtype=torch.float64)
    losses = [
        make_objective(model, class_weights=weights, policy=FLOAT64, distill=Distillation(weight=1.0))(
            params, batch, one
        )
        for weights in (None, torch.rand(10).double())
    ]
    assert torch.equal(*losses)


def test_several_labels_are_learnt_from_a_teachers_answers_to_each_question():
    source = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(5, 4, generator=source, dtype=torch.float64) for _ in range(2))
    task = tasks.choose("multilabel")
    p, q = (teacher / 3).sigmoid(), (logits / 3).sigmoid()
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(make_loss(task, Distillation("soft", 3.0))(logits, teacher), 9 * divergence.mean(-1))
    yes = (teacher >= 0).double()
    expected = F.binary_cross_entropy_with_logits(logits, yes, reduction="none").mean(-1)
    torch.testing.assert_close(make_loss(task, Distillation("hard"))(logits, teacher), expected)


def test_images_in_the_teachers_size_and_normalisation():
    images = torch.randn(2, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    assert resize(images, (32, 48)) is images and renormalise(images, HERE, HERE) is images
    for size in ((64, 96), (20, 30)):
        expected = F.interpolate(nchw(images), size, mode="bicubic", antialias=True)
        torch.testing.assert_close(nchw(resize(images, size)), expected)
    pixels = images * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)
    torch.testing.assert_close(renormalise(images, HERE, HALF), (pixels - 0.5) / 0.5)


def test_a_compiled_step_takes_the_teachers_logits_as_input():
    """The whole graph is compiled once, and the teacher, here one that runs in numpy, is no part of it."""
    torch._dynamo.reset()
    model, params = nano()
    counting = CountingBackend()
    objective = make_objective(model, policy=FLOAT64, distill=Distillation())
    factor = torch.tensor(0.25, dtype=torch.float64)

    def teacher(batch):
        return torch.from_numpy(np.tile(batch["label"].numpy()[:, None], 10) * np.arange(10.0))

    compiled = with_teacher(compile.value_and_grad(device(counting), "auto"), teacher)(objective)
    plain = with_teacher(autograd_value_and_grad, teacher)(objective)
    for batch in recipe_batches(model, 2, 4):
        value, grads = compiled(params, batch, factor)
        expected, others = plain(params, batch, factor)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grads["head.weight"], others["head.weight"], rtol=1e-10, atol=1e-12)
    assert counting.graphs == 1
    torch._dynamo.reset()
