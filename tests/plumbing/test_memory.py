"""What a chat needs of memory and what there is: the arithmetic, the limits of containers, and what is said when it does not fit."""
import dataclasses
import functools
import mmap
import os

import pytest
import torch

import chat
from clip import CLIPConfig, ImageTower
from llm import LLaMAConfig
from model import Branch
from plumbing import memory, weightfile
from plumbing.cli import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SEVEN, SMALL = LLaMAConfig(), LLaMAConfig(width=64, layers=2, heads=2, mlp=96, vocab_size=300)
G = 10 ** 9


@pytest.mark.parametrize("llama, device, bf16, chosen", [
    (SMALL, CPU, True, (torch.float32, None, "fp32")), (SEVEN, CPU, True, (torch.bfloat16, "int8", "int8 and bf16")),
    (SEVEN, CPU, False, (torch.float32, "int8", "int8 and fp32")), (SMALL, GPU, True, (torch.float16, None, "fp16")),
    (SEVEN, GPU, True, (torch.float16, None, "fp16"))], ids=["small", "7B", "7B without bf16", "small on a GPU", "7B on a GPU"])
def test_auto_is_quick_where_it_runs(llama, device, bf16, chosen, monkeypatch):
    monkeypatch.setattr(memory, "fast_bf16", lambda: bf16)   # whether this CPU computes in it
    assert memory.choose("auto", "auto", device, llama) == chosen
    assert device == GPU or memory.choose("auto", "int4", device, SEVEN)[0] == torch.bfloat16   # who asks for it lacks room


def test_what_is_asked_for_is_chosen():
    assert memory.choose("fp32", "none", CPU, SEVEN) == (torch.float32, None, "fp32")
    assert memory.choose("bf16", "none", CPU, SEVEN) == (torch.bfloat16, "bf16", "bf16")   # nothing is rounded
    assert memory.choose("bf16", "int4", GPU, SMALL) == (torch.bfloat16, "int4", "int4 and bf16")


def test_a_7b_needs_what_is_known_of_it():
    need = memory.needs(CLIPConfig(), SEVEN, 100, torch.bfloat16, False, None, CPU)
    assert need["LLaMA"] == pytest.approx(13.5e9, rel=0.01)                         # 6.74e9 parameters
    few = memory.needs(CLIPConfig(), SEVEN, 8, torch.bfloat16, False, None, CPU)
    assert need["KV cache"] == few["KV cache"] == 2 * 32 * 4096 * 2 * 2048         # keys and values, layers, width, bytes, tokens
    assert need["video"] == pytest.approx(1.4e9, rel=0.05) and few["video"] < 0.4e9   # of 257 patches a frame
    quantised = [memory.needs(CLIPConfig(), SEVEN, 100, torch.bfloat16, False, scheme, CPU)["LLaMA"] for scheme in ("int8", "int4")]
    assert 6.5e9 < quantised[0] < 8e9 and 3.3e9 < quantised[1] < 4.5e9


def test_a_delta_is_summed_up_before_it_is_quantised_and_never_on_a_gpu():
    for device, more in ((CPU, 13.5e9), (GPU, 0)):
        plain, added = (sum(memory.needs(CLIPConfig(), SEVEN, 100, torch.bfloat16, joined, "int8", device).values()) for joined in (False, True))
        assert added - plain == pytest.approx(more, rel=0.01)


@pytest.mark.parametrize("config", [CLIPConfig(), CLIPConfig(image_size=64, patch_size=16, vision_width=128, vision_layers=6, vision_heads=4, vision_mlp=320)])
def test_what_sees_is_counted_to_the_byte(config):
    with weightfile.shapes_only():
        parts = {"CLIP, image tower": ImageTower(config), "branch": Branch(config.vision_width, config.vision_heads, config.vision_mlp, depth=3, gated=False),
                 "projector": torch.nn.Linear(config.vision_width, SEVEN.width)}
    need = memory.needs(config, SEVEN, 0, torch.bfloat16, False, None, CPU)
    assert {part: need[part] for part in parts} == {part: 2 * sum(p.numel() for p in module.parameters()) for part, module in parts.items()}


def test_a_long_context_is_cut_to_what_a_conversation_may_have():
    short, long = (memory.needs(CLIPConfig(), dataclasses.replace(SEVEN, context_length=n), 8, torch.bfloat16, False, None, CPU) for n in (8192, 131072))
    assert short == long


def check(free, monkeypatch, scheme=None):
    monkeypatch.setattr(memory, "available", lambda device: free)
    return memory.check("weights/7b", functools.partial(memory.needs, CLIPConfig(), SEVEN, 100, torch.bfloat16, False, device=CPU), scheme, CPU)


def test_what_fits_is_accepted_and_what_is_unknown_is_said_to_be(monkeypatch):
    assert check(64 * G, monkeypatch) is True and check(None, monkeypatch) is False


@pytest.mark.parametrize("free, words, absent", [
    (12 * G, ["12.0 GB can be had", "--quantize int8 needs", "--quantize int4 needs"], ["no quantisation"]),
    (8 * G, ["8.0 GB can be had", "--quantize int4 needs"], ["--quantize int8"]), (G, ["no quantisation would fit"], ["--quantize"])])
def test_what_does_not_fit_is_one_line_with_what_would(monkeypatch, free, words, absent):
    with pytest.raises(UserError) as e:
        check(free, monkeypatch)
    line = str(e.value)
    assert line.startswith("weights/7b: needs ") and "\n" not in line
    assert all(word in line for word in words) and not any(word in line for word in absent)


def test_a_chat_that_does_not_fit_ends_before_weights_are_read(weights, video, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    monkeypatch.setattr(chat, "load_chat", None)
    with pytest.raises(UserError, match="needs .* can be had"):
        chat.Session(chat.Config(video, weights=weights))


def test_a_system_that_does_not_say_is_named_by_verbose_alone(weights, video, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda device: None)
    for verbose in (False, True):
        chat.Session(chat.Config(video, weights=weights, verbose=verbose))
        assert ("not checked" in capsys.readouterr().err) is verbose


# ---------------------------------------------------------------------------------------------------- what there is
def group(root, path, **files):
    os.makedirs(root / path, exist_ok=True)
    for name, text in files.items():
        (root / path / name.replace("__", ".")).write_text(text)


def test_the_tightest_of_the_groups_around_a_process_counts_and_cached_files_do_not(tmp_path):
    group(tmp_path, "", memory__max="max\n")
    group(tmp_path, "a", memory__max="1000\n", memory__current="700\n", memory__stat="active_file 100\ninactive_file 200\nanon 400\n")
    group(tmp_path, "a/b", memory__max="5000\n", memory__current="700\n", memory__stat="")
    assert sorted(memory.room_in_groups(["0::/a/b"], str(tmp_path))) == [600, 4300]


def test_groups_of_the_first_version_count_too(tmp_path):
    group(tmp_path, "memory/a", memory__limit_in_bytes="1000\n", memory__usage_in_bytes="700\n", memory__stat="total_active_file 50\n")
    assert list(memory.room_in_groups(["7:memory:/a", "3:cpu,cpuacct:/a", "0::/"], str(tmp_path))) == [350]


def test_a_group_that_cannot_be_seen_from_inside_a_container_is_that_of_the_container(tmp_path):
    group(tmp_path, "memory", memory__limit_in_bytes="1000\n", memory__usage_in_bytes="700\n", memory__stat="")
    assert list(memory.room_in_groups(["4:memory:/docker/123abc"], str(tmp_path))) == [300]


def test_no_groups_no_limits(tmp_path):
    assert list(memory.room_in_groups(["0::/"], str(tmp_path / "nowhere"))) == list(memory.room_in_groups([], str(tmp_path))) == []


def test_what_can_be_had_is_not_more_than_this_machine_has():
    assert 0 < memory.available(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_resident_memory_grows_with_what_is_touched_and_not_with_what_is_reserved():
    before = memory.resident(CPU)
    reserved = mmap.mmap(-1, 200_000_000)   # not torch.empty, which may get back what was touched before
    assert memory.resident(CPU) - before < 50e6
    for page in range(0, len(reserved), mmap.PAGESIZE):
        reserved[page] = 1
    assert memory.resident(CPU) - before > 190e6
