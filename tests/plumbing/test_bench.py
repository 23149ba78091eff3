"""bench.py: the clips are what they are called, a process is charged for what it does, other frames than ours are noticed."""
import dataclasses
import os
import resource
import struct
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

from bench import __main__ as bench
from bench import chats, clips, frames, full_size, measure, training
from bench.__main__ import Config
from bench.clips import Clip
from bench.frames import Case
from bench.measure import Contestant
from clip import CLIPConfig, load_clip
from llm import LLaMAConfig, load_llama
from plumbing.cli import UserError

LONG, SHORT = Clip(128, 72, 2, 25, 0.2), Clip(128, 72, 2, 10, 0.2)
VP9 = dataclasses.replace(SHORT, codec="libvpx-vp9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("clips"))


def config(folder, **settings):
    return Config("frames", data=folder, runs=1, picture=os.path.join(folder, "flat", "flat.png"), **settings)


# Contestants without torch, which would take seconds to import. They are sent away as text, so all that they need is inside.
def right(path, count):
    import av
    import numpy
    with av.open(path) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return numpy.stack([pictures[(2 * i + 1) * len(pictures) // (2 * count)] for i in range(count)])


def one_late(path, count):
    import av
    import numpy
    with av.open(path) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    frames = [pictures[(2 * i + 1) * len(pictures) // (2 * count)] for i in range(count)]
    return numpy.stack([*frames[:-1], pictures[(2 * count - 1) * len(pictures) // (2 * count) + 1]])


def too_few(path, count):
    import av
    import numpy
    with av.open(path) as container:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][:count - 1])


def heavy(path, count):
    import time

    import numpy
    memory = numpy.ones(40 * 2 ** 20, numpy.uint8)
    while time.process_time() < 0.5:
        pass
    return memory.reshape(-1, 1024, 1024, 1)


def broken(path, count):
    raise ValueError("no such luck")


# ---------------------------------------------------------------------------------------------------- clips
@pytest.mark.parametrize("clip", [LONG, SHORT, VP9, dataclasses.replace(SHORT, copies=3)], ids=lambda clip: clip.file)
def test_a_clip_is_what_the_table_says(folder, clip):
    path, count = clips.make(folder, clip), clip.seconds * clip.copies * clips.FPS
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (clip.width, clip.height, clips.FPS)
        assert stream.codec_context.codec.canonical_name == {"libx264": "h264", "libvpx-vp9": "vp9"}[clip.codec]
        decoded = [(frame.key_frame, round(frame.time * clips.FPS, 1)) for frame in container.decode(stream)]
    assert [time for _, time in decoded] == list(range(count))
    period = clip.seconds * clips.FPS   # a copy begins anew
    assert [i for i, (key, _) in enumerate(decoded) if key] == [i for i in range(count) if i % period % clip.gop == 0]


def test_a_clip_is_made_once_and_nothing_else_is_left_behind(tmp_path):
    clip = dataclasses.replace(SHORT, seconds=1, copies=2)
    path = clips.make(str(tmp_path), clip)
    before = os.stat(path)
    assert clips.make(str(tmp_path), clip) == path and os.stat(path).st_mtime_ns == before.st_mtime_ns
    assert sorted(os.listdir(tmp_path)) == sorted([clip.file, dataclasses.replace(clip, copies=1).file])


def test_every_clip_of_the_tables_has_a_name_of_its_own():
    videos = {case.clip for case in frames.FRAMES + frames.FLAT if case.clip}
    assert len({clip.file for clip in videos}) == len(videos) > 5


def test_neighbouring_frames_differ_by_more_than_two_contestants_may():
    pictures = np.stack(list(clips.scene(256, 144, 230)))[:, :144]   # Y; the camera goes once round
    assert min(frames.difference(pictures[i:i + 1], pictures[i + 1:i + 2]) for i in range(229)) > 1.5 * frames.SAME


# ---------------------------------------------------------------------------------------------------- measuring
def test_a_process_is_charged_for_its_own_work_and_memory_alone(folder):
    usage = frames.decode(config(folder), Contestant("heavy", "numpy", heavy), "", Case(None, 1, []))
    assert usage.process > 0.5 and usage.process > usage.work > 0 and usage.wall > 0
    assert 40 <= usage.extra < 60
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / measure.MEGABYTE
    assert usage.peak < own   # this process has torch in it, which is none of the child's business


def test_importing_is_not_work(folder):
    slow = Contestant("heavy", "time, numpy\nwhile time.process_time() < 0.5: pass", heavy)
    usage = frames.decode(config(folder), slow, "", Case(None, 1, []))
    assert usage.process - usage.work > 0.5


def test_other_frames_than_ours_are_noticed(folder, capsys):
    functions = {"ours": right, "same": right, "late": one_late, "few": too_few}
    frames.frames(config(folder), [Case(LONG, 4, [Contestant(name, "av, numpy", f) for name, f in functions.items()])])
    printed = capsys.readouterr().out
    assert [name for name in functions if f"T = 4: {name} shows other frames than ours" in printed] == ["late", "few"]


def test_our_frames_are_those_of_the_peers(folder):
    path = clips.make(folder, VP9)
    assert frames.difference(frames.ours(path, 5), right(path, 5)) == 0
    assert frames.difference(frames.ours(path, 5), frames.with_pyav(path, 5)) == 0
    assert frames.difference(frames.ours_resize("", 1, 224), frames.pillow_resize("", 1, 224)) < frames.SAME
    assert frames.ours(path, 5, 36).shape == (5, 36, 64, 3)


def test_ours_runs_in_a_process_of_its_own(folder, tmp_path):
    usage = frames.decode(config(folder), frames.OURS, clips.make(folder, SHORT), Case(SHORT, 3, [], 36), str(tmp_path / "frames.npy"))
    assert usage.process > usage.work > 0
    assert (np.load(tmp_path / "frames.npy") == frames.ours(clips.make(folder, SHORT), 3, 36)[:, ::4, ::4]).all()


# ---------------------------------------------------------------------------------------------------- stages
def cells(printed):
    """The rows of the table: lists of texts."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]


def test_frames_prints_ratios_and_leaves_out_who_is_not_installed(folder, capsys):
    absent = Contestant("absent", "no_such_module", right, "no-such-package")
    frames.frames(config(folder), [Case(SHORT, 3, [Contestant("ours", "av, numpy", right), frames.PYAV, absent])])
    printed = capsys.readouterr().out
    columns, _, *rows = cells(printed)
    assert "absent: not installed (pip install no-such-package)" in printed
    assert [row[:3] for row in rows] == [["72p x264, 2 s, GOP 10", "3", "ours"], ["72p x264, 2 s, GOP 10", "3", "PyAV, all frames"]]
    cpu = [float(row[columns.index("CPU s of the process")]) for row in rows]
    assert float(rows[1][columns.index("ours / peer: process")]) == pytest.approx(cpu[0] / cpu[1], rel=0.1)   # both are rounded
    assert rows[0][columns.index("ours / peer: process")] == "" and rows[1][-1] == "0.00"


def test_flat_compares_with_the_shortest_file_and_draws(folder, capsys):
    who = [Contestant("ours", "av, numpy", right), Contestant("peer", "av, numpy", right, "av")]
    frames.flat(config(folder), [Case(dataclasses.replace(SHORT, copies=copies), 3, who) for copies in (1, 3)])
    columns, _, *rows = cells(capsys.readouterr().out)
    at = columns.index("to the first: work")
    assert [row[at] for row in rows[:2]] == ["1.00", "1.00"] and float(rows[2][at]) > 0
    with Image.open(os.path.join(folder, "flat", "flat.png")) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 3


def test_line_asks_about_longer_and_longer_videos(folder, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(frames, "one_question", lambda cfg, path: made.append(path) or (17, len(made) * 0.5, len(made) * 0.25, 300.0))
    videos = [dataclasses.replace(SHORT, copies=copies) for copies in (1, 3)]
    frames.line(config(folder, weights="mine", line_picture=os.path.join(folder, "line.png")), videos)
    columns, _, *rows = cells(capsys.readouterr().out)
    assert made == [clips.make(folder, clip) for clip in videos for _ in range(2)]   # each once that is not counted
    assert [row[1:] for row in rows[:2]] == [["17", "1.00", "1.00", "0.50", "300", "1.00"], ["17", "2.00", "2.00", "1.00", "300", "1.00"]]   # calls 2 and 4
    assert rows[4:] == [["2 s", "512", "0.27 GB", "17", "0.009 GB"], ["6 s", "1,536", "0.81 GB", "17", "0.009 GB"]]
    with Image.open(os.path.join(folder, "line.png")) as picture:
        assert picture.size == (900, 660)


@pytest.mark.parametrize("made, expected", [(False, 17), (True, 5)])
def test_one_question_is_a_chat_with_the_shipped_weights_or_random_ones(folder, tmp_path, made, expected):
    weights = full_size.make_chat(config(str(tmp_path)), LLaMAConfig(vocab_size=600, width=128, layers=2, heads=4, mlp=256), dataclasses.replace(CLIP, vision_layers=4)) if made else \
        os.path.join(measure.HERE, "weights", "tiny")
    tokens, seconds, seeing, peak = frames.one_question(config(folder, weights=weights, num_frames=3), clips.make(folder, SHORT))
    assert tokens == expected and 0 < seeing < seconds < 60 and peak > 50


# ---------------------------------------------------------------------------------------------------- load, chat, quality
LLAMA = LLaMAConfig(vocab_size=600, width=128, layers=2, heads=4, mlp=256, context_length=128)
CLIP = CLIPConfig(image_size=16, patch_size=8, vision_width=64, vision_layers=2, vision_heads=1, vision_mlp=128, text_width=64, text_layers=1,
                  text_heads=1, text_mlp=128, projection_dim=32)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def small(folder, **settings):
    return Config("chat", data=folder, runs=1, prompt=30, tokens=2, **settings)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_weights_that_are_made_load_as_what_they_are(folder):
    path = full_size.make_openai_clip(small(folder), CLIP)
    towers, _ = load_clip(path)
    assert towers.config == CLIP and {p.dtype for p in towers.parameters()} == {torch.float16}
    made = full_size.make_llama(small(folder), LLAMA)
    model, _, _ = load_llama(made)
    assert dataclasses.replace(model.config, norm_eps=LLAMA.norm_eps) == LLAMA and model.lm_head.weight.dtype == torch.bfloat16
    weights = model.model.layers[0].mlp.up_proj.weight
    assert 0.015 < weights.float().std() < 0.025 and (model.model.norm.weight - 1).abs().max() < 0.1
    at = os.stat(os.path.join(made, "model.safetensors")).st_mtime_ns, os.stat(path).st_mtime_ns
    full_size.make_llama(small(folder), LLAMA), full_size.make_openai_clip(small(folder), CLIP)   # once is enough
    assert at == (os.stat(os.path.join(made, "model.safetensors")).st_mtime_ns, os.stat(path).st_mtime_ns)


def read_gguf(path):
    """A reader of its own: (settings, {name: (shape, kind, offset)}, where the tensors begin, bytes in all)."""
    data, at = open(path, "rb").read(), 0

    def take(format):
        nonlocal at
        values = struct.unpack_from("<" + format, data, at)
        at += struct.calcsize("<" + format)
        return values[0] if len(values) == 1 else values

    def string():
        return bytes(take(f"{take('Q')}s")).decode()

    def value(kind):
        if kind == 8:
            return string()
        if kind == 9:
            inner, n = take("IQ")
            return [value(inner) for _ in range(n)]
        return take({4: "I", 5: "i", 6: "f"}[kind])
    magic, version, tensors, settings = take("4sIQQ")
    assert (magic, version) == (b"GGUF", 3)
    settings = {string(): value(take("I")) for _ in range(settings)}
    shapes = {}
    for _ in range(tensors):
        name, n = string(), take("I")
        shape = [take("Q") for _ in range(n)]
        shapes[name] = (shape[::-1], *take("IQ"))
    return settings, shapes, -(-at // 32) * 32, len(data)


def test_the_file_for_llama_cpp_holds_what_its_header_says(folder):
    settings, tensors, start, size = read_gguf(full_size.make_gguf(small(folder), LLAMA))
    assert settings["general.architecture"] == "llama" and settings["llama.block_count"] == 2 and settings["llama.attention.head_count_kv"] == 4
    assert len(settings["tokenizer.ggml.tokens"]) == len(settings["tokenizer.ggml.scores"]) == len(settings["tokenizer.ggml.token_type"]) == 600
    assert tensors["blk.1.ffn_down.weight"][:2] == ([128, 256], 2) and tensors["output_norm.weight"][:2] == ([128], 0)
    ends = [offset + (np.prod(shape) // 32 * 18 if kind == 2 else 4 * shape[0]) for shape, kind, offset in tensors.values()]
    begins = [offset for *_, offset in tensors.values()]
    assert all(offset % 32 == 0 for offset in begins) and all(0 <= b - e < 32 for e, b in zip(ends, begins[1:])) and start + ends[-1] <= size
    assert len(tensors) == 3 + 2 * 9


@linux
def test_load_tells_time_and_memory_of_each(folder, capsys):
    chats.load(small(folder), LLAMA, CLIP)
    columns, _, *rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["CLIP, OpenAI's archive", "LLaMA, as in the file", "LLaMA, bf16", "LLaMA, int8", "LLaMA, int4"]
    assert all(float(row[2]) > 0 for row in rows) and all(float(row[5]) > float(row[2]) for row in rows[1:])


@linux
def test_chat_measures_every_scheme_and_the_limits(folder, capsys):
    chats.chat(small(folder), LLAMA, threads=(1,))
    printed = capsys.readouterr().out
    columns, _, *rows = cells(printed)
    assert [row[:2] for row in rows] == [[who, "1"] for who in ("ours, bf16", "ours, int8", "ours, int4", "limits")]
    assert {len(row) for row in rows} == {len(columns)}
    assert all(float(row[columns.index("tokens/s")]) > 0 for row in rows if row[0] != "limits")
    assert "transformers, bf16: not installed (pip install transformers)" in printed or "transformers, bf16: transformers " in printed
    assert "not measured" in printed or torch.cuda.is_available()


def test_a_contestant_that_fails_is_one_line():
    with pytest.raises(UserError, match="the broken one failed: ValueError: no such luck"):
        measure.call(sys.executable, "the broken one", broken, arguments=["", 1])


def kills_itself(path, count):
    import os
    os.kill(os.getpid(), 9)


def test_a_contestant_that_dies_without_a_word_is_one_line():
    with pytest.raises(UserError, match="the dying one failed: exit code -9"):
        measure.call(sys.executable, "the dying one", kills_itself, arguments=["", 1])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_of_pretraining_is_measured_in_its_parts(checkpointed):
    arguments = ["fp32", 0.5, checkpointed, 3, dataclasses.asdict(dataclasses.replace(CLIP, vision_layers=5))]
    (steps, limit), peak = measure.call(sys.executable, "a small step", training.training_steps, arguments=arguments)
    assert len(steps) == 2 and all(len(parts) == 3 and all(wall > 0 for wall, _ in parts) for parts in steps)   # CLIP, branch, AdamW
    assert limit > 0 and peak > 50


def test_quality_has_a_number_for_every_scheme(capsys):
    chats.quality(Config("quality"), LLaMAConfig(width=128, mlp=1024, heads=4))   # layers of a 7B take a minute
    columns, _, *rows = cells(capsys.readouterr().out)
    assert columns == ["what", "error", "bf16", "int8", "int4"] and [row[:2] for row in rows[:2]] == [["tiny LLaVA", "logits"], ["tiny LLaVA", "tokens likeliest in both"]]
    bf16, int8, int4 = map(float, rows[0][2:])
    assert 0 < bf16 < 0.02 and int8 < 0.02 and int8 < int4 < 0.15


def test_bad_input_is_one_line(folder):
    with pytest.raises(UserError, match="chat.py failed: .*no such folder of weights"):
        frames.one_question(config(folder, weights="/nowhere"), clips.make(folder, SHORT))
    with pytest.raises(UserError, match="no such stage; choose one of frames, flat"):
        bench.main(Config("frame"))
    with pytest.raises(UserError, match="--runs 0: must be at least 1"):
        frames.frames(Config("frames", data=folder, runs=0), [])
    with pytest.raises(UserError, match="--peer_python no_such_python: no such program"):
        frames.frames(config(folder, peer_python="no_such_python"), [Case(SHORT, 3, [])])
    with pytest.raises(UserError, match="broken, 72p x264, 2 s, GOP 10, failed: ValueError: no such luck"):
        frames.decode(config(folder), Contestant("broken", "numpy", broken), "", Case(SHORT, 3, []))
