"""Flags, files that are never half written, logs, and weight files that are data and never code."""
import dataclasses
import json
import os

import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import common
import weights
from common import UserError


@dataclasses.dataclass
class Config:
    """A config as the scripts have them."""
    name: str                # needed
    size: int = 3            # with a 50 % sign
    rate: float = 1e-3       # small
    fast: bool = True        # a switch
    maybe: int | None = None # unset


def test_flags_come_from_the_dataclass():
    assert common.parse(Config, ["--name", "x"]) == Config("x")
    assert common.parse(Config, ["--name", "x", "--size", "4", "--rate", "2e-6", "--no-fast", "--maybe", "7"]) == Config("x", 4, 2e-6, False, 7)
    assert common.parse(Config, ["x", "-s", "9"], positional=["name"], short={"size": "s"}) == Config("x", 9)


def test_help_shows_the_comments_and_defaults(capsys):
    with pytest.raises(SystemExit) as left:
        common.parse(Config, ["--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and "with a 50 % sign (default: 3)" in out and "needed (required)" in out


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(f):
        f.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        common.write_atomic(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        common.write_atomic(tmp_path / "nowhere" / "file", lambda f: None)


def test_log_drops_what_came_after_the_checkpoint_and_half_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    log = common.Log(path, 1)
    log.add(step=2, loss=9)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "loss": 3}, {"step": 2, "loss": 9}]
    assert log.column("loss") == [(1, 3), (2, 9)]


def test_random_numbers_of_a_step_follow_from_seed_step_and_rank():
    draws = set()
    for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        common.seed_step(*key)
        first = torch.rand(1).item()
        common.seed_step(*key)
        assert torch.rand(1).item() == first
        draws.add(first)
    assert len(draws) == 4


def test_warmup_and_cosine():
    share = [common.warmup_cosine(s, 100, 10) for s in range(100)]
    assert share[0] == 0.1 and share[9] == share[10] == 1 and share[55] == pytest.approx(0.5) and 0 < share[99] < 0.01


def test_a_plot_is_drawn_also_of_one_point_nothing_and_nan(tmp_path):
    common.plot(tmp_path / "p.png", [("a", {"x": [(0, 1.0), (1, float("nan")), (2, 3.0)]}), ("b", {"y": [(1, 1)]}), ("c", {})])
    picture = Image.open(tmp_path / "p.png")
    assert picture.size == (900, 1080) and len(picture.getcolors(1 << 20)) > 10


# ---------------------------------------------------------------------------------------------------- weight files
def tensors():
    return {"a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(3, dtype=torch.float16), "none": torch.empty(0, 4),
            "i": torch.tensor(5), "bf": torch.ones(2, dtype=torch.bfloat16)}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name


def test_safetensors_round_trip(tmp_path):
    weights.write_safetensors(tmp_path / "w", tensors())
    same(weights.read_file(tmp_path / "w"), tensors())


def test_torch_files_are_read_without_executing_them(tmp_path):
    parameter = {"state_dict": {**tensors(), "p": torch.nn.Parameter(torch.ones(2))}, "epoch": 3}
    torch.save(parameter, tmp_path / "w")
    found = weights.read_file(tmp_path / "w")
    same(found, {**tensors(), "p": torch.ones(2)})


def test_a_transposed_view_and_shared_storage_survive(tmp_path):
    t = torch.arange(12.0).view(3, 4)
    torch.save({"t": t.T, "row": t[1], "again": t}, tmp_path / "w")
    same(weights.read_file(tmp_path / "w"), {"t": t.T, "row": t[1], "again": t})


def test_writing_to_a_mapped_tensor_does_not_reach_the_file(tmp_path):
    weights.write_safetensors(tmp_path / "w", tensors())
    weights.read_file(tmp_path / "w")["a"].fill_(7)
    same(weights.read_file(tmp_path / "w"), tensors())


class Run:
    def __reduce__(self):
        return os.system, ("touch executed",)


class Evaluate:
    def __reduce__(self):
        return eval, ("open('executed', 'w').close()",)


@pytest.mark.parametrize("attack", [Run(), Evaluate(), {"state_dict": {"w": torch.ones(2), "x": Run()}}])
def test_a_pickle_that_wants_to_run_code_is_refused_by_name(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    torch.save(attack, "evil.pth")
    for read in (weights.read_file, common.load_checkpoint):
        with pytest.raises(UserError, match="evil.pth"):
            read("evil.pth")
    with pytest.raises(UserError, match="posix.system|nt.system|builtin.*eval"):
        weights.read_file("evil.pth")
    assert not os.path.exists("executed")


def test_a_getattr_in_a_pickle_does_nothing(tmp_path, monkeypatch):
    """Real mmengine checkpoints hold one; it must not lead anywhere."""
    monkeypatch.chdir(tmp_path)
    payload = b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\nS'__class__'\ntR."
    with zipfile.ZipFile("w.pth", "w") as z:
        z.writestr("archive/data.pkl", payload)
    with pytest.raises(UserError, match="no tensors"):
        weights.read_file("w.pth")


class HistoryBuffer:
    """As in an mmengine checkpoint: an object of a library that is not here, with numpy inside."""


def test_an_mmengine_checkpoint_is_read_past_its_log(tmp_path, monkeypatch):
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer, HistoryBuffer.__module__ = HistoryBuffer, module.__name__
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    buffer = HistoryBuffer()
    buffer.__dict__ = {"_log_history": np.arange(3.0), "_max_length": 10, "last": np.float64(2.5), "call": getattr}
    torch.save({"meta": {"epoch": 1}, "message_hub": {"log_scalars": {"loss": buffer}}, "state_dict": {"w": torch.ones(2)}}, tmp_path / "w.pth")
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    same(weights.read_file(tmp_path / "w.pth"), {"w": torch.ones(2)})


@pytest.mark.parametrize("spoil, message", [
    (lambda b: b[:40], "cut|damaged"), (lambda b: b[:-3], "cut"), (lambda b: struct.pack("<Q", 1 << 60) + b[8:], "claims"),
    (lambda b: b.replace(b"[0, 24]", b"[4, 28]"), "damaged"), (lambda b: b.replace(b"[2, 3]", b"[9, 3]"), "damaged"),
    (lambda b: b.replace(b'"F32"', b'"F99"'), "damaged"), (lambda b: b"garbage" * 9, "neither"), (lambda b: b"", "empty")])
def test_damaged_safetensors_are_one_line(tmp_path, spoil, message):
    weights.write_safetensors(tmp_path / "w", {"a": torch.arange(6.0).view(2, 3)})
    (tmp_path / "bad").write_bytes(spoil((tmp_path / "w").read_bytes()))
    with pytest.raises(UserError, match=message) as e:
        weights.read_file(tmp_path / "bad")
    assert "bad" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("cut", [30, 200, 1200, -30])
def test_a_cut_torch_file_is_one_line(tmp_path, cut):
    torch.save({"a": torch.ones(300)}, tmp_path / "w")
    (tmp_path / "bad").write_bytes((tmp_path / "w").read_bytes()[:cut])
    with pytest.raises(UserError, match="bad"):
        weights.read_file(tmp_path / "bad")


def test_a_storage_that_claims_more_than_the_file_has_is_refused(tmp_path):
    torch.save({"a": torch.ones(300)}, tmp_path / "w")
    with zipfile.ZipFile(tmp_path / "w") as old, zipfile.ZipFile(tmp_path / "bad", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:40] if "/data/" in name else content)
    with pytest.raises(UserError, match="does not hold"):
        weights.read_file(tmp_path / "bad")


@pytest.mark.parametrize("shape, offsets", [("Infinity", "0, 4"), ("0, 1180591620717411303424", "0, 0"), ("1", "0, 4, 8"), ("1", "4"), ('"x"', "0, 4")])
def test_absurd_safetensors_headers_are_one_line(tmp_path, shape, offsets):
    header = f'{{"a": {{"dtype": "F32", "shape": [{shape}], "data_offsets": [{offsets}]}}}}'.encode()
    (tmp_path / "bad").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match="bad.*damaged"):
        weights.read_file(tmp_path / "bad")


def test_a_pickle_that_contains_itself_is_one_line(tmp_path):
    loop = {"w": torch.ones(2)}
    loop["self"] = loop
    torch.save(loop, tmp_path / "bad")
    with pytest.raises(UserError, match="bad.*damaged"):
        weights.read_file(tmp_path / "bad")


@pytest.mark.parametrize("content", [b"", b"PK", b"not a checkpoint", b"\x80\x02."])
def test_a_damaged_checkpoint_is_one_line(tmp_path, content):
    (tmp_path / "last.pth").write_bytes(content)
    with pytest.raises(UserError, match="last.pth: not a checkpoint"):
        common.load_checkpoint(tmp_path / "last.pth")


@pytest.mark.parametrize("weight_map", [["a"], {"a": 3}, None])
def test_an_index_of_shards_that_is_none_is_one_line(tmp_path, weight_map):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="weight_map"):
        weights.read_tensors(tmp_path)


def test_a_shard_outside_its_folder_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    weights.write_safetensors(tmp_path / "secret.safetensors", tensors())
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside its own folder"):
        weights.read_tensors(tmp_path / "model")


def test_a_load_that_does_not_fit_names_the_offenders(tmp_path):
    module = torch.nn.Linear(2, 3)
    with pytest.raises(UserError) as e:
        weights.load_into(module, {"weight": torch.zeros(3, 5), "other": torch.zeros(1)}, "file.bin")
    assert str(e.value).startswith("file.bin: ")
    for part in ("1 missing: bias", "1 unexpected: other", "weight (3, 5) where (3, 2) is expected"):
        assert part in str(e.value)
