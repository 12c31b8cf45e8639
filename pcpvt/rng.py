"""Random generators by key: every random number of a run is a pure function of (seed, purpose, counters).

Philox is counter-based and needs no history: any process, worker or resumed run gets the same numbers for the same key.
Source: numpy.random.Philox, after Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import functools
import hashlib

import numpy as np


@functools.lru_cache(maxsize=256)
def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A new generator for one key.

    Args:
        seed: the run's seed.
        purpose: what the numbers are used for, e.g. "order", "augment", "drop_path"; each has its own stream.
        counters: up to three non-negative integers, e.g. (epoch, sample id) or (step,). Each combination has an
            independent stream of 2**64 blocks.
    """
    assert len(counters) <= 3 and all(c >= 0 for c in counters), counters
    words = [0, *counters] + [0] * (3 - len(counters))  # the lowest word counts blocks within the stream
    bits = np.random.Philox(key=np.array(_key(seed, purpose), np.uint64), counter=np.array(words, np.uint64))
    return np.random.Generator(bits)
