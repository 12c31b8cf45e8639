"""`config.task`: what other fields mean with one label per image or several, and which do not go with it."""

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from ml_collections import ConfigDict

from pcpvt.config.fields import FIELDS
from pcpvt.errors import UserError

_WITH_SEVERAL = "config.task=multilabel"


def settle(config: ConfigDict, overrides: Mapping[str, Any], known: str, where: str, mode: str) -> list[str]:
    """Sets what follows from the task; notes for the log.

    Args:
        known: the task that the weights were trained for; empty where it is not known, or may be another one.
        where: the file of the weights.

    Raises:
        UserError: when the command line gives the weights another task.
    """
    if known and overrides.get("task", known) != known:
        raise UserError(f"config.task: {overrides['task']!r} but {where} was trained with {known!r}: leave it out")
    if config.task == "multilabel" and config.best == FIELDS["best"].default and "best" not in overrides:
        config.best = "map"
        return [f"config.best: map, because {_WITH_SEVERAL}"] if mode == "train" else []
    return []


def check(config: ConfigDict) -> None:
    """Raises UserError for the first field that does not go with the task."""
    if config.task == "classes":
        if config.best == "map":
            raise UserError(f"config.best: 'map' needs several labels per image: set {_WITH_SEVERAL}, or use acc1")
        if config.predict.threshold != FIELDS["predict.threshold"].default:
            raise UserError(
                f"config.predict.threshold: {config.predict.threshold:g} needs several labels per image: set "
                f"{_WITH_SEVERAL}, or leave it out (config.predict.top sets the number of classes)"
            )
        return
    if config.best in ("acc1", "balanced_acc"):
        raise UserError(f"config.best: {config.best!r} needs one label per image and {_WITH_SEVERAL}: use map or loss")
    # By what of each field does not go with it, and what to do.
    refused: dict[str, tuple[Callable[[Any], bool], str]] = {
        "class_weights": (_is_balanced, "it weighs images by their one label: give a file of weights, or none"),
        "data.sampler": (_is_balanced, "it draws images by their one label: use uniform"),
        "predict.sort_into": (bool, "an image has no one folder: leave it out, and use config.predict.format=csv"),
        "predict.top": (
            lambda top: top != FIELDS["predict.top"].default,
            "every class over config.predict.threshold is listed: leave it out",
        ),
        "bench.against": (
            trains_timm,
            "timm's training has one label per image: use onnx, openvino or an exported file",
        ),
    }
    for name, (unfit, remedy) in refused.items():
        given = attrgetter(name)(config)
        if unfit(given):
            raise UserError(f"config.{name}: {given!r} does not go with {_WITH_SEVERAL}: {remedy}")


def trains_timm(peers: str) -> bool:
    """Whether one of the peers of a bench (`config.bench.against`) trains timm's model; the others are graphs."""
    return bool({"timm", "timm-compiled"} & set(peers.split(",")))


def _is_balanced(value: str) -> bool:
    return value == "balanced"
