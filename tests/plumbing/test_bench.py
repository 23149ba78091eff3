"""bench: clips are what they are called, a process is charged for what it does, other frames are noticed."""
import dataclasses
import itertools
import os
import time

import av
import numpy as np
import pytest
import torch
from PIL import Image

from bench import __main__ as bench
from bench import chat, frames, gpu, measure
from bench.__main__ import Config
from bench.frames import Clip
from clip import CLIPConfig, load_clip
from llm import LLaMAConfig, load_llama
from plumbing import cli
from plumbing.cli import UserError

LONG, SHORT = Clip(128, 72, 2, 25, 0.2), Clip(128, 72, 2, 10, 0.2)
LLAMA = LLaMAConfig(vocab_size=720, width=128, layers=2, heads=4, mlp=256, context_length=512)
CLIP = CLIPConfig(
    image_size=16, patch_size=8, vision_width=64, vision_layers=5, vision_heads=1, vision_mlp=128,
    text_width=64, text_layers=1, text_heads=1, text_mlp=128, vocab_size=1314, projection_dim=32)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("clips"))
    return Config("frames", folder, folder, runs=1, layers=2)


@pytest.fixture
def here(monkeypatch):
    """Work is done in this process, and costs as many seconds as it has been called."""
    calls = []

    def call(function, *arguments):
        calls.append(arguments)
        return function(*arguments), len(calls), 50.0
    for module in (frames, chat):
        monkeypatch.setattr(module, "call", call)
    return calls


def cells(capsys):
    """The rows of the table that was printed: lists of texts."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


# ---------------------------------------------------------------------------------------- clips
@pytest.mark.parametrize("clip", [LONG, SHORT, dataclasses.replace(SHORT, copies=3)])
def test_a_clip_is_what_the_table_says(cfg, clip):
    path, count = frames.make(cfg.data, clip), clip.seconds * clip.copies * frames.FPS
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (clip.width, clip.height, frames.FPS)
        decoded = [(frame.key_frame, round(frame.time * frames.FPS, 1)) for frame in container.decode(stream)]
    assert [time for _, time in decoded] == list(range(count))
    period = clip.seconds * frames.FPS   # a copy begins anew
    assert [key for key, _ in decoded] == [i % period % clip.gop == 0 for i in range(count)]


def test_a_clip_is_made_once_and_nothing_else_is_left_behind(tmp_path):
    clip = dataclasses.replace(SHORT, seconds=1, copies=2)
    path = frames.make(str(tmp_path), clip)
    before = os.stat(path).st_mtime_ns
    assert frames.make(str(tmp_path), clip) == path and os.stat(path).st_mtime_ns == before
    assert len(os.listdir(tmp_path)) == 2   # and the one that is copied


# ---------------------------------------------------------------------------------------- measuring
def heavy(megabytes, seconds):
    memory = np.ones(megabytes << 20, np.uint8)
    while time.process_time() < seconds:
        pass
    return memory[:3]


def test_a_process_is_charged_for_its_own_work_and_memory_alone():
    before = time.process_time()
    found, cpu, extra = measure.call(heavy, 40, 0.0)
    assert found.tolist() == [1, 1, 1] and 40 <= extra < 60
    assert cpu < 0.5 and time.process_time() - before < 2   # importing torch is not its work


def test_other_frames_than_ours_are_noticed(cfg, capsys, monkeypatch, here):
    def plain(late):
        def read(path, count):
            with av.open(path) as container:
                shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            return np.stack([shown[(2 * i + 1) * len(shown) // (2 * count) + late] for i in range(count)])
        return read
    monkeypatch.setattr(frames, "WHO", {"ours": frames.ours, "plain": plain(0), "late": plain(1)})
    frames.frames(cfg, [(LONG, 4)])
    columns, _, *rows = cells(capsys)
    shown = [row[columns.index("our frames")] for row in rows]
    assert shown == ["yes", "yes", "other frames than ours!"]
    assert [row[3] for row in rows] == ["4", "5", "6"] and rows[1][-1] == "0.8"   # not the first round


def test_a_loader_feeds_clips(cfg, capsys, here):
    frames.loader(cfg, SHORT, counts=(1, 2))
    _, _, *rows = cells(capsys)
    assert [row[0] for row in rows] == ["1", "2"] and all(float(row[1]) > 1 for row in rows)
    assert [workers for _, workers in here] == [1, 2]


# ---------------------------------------------------------------------------------------- chats
def test_the_weights_that_are_made_load_as_what_they_are_and_are_made_once(cfg):
    made = chat.make_weights(cfg, LLAMA, CLIP)
    assert load_clip(os.path.join(made, "clip"))[0].config == CLIP
    model, _, _ = load_llama(os.path.join(made, "llava"))
    assert dataclasses.replace(model.config, norm_eps=LLAMA.norm_eps) == LLAMA
    weights = model.model.layers[0].mlp.up_proj.weight
    assert weights.dtype == torch.bfloat16 and 0.015 < weights.float().std() < 0.025
    assert (model.model.norm.weight - 1).abs().max() < 0.1
    path = os.path.join(made, "llava", "model.safetensors")
    at = os.stat(path).st_mtime_ns
    assert chat.make_weights(cfg, LLAMA, CLIP) == made and os.stat(path).st_mtime_ns == at


def test_chat_measures_every_scheme(cfg, capsys, monkeypatch, here):
    monkeypatch.setattr(chat, "TOKENS", 2)
    monkeypatch.setattr(chat, "reading", lambda: 1e10)
    monkeypatch.setattr(chat, "multiplying", lambda *_: 1e11)
    chat.chat(cfg, LLAMA, CLIP)
    columns, _, *rows = cells(capsys)
    assert [row[0] for row in rows][-3:] == [f"ours, {scheme}" for scheme in ("bf16", "int8", "int4")]
    assert all(float(row[columns.index("tokens/s")]) > 0 for row in rows)


def test_a_frame_in_clip_takes_longer_than_the_products_in_it(cfg, capsys, here):
    chat.clip(cfg, CLIP)
    columns, _, *rows = cells(capsys)
    assert [row[0] for row in rows] == ["fp32", "int8"]
    assert all(0 < float(row[-1]) < 1 and float(row[2]) == pytest.approx(100 * float(row[1])) for row in rows)


def test_linvt_reads_as_many_rows_whatever_the_video_has(cfg, capsys, here):
    chat.linvt(cfg, LLAMA, CLIP, counts=(2, 5))
    columns, _, *rows = cells(capsys)
    assert [row[:3] for row in rows] == [["all tokens", "2", "8"], ["LinVT", "2", "4"], ["all tokens", "5", "20"],
                                         ["LinVT", "5", "4"]]
    made = [float(row[columns.index("s to make them")]) for row in rows]
    assert made[0] == made[2] == 0 < made[1] and rows[1][-1] == rows[3][-1] < rows[0][-1] < rows[2][-1]


def test_line_asks_about_longer_and_longer_videos(cfg, capsys, monkeypatch):
    made = []

    def two_questions(weights, path, tokens, num_frames):
        made.append(path)
        return 17, len(made), 2, 1, 3
    monkeypatch.setattr(chat, "make_weights", lambda cfg: "mine")
    monkeypatch.setattr(chat, "two_questions", two_questions)
    clips = [dataclasses.replace(SHORT, copies=copies) for copies in (1, 3)]
    chat.line(cfg, clips)
    _, _, *rows = cells(capsys)
    assert made == [frames.make(cfg.data, clip) for clip in clips for _ in range(2)]   # one is not counted
    assert [row[1:] for row in rows] == [["17", "2", "2", "1", "3", "1"], ["17", "4", "2", "1", "3", "2"]]
    with Image.open(os.path.join(cfg.pictures, "chat_flat.png")) as picture:
        assert picture.size == (900, 660)


def test_two_questions_are_a_chat_with_random_weights(cfg):
    weights, path = chat.make_weights(cfg, LLAMA, CLIP), frames.make(cfg.data, SHORT)
    tokens, seconds, seeing, second, memory = chat.two_questions(weights, path, "branch", 3)
    assert tokens == 5 and 0 <= seeing < seconds < 60 and 0 < second < seconds and memory > 0.05
    assert chat.two_questions(chat.with_adapters(weights), path, "frame_cls", 100)[0] == 100
    assert chat.two_questions(weights, path, "linvt", 3)[0] == 4
    with pytest.raises(UserError, match="chat.py failed: .*/nowhere: lacks clip"):
        chat.two_questions("/nowhere", path, "branch", 3)


# ---------------------------------------------------------------------------------------- a GPU
def test_every_precision_is_near_fp32(capsys):
    gpu.errors(CPU)
    _, _, *rows = cells(capsys)
    errors = {kind: max(map(float, numbers[:2])) for kind, *numbers in rows}
    assert errors["fp32"] == 0 and 0 < errors["fp16"] < 0.002 and errors["bf16"] < 0.02
    assert errors["int8"] < 0.02 and errors["int4"] < 0.1


def test_training_in_every_precision_learns_and_resumes_exactly_on_a_cpu(capsys):
    gpu.steps(CPU, 2)
    _, _, *rows = cells(capsys)
    assert len(rows) == 6 and all(float(row[4]) == 0 and float(row[3]) < float(row[2]) for row in rows)


def test_speed_stands_beside_what_the_machine_can(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "reading", lambda *_: 1e10)
    monkeypatch.setattr(gpu, "multiplying", lambda *_: 1e11)
    gpu.speed(CPU, CLIP, LLAMA, frames=4, prompt=20, answer=5)
    found = {row[0]: row[1:] for row in cells(capsys)}
    assert {"CLIP and branch", "CLIP alone", "ours, bf16", "ours, int8", "ours, int4"} <= found.keys()
    assert all(0 < float(number) for name in found if "ours" in name for number in found[name])


def test_training_at_full_size_is_that_of_the_scripts(capsys, monkeypatch):
    memory = itertools.count(1)
    monkeypatch.setattr(gpu, "peak_of", lambda step, device: (measure.best(step, device, 1), next(memory)))
    gpu.batches(CPU, CLIP, sizes=(2, 4), frames=2)
    assert all(gpu.tuning(CPU, CLIP, LLAMA, lora, True, frames=3, words=10)[1] for lora in (False, True))
    _, _, *rows = cells(capsys)
    assert [row[:3] for row in rows[:3]] == [["no", "0%", "4"], ["no", "70%", "2"], ["no", "70%", "4"]]
    assert len(rows) == 6 + 4


def test_bad_input_is_one_line():
    with pytest.raises(UserError, match="frame: choose one of frames, loader"):
        cli.parse(Config, ["frame"], ["stage"])
    with pytest.raises(UserError, match="--runs 0: must be from 1"):
        cli.parse(Config, ["frames", "--runs", "0"], ["stage"])
    with pytest.raises(UserError, match="gpu: this machine, or this build of torch, has none"):
        bench.main(Config("gpu"))
