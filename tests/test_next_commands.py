"""The last lines of a training: commands that run as they are printed."""

from __future__ import annotations

import shlex

import miniature

from pcpvt.config import recipes
from pcpvt.runtime import session as sessions
from pcpvt.train.next_commands import next_commands


def test_the_last_lines_of_a_training_are_commands_that_run(pcpvt, tmp_path):
    data, workdir = miniature.image_folder(tmp_path / "my photos", 8), tmp_path / "it's a run"
    fields = {"data.path": data, "image_size": 32, "batch_size": 8, "steps": 1, "eval_every": "0", "data.workers": 0}
    ended = miniature.run(miniature.words(workdir, **fields))
    assert ended.code == 0, ended.err
    head, *lines = ended.out.splitlines()[-4:]
    assert head == "next:"
    *commands, board = (shlex.split(line) for line in lines)
    assert [words[:3] for words in commands] == [["python", "-m", "pcpvt.main"]] * 2
    assert [words[3] for words in commands] == ["--mode=predict", "--mode=export"]
    assert len(pcpvt(*commands[0][3:]).stdout.splitlines()) >= 2 * 8
    pcpvt(*commands[1][3:])
    assert board == ["tensorboard", f"--logdir={workdir}/tensorboard"] and (workdir / "tensorboard").is_dir()


def test_what_is_not_there_is_not_proposed(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    session = sessions.start(recipes.from_arg("cpu", "pcpvt_nano", 0.1), tmp_path)
    predict, _ = next_commands(session)
    assert predict == f"python -m pcpvt.main --mode=predict --workdir={tmp_path} --config.predict.images=PHOTOS"
