"""plumbing/memory.py and model.OpenChat.need: what a chat needs, what a machine has, what is said of both."""
import ctypes
import dataclasses
import mmap
import os
import subprocess
import sys

import pytest
import torch

import chat
import model
from clip import CLIP, CLIPConfig
from llm import LLaMA, LLaMAConfig
from plumbing import memory
from plumbing.cli import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CPU, GPU = torch.device("cpu"), torch.device("cuda")
G = 10 ** 9


def of(size):
    """A module of so many parameters."""
    return torch.nn.Linear(int(size), 1, bias=False, device="meta")


@pytest.mark.parametrize("size, device, bf16, chosen", [
    (1e6, CPU, True, (torch.float32, None, "fp32")),
    (7e9, CPU, True, (torch.bfloat16, "int8", "int8 and bf16")),
    (7e9, CPU, False, (torch.float32, "int8", "int8 and fp32")),
    (1e6, GPU, True, (torch.float16, None, "fp16")),
    (7e9, GPU, True, (torch.float16, None, "fp16"))])
def test_auto_is_quick_where_it_runs(size, device, bf16, chosen, monkeypatch):
    monkeypatch.setattr(memory, "fast_bf16", lambda: bf16)   # whether this CPU computes in it
    assert memory.choose("auto", "auto", device, of(size)) == chosen


@pytest.mark.parametrize("bf16", [True, False])
def test_auto_saves_room_beside_int4_whether_this_cpu_is_quick_in_bf16_or_not(bf16, monkeypatch):
    monkeypatch.setattr(memory, "fast_bf16", lambda: bf16)
    assert memory.choose("auto", "int4", CPU, of(7e9))[0] == torch.bfloat16


def test_what_is_asked_for_is_chosen():
    assert memory.choose("fp32", "none", CPU, of(7e9)) == (torch.float32, None, "fp32")
    assert memory.choose("bf16", "none", CPU, of(7e9)) == (torch.bfloat16, "bf16", "bf16")   # nothing is rounded
    assert memory.choose("bf16", "int4", GPU, of(1e6)) == (torch.bfloat16, "int4", "int4 and bf16")


def test_one_thread_computes_a_small_model(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    for width in (10_000, 100):
        memory.prepare_cpu(torch.nn.Linear(width, width, device="meta"))
    assert chosen == [1]


def test_tensors_take_memory_that_was_freed():
    """In a process of its own: whatever ran in this one may have had memory kept already."""
    program = """if True:
        import resource, torch
        from plumbing.memory import prepare_cpu
        def faults():   # of pages, while tensors of 17 MB and more come and go
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(5):
                [torch.ones(n << 20) for n in (4, 5, 6, 7, 4, 5, 6, 7)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        prepare_cpu(torch.nn.Linear(1, 1))
        faults()
        print(faults())"""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("another C library than glibc keeps freed memory in its own way")
    runs = [subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
            for _ in range(3)]   # a heap may lie so that it keeps memory anyway: every other one does
    # 0; given back, they are tens of thousands, where pages are huge hundreds
    assert max(int(done.stdout) for done in runs) < 20


# ------------------------------------------------------------------------------------------------------- need
def opened(tokens="branch", **sizes):
    """A chat of the released size on the meta device: sizes and no numbers."""
    with torch.device("meta"):
        clip, llama = CLIP(CLIPConfig()).image_only(), LLaMA(LLaMAConfig(**sizes))
        branch = model.Branch(depth=3, gated=False) if tokens == "branch" else None
        kind = model.VIDEO_TOKENS[tokens](torch.nn.Linear(1024, 4096), branch)
        words = dataclasses.make_dataclass("Words", ["vocab_size", "added"])(32000, {})
        return model.OpenChat(model.VideoChat(clip, kind, llama, words), tokens, "", "", [], {})


def test_a_7b_needs_what_is_known_of_it():
    seven = opened()
    need, few = (seven.need(torch.bfloat16, None, CPU, n) for n in (100, 8))
    assert need["LLaMA"] == pytest.approx(13.5e9, rel=0.01)           # 6.74e9 parameters
    assert need["KV cache"] == 2 * 32 * 4096 * 2 * 2048               # K and V, layers, width, bytes, tokens
    assert need["CLIP"] == pytest.approx(2 * 303e6, rel=0.01)         # ViT-L/14's image tower
    assert need["video tokens"] == 2 * (53_605_376 + 1025 * 4096)     # the branch, the projector
    assert need["video"] == pytest.approx(1.4e9, rel=0.1) and few["video"] < 0.4e9
    assert few["KV cache"] == need["KV cache"]
    int8, int4 = (seven.need(torch.bfloat16, scheme, CPU, 100) for scheme in ("int8", "int4"))
    assert 6.5e9 < int8["LLaMA"] < 8e9 and 3.3e9 < int4["LLaMA"] < 4.5e9
    assert int8["CLIP"] < 0.55 * need["CLIP"]                         # rounded, too


def test_a_long_context_is_cut_to_what_a_conversation_may_have():
    short, long = (opened(context_length=n).need(torch.bfloat16, None, CPU, 8) for n in (8192, 131072))
    assert short == long


def test_pictures_that_are_kept_are_counted():
    one, many = (opened("mean").need(torch.bfloat16, "int8", CPU, n)["video"] for n in (1000, 100_000))
    assert many - one > 99_000 * 3 * 224 ** 2


def check(free, monkeypatch, scheme=None):
    monkeypatch.setattr(memory, "available", lambda device: free)
    memory.check(opened().need, torch.bfloat16, scheme, CPU, 100)


def test_what_fits_is_accepted_and_so_is_what_is_not_known(monkeypatch):
    check(64 * G, monkeypatch)
    check(None, monkeypatch)


@pytest.mark.parametrize("free, words, absent", [
    (12 * G, ["12.0 GB are free", "--quantize int8 needs", "--quantize int4 needs"], ["smaller model"]),
    (8 * G, ["8.0 GB are free", "--quantize int4 needs"], ["--quantize int8"]),
    (G, ["a smaller model"], ["--quantize"])])
def test_what_does_not_fit_is_one_line_with_what_would(monkeypatch, free, words, absent):
    with pytest.raises(UserError) as e:
        check(free, monkeypatch)
    line = str(e.value)
    assert line.startswith("a chat needs ") and "\n" not in line
    assert all(word in line for word in words) and not any(word in line for word in absent)


def test_a_chat_that_does_not_fit_ends_before_weights_are_loaded(weights, video, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    monkeypatch.setattr(model.OpenChat, "load", None)
    with pytest.raises(UserError, match="needs .* are free"):
        chat.begin(chat.Config(video, weights=weights))


# ---------------------------------------------------------------------------------------------- what there is
FREE = "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n"
STAT = "active_file 100\ninactive_file 200\nanon 400\n"


def group(path, most, current):
    """The files of a control group."""
    files = {"max": f"{most}\n", "current": f"{current}\n", "stat": STAT}
    return {f"/sys/fs/cgroup/{path}memory.{name}": content for name, content in files.items()}


@pytest.mark.parametrize("files, free", [
    ({}, 5_120_000), (group("a/", "max", 7), 5_120_000), (group("", 900, 700), 500),
    (group("a/", 1000, 700) | group("a/b/", 5000, 700), 600)])   # the tightest counts
def test_limits_of_the_control_groups_count_and_cached_files_do_not(monkeypatch, files, free):
    files = {"/proc/meminfo": FREE, "/proc/self/cgroup": "0::/a/b\n", **files}

    def read(path):
        if path not in files:
            raise FileNotFoundError(path)
        return files[path]
    monkeypatch.setattr(memory, "read", read)
    assert memory.available(CPU) == free


def test_what_is_free_is_not_more_than_this_machine_has():
    assert 0 < memory.available(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_resident_memory_grows_with_what_is_touched_and_not_with_what_is_reserved():
    before = memory.resident(CPU)
    reserved = mmap.mmap(-1, 200_000_000)   # not torch.empty, which may get back what was touched before
    assert memory.resident(CPU) - before < 50e6
    for page in range(0, len(reserved), mmap.PAGESIZE):
        reserved[page] = 1
    assert memory.resident(CPU) - before > 190e6
