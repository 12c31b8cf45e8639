"""Terminal output: permanent lines and one live line from the main process, warnings from every process.

Warnings go to standard error from the process that meets them; a live line is erased first.
"""

import shutil
import sys
import time
import warnings
from typing import TextIO

from pcpvt.distributed import collectives
from pcpvt.errors import log, printable, put

_ERASE = "\r\x1b[K"
_REFRESH = 0.2  # seconds between updates of the live line


class Console:
    """`say` prints a permanent line; `live` shows a line that the next output overwrites (on a terminal only).

    Args:
        speaks: False in all processes but the main one, whose lines go to their logs; `warn` prints in all.
        stream: standard output by default; predict, whose results go there, uses standard error.
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
        else:
            log(f"{text}\n")

    def warn(self, text: str) -> None:
        """Print a warning on standard error."""
        self._clear()
        # Another process may have a live line on the same terminal.
        erase = _ERASE if sys.stderr.isatty() else ""
        put(f"{erase}pcpvt: warning: {printable(text)}\n", sys.stderr)

    def live(self, text: str) -> None:
        """Replace the live line, cut to the terminal's width; at most a few times a second."""
        now = time.monotonic()
        if self.speaks and self.is_terminal and (now - self._refreshed >= _REFRESH or not self._shown):
            warnings.showwarning = self._show_warning  # Python would print into the live line
            width = shutil.get_terminal_size().columns - 1
            self._shown, self._refreshed = text[:width], now
            put(f"{_ERASE}{self._shown}", self.stream)

    def _clear(self) -> None:
        if self._shown:
            put(_ERASE, self.stream)
            self._shown = ""

    def _show_warning(
        self, message: object, category: type, filename: str, lineno: int, *_: object, **__: object
    ) -> None:
        self.warn(f"{category.__name__}: {message} ({filename}:{lineno})")


def warn_once(text: str) -> None:
    """Print a warning that several processes may meet: only the first of them prints it."""
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
