"""What a person sees while the program runs: lines that stay, and one live line on a terminal, by the main process.

Warnings are never swallowed: they come from whichever process met them, on standard error, and a live line makes way.
"""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from collections import deque
from typing import TextIO

from pcpvt.distributed import collectives
from pcpvt.errors import printable, put

_ERASE = "\r\x1b[K"
_REFRESH = 0.2  # seconds between two states of the live line: more often only costs
_BAR = 16  # characters


class Console:
    """`say` prints a line that stays; `live` shows one that the next overwrites (on a terminal only).

    Args:
        speaks: False in all processes but the main one; `warn` speaks everywhere.
        stream: standard output by default; a mode whose results go there says the rest on standard error.
    """

    def __init__(self, speaks: bool = True, stream: TextIO | None = None):
        self.speaks = speaks
        self.stream = stream or sys.stdout
        self.is_terminal = self.stream.isatty()
        self._shown = ""
        self._refreshed = 0.0

    def say(self, text: str) -> None:
        if self.speaks:
            self._clear()
            put(f"{text}\n", self.stream)

    def warn(self, text: str) -> None:
        """A warning, on standard error, from whichever process met it."""
        self._clear()
        # Another process may have a live line on this very terminal.
        erase = _ERASE if sys.stderr.isatty() else ""
        put(f"{erase}pcpvt: warning: {printable(text)}\n", sys.stderr)

    def live(self, text: str) -> None:
        """Replaces the live line, cut to the terminal's width; refreshed a few times a second at most."""
        now = time.monotonic()
        if self.speaks and self.is_terminal and (now - self._refreshed >= _REFRESH or not self._shown):
            warnings.showwarning = self._show_warning  # Python's own would be written into the live line
            width = shutil.get_terminal_size().columns - 1
            self._shown, self._refreshed = text[:width], now
            put(f"{_ERASE}{self._shown}", self.stream)

    def _clear(self) -> None:
        if self._shown:
            put(_ERASE, self.stream)
            self._shown = ""

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        self.warn(f"{category.__name__}: {message} ({filename}:{lineno})")


def warn_once(text: str) -> None:
    """A warning that several processes may meet, on standard error, by the first of them."""
    if collectives.first_to_say(text):
        Console().warn(text)


def duration(seconds: float) -> str:
    """`75` to `1m15s`, `7265` to `2h01m`, `200000` to `2d07h`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


class Rate:
    """Images per second and the share of time spent waiting for data, over a sliding window of recent steps.

    Durations are given, not measured here, so that evaluations and checkpoints between two steps do not count. The
    first step is left out: it may compile.

    Args:
        window: seconds of steps that are looked back at; at least two steps are.
    """

    def __init__(self, window: float = 30.0):
        self.window = window
        self._steps: deque[tuple[int, float, float]] = deque()
        self._images, self._seconds, self._waited = 0, 0.0, 0.0
        self._started = False

    def add(self, images: int, seconds: float, waited: float = 0.0) -> None:
        """One step: its images over all processes, its seconds, and how many of those were spent waiting for data."""
        if not self._started:
            self._started = True
            return
        self._steps.append((images, seconds, waited))
        self._images, self._seconds, self._waited = (
            self._images + images,
            self._seconds + seconds,
            self._waited + waited,
        )
        while len(self._steps) > 2 and self._seconds - self._steps[0][1] >= self.window:
            images, seconds, waited = self._steps.popleft()
            self._images, self._seconds, self._waited = (
                self._images - images,
                self._seconds - seconds,
                self._waited - waited,
            )

    @property
    def images_per_sec(self) -> float:
        return self._images / self._seconds if self._images and self._seconds > 0 else 0.0

    @property
    def waiting(self) -> float:
        """Between 0 and 1."""
        return min(1.0, max(0.0, self._waited / self._seconds)) if self._seconds > 0 else 0.0


class Progress:
    """Where a run stands, in one line: live at every step on a terminal, plain at every record elsewhere."""

    def __init__(self, console: Console, *, steps: int, epochs: float, batch: int):
        self.console, self.steps, self.epochs, self.batch = console, steps, epochs, batch
        self.rate = Rate()
        self._latest: dict[str, float] = {}

    def tick(self, step: int, seconds: float, waited: float) -> None:
        """After every step; `step` counts those done."""
        self.rate.add(self.batch, seconds, waited)
        if self.console.is_terminal:
            self.console.live(self.line({**self._latest, "step": step}, bar=True))

    def record(self, entry: dict[str, float]) -> None:
        """At every record: `step`, `loss`, `lr`, and `mfu` where it is known."""
        self._latest = dict(entry)
        if not self.console.is_terminal:
            self.console.say(self.line(entry))

    def line(self, entry: dict[str, float], *, bar: bool = False) -> str:
        """What matters most comes first, because a narrow terminal cuts the end; loss and lr may be missing."""
        step, rate = int(entry["step"]), self.rate.images_per_sec
        parts = [f"epoch {step * self.epochs / self.steps:.2f}/{self.epochs:.4g}"]
        if bar:
            done = round(_BAR * step / self.steps)
            parts.append(f"[{'#' * done}{'.' * (_BAR - done)}]")
        parts.append(f"step {step}/{self.steps}")
        if "loss" in entry:
            parts += [f"loss {entry['loss']:.4f}", f"lr {entry['lr']:.2e}"]
        if rate:
            parts.append(f"{rate:.0f} images/s" if rate >= 10 else f"{rate:.2f} images/s")
            parts.append(f"{duration((self.steps - step) * self.batch / rate)} left")
            if entry.get("mfu"):
                parts.append(f"MFU {100 * entry['mfu']:.1f} %")
            if not entry.get("mfu") or self.rate.waiting >= 0.05:
                parts.append(f"waiting for data {100 * self.rate.waiting:.0f} %")
        return "  ".join(parts)
