"""The session of one process (config, device, processes, precision, kernels), and how modes open data and models."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict
from torch import Tensor

from pcpvt import devices
from pcpvt.config.checks import parse_duration
from pcpvt.config.cli import Command
from pcpvt.data import classes, sources
from pcpvt.data.decode import Reading
from pcpvt.data.label_sets import LabelSets
from pcpvt.data.loader import Batches, Loader, default_workers, shared_workers
from pcpvt.devices import base
from pcpvt.devices.compile import backend, compiled, compiled_blocks, value_and_grad
from pcpvt.distributed import collectives
from pcpvt.distributed.group import World
from pcpvt.errors import UserError
from pcpvt.functional import precision, tasks
from pcpvt.functional.flat import pack
from pcpvt.functional.objective import make_predict
from pcpvt.functional.precision import Policy
from pcpvt.models import pcpvt
from pcpvt.models.layers import Kernels
from pcpvt.readers.manifest import Columns
from pcpvt.readers.splits import Splits
from pcpvt.runtime.console import warn_once


class Session(NamedTuple):
    """What every mode starts from; immutable."""

    config: ConfigDict
    workdir: Path
    device: base.Device
    world: World
    policy: Policy
    size: tuple[int, int]  # height, width
    kernels: Kernels
    command: Command | None = None  # as given; None where the program was not started by a command line

    def preprocessing(self, precision: str) -> str:
        """What images are evaluated as, for the log; `precision` is what the model computes in."""
        return f"{self.size[0]}x{self.size[1]} px, crop {self.config.eval.crop:g}, {precision}"

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    @property
    def reading(self) -> Reading:
        """How images are read."""
        return reading(self.config)

    @property
    def task(self) -> tasks.Task:
        """How logits and labels are read."""
        return tasks.choose(self.config.task, self.config.predict.threshold)

    def compute(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters on the device in the compute dtype."""
        return precision.cast(pack(params).to(self.device.torch), self.policy, self.device.fp32_norms)

    def inference(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """`compute`, with weights packed once for repeated evaluation."""
        return self.kernels.prepack(self.compute(params))

    def predictor(self, model: pcpvt.PCPVT) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        """`(params, uint8 images [b, h, w, 3]) -> logits [b, classes]`, compiled as `config.compile` says."""
        predict = make_predict(model, policy=self.policy, kernels=self.kernels)
        return compiled(predict, self.device, self.config.compile, warn_once)

    def value_and_grad(self) -> Callable:
        """The gradient implementation for `functional.step.make_step`."""
        return value_and_grad(self.device, self.config.compile, warn_once)


def in_precision(session: Session, text: str) -> Session:
    """The session with the precision of another field, written as `config.precision`; UserError as of `start`."""
    if text == "auto":
        return session
    policy = precision.parse(text)
    session.device.check_precision(policy.compute)
    return session._replace(policy=policy, kernels=_choose_kernels(session.config, session.device, policy))


def start(config: ConfigDict, workdir: Path, command: Command | None = None) -> Session:
    """Join the process group, bind the device, and choose precision and kernels.

    Raises:
        UserError: when the device, the number of processes or the precision is not available here.
    """
    device = devices.get(config.device)
    world = collectives.join(device, config.timeout)
    policy = precision.parse(device.precision() if config.precision == "auto" else config.precision)
    device.check_precision(policy.compute)
    kernels = _choose_kernels(config, device, policy)
    return Session(config, workdir, device, world, policy, image_size(config), kernels, command)


def image_size(config: ConfigDict) -> tuple[int, int]:
    return config.image_size, config.image_width or config.image_size


def reading(config: ConfigDict) -> Reading:
    """How images are read, as a config says."""
    return Reading(config.model.in_chans, config.data.value_range and tuple(config.data.value_range))


def open_data(session: Session, split: str) -> sources.Dataset:
    """One split of the configured data set; warns of what was left out."""
    config = session.config
    name, splits, columns = _naming(config)
    dataset = sources.open_split(name, config.data.path, split, session.size, config.num_classes, splits, columns)
    return _arrange(config, _remark(dataset, split))


def open_training_data(session: Session) -> tuple[sources.Dataset, sources.Dataset]:
    """The training and the validation split, with the same classes; without evaluations the latter is empty."""
    config = session.config
    name, splits, columns = _naming(config)
    validates = parse_duration(config.eval_every) != (0.0, "steps")
    train, val = sources.open_training(
        name, config.data.path, session.size, config.num_classes, splits, columns, validates=validates
    )
    return _arrange(config, _remark(train, "train")), _arrange(config, _remark(val, "val"))


def _arrange(config: ConfigDict, dataset: sources.Dataset) -> sources.Dataset:
    """The dataset with its classes in the configured order, or as the configured map says."""
    return classes.arrange(dataset, config.data.class_order, config.data.class_map)


def _naming(config: ConfigDict) -> tuple[str, Splits, Columns]:
    """What the data, their splits and their columns are called."""
    data = config.data
    splits = Splits(data.train_split, data.val_split, data.val_fraction, config.seed)
    return data.name or "folder", splits, Columns(data.image_column, data.label_column, config.task == "multilabel")


def _remark(dataset: sources.Dataset, split: str) -> sources.Dataset:
    """The dataset, after warnings about files that were left out and classes without images."""
    for text in getattr(dataset, "remarks", []):
        _warn_once(text)
    if not dataset.in_memory and (missing := sources.absent(dataset)):  # random labels need not have all classes
        mean = "map is" if isinstance(dataset, LabelSets) else "metrics are"
        effect = f": {mean} over the others" if split == "val" else ""
        of = f"{sources.named(missing)} of {len(dataset.classes)}"
        _warn_once(f"config.data.path: {dataset.split} has no images of {of}{effect}")
    return dataset


_warn_once = functools.cache(warn_once)  # a mode may open a data set several times


def count_classes(config: ConfigDict, source: sources.Dataset) -> int:
    """`config.num_classes`, which must cover the data's classes, or their number if it is unset."""
    found = len(source.classes)
    if config.num_classes is None:
        return found
    if config.num_classes < found:
        raise UserError(f"config.num_classes: {config.num_classes} but the data have {found} classes: leave it unset")
    if config.task == "multilabel" and config.num_classes > found:
        raise UserError(
            f"config.num_classes: {config.num_classes} but the data have {found} classes, and an output without a "
            "class would learn to say no (config.task=multilabel): leave it unset"
        )
    return config.num_classes


def _choose_kernels(config: ConfigDict, device: base.Device, policy: Policy) -> Kernels:
    """The device's kernels for the compute dtype, or the plain ones, as `config.kernels` and `config.compile` say."""
    own = device.plain_kernels()
    if config.kernels != "plain":
        own = device.kernels(policy.compute, compiled=backend(device, config.compile) != "none")
    return compiled_blocks(own, device, config.compile, warn_once)


def build_model(config: ConfigDict, num_classes: int) -> pcpvt.PCPVT:
    return pcpvt.build(config.model.name, num_classes, config.model.pad, config.model.in_chans, config.task)


def workers(session: Session, dataset: sources.Dataset) -> int:
    """Loader processes of this process for its only loader."""
    configured = session.config.data.workers
    return configured if configured >= 0 else default_workers(dataset, base.cores_per_process())


def training_workers(session: Session, train: sources.Dataset, val: sources.Dataset) -> tuple[int, int]:
    """Loader processes of this process for training and for evaluation, which both stay until the run ends.

    `config.data.workers` is obeyed for training; for evaluation, at least one and at most so many as cores are left.
    """
    configured, cores = session.config.data.workers, base.cores_per_process()
    if configured < 0:
        return shared_workers(train, val, cores)
    return configured, min(configured, max(1, cores - configured))


def open_loader(session: Session, batches: Batches, indices: Sequence[int], processes: int | None = None) -> Loader:
    """A loader of the batches with these indices, by `processes` loader processes (default: see `workers`)."""
    if processes is None:
        processes = workers(session, batches.dataset)
    device = session.device
    say = functools.partial(warn_once, about="value_range") if session.world.is_main else lambda _: None
    return Loader(batches, indices, processes, start=device.worker_start, pin=device.pins_memory, warn=say)
