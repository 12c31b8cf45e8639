"""What the process that forks loader processes imports, once for all of them (see `workers`)."""

from pcpvt.data import loader, workers

__all__ = ["loader"]

workers.end_on_errors()
