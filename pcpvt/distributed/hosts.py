"""The hosts of a run, from the environment variables that schedulers and `launch/npu_pod.sh` set.

Sources: `PET_*` are torchrun's options as variables, which PyTorchJob of Kubeflow's training operator sets; AscendJob
of MindCluster sets MASTER_ADDR, MASTER_PORT, RANK (of the node), WORLD_SIZE (all cards), LOCAL_WORLD_SIZE (cards
here) and LOCAL_RANK, a list like `0,1,2,3` (`setPytorchEnv` of its ascend-operator). docs/pods.md has all sources.
"""

from collections.abc import Mapping
from typing import NamedTuple

from pcpvt.errors import UserError

PORT = 29500  # torchrun's default
# Environment variable: the exit code instead of each after which another start would help, for schedulers that tell
# only ranges of codes apart. `npu_pod.sh --retry_code` sets it.
RETRY_CODE = "PCPVT_RETRY_CODE"


class Hosts(NamedTuple):
    """This host among those of a run."""

    number: int = 1
    rank: int | None = None  # of this host; None where the rendezvous decides it
    endpoint: str = ""  # HOST:PORT where the hosts meet; empty for one host
    processes: int | None = None  # on each host; None: the run's number divided by the hosts
    run_id: str = "pcpvt"
    address: str | None = None  # of this host, for the others; None: its host name

    def processes_in_all(self) -> int | None:
        """On all hosts together; None where the variables do not say."""
        return self.processes and self.processes * self.number


def is_rank(environ: Mapping[str, str]) -> bool:
    """Whether torchrun, `launch` or the like has started this process as one rank; it sets one number as LOCAL_RANK."""
    return environ.get("LOCAL_RANK", "").isdecimal() and "RANK" in environ and "WORLD_SIZE" in environ


def exit_code(environ: Mapping[str, str], code: int) -> int:
    """The exit code of this process: `code` for a rank, whose launcher reads it; else what the scheduler is told."""
    retry = environ.get(RETRY_CODE, "")
    return int(retry) if retry and code not in (0, 2) and not is_rank(environ) else code


def from_environment(environ: Mapping[str, str]) -> Hosts:
    """The hosts that the variables describe; one host where they describe none.

    Raises:
        UserError: for a variable that is no number, or for several hosts without a place to meet.
    """
    if is_rank(environ):
        return Hosts()
    prefix = "PET_" if "PET_NNODES" in environ else ""
    address, port = (
        environ.get(f"{prefix}MASTER_{name}") or environ.get(f"MASTER_{name}", "") for name in ("ADDR", "PORT")
    )
    meeting = f"{address}:{port or PORT}" if address else ""
    if prefix:
        processes = environ.get("PET_NPROC_PER_NODE", "auto")
        hosts = Hosts(
            number=_number(environ, "PET_NNODES", 1),
            rank=_number(environ, "PET_NODE_RANK", 0) if "PET_NODE_RANK" in environ else None,
            endpoint=environ.get("PET_RDZV_ENDPOINT") or meeting,
            processes=None if processes in ("auto", "cpu", "gpu") else _number(environ, "PET_NPROC_PER_NODE", 1),
            run_id=environ.get("PET_RDZV_ID") or "pcpvt",
            address=environ.get("PET_LOCAL_ADDR") or None,
        )
    elif "LOCAL_WORLD_SIZE" in environ and "RANK" in environ and "WORLD_SIZE" in environ:
        cards = _number(environ, "LOCAL_WORLD_SIZE", 1)
        total = _number(environ, "WORLD_SIZE", 1)
        if total % cards:
            raise UserError(
                f"WORLD_SIZE: {total} is no multiple of LOCAL_WORLD_SIZE, {cards}: give each host as many cards"
            )
        hosts = Hosts(total // cards, _number(environ, "RANK", 0), meeting, cards)
    else:
        return Hosts()
    if hosts.number > 1 and not hosts.endpoint:
        raise UserError(
            f"{prefix}MASTER_ADDR: not set, and there are {hosts.number} hosts: set it to the name of the first"
        )
    if hosts.rank is not None and hosts.rank >= hosts.number:
        raise UserError(f"{prefix}{'NODE_' if prefix else ''}RANK: {hosts.rank}: the hosts are 0 to {hosts.number - 1}")
    return hosts


def _number(environ: Mapping[str, str], name: str, low: int) -> int:
    """A variable as a number of at least `low`; of `MIN:MAX`, as torchrun writes a range, the MAX."""
    text = environ[name].rpartition(":")[2]
    if not text.isdecimal() or int(text) < low:
        raise UserError(f"{name}: {environ[name]!r}: give a number of at least {low}")
    return int(text)
