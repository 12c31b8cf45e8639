"""Runs on several hosts, all of them this machine: a launcher each, a network that can be lost, and a scheduler.

Where network namespaces may be made, each node has one, with a cable to a bridge in another; else all share loopback,
and a node loses its network when its processes are stopped.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import miniature

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
NODE = "MINIATURE_NODE"  # in the environment of a node's processes


class Node:
    """One host: the launcher's command, which a scheduler may start several times, and its output in a folder."""

    def __init__(self, number: int, count: int, folder: Path, address: str, port: int, namespace: str = ""):
        self.number, self.count, self.folder, self.namespace = number, count, folder, namespace
        self.mark, self.starts, self.codes = uuid.uuid4().hex, 0, []
        self.faults: list[dict] = []  # of this node, beside those of all
        self._place = [f"--nnodes={count}", f"--master_addr={address}", f"--master_port={port}"]
        self.process: subprocess.Popen | None = None

    def start(self, words: Sequence[str], faults: Sequence[dict]) -> None:
        """Starts the launcher, in a session of its own."""
        env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", NODE: self.mark}
        env |= {"PYTHONPATH": f"{miniature.FAULTS}:{miniature.ROOT}", "FAULTS": json.dumps([*faults, *self.faults])}
        if self.count > 1:
            command = [str(LAUNCH / "npu_pod.sh"), *self._place, f"--node_rank={self.number}", *words]
        else:
            command = [sys.executable, "-m", "pcpvt.main", *words]
        if self.namespace:
            command = ["ip", "netns", "exec", self.namespace, *command]
        with open(self.folder / f"node-{self.number}.out", "ab") as out, open(self.errors, "ab") as err:
            self.process = subprocess.Popen(
                command, env={**os.environ, **env}, cwd=miniature.ROOT, stdout=out, stderr=err, start_new_session=True
            )
        self.starts += 1

    @property
    def errors(self) -> Path:
        return self.folder / f"node-{self.number}.err"

    def ended(self) -> bool:
        """Whether the launcher has ended; notes its exit code."""
        if self.process is None or self.process.poll() is None:
            return False
        self.codes.append(self.process.returncode)
        self.process = None
        return True

    def pids(self) -> list[int]:
        """All processes of this node, in any session."""
        found, mark = [], f"{NODE}={self.mark}"
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # of another user, or ended
                if mark in (folder / "environ").read_text(errors="replace").split("\0"):
                    found.append(int(folder.name))
        return found

    def signal(self, number: int) -> None:
        """Sends a signal to all processes of this node."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """The host is gone, with all of its processes."""
        while self.pids():
            self.signal(signal.SIGKILL)
            time.sleep(0.05)
            self.ended()

    def cut(self, off: bool) -> None:
        """Takes the network away, or gives it back."""
        if self.namespace:
            state = "down" if off else "up"
            _ip("-n", f"{self.namespace[:-1]}h", "link", "set", f"cable{self.number}", state)
        else:
            self.signal(signal.SIGSTOP if off else signal.SIGCONT)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@functools.cache
def has_namespaces() -> bool:
    """Whether network namespaces, cables and bridges can be made here."""
    try:
        with _network("pcpvt-try", 1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def _network(name: str, count: int) -> Iterator[list[str]]:
    """The namespaces of `count` nodes, 10.77.0.1 and so on, with a cable each to a bridge."""
    hub, names = f"{name}h", [f"{name}{i}" for i in range(count)]
    try:
        for namespace in (hub, *names):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for i, namespace in enumerate(names):
            _ip("-n", hub, "link", "add", f"cable{i}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("-n", hub, "link", "set", f"cable{i}", "master", "bridge", "up")
            _ip("-n", namespace, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
        yield names
    finally:
        for namespace in (hub, *names):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


@contextlib.contextmanager
def hosts(count: int, folder: Path) -> Iterator[list[Node]]:
    """So many nodes, whose processes have ended afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if count > 1 and has_namespaces():
            names = stack.enter_context(_network(f"pv{uuid.uuid4().hex[:6]}", count))
            nodes = [Node(i, count, folder, "10.77.0.1", 29500, name) for i, name in enumerate(names)]
        else:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            nodes = [Node(i, count, folder, "127.0.0.1", port) for i in range(count)]
        try:
            yield nodes
        finally:
            for node in nodes:
                node.kill()


def schedule(
    nodes: Sequence[Node], words: Sequence[str], faults: Sequence[dict], limit: float,
    watch: Callable[[], None] = lambda: None, away: Mapping[int, float] | None = None,
) -> None:  # fmt: skip
    """Runs the nodes' commands until all have ended with 0, as a scheduler that starts a failed one again.

    Args:
        away: seconds, by number of the node, until it is started again; inf: never.
        limit: seconds after which the run counts as hung.
        watch: called all the time, to make what happens from outside.
    """
    deadline, running, away = time.monotonic() + limit, list(nodes), away or {}
    due: dict[Node, float] = {}
    for node in running:
        node.start(words, faults)
    while running:
        watch()
        for node in [node for node, at in due.items() if at < time.monotonic()]:
            del due[node]
            node.start(words, faults)
        for node in list(running):
            if not node.ended():
                continue
            if node.codes[-1] == 0:
                running.remove(node)
                continue
            assert node.codes[-1] != 2, told(nodes)  # an error of the user, which no scheduler repeats
            node.kill()  # as the end of a pod does
            due[node] = time.monotonic() + away.get(node.number, 0.0)
            if due[node] == math.inf:
                running.remove(node)
        assert time.monotonic() < deadline, f"not ended within {limit:g} s\n{told(nodes)}"
        time.sleep(0.05)


def told(nodes: Sequence[Node]) -> str:
    """What all nodes have printed, for the message of a test."""
    texts = [f"node {node.number}: exit codes {node.codes}" for node in nodes]
    for node in nodes:
        for path in sorted(node.folder.glob(f"node-{node.number}.*")):
            texts.append(f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}")
    return "\n".join(texts)
