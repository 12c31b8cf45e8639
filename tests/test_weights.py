"""Other people's weights: every usual file is read, no pickle is run, and each refusal is one line with a
remedy."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pathlib
import pickle
import struct
import tarfile
import zipfile

import numpy
import pytest
import safetensors
import safetensors.torch
import torch

from pcpvt import torchvision_compat  # noqa: F401
from pcpvt.errors import UserError
from pcpvt.store import checkpoint, unpickle, weights


def _leaves(seed: int = 0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    shapes = {
        "norm.weight": (4,),
        "blocks.0.0.attn.q.weight": (4, 4),
        "head.weight": (3, 4),
        "head.bias": (3,),
    }
    return {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def _refused(path: object, *, which: str = "params", words: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        weights.read(path, which=which)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message
    assert str(path) in message
    for word in words:
        assert word in message, message
    return message


def _twins(params: dict[str, torch.Tensor], **more: object) -> dict[str, object]:
    """What the Twins authors' script saves."""
    momentum = {0: {"step": 7, "exp_avg": torch.ones(4)}}
    args = argparse.Namespace(lr=5e-4, device=torch.device("cuda"), nested=argparse.Namespace(model="pcpvt_small_v0"))
    saved = {"model": collections.OrderedDict(params), "optimizer": {"state": momentum}, "epoch": 299}
    return {**saved, "lr_scheduler": {"base_values": [5e-4], "_step": None}, "args": args, **more}


# --- what is read


@pytest.mark.parametrize("new_format", [True, False])
def test_checkpoint_of_the_twins_authors_is_read_in_both_formats(tmp_path, new_format):
    path = tmp_path / "pcpvt_small.pth"
    torch.save(_twins(_leaves()), path, _use_new_zipfile_serialization=new_format)
    found, info = weights.read(str(path))
    _assert_same(found, _leaves())
    assert (info["source"], info["entry"], info["epoch"], info["notes"]) == ("torch", "model", 299, [])


@pytest.mark.parametrize("new_format", [True, False])
def test_odd_members_of_the_arguments_do_not_stop_reading(tmp_path, new_format):
    odd = argparse.Namespace(
        output=pathlib.Path("/tmp/out"), pure=pathlib.PureWindowsPath("c:/x"), lr=numpy.float64(1e-3),
        count=numpy.int32(3), table=numpy.arange(3.0), device=torch.device("cpu"), dtype=torch.float16,
    )  # fmt: skip
    path = tmp_path / "odd.pth"
    torch.save(_twins(_leaves(), args=odd, best=numpy.float32(81.2)), path, _use_new_zipfile_serialization=new_format)
    _assert_same(weights.read(path)[0], _leaves())


def test_plain_state_dicts_and_parameters_are_read(tmp_path):
    parameters = {name: torch.nn.Parameter(value) for name, value in _leaves().items()}
    torch.save(parameters, tmp_path / "timm.pt")
    found, info = weights.read(tmp_path / "timm.pt")
    _assert_same(found, _leaves())
    assert all(type(value) is torch.Tensor and not value.requires_grad for value in found.values())
    assert info["entry"] == "" and info["epoch"] is None


@pytest.mark.parametrize("name", ["timm.safetensors", "misnamed.pth"])
def test_safetensors_are_recognised_by_content(tmp_path, name):
    safetensors.torch.save_file(_leaves(), tmp_path / name, {"format": "pt"})
    found, info = weights.read(tmp_path / name)
    _assert_same(found, _leaves())
    assert info["source"] == "safetensors" and info["classes"] is None


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "module._orig_mod.",
        "_orig_mod.module.model.",
        "model.model.module.",
    ],
)
def test_wrapper_prefixes_are_dropped_in_any_nesting(tmp_path, prefix):
    torch.save({"state_dict": {prefix + name: value for name, value in _leaves().items()}}, tmp_path / "a.pth")
    _assert_same(weights.read(tmp_path / "a.pth")[0], _leaves())


def test_prefixes_of_separately_compiled_blocks_are_dropped(tmp_path):
    state = {name.replace("blocks.0.0.", "blocks.0.0._orig_mod."): value for name, value in _leaves().items()}
    torch.save(state, tmp_path / "a.pth")
    _assert_same(weights.read(tmp_path / "a.pth")[0], _leaves())


def test_two_models_under_different_prefixes_are_refused(tmp_path):
    torch.save({"norm.weight": torch.ones(2), "module.norm.weight": torch.zeros(2)}, tmp_path / "a.pth")
    _refused(tmp_path / "a.pth", words=("norm.weight", "twice"))


@pytest.mark.parametrize("entry", ["model_ema", "state_dict_ema", "ema"])
def test_ema_is_taken_only_when_asked_for_and_noted_otherwise(tmp_path, entry):
    path = tmp_path / "a.pth"
    torch.save(_twins(_leaves(0), **{entry: _leaves(1)}), path)
    raw, info = weights.read(path)
    _assert_same(raw, _leaves(0))
    assert len(info["notes"]) == 1 and entry in info["notes"][0]
    ema, info = weights.read(path, which="ema")
    _assert_same(ema, _leaves(1))
    assert info["entry"] == entry and info["notes"] == []


def test_wrappers_in_wrappers_are_opened(tmp_path):
    inner = {
        "model": _leaves(0),
        "ema": {"module": {"module." + k: v for k, v in _leaves(1).items()}, "decay": 0.9},
    }
    torch.save({"epoch": 3, "state_dict": inner}, tmp_path / "a.pth")
    raw, info = weights.read(tmp_path / "a.pth")
    _assert_same(raw, _leaves(0))
    assert info["entry"] == "state_dict.model" and info["epoch"] == 3
    ema, info = weights.read(tmp_path / "a.pth", which="ema")
    _assert_same(ema, _leaves(1))
    assert info["entry"] == "state_dict.ema.module"


def test_absent_ema_is_an_error_that_lists_what_is_there(tmp_path):
    torch.save(_twins(_leaves(), model_ema=None), tmp_path / "a.pth")
    _refused(tmp_path / "a.pth", which="ema", words=("args, epoch, lr_scheduler, model, model_ema, optimizer",))
    torch.save(_leaves(), tmp_path / "b.pth")
    _refused(tmp_path / "b.pth", which="ema", words=("only params",))
    safetensors.torch.save_file(_leaves(), tmp_path / "c.safetensors")
    _refused(tmp_path / "c.safetensors", which="ema", words=("only params",))


def test_file_with_ema_alone_says_so(tmp_path):
    torch.save({"model_ema": _leaves()}, tmp_path / "a.pth")
    _refused(tmp_path / "a.pth", words=("EMA weights only", "model_ema"))


def _ours(folder: pathlib.Path, *groups: str) -> pathlib.Path:
    tensors = {f"{g}/{name}": value for i, g in enumerate(groups) for name, value in _leaves(i).items()}
    return checkpoint.save(folder, tensors, {"step": 3400, "classes": ["cat", "dog", "eel"]})


def test_our_own_checkpoint_gives_params_ema_step_and_class_names(tmp_path):
    path = _ours(tmp_path, "params", "ema", "opt/mu")
    found, info = weights.read(path)
    _assert_same(found, _leaves(0))
    assert (info["source"], info["epoch"], info["step"]) == ("pcpvt", None, 3400)
    assert info["classes"] == ["cat", "dog", "eel"] and "EMA" in info["notes"][0]
    ema, info = weights.read(path, which="ema")
    _assert_same(ema, _leaves(1))
    assert info["entry"] == "ema" and info["notes"] == []


def test_our_own_checkpoint_without_ema_says_what_it_holds(tmp_path):
    path = _ours(tmp_path, "params", "opt/mu")
    assert weights.read(path)[1]["notes"] == []
    _refused(path, which="ema", words=("only opt, params",))


def test_our_own_checkpoint_with_a_changed_number_is_refused(tmp_path):
    path = _ours(tmp_path, "params", "opt/mu")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    _refused(path, words=("checksum",))


@pytest.mark.parametrize("text", ["1", "", "[" * 100_000, '{"format": 1, "step": "x", "digest": 3}'])
def test_strange_metadata_of_a_checkpoint_is_one_line(tmp_path, text):
    tensors = {f"params/{name}": value for name, value in _leaves().items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"pcpvt": text})
    _refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_weights_outlive_the_file(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    torch.save(_leaves(), path) if kind == "pth" else safetensors.torch.save_file(_leaves(), path)
    found, _ = weights.read(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    _assert_same(found, _leaves())


# --- what is never run


class Payload:
    """Creates a file when a pickle that holds it is run."""

    def __init__(self, function, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def _payloads(mark: pathlib.Path) -> dict[str, Payload]:
    code = f"open({str(mark)!r}, 'w')"
    return {
        "os.system": Payload(os.system, f"touch {mark}"), "eval": Payload(eval, code), "exec": Payload(exec,
        code), "getattr": Payload(getattr, "text", "upper"), "path": Payload(pathlib.Path.touch, mark),
        "load": Payload(torch.load, str(mark)), }  # fmt: skip


def _places(payload: Payload) -> dict[str, object]:
    return {
        "top": payload, "beside": _twins(_leaves(), extra=payload), "in args": _twins(_leaves(),
        args=argparse.Namespace(x=payload)), "in model": {"model": {**_leaves(), "x": payload}}, "in a list":
        _twins(_leaves(), optimizer={"a": [1, (2, payload)]}), "as args state": _twins(_leaves(),
        args=Payload(argparse.Namespace, payload)), "in a path": _twins(_leaves(),
        args=argparse.Namespace(x=Payload(pathlib.PurePosixPath, payload))), }  # fmt: skip


@pytest.mark.parametrize("place", list(_places(Payload(len))))
@pytest.mark.parametrize("name", list(_payloads(pathlib.Path("x"))))
def test_malicious_pickle_never_runs(tmp_path, name, place):
    mark = tmp_path / "mark"
    tree = _places(_payloads(mark)[name])[place]
    for new_format in (True, False):
        path = tmp_path / f"evil{new_format}.pth"
        torch.save(tree, path, _use_new_zipfile_serialization=new_format)
        message = _refused(path)
        assert "refused" in message and "torch.save(" in message, message
    for protocol in (0, 2, 4, 5):
        (tmp_path / "plain.pth").write_bytes(pickle.dumps(tree, protocol))
        _refused(tmp_path / "plain.pth")
    assert not mark.exists()


def test_payload_of_these_tests_would_run_if_it_were_unpickled(tmp_path):
    pickle.loads(pickle.dumps(_payloads(tmp_path / "mark")["os.system"]))
    assert (tmp_path / "mark").exists()


def test_pickle_under_a_safetensors_name_is_refused(tmp_path):
    for new_format in (True, False):
        path = tmp_path / f"{new_format}.safetensors"
        tree = _twins(_leaves(), extra=_payloads(tmp_path / "mark")["os.system"])
        torch.save(tree, path, _use_new_zipfile_serialization=new_format)
        _refused(path, words=("not a safetensors file", "rename it to .pth"))
    assert not (tmp_path / "mark").exists()


def test_names_that_others_allowed_stay_refused_here_and_allowed_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(_twins(_leaves(), extra=Payload(eval, f"open({str(tmp_path / 'mark')!r}, 'w')")), tmp_path / "a.pth")
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([(eval, "builtins.eval"), argparse.Namespace]):
        inside = set(torch.serialization.get_safe_globals())
        _refused(tmp_path / "a.pth", words=("eval",))
        assert set(torch.serialization.get_safe_globals()) == inside
    assert not (tmp_path / "mark").exists()
    torch.save(_twins(_leaves()), tmp_path / "b.pth")
    weights.read(tmp_path / "b.pth")
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_whole_pickled_model_is_refused_with_the_way_to_save_it_again(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "a.pth")
    _refused(tmp_path / "a.pth", words=("torch.nn.modules.linear.Linear", "model.state_dict()"))


class Disguised:
    """Unpickles as an OrderedDict whose methods are hidden by its own attributes."""

    def __init__(self, items: dict[str, object]) -> None:
        self.hidden = items

    def __reduce__(self):
        attributes = dict.fromkeys(("items", "keys", "get", "__len__"), torch.Size([1]))
        return collections.OrderedDict, (), attributes, None, iter(self.hidden.items())


def test_attributes_put_on_unpickled_objects_do_not_replace_their_methods(tmp_path):
    state = _leaves()
    state["norm.weight"].clone = state["norm.weight"].detach = torch.device("cpu")
    torch.save(Disguised({"model": Disguised(state)}), tmp_path / "a.pth")
    raw = torch.load(tmp_path / "a.pth")
    assert isinstance(raw.items, torch.Size) and isinstance(raw["model"]["norm.weight"].clone, torch.device)
    _assert_same(weights.read(tmp_path / "a.pth")[0], _leaves())


def test_dict_that_contains_itself_ends_in_an_error(tmp_path):
    tree: dict[str, object] = {"epoch": 1}
    tree["model"] = tree
    torch.save(tree, tmp_path / "a.pth")
    _refused(tmp_path / "a.pth", words=("not a tensor",))


def test_tensor_that_claims_more_than_is_stored_is_refused(tmp_path):
    torch.save({"norm.weight": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "a.pth")
    _refused(tmp_path / "a.pth", words=("norm.weight", "claims more"))


# --- files that are not weights


def test_missing_folder_and_empty_files_are_one_line(tmp_path):
    _refused(tmp_path / "none.pth", words=("no such file", "timm:NAME"))
    _refused(tmp_path, words=("folder",))
    (tmp_path / "empty.pth").touch()
    _refused(tmp_path / "empty.pth", words=("empty",))


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "ours"])
def test_truncated_files_are_one_line(tmp_path, kind):
    path = tmp_path / f"a.{'safetensors' if kind in ('safetensors', 'ours') else 'pth'}"
    if kind == "safetensors":
        safetensors.torch.save_file(_leaves(), path)
    elif kind == "ours":
        path = _ours(tmp_path, "params", "ema")
    else:
        torch.save(_twins(_leaves()), path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    weights.read(path)
    for kept in [*range(1, 40), *range(40, len(data), max(1, len(data) // 60)), len(data) - 1]:
        path.write_bytes(data[:kept])
        _refused(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_flipped_bytes_never_crash_and_in_a_zip_never_load_wrong(tmp_path, new_format):
    path = tmp_path / "a.pth"
    torch.save(_twins(_leaves()), path, _use_new_zipfile_serialization=new_format)
    data, draws = path.read_bytes(), numpy.random.default_rng(0)
    for place in draws.integers(len(data), size=150):
        path.write_bytes(data[:place] + bytes([data[place] ^ int(draws.integers(1, 256))]) + data[place + 1 :])
        try:
            found, _ = weights.read(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            if new_format:  # the old format has no checksum, so a changed number cannot be told there
                _assert_same(found, _leaves())


@pytest.mark.parametrize(
    "data", [b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n", b"x", b"\0" * 99]
)
def test_downloaded_web_pages_and_pointers_are_recognised_as_such(tmp_path, data):
    (tmp_path / "a.pth").write_bytes(data)
    _refused(tmp_path / "a.pth", words=("neither a PyTorch nor a safetensors file",))


@pytest.mark.parametrize("data", [struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 4) + b"{\xff\xff}"])
def test_safetensors_with_a_false_header_are_refused(tmp_path, data):
    (tmp_path / "a.safetensors").write_bytes(data)
    _refused(tmp_path / "a.safetensors", words=("safetensors", "get it again"))


@pytest.mark.parametrize(
    ("tree", "word"),
    [
        (torch.ones(2), "holds a Tensor"), ([torch.ones(2)], "holds a list"), ({}, "no tensors"),
        ({"net": {"norm.weight": torch.ones(2)}}, "net is of type dict"), ({1: torch.ones(2)}, "has no name"),
        ({"a\x1b[31m\nb": 3}, "is of type int"), ({"a": torch.ones(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(2, device="meta")}, "without data"), ({"a": numpy.ones(3)}, "is a numpy value"),
        ({"model": {}}, "model is of type dict"),
    ],
)  # fmt: skip
def test_trees_without_weights_are_one_line(tmp_path, tree, word):
    torch.save(tree, tmp_path / "a.pth")
    _refused(tmp_path / "a.pth", words=(word,))


def test_zip_that_torch_did_not_write_is_refused(tmp_path):
    torch.save(_leaves(), tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as old,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    _refused(tmp_path / "b.pth", words=("compressed zip",))
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as other:
        other.writestr("readme.txt", "hello")
    _refused(tmp_path / "c.pth", words=("cannot be read",))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_with_the_remedy(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "a.pt"))
    _refused(tmp_path / "a.pt", words=("TorchScript", "state_dict()"))


def test_tar_archives_are_refused_unread(tmp_path):
    evil = pickle.dumps(_payloads(tmp_path / "mark")["os.system"])
    with tarfile.open(tmp_path / "a.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(evil)
            archive.addfile(member, io.BytesIO(evil))
    _refused(tmp_path / "a.pth", words=("tar archive", "unpack it"))
    assert not (tmp_path / "mark").exists()


def test_messages_print_no_control_characters():
    assert unpickle.one_line("a\x1b[31mb\nc") == "a?[31mb"
    assert len(unpickle.one_line("x" * 1000)) == 160


# --- timm


def test_unknown_timm_names_and_schemes_are_refused_with_the_known_ones():
    for name in ("timm:no_such_model", "timm:hf-hub:someone/something", "timm:local-dir:/tmp", "timm:"):
        _refused(name, words=("timm:twins_pcpvt_small", "timm:twins_pcpvt_large"))
    _refused("timm:twins_pcpvt_small", which="ema", words=("no EMA",))


def test_failing_download_is_one_line(monkeypatch):
    import timm

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    _refused("timm:twins_pcpvt_small", words=("ConnectionError: no route", "network"))


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    import timm

    return timm.create_model("twins_pcpvt_small", num_classes=7).eval()


def test_timm_name_gives_what_timm_fetched(monkeypatch, small):
    import timm

    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: asked.append((name, kwargs)) or small)
    found, info = weights.read("timm:twins_pcpvt_small.in1k")
    assert asked == [("twins_pcpvt_small.in1k", {"pretrained": True})]
    _assert_same(found, small.state_dict())
    assert info["source"] == "timm" and info["entry"] == "twins_pcpvt_small.in1k"


def test_written_file_gives_timm_equal_logits(tmp_path, small):
    import timm

    params = {name: value.detach() for name, value in small.named_parameters()}
    path = tmp_path / "out.safetensors"
    weights.write_timm(params, path, {"classes": "[]"})
    assert list(tmp_path.iterdir()) == [path]
    theirs = timm.create_model("twins_pcpvt_small", num_classes=7, checkpoint_path=str(path)).eval()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(image), small(image), rtol=0, atol=0)
    found, notes = weights.fit(weights.read(path)[0], small.state_dict(), head="exact", path=str(path))
    _assert_same(found, params)
    assert notes == []


def test_written_file_takes_views_and_keeps_metadata(tmp_path):
    flat = torch.arange(8.0)
    params = {"norm.weight": flat[:4], "norm.bias": flat[4:], "head.weight": flat.view(2, 4).T}
    weights.write_timm(params, tmp_path / "a.safetensors", {"note": "hello"})
    _assert_same(weights.read(tmp_path / "a.safetensors")[0], params)
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "hello"}


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    weights.write_timm(_leaves(0), path)

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        weights.write_timm(_leaves(1), path)
    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]
    _assert_same(weights.read(path)[0], _leaves(0))


def test_file_is_flushed_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    is_folder = lambda number: os.path.isdir(f"/proc/self/fd/{number}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda n: (calls.append("folder" if is_folder(n) else "file"), fsync(n)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    weights.write_timm(_leaves(), tmp_path / "a.safetensors")
    assert calls == ["file", "rename", "folder"]


def test_names_and_folders_that_cannot_work_are_refused_before_writing(tmp_path):
    for path in (tmp_path / "a.pth", tmp_path / "none" / "a.safetensors"):
        with pytest.raises(UserError, match=path.name):
            weights.write_timm(_leaves(), path)
    assert list(tmp_path.iterdir()) == []


# --- fitting


def _fit(found: dict, expected: dict, head: str = "replace") -> tuple[dict, list[str]]:
    return weights.fit(found, expected, head=head, path="file.pth")


def _misfit(found: dict, expected: dict, head: str = "replace") -> str:
    with pytest.raises(UserError) as caught:
        _fit(found, expected, head)
    assert str(caught.value).startswith("file.pth: ") and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("head", ["replace", "exact"])
def test_equal_names_and_shapes_fit_in_the_order_of_the_model(head):
    sizes = {name: value.shape for name, value in reversed(_leaves().items())}
    found, notes = _fit(_leaves(), sizes, head)
    assert list(found) == list(sizes)
    _assert_same(found, dict(reversed(_leaves().items())))
    assert notes == (["head: kept, 3 classes in the file and here"] if head == "replace" else [])


def test_head_of_another_class_count_is_left_out_and_noted():
    expected = {**_leaves(), "head.weight": torch.zeros(10, 4), "head.bias": torch.zeros(10)}
    found, notes = _fit(_leaves(), expected)
    assert list(found) == ["norm.weight", "blocks.0.0.attn.q.weight"]
    assert notes == ["head: 3 classes in the file, 10 here: replaced by a fresh one"]
    message = _misfit(_leaves(), expected, "exact")
    assert "head.weight is (3, 4), not (10, 4)" in message and "config.num_classes=3" in message


def test_file_without_a_head_gets_a_fresh_one_only_when_it_may():
    headless = {name: value for name, value in _leaves().items() if not name.startswith("head.")}
    found, notes = _fit(headless, _leaves())
    assert found.keys() == headless.keys() and "fresh" in notes[0]
    assert "missing head.weight; missing head.bias" in _misfit(headless, _leaves(), "exact")
    assert _fit(_leaves(), headless)[0].keys() == headless.keys()


def test_head_of_another_width_is_a_misfit_not_a_new_head():
    assert "head.weight is (3, 5), not (3, 4)" in _misfit({**_leaves(), "head.weight": torch.ones(3, 5)}, _leaves())
    half = {name: value for name, value in _leaves().items() if name != "head.weight"}
    assert "missing head.weight" in _misfit(half, _leaves())


def test_16_bit_weights_become_float32_with_a_note_and_float64_stays():
    double = {name: value.double() for name, value in _leaves().items()}
    found, notes = _fit(double, _leaves())
    _assert_same(found, double)
    assert all(value.dtype == torch.float64 for value in found.values()) and notes[1:] == []
    found, notes = _fit({**_leaves(), "norm.weight": torch.ones(4, dtype=torch.bfloat16)}, _leaves(), "exact")
    assert found["norm.weight"].dtype == torch.float32 and "bfloat16" in notes[0]


def test_whole_numbers_are_not_weights():
    found = {**_leaves(), "norm.weight": torch.ones(4, dtype=torch.int64)}
    assert "norm.weight is (4,) int64, not (4,)" in _misfit(found, _leaves())


def test_misfits_of_every_kind_are_listed_ten_at_most():
    found = {f"theirs.{i}": torch.ones(1) for i in range(30)} | {"shared": torch.ones(2)}
    expected = {f"ours.{i}": torch.ones(1) for i in range(16)} | {"shared": torch.ones(3)}
    message = _misfit(found, expected, "exact")
    listed = message.split("does not fit the model: ")[1].split(": ")[0].split("; ")
    assert len(listed) == 11 and listed[-1] == "... and 37 more"
    assert listed[:3] == ["missing ours.0", "unexpected theirs.0", "shared is (2,), not (3,)"]


def _sized(depths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"blocks.{s}.{i}.norm1.weight": torch.ones(2) for s, n in enumerate(depths) for i in range(n)}


@pytest.mark.parametrize(
    ("depths", "name"),
    [((3, 4, 6, 3), "pcpvt_s"), ((3, 4, 18, 3), "pcpvt_b"), ((3, 8, 27, 3), "pcpvt_l"), ((2, 1, 1, 1), "pcpvt_nano")],
)
def test_another_size_of_the_family_is_named_with_the_field_to_set(depths, name):
    message = _misfit(_sized(depths), _sized((1, 1, 1, 1)))
    assert message.endswith(f"looks like {name}: use --config.model.name={name}")


def test_other_depths_are_told_and_equal_depths_are_not_guessed_at():
    assert "the file has (1, 2) blocks per stage, the model (3, 4, 6, 3)" in _misfit(
        _sized((1, 2)), _sized((3, 4, 6, 3))
    )
    message = _misfit(_sized((3, 4, 6, 3)) | {"extra": torch.ones(1)}, _sized((3, 4, 6, 3)))
    assert "looks like" not in message and message.endswith("or give a Twins-PCPVT file")
