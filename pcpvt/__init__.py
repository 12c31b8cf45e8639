"""Twins-PCPVT image classifiers: `python -m pcpvt.main` trains and uses them, `pcpvt.api` is for notebooks.

Importing the package imports no other module; `pcpvt.api`, which needs torch, is imported on first use.
"""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name == "api":
        return importlib.import_module("pcpvt.api")
    raise AttributeError(f"module 'pcpvt' has no attribute {name!r}")
