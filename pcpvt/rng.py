"""Keys to draws: every random number of a run is a pure function of (seed, purpose, counters).

Philox is counter-based, so a draw needs no history: any process, worker or resumed run that asks for the same key
gets the same numbers. Source: numpy.random.Philox, after Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3".
"""

import functools
import hashlib

import numpy as np


@functools.lru_cache(maxsize=256)
def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """The generator of one draw site.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for, e.g. "order", "augment", "drop_path"; another purpose is another stream.
        counters: up to three non-negative integers, e.g. (epoch, sample id) or (step,). Neighbouring counters give
            independent streams of 2**64 blocks each.
    """
    assert len(counters) <= 3 and all(c >= 0 for c in counters), counters
    words = [0, *counters] + [0] * (3 - len(counters))  # the lowest word counts the draws of this stream
    bits = np.random.Philox(key=np.array(_key(seed, purpose), np.uint64), counter=np.array(words, np.uint64))
    return np.random.Generator(bits)
