"""The verdict of an audit: which process is wrong, of several that have done the same work."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Result(NamedTuple):
    """What one process got for the work."""

    rank: int
    digest: tuple[float, ...]  # one number of a checksum, or a sketch (`functional.digest`)
    again: bool  # the work was repeated because of a difference


class Verdict(NamedTuple):
    """What the results say."""

    suspects: list[int]  # processes with a result that differs; where none is certain, all of them
    certain: bool  # more than half of the results are the same: the others are wrong
    persistent: bool  # a suspect's result differs also in the repetition
    agreeing: int  # results that are the same


def same(a: Sequence[float], b: Sequence[float], tolerance: float) -> bool:
    """Whether two digests are of the same result: equal, or with a tolerance within that share of the norm.

    With a tolerance results that are not finite are the same: the step is skipped, whatever they are.
    """
    if tolerance == 0:
        return tuple(a) == tuple(b)
    if not all(map(math.isfinite, [*a, *b])):
        return not all(map(math.isfinite, a)) and not all(map(math.isfinite, b))
    return all(abs(x - y) <= tolerance * max(a[0], b[0]) for x, y in zip(a, b, strict=True))


def judge(results: Sequence[Result], tolerance: float) -> Verdict:
    """The verdict by majority: of the results, not of the processes, so that two may suffice if one errs once only."""
    groups = [[other for other in results if same(result.digest, other.digest, tolerance)] for result in results]
    largest = max(groups, key=len)
    if 2 * len(largest) <= len(results):
        return Verdict(sorted({result.rank for result in results}), False, True, len(largest))
    wrong = [result for result in results if result not in largest]
    return Verdict(sorted({result.rank for result in wrong}), True, any(result.again for result in wrong), len(largest))
