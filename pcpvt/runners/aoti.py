"""Packages of AOTInductor: a model compiled for one kind of processor and one build of PyTorch, run on the host."""

import json
import platform
import zipfile
from pathlib import Path
from typing import Any

import torch

from pcpvt.runners.graph import Graph, Network, NoClassifier

DESCRIPTION = "description"  # key of the package's metadata


def is_package(path: Path) -> bool:
    """Whether a `.pt2` file is such a package; it may be an archive of torch.export instead, or damaged."""
    return zipfile.is_zipfile(path) and bool(_members(path))


def read(path: Path) -> Graph:
    """Raises NoClassifier, also where the code cannot run here, or KeyError for a package of another program."""
    with zipfile.ZipFile(path) as archive:
        metadata = [json.loads(archive.read(name)) for name in _members(path) if name.endswith("_metadata.json")]
    text = next((found[DESCRIPTION] for found in metadata if DESCRIPTION in found), None)
    if text is None:
        raise NoClassifier("is code that another program has compiled, which does not say what it takes")
    said = json.loads(text)
    _check(said["compiled"])
    channels, size = said["in_chans"], said["image_size"]
    height, width = size
    images = (None, height, width, channels) if said["preprocess"] else (None, channels, height, width)

    def start(precision: torch.dtype) -> tuple[Network, str]:
        module = torch._inductor.aoti_load_package(str(path))

        def network(batch: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return module(batch)

        return network, f"AOTInductor, PyTorch {torch.__version__}, {said['precision']}"

    return Graph(text, images, said["outputs"], start)


def host() -> dict[str, Any]:
    """What compiled code depends on, as JSON: PyTorch, whose packed weights it holds, and the processor."""
    found = torch.cpu.get_capabilities()
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "instructions": sorted(name for name, has in found.items() if has is True),
    }


def _check(compiled: dict[str, Any]) -> None:
    """Raises NoClassifier where code that was compiled on such a host cannot run."""
    here = host()
    if compiled["torch"] != here["torch"]:
        raise NoClassifier(f"was compiled by PyTorch {compiled['torch']} and this is {here['torch']}")
    lacks = set(compiled["instructions"]) - set(here["instructions"])
    if compiled["machine"] != here["machine"] or lacks:
        raise NoClassifier(
            f"was compiled for another processor: {compiled['machine']} with {', '.join(sorted(lacks)) or 'others'}"
        )


def _members(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return [name for name in archive.namelist() if "/data/aotinductor/" in f"/{name}"]
