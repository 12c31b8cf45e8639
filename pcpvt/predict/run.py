"""`--mode=predict`: the most probable classes of image files, in a file or alone on standard output."""

import csv
import glob
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from ml_collections import ConfigDict
from torch import Tensor

from pcpvt.checkpoints.atomic import write_atomically
from pcpvt.checkpoints.load import class_names
from pcpvt.config.plan import eval_batch
from pcpvt.data import augment
from pcpvt.data.decode import DecodeError, Picture, Reading
from pcpvt.data.loader import EvalBatches
from pcpvt.data.sources import Files
from pcpvt.errors import UserError, silence
from pcpvt.predict import attribution, sorting
from pcpvt.readers.files import image_files, left_out_text
from pcpvt.readers.listing import unlabelled
from pcpvt.runners.runner import Runner, open_configured
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console, duration
from pcpvt.runtime.session import Session

FEW = 64  # up to this many images, starting loader processes takes longer than reading

Ranked = list[tuple[str, int, float]]  # (class, index, probability), the most probable first


def find(pattern: str, note: Callable[[str], None] = lambda text: None) -> list[str]:
    """The sorted files of `config.predict.images`, a file, a folder of images or a pattern; UserError if none.

    Args:
        note: called with what was left out of a folder.
    """
    if not pattern:
        raise UserError("config.predict.images: not set: give a file, a folder or a pattern like 'photos/*.jpg'")
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        paths, left_out = image_files(pattern)
        if left_out:
            note(f"{pattern}: left out {left_out_text(left_out)}")
    elif os.path.exists(pattern):  # before patterns: a file name may contain brackets
        paths = [pattern]
    else:
        # `**` follows links again and again: of several paths of a file, the shortest is kept.
        matches = sorted(glob.glob(pattern, recursive=True), key=lambda path: (path.count(os.sep), path), reverse=True)
        paths = list({os.path.realpath(path): path for path in matches if os.path.isfile(path)}.values())
    if not paths:
        raise UserError(f"config.predict.images: {pattern}: no images found: give a file, a folder or a pattern")
    return sorted(paths)


def run(session: Session) -> int:
    """Classifies the files, and warns of unreadable ones; returns the exit code. UserError when none can be read."""
    config = session.config
    if not session.world.is_main:  # under torchrun, one process does everything
        return 0
    console = Console(stream=sys.stderr)
    began = time.perf_counter()
    paths = find(config.predict.images, lambda text: console.say(f"note: {text}"))
    runner = open_configured(session)
    if config.predict.explain and runner.loaded is None:
        raise UserError(
            f"config.predict.explain: {runner.path} is an exported graph: give the checkpoint that it was exported from"
        )
    for note in runner.notes:
        console.say(f"note: {note}")
    console.say(f"files: {len(paths)}; weights: {runner.name}; {session.preprocessing(runner.precision)}")
    classes, readable = class_names(runner), 0
    sorted_into = sorting.open_folder(config.predict.sort_into) if config.predict.sort_into else None
    folders, names = sorting.folder_names(classes), dict(zip(paths, unique_names(paths), strict=True))
    header, write_image = FORMATS[config.predict.format]

    def write(out: TextIO) -> None:
        nonlocal readable
        out.write(header)
        for path, probabilities in classify(session, runner, paths, console):
            ranked = choose(probabilities, classes, config)
            write_image(out, path, ranked)
            if sorted_into is not None:
                sorting.copy(path, sorted_into / folders[ranked[0][1]], names[path])
            readable += 1
        out.flush()
        if not readable:  # raised here so that no file is written
            raise UserError(
                f"config.predict.images: none of the {len(paths)} files can be read: see the warnings above"
            )

    try:
        write_output(os.path.expanduser(config.predict.output), write)
    except BrokenPipeError:
        silence(sys.stdout)
        console.say("the reader closed the output; the rest was not written")
        return 0
    skipped = f", {len(paths) - readable} unreadable and skipped" if readable < len(paths) else ""
    where = f"; written to {config.predict.output}" if config.predict.output else ""
    console.say(f"{readable} images{skipped} in {duration(time.perf_counter() - began)}{where}")
    if sorted_into is not None:
        console.say(f"copied by predicted class into {sorted_into}")
    if config.predict.explain:
        console.say(f"heat maps in {session.workdir / 'explain'}")
    return 0


def classify(session: Session, runner: Runner, paths: list[str], console: Console) -> Iterator[tuple[str, Tensor]]:
    """The readable paths and their probabilities `[classes]` on the host; also draws the heat maps, if asked to."""
    config, device = session.config, session.device
    size = min(eval_batch(config), len(paths))
    files = Files(unlabelled(paths), "", "")
    batches = EvalBatches(files, session.size, config.eval.crop, size, 0, 1, "skip", session.reading)
    loader = sessions.open_loader(session, batches, range(len(batches)), None if len(paths) > FEW else 0)
    exact = {name: value.to(device.torch) for name, value in runner.loaded.params.items()} if runner.loaded else {}
    names, folder = unique_names(paths), session.workdir / "explain"
    for batch in device.prefetch(loader):
        valid = batch["valid"]
        probabilities = session.task.probabilities(runner.predict(batch["image"]))[valid]
        ids, readable = batch["id"].cpu(), valid.cpu()
        for index in ids[(ids >= 0) & ~readable].tolist():
            console.warn(_reason(paths[index], session.size, session.reading))
        indices = ids[readable].tolist()
        if config.predict.explain and indices and runner.loaded:
            named, labels = [names[i] for i in indices], probabilities.argmax(-1)
            attribution.write(folder, named, runner.loaded.model, exact, batch["image"][valid], labels)
        yield from zip([paths[i] for i in indices], probabilities.cpu(), strict=True)


def unique_names(paths: list[str]) -> list[str]:
    """File names of the heat maps: paths below their common folder, `x/1.png` as `x__1.png`, numbered on collision."""
    common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names: dict[str, None] = {}  # in order
    for path in paths:
        base = name = os.path.relpath(os.path.abspath(path), common).replace(os.sep, "__")
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names[name] = None
    return list(names)


def _reason(path: str, size: tuple[int, int], reading: Reading) -> str:
    """Why a file was skipped: a loader process reports only that it was, so the file is read again."""
    try:
        augment.eval_sample(Picture(path, reading=reading), size, 1.0)
    except DecodeError as error:
        return str(error)
    return f"{path}: could not be read a moment ago"


def best(probabilities: Tensor, classes: list[str], top: int = 5) -> Ranked:
    """The `top` most probable of `[classes]`; all of them when there are fewer."""
    values, indices = probabilities.float().sort(descending=True, stable=True)  # of equal ones, lower index first
    return [(classes[i], i, p) for i, p in zip(indices[:top].tolist(), values[:top].tolist(), strict=True)]


def choose(probabilities: Tensor, classes: list[str], config: ConfigDict) -> Ranked:
    """What is listed of `[classes]`: the `config.predict.top` best, or of several labels all from the threshold on."""
    if config.task == "multilabel":
        # Counted in the dtype of the probabilities, as an evaluation does.
        return best(probabilities, classes, int((probabilities >= config.predict.threshold).sum()))
    return best(probabilities, classes, config.predict.top)


def write_table(out: TextIO, path: str, ranked: Ranked) -> None:
    """The path on one line, and below it a line per class, or one that says that there is none."""
    out.write(f"{path}\n")
    if not ranked:
        out.write("  no class\n")
    out.writelines(f"  {100 * probability:7.3f} %  {name}\n" for name, _, probability in ranked)


def write_json_line(out: TextIO, path: str, ranked: Ranked) -> None:
    """`{"image": path, "predictions": [{"class": name, "index": i, "probability": p}, ...]}`."""
    predictions = [{"class": name, "index": i, "probability": round(p, 6)} for name, i, p in ranked]
    out.write(json.dumps({"image": path, "predictions": predictions}) + "\n")


def write_csv(out: TextIO, path: str, ranked: Ranked) -> None:
    """A line per class; of an image without one, a line with the path alone."""
    rows = [(path, rank, name, i, f"{p:.6f}") for rank, (name, i, p) in enumerate(ranked, 1)]
    csv.writer(out, lineterminator="\n").writerows(rows or [(path, "", "", "", "")])


FORMATS: dict[str, tuple[str, Callable[[TextIO, str, Ranked], None]]] = {  # to the header, and what writes an image
    "table": ("", write_table),
    "jsonl": ("", write_json_line),
    "csv": ("image,rank,class,index,probability\n", write_csv),
}


def write_output(path: str, write: Callable[[TextIO], object]) -> None:
    """Calls `write` with standard output (empty path) or a file that appears whole or not at all; or UserError."""

    def write_file(file: str | Path) -> None:
        with open(file, "w", encoding="utf-8", errors="backslashreplace", newline="") as out:
            write(out)

    try:
        if not path:
            write(sys.stdout)
        elif os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device must not be replaced by a file
            write_file(path)
        else:
            write_atomically(Path(path), write_file)
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        raise
    except OSError as error:
        if not path:
            silence(sys.stdout)
        raise UserError(
            f"config.predict.output: {path or 'standard output'}: cannot be written ({error.strerror or error}): "
            "name a file in a folder that exists and has space"
        ) from None
