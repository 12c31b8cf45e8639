"""`--mode=predict`: files to their most probable classes, in a file or on standard output, which gets nothing else."""

from __future__ import annotations

import contextlib
import glob
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from pcpvt.checkpoints.atomic import write_atomically
from pcpvt.checkpoints.load import LoadedModel, class_names, load_configured
from pcpvt.config.plan import eval_batch
from pcpvt.data import augment
from pcpvt.data.decode import DecodeError
from pcpvt.data.loader import EvalBatches, Loader
from pcpvt.data.sources import EXTENSIONS
from pcpvt.errors import UserError, silence
from pcpvt.predict import attribution
from pcpvt.predict import output as predict_output
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console, duration
from pcpvt.runtime.session import Session

TOP = 5
FEW = 64  # images up to which starting loader processes takes longer than reading


class Files:
    """Image files as a `data.sources.Dataset` without labels."""

    in_memory = False

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.classes: list[str] = []

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.paths[index], 0

    def name(self, index: int) -> str:
        return self.paths[index]


def find(pattern: str) -> list[str]:
    """The files that `config.predict.images` names: one file, all images below a folder, or a pattern with `*`; sorted.

    Raises:
        UserError: when there are none.
    """
    if not pattern:
        raise UserError("config.predict.images: not set: give a file, a folder or a pattern like 'photos/*.jpg'")
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        inside = (os.path.join(folder, f) for folder, _, files in os.walk(pattern, followlinks=True) for f in files)
        found = [path for path in inside if os.path.splitext(path)[1].lower() in EXTENSIONS]
    elif os.path.exists(pattern):  # before patterns: a name may hold brackets
        found = [pattern]
    else:
        found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if not found:
        raise UserError(f"config.predict.images: {pattern}: no images found: give a file, a folder or a pattern")
    return sorted(found)


def run(session: Session) -> int:
    """Classifies the files; unreadable ones are named and skipped.

    Raises:
        UserError: when no file can be read.
    """
    config = session.config
    if not session.world.is_main:  # started by torchrun: one process does it all
        return 0
    console = Console(stream=sys.stderr)
    began = time.perf_counter()
    source = Files(find(config.predict.images))
    picked = load_configured(config, session.workdir)
    for note in picked.notes:
        console.say(f"note: {note}")
    console.say(f"files: {len(source)}; weights: {picked.path} ({picked.which})")

    def write(out: TextIO) -> int:
        table = predict_output.FORMATS[config.predict.format](out, class_names(picked), TOP)
        read = 0
        for paths, probabilities in classify(session, picked, source, console):
            for path, row in zip(paths, probabilities, strict=True):
                table(path, row)
            read += len(paths)
        out.flush()
        return read

    try:
        read = _written(os.path.expanduser(config.predict.output), write)
    except BrokenPipeError:
        silence(sys.stdout)
        console.say("the reader closed the output; the rest was not written")
        return 0
    if not read:
        raise UserError(f"config.predict.images: none of the {len(source)} files can be read: see the warnings above")
    skipped = f", {len(source) - read} unreadable and skipped" if read < len(source) else ""
    where = f"; written to {config.predict.output}" if config.predict.output else ""
    console.say(f"{read} images{skipped} in {duration(time.perf_counter() - began)}{where}")
    if config.predict.explain:
        console.say(f"heat maps in {session.workdir / 'explain'}")
    return 0


def classify(
    session: Session, picked: LoadedModel, source: Files, console: Console
) -> Iterator[tuple[list[str], Tensor]]:
    """Batch by batch, the paths that could be read and their probabilities `[b, classes]`; heat maps on the way."""
    config = session.config
    batches = EvalBatches(
        source, session.size, config.eval.crop, min(eval_batch(config), len(source)), 0, 1, on_error="skip"
    )
    loader = Loader(
        batches,
        range(len(batches)),
        sessions.workers(session, source) if len(source) > FEW else 0,
        start=session.device.worker_start,
        pin=session.device.pins_memory,
    )
    predict = session.predictor(picked.model)
    weights = session.inference(picked.params)
    exact = {name: value.to(session.device.torch) for name, value in picked.params.items()}
    names = unique_names(source.paths)
    for batch in session.device.prefetch(loader):
        probabilities = predict(weights, batch["image"]).softmax(-1)
        ids, valid = batch["id"].cpu(), batch["valid"].cpu()
        for index in ids[(ids >= 0) & ~valid].tolist():
            console.warn(_reason(source.paths[index], session.size))
        good = ids[valid].tolist()
        if config.predict.explain and good:
            rows = batch["valid"]
            called = [names[i] for i in good]
            _explain(session, called, picked.model, exact, batch["image"][rows], probabilities[rows].argmax(-1))
        yield [source.paths[i] for i in good], probabilities[batch["valid"]].cpu()


def _explain(session: Session, *args: Any) -> None:
    folder = session.workdir / "explain"
    try:
        attribution.write(folder, *args)
    except OSError as error:
        raise UserError(
            f"--workdir: {folder}: heat maps cannot be written ({error.strerror or error}): free space, choose another "
            "--workdir, or leave out config.predict.explain"
        ) from None


def unique_names(paths: list[str]) -> list[str]:
    """File names for heat maps: the paths below their common folder in one word, numbered where they collide."""
    common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names, used = [], set()
    for path in paths:
        base = os.path.relpath(os.path.abspath(path), common).replace(os.sep, "__")
        name, number = base, 1
        while name in used:
            number += 1
            name = f"{base}-{number}"
        used.add(name)
        names.append(name)
    return names


def _reason(path: str, size: tuple[int, int]) -> str:
    """Why a file was skipped: a loader process tells only that it was."""
    try:
        augment.eval_sample(path, size, 1.0)
    except DecodeError as error:
        return str(error)
    return f"{path}: could not be read a moment ago"


def _written(path: str, write: Callable[[TextIO], int]) -> int:
    """Calls `write` with standard output, or with a file.

    Raises:
        UserError: when it cannot be written.
        BrokenPipeError: when the reader of the output, `head` for one, has seen enough.
    """
    try:
        if not path:
            return write(sys.stdout)
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device is written to, never replaced
            with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
                return write(file)
        return _whole(Path(path), write)
    except BrokenPipeError:
        raise
    except OSError as error:
        if not path:
            silence(sys.stdout)
        raise UserError(
            f"config.predict.output: {path or 'standard output'}: cannot be written ({error.strerror or error}): "
            "name a file in a folder that exists and has space"
        ) from None


def _whole(path: Path, write: Callable[[TextIO], int]) -> int:
    """Calls `write` with a file that appears whole or not at all, and not without content."""
    counted = []

    def into(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            counted.append(write(file))
        if not counted[0]:
            raise _Nothing

    with contextlib.suppress(_Nothing):
        write_atomically(path, into)
    return counted[0]


class _Nothing(Exception):
    """No image could be read: no file is written."""
