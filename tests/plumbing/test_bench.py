"""bench: clips are what they are called, a process is charged for what it does, other frames are noticed."""
import dataclasses
import os
import subprocess
import sys

import av
import pytest
import torch
from PIL import Image

from bench import __main__ as bench
from bench import chat, frames, gpu, measure, pretrain, videos
from bench.__main__ import Config
from bench.videos import Clip
from clip import CLIPConfig, load_clip
from llm import LLaMAConfig, load_llama
from plumbing.cli import UserError

LONG, SHORT = Clip(128, 72, 2, 25, 0.2), Clip(128, 72, 2, 10, 0.2)
LLAMA = LLaMAConfig(vocab_size=600, width=128, layers=2, heads=4, mlp=256, context_length=512)
CLIP = CLIPConfig(
    image_size=16, patch_size=8, vision_width=64, vision_layers=5, vision_heads=1, vision_mlp=128,
    text_width=64, text_layers=1, text_heads=1, text_mlp=128, vocab_size=1314, projection_dim=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("clips"))


def config(folder, **settings):
    return Config("frames", folder, folder, runs=1, layers=2, prompt=30, tokens=2, **settings)


def cells(printed):
    """The rows of the table: lists of texts."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


# Contestants without torch, which would take seconds to import. They are sent away as text.
def right(path, count, size):
    import av
    import numpy
    with av.open(path) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return numpy.stack([pictures[(2 * i + 1) * len(pictures) // (2 * count)] for i in range(count)])


def one_late(path, count, size):
    import av
    import numpy
    with av.open(path) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return numpy.stack([pictures[(2 * i + 1) * len(pictures) // (2 * count) + 1] for i in range(count)])


def heavy(path, count, size):
    import time

    import numpy
    memory = numpy.ones(40 * 2 ** 20, numpy.uint8)
    while time.process_time() < 0.5:
        pass
    return memory.reshape(-1, 1024, 1024, 1)


def broken():
    raise ValueError("no such luck")


def kills_itself():
    import os
    os.kill(os.getpid(), 9)


# ---------------------------------------------------------------------------------------- clips
@pytest.mark.parametrize("clip", [LONG, SHORT, dataclasses.replace(SHORT, copies=3)])
def test_a_clip_is_what_the_table_says(folder, clip):
    path, count = videos.make(folder, clip), clip.seconds * clip.copies * videos.FPS
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (clip.width, clip.height, videos.FPS)
        decoded = [(frame.key_frame, round(frame.time * videos.FPS, 1)) for frame in container.decode(stream)]
    assert [time for _, time in decoded] == list(range(count))
    period = clip.seconds * videos.FPS   # a copy begins anew
    keyframes = [i for i, (key, _) in enumerate(decoded) if key]
    assert keyframes == [i for i in range(count) if i % period % clip.gop == 0]


def test_a_clip_is_made_once_and_nothing_else_is_left_behind(tmp_path):
    clip = dataclasses.replace(SHORT, seconds=1, copies=2)
    path = videos.make(str(tmp_path), clip)
    before = os.stat(path)
    assert videos.make(str(tmp_path), clip) == path and os.stat(path).st_mtime_ns == before.st_mtime_ns
    assert sorted(os.listdir(tmp_path)) == sorted([clip.file, dataclasses.replace(clip, copies=1).file])


# ---------------------------------------------------------------------------------------- measuring
def test_a_process_is_charged_for_its_own_work_and_memory_alone():
    def used(module):
        arguments = [module, "heavy", "", 1, 0]
        (before, after, _), cpu, peak = measure.call("heavy", heavy, frames.decode, arguments=arguments)
        return after[0] - before[0], cpu, (after[1] - before[1]) / measure.MEGABYTE, peak
    work, cpu, extra, peak = used("numpy")
    assert cpu > 0.5 and cpu > work > 0 and 40 <= extra < 60
    assert peak < 400   # this process has torch in it, which is none of the child's business
    assert used("torch")[0] < 0.5   # importing is not work


def test_other_frames_than_ours_are_noticed_and_ours_are_those_of_the_peers(folder, capsys, monkeypatch):
    monkeypatch.setattr(frames, "WHO", {"ours": ("data", frames.ours), "decord": ("numpy", one_late)})
    monkeypatch.setattr(frames, "present", lambda *_: True)
    frames.frames(config(folder), [(LONG, 4)])
    columns, _, ours, late = cells(capsys.readouterr().out)
    at = columns.index("our frames")
    assert (ours[at], late[at]) == ("yes", "other frames than ours!") and ours[-1] == "1"
    monkeypatch.setitem(frames.WHO, "decord", ("numpy", right))
    frames.frames(config(folder), [(LONG, 4)])
    assert [row[at] for row in cells(capsys.readouterr().out)[2:]] == ["yes", "yes"]


def test_flat_compares_with_the_shortest_file_and_draws(folder, capsys, monkeypatch):
    monkeypatch.setattr(frames, "WHO", {"ours": ("numpy", right), "decord": ("no_such_module", right)})
    frames.flat(config(folder), [(dataclasses.replace(SHORT, copies=copies), 3) for copies in (1, 3)])
    columns, _, *rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["ours"] * 2 and rows[0][-1] == "1" and float(rows[1][-1]) > 0
    with Image.open(os.path.join(folder, "frames_flat.png")) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 3


@pytest.mark.parametrize("function, words",
                         [(broken, "ValueError: no such luck"), (kills_itself, "exit code -9")])
def test_what_fails_in_a_process_is_one_line(function, words):
    with pytest.raises(UserError, match=f"it failed: {words}"):
        measure.call("it", function, arguments=[])


# ---------------------------------------------------------------------------------------- chats
def test_the_weights_that_are_made_load_as_what_they_are_and_are_made_once(folder):
    made = chat.make_weights(config(folder), LLAMA, CLIP)
    assert load_clip(os.path.join(made, "clip"))[0].config == CLIP
    path = os.path.join(made, "llava", "model.safetensors")
    model, _, _ = load_llama(os.path.join(made, "llava"))
    assert dataclasses.replace(model.config, norm_eps=LLAMA.norm_eps) == LLAMA
    weights = model.model.layers[0].mlp.up_proj.weight
    assert weights.dtype == torch.bfloat16 and 0.015 < weights.float().std() < 0.025
    assert (model.model.norm.weight - 1).abs().max() < 0.1
    at = os.stat(path).st_mtime_ns
    assert chat.make_weights(config(folder), LLAMA, CLIP) == made and os.stat(path).st_mtime_ns == at


def test_chat_measures_every_scheme(folder, capsys):
    chat.chat(config(folder), LLAMA, CLIP, threads=(1,))
    columns, _, *rows = cells(capsys.readouterr().out)
    assert [row[:2] for row in rows][-3:] == [[f"ours, {scheme}", "1"] for scheme in ("bf16", "int8", "int4")]
    assert all(float(row[columns.index("tokens/s")]) > 0 for row in rows)


def test_line_asks_about_longer_and_longer_videos(folder, capsys, monkeypatch):
    made = []

    def one_question(cfg, path):
        made.append(path)
        return 17, len(made) / 2, 0.25, 300
    monkeypatch.setattr(chat, "one_question", one_question)
    clips = [dataclasses.replace(SHORT, copies=copies) for copies in (1, 3)]
    chat.line(config(folder, weights="mine"), clips)
    _, _, *rows = cells(capsys.readouterr().out)
    assert made == [videos.make(folder, clip) for clip in clips for _ in range(2)]   # one is not counted
    assert [row[1:] for row in rows] == [["17", "1", "0.25", "300", "1"], ["17", "2", "0.25", "300", "2"]]
    with Image.open(os.path.join(folder, "chat_flat.png")) as picture:
        assert picture.size == (900, 660)


@pytest.mark.parametrize("made, expected", [(False, 17), (True, 5)])
def test_one_question_is_a_chat_with_the_shipped_weights_or_random_ones(folder, made, expected):
    weights = chat.make_weights(config(folder), LLAMA, CLIP) if made else measure.TINY
    cfg = config(folder, weights=weights, num_frames=3)
    tokens, seconds, seeing, peak = chat.one_question(cfg, videos.make(folder, SHORT))
    assert tokens == expected and 0 < seeing < seconds < 60 and peak > 50
    with pytest.raises(UserError, match="chat.py failed: .*no such folder of weights"):
        chat.one_question(config(folder, weights="/nowhere"), videos.make(folder, SHORT))


# ---------------------------------------------------------------------------------------- pretraining, a GPU
def test_a_step_of_pretraining_is_measured_in_its_parts():
    arguments = [0.5, 3, dataclasses.asdict(CLIP)]
    (steps, limit), _, peak = measure.call("a small step", pretrain.training_steps, arguments=arguments)
    assert len(steps) == 2 and all(len(parts) == 2 and min(parts) > 0 for parts in steps)   # CLIP, branch
    assert limit > 0 and peak > 50


def test_gpu_finds_every_precision_near_fp32_and_resumes_exactly_on_a_cpu(capsys):
    gpu.parity(torch.device("cpu"))
    columns, _, *rows = cells(capsys.readouterr().out)
    errors = {kind: max(map(float, numbers[:3])) for kind, *numbers in rows}
    assert errors["fp32"] == 0 and 0 < errors["fp16"] < 0.002 and errors["bf16"] < 0.02
    assert errors["int8"] < 0.02 and errors["int4"] < 0.1
    gpu.resume(torch.device("cpu"), 4)
    columns, _, *rows = cells(capsys.readouterr().out)
    assert len(rows) == 6 and all(float(row[4]) == 0 and float(row[3]) < float(row[2]) for row in rows)


def test_gpu_runs_where_pyav_is_not_installed(tmp_path):
    program = "import sys, torch; sys.modules['av'] = None; from bench import __main__ as bench, gpu; " \
              "gpu.speed(bench.Config('gpu', prompt=20), torch.device('cpu'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=measure.HERE)
    assert done.returncode == 0 and len(cells(done.stdout)) == 5, done.stderr


def test_bad_input_is_one_line(folder):
    with pytest.raises(UserError, match="no such stage; choose one of frames, flat"):
        bench.main(Config("frame"))
    with pytest.raises(UserError, match="--runs 0: must be at least 1"):
        bench.main(Config("frames", folder, runs=0))
