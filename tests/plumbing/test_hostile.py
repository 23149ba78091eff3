"""Hostile weights: reading them runs, writes and awaits nothing, takes little memory and ends in one line."""
import base64
import io
import json
import os
import pickle
import re
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
from model import load_branch, open_chat
from plumbing import cli, training
from plumbing.cli import UserError
from plumbing.weightfile import MAX_HEADER, read_file, read_tensors

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
    open_chat(folder)
    return folder


@pytest.fixture
def weights(good, tmp_path, monkeypatch):
    """A copy of it to spoil, in a folder of its own that is also where payloads would leave their mark."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(good, tmp_path / "weights")


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A weight file to write, in such a folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "file.pth"


def everything_in(folder):
    return {(path, os.lstat(os.path.join(path, name)).st_size)
            for path, folders, files in os.walk(folder) for name in folders + files}


def refused(load, path, message):
    """Calls load(path), which must end in a UserError with this message, and in nothing else; without a
    message it may find nothing."""
    before, resident = everything_in("."), begin_peak()
    try:
        assert not load(path) and message is None
    except UserError as e:
        assert re.search(message or "", str(e))
        assert str(path) in str(e) and len(str(e)) < 900 and str(e).isprintable()
    assert everything_in(".") == before
    assert resident is None or peak() - resident < LIMIT


def begin_peak():
    """Lets the kernel forget the most memory that this process had -> bytes that it has now, or None."""
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


# ---------------------------------------------------------------------------------------- code in pickles
def text(string):
    """A string as an opcode."""
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def by_name(module, name, *arguments):
    """A pickle that asks for module.name and calls it."""
    return b"\x80\x02" + call(module, name, *arguments) + b"."


def call(module, name, *arguments):
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
OPEN = "open('executed', 'w')"
TENSOR = (b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0%s"
          b"X\3\0\0\0cpu%stQK\0(%st(%st\x89NtR")
DISGUISES = {   # what it is: the pickle, and what is said about it
    "os.system": (pickled(Calls(os.system, TOUCH)), "posix.system"),
    "subprocess": (pickled({"state_dict": Calls(subprocess.Popen, TOUCH)}), "commands.Popen"),
    "eval": (pickled({"w": Calls(eval, OPEN)}), "eval"),
    "exec beside real tensors": (pickled({"state_dict": {"a": 1}, "epoch": Calls(exec, OPEN)}), "exec"),
    "every protocol's way to name a function": (pickled(Calls(os.system, TOUCH), 4), "posix.system"),
    "a stack global with a dotted name": (
        b"\x80\x04" + text("os") + text("path.os.system") + b"\x93" + text(TOUCH) + b"\x85R.",
        "os.path.os.system"),
    "a stack global whose name is a number": (b"\x80\x04K\1K\2\x93.", "requires str"),
    "a stack global with a line break in its name": (
        b"\x80\x04" + text("collections\nOrderedDict") + text("\x1b[2J") + b"\x93.", "not weight data"),
    "a dotted name inside torch": (by_name("torch", "os.system", TOUCH), "torch.os.system"),
    "a module that torch has imported": (by_name("torch.os", "system", TOUCH), "torch.os.system"),
    "torch.load": (by_name("torch", "load", "other.pth"), "torch.load"),
    "torch.hub": (by_name("torch.hub", "load", "a/b", "c"), "torch.hub.load"),
    "torch.utils": (by_name("torch.utils.collect_env", "run", TOUCH), "collect_env.run"),
    "a storage's look-alike": (by_name("torch.storage", "_load_from_bytes", "x"), "_load_from_bytes"),
    "copyreg": (b"\x80\x02ccopyreg\n_reconstructor\n(cos\nsystem\n" + text(TOUCH) + b"NtR.", "copyreg._re"),
    "a getattr that leads somewhere": (
        b"\x80\x02cbuiltins\ngetattr\n" + b"cos\nopen\n" + text("x") + b"\x86R.", "os.open"),
    "what getattr gave, called": (
        by_name("builtins", "getattr", "os")[:-1] + text(TOUCH) + b"\x85R.", "not callable"),
    "an import": (by_name("builtins", "__import__", "os"), "__import__"), "a call inside a persistent id": (
        b"\x80\x02(" + text("storage") + call("os", "system", TOUCH) + b"tQ.", "os.system"),
    "a persistent id that is a function": (b"\x80\x02ctorch\nSize\nQ.", "damaged"),
    "a state with a __setstate__ of its own": (
        b"\x80\x02c__torch__\nM\n)\x81}(" + text("__setstate__") + text(TOUCH) + b"ub.", None),
    "a state for a storage": (b"\x80\x02ctorch\nFloatStorage\n}b.", "'torch.dtype'"),
    "a state for a function": (
        b"\x80\x02ctorch\nSize\nN}" + text("__defaults__") + b"]s\x86b.", "'function'"),
    "a TorchScript class called os.system": (by_name("__torch__.os", "system", TOUCH), None),
    "an array of objects": (pickled(np.array([Calls(os.system, TOUCH)], dtype=object)), "posix.system"),
    "an extension code": (b"\x80\x02\x82\x01.", "opcode"),
    "the opcode INST": (b"(S'touch executed'\nios\nsystem\n.", "opcode"),
    "the opcode OBJ": (b"\x80\x02(cos\nsystem\nX\1\0\0\0ao.", "os.system"),
    "NEWOBJ_EX": (b"\x80\x04c__torch__\nM\n)}\x92.", "opcode"),
    "an out-of-band buffer": (b"\x80\x05\x97.", "opcode"), "an empty pickle": (b"", "damaged"),
    "an object made in the place of a tensor": (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN" + text(TOUCH) + b"\x85NtR.",
        "os.system"),
    "a text called in the place of a tensor": (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(" + text("x") + b"N)NtR.", "not callable"),
    "an empty stack": (b"\x80\x02.", "damaged"), "no mark": (b"\x80\x02t.", "damaged")}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_code_in_a_pickle_is_refused_and_does_not_run(file, disguise):
    content, message = DISGUISES[disguise]
    archive(file, content)
    refused(read_file, file, message)


@pytest.mark.parametrize("attack", [
    Calls(os.system, TOUCH), {"state_dict": {"w": torch.ones(2), "x": Calls(eval, OPEN)}}])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(file, attack):
    torch.save(attack, file)
    refused(training.load_checkpoint, file, "file.pth")


def old_format(value):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("content, message", [
    (old_format(Calls(os.system, TOUCH)), "torch 1.6 or later"),
    (pickled(Calls(os.system, TOUCH)), "neither"), (b"(S'touch executed'\nios\nsystem\n.", "neither"),
    (b"#!/bin/sh\n" + TOUCH.encode(), "neither"), (b"GGUF" + bytes(99), "b'GGUF"),
    (b"version https://git-lfs.github.com/spec/v1\n", "b'version https://git-lfs"),
    (b"<!DOCTYPE html><html>", "b'<!DOCTYPE html>"),
    (b"", "empty"), (b"P", "neither")])
def test_files_that_are_no_weights_are_refused_for_what_they_are(file, content, message):
    file.write_bytes(content)
    refused(read_file, file, message)


# ---------------------------------------------------------------------------------------- bombs in pickles
def tensor(count=b"K\1", shape=b"K\1", stride=b"K\1"):
    """A pickle of one tensor in storage 0."""
    return b"\x80\x02}" + text("w") + TENSOR % (b"0", count, shape, stride) + b"s."


def nest(times, inner=b"}"):
    """{"a": x, "b": x} with x = {"a": y, "b": y} with ..., without the end of the pickle"""
    out = b"\x80\x02" + inner + b"q\0"
    for _ in range(times):
        out += b"}(" + text("a") + b"h\0" + text("b") + b"h\0uq\0"   # the memo's place 0 is always the latest
    return out


BIG, BELOW_0 = b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff"   # 2^31 - 1, -1
TUPLES = b")" + b"\x85" * 300_000   # inside each other
ONE = TENSOR % (b"0", b"K\1", b"K\1", b"K\1")
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("   # and its arguments
BOMBS = {
    "a memo of 2^31 places": (b"\x80\x02}r\xff\xff\xff\x7f.", None),
    "bytes that claim 2^60": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.", "damaged"),
    "a text that claims 2^63": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63) + b"x.", "exceeds"),
    "a frame that claims 2^64 - 1": (b"\x80\x04\x95" + b"\xff" * 8 + b".", "damaged"),
    "a number of a gigabyte": (b"\x80\x02\x8b\xff\xff\xff\x7f1.", "opcode"),
    "300,000 lists inside each other": (b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".", None),
    "tuples inside each other, as a key": (b"\x80\x02}" + TUPLES + b"Ns.", "tuple as a key"),
    "tuples inside each other, as a key for an object": (
        b"\x80\x02c__torch__\nM\n)\x81(" + TUPLES + b"Nu.", "tuple as a key"),
    "pairs for an OrderedDict with such a key": (
        b"\x80\x02ccollections\nOrderedDict\n]]" + TUPLES + b"aNaa\x85R.", None),
    "such tuples as the name of a function": (b"\x80\x04" + TUPLES + text("x") + b"\x93.", "requires str"),
    "2^60 dicts as the name of a storage": (
        nest(60) + b"q\1(" + text("storage") + b"ctorch\nFloatStorage\nh\1" + text("cpu") + b"K\1tQ.",
        "unknown record"),
    "2^60 dicts as the name of a storage that is none": (
        nest(60) + b"0" + REBUILD + b"ctorch\nFloatStorage\nh\0K\1\x87K\0K\1\x85K\1\x85NNtR.",
        "damaged"),
    "2^60 dicts as a shape": (
        nest(60) + b"0" + REBUILD + ONE.split(b"(", 1)[1].split(b"K\0(")[0] + b"K\0h\0h\0NNtR.",
        "damaged"),
    "a tensor as arguments": (b"\x80\x02c__torch__\nM\n" + ONE + b"R.", None),
    "a tensor as pairs": (b"\x80\x02ccollections\nOrderedDict\n" + ONE + b"\x85R.", None),
    "10,000 dicts inside each other": (b"\x80\x02" + (b"}" + text("a")) * 10**4 + b"N" + b"s" * 10**4 + b".",
                                       "Recursion|nested"),
    "a dict of 2^60 dicts": (nest(60) + b".", "nested too deeply"),
    "a dict that holds itself": (b"\x80\x02}q\0" + text("self") + b"h\0s.", "nested too deeply|Recursion"),
    "names that grow to gigabytes": (
        b"\x80\x02" + text("a" * 10**6) + b"q\x010" + b"}h\1" * 900 + b"N" + b"s" * 900 + b".",
        "nested too deeply"),
    "100,000 numbers of one hash as keys": (
        b"\x80\x02}("
        + b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(1, 10**5))
        + b"u.", None),
    "a list of a list of a list, copied": (
        b"\x80\x02]q\0(" + b"K\1" * 10**5 + b"e" + b"ctorch\nSize\nh\0\x85R" * 10**5 + b".", None),
    "a storage of 2^31 numbers": (tensor(BIG), "does not hold"),
    "a storage of -1 numbers": (tensor(BELOW_0), "does not hold"),
    "a tensor of stride 0": (tensor(shape=BIG, stride=b"K\0"), "in a storage of 1"),
    "a tensor of 2^64 numbers, which are 0 to a machine": (
        tensor(shape=(b"\x8a\5" + (1 << 32).to_bytes(5, "little")) * 2, stride=b"K\0K\0"),
        "in a storage of 1"),
    "a tensor beyond its storage": (tensor(shape=b"K\2"), "in a storage of 1"),
    "a tensor that begins beyond its storage": (tensor().replace(b"tQK\0", b"tQK\1"), "damaged"),
    "a tensor of negative stride": (tensor(stride=BELOW_0), "damaged"),
    "a tensor of negative size": (tensor(shape=BELOW_0), "damaged"),
    "a storage that is not there": (tensor().replace(b"\1\0\0\x000", b"\1\0\0\x007"), "data/7"),
    "a pickle of 9 MB": (b"\x80\x02" + bytes(9 << 20), "a pickle of")}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_cannot_take_more_memory_than_it_has_bytes(file, bomb):
    content, message = BOMBS[bomb]
    archive(file, content, {"archive/data/0": bytes(4)})
    refused(read_file, file, message)


# ---------------------------------------------------------------------------------------- zip
def zip_of_claims(path, claim):
    """A zip whose directory goes through claim(bytes, where it starts)."""
    archive(path, tensor(), {"archive/data/0": bytes(4)})
    content = path.read_bytes()
    start = content.index(b"PK\1\2")
    path.write_bytes(content[:start] + claim(content[start:], start))


def claims_entries(directory, start, count=1 << 60, size=0):
    """Only a directory's end, one that speaks of more than 2^32."""
    end = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start)
    return end + b"PK\6\7" + bytes(4) + struct.pack("<QI", start, 1) + b"PK\5\6" + bytes(18)


def in_entry(directory, at, layout, value):
    """The second entry of a directory with another value at a place."""
    entry = directory.index(b"PK\1\2", 4)
    size = struct.calcsize(layout)
    return directory[:entry + at] + struct.pack(layout, value) + directory[entry + at + size:]


ZIPS = {
    "2^60 entries": (claims_entries, "data.pkl"),
    "a directory behind the end": (lambda d, s: claims_entries(d, 1 << 40, 1), "damaged"),
    "an entry that begins behind the end": (lambda d, s: in_entry(d, 42, "<I", 0x7FFFFFFF), "damaged"),
    "no directory": (lambda d, s: b"", "cut"), "half a directory": (lambda d, s: d[:40], "cut")}


@pytest.mark.parametrize("trick", ZIPS)
def test_the_directory_of_a_zip_is_not_believed(file, trick):
    claim, message = ZIPS[trick]
    zip_of_claims(file, claim)
    refused(read_file, file, message)


def test_a_zip_bomb_is_not_unpacked(file):
    archive(file, b"\x80\x02" + bytes(100 << 20), how=zipfile.ZIP_DEFLATED)
    refused(read_file, file, "a pickle of")


def test_names_in_a_zip_that_lead_elsewhere_lead_nowhere(file):
    names = ["archive/../../executed", "/etc/nanobt", "archive/data/0", "C:\\evil"]
    archive(file, tensor(), dict.fromkeys(names, bytes(4)))
    assert list(read_file(file)) == ["w"] and os.listdir(".") == ["file.pth"]


# ---------------------------------------------------------------------------------------- safetensors
def safetensors(path, header, data=bytes(16), length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def entry(shape=(4,), offsets=(0, 16), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "lists in lists": (b'{"a":' + b"[" * 10**6, "damaged"),
    "a million lists": (b'{"a":[' + b"[]," * 10**6 + b"0]}", "damaged"),
    "three offsets": ({"a": entry(offsets=(0, 16, 16))}, "damaged"),
    "one offset": ({"a": entry(offsets=[16])}, "damaged"),
    "an end before the beginning": ({"a": entry((4,), (16, 0))}, "damaged"),
    "an unknown dtype": ({"a": entry(dtype="F8_E4M3")}, "F8_E4M3, as in a model quantised"),
    "a dtype that is a list": ({"a": entry(dtype=["F32"])}, "damaged"),
    "a dtype that is a number": ({"a": entry(dtype=8)}, "damaged"),
    "no dtype": ({"a": {}}, "damaged"),
    "sizes whose product is 2^64": ({"a": entry((1 << 32, 1 << 32), (0, 0))}, "damaged"),
    "a size of 10^300": ({"a": entry((10 ** 300,))}, "damaged"),
    "a size of 4.0": ({"a": entry((4.0,))}, "damaged"),
    "a size of NaN": ({"a": entry((float("nan"),))}, "damaged"),
    "a size of text": ({"a": entry("4")}, "damaged"),
    "a thousand sizes": ({"a": entry([1] * 1000)}, "damaged"),
    "a name that speaks to the terminal": ({"\x1b[2J\nroot": entry((3,), (0, 16))}, "damaged"),
    "a list": (b"[]", "neither"), "text that is not UTF-8": (b'{"\xff\xfe": 1}', "damaged")}


@pytest.mark.parametrize("trick", HEADERS)
def test_the_header_of_a_safetensors_file_is_not_believed(file, trick):
    header, message = HEADERS[trick]
    safetensors(file, header)
    refused(read_file, file, message)


@pytest.mark.parametrize("header, length", [
    (b"{}", 1 << 63), (b"{" + b" " * (100 << 20), None), (b"{}", 1000)])
def test_a_header_longer_than_a_header_or_its_file_is_not_read(file, header, length):
    safetensors(file, header, length=length)
    refused(read_file, file, "damaged")


@pytest.mark.parametrize("shard", ["../../branch.pth", "/etc/passwd", "..", "", "a\0b", "\x1b[2J/x"])
def test_shards_stay_inside_their_folder(file, shard):
    (file.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(read_tensors, file.parent, f"{file.parent}/[^/]*: No such file")


# ---------------------------------------------------------------------------------------- what is no file
@pytest.mark.parametrize("name", ["branch.pth", "clip/config.json", "llava/model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "empty"])
def test_what_is_no_file_is_refused_and_not_waited_for(weights, name, kind):
    path = weights / name
    path.unlink(missing_ok=True)
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"),
     "folder": path.mkdir, "empty": path.touch}[kind]()
    refused(open_chat, weights, "no regular|empty")


def test_a_link_to_itself_is_refused(weights):
    (weights / "branch.pth").unlink()
    (weights / "branch.pth").symlink_to("branch.pth")
    refused(open_chat, weights, "lacks branch.pth")


# -------------------------------------------------------------------------------- descriptions and tokenizers
CONFIGS = {
    "10^9 layers": (dict(num_hidden_layers=10**9), "1,000,000,000 layers, but its weights have 2"),
    "a width of 10^400": (dict(hidden_size=10**400), "config.json"),
    "a width of 2^62": (dict(hidden_size=1 << 62), "config.json"),
    "a width of infinity": (dict(hidden_size=float("inf")), "config.json"),
    "a width of text": (dict(hidden_size="x" * 10**6), "config.json"),
    "a width that is a list": (dict(hidden_size=[]), "config.json"),
    "an mlp of 2^40": (dict(intermediate_size=1 << 40), "does not fit"),
    "2^40 heads": (dict(num_attention_heads=1 << 40), "does not fit"),
    "a theta of escapes": (dict(rope_theta="\x1b[2J" * 1000), "config.json"),
    "an unhashable kind of stretch": (dict(rope_scaling={"type": [1]}), "config.json")}


@pytest.mark.parametrize("trick", CONFIGS)
def test_sizes_in_a_config_are_checked_before_a_model_is_built(weights, trick):
    changes, message = CONFIGS[trick]
    path = weights / "llava" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refused(open_chat, weights, message)


@pytest.mark.parametrize("content, message", [
    (b'{"a":' * 10**5, "not valid JSON"), (b"[" * 10**6, "not valid JSON"), (b"\xff", "not valid JSON"),
    (b"3", "JSON object"), (b"{}", "described as 32 layers"),
    (b'{"hidden_size": ' + b"9" * 10**5 + b"}", "config.json"),
    (b" " * MAX_HEADER + b"{}", "not valid JSON")])
def test_a_config_that_is_no_description_is_refused(weights, content, message):
    (weights / "llava" / "config.json").write_bytes(content)
    refused(open_chat, weights, message)


@pytest.mark.parametrize("section, changes, message", [
    ("vision_config", dict(num_attention_heads=10**9), "no model"),
    ("text_config", dict(num_attention_heads=float("nan")), "cannot convert float NaN"),
    ("text_config", dict(num_attention_heads=float("inf")), "cannot convert float infinity"),
    ("text_config", dict(num_attention_heads="\x1b[2J" * 1000), "invalid literal"),
    ("text_config", dict(hidden_act="x" * 10**6), "hidden_act is")])
def test_a_description_of_a_clip_is_checked_before_it_is_built(weights, section, changes, message):
    path = weights / "clip" / "config.json"
    config = json.loads(path.read_text())
    config[section].update(changes)
    path.write_text(json.dumps(config))
    refused(open_chat, weights, message)


@pytest.mark.parametrize("file, content, message", [
    ("added_tokens.json", b"[]", "JSON object"), ("added_tokens.json", b'{"<im_start>": [1]}', None),
    ("added_tokens.json", b'{"<im_start>": 1e999, "<im_end>": -1}', None),
    ("tokenizer_config.json", b"3", "JSON object")])
def test_added_tokens_that_cannot_be_are_refused_or_do_not_count(weights, file, content, message):
    expected = open_chat(weights).chat.start_end
    (weights / "llava" / file).write_bytes(content)
    if message:
        refused(open_chat, weights, message)
    else:
        assert torch.equal(open_chat(weights).chat.start_end, expected)


RANKS = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
TOKENIZERS = {
    "a rank of 10^5000": (RANKS + b"YWI= 1" + b"0" * 5000 + b"\n", "damaged"),
    "three columns": (RANKS + b"YWI= 256 7\n", "damaged"),
    "more words than the model": (
        RANKS + b"".join(base64.b64encode(b"%04d" % i) + b" %d\n" % (256 + i) for i in range(300)),
        "belong together"),
    "a protobuf of noise": (b"\n\x0e\n\x05<unk>" + b"\xff" * 1000, "sentencepiece"),
    "a length of 2^63": (b"\n" + b"\xff" * 9 + b"\x01", "sentencepiece")}


@pytest.mark.parametrize("trick", TOKENIZERS)
def test_tokenizers_that_cannot_be_are_refused(weights, trick):
    content, message = TOKENIZERS[trick]
    (weights / "llava" / "tokenizer.model").write_bytes(content)
    refused(open_chat, weights, message)


@pytest.mark.parametrize("params, message", [
    (dict(n_layers=10**9), "1,000,000,000 layers"), (dict(n_heads=0), "params.json"),
    (dict(dim=1 << 50), "params.json"), (dict(dim=[32]), "params.json"), (dict(rope_theta="x"), "params.json")])
def test_sizes_in_params_json_are_checked_before_a_model_is_built(weights, params, message):
    meta(weights / "llava", params)
    refused(load_llama, weights / "llava", message)


def test_a_meta_folder_without_its_first_mlp_says_that(weights):
    meta(weights / "llava", {}, "layers.0.feed_forward.w1.weight")
    refused(load_llama, weights / "llava", "KeyError: 'model.layers.0.mlp.gate_proj.weight'.*part of a model")


def meta(folder, params, without=""):
    """Puts the beginning of a LLaMA in Meta's layout into the place of another."""
    tensors = {
        "tok_embeddings.weight": read_tensors(folder)["model.embed_tokens.weight"],
        "layers.0.attention.wq.weight": torch.zeros(32, 32),
        "layers.0.feed_forward.w1.weight": torch.zeros(64, 32)}
    os.remove(folder / "config.json")
    torch.save({name: t for name, t in tensors.items() if name != without}, folder / "consolidated.00.pth")
    params = {"dim": 32, "n_layers": 2, "n_heads": 2, "norm_eps": 1e-5, **params}
    (folder / "params.json").write_text(json.dumps(params))


# ------------------------------------------------------------------------------- a bundle of the wrong family
def replace(target, source):
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


FAMILIES = {
    "a LLaMA as branch": ("branch.pth", "llava/model.safetensors", "no BT-Adapter branch"),
    "a CLIP as branch": ("branch.pth", "clip/model.safetensors", "no BT-Adapter branch"),
    "a LLaVA as CLIP": ("clip", "llava", "not a CLIP .*it looks like a LLaMA"),
    "a CLIP as LLaVA": ("llava", "clip", "not a LLaMA .* it looks like a CLIP"),
    "a branch as LLaVA's weights": (
        "llava/model.safetensors", "branch.pth", "not a LLaMA .* it looks like a BT-Adapter branch"),
    "a branch as CLIP": ("clip", "branch.pth", "not a CLIP"),
    "a CLIP as chat.bin": ("chat.bin", "clip/model.safetensors", "no mm_projector"),
    "a branch as projector": ("mm_projector.bin", "branch.pth", "no mm_projector"),
    "a LLaMA's weights in CLIP's folder": (
        "clip/model.safetensors", "llava/model.safetensors", "not a CLIP .*it looks like a LLaMA")}


@pytest.mark.parametrize("mistake", FAMILIES)
def test_a_bundle_of_the_wrong_family_is_told_apart(weights, mistake):
    target, source, message = FAMILIES[mistake]
    replace(weights / target, weights / source)
    refused(open_chat, weights, message)


@pytest.mark.parametrize("tensors, message", [
    ({"btadapter_S.0.norm1.weight": torch.zeros(1408)}, "no BT-Adapter branch"),
    ({"btadapter_S_layers.0.x": torch.zeros(1), "btadapter_time_embed.weight": torch.tensor(1.0)},
     "does not fit|1 layers, 0 in use"),
    ({f"btadapter_S_layers.{i}.x": torch.zeros(1) for i in range(300)}, "300 layers, 299 in use"),
    ({"btadapter_S_layers.0.x": torch.zeros(1)}, "1 layers, 0 in use")])
def test_a_branch_that_cannot_be_is_refused(weights, tensors, message):
    torch.save({f"backbone.{name}": t for name, t in tensors.items()}, weights / "branch.pth")
    refused(open_chat, weights, message)


@pytest.mark.parametrize("tensors", [
    {"mm_projector.weight": torch.tensor(1.0)}, {"mm_projector.weight": torch.zeros(2, 2, 2)},
    {"mm_projector.0.weight": torch.zeros(0)},
    {"mm_projector.weight": torch.zeros(32, 32, dtype=torch.int64), "mm_projector.bias": torch.zeros(32)}])
def test_a_projector_that_cannot_be_is_refused(weights, tensors):
    torch.save({f"model.{name}": t for name, t in tensors.items()}, weights / "chat.bin")
    refused(open_chat, weights, "does not fit")


def test_scalars_where_a_clip_of_openai_has_matrices_are_refused(weights):
    scalars = dict.fromkeys(["visual.conv1.weight", "token_embedding.weight"], torch.tensor(1.0))
    torch.save(scalars, weights / "ViT-L-14.pt")
    refused(load_clip, weights / "ViT-L-14.pt", "not a CLIP")


def test_a_hostile_branch_is_refused_for_retrieval_as_well(weights):
    archive(weights / "branch.pth", pickled(Calls(os.system, TOUCH)))
    clip, _ = load_clip(weights / "clip")
    refused(lambda path: load_branch(path, clip), weights / "branch.pth", "posix.system")


# ------------------------------------------------------------------------------------- as a person meets them
SPOILS = {
    "code": lambda w: archive(w / "branch.pth", pickled(Calls(os.system, TOUCH))),
    "a pipe": lambda w: ((w / "llava" / "config.json").unlink(), os.mkfifo(w / "llava" / "config.json")),
    "a cut": lambda w: os.truncate(w / "llava" / "model.safetensors", 5000),
    "a bomb": lambda w: archive(w / "branch.pth", b"\x80\x02}r\xff\xff\xff\x7f."),
    "another family": lambda w: replace(w / "llava", w / "clip")}


def ended(weights, monkeypatch, capsys):
    """Runs chat.py, which must end with code 2 and say nothing on standard output -> its error."""
    monkeypatch.setattr(sys, "argv", ["chat.py", "-q", "what?", "--weights", str(weights)])
    with pytest.raises(SystemExit) as e:
        cli.run(chat.main, cli.start(chat.Config, **chat.FLAGS))
    out, err = capsys.readouterr()
    assert e.value.code == 2 and not out
    return err


@pytest.mark.parametrize("spoil", SPOILS)
def test_chat_says_one_line_and_ends_with_2(weights, spoil, monkeypatch, capsys):
    SPOILS[spoil](weights)
    before = everything_in(".")
    err = ended(weights, monkeypatch, capsys)
    assert err.startswith("chat.py: ") and err.count("\n") == 1 and str(weights) in err
    assert everything_in(".") == before


def test_the_program_itself_ends_with_2_and_no_traceback(weights):
    SPOILS["code"](weights)
    command = [sys.executable, os.path.join(ROOT, "chat.py"), "-q", "what?", "--weights", str(weights)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert "posix.system" in done.stderr and not os.path.exists("executed")
