"""Weights files of other programs: no pickle is run, and nothing in one is trusted."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pathlib
import pickle
import tarfile

import pytest
import torch
from foreign import assert_same, leaves, refused, twins

from pcpvt.checkpoints import foreign


class Payload:
    """Calls a function when a pickle that holds it is run."""

    def __init__(self, function, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def _payloads(mark: pathlib.Path) -> dict[str, Payload]:
    code = f"open({str(mark)!r}, 'w')"
    return {
        "os.system": Payload(os.system, f"touch {mark}"),
        "eval": Payload(eval, code),
        "exec": Payload(exec, code),
        "getattr": Payload(getattr, "text", "upper"),
        "path": Payload(pathlib.Path.touch, mark),
        "load": Payload(torch.load, str(mark)),
    }


def _places(payload: Payload) -> dict[str, object]:
    return {
        "top": payload,
        "beside": twins(leaves(), extra=payload),
        "in args": twins(leaves(), args=argparse.Namespace(x=payload)),
        "in model": {"model": {**leaves(), "x": payload}},
        "in a list": twins(leaves(), optimizer={"a": [1, (2, payload)]}),
        "as args state": twins(leaves(), args=Payload(argparse.Namespace, payload)),
        "in a path": twins(leaves(), args=argparse.Namespace(x=Payload(pathlib.PurePosixPath, payload))),
    }


@pytest.mark.parametrize("place", list(_places(Payload(len))))
@pytest.mark.parametrize("name", list(_payloads(pathlib.Path("x"))))
def test_malicious_pickle_never_runs(tmp_path, name, place):
    mark = tmp_path / "mark"
    tree = _places(_payloads(mark)[name])[place]
    for new_format in (True, False):
        path = tmp_path / f"evil{new_format}.pth"
        torch.save(tree, path, _use_new_zipfile_serialization=new_format)
        message = refused(path)
        assert "refused" in message and "torch.save(" in message, message
    for protocol in (0, 2, 4, 5):
        (tmp_path / "plain.pth").write_bytes(pickle.dumps(tree, protocol))
        refused(tmp_path / "plain.pth")
    assert not mark.exists()


def test_payload_of_these_tests_runs_when_unpickled_by_pickle(tmp_path):
    pickle.loads(pickle.dumps(_payloads(tmp_path / "mark")["os.system"]))
    assert (tmp_path / "mark").exists()


def test_pickle_under_a_safetensors_name_is_refused(tmp_path):
    for new_format in (True, False):
        path = tmp_path / f"{new_format}.safetensors"
        tree = twins(leaves(), extra=_payloads(tmp_path / "mark")["os.system"])
        torch.save(tree, path, _use_new_zipfile_serialization=new_format)
        refused(path, words=("not a safetensors file", "rename it to .pth"))
    assert not (tmp_path / "mark").exists()


def test_names_allowed_by_the_process_are_refused_here_and_stay_allowed_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(twins(leaves(), extra=Payload(eval, f"open({str(tmp_path / 'mark')!r}, 'w')")), tmp_path / "a.pth")
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([(eval, "builtins.eval"), argparse.Namespace]):
        inside = set(torch.serialization.get_safe_globals())
        refused(tmp_path / "a.pth", words=("eval",))
        assert set(torch.serialization.get_safe_globals()) == inside
    assert not (tmp_path / "mark").exists()
    torch.save(twins(leaves()), tmp_path / "b.pth")
    foreign.read(tmp_path / "b.pth")
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_whole_pickled_model_is_refused_with_the_way_to_save_it_again(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", words=("torch.nn.modules.linear.Linear", "model.state_dict()"))


class Disguised:
    """Unpickles as an OrderedDict whose methods are hidden by its own attributes."""

    def __init__(self, items: dict[str, object]) -> None:
        self.hidden = items

    def __reduce__(self):
        attributes = dict.fromkeys(("items", "keys", "get", "__len__"), torch.Size([1]))
        return collections.OrderedDict, (), attributes, None, iter(self.hidden.items())


def test_attributes_put_on_unpickled_objects_do_not_replace_their_methods(tmp_path):
    state = leaves()
    state["norm.weight"].clone = state["norm.weight"].detach = torch.device("cpu")
    torch.save(Disguised({"model": Disguised(state)}), tmp_path / "a.pth")
    raw = torch.load(tmp_path / "a.pth")
    assert isinstance(raw.items, torch.Size) and isinstance(raw["model"]["norm.weight"].clone, torch.device)
    assert_same(foreign.read(tmp_path / "a.pth").params, leaves())


def test_dict_that_contains_itself_ends_in_an_error(tmp_path):
    tree: dict[str, object] = {"epoch": 1}
    tree["model"] = tree
    torch.save(tree, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", words=("not a tensor",))


def test_tensor_that_claims_more_than_is_stored_is_refused(tmp_path):
    torch.save({"norm.weight": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", words=("norm.weight", "claims more"))


def test_tar_archives_are_refused_unread(tmp_path):
    evil = pickle.dumps(_payloads(tmp_path / "mark")["os.system"])
    with tarfile.open(tmp_path / "a.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(evil)
            archive.addfile(member, io.BytesIO(evil))
    refused(tmp_path / "a.pth", words=("tar archive", "unpack it"))
    assert not (tmp_path / "mark").exists()
