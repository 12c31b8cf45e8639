"""Audits against silent data corruption: every `config.audit_every` steps each process repeats another one's work.

The draws of a step are data and the step is pure, so the other process's part of the batch is read again and its
gradient is computed again, before the sum over the processes; the two checksums must be equal. So must those of the
states, which are compared in audited steps, at the first step and before every save. docs/audit.md says what is found
and what is not.
"""

import hashlib
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pcpvt.data.audited import Turns, separate
from pcpvt.data.loader import TrainBatches
from pcpvt.distributed import collectives, suspect
from pcpvt.errors import FaultError, warn
from pcpvt.functional import digest
from pcpvt.functional.objective import Batch
from pcpvt.functional.state import TrainState
from pcpvt.functional.step import Addends
from pcpvt.runtime.session import Session
from pcpvt.train.evidence import Evidence, differences, received
from pcpvt.train.verdict import Result, Verdict, judge, same

EVERY = 200  # steps by default: a repetition takes less than a step, so an audit costs less than 0.5 %
# Of the gradient's norm, by compute dtype, where devices add in an order of their own: ten times what another order was
# measured to change (docs/audit.md).
TOLERANCE = {torch.float64: 4e-15, torch.float32: 2e-6, torch.bfloat16: 0.03, torch.float16: 3e-3}

PLURAL = {"batch": "batches", "gradient": "gradients", "state": "states"}

_Made = TypeVar("_Made")


def turns(session: Session) -> Turns:
    """Which steps are audited, as the config says."""
    every, world = session.config.audit_every, session.world.size
    return Turns((EVERY if world > 1 else 0) if every is None else every, world)


class Audit:
    """The audits of a run; all processes make one, with `turns.every` of 0 too, and call its methods together.

    Attributes:
        exact: gradients are compared by checksum, because these devices repeat them to the bit.
    """

    def __init__(self, session: Session, turns: Turns, batches: TrainBatches):
        self._session, self._turns, self._batches = session, turns, batches
        self._other: Batch = {}
        self._compared = False
        device, index = session.device, session.world.local_rank
        place, kind = f"{socket.gethostname()}, {device.name} {index}", f"{device.describe()} {torch.get_num_threads()}"
        active = turns.every > 0
        self._places = collectives.gather_texts(place) if active else [place]
        self._alike = len(set(collectives.gather_texts(kind))) == 1 if active else True
        self.exact = device.repeats_exactly and self._alike
        self._tolerance = 0.0 if self.exact else TOLERANCE[session.policy.compute]

    def note(self) -> str:
        """What is audited, for the log; empty where nothing is."""
        if not self._turns.every:
            return ""
        what = "another process's gradient" if self._turns.world > 1 else "the own gradient"
        how = "to the bit" if self.exact else f"within {self._tolerance:.2g} of its norm"
        alone = "" if self._alike else "; states are not, since the devices are of several kinds"
        return f"audit: every {self._turns.every} steps {what} is computed again and compared {how}{alone}"

    def passed(self, step: int) -> int:
        """The newest step up to a step from whose checkpoint a restart after an audit may go on.

        A device that errs in one step may have erred since the audit before, and that has reached the weights.
        """
        restarts = self._turns.every and self._session.config.audit_action == "restart"
        return self._turns.passed(step) if restarts else step

    def around(self, step: Callable[[TrainState, Batch], _Made]) -> Callable[[TrainState, Batch], _Made]:
        """The train step for batches of `data.audited`; the step calls `inspect`."""
        if not self._turns.every:
            return step

        def audited(state: TrainState, batch: Batch) -> _Made:
            own, self._other = separate(batch)
            return step(state, own)

        return audited

    def inspect(self, state: TrainState, batch: Batch, addends: Addends, work: Callable[[Batch], Addends]) -> None:
        """Audits a step, if it is due, from inside (see `functional.step.make_step`).

        Raises:
            FaultError: when a difference was found and `config.audit_action` is not `warn`.
        """
        step, rank = int(state.step) + 1, self._session.world.rank
        due = self._turns.due(step)
        alike = self.compare_states(state) if due or not self._compared else True
        if not due or not alike:  # from other states follow other gradients
            return
        other, checked = self._other, work(self._other)
        table = collectives.gather_numbers([*self._digests(batch, addends), *self._digests(other, checked)])
        half = len(table[0]) // 2
        pairs = [(self._turns.audited_by(step, checker), checker) for checker in range(self._turns.world)]
        wrong = [(o, c) for o, c in pairs if not self._same(table[o][:half], table[c][half:])]
        if not wrong:
            return

        # A process that always errs is in two pairs, and found by either. All processes do the work of one again.
        owner, checker = wrong[0]
        again = self._batches.of_rank(step - 1, owner)
        again = {name: value.to(addends[0].device) for name, value in again.items()}
        repeated = collectives.gather_numbers(self._digests(again, work(again)))
        rows = [(owner, table[owner][:half], False), (checker, table[checker][half:], False)]
        read = rows[0][1][0] != rows[1][1][0]  # the batches differ, and so does all that follows from them
        rows += [(r, row, True) for r, row in enumerate(repeated)]
        what, part = ("batch", slice(0, 1)) if read else ("gradient", slice(1, None))
        results = [Result(r, tuple(row[part]), late) for r, row, late in rows]
        verdict = judge(results, 0.0 if read else self._tolerance)

        evidence = Evidence(self._session.workdir, step, what)
        theirs = received(addends[0], rank == owner)
        if rank == checker and evidence.detailed:
            found = differences(_spans(state, len(theirs)), checked[0], theirs)
            evidence.write_json("differences.json", {"ours": checker, "theirs": owner, "gradient": found})
        for role, who, used in (("owner", owner, batch), ("checker", checker, other)):
            if rank == who and evidence.detailed:
                evidence.write_batch(f"batch-{role}.safetensors", used)
        about = {"owner": owner, "checker": checker, "pairs_that_differ": len(wrong)}
        self._conclude(evidence, step, what, verdict, results, about, state_is_whole=True)

    def compare_states(self, state: TrainState) -> bool:
        """Compares the states of all processes, which must be the same to the bit; returns whether they are.

        Raises:
            FaultError: as `inspect`.
        """
        if not self._turns.every or self._turns.world == 1 or not self._alike:
            return True
        self._compared = True
        parts = digest.parts(state._replace(step=torch.zeros(0)))
        tables = [collectives.gather_numbers([_number([part]) for part in parts.values()])]
        if len(set(map(tuple, tables[0]))) == 1:
            return True
        tables.append(collectives.gather_numbers([_number([part]) for part in parts.values()]))
        results = [Result(r, tuple(row), late) for late in (False, True) for r, row in enumerate(tables[late])]
        verdict = judge(results, 0.0)
        suspect = verdict.suspects[-1]
        whole = next((r for r in range(self._turns.world) if r not in verdict.suspects), 0)
        differing = [name for i, name in enumerate(parts) if tables[0][suspect][i] != tables[0][whole][i]]

        step, found = int(state.step) + 1, {}
        evidence = Evidence(self._session.workdir, step, "state")
        for name in differing:
            theirs = received(parts[name], self._session.world.rank == suspect)
            spans = _spans(state, len(theirs)) if theirs.ndim else {name: slice(None)}
            found[name] = differences(spans, parts[name], theirs) if self._session.world.rank == whole else {}
        if self._session.world.rank == whole and evidence.detailed:
            evidence.write_json("differences.json", {"ours": whole, "theirs": suspect, **found})
        self._conclude(evidence, step, "state", verdict, results, {"parts": differing}, state_is_whole=False)
        return False

    def _digests(self, batch: Batch, addends: Addends) -> list[float]:
        gradient = [_number(addends)] if self.exact else digest.sketch(addends[0]).tolist()
        return [_number([batch[name] for name in sorted(batch)]), *gradient]

    def _same(self, a: Sequence[float], b: Sequence[float]) -> bool:
        return a[0] == b[0] and same(a[1:], b[1:], self._tolerance)

    def _conclude(
        self, evidence: Evidence, step: int, what: str, verdict: Verdict, results: Sequence[Result], about: dict, *,
        state_is_whole: bool,
    ) -> None:  # fmt: skip
        """Writes the verdict, and warns or ends this attempt as `config.audit_action` says."""
        action, main = self._session.config.audit_action, self._session.world.is_main
        if main:
            listed = [{"place": self._places[result.rank], **result._asdict()} for result in results]
            about = {"step": step, "what": what, "tolerance": self._tolerance, **verdict._asdict(), **about}
            evidence.write_json("verdict.json", {**about, "results": listed})
        again = action == "restart"
        if again:
            places = [self._places[rank] for rank in verdict.suspects]
            suspects, certain, persistent, _ = verdict
            suspect.tell(suspect.Finding(step, what, suspects, certain, persistent, places, str(evidence.folder)))
        collectives.any_true(False)  # all have written before one ends
        where = f"evidence: {evidence.folder}"
        if action != "warn":
            raise FaultError(
                f"{self._said(step, what, verdict)}; {where}", state_is_whole=state_is_whole and not again,
                passed=self.passed(step - 1) if again and state_is_whole else None, evidence=evidence.folder,
            )  # fmt: skip
        if main:
            warn(f"{self._said(step, what, verdict)}; the run goes on (config.audit_action=warn); {where}")

    def _said(self, step: int, what: str, verdict: Verdict) -> str:
        """The verdict for the user."""
        suspects, did = verdict.suspects, {"batch": "read", "gradient": "computed", "state": "held"}[what]
        named = [f"rank {r} ({self._places[r]})" for r in suspects[:3]]
        who = " and ".join(named) + (f" and {len(suspects) - 3} more" if len(suspects) > 3 else "")
        text = f"audit of step {step}: {who} {did} "
        if not verdict.certain:
            few = "no two results are the same" if verdict.agreeing == 1 else "no majority tells which is right"
            return f"{text}different {PLURAL[what]}, and {few}"
        if what == "state":
            return f"{text}another state than {self._turns.world - len(suspects)} other ranks: suspect its memory"
        again = "also when it was repeated" if verdict.persistent else "but not when it was repeated"
        return f"{text}another {what} than {verdict.agreeing} other results, {again}: suspect this device and host"


def _number(tensors: Sequence[Tensor]) -> float:
    """One number, exact in float64, of the bit patterns of tensors."""
    sums = torch.stack([digest.checksum(tensor) for tensor in tensors]).tolist()
    return float(int.from_bytes(hashlib.blake2b(repr(sums).encode(), digest_size=6).digest(), "little"))


def _spans(state: TrainState, length: int) -> dict[str, slice]:
    """Where the first parameters lie in a flat tensor of so many elements."""
    spans = {name: state.params.span([name]) for name in state.params}
    return {name: span for name, span in spans.items() if span.stop <= length}
