"""Hostile weights: whatever lies in a folder of weights, loading it runs nothing, writes nothing, does not wait, takes little
memory and ends in one clear line."""
import base64
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import chat
from clip import load_clip
from llm import load_llama, save_llama
from model import load_branch
from model import open_chat as load_chat
from plumbing import cli
from plumbing.cli import UserError
from plumbing.weightfile import MAX_HEADER, read_tensors, write_safetensors

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LIMIT = 400 << 20   # bytes of memory that a refusal may take at most


@pytest.fixture(scope="module")
def good(world, tmp_path_factory):
    """A small folder of weights that loads."""
    folder = tmp_path_factory.mktemp("good") / "weights"
    shutil.copytree(world / "clip", folder / "clip")
    shutil.copy(world / "branch.pth", folder)
    llama, _, _ = load_llama(str(world / "llama"))
    projector = {"model.mm_projector.weight": torch.zeros(32, 32), "model.mm_projector.bias": torch.zeros(32)}
    save_llama(folder / "llava", llama, world / "tokenizer.model", projector)
    load_chat(folder)
    return folder


@pytest.fixture
def weights(good, tmp_path, monkeypatch):
    """A copy of it to spoil, in a folder of its own that is also where payloads would leave their mark."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(good, tmp_path / "weights")


def everything_in(folder):
    return {(path, os.lstat(os.path.join(path, name)).st_size) for path, folders, files in os.walk(folder) for name in folders + files}


def refused(load, folder, message):
    """Calls load(folder), which must end in a UserError with this message, and in nothing else."""
    before, resident = everything_in("."), begin_peak()
    with pytest.raises(UserError, match=message) as e:
        load(folder)
    first, *rows = str(e.value).splitlines()
    assert str(folder) in first and (not rows or "does not fit" in first) and len(first) < 600 and len(rows) < 14
    assert all(c.isprintable() for line in (first, *rows) for c in line)
    assert everything_in(".") == before
    assert resident is None or peak() - resident < LIMIT


def begin_peak():
    """Lets the kernel forget the most memory that this process had -> bytes that it has now; None where that is not to be had."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        return None
    return peak()


def peak():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


def archive(path, data_pkl, entries={}, how=zipfile.ZIP_STORED):
    """A torch.save file around this pickle."""
    with zipfile.ZipFile(path, "w", how) as z:
        z.writestr("archive/data.pkl", data_pkl)
        for name, content in entries.items():
            z.writestr(name, content)


# ---------------------------------------------------------------------------------------------------- code in pickles
def text(string):
    """A string as an opcode."""
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def by_name(module, name, *arguments):
    """Opcodes that ask for module.name and call it."""
    return f"c{module}\n{name}\n(".encode() + b"".join(map(text, arguments)) + b"tR"


class Calls:
    """Pickles into a call of any function."""
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickled(value, protocol=2):
    return pickle.dumps(value, protocol)


TOUCH = "touch executed"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0%sX\3\0\0\0cpu%stQK\0(%st(%st\x89NtR"
DISGUISES = {   # what it is: the pickle, and what is said about it
    "os.system": (pickled(Calls(os.system, TOUCH)), "posix.system"),
    "subprocess": (pickled({"state_dict": Calls(subprocess.Popen, TOUCH)}), "commands.Popen"),   # its name in Python 2
    "eval": (pickled({"w": Calls(eval, "open('executed', 'w')")}), "eval"),
    "exec beside real tensors": (pickled({"state_dict": {"a": 1}, "epoch": Calls(exec, "open('executed', 'w')")}), "exec"),
    "every protocol's way to name a function": (pickled(Calls(os.system, TOUCH), 4), "posix.system"),
    "a stack global with a dotted name": (b"\x80\x04" + text("os") + text("path.os.system") + b"\x93" + text(TOUCH) + b"\x85R.", "os.path.os.system"),
    "a stack global whose name is a number": (b"\x80\x04K\1K\2\x93.", "name is no text"),
    "a stack global with a line break in its name": (b"\x80\x04" + text("collections\nOrderedDict") + text("\x1b[2J") + b"\x93.", "refused"),
    "a dotted name inside torch": (b"\x80\x02" + by_name("torch", "os.system", TOUCH) + b".", "torch.os.system"),
    "a module that torch has imported": (b"\x80\x02" + by_name("torch.os", "system", TOUCH) + b".", "torch.os.system"),
    "torch.load": (b"\x80\x02" + by_name("torch", "load", "other.pth") + b".", "torch.load"),
    "torch.hub": (b"\x80\x02" + by_name("torch.hub", "load", "a/b", "c") + b".", "torch.hub.load"),
    "torch.utils": (b"\x80\x02" + by_name("torch.utils.collect_env", "run", TOUCH) + b".", "collect_env.run"),
    "a storage's look-alike": (b"\x80\x02" + by_name("torch.storage", "_load_from_bytes", "x") + b".", "_load_from_bytes"),
    "copyreg": (b"\x80\x02ccopyreg\n_reconstructor\n(cos\nsystem\n" + text(TOUCH) + b"NtR.", "copyreg._reconstructor"),
    "a getattr that leads somewhere": (b"\x80\x02cbuiltins\ngetattr\n" + b"cos\nopen\n" + text("x") + b"\x86R.", "os.open"),
    "what getattr gave, called": (b"\x80\x02" + by_name("builtins", "getattr", "os", "system") + text(TOUCH) + b"\x85R.", "not callable"),
    "an import": (b"\x80\x02" + by_name("builtins", "__import__", "os") + b".", "__import__"),
    "a call inside a persistent id": (b"\x80\x02(" + text("storage") + by_name("os", "system", TOUCH) + b"tQ.", "os.system"),
    "a persistent id that is a function": (b"\x80\x02ctorch\nSize\nQ.", "damaged"),
    "a state with a __setstate__ of its own": (
        b"\x80\x02c__torch__\nM\n)\x81}(" + text("__setstate__") + text(TOUCH) + text("__class__") + text("os.system") + b"ub.", "no tensors"),
    "a state for a tensor": (b"\x80\x02ctorch\nFloatStorage\n}b.", "damaged"),
    "a TorchScript class called os.system": (b"\x80\x02" + by_name("__torch__.os", "system", TOUCH) + b".", "no tensors"),
    "an array of objects": (pickled({"a": np.array([Calls(os.system, TOUCH)], dtype=object)}), "posix.system"),
    "an extension code": (b"\x80\x02\x82\x01.", "opcode"), "the opcode INST": (b"(S'touch executed'\nios\nsystem\n.", "opcode"),
    "the opcode OBJ": (b"\x80\x02(cos\nsystem\nX\1\0\0\0ao.", "os.system"), "NEWOBJ_EX": (b"\x80\x04c__torch__\nM\n)}\x92.", "opcode"),
    "an out-of-band buffer": (b"\x80\x05\x97.", "opcode"), "an empty pickle": (b"", "ends in the middle"),
    "an empty stack": (b"\x80\x02.", "damaged"), "no mark": (b"\x80\x02t.", "damaged")}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_code_in_a_pickle_is_refused_and_does_not_run(weights, disguise):
    content, message = DISGUISES[disguise]
    archive(weights / "branch.pth", content)
    refused(load_chat, weights, message)


def old_format(value):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("content, message", [
    (old_format(Calls(os.system, TOUCH)), "before torch 1.6"), (pickled(Calls(os.system, TOUCH)), "a bare pickle"),
    (b"(S'touch executed'\nios\nsystem\n.", "neither"), (b"#!/bin/sh\n" + TOUCH.encode(), "neither"), (b"GGUF" + bytes(99), "llama.cpp"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"), (b"<!DOCTYPE html><html>", "web page"), (b"", "empty"), (b"P", "neither")])
def test_files_that_are_no_weights_are_refused_for_what_they_are(weights, content, message):
    (weights / "branch.pth").write_bytes(content)
    refused(load_chat, weights, f"branch.pth: .*{message}")


# ---------------------------------------------------------------------------------------------------- bombs in pickles
def tensor(count=b"K\1", shape=b"K\1", stride=b"K\1"):
    """A pickle of one tensor in storage 0."""
    return b"\x80\x02}" + text("w") + TENSOR % (b"0", count, shape, stride) + b"s."


def nest(times, inner=b"}"):
    """{"a": x, "b": x} with x = {"a": y, "b": y} with ..."""
    out = b"\x80\x02" + inner + b"q\0"
    for _ in range(times):
        out += b"}(" + text("a") + b"h\0" + text("b") + b"h\0uq\0"   # the memo's place 0 is always the latest
    return out + b"."


BIG = b"J\xff\xff\xff\x7f"   # 2^31 - 1
BOMBS = {
    "a memo of 2^31 places": (b"\x80\x02}r\xff\xff\xff\x7f.", "no tensors"),
    "bytes that claim 2^60": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.", "ends in the middle"),
    "a text that claims 2^63": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63) + b"x.", "ends in the middle"),
    "a frame that claims 2^64 - 1": (b"\x80\x04\x95" + b"\xff" * 8 + b".", "damaged"),
    "a number of a gigabyte": (b"\x80\x02\x8b\xff\xff\xff\x7f1.", "opcode"),
    "300,000 lists inside each other": (b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".", "no tensors"),
    "300,000 tuples inside each other, as a key": (b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.", "tuple as a key"),
    "pairs for an OrderedDict with such a key": (b"\x80\x02ccollections\nOrderedDict\n]])" + b"\x85" * 10**5 + b"aNaa\x85R.", "tuple as a key"),
    "such tuples as the name of a function": (b"\x80\x04)" + b"\x85" * 300_000 + text("x") + b"\x93.", "name is no text"),
    "2^60 dicts as the name of a storage": (nest(60)[:-1] + b"q\1(" + text("storage") + b"ctorch\nFloatStorage\nh\1" + text("cpu") + b"K\1tQ.", "unknown record"),
    "a tensor as arguments": (b"\x80\x02c__torch__\nM\n" + TENSOR % (b"0", b"K\1", b"K\1", b"K\1") + b"R.", "no tuple"),
    "a tensor as pairs": (b"\x80\x02ccollections\nOrderedDict\n" + TENSOR % (b"0", b"K\1", b"K\1", b"K\1") + b"\x85R.", "than pairs"),
    "a thousand dicts inside each other": (b"\x80\x02" + (b"}" + text("a")) * 10**4 + b"N" + b"s" * 10**4 + b".", "Recursion|nested"),
    "a dict of 2^60 dicts": (nest(60), "nested too deeply"),
    "names that grow to gigabytes": (b"\x80\x02" + text("a" * 10**6) + b"q\1" + b"0" + b"}h\1" * 900 + b"N" + b"s" * 900 + b".", "nested too deeply"),
    "a list of a list of a list, copied": (b"\x80\x02]q\0(" + b"K\1" * 10**5 + b"e" + b"ctorch\nSize\nh\0\x85R" * 10**5 + b".", "no tensors"),
    "a storage of 2^31 numbers": (tensor(BIG), "does not hold"), "a storage of -1 numbers": (tensor(b"J\xff\xff\xff\xff"), "unknown record"),
    "a tensor of stride 0": (tensor(shape=BIG, stride=b"K\0"), "in a storage of 1"), "a tensor beyond its storage": (tensor(shape=b"K\2"), "damaged"),
    "a tensor of negative stride": (tensor(stride=b"J\xff\xff\xff\xff"), "damaged"),
    "a tensor of negative size": (tensor(shape=b"J\xff\xff\xff\xff"), "damaged"),
    "a storage that is not there": (tensor().replace(b"\1\0\0\x000", b"\1\0\0\x007"), "data/7"),
    "a pickle of 9 MB": (b"\x80\x02" + bytes(9 << 20), "no weight file needs")}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_cannot_take_more_memory_than_it_has_bytes(weights, bomb):
    content, message = BOMBS[bomb]
    archive(weights / "branch.pth", content, {"archive/data/0": bytes(4)})
    refused(load_chat, weights, message)


# ---------------------------------------------------------------------------------------------------- zip
def zip_of_claims(path, claim):
    """A zip whose directory goes through claim(bytes)."""
    archive(path, tensor(), {"archive/data/0": bytes(4)})
    content = path.read_bytes()
    start = content.index(b"PK\1\2")
    path.write_bytes(content[:start] + claim(content[start:], start))


def zip64_end(count, at):
    """A directory's end that speaks of more than 2^32."""
    end = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, 0, at)
    return end, b"PK\6\7" + bytes(4), b"PK\5\6" + bytes(18)


def claims_entries(directory, start, count=1 << 60):
    end, locator, last = zip64_end(count, start)
    return end + locator + struct.pack("<QI", start, 1) + last


def in_entry(directory, at, layout, value):
    """The second entry of a directory with another value at a place."""
    entry = directory.index(b"PK\1\2", 4)
    size = struct.calcsize(layout)
    return directory[:entry + at] + struct.pack(layout, value) + directory[entry + at + size:]


def in_second_name(directory, start):
    """The second entry under the name of the first, which is a letter longer than the folder was."""
    second = directory.index(b"PK\1\2", 4)
    return directory[:second] + directory[second:].replace(b"archive/data/0", b"archi/data.pkl")


ZIPS = {
    "2^60 entries": (claims_entries, "files in it"), "a directory behind the end": (lambda d, s: claims_entries(d, 1 << 40, 1), "damaged"),
    "an entry of 4 GB": (lambda d, s: in_entry(d, 20, "<I", 0xFFFFFFFE), "not what its directory says"),
    "an entry that begins behind the end": (lambda d, s: in_entry(d, 42, "<I", 0x7FFFFFFF), "damaged"),
    "entries that overlap": (lambda d, s: in_entry(d, 42, "<I", 0), "overlap"),
    "a packed size that differs": (lambda d, s: in_entry(d, 24, "<I", 1 << 30), "does not hold"),
    "an unknown way of packing": (lambda d, s: in_entry(d, 10, "<H", 99), "does not hold"),
    "the same name twice": (in_second_name, "not what its directory says"),
    "no directory": (lambda d, s: b"", "cut"), "half a directory": (lambda d, s: d[:40], "cut")}


@pytest.mark.parametrize("trick", ZIPS)
def test_the_directory_of_a_zip_is_not_believed(weights, trick):
    claim, message = ZIPS[trick]
    zip_of_claims(weights / "branch.pth", claim)
    refused(load_chat, weights, message)


def test_a_zip_bomb_is_not_unpacked(weights):
    archive(weights / "branch.pth", b"\x80\x02" + bytes(100 << 20), how=zipfile.ZIP_DEFLATED)
    refused(load_chat, weights, "packed, which no weight file needs")


def test_names_in_a_zip_that_lead_elsewhere_lead_nowhere(weights):
    names = {"archive/../../executed": b"1", "/etc/nanobt": b"1", "archive/data/0": bytes(4), "C:\\evil": b"1"}
    archive(weights / "branch.pth", tensor(), names)
    refused(load_chat, weights, "holds no BT-Adapter branch")


# ---------------------------------------------------------------------------------------------------- safetensors
def safetensors(path, header, data=bytes(16), length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def entry(shape=(4,), offsets=(0, 16), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TWICE = b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'
HEADERS = {
    "a header of 2^63 bytes": (b"{}", 1 << 63, "claims"), "a header of 100 MB": (b"{" + b" " * (100 << 20), None, "claims"),
    "a header longer than the file": (b"{}", 1000, "claims"), "lists in lists": (b'{"a":' + b"[" * 10**6, None, "damaged"),
    "a million lists": (b'{"a":[' + b"[]," * 10**6 + b"0]}", None, "damaged"),
    "a name twice": (TWICE, None, "twice"), "an offset below 0": ({"a": entry(offsets=(-16, 0))}, None, "whole numbers"),
    "tensors that overlap": ({"a": entry(), "b": entry()}, None, "damaged"),
    "a hole": ({"a": entry((1,), (0, 4)), "b": entry((2,), (8, 16))}, None, "damaged"),
    "an end before the beginning": ({"a": entry((4,), (16, 0))}, None, "damaged"),
    "an unknown dtype": ({"a": entry(dtype="F8_E4M3")}, None, "numbers of type F8_E4M3"),
    "a dtype that is a list": ({"a": entry(dtype=["F32"])}, None, "damaged"), "a dtype that is a number": ({"a": entry(dtype=8)}, None, "numbers of type 8"),
    "dtypes of two kinds": ({"a": entry(dtype=8), "b": entry(dtype=None)}, None, "numbers of type 8, None"), "no dtype": ({"a": {}}, None, "damaged"),
    "sizes whose product is 2^64": ({"a": entry((1 << 32, 1 << 32), (0, 0))}, None, "damaged"),
    "sizes whose product is 0 and far too large": ({"a": entry((0, 1 << 62), (0, 0))}, None, "damaged"),
    "a size of 10^300": ({"a": entry((10 ** 300,))}, None, "damaged"), "a size of 4.0": ({"a": entry((4.0,))}, None, "whole numbers"),
    "a size of true": ({"a": entry((True, 4))}, None, "whole numbers"),
    "a size of NaN": ({"a": entry((float("nan"),))}, None, "whole numbers"), "a thousand sizes": ({"a": entry([1] * 1000)}, None, "whole numbers"),
    "bytes behind the last tensor": ({"a": entry((1,), (0, 4))}, None, "where .* expected"),
    "a name that speaks to the terminal": ({"\x1b[2J\nroot": entry((3,), (0, 16))}, None, "damaged"), "a list": (b"[]", None, "neither"),
    "text that is not UTF-8": (b'{"\xff\xfe": 1}', None, "damaged")}


@pytest.mark.parametrize("trick", HEADERS)
def test_the_header_of_a_safetensors_file_is_not_believed(weights, trick):
    header, length, message = HEADERS[trick]
    safetensors(weights / "llava" / "model.safetensors", header, length=length)
    refused(load_chat, weights, f"model.safetensors: .*{message}")


@pytest.mark.parametrize("shard", ["../../branch.pth", "/etc/passwd", "..", ".", "", "a/b", "..\\branch.pth", "a\0b", "nowhere.bin", "\x1b[2J/x"])
def test_shards_stay_inside_their_folder(weights, shard):
    (weights / "llava" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(load_chat, weights, "outside its own folder" if shard != "nowhere.bin" else "No such file")


def test_a_tensor_in_two_shards_is_refused(weights):
    for i in (0, 1):
        write_safetensors(weights / "llava" / f"{i}.safetensors", {"a": torch.full((2,), float(i)), f"b{i}": torch.zeros(1)})
    index = {"weight_map": {"a": "1.safetensors", "b0": "0.safetensors", "b1": "1.safetensors"}}
    (weights / "llava" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(load_chat, weights, "in another shard")


# ---------------------------------------------------------------------------------------------------- what is no file
WHERE = ("branch.pth", "chat.bin", "mm_projector.bin", "llava/config.json", "llava/model.safetensors", "llava/tokenizer.model",
         "llava/model.safetensors.index.json", "clip/config.json", "clip/model.safetensors")


@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "empty"])
def test_what_is_no_file_is_refused_and_not_waited_for(weights, name, kind):
    path = weights / name
    path.unlink(missing_ok=True)
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir, "empty": path.touch}[kind]()
    refused(load_chat, weights, "not a regular file|a folder|empty")


def test_a_link_to_itself_is_refused(weights):
    (weights / "branch.pth").unlink()
    (weights / "branch.pth").symlink_to("branch.pth")
    refused(load_chat, weights, "symbolic links")


def test_a_vocabulary_that_is_a_pipe_or_unpacks_to_gigabytes_is_refused(weights):
    merges = weights / "clip" / "merges.txt"
    merges.unlink()
    os.mkfifo(merges)
    refused(load_clip, weights / "clip", "not a regular file")
    merges.unlink()
    merges.write_bytes(gzip.compress(b"#version: 0.2\n" + bytes(200 << 20), 1))
    refused(load_clip, weights / "clip", "too long")


# ---------------------------------------------------------------------------------------------------- descriptions and tokenizers
CONFIGS = {
    "10^9 layers": (dict(num_hidden_layers=10**9), "no such model"), "-1 layers": (dict(num_hidden_layers=-1), "at least 1"),
    "900 layers": (dict(num_hidden_layers=900), "900 layers, but its weights have 2"), "a width of 10^400": (dict(hidden_size=10**400), "no such model"),
    "a width of 2^62": (dict(hidden_size=1 << 62), "no such model"), "a width of infinity": (dict(hidden_size=float("inf")), "infinity"),
    "a width of NaN": (dict(hidden_size=float("nan")), "NaN"), "a width of text": (dict(hidden_size="x" * 10**6), "config.json"),
    "a width that is a list": (dict(hidden_size=[]), "config.json"), "an mlp of 2^40": (dict(intermediate_size=1 << 40), "no such model"),
    "2^40 heads": (dict(num_attention_heads=1 << 40), "no such model|wide"), "a head 2^30 wide": (dict(head_dim=1 << 30), "wide|no such"),
    "an epsilon of NaN": (dict(rms_norm_eps=float("nan")), "norm_eps"), "a negative theta": (dict(rope_theta=-1.0), "rope_theta"),
    "a context of 10^12": (dict(max_position_embeddings=10**12), "no such model"),
    "a stretch of NaN": (dict(rope_scaling={"type": "linear", "factor": float("nan")}), "rope_scaling"),
    "a stretch by 0": (dict(rope_scaling={"type": "linear", "factor": 0}), "rope_scaling"),
    "an epsilon of a million letters": (dict(rms_norm_eps="x" * 10**6), "config.json"), "a theta of escapes": (dict(rope_theta="\x1b[2J" * 1000), "config.json"),
    "an unhashable kind of stretch": (dict(rope_scaling={"type": [1]}), "config.json")}


@pytest.mark.parametrize("trick", CONFIGS)
def test_sizes_in_a_config_are_checked_before_a_model_is_built(weights, trick):
    changes, message = CONFIGS[trick]
    path = weights / "llava" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refused(load_chat, weights, message)


@pytest.mark.parametrize("content, message", [
    (b'{"a":' * 10**5, "not valid JSON"), (b"[" * 10**6, "not valid JSON"), (b"\xff", "not valid JSON"), (b"3", "JSON object"), (b"{}", "states no"),
    (b'{"hidden_size": ' + b"9" * 10**5 + b"}", "not valid JSON|no such model|states no"), (b" " * (MAX_HEADER + 1), "no description")])
def test_a_config_that_is_no_description_is_refused(weights, content, message):
    (weights / "llava" / "config.json").write_bytes(content)
    refused(load_chat, weights, message)


@pytest.mark.parametrize("section, changes, message", [
    ("vision_config", dict(num_hidden_layers=10**9), "vision_layers"), ("vision_config", dict(hidden_size=1 << 40), "vision_width"),
    ("vision_config", dict(image_size=1 << 17), "does not fit"), ("vision_config", dict(patch_size=0), "patch_size"),
    ("text_config", dict(num_hidden_layers=float("nan")), "text_layers"), ("text_config", dict(vocab_size=10**18), "vocab_size"),
    ("text_config", dict(num_hidden_layers="\x1b[2J" * 1000), "text_layers"), ("text_config", dict(layer_norm_eps="x" * 10**6), "asks for layer_norm_eps"),
    (None, dict(model_type="x" * 10**6), "not 'clip'")])
def test_sizes_of_a_clip_are_checked_before_it_is_built(weights, section, changes, message):
    path = weights / "clip" / "config.json"
    config = json.loads(path.read_text())
    (config[section] if section else config).update(changes)
    path.write_text(json.dumps(config))
    refused(load_chat, weights, message)


RANKS = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
TOKENIZERS = {
    "a rank of 10^18": (RANKS + b"YWI= 1000000000000000000\n", "not 0"), "a rank of 10^5000": (RANKS + b"YWI= 1" + b"0" * 5000 + b"\n", "damaged"),
    "a rank below 0": (RANKS + b"YWI= -1\n", "not 0"), "a word twice": (RANKS + b"QQ== 256\n", "not 0"), "a rank twice": (RANKS + b"YWI= 3\n", "not 0"),
    "three columns": (RANKS + b"YWI= 256 7\n", "damaged"), "33 MB": (RANKS + b"A" * (33 << 20), "no tokenizer is that large"),
    "more words than the model": (RANKS + b"".join(base64.b64encode(b"%04d" % i) + b" %d\n" % (256 + i) for i in range(300)), "belong together"),
    "a protobuf of noise": (b"\n\x0e\n\x05<unk>" + b"\xff" * 1000, "sentencepiece"), "a length of 2^63": (b"\n" + b"\xff" * 9 + b"\x01", "sentencepiece")}


@pytest.mark.parametrize("trick", TOKENIZERS)
def test_tokenizers_that_cannot_be_are_refused(weights, trick):
    content, message = TOKENIZERS[trick]
    (weights / "llava" / "tokenizer.model").write_bytes(content)
    refused(load_chat, weights, message)


@pytest.mark.parametrize("cut", [10, 1000, -10])
def test_a_cut_sentencepiece_model_is_refused(weights, cut):
    path = weights / "llava" / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:cut])
    refused(load_chat, weights, "tokenizer.model")


@pytest.mark.parametrize("params, message", [
    (dict(n_layers=10**9), "no such model"), (dict(n_heads=0), "at least 1|params.json"), (dict(dim=1 << 50), "dim is"), (dict(dim=[32]), "dim is"),
    (dict(norm_eps=float("inf")), "norm_eps"), (dict(n_kv_heads=10**9), "evenly"), (dict(rope_theta="x"), "params.json")])
def test_sizes_in_params_json_are_checked_before_a_model_is_built(weights, params, message):
    meta(weights / "llava", params)
    refused(load_llama, weights / "llava", message)


def test_a_meta_folder_without_its_first_mlp_says_that(weights):
    meta(weights / "llava", {}, "layers.0.feed_forward.w1.weight")
    refused(load_llama, weights / "llava", "no matrix layers.0.feed_forward.w1.weight")


def meta(folder, params, without=""):
    """Puts the beginning of a LLaMA in Meta's layout into the place of another."""
    tensors = {"tok_embeddings.weight": read_tensors(folder)["model.embed_tokens.weight"], "layers.0.attention.wq.weight": torch.zeros(32, 32),
               "layers.0.feed_forward.w1.weight": torch.zeros(64, 32)}
    os.remove(folder / "config.json")
    torch.save({name: t for name, t in tensors.items() if name != without}, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps({"dim": 32, "n_layers": 2, "n_heads": 2, "norm_eps": 1e-5, **params}))


# ---------------------------------------------------------------------------------------------------- a bundle of the wrong family
def replace(target, source):
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


FAMILIES = {   # what was put where, and what is said
    "a LLaMA as branch": ("branch.pth", "llava/model.safetensors", "no BT-Adapter branch"),
    "a CLIP as branch": ("branch.pth", "clip/model.safetensors", "no BT-Adapter branch"),
    "a LLaVA as CLIP": ("clip", "llava", "model_type is 'llava'"), "a CLIP as LLaVA": ("llava", "clip", "not a LLaMA .* it looks like a CLIP"),
    "a branch as LLaVA's weights": ("llava/model.safetensors", "branch.pth", "not a LLaMA .* it looks like a BT-Adapter branch"),
    "a branch as CLIP": ("clip", "branch.pth", "not a CLIP of OpenAI"), "a CLIP as chat.bin": ("chat.bin", "clip/model.safetensors", "no mm_projector"),
    "a branch as projector": ("mm_projector.bin", "branch.pth", "no mm_projector"),
    "a LLaMA's weights in CLIP's folder": ("clip/model.safetensors", "llava/model.safetensors", "(?s)does not fit.*it looks like a LLaMA")}


@pytest.mark.parametrize("mistake", FAMILIES)
def test_a_bundle_of_the_wrong_family_is_told_apart(weights, mistake):
    target, source, message = FAMILIES[mistake]
    replace(weights / target, weights / source)
    refused(load_chat, weights, message)


@pytest.mark.parametrize("name, tensors, message", [
    ("an EVA tower", {"backbone.btadapter_S.0.norm1.weight": torch.zeros(1408)}, "EVA-CLIP-g"),
    ("a scalar where times should be", {"backbone.btadapter_S_layers.0.x": torch.zeros(1), "backbone.btadapter_time_embed.weight": torch.tensor(1.0)}, "does not fit"),
    ("300 layers", {f"backbone.btadapter_S_layers.{i}.x": torch.zeros(1) for i in range(300)}, "300 layers"),
    ("one layer, and it the last", {"backbone.btadapter_S_layers.0.x": torch.zeros(1)}, "1 layers, 0 of them")])
def test_a_branch_that_cannot_be_is_refused(weights, name, tensors, message):
    torch.save(tensors, weights / "branch.pth")
    refused(load_chat, weights, message)


@pytest.mark.parametrize("tensors", [
    {"model.mm_projector.weight": torch.tensor(1.0)}, {"model.mm_projector.weight": torch.zeros(2, 2, 2)}, {"mm_projector.0.weight": torch.zeros(0)},
    {"model.mm_projector.weight": torch.zeros(32, 32, dtype=torch.int64), "model.mm_projector.bias": torch.zeros(32)},
    {"model.mm_projector.weight": torch.zeros(32, 32), "model.mm_projector.bias": torch.zeros(32), "model.video_start_end.weight": torch.zeros(2)}])
def test_a_projector_that_cannot_be_is_refused(weights, tensors):
    torch.save(tensors, weights / "chat.bin")
    refused(load_chat, weights, "does not fit|rows are")


def test_scalars_where_a_clip_of_openai_has_matrices_are_refused(weights):
    torch.save({"visual.conv1.weight": torch.tensor(1.0), "token_embedding.weight": torch.tensor(1.0)}, weights / "ViT-L-14.pt")
    refused(load_clip, weights / "ViT-L-14.pt", "not a CLIP of OpenAI")


def test_a_hostile_branch_is_refused_for_retrieval_as_well(weights):
    archive(weights / "branch.pth", pickled(Calls(os.system, TOUCH)))
    clip, _ = load_clip(weights / "clip")
    refused(lambda path: load_branch(path, clip), weights / "branch.pth", "posix.system")


# ---------------------------------------------------------------------------------------------------- as a person meets them
def spoil_with_code(weights):
    archive(weights / "branch.pth", pickled(Calls(os.system, TOUCH)))


def spoil_with_a_pipe(weights):
    (weights / "llava" / "config.json").unlink()
    os.mkfifo(weights / "llava" / "config.json")


def spoil_with_a_cut(weights):
    os.truncate(weights / "llava" / "model.safetensors", 5000)


def spoil_with_a_bomb(weights):
    archive(weights / "branch.pth", b"\x80\x02}r\xff\xff\xff\x7f.")


def spoil_with_another_family(weights):
    replace(weights / "llava", weights / "clip")


@pytest.mark.parametrize("spoil", [spoil_with_code, spoil_with_a_pipe, spoil_with_a_cut, spoil_with_a_bomb, spoil_with_another_family])
def test_chat_says_one_line_and_ends_with_2(weights, spoil, monkeypatch, capsys):
    spoil(weights)
    before = everything_in(".")
    monkeypatch.setattr(sys, "argv", ["chat.py", "-q", "what?", "--weights", str(weights)])
    with pytest.raises(SystemExit) as e:
        cli.run(chat.main, chat.Config, **chat.FLAGS)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and not out and everything_in(".") == before
    assert err.startswith("chat.py: ") and err.count("\n") == 1 and str(weights) in err


def test_a_load_that_does_not_fit_prints_its_table_below_the_line(weights, monkeypatch, capsys):
    tensors = {name: t.clone() for name, t in read_tensors(weights / "llava").items() if "layers.1.mlp" not in name}
    write_safetensors(weights / "llava" / "model.safetensors", tensors)
    monkeypatch.setattr(sys, "argv", ["chat.py", "-q", "what?", "--weights", str(weights)])
    with pytest.raises(SystemExit) as e:
        cli.run(chat.main, chat.Config, **chat.FLAGS)
    first, head, *rows = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and first.startswith(f"chat.py: {weights}/llava: does not fit this model: 3 missing; ")
    assert head.split() == ["name", "in", "the", "file", "in", "the", "model"] and len(rows) == 3


def test_the_program_itself_ends_with_2_and_no_traceback(weights):
    spoil_with_code(weights)
    command = [sys.executable, os.path.join(ROOT, "chat.py"), "-q", "what?", "--weights", str(weights)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and not ended.stdout and len(ended.stderr.splitlines()) == 1 and "posix.system" in ended.stderr
    assert not os.path.exists("executed")
