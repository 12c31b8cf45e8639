"""Twins-PCPVT image classifiers: `python -m pcpvt.main` trains and uses them, `pcpvt.api` is for notebooks.

Importing the package imports no other module; `pcpvt.api`, which needs torch, is imported on first use.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "api":
        return importlib.import_module("pcpvt.api")
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("pcpvt")
        except metadata.PackageNotFoundError:
            return "unknown (pcpvt is not installed: pip install -e .)"
    raise AttributeError(f"module 'pcpvt' has no attribute {name!r}")
