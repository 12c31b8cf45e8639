"""The teacher of a run (`config.distill`): any weights or graph that this package reads, and any model of timm.

It gets exactly the images that the student gets, after erasing and mixing, in its own size, normalisation and
precision, and never changes. docs/distillation.md says how it is described.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from pcpvt.checkpoints import checkpoint
from pcpvt.checkpoints.description import Description
from pcpvt.checkpoints.labels import assumed_order, by_knowledge, listed, shortened
from pcpvt.checkpoints.load import load_model
from pcpvt.data.classes import read_map
from pcpvt.data.sources import Dataset
from pcpvt.devices.compile import compiled
from pcpvt.errors import UserError, one_line
from pcpvt.functional.distillation import Distillation, Normalisation, renormalise, resize
from pcpvt.functional.objective import Batch, normalisation, training_images
from pcpvt.models import pcpvt
from pcpvt.runners import exported, timm_models
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import warn_once
from pcpvt.runtime.session import Session

FIELD = "config.distill.teacher"


class Teacher(NamedTuple):
    """A teacher that is ready to be asked."""

    logits: Callable[[Batch], Tensor]  # of a training batch on the device: `[b, classes of the student]`
    how: Distillation
    digest: str  # of its weights or its graph, and of how it is asked
    notes: list[str]  # for the log


class Network(NamedTuple):
    """What a file or a name gives: a classifier of images of the size that it is given."""

    path: str
    logits: Callable[[Tensor], Tensor]  # float32 `[b, h, w, channels]`, normalised as below, to `[b, outputs]`
    normalised: Normalisation
    outputs: int
    said: Description
    sides: tuple[int | None, int | None]  # height and width that it takes; None: any
    precision: str
    n_parameters: int | None  # None: not known
    digest: str
    notes: list[str]

    @property
    def classes(self) -> list[str] | None:
        """Names of the outputs, where the file gives them."""
        return self.said.classes


def of_run(session: Session, model: pcpvt.PCPVT, dataset: Dataset) -> Teacher | None:
    """The teacher that `config.distill` names, for a student and its data; None where there is none.

    Raises:
        UserError: when it cannot be read, or does not fit the student's images, classes or task.
    """
    distill = session.config.distill
    if not distill.teacher:
        return None
    try:
        network = _open(sessions.in_precision(session, distill.precision), distill.teacher)
    except UserError as error:
        raise UserError(f"{FIELD}: {distill.teacher}: {str(error).removeprefix(f'{distill.teacher}: ')}") from None
    channels = model.in_chans
    size = _size(session, network.said)
    _check(session, network, size, channels)
    columns, notes = _columns(session, network, model, dataset.classes)
    chosen = None if columns is None else torch.tensor(columns).to(session.device.torch)
    here = normalisation(channels)

    def logits(batch: Batch) -> Tensor:
        images = renormalise(resize(training_images(batch, channels), size), here, network.normalised)
        found = network.logits(images).to(session.policy.output)
        return found if chosen is None else found[:, chosen]

    how = Distillation(distill.mode, distill.temperature, distill.weight)
    asked = {"size": size, "columns": columns, "normalised": network.normalised}
    digest = checkpoint.digest({"network": network.digest, **asked}, [])
    return Teacher(logits, how, digest, [_note(session, network, size, how), *network.notes, *notes])


def stored(teacher: Teacher | None) -> dict[str, Any]:
    """What the JSON of a run's checkpoints says of its teacher."""
    return {} if teacher is None else {"teacher": teacher.digest}


def check_same(session: Session, before: dict[str, Any], teacher: Teacher | None) -> None:
    """Raises UserError unless the teacher is the one that the run began with: a file may have changed meanwhile.

    Args:
        before: the JSON of the run's checkpoint.
    """
    if teacher is not None and before.get("teacher") != teacher.digest:
        raise UserError(
            f"{FIELD}: {session.config.distill.teacher}: is no longer the teacher that {session.workdir} was trained "
            "with (its weights, size or classes differ): restore it, or start anew with another --workdir"
        )


def _open(session: Session, name: str) -> Network:
    if exported.is_graph(name):
        return _graph(session, name)
    return _timm_model(session, name) if timm_models.is_timm(name) else _weights(session, name)


def _weights(session: Session, name: str) -> Network:
    """Twins-PCPVT weights, with the kernels of the device."""
    loaded = load_model(name)  # whose first layer takes images that are normalised as here
    params, policy, kernels = session.inference(loaded.params), session.policy, session.kernels

    def forward(params: pcpvt.Params, images: Tensor) -> Tensor:
        with torch.no_grad():
            return pcpvt.apply(loaded.model, params, images.to(policy.compute), kernels=kernels)

    run = compiled(forward, session.device, session.config.compile, warn_once)
    return Network(
        f"{loaded.path} ({loaded.which})", lambda images: run(params, images), normalisation(loaded.model.in_chans),
        loaded.outputs, loaded.said._replace(channels=loaded.model.in_chans), (None, None), _short(policy.compute),
        pcpvt.n_parameters(loaded.model), checkpoint.digest({}, sorted(loaded.params.items())), loaded.notes,
    )  # fmt: skip


def _timm_model(session: Session, name: str) -> Network:
    """A model of timm of any architecture."""
    found, dtype = timm_models.read(name), session.policy.compute
    digest = checkpoint.digest({}, sorted(found.module.state_dict().items()))
    parameters = sum(value.numel() for value in found.module.parameters())
    module = found.module.to(session.device.torch, dtype)

    def forward(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(rearrange(images, "b h w c -> b c h w").to(dtype))

    channels = found.said.channels or 3
    _try(session, forward, (1, *_size(session, found.said), channels), found.outputs)
    run = compiled(forward, session.device, session.config.compile, warn_once)
    mean, std = normalisation(channels)
    return Network(
        name, run, (found.said.mean or mean, found.said.std or std), found.outputs,
        found.said._replace(channels=channels), (None, None), _short(dtype), parameters, digest, [],
    )  # fmt: skip


def _try(session: Session, forward: Callable[[Tensor], Tensor], shape: tuple[int, ...], outputs: int) -> None:
    """Raises UserError unless a model takes images of this shape: some of timm's take one size, or have no classes."""
    try:
        found = forward(torch.zeros(shape, device=session.device.torch))
        fault = "" if found.shape == (1, outputs) else f"gives {tuple(found.shape)}, not [1, classes]"
    except Exception as error:  # each architecture raises what it likes
        fault = f"fails ({type(error).__name__}: {one_line(error)})"
    if fault:
        raise UserError(
            f"for an image of {shape[1]}x{shape[2]} px it {fault}: give a classifier, and by "
            "config.distill.image_size an image size that it takes"
        )


def _graph(session: Session, name: str) -> Network:
    """An exported graph, which runs on the host."""
    graph, said = exported.read(name), exported.describe(name)
    network, runtime = exported.start(name, graph, session.policy.compute)
    channels = said.channels or 3
    mean, std = normalisation(channels)
    pixels = exported.takes_pixels(graph)

    def forward(images: Tensor) -> Tensor:
        on_host = images.cpu()
        if pixels:  # which are between 0 and 1 here; of noise from erasing, what is outside is cut off
            codes = (255 * on_host).round().clamp(0, 255).to(torch.uint8)
            return session.task.logits(network(codes)).to(images.device)
        return network(rearrange(on_host, "b h w c -> b c h w")).float().to(images.device)

    normalised = ((0.0,) * channels, (1.0,) * channels) if pixels else (said.mean or mean, said.std or std)
    parameters = None
    if said.model:
        parameters = pcpvt.n_parameters(pcpvt.build(said.model, graph.outputs, in_chans=channels))
    return Network(
        name, forward, normalised, graph.outputs, said._replace(channels=channels), graph.images[2:], runtime,
        parameters, _digest_of_files(Path(name).expanduser()), [],
    )  # fmt: skip


def _digest_of_files(path: Path) -> str:
    """Of a graph's file and, where its weights lie beside it, of theirs."""
    total = hashlib.blake2b(digest_size=16)
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else sorted(path.parent.glob(f"{path.name}*data"))
    for file in (path, *beside):
        if file.is_file():
            with file.open("rb") as opened:
                for block in iter(functools.partial(opened.read, 1 << 24), b""):
                    total.update(block)
    return total.hexdigest()


def _check(session: Session, network: Network, size: tuple[int, int], channels: int) -> None:
    """Raises UserError for a teacher of other images, or of another task."""
    config, said = session.config, network.said
    if any(own not in (None, side) for own, side in zip(network.sides, size, strict=True)):
        takes = "x".join("any" if side is None else str(side) for side in network.sides)
        raise UserError(
            f"config.distill.image_size: {size[0]}x{size[1]} px and {network.path} takes {takes} only: leave it out, "
            "or export the teacher with config.export.dynamic_size"
        )
    if said.channels != channels:
        raise UserError(
            f"{FIELD}: {network.path} takes images of {said.channels} channels and config.model.in_chans is "
            f"{channels}: give a teacher for such images"
        )
    if said.task not in ("", config.task):
        raise UserError(
            f"{FIELD}: {network.path} was trained with config.task={said.task} and the run has {config.task}: give a "
            "teacher of the same task"
        )
    if said.value_range not in (None, session.reading.value_range):
        raise UserError(
            f"{FIELD}: {network.path} was trained with config.data.value_range={said.value_range} and the run has "
            f"{session.reading.value_range}: give both the same"
        )


def _columns(
    session: Session, network: Network, model: pcpvt.PCPVT, classes: Sequence[str]
) -> tuple[list[int] | None, list[str]]:
    """The teacher's output of each output of the student, by name where names tell it; None: the same. And notes.

    Raises:
        UserError: when a class of the data is none of the teacher's, or their numbers differ.
    """
    data, outputs, path = session.config.data, network.outputs, network.path
    positional = bool(data.class_map) and read_map(data.class_map).positional
    found = None if positional else by_knowledge(network.classes, outputs, classes)
    if found is None:
        if outputs != model.num_classes:
            raise UserError(
                f"{FIELD}: {path} has {outputs} classes, whose names are not known, and the model has "
                f"{model.num_classes}: give a teacher for {listed(classes)}"
            )
        return None, [] if positional else assumed_order(path, classes, data.class_order)
    columns = [output for output in found if output is not None]
    if len(columns) < len(classes):
        unknown = [name for name, output in zip(classes, found, strict=True) if output is None]
        raise UserError(
            f"{FIELD}: {path} does not know {len(unknown)} classes of the data ({shortened(unknown)}): give a teacher "
            "that was trained on them, or say by config.data.class_map which class is which"
        )
    if columns == list(range(model.num_classes)) and outputs == model.num_classes:
        return None, []
    if len(columns) != model.num_classes:
        raise UserError(
            f"config.num_classes: {model.num_classes} and {path} teaches the {len(columns)} classes of the data: "
            "leave it unset"
        )
    how = "by name" if network.classes is not None else "as ImageNet's"
    return columns, [f"teacher: its outputs for {len(columns)} classes of {outputs} are taken {how}"]


def _size(session: Session, said: Description) -> tuple[int, int]:
    """Height and width of the teacher's images."""
    given, (height, width) = session.config.distill.image_size, session.size
    return said.size or session.size if given is None else (given, round(given * width / height))


def _note(session: Session, network: Network, size: tuple[int, int], how: Distillation) -> str:
    """The teacher in one line, for the log."""
    parameters = "parameters not known" if network.n_parameters is None else f"{network.n_parameters:,} parameters"
    resized = "" if size == session.size else f" (bicubic from {session.size[0]}x{session.size[1]})"
    kind = f"soft targets at temperature {how.temperature:g}" if how.mode == "soft" else "hard targets"
    return (
        f"teacher: {network.path}, {parameters}, {network.outputs} classes, {size[0]}x{size[1]} px{resized}, "
        f"{network.precision}; {kind}, {how.weight:g} of the loss"
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
