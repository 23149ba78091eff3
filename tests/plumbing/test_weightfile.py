"""Weight files are data and never code."""
import json
import os
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from plumbing import training, weightfile
from plumbing.cli import UserError


def tensors():
    return {"a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(3, dtype=torch.float16), "none": torch.empty(0, 4),
            "i": torch.tensor(5), "bf": torch.ones(2, dtype=torch.bfloat16)}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name


def test_safetensors_round_trip(tmp_path):
    weightfile.write_safetensors(tmp_path / "w", tensors())
    same(weightfile.read_file(tmp_path / "w"), tensors())


def test_torch_files_are_read_without_executing_them(tmp_path):
    parameter = {"state_dict": {**tensors(), "p": torch.nn.Parameter(torch.ones(2))}, "epoch": 3}
    torch.save(parameter, tmp_path / "w")
    found = weightfile.read_file(tmp_path / "w")
    same(found, {**tensors(), "p": torch.ones(2)})


def test_a_transposed_view_and_shared_storage_survive(tmp_path):
    t = torch.arange(12.0).view(3, 4)
    torch.save({"t": t.T, "row": t[1], "again": t}, tmp_path / "w")
    same(weightfile.read_file(tmp_path / "w"), {"t": t.T, "row": t[1], "again": t})


def test_writing_to_a_mapped_tensor_does_not_reach_the_file(tmp_path):
    weightfile.write_safetensors(tmp_path / "w", tensors())
    weightfile.read_file(tmp_path / "w")["a"].fill_(7)
    same(weightfile.read_file(tmp_path / "w"), tensors())


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
    for read in (weightfile.read_file, training.load_checkpoint):
        with pytest.raises(UserError, match="evil.pth"):
            read("evil.pth")
    with pytest.raises(UserError, match="posix.system|nt.system|builtin.*eval"):
        weightfile.read_file("evil.pth")
    assert not os.path.exists("executed")


def test_a_getattr_in_a_pickle_does_nothing(tmp_path, monkeypatch):
    """Real mmengine checkpoints hold one; it must not lead anywhere."""
    monkeypatch.chdir(tmp_path)
    payload = b"\x80\x02cbuiltins\ngetattr\ncbuiltins\ngetattr\nX\x09\0\0\0__class__\x86R."
    with zipfile.ZipFile("w.pth", "w") as z:
        z.writestr("archive/data.pkl", payload)
    with pytest.raises(UserError, match="no tensors"):
        weightfile.read_file("w.pth")


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
    same(weightfile.read_file(tmp_path / "w.pth"), {"w": torch.ones(2)})


@pytest.mark.parametrize("spoil, message", [
    (lambda b: b[:40], "cut|damaged"), (lambda b: b[:-3], "cut"), (lambda b: struct.pack("<Q", 1 << 60) + b[8:], "claims"),
    (lambda b: b.replace(b"[0, 24]", b"[4, 28]"), "damaged"), (lambda b: b.replace(b"[2, 3]", b"[9, 3]"), "damaged"),
    (lambda b: b.replace(b'"F32"', b'"F99"'), "damaged"), (lambda b: b"garbage" * 9, "neither"), (lambda b: b"", "empty")])
def test_damaged_safetensors_are_one_line(tmp_path, spoil, message):
    weightfile.write_safetensors(tmp_path / "w", {"a": torch.arange(6.0).view(2, 3)})
    (tmp_path / "bad").write_bytes(spoil((tmp_path / "w").read_bytes()))
    with pytest.raises(UserError, match=message) as e:
        weightfile.read_file(tmp_path / "bad")
    assert "bad" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("cut", [30, 200, 1200, -30])
def test_a_cut_torch_file_is_one_line(tmp_path, cut):
    torch.save({"a": torch.ones(300)}, tmp_path / "w")
    (tmp_path / "bad").write_bytes((tmp_path / "w").read_bytes()[:cut])
    with pytest.raises(UserError, match="bad"):
        weightfile.read_file(tmp_path / "bad")


def test_a_storage_that_claims_more_than_the_file_has_is_refused(tmp_path):
    torch.save({"a": torch.ones(300)}, tmp_path / "w")
    with zipfile.ZipFile(tmp_path / "w") as old, zipfile.ZipFile(tmp_path / "bad", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:40] if "/data/" in name else content)
    with pytest.raises(UserError, match="does not hold 300 numbers"):
        weightfile.read_file(tmp_path / "bad")


@pytest.mark.parametrize("shape, offsets", [("Infinity", "0, 4"), ("0, 1180591620717411303424", "0, 0"), ("1", "0, 4, 8"), ("1", "4"), ('"x"', "0, 4")])
def test_absurd_safetensors_headers_are_one_line(tmp_path, shape, offsets):
    header = f'{{"a": {{"dtype": "F32", "shape": [{shape}], "data_offsets": [{offsets}]}}}}'.encode()
    (tmp_path / "bad").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match="bad.*damaged"):
        weightfile.read_file(tmp_path / "bad")


def test_a_pickle_that_contains_itself_is_one_line(tmp_path):
    loop = {"w": torch.ones(2)}
    loop["self"] = loop
    torch.save(loop, tmp_path / "bad")
    with pytest.raises(UserError, match="bad.*damaged"):
        weightfile.read_file(tmp_path / "bad")


@pytest.mark.parametrize("weight_map", [["a"], {"a": 3}, None])
def test_an_index_of_shards_that_is_none_is_one_line(tmp_path, weight_map):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="weight_map"):
        weightfile.read_tensors(tmp_path)


def test_a_shard_outside_its_folder_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    weightfile.write_safetensors(tmp_path / "secret.safetensors", tensors())
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside its own folder"):
        weightfile.read_tensors(tmp_path / "model")


def test_a_load_that_does_not_fit_is_a_line_with_the_likely_reason_and_a_table_of_the_offenders():
    module = torch.nn.Linear(2, 3)
    with pytest.raises(UserError) as e:
        weightfile.load_into(module, {"weight": torch.zeros(3, 5), "x.lora_A": torch.zeros(1)}, "file.bin")
    assert str(e.value).splitlines() == [
        "file.bin: does not fit this model: 1 missing, 1 unexpected, 1 of another size; "
        "it looks like an adapter (LoRA), not a whole model: merge it into its model first",
        "                   name      in the file  in the model",
        "  missing          bias      -            (3,)",
        "  unexpected       x.lora_A  (1,)         -",
        "  of another size  weight    (3, 5)       (3, 2)"]


def test_a_table_ends_after_ten_rows_and_says_how_many_more_there_are():
    with pytest.raises(UserError, match="28 unexpected") as e:
        weightfile.load_into(torch.nn.Identity(), {f"t{i}": torch.zeros(1) for i in range(28)}, "file.bin")
    lines = str(e.value).splitlines()
    assert len(lines) == 13 and lines[-1] == "  ... and 18 more"


@pytest.mark.parametrize("name, reason", [
    ("model.layers.0.self_attn.q_proj.bias", "Qwen 2"), ("model.layers.0.self_attn.q_norm.weight", "Qwen 3"),
    ("model.layers.0.mlp.experts.0.w1.weight", "mixture of experts"), ("model.layers.0.mlp.up_proj.qweight", "quantised"),
    ("language_model.model.norm.weight", "original release"), ("transformer.h.0.ln_1.weight", "GPT"),
    ("bert.encoder.layer.0.output.dense.weight", "text encoder"), ("down_blocks.0.resnets.0.conv1.weight", "UNet"),
    ("layers.0.attention.wq.weight", "Meta's layout"), ("vision_model.post_layernorm.bias", "a CLIP")])
def test_the_likely_reason_is_told_from_the_names_that_are_left_over(name, reason):
    with pytest.raises(UserError, match=reason):
        weightfile.load_into(torch.nn.Identity(), {name: torch.zeros(1)}, "file.bin")


def test_a_name_from_a_file_cannot_speak_to_the_terminal():
    with pytest.raises(UserError) as e:
        weightfile.load_into(torch.nn.Identity(), {"a\x1b[2J\nb" + "c" * 500: torch.zeros(1)}, "file.bin")
    assert "\x1b" not in str(e.value) and max(map(len, str(e.value).splitlines())) < 160


@pytest.mark.parametrize("size", [(4096, 1024), (64, 64)])
def test_a_cut_torch_file_says_how_long_it_must_have_been(tmp_path, size):
    torch.save({"model.mm_projector.weight": torch.zeros(size), "model.mm_projector.bias": torch.zeros(size[0])}, tmp_path / "w.bin")
    whole = os.path.getsize(tmp_path / "w.bin")
    os.truncate(tmp_path / "w.bin", size[0] * size[1] * 4)
    with pytest.raises(UserError, match=f"cut: {size[0] * size[1] * 4:,} bytes where about .* are expected; download it again") as e:
        weightfile.read_file(tmp_path / "w.bin")
    about = int(str(e.value).split("about ")[1].split()[0].replace(",", ""))
    assert abs(about - whole) < 100


def test_a_cut_safetensors_file_says_how_long_it_must_have_been(tmp_path):
    weightfile.write_safetensors(tmp_path / "w", tensors())
    whole = os.path.getsize(tmp_path / "w")
    os.truncate(tmp_path / "w", whole - 20)
    with pytest.raises(UserError, match=f"cut: {whole - 20} bytes where {whole} are expected"):
        weightfile.read_file(tmp_path / "w")
