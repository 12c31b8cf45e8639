"""What one call of the program asks for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict


class Run(NamedTuple):
    config: ConfigDict
    workdir: Path
    mode: str
