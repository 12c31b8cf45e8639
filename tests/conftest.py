"""Fixtures of all tests: the program as a user calls it, a finished miniature run, seeded reference libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parent.parent
# Two threads are hardly faster at miniature size, and wait in busy loops: 10 times the time where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The several hundred programs that the tests start would compile all of pcpvt, 0.4 s of a core each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers for the whole suite, however many cores there are; none for named files, which begin sooner so."""
    return 0 if config.option.file_or_dir else 2


@pytest.fixture
def pcpvt(tmp_path):
    """Runs `python -m pcpvt.main` with the given words; returns the finished process (text output).

    It is forked from a server of `warm`; with `cold`, or with variables of its own, by a new interpreter.
    """

    def call(
        *words: str, timeout: float = 300, check: bool = True, env: dict | None = None, cwd: Path = ROOT, cold=False
    ):
        if cold or env:
            done = subprocess.run(
                [sys.executable, "-m", "pcpvt.main", *words],
                cwd=cwd,
                env={**os.environ, **(env or {})},
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        else:
            done = warm.run(["-m", "pcpvt.main", *words], os.environ, cwd, timeout)
        assert not check or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture
def nano(tmp_path):
    """The words of a run that takes seconds: the miniature on the digits, in a workdir of its own."""
    return [
        "--config=configs/pcpvt_s.py:cpu",
        "--config.model.name=pcpvt_nano",
        "--config.steps=8",
        "--config.batch_size=32",
        "--config.lr=2e-3",
        "--config.eval_every=4 steps",
        "--config.log_every=2 steps",
        f"--workdir={tmp_path / 'run'}",
    ]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The workdir of a finished miniature run on the digits, about 85 % right; read it, do not write into it."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    words = ["--config=configs/pcpvt_s.py:cpu", "--config.model.name=pcpvt_nano", "--config.epochs=3"]
    words += ["--config.lr=3e-3", "--config.log_every=10 steps", "--config.precision=float32", f"--workdir={workdir}"]
    warm.run(["-m", "pcpvt.main", *words], os.environ, ROOT, timeout=300).check_returncode()
    return workdir


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """The workdir of a miniature run of two processes without faults; read it, do not write into it.

    Beside it are its TMPDIR, tmp/, and its output, stdout.txt, in which rank 1 has printed its environment.
    """
    import miniature

    folder = tmp_path_factory.mktemp("two_ranks")
    (folder / "tmp").mkdir()
    show = {"at": "inside step", "n": 1, "do": "environ", "rank": 1}
    ended = miniature.run(miniature.words(folder / "run", "cpu2"), show, env={"TMPDIR": str(folder / "tmp")})
    assert ended.code == 0 and ended.err == "", ended.err
    (folder / "stdout.txt").write_text(ended.out)
    return folder / "run"


@pytest.fixture
def theirs_seeded():
    """Global generators for the libraries under comparison, put back afterwards."""
    import random

    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.fixture
def timm_posterize(monkeypatch):
    """Pillow 13 refuses timm's posterizing to 0 bits: bounded in timm as it is in ours."""
    from pcpvt import torchvision_compat  # noqa: F401 - before timm
    from timm.data import auto_augment  # isort: skip

    original = auto_augment.posterize
    for name in list(auto_augment.NAME_TO_OP):
        if name.startswith("Posterize"):
            monkeypatch.setitem(
                auto_augment.NAME_TO_OP, name, lambda image, bits, **options: original(image, max(1, bits), **options)
            )
