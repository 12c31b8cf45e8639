"""What a person sees while the program runs: plain lines, one live line on a terminal; only the main process speaks."""

from __future__ import annotations

import sys
import time


class Console:
    """`say` prints a line that stays; `live` shows one that the next overwrites (on a terminal only)."""

    def __init__(self, speaks: bool = True):
        self.speaks = speaks
        self.is_terminal = sys.stdout.isatty()
        self._live = False

    def say(self, text: str) -> None:
        if self.speaks:
            self._clear()
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """A warning, on standard error, from whichever process met it."""
        self._clear()
        print(f"pcpvt: warning: {text}", file=sys.stderr, flush=True)

    def live(self, text: str) -> None:
        if self.speaks and self.is_terminal:
            print(f"\r\x1b[K{text}", end="", flush=True)
            self._live = True

    def _clear(self) -> None:
        if self._live:
            print("\r\x1b[K", end="", flush=True)
            self._live = False


def duration(seconds: float) -> str:
    """`75` to `1m15s`, `7265` to `2h01m`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Rate:
    """Images per second and time left over a sliding mean, without the first step (which may compile)."""

    def __init__(self) -> None:
        self.start: float | None = None
        self.steps = 0

    def tick(self) -> None:
        if self.start is None:
            self.start = time.perf_counter()
        else:
            self.steps += 1

    def per_second(self) -> float:
        if not self.steps or self.start is None:
            return 0.0
        return self.steps / (time.perf_counter() - self.start)
