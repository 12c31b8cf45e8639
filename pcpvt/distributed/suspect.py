"""What a launcher does about a device that an audit has found to compute wrongly (`config.audit_action=restart`).

The ranks tell the launcher of their host what was found through a file, the same from all. Each launcher then takes the
same decision from it: the one on the suspect's host leaves the run, and the others go on as after the loss of a host
(`config.elastic`). docs/audit.md says when that cannot be, and what happens instead.
"""

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import NamedTuple

from pcpvt.distributed import signals
from pcpvt.errors import UserError, warn

FOUND = "PCPVT_FOUND"  # environment variable of ranks: the file in which they tell their launcher
BOOT = Path("/proc/sys/kernel/random/boot_id")  # of the machine, in containers too, until it starts again


class Finding(NamedTuple):
    """What an audit has found."""

    step: int
    what: str  # "gradient", "batch" or "state"
    suspects: list[int]  # ranks
    certain: bool  # see `train.verdict`
    persistent: bool
    places: list[str]  # of the suspects: host and device
    evidence: str  # folder

    def who(self) -> str:
        more = f" and {len(self.suspects) - 3} more" if len(self.suspects) > 3 else ""
        named = zip(self.suspects[:3], self.places[:3], strict=True)
        return " and ".join(f"rank {rank} ({place})" for rank, place in named) + more


class Attempt(NamedTuple):
    """The ranks that were started together, as the launcher of a host sees them."""

    host: int  # number of this host
    hosts: int
    each: int  # ranks of a host
    store: int | None  # number of the host that keeps the store in which hosts meet; None: not known


class Choice(NamedTuple):
    """What follows."""

    leaves: int | None  # number of the host that leaves the run; None: all are started again, or end
    ends: bool  # the run ends with exit code 77
    why: str  # why no host leaves


def choose(found: Finding, attempt: Attempt, fewest: int, batch: int) -> Choice:
    """What follows from a finding; the same on all hosts.

    Where the suspect's host cannot be left out, the run is started again with it only if what went wrong may have
    happened once: a gradient or batch that was wrong in the repetition too will be wrong again, and a restart would put
    more of it into the weights. A state that differs is replaced by a restart.

    Args:
        fewest: `config.elastic`.
        batch: `config.batch_size`.
    """
    hosts, left = {rank // attempt.each for rank in found.suspects}, (attempt.hosts - 1) * attempt.each
    if not found.certain or len(hosts) != 1:
        why = "it is not certain which device is wrong"
    elif attempt.hosts == 1:
        why = "the run has one host"
    elif not fewest:
        why = "config.elastic is not set"
    elif left < fewest:
        why = f"{left} processes would be left, and config.elastic is {fewest}"
    elif batch % left:
        why = f"{left} processes would be left, and config.batch_size={batch} cannot be cut evenly over them"
    elif attempt.store is None:
        why = "it is not known which host keeps the store in which hosts meet (PET_NODE_RANK is not set)"
    elif attempt.store in hosts:
        why = "its host keeps the store in which hosts meet"
    else:
        return Choice(hosts.pop(), False, "")
    return Choice(None, found.persistent and found.what != "state", why)


def tell(found: Finding) -> None:
    """Tells the launcher of this host, if one of ours has started this process."""
    if FOUND in os.environ:
        path = Path(os.environ[FOUND])
        temporary = path.with_name(f"{path.name}.{os.getpid()}")  # all ranks of the host write
        try:
            temporary.write_text(json.dumps(found))
            temporary.replace(path)
        except OSError as error:
            warn(f"{path}: not written ({error})")


def path_for_ranks(debug: Path) -> Path:
    """Where the ranks of this host tell their launcher: a file of its own, as that of another may come late."""
    return debug / f"found-{socket.gethostname()}-{os.getpid()}.json"


def take(path: Path) -> Finding | None:
    """What the ranks of this host have told, and removes the file; None when there is nothing that can be read."""
    try:
        return Finding(*json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def note_left(debug: Path, found: Finding) -> Path:
    """Notes that this host has left the run, so that it does not join again by itself; returns the file."""
    path = _left(debug)
    try:
        path.write_text(json.dumps({"boot": _boot(), **found._asdict()}, indent=1) + "\n")
    except OSError as error:
        warn(f"{path}: not written ({error}): do not start this host again before its device was checked")
    return path


class LeftError(UserError):
    """This host has left the run before, and computes wrongly until somebody says otherwise."""

    exit_code = signals.FAULTY


def refuse_left(debug: Path) -> None:
    """Raises LeftError if this machine has left the run and was not started anew since."""
    path = _left(debug)
    try:
        noted = json.loads(path.read_text())
        if noted.pop("boot") != _boot():
            return
        found = Finding(**noted)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return
    raise LeftError(
        f"{path}: this host has left the run, because {found.who()} computed wrongly in step {found.step} "
        f"({found.evidence}): check the device, then remove this file to let the host join again"
    )


def _left(debug: Path) -> Path:
    return debug / f"left-{socket.gethostname()}.json"


def _boot() -> str:
    return BOOT.read_text().strip() if BOOT.exists() else ""
