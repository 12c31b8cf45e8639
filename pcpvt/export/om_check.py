#!/usr/bin/env python3
"""Checks a model converted for Ascend by its raw outputs; this file needs Python and numpy only.

    python check.py prepare validation inputs              float32 NCHW inputs, normalised, for a model without AIPP
    python check.py prepare validation inputs --uint8      uint8 NCHW inputs, for a model with AIPP that takes planes
    python check.py outputs RESULTS                        compares raw outputs with the labels and with the original

RESULTS is the folder with one raw output for each image of validation/ (`00000_0.bin`, `00000_output_0.bin`,
`00000.npy`, ...; float32 or float16 logits). Exits with 1 when the converted model loses more than --max-drop points of
top-1 accuracy, or predicts the original model's class for less than --min-agreement percent of the images.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def prepare(source: Path, target: Path, description: dict, planes: bool) -> int:
    """Writes the inputs of a folder, uint8 `[h, w, channels]`, in the form for other models; returns their number."""
    shape = (*description["image_size"], description["in_chans"])
    mean, std = (np.array(description[name], np.float32) for name in ("mean", "std"))
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(source.glob("*.bin"))
    for file in files:
        pixels = np.fromfile(file, np.uint8).reshape(shape)
        values = pixels if planes else (pixels.astype(np.float32) / 255 - mean) / std
        np.ascontiguousarray(values.transpose(2, 0, 1)).tofile(target / file.name)
    return len(files)


def read_output(file: Path, classes: int) -> np.ndarray:
    """Logits `[classes]` of one image."""
    if file.suffix == ".npy":
        values = np.load(file, allow_pickle=False).reshape(-1)
    else:
        size = file.stat().st_size
        kinds = {4 * classes: np.float32, 2 * classes: np.float16}
        if size not in kinds:
            raise SystemExit(f"{file}: {size} bytes: the logits of one image of {classes} classes have {4 * classes}")
        values = np.fromfile(file, kinds[size])
    if values.size != classes:
        raise SystemExit(f"{file}: {values.size} values: one image has {classes}, one for each class")
    return values.astype(np.float32)


def find_output(folder: Path, stem: str) -> Path:
    """The output of the input `stem`.bin."""
    pattern = re.compile(rf"{re.escape(stem)}(_output)?(_0)?\.(bin|npy)")
    found = [file for file in folder.iterdir() if pattern.fullmatch(file.name)]
    if len(found) != 1:
        raise SystemExit(f"{folder}: {len(found) or 'no'} outputs of {stem}.bin: it needs one such as {stem}_0.bin")
    return found[0]


def compare(logits: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> dict:
    """Accuracy of both, their agreement in percent, and the largest difference relative to the largest logit."""

    def accuracy(values: np.ndarray, top: int) -> float:
        ranks = np.argsort(-values, axis=1, kind="stable")[:, :top]
        return float(100 * (ranks == labels[:, None]).any(1).mean())

    difference = np.abs(logits - reference).max() / max(1.0, float(np.abs(reference).max()))
    return {
        "images": len(labels),
        "acc1": accuracy(logits, 1), "acc1 of the original": accuracy(reference, 1),
        "acc5": accuracy(logits, 5), "acc5 of the original": accuracy(reference, 5),
        "agreement": float(100 * (logits.argmax(1) == reference.argmax(1)).mean()),
        "relative difference": float(difference),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare")
    command.add_argument("source", type=Path)
    command.add_argument("target", type=Path)
    command.add_argument("--uint8", action="store_true")
    command = commands.add_parser("outputs")
    command.add_argument("results", type=Path)
    command.add_argument("--max-drop", type=float, default=0.5, help="points of top-1 accuracy")
    command.add_argument("--min-agreement", type=float, default=99.0, help="percent of the images")
    given = parser.parse_args()
    description = json.loads((HERE / "description.json").read_text(encoding="utf-8"))
    if given.command == "prepare":
        print(f"{prepare(given.source, given.target, description, given.uint8)} inputs written to {given.target}")
        return 0
    lines = (HERE / "validation.txt").read_text(encoding="utf-8").split("\n")[:-1]
    if not lines:
        raise SystemExit(f"{HERE / 'validation'}: holds no images: export with config.export.calibration=N")
    names, labels = ([line.split("\t")[column] for line in lines] for column in (0, 1))
    reference = np.load(HERE / "reference.npy", allow_pickle=False)
    files = [find_output(given.results, Path(name).stem) for name in names]
    logits = np.stack([read_output(file, reference.shape[1]) for file in files])
    found = compare(logits, reference, np.array(labels, np.int64))
    if not np.isfinite(logits).all():
        print("the outputs hold numbers that are not finite")
        return 1
    print("\n".join(f"{name}: {value:.6g}" for name, value in found.items()))
    lost = found["acc1 of the original"] - found["acc1"]
    if lost > given.max_drop or found["agreement"] < given.min_agreement:
        print(f"not good enough: at most {given.max_drop:g} points lost, at least {given.min_agreement:g} % agreement")
        return 1
    print("good enough")
    return 0


if __name__ == "__main__":
    sys.exit(main())
