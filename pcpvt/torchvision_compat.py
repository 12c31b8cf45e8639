"""Makes a torchvision built for CUDA importable beside a CPU build of torch; import it before torchvision or timm.

The x86 torchvision wheel is linked against CUDA. Beside a CPU build of torch (Ascend hosts, CPU machines) its C++
library does not load, its operators have no schema, and `import torchvision` stops with "operator torchvision::nms does
not exist" (pytorch/vision issues 9077 and 9085). Its Python code works once the two schemas it annotates exist, so they
are declared here. Detection operators stay unavailable. Where torchvision's library loads, nothing is declared.
"""

import importlib.util
import pathlib

import torch


def _library_loads() -> bool:
    """Whether torchvision's C++ library fits this torch; loading it twice is harmless."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # not installed: importing it will say so
    libraries = list(pathlib.Path(spec.origin).parent.glob("_C*.so"))
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return bool(libraries)


if not hasattr(torch.ops.torchvision, "nms") and not _library_loads():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
