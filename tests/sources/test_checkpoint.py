"""Checkpoints: good ones in every usual wrapping, bad ones refused by name, nothing ever run."""

from __future__ import annotations

import builtins
import ctypes
import functools
import importlib
import json
import marshal
import os
import pickle
import runpy
import shutil
import struct
import subprocess
import tarfile
import tempfile
import timeit
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from equipoise.errors import (
    IncompatibleError,
    NonFiniteError,
    SourceError,
    UnsafeCheckpointError,
)
from equipoise.sources.checkpoint import load_weights, read_checkpoint, require_finite_weights


class Reduced:
    """Pickles as a call of ``function``: what a hostile file does."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


def hostile(marker: str, folder: Path) -> dict[str, Reduced]:
    """Calls by name; those that can would leave the file ``marker``."""
    (folder / "script.py").write_text(f"open({marker!r}, 'w')")
    touch = f"open({marker!r}, 'w')"
    return {
        "system": Reduced(os.system, f"touch {marker}"),
        "popen": Reduced(os.popen, f"touch {marker}"),
        "mkdir": Reduced(os.mkdir, marker),
        "symlink": Reduced(os.symlink, "/", marker),
        "call": Reduced(subprocess.call, ["touch", marker]),
        "check_output": Reduced(subprocess.check_output, ["touch", marker]),
        "run": Reduced(subprocess.run, ["touch", marker]),
        "Popen": Reduced(subprocess.Popen, ["touch", marker]),
        "eval": Reduced(builtins.eval, touch),
        "exec": Reduced(builtins.exec, touch),
        "open": Reduced(builtins.open, marker, "w"),
        "__import__": Reduced(builtins.__import__, "antigravity"),
        "import_module": Reduced(importlib.import_module, "script"),
        "run_path": Reduced(runpy.run_path, str(folder / "script.py")),
        "timeit": Reduced(timeit.timeit, touch),
        "copyfile": Reduced(shutil.copyfile, str(folder / "script.py"), marker),
        "loads": Reduced(marshal.loads, b"N"),
        "partial": Reduced(functools.partial, os.system, f"touch {marker}"),
        "SimpleNamespace": Reduced(types.SimpleNamespace),
        "CDLL": Reduced(ctypes.CDLL, "libc.so.6"),
        "NamedTemporaryFile": Reduced(tempfile.NamedTemporaryFile),
        "save": Reduced(torch.save, 1, marker),
        "load": Reduced(torch.load, marker),
        "tofile": Reduced(np.save, marker, 1),
    }


NAMES = sorted(hostile("marker", Path(tempfile.mkdtemp(prefix="equipoise-"))))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", NAMES)
def test_a_global_that_is_no_weight_is_named_and_never_called(
    tmp_path: Path, name: str, protocol: int
) -> None:
    """In any protocol, in a zip file of torch.save and in a bare pickle, beside good weights."""
    marker = tmp_path / "marker"
    content = {"w": torch.ones(2), "x": hostile(str(marker), tmp_path)[name]}
    torch.save(content, tmp_path / "zip.pt", pickle_protocol=protocol)
    old = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": False}
    torch.save(content, tmp_path / "old.pth", **old)
    (tmp_path / "bare.bin").write_bytes(pickle.dumps({"x": content["x"]}, protocol=protocol))
    for file in ("zip.pt", "old.pth", "bare.bin"):
        with pytest.raises(UnsafeCheckpointError, match=rf"{file} holds .*not weights: \w") as e:
            read_checkpoint(tmp_path / file)
        assert "safetensors" in e.value.hint
    assert not os.path.lexists(marker)


def test_posix_system_is_told_by_that_name(tmp_path: Path) -> None:
    """The words of the message, once in full."""
    torch.save({"x": Reduced(os.system, "true")}, tmp_path / "w.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"w\.pt holds code, not weights: posix\.sys"):
        read_checkpoint(tmp_path / "w.pt")


def test_whole_modules_and_torchscript_are_code(tmp_path: Path) -> None:
    """Both are common, and both are refused for what they are."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"a whole module.*torch\.nn\.modules\.linear"):
        read_checkpoint(tmp_path / "module.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(UnsafeCheckpointError, match="TorchScript: code"):
        read_checkpoint(tmp_path / "script.pt")


def test_tar_archives_of_ancient_versions_are_refused(tmp_path: Path) -> None:
    """PyTorch can read them without protection only."""
    with tarfile.open(tmp_path / "w.pt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(UnsafeCheckpointError, match="tar archive"):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("value", [[1, 2], 3, {}, {"a": 3}, {"a": {"b": torch.ones(1)}}, {1: "a"}])
def test_what_is_no_state_dict_is_told_by_its_type(tmp_path: Path, value: object) -> None:
    """Lists, numbers, empty dicts, dicts of something else."""
    torch.save(value, tmp_path / "w.pt")
    with pytest.raises(SourceError, match=r"w\.pt holds (\w+|an empty dict|no state dict).*") as e:
        read_checkpoint(tmp_path / "w.pt")
    assert not isinstance(e.value, UnsafeCheckpointError)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_empty_missing_damaged_and_truncated_files_are_named(tmp_path: Path, suffix: str) -> None:
    """Never anything but a SourceError with the name of the file."""
    file = tmp_path / f"w{suffix}"
    with pytest.raises(SourceError, match="no such file"):
        read_checkpoint(file)
    file.write_bytes(b"")
    with pytest.raises(SourceError, match=rf"w{suffix} is empty"):
        read_checkpoint(file)
    whole = tmp_path / f"whole{suffix}"
    tensors = {"w": torch.arange(64.0), "b": torch.ones(3)}
    save_file(tensors, whole) if suffix == ".safetensors" else torch.save(tensors, whole)
    data = whole.read_bytes()
    rubbish = np.random.default_rng(0).bytes(400)
    for bad in (b"junk" * 9, rubbish, *(data[: len(data) * i // 8] for i in range(1, 8))):
        file.write_bytes(bad)
        with pytest.raises(SourceError, match=f"w{suffix}"):
            read_checkpoint(file)


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    """The allowed ones are listed."""
    (tmp_path / "w.ckpt").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"\.safetensors, \.pth, \.pt, \.bin"):
        read_checkpoint(tmp_path / "w.ckpt")


def repack(path: Path, changes: dict[str, bytes], *, twice: str = "") -> None:
    """Rewrite members of a zip file of torch.save by the end of their names."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            changed = next((new for end, new in changes.items() if name.endswith(end)), data)
            archive.writestr(name, changed)
            if twice and name.endswith(twice):
                with pytest.warns(UserWarning, match="Duplicate name"):
                    archive.writestr(name, changed)


def test_storage_of_another_size_than_declared_is_refused(tmp_path: Path) -> None:
    """It once corrupted memory."""
    torch.save({"w": torch.ones(100)}, tmp_path / "w.pt")
    repack(tmp_path / "w.pt", {"data/0": b"\0" * 8})
    with pytest.raises(SourceError, match=r"w\.pt is damaged"):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02]K\x01K\x02s.",  # SETITEM on a list
        b"\x80\x02K\x07(K\x01K\x02u.",  # SETITEMS on a number
        b"\x80\x02}K\x01a.",  # APPEND to a dict
        b"\x80\x02.",  # STOP on an empty stack
        b"\x80\x02h\x09.",  # a memo that is not there
        b"\x80\x02U\xffabc.",  # a string longer than the file
    ],
)
def test_pickles_that_break_the_rules_are_damaged(tmp_path: Path, code: bytes) -> None:
    """The restricted unpickler finds them; the message does not advise to read them unsafely."""
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    repack(tmp_path / "w.pt", {"data.pkl": code})
    with pytest.raises(SourceError, match=r"w\.pt is damaged") as raised:
        read_checkpoint(tmp_path / "w.pt")
    assert "weights_only" not in str(raised.value)


def test_members_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    """Two readers of such a file may see two models."""
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    repack(tmp_path / "w.pt", {}, twice="data.pkl")
    with pytest.raises(SourceError, match=r"data\.pkl' twice"):
        read_checkpoint(tmp_path / "w.pt")


def test_sparse_indices_out_of_range_are_refused_and_good_ones_made_dense(tmp_path: Path) -> None:
    """PyTorch checks them only when asked."""
    good = torch.eye(3).to_sparse()
    torch.save({"w": good}, tmp_path / "good.pt")
    assert torch.equal(read_checkpoint(tmp_path / "good.pt")["w"], torch.eye(3))
    bad = torch.sparse_coo_tensor(
        torch.tensor([[0, 99], [0, 1]]), torch.ones(2), (3, 3), check_invariants=False
    )
    torch.save({"w": bad}, tmp_path / "bad.pt")
    with pytest.raises(SourceError, match=r"bad\.pt is damaged"):
        read_checkpoint(tmp_path / "bad.pt")


def test_a_protocol_that_cannot_be_read_safely_says_so(tmp_path: Path) -> None:
    """Good weights in protocol 4: no accusation, and what to do."""
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt", pickle_protocol=4)
    with pytest.raises(SourceError, match="protocol") as raised:
        read_checkpoint(tmp_path / "w.pt")
    assert not isinstance(raised.value, UnsafeCheckpointError)
    assert "2" in raised.value.hint


def test_protection_that_is_switched_off_is_refused(tmp_path: Path, monkeypatch) -> None:
    """By the environment, or by an old PyTorch; safetensors need neither."""
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UnsafeCheckpointError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        read_checkpoint(tmp_path / "w.pt")
    assert set(read_checkpoint(tmp_path / "w.safetensors")) == {"w"}
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(IncompatibleError, match=r"2\.9\.1.*2\.10"):
        read_checkpoint(tmp_path / "w.pt")


def header(text: bytes, *, body: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensors(**changes: object) -> bytes:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}
    return header(json.dumps({"w": entry}).encode())


ABUSES = {
    "length beyond the file": header(b"{}", length=10**6),
    "length of exabytes": header(b"{}", length=2**63),
    "no JSON": header(b"{'w'"),
    "no object": header(b"[1, 2]"),
    "no UTF-8": header(b'{"\xff\xfe": 1}'),
    "offsets beyond the file": tensors(data_offsets=[0, 10**9], shape=[250000000]),
    "offsets reversed": tensors(data_offsets=[16, 0]),
    "offsets negative": tensors(data_offsets=[-16, 0]),
    "offsets of another size": tensors(data_offsets=[0, 8]),
    "shape of another size": tensors(shape=[5]),
    "shape that overflows": tensors(shape=[2**62, 2**62]),
    "unknown dtype": tensors(dtype="F31"),
    "no dtype": header(b'{"w": {"shape": [4], "data_offsets": [0, 16]}}'),
    "a hole": tensors(data_offsets=[8, 24]),
    "trailing bytes": header(
        b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', body=b"\0" * 99
    ),
    "overlap": header(
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},'
        b' "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'
    ),
    "deep nesting": header(b"[" * 100000),
    "a pickle": pickle.dumps({"w": 1}),
}


@pytest.mark.parametrize("abuse", ABUSES)
def test_abused_safetensors_headers_are_refused(tmp_path: Path, abuse: str) -> None:
    """One error, with the name of the file."""
    (tmp_path / "w.safetensors").write_bytes(ABUSES[abuse])
    with pytest.raises(SourceError, match=r"w\.safetensors"):
        read_checkpoint(tmp_path / "w.safetensors")


def test_good_weights_are_read_in_every_usual_wrapping(tmp_path: Path) -> None:
    """Suffixes, the old format, nesting under three names, prefixes of two wrappers."""
    plain = {"dense.weight": torch.arange(6.0).reshape(2, 3), "dense.bias": torch.ones(2)}
    prefixed = {f"module.{name}": value for name, value in plain.items()}
    compiled = {f"_orig_mod.{name}": value for name, value in plain.items()}
    save_file(plain, tmp_path / "a.safetensors")
    torch.save(plain, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    wrapped = [plain, prefixed, compiled, {"state_dict": plain, "epoch": 3}, {"model": prefixed}]
    for index, content in enumerate([*wrapped, {"model_state_dict": plain, "loss": 0.5}]):
        torch.save(content, tmp_path / f"{index}.pth")
    parameters = torch.nn.Linear(3, 2).state_dict(keep_vars=True)
    torch.save(parameters, tmp_path / "c.bin")
    assert not read_checkpoint(tmp_path / "c.bin")["weight"].requires_grad
    for file in sorted(tmp_path.iterdir()):
        if file.name != "c.bin":
            found = read_checkpoint(file)
            assert {n: v.tolist() for n, v in found.items()} == {
                n: v.tolist() for n, v in plain.items()
            }, file.name


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    """Missing, unexpected and wrongly shaped, the first few of each."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    given = {f"extra.{i}": torch.ones(1) for i in range(6)} | {"0.weight": torch.ones(2, 5)}
    save_file(given, tmp_path / "w.safetensors")
    with pytest.raises(SourceError) as raised:
        load_weights(module, tmp_path / "w.safetensors")
    assert raised.value.message.endswith(
        "w.safetensors does not fit the model: missing: 0.bias, 1.bias, 1.running_mean,"
        " 1.running_var and 1 more; unexpected: extra.0, extra.1, extra.2, extra.3 and 2 more;"
        " of another shape: 0.weight is [2, 5], the model has [2, 3]"
    )


def test_tied_weights_and_counters_may_be_missing(tmp_path: Path) -> None:
    """safetensors stores a tied tensor once, and old files count no batches."""
    module = torch.nn.ModuleList(
        [torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False), torch.nn.BatchNorm1d(3)]
    )
    module[1].weight = module[0].weight
    state = {n: v.clone() + 1 for n, v in module.state_dict().items()}
    del state["1.weight"], state["2.num_batches_tracked"]
    save_file(state, tmp_path / "w.safetensors")
    load_weights(module, tmp_path / "w.safetensors")
    assert torch.equal(module[1].weight, state["0.weight"])
    assert module[1].weight is module[0].weight


def test_weights_that_are_not_finite_are_counted() -> None:
    """Parameters and buffers by name; infinity in a buffer is a mask."""
    module = torch.nn.Linear(3, 2)
    module.register_buffer("mask", torch.full((3, 3), float("-inf")))
    require_finite_weights(module, what="w.pt")
    module.weight.data[0, :2] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(NonFiniteError, match=r"w\.pt: 2 of 6 .*'weight'"):
        require_finite_weights(module, what="w.pt")
    module.weight.data.zero_()
    module.mask[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"1 of 9 .*'mask'"):
        require_finite_weights(module, what="w.pt")
