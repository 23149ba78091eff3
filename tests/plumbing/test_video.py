"""data.py and video.py, frames by time: exactly those of a whole decode, from any file, in any process, in
the right colours and shape."""
import faulthandler
import fractions
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import struct
import warnings
import zlib

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import data
from films import CALLS, FPS, Opened, film, number, numbers, picture, seen, stacked
from plumbing import video

FRAMES = 30
CASES = 500       # damaged files of the fuzz test: about 15 s of one core; raise it for a longer look
SEED = 0
WATCHDOG = 60     # seconds without any progress after which a child process is a hung one


# ----------------------------------------------------------------------------------------------------- clips
TEXTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


def textured(i):
    """picture(i) of test_data with a texture that drifts through it: a frame decoded without the earlier ones
    looks wrong."""
    image, texture = picture(i), np.roll(TEXTURE, (i, 3 * i), (0, 1))
    image[:24], image[56:] = texture[:24], texture[56:]
    image[24:56] = np.clip(image[24:56].astype(int) + texture[24:56] // 8 - 16, 0, 255)
    return image


MS = fractions.Fraction(1, 1000)
# milliseconds
UNEVEN = [0, *itertools.accumulate(random.Random(5).choices([10, 20, 40, 50, 330, 900], k=FRAMES - 1))]
UNEVENLY = {"pts": UNEVEN, "time_base": MS, "rate": 1000}
X264 = {"bf": "3", "x264-params": "b-pyramid=normal:ref=4:scenecut=0"}
SHORT = {"g": "10", **X264}
OPEN = {"g": "10", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}
# keyframes that are whole only frames later
REFRESH = {"g": "10", "bf": "0", "x264-params": "intra-refresh=1:scenecut=0"}
GROUPS = "keyint=12:min-keyint=12:bframes=4:scenecut=0:log-level=none:pools=none"
X265, X265_OPEN = ({"x265-params": f"{GROUPS}:{more}"} for more in ("b-pyramid=1:open-gop=0", "open-gop=1"))
VP9 = {"g": "12", "deadline": "good", "cpu-used": "5", "lag-in-frames": "16", "b": "200k"}
AV1 = {"g": "16", "preset": "10", "svtav1-params": "lp=1:hierarchical-levels=3"}
INTERLACED = {"g": "10", "flags": "+ilme+ildct", "x264-params": "tff=1"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof+skip_trailer"}
INDEXED = {"movflags": "frag_keyframe+default_base_moof+global_sidx"}
CLIPS = {   # name: (file, encoder, options, what else film() takes)
    "h264 long gop": ("long.mp4", "libx264", {"g": "250", **X264}, {}),
    "h264 short gop": ("short.mp4", "libx264", SHORT, {}),
    "h264 short gop and sound": ("sound.mkv", "libx264", SHORT, {"sound": 36}),
    "h264 open gop mp4": ("open.mp4", "libx264", OPEN, {}),
    "h264 open gop mkv": ("open.mkv", "libx264", OPEN, {}),
    "h264 open gop ts": ("open.ts", "libx264", OPEN, {}),
    "h264 intra refresh mkv": ("refresh.mkv", "libx264", REFRESH, {}),
    "h264 intra refresh ts": ("refresh.ts", "libx264", REFRESH, {}),
    "h264 interlaced": ("fields.ts", "libx264", INTERLACED, {}),
    "h264 in fragments": ("fragments.mp4", "libx264", SHORT, {"container": FRAGMENTS}),
    "h264 in fragments with an index": ("indexed.mp4", "libx264", SHORT, {"container": INDEXED}),
    "h264 edit list": ("edit.mp4", "libx264", {"g": "30", "bf": "2"},
                       {"pts": range(-5, FRAMES - 5), "container": {"avoid_negative_ts": "disabled"}}),
    "h264 late mp4": ("late.mp4", "libx264", SHORT, {"pts": range(250, 250 + FRAMES)}),
    "h264 late mkv": ("late.mkv", "libx264", SHORT, {"pts": range(250, 250 + FRAMES)}),
    "h264 late ts": ("late.ts", "libx264", SHORT, {"pts": range(250, 250 + FRAMES), "sound": 30}),
    "h264 uneven mp4": ("uneven.mp4", "libx264", SHORT, UNEVENLY),
    "h264 uneven mkv": ("uneven.mkv", "libx264", SHORT, UNEVENLY),
    "h264 uneven ts": ("uneven.ts", "libx264", SHORT, UNEVENLY),
    "h264 thousand frames a second": ("fast.mp4", "libx264", SHORT, {"rate": 1000}),
    "h264 a frame every 5 seconds": ("lapse.mkv", "libx264", SHORT, {"rate": fractions.Fraction(1, 5)}),
    "h264 avi with B-frames": ("h264b.avi", "libx264", {"g": "10", "bf": "3"}, {}),
    "hevc mp4": ("hevc.mp4", "libx265", X265, {}),
    "hevc mkv": ("hevc.mkv", "libx265", X265, {}),
    "hevc open gop mp4": ("hevc_open.mp4", "libx265", X265_OPEN, {}),
    "hevc open gop ts": ("hevc_open.ts", "libx265", X265_OPEN, {}),
    "vp8 webm": ("vp8.webm", "libvpx", VP9, {}),
    "vp9 webm": ("vp9.webm", "libvpx-vp9", VP9, {}),
    "vp9 live webm": ("live.webm", "libvpx-vp9", VP9, {"container": {"live": "1"}}),
    "vp9 uneven webm": ("uneven.webm", "libvpx-vp9", VP9, UNEVENLY),
    "vp9 mp4": ("vp9.mp4", "libvpx-vp9", VP9, {}),
    "av1 mp4": ("av1.mp4", "libsvtav1", AV1, {}),
    "av1 webm": ("av1.webm", "libsvtav1", AV1, {}),
    "av1 mkv without index": ("av1.mkv", "libsvtav1", AV1, {"container": {"live": "1"}}),
    "mpeg2 ts": ("mpeg2.ts", "mpeg2video", {"g": "12", "bf": "2"}, {}),
    "mpeg2 ps": ("mpeg2.mpg", "mpeg2video", {"g": "12", "bf": "2"}, {}),
    "mpeg4 avi": ("mpeg4.avi", "mpeg4", {"g": "12"}, {}),
    "mpeg4 avi with B-frames": ("mpeg4b.avi", "mpeg4", {"g": "12", "bf": "2"}, {}),
    "mpeg4 mp4": ("mpeg4.mp4", "mpeg4", {"g": "12"}, {}),
    "mpeg4 mp4 with B-frames": ("mpeg4b.mp4", "mpeg4", {"g": "12", "bf": "2"}, {}),
    "mjpeg avi": ("mjpeg.avi", "mjpeg", {}, {"pix_fmt": "yuvj420p"}),
    "flv": ("flv.flv", "flv", {"g": "12"}, {}),
    "wmv": ("wmv.wmv", "wmv2", {"g": "12"}, {}),
    "h264 asf": ("h264.asf", "libx264", {"g": "10", "bf": "0"}, {}),   # holds decoding times alone
    "gif": ("gif.gif", "gif", {}, {"pix_fmt": "rgb8"}),
    "gif uneven": ("uneven.gif", "gif", {},
                   {**UNEVENLY, "pix_fmt": "rgb8", "pts": [max(40 * i, t) for i, t in enumerate(UNEVEN)]}),
    **{f"h264 turned by {angle}": (f"turned{angle}.mp4", "libx264", SHORT, {"rotate": angle})
       for angle in (90, 180, 270)}}
# libav guesses their times; they are i / 25 s
UNTIMED = "h264 avi with B-frames", "mpeg4 avi with B-frames", "mpeg2 ps"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {name: film(folder / file, codec, map(textured, range(FRAMES)), options, **more)
            for name, (file, codec, options, more) in CLIPS.items()}


# -------------------------------------------------------------------------------------------- frames by time
def whole(path, turn=0):
    """Front to back with one thread, nothing skipped -> (starts: when each frame appears, exact seconds;
    pictures)."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        frames = list(container.decode(stream))
        starts = [(frame.pts - frames[0].pts) * stream.time_base for frame in frames]
    pictures = [np.rot90(frame.to_ndarray(format="rgb24"), turn // 90) for frame in frames]
    return starts, [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in pictures]


def first(path, times=(0,)):
    return next(data.frames(path, times))[1]


def shown(starts, t):
    """Index of the last of `starts` at or before t; the tolerance is the one that data.py documents."""
    exact = fractions.Fraction(t) + fractions.Fraction(1, 10 ** 6)
    return max([i for i, start in enumerate(starts) if start <= exact], default=0)


def check(path, starts, pictures, times):
    times = sorted(times)
    frames, used = stacked(data.frames(path, times))
    expected = [shown(starts, t) for t in times]
    wrong = [(t, f"frame {i}", f"shows {number(frame)}") for t, i, frame in zip(times, expected, frames)
             if not torch.equal(frame, pictures[i])]
    assert not wrong and len(frames) == len(times)
    assert used == pytest.approx([float(starts[i]) for i in expected], abs=1e-9)


def attack(path, starts, pictures, rng):
    """Everything that a search by keyframes with frames skipped on the way could get wrong."""
    instants, n = [float(start) for start in starts], len(starts)
    later = [*instants[1:], instants[-1] + 0.04]
    middles = [(a + b) / 2 for a, b in zip(instants, later)]
    check(path, starts, pictures, instants)
    check(path, starts, pictures, [t - 2e-6 for t in later])            # the moment before the next one
    check(path, starts, pictures, middles[::3])
    anywhere = [rng.uniform(-0.3, instants[-1] + 0.5) for _ in range(12)]
    check(path, starts, pictures,
          rng.sample(anywhere * 2 + [-1e9, 1e9, -0.001, instants[-1] + 99, instants[-1]], 29))
    for t in instants:
        check(path, starts, pictures, [t])
    # neighbours in one group of pictures, and in two
    for step in (1, 1, 1, n // 3, n // 3, n // 3 + 1, n - 1):
        i = rng.randrange(n - step) if n > step else 0
        check(path, starts, pictures, [instants[min(i + step, n - 1)], instants[i]])


@pytest.mark.filterwarnings("error::plumbing.video.DamagedVideo")   # whole files: no reason to warn
@pytest.mark.parametrize("name", CLIPS)
def test_every_time_gives_bit_for_bit_the_frame_of_a_whole_decode(clips, name):
    *_, more = CLIPS[name]
    starts, pictures = whole(clips[name], more.get("rotate", 0))
    pts = more.get("pts", range(FRAMES))
    base = more.get("time_base", 1 / fractions.Fraction(more.get("rate", FPS)))
    first = max(0, -pts[0])   # an edit list hides what comes before 0
    written = [(tick - pts[first]) * base for tick in pts[first:]]
    if name in UNTIMED:
        starts = written
    assert [number(p) for p in pictures] == list(range(first, FRAMES)) or more.get("rotate")
    # GIF: 1/100 s
    assert [float(s) for s in starts] == pytest.approx([float(s) for s in written], abs=0.0051)
    attack(clips[name], starts, pictures, random.Random(name))


@pytest.mark.filterwarnings("error::plumbing.video.DamagedVideo")
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", [
    "h264 long gop", "h264 open gop ts", "hevc mkv", "vp9 live webm", "av1 mp4", "mpeg4 avi",
    "mpeg4 avi with B-frames", "h264 in fragments", "gif"
])
def test_very_short_clips_are_exact_too(tmp_path, name, length):
    file, codec, options, more = CLIPS[name]
    path = film(tmp_path / file, codec, map(textured, range(length)), options, **more)
    starts, pictures = whole(path)
    starts = [fractions.Fraction(i, FPS) for i in range(length)] if name in UNTIMED else starts
    assert numbers(pictures) == list(range(length))
    attack(path, starts, pictures, random.Random(length))


UNLISTED = [
    "h264 short gop", "h264 open gop mp4", "hevc mp4", "hevc open gop mp4", "vp9 mp4",
    "mpeg4 mp4 with B-frames", "mpeg4 mp4"
]


@pytest.mark.filterwarnings("error::plumbing.video.DamagedVideo")
@pytest.mark.parametrize("name", UNLISTED)
def test_an_mp4_without_a_list_of_keyframes_is_exact_too(tmp_path, clips, name):
    path, mp4 = tmp_path / "unlisted.mp4", open(clips[name], "rb").read()
    path.write_bytes(mp4.replace(b"stss", b"free"))   # which says that every frame is one
    assert data.probe(path) == data.probe(clips[name])
    attack(path, *whole(clips[name]), random.Random(name))


@pytest.mark.filterwarnings("ignore::plumbing.video.DamagedVideo")
@pytest.mark.parametrize("name", UNLISTED)
def test_frames_are_exact_though_the_list_of_keyframes_names_others(tmp_path, clips, name):
    path, mp4 = tmp_path / "other.mp4", open(clips[name], "rb").read()
    second = at(mp4, b"stss") + 12
    path.write_bytes(patched(mp4, second, ">I", struct.unpack_from(">I", mp4, second)[0] + 3))
    attack(path, *whole(clips[name]), random.Random(name))


@pytest.mark.parametrize("name", [
    "h264 open gop ts", "h264 intra refresh ts", "h264 interlaced", "hevc open gop ts", "mpeg2 ts", "mpeg2 ps"
])
def test_a_stream_that_starts_amid_a_group_shows_whole_frames_alone(tmp_path, clips, name):
    whole_file, (_, pictures) = open(clips[name], "rb").read(), whole(clips[name])
    for packets in (12, 30, 60):   # so many packets of MPEG-TS, 188 bytes each, were missed
        (tmp_path / "front").write_bytes(whole_file[packets * 188:])
        for call in (lambda: list(data.sample_frames(tmp_path / "front", 5, "linspace")),
                     lambda: list(data.frames(tmp_path / "front", [0, 0.4]))):
            with warnings.catch_warnings():
                # intra refresh: no frame is whole until many are read
                warnings.simplefilter("ignore", video.DamagedVideo)
                found = call()
            assert all(torch.equal(frame, pictures[number(frame)]) for _, frame in found)


# ------------------------------------------------------------------------------------------ frames by number
@pytest.mark.filterwarnings("error::plumbing.video.DamagedVideo")
@pytest.mark.parametrize("name", CLIPS)
def test_linspace_runs_from_the_first_frame_to_the_last_whatever_their_times(clips, name):
    *_, more = CLIPS[name]
    _, pictures = whole(clips[name], more.get("rotate", 0))
    n = len(pictures)
    sevenths = [(n - 1) * i // 6 for i in range(7)]
    longer = [int((n - 1) * i / n) for i in range(n + 1)]   # than there are frames
    for num_frames, expected in ((n, range(n)), (1, [0]), (7, sevenths), (n + 1, longer)):
        frames, _ = stacked(data.sample_frames(clips[name], num_frames, "linspace"))
        assert [i for i, frame in zip(expected, frames) if not torch.equal(frame, pictures[i])] == []
        assert len(frames) == num_frames


@pytest.mark.parametrize(
    "name", ["h264 short gop", "h264 late ts", "vp9 live webm", "mpeg4 avi with B-frames", "gif"])
def test_a_window_is_sampled_as_a_video_of_its_own(clips, name):
    path = clips[name]   # frame i appears at 0.04 i

    def sampled(*args, **more):
        return seen(data.sample_frames(path, *args, **more))
    assert sampled(5, "uniform", window=(0.2, 0.6)) == [6, 8, 10, 12, 14]          # 0.24, 0.32, ... s
    # of frames 5..14: 0, 3, 6, 9
    assert sampled(4, "linspace", window=(0.2, 0.6)) == [5, 8, 11, 14]
    assert sampled(10, "seq", window=(0.2, 0.6)) == [5 + i for i in data.get_seq_frames(10, 10)]
    assert sampled(9, "linspace", window=(0.21, 0.6)) == list(range(6, 15))        # frame 5 began before
    assert sampled(4, "test", window=(0.2, 0.6)) == [5 + i for i in data.uniform_sample_test(10, 4)]
    rng = np.random.default_rng(3)
    assert sampled(4, "train", 3, window=(0.2, 0.6)) == [5 + i for i in data.uniform_sample_train(10, 4, rng)]
    # the video ends at 1.2 s: 1.05, 1.15
    assert sampled(2, "uniform", window=(1.0, 99)) == [26, 28]
    assert sampled(2, "linspace", window=(1.0, 99)) == [25, 29]
    # between two frames: the one on the screen
    assert sampled(3, "linspace", window=(0.21, 0.22)) == [5, 5, 5]
    for rule in ("uniform", "linspace"):   # not the last frame, of which nobody asked
        with pytest.raises(video.UserError, match=r"a window from 5 s on, of a video of 1\.20 s"):
            sampled(2, rule, window=(5, 9))
    for rule in ("uniform", "linspace"):
        assert sampled(6, rule, window=(0, math.inf)) == sampled(6, rule)
        for window in ((0.5, 0.5), (0.6, 0.2), (-1, 1), (math.nan, 1), (0, math.nan)):
            with pytest.raises(video.UserError, match="window"):
                sampled(2, rule, window=window)


def test_a_window_between_two_frames_shows_the_one_on_the_screen(tmp_path):
    # a frame every 5 s; time is counted in ticks of 5 s, and much finer
    for file in ("lapse.avi", "lapse.mp4"):
        path = film(tmp_path / file, "mpeg4", map(textured, range(6)), {"g": "3"},
                    rate=fractions.Fraction(1, 5))
        for rule in ("uniform", "seq", "test", "train", "linspace"):
            for window, expected in (((0.1, 0.9), 0), ((11, 14.9), 2), ((28, 29), 5),
                                     ((11, 15.1), 3 if rule != "uniform" else None)):
                frames, used = stacked(data.sample_frames(path, 1, rule, window=window))
                if expected is not None:
                    assert numbers(frames) == [expected] and used == pytest.approx([5 * expected])


# ------------------------------------------------------------------------------------------------------ size
def noisy(height, width, seed=0):
    """A photograph's worth of trouble for a scaler: noise of all sizes, edges, clipped values."""
    rng, image = np.random.default_rng(seed), np.zeros((height, width, 3))
    for cell in (1, 3, 9, 27):
        coarse = rng.normal(0, 60, (-(-height // cell), -(-width // cell), 3))
        image += coarse.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    return np.clip(image + 128, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("height, width, sizes", [
    (64, 96, [16, 33, 63, 64, 65, 100, 224]), (240, 426, [17, 112, 224, 239]), (430, 242, [31, 224, 336]),
    (426, 242, [56, 224, 225]), (18, 130, [7, 64])])
def test_pictures_are_scaled_as_pillows_bicubic_does(height, width, sizes):
    image = noisy(height, width)
    for size in sizes:
        h, w = (size * side // min(height, width) for side in (height, width))
        scaled = np.array(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
        ours = video.resize_bicubic(torch.from_numpy(image).permute(2, 0, 1)[None], h, w)
        assert ours.shape == (1, 3, h, w) and ours.dtype == torch.uint8
        difference = ours[0].permute(1, 2, 0).int() - torch.from_numpy(scaled).int()
        assert difference.abs().max() <= 2 and (difference.abs() > 1).float().mean() < 2e-4
        assert (difference != 0).float().mean() < 0.02


# ---------------------------------------------------------------------------------------------------- colour
COLOURS = [(0, 0, 0), (255, 255, 255), (200, 30, 30), (30, 180, 40), (40, 60, 220), (128, 128, 128),
           (250, 230, 20), (90, 20, 120)]
# K_R, K_B of ITU-T H.273
MATRIX = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
TAGS = {"bt601": "smpte170m", "bt709": "bt709", "bt2020": "bt2020nc", None: "unknown"}


def yuv(rgb, matrix, full, bits):
    """RGB in 0..255 -> Y, Cb, Cr as whole numbers of so many bits, by H.273's formulas."""
    kr, kb = MATRIX[matrix]
    r, g, b = (x / 255 for x in rgb)
    y = kr * r + (1 - kr - kb) * g + kb * b
    chroma = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    top, unit = (1 << bits) - 1, 1 << bits - 8
    if full:
        return [round(top * y), *(min(round(top * c) + (128 * unit), top) for c in chroma)]
    return [round(unit * (219 * y + 16)), *(round(unit * (224 * c + 128)) for c in chroma)]


def rgb(ycc, matrix, full, bits):
    """The inverse, exact: what Y, Cb, Cr mean in 0..255."""
    kr, kb = MATRIX[matrix]
    top, unit = (1 << bits) - 1, 1 << bits - 8
    y, cb, cr = (ycc[0] / top, *((c - 128 * unit) / top for c in ycc[1:])) if full else (
        (ycc[0] / unit - 16) / 219, *((c / unit - 128) / 224 for c in ycc[1:]))
    r, b = y + (2 - 2 * kr) * cr, y + (2 - 2 * kb) * cb
    return [255 * min(max(x, 0), 1) for x in (r, (y - kr * r - kb * b) / (1 - kr - kb), b)]


def bars(pix_fmt, width, height, values):
    """A frame of vertical bars, one for each (Y, Cb, Cr) of `values`; an alpha plane is all transparent."""
    frame = av.VideoFrame(width, height, pix_fmt)
    for k, plane in enumerate(frame.planes):
        kind = np.uint16 if frame.format.components[0].bits > 8 else np.uint8
        rows = np.zeros((plane.height, plane.line_size // kind().itemsize), kind)
        for column in range(plane.width) if k < 3 else ():
            rows[:, column] = values[column * len(values) // plane.width][k]
        plane.update(rows.tobytes())
    return frame


def bars_shown(path, matrix, full, bits, values):
    """How many grey levels the colours on the screen are from the formula's, at worst."""
    frame = first(path).float()
    step = frame.shape[2] / len(values)
    shown = [frame[:, 4:-4, int((i + 0.35) * step):int((i + 0.65) * step)] for i in range(len(values))]
    expected = [torch.tensor(rgb(value, matrix, full, bits)).round().view(3, 1, 1) for value in values]
    return max((s - e).abs().max().item() for s, e in zip(shown, expected))


LOSSLESS = {"qp": "0"}


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt2020"])
@pytest.mark.parametrize(
    "file, codec, options, pix_fmt",
    [("a.mp4", "libx264", LOSSLESS, "yuv420p"), ("a.mp4", "libx264", LOSSLESS, "yuv422p"),
     ("a.mkv", "libx264", LOSSLESS, "yuv444p"), ("a.mp4", "libx264", LOSSLESS, "yuv420p10le"),
     ("a.mp4", "libx264", LOSSLESS, "yuv422p10le"),
     ("a.mp4", "libx265", {"x265-params": "lossless=1:log-level=none:pools=none"}, "yuv420p10le"),
     ("a.webm", "libvpx-vp9", {"lossless": "1"}, "yuv420p"),
     ("a.webm", "libvpx-vp9", {"lossless": "1"}, "yuva420p"), ("a.mkv", "ffv1", {}, "yuva444p"),
     ("a.mkv", "ffv1", {}, "yuv444p16le"), ("a.avi", "ffv1", {}, "yuv420p")])
def test_colours_follow_the_files_own_matrix_and_range(tmp_path, file, codec, options, pix_fmt, matrix, full):
    bits = av.VideoFormat(pix_fmt).components[0].bits
    values = [yuv(colour, matrix, full, bits) for colour in COLOURS]
    options = options | {"colorspace": TAGS[matrix], "color_range": "pc" if full else "tv"}
    path = film(tmp_path / file, codec, [bars(pix_fmt, 192, 64, values)] * 3, options, pix_fmt=pix_fmt)
    with av.open(path) as container:
        frame = next(container.decode(video=0))
        # AVI has no place for it, FFV1 none of its own
        tagged = frame.colorspace not in (2, 0) and frame.color_range != 0
    assert tagged or file == "a.avi"
    if tagged:
        assert bars_shown(path, matrix, full, bits, values) <= 3
    else:   # read as limited BT.601
        assert bars_shown(path, "bt601", False, bits, values) <= 3


@pytest.mark.parametrize("width, height, matrix",
                         [(96, 64, "bt601"), (1278, 32, "bt601"), (1280, 32, "bt709"), (64, 576, "bt601"),
                          (64, 578, "bt709"), (1280, 720, "bt709")])
def test_files_without_colour_tags_are_bt709_where_they_are_high_definition(tmp_path, width, height, matrix):
    values = [yuv(colour, matrix, False, 8) for colour in COLOURS]
    path = film(tmp_path / "plain.mp4", "libx264", [bars("yuv420p", width, height, values)], LOSSLESS)
    assert bars_shown(path, matrix, False, 8, values) <= 3
    other = {"bt601": "bt709", "bt709": "bt601"}[matrix]
    assert bars_shown(path, other, False, 8, values) > 10   # so different are they
    turned = film(tmp_path / "turned.mp4", "libx264", [bars("yuv420p", width, height, values)], LOSSLESS,
                  rotate=180)
    assert bars_shown(turned, matrix, False, 8, values[::-1]) <= 3


def test_rgb_and_grey_files_come_out_as_they_went_in(tmp_path):
    image = noisy(64, 96)
    path = film(tmp_path / "rgb.mov", "png", [image], pix_fmt="rgb24")
    assert torch.equal(first(path), torch.from_numpy(image).permute(2, 0, 1))
    path = film(tmp_path / "gbr.mp4", "libx264rgb", [image], LOSSLESS, pix_fmt="rgb24")
    assert torch.equal(first(path), torch.from_numpy(image).permute(2, 0, 1))
    path = film(tmp_path / "grey.mkv", "ffv1", [av.VideoFrame.from_ndarray(image[:, :, 0].copy(), "gray")],
                {"color_range": "pc"}, pix_fmt="gray")
    assert torch.equal(first(path), torch.from_numpy(image[:, :, 0]).expand(3, 64, 96))


# ------------------------------------------------------------------------------------------ shape of a pixel
@pytest.mark.parametrize("file", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("ratio, rotate, width, height", [
    ((4, 3), 0, 128, 64), ((4, 3), 90, 64, 128), ((4, 3), 180, 128, 64), ((4, 3), 270, 64, 128),
    ((1, 2), 0, 48, 64), ((5, 4), 0, 120, 64), ((1, 1), 90, 64, 96), ((50, 1), 0, 96, 64),
    ((1, 50), 0, 96, 64), ((1, 50), 90, 64, 96), ((1, 1000), 0, 96, 64)])
def test_pixels_that_are_not_square_are_shown_so_and_absurd_ones_ignored(
        tmp_path, file, ratio, rotate, width, height):
    images = [textured(i) for i in range(3)]
    path = film(tmp_path / file, "libx264", images, {"crf": "5"}, rotate=rotate,
                context={"sample_aspect_ratio": fractions.Fraction(*ratio)})
    found = data.probe(path)
    assert (found.width, found.height, found.rotation) == (width, height, -rotate % 360)
    frames, _ = stacked(data.frames(path, [0, 0.08]))
    assert frames.shape == (2, 3, height, width)
    upright = torch.rot90(frames, -rotate // 90, (2, 3))
    assert numbers(upright) == [0, 2]
    # scaled as everything is: as Pillow does
    stored = whole(path)[1][2].permute(1, 2, 0).contiguous().numpy()
    size = upright.shape[3], upright.shape[2]
    scaled = np.array(Image.fromarray(stored).resize(size, Image.Resampling.BICUBIC))
    assert (upright[1].permute(1, 2, 0).int() - torch.from_numpy(scaled).int()).abs().max() <= 1


@pytest.mark.parametrize("orientation, quarters", [(1, 0), (6, -1), (3, 2), (8, 1)])
def test_a_motion_jpeg_with_exif_is_shown_upright(tmp_path, orientation, quarters):
    """PyAV has no name for this kind of side data."""
    exif, jpeg = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(picture(5)).save(jpeg, "JPEG", exif=exif)
    with av.open(str(tmp_path / "a.avi"), "w") as out:
        stream = out.add_stream("mjpeg", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        packet = av.Packet(jpeg.getvalue())
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, fractions.Fraction(1, FPS)
        out.mux(packet)
    expected = torch.from_numpy(np.rot90(picture(5), quarters).copy()).permute(2, 0, 1)
    assert (first(tmp_path / "a.avi").float() - expected.float()).abs().mean() < 4
    assert data.probe(tmp_path / "a.avi").rotation == -90 * quarters % 360


# ------------------------------------------------------------------------------------------- another process
def threads():
    return len(os.listdir("/proc/self/task"))


class CountingSource(video.ByteSource):
    """Counts the threads of this process whenever libav reads: those of the decoder are among them."""
    most = 0

    def read(self, size=-1):
        CountingSource.most = max(CountingSource.most, threads())
        return super().read(size)


class Loaded(Dataset):
    """Item i -> the numbers of some frames of clip i, and how many threads decoding added."""
    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        video.ByteSource, before = CountingSource, threads()
        CountingSource.most = 0
        frames, _ = stacked(data.frames(self.paths[i], [0.04, 0.5, 1.0]))
        return numbers(frames), CountingSource.most - before


LOADED = ["h264 long gop", "h264 open gop ts", "hevc mkv", "vp9 webm", "av1 mp4", "mpeg4 avi with B-frames"]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loaders_workers_decode_with_one_thread_also_after_their_parent_has_decoded(
        clips, context, monkeypatch):
    items = Loaded([clips[name] for name in LOADED] * 2)
    monkeypatch.setattr(video, "ByteSource", CountingSource)
    here = [items[i] for i in range(len(items))]
    loader = DataLoader(items, num_workers=2 if context == "fork" else 1, multiprocessing_context=context,
                        batch_size=None, timeout=WATCHDOG)
    assert [(shown, added) for shown, added in loader] == [([1, 12, 25], 0)] * len(items)
    # below 0: another thread ended meanwhile
    assert all(shown == [1, 12, 25] and added <= 0 for shown, added in here)


def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def status(name):
    """One of the sizes in /proc/self/status, in bytes: VmHWM, the peak of resident memory; VmData, all that
    may be written to."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith(name))


def in_child(folder, work, *args):
    """Runs work(note, *args) in a process of its own, which may crash, hang or eat up memory -> what it
    noted.

    note(x) says what comes next or came out, and that it has not hung up to now."""
    log, stacks = folder / "notes.jsonl", folder / "stacks.txt"

    def run():
        with open(log, "w", buffering=1) as f, open(stacks, "w") as g:
            def note(x):
                faulthandler.dump_traceback_later(WATCHDOG, exit=True, file=g)
                f.write(json.dumps(x) + "\n")
            # the machine's safety
            resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + (3 << 30), resource.RLIM_INFINITY))
            warnings.simplefilter("ignore", video.DamagedVideo)
            work(note, *args)
            faulthandler.cancel_dump_traceback_later()
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    notes = [json.loads(line) for line in log.read_text().splitlines()]
    code = f"exit code {process.exitcode} (1: hung, see {stacks}; below 0: a signal)"
    assert process.exitcode == 0, f"{code} at {notes[-1:]} in {folder}"
    return notes


def try_out(path, times=(0, 0.04, 0.5, 1.1, 99)):
    """All entrances, for a file that may be anything. Only frames or VideoError may come out -> how many
    entrances refused."""
    refused = 0

    def probe():
        found = data.probe(path)
        assert found.width > 0 and found.height > 0, found
        assert math.isfinite(found.duration) and math.isfinite(found.fps), found

    def frames(call, num_frames):
        frames, used = stacked(call())
        assert frames.dtype == torch.uint8 and frames.shape[:2] == (num_frames, 3)
        assert min(frames.shape[2:]) > 0
        assert len(used) == num_frames and all(t >= 0 and math.isfinite(t) for t in used), used
    for call in (probe, lambda: frames(lambda: list(data.frames(path, times)), len(times)),
                 lambda: frames(lambda: list(data.sample_frames(path, 3, "uniform")), 3),
                 lambda: frames(lambda: list(data.sample_frames(path, 3, "test", window=(0.1, 0.9))), 3)):
        try:
            call()
        except video.UserError as e:   # also: the window begins after what is left of the video
            assert "\n" not in str(e) and str(e).startswith(str(path))
            refused += isinstance(e, data.VideoError)
    return refused


def outcome(path, *times):
    """-> what try_out() made of a file, what went wrong in it if anything did, and the memory that it took at
    its worst."""
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")   # the peak of resident memory counts from here
    base, refused, problem = resident(), None, None
    try:
        refused = try_out(path, *times)
    except BaseException as e:   # whatever it is: it is what these tests look for
        problem = repr(e)
    return {"refused": refused, "problem": problem, "megabytes": (status("VmHWM") - base) >> 20}


# ---------------------------------------------------------------------------------------------------- damage
EXTREME = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff]


def damage(whole, rng):
    """Some bytes -> what a bad disk, a broken download or a villain made of them."""
    b = bytearray(whole)
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind = rng.choice("cut flip flip zero insert delete repeat extreme extreme".split())
        size = len(b)
        at = rng.randrange(size if rng.random() < 0.6 else min(size, 800))   # headers are where it hurts
        if rng.random() < 0.2:
            at = max(0, size - 1 - rng.randrange(800))                       # or the index at the end
        length = rng.choice([1, 4, 30, 188, 3000])
        if kind == "cut":
            del b[max(at, 1):]
        elif kind == "flip":
            for _ in range(rng.choice([1, 10, 300])):
                b[min(len(b) - 1, rng.randrange(at, at + 1000))] ^= 1 << rng.randrange(8)
        elif kind == "zero":
            b[at:at + length] = bytes(len(b[at:at + length]))
        elif kind == "insert":
            b[at:at] = rng.randbytes(length)
        elif kind == "delete":
            del b[at:at + length]
        elif kind == "repeat":
            b[at:at] = b[at:at + length] * rng.choice([1, 1, 20])
        else:
            b[at:at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(EXTREME))
        if not b:
            return whole[:1]
    return bytes(b)


def fuzz(note, folder, paths, seeds):
    wholes = [open(path, "rb").read() for path in paths]
    path = folder / "damaged"
    for seed in seeds:
        rng = random.Random(seed)
        index = rng.randrange(len(wholes))
        path.write_bytes(damage(wholes[index], rng))   # it stays there if this one crashes
        note({"seed": seed, "clip": os.path.basename(paths[index])})
        found = outcome(path)
        if found["problem"] or found["megabytes"] > 1000:
            kept = os.path.join(folder, f"seed{seed}")
            os.replace(path, kept)
            note({"seed": seed, "clip": os.path.basename(paths[index]), "file": kept, **found})


def test_damaged_files_give_frames_or_video_errors_and_nothing_else(tmp_path, clips):
    notes = in_child(tmp_path, fuzz, tmp_path, list(clips.values()), range(SEED, SEED + CASES))
    assert [n for n in notes if "file" in n] == [] and notes[-1]["seed"] == SEED + CASES - 1


def hammer(note, paths, opens):
    for i in range(opens):
        try:
            list(data.frames(paths[i % len(paths)], [0.3, 1.0]))
        except data.VideoError:
            pass
        if i % 100 == 99:
            note({
                "opens": i + 1, "resident": resident(), "files": len(os.listdir("/proc/self/fd")),
                "threads": threads()
            })


def test_two_thousand_opens_leave_nothing_behind(tmp_path, clips):
    paths = []
    for name in ("h264 short gop", "h264 open gop ts", "hevc mkv", "vp9 webm", "av1 webm", "mpeg4 avi",
                 "mpeg2 ps", "wmv", "h264 turned by 90"):
        file, codec, options, more = CLIPS[name]
        paths.append(film(tmp_path / file, codec, map(textured, range(6)), options, **more))
    for i, share in enumerate((0.3, 0.6, 0.7, 0.8, 0.5, 0.2, 0.6)):   # cut: some refused, some with a warning
        whole = open(paths[i], "rb").read()
        (tmp_path / f"cut{i}").write_bytes(whole[:int(share * len(whole))])
        paths.append(str(tmp_path / f"cut{i}"))
    (tmp_path / "text").write_text("Once upon a time there was a video.\n" * 50)
    Image.fromarray(picture(5)).save(tmp_path / "still", "png")
    paths += [str(tmp_path / "text"), str(tmp_path / "still"), str(tmp_path / "missing"), str(tmp_path)]
    notes = in_child(tmp_path, hammer, paths, 2200)
    first, last = notes[1], notes[-1]   # after 200 to warm up
    assert last["opens"] == 2200   # fewer files: tests before this one had left some open
    assert last["files"] <= first["files"] and last["threads"] <= first["threads"]
    assert max(n["resident"] for n in notes[1:]) - first["resident"] < 20 << 20


def at(whole, name, nth=0):
    """Where the payload of the n-th box of that name begins."""
    place = -1
    for _ in range(nth + 1):
        place = whole.index(name, place + 1)
    return place + len(name)


def patched(whole, place, layout, *values):
    b = bytearray(whole)
    struct.pack_into(layout, b, place, *values)
    return bytes(b)


def replaced(mp4, names, box):
    """An MP4 with one box, the last of the path `names`, exchanged for other bytes, or for a function of it;
    the sizes around it follow."""
    begin, end, b = 0, len(mp4), bytearray(mp4)
    sizes = []
    for name in names:
        while mp4[begin + 4:begin + 8] != name:
            begin += struct.unpack_from(">I", mp4, begin)[0]
        size = struct.unpack_from(">I", mp4, begin)[0]
        sizes.append((begin, size))
        start, end = begin, begin + size
        begin += 8 + {b"stsd": 8, b"avc1": 78, b"dref": 8}.get(name, 0)
    box = box(mp4[start:end]) if callable(box) else box
    for place, size in sizes[:-1]:
        struct.pack_into(">I", b, place, size + len(box) - (end - start))
    b[start:end] = box
    return bytes(b)


def box(name, payload):
    return struct.pack(">I", 8 + len(payload)) + name + payload


def huge_png(side):
    """The beginning of a PNG of side x side pixels."""
    def chunk(name, payload):
        length, check = len(payload), zlib.crc32(name + payload)
        return struct.pack(">I", length) + name + payload + struct.pack(">I", check)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(bytes(10000))) + chunk(b"IEND", b"")


def golomb(*values):
    return "".join(format(v + 1, "b").zfill(2 * (v + 1).bit_length() - 1) for v in values)


def h264_parameters(blocks):
    """An H.264 sequence parameter set (7.3.2.1.1): frames of blocks x blocks macroblocks, baseline
    profile."""
    bits = format(66 << 16 | 62, "024b") + golomb(0, 0, 2, 1) + "0" + golomb(blocks - 1, blocks - 1) + "11001"
    bits += "0" * (-len(bits) % 8)
    return b"\x67" + int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\0\0\0", b"\0\0\3\0")


def lying(mp4, samples, edits=1, length=512):
    """An MP4 whose track claims so many samples, all of one size, each of so many ticks, and to be shown
    again and again."""
    lie = patched(mp4, at(mp4, b"stsz") + 4, ">II", 1, samples)
    lie = patched(lie, at(mp4, b"stsc") + 12, ">I", samples)
    lie = patched(lie, at(mp4, b"stts") + 8, ">II", samples, length)
    parts = struct.pack(">II", 0, edits) + struct.pack(">IIi", 2 ** 30, 0, 65536) * edits
    return replaced(lie, [b"moov", b"trak", b"edts", b"elst"], box(b"elst", parts))


def absurd(clips, folder):
    """Files of a few kilobytes that claim to hold a lot -> paths."""
    mp4, fragments, gif, vp9, mkv, avi, ts = (open(clips[name], "rb").read() for name in (
        "h264 long gop", "h264 in fragments", "gif", "vp9 webm", "h264 late mkv", "mpeg4 avi",
        "h264 open gop ts"))
    files = {}
    # of one byte each: no table is needed
    files["samples.mp4"] = patched(mp4, at(mp4, b"stsz") + 4, ">II", 1, 2 ** 31 - 1)
    # libav would make an index of all these, with 24 bytes for an entry and as much again beside it
    lie = files["index.mp4"] = lying(mp4, 2 ** 25)
    files["again.mp4"] = lying(mp4, 20_000, 2000)
    # a compressed header, as QuickTime wrote it
    packed = box(b"cmvd", struct.pack(">I", len(lie)) + zlib.compress(lie[lie.index(b"moov") - 4:]))
    files["packed.mp4"] = replaced(mp4, [b"moov"], box(b"moov", box(b"cmov", box(b"dcom", b"zlib") + packed)))
    files["tracks.mp4"] = replaced(lying(mp4, 15_000), [b"moov", b"trak"], lambda trak: trak * 1000)
    files["deep.mp4"] = functools.reduce(lambda inner, _: box(b"moov", inner), range(1000), mp4)
    sizes = box(b"stsz", struct.pack(">III", 0, 1, 2 ** 25))
    bare = patched(lie.replace(b"stsz", b"none"), at(lie, b"stts") + 8, ">I", FRAMES)
    entry = [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1", b"avcC"]
    meta = box(b"udta", box(b"meta", bytes(4) + box(b"hdlr", bytes(24)) + sizes))
    files["hidden.mp4"] = replaced(bare, [b"moov", b"trak", b"tkhd"], lambda tkhd: tkhd + meta)
    files["inside.mp4"] = replaced(bare, entry, lambda avcc: avcc + sizes)
    # libav puts a thousand of its samples into one entry
    sound = lying(mp4, 2 ** 31 - 1, 1, 1).replace(b"vide", b"soun")
    files["sound.mp4"] = replaced(sound, [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stco"],
                                  box(b"stco", struct.pack(">II", 0, 20) + bytes(80)))
    files["run.mp4"] = patched(fragments, at(fragments, b"trun"), ">II", 1, 2 ** 25)
    files["runs.mp4"] = replaced(fragments, [b"moof", b"traf", b"trun"],
                                 box(b"trun", struct.pack(">II", 0, 25_000)) * 1000)
    # an index that leads into the pictures, to a fragment there
    moof, mdat = (fragments.index(name) - 4 for name in (b"moof", b"mdat"))
    behind = mdat + struct.unpack_from(">I", fragments, mdat)[0]
    hidden = patched(fragments[moof:mdat], at(fragments[moof:mdat], b"trun"), ">II", 1, 2 ** 25)
    first = fragments[moof:mdat] + box(b"mdat", fragments[mdat + 8:behind] + hidden)
    index = struct.pack(">IIIIIHH", 0, 1, 12800, 0, 0, 0, 2)
    for length in (len(first) - len(hidden), len(hidden) + len(fragments) - behind):
        index += struct.pack(">III", length, 5120, 9 << 28)
    files["led.mp4"] = fragments[:moof] + box(b"sidx", index) + first + fragments[behind:]
    files["one_run.mp4"] = patched(mp4, at(mp4, b"stts") + 8, ">I", 2 ** 31 - 1)
    files["slow.mp4"] = patched(mp4, at(mp4, b"stts") + 12, ">I", 2 ** 31 - 1)
    years = patched(mp4, at(mp4, b"mvhd") + 16, ">I", 2 ** 32 - 16)
    years = patched(years, at(mp4, b"tkhd") + 20, ">I", 2 ** 32 - 16)
    files["years.mp4"] = patched(years, at(mp4, b"mdhd") + 16, ">I", 2 ** 32 - 16)
    files["entries.mp4"] = patched(mp4, at(mp4, b"stco") + 4, ">I", 2 ** 30)
    files["edits.mp4"] = patched(mp4, at(mp4, b"elst") + 4, ">I", 2 ** 28)
    stsd = at(mp4, b"avc1", next(i for i in range(9) if at(mp4, b"avc1", i) > at(mp4, b"stsd")))
    files["entry.mp4"] = patched(mp4, stsd + 24, ">HH", 12000, 12000)
    sps = h264_parameters(750)   # 750 * 16 = 12000
    sps = struct.pack(">H", len(sps)) + sps
    avcc = box(b"avcC", bytes([1, 66, 0, 62, 255, 225]) + sps + bytes([1, 0, 4]) + b"\x68\xce\x38\x80")
    files["frame.mp4"] = replaced(mp4, entry, avcc)
    for name, side in (("screen.gif", 12000), ("widest.gif", 65535)):
        files[name] = patched(gif, 6, "<HH", side, side)
    first = gif.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 96, 64)) + 5
    files["frame.gif"] = patched(files["screen.gif"], first, "<HH", 12000, 12000)
    # VP9, 6.2: 36 bits, then width - 1 and height - 1, 16 each
    for name, key in (("first.webm", 0), ("later.webm", 1)):
        place = at(vp9, b"\x49\x83\x42", key)
        bits = int.from_bytes(vp9[place:place + 5], "big")
        assert bits >> 4 & 0xffffffff == 95 << 16 | 63
        bits = bits & ~(0xffffffff << 4) | (11999 << 16 | 11999) << 4
        files[name] = vp9[:place] + bits.to_bytes(5, "big") + vp9[place + 5:]
    files["long.mkv"] = patched(mkv, at(mkv, b"\x44\x89\x88"), ">d", 2.0 ** 40)
    scale = at(mkv, b"\x2a\xd7\xb1\x83")
    files["slow.mkv"] = mkv[:scale] + b"\xff" * 3 + mkv[scale + 3:]
    header = at(avi, b"strh") + 4
    frames = patched(avi, at(avi, b"avih") + 20, "<I", 2 ** 31 - 1)
    files["frames.avi"] = patched(frames, header + 32, "<I", 2 ** 31 - 1)
    files["slow.avi"] = patched(files["frames.avi"], header + 20, "<II", 2 ** 31 - 1, 1)
    files["index.avi"] = patched(avi, at(avi, b"idx1"), "<I", 2 ** 31)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with av.open(str(folder / "huge.mov"), "w") as out:
        stream = out.add_stream("png", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb24"
        for i in range(3):
            packet = av.Packet(huge_png(12000))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, fractions.Fraction(1, FPS)
            out.mux(packet)
    holes = {"hole.mp4": mp4, "hole.mkv": mkv, "hole.avi": avi, "hole.ts": ts, "hole": b""}
    for name, content in holes.items():
        with open(folder / name, "wb") as f:
            f.write(content)
            f.truncate(1 << 40)   # a terabyte of zeros that takes no space
    return [str(folder / name) for name in (*files, "huge.mov", *holes)]


def open_all(note, paths):
    for path in paths:
        name = os.path.basename(path)
        video.TIME_LIMIT = 0.2 if "hole" in name else 30   # a terabyte takes longer to read
        note({"file": name})
        note({"file": name, **outcome(path, [0, 1.1, 1e6])})


def test_files_that_claim_absurd_sizes_cost_neither_memory_nor_time(tmp_path, clips):
    notes = [n for n in in_child(tmp_path, open_all, absurd(clips, tmp_path)) if "megabytes" in n]
    assert [n for n in notes if n["problem"] or n["megabytes"] >= 300] == []
    refused = {n["file"] for n in notes if n["refused"] == 4}
    assert {
        "samples.mp4", "index.mp4", "again.mp4", "packed.mp4", "tracks.mp4", "hidden.mp4", "inside.mp4",
        "sound.mp4", "run.mp4", "runs.mp4", "led.mp4", "frame.mp4", "screen.gif", "widest.gif", "frame.gif",
        "huge.mov", "hole"
    } <= refused
    # their frames are all there
    assert not {"years.mp4", "long.mkv", "frames.avi", "later.webm", "hole.mp4"} & refused


@pytest.mark.parametrize("name", [b"stts", b"ctts", b"stsc", b"stco", b"stss", b"stsz", b"elst", b"trun"])
def test_a_table_with_more_entries_than_its_box_has_room_for_is_refused(tmp_path, clips, name):
    mp4 = open(clips["h264 in fragments" if name == b"trun" else "h264 edit list"], "rb").read()
    place = at(mp4, name) + (8 if name == b"stsz" else 4)
    entries, = struct.unpack_from(">I", mp4, place)
    # stsz and trun may end in 8 bytes that are no entry
    for claimed, refused in ((entries, 0), (entries + 2, 4), (2 ** 31, 4)):
        (tmp_path / "a.mp4").write_bytes(patched(mp4, place, ">I", claimed))
        assert try_out(tmp_path / "a.mp4") == refused
    with pytest.raises(data.VideoError, match=f"its table {name.decode()} has no room"):
        data.probe(tmp_path / "a.mp4")


def test_sound_that_counts_more_samples_than_it_has_bytes_is_no_lie(tmp_path):
    """QuickTime counts the samples of compressed sound as they will be, each of "1 byte"; libav bundles
    them."""
    path = tmp_path / "old.mp4"
    film(path, "libx264", map(textured, range(FRAMES)), {"g": "10", **X264}, sound=36)
    mp4, samples = path.read_bytes(), 20 * os.path.getsize(path)
    sound = patched(mp4, at(mp4, b"stts", 1), ">IIII", 0, 1, samples, 1)
    sound = patched(sound, at(mp4, b"stsz", 1), ">III", 0, 1, samples)
    chunks, = struct.unpack_from(">I", mp4, at(mp4, b"stco", 1) + 4)
    path.write_bytes(patched(sound, at(mp4, b"stsc", 1) + 12, ">I", samples // chunks))
    assert seen(data.frames(path, [0.4, 1.1])) == [10, 27]


# --------------------------------------------------------------------------------------- warnings and limits
def cut(path, share=0.6):
    with open(path, "rb+") as f:
        size = int(share * os.fstat(f.fileno()).st_size)
        # amid a packet of MPEG-TS: that is all that shows it there
        f.truncate(size + 1 if size % 188 == 0 else size)
    return path


@pytest.mark.parametrize("file, codec, sound", [("a.mp4", "libx264", 0), ("a.avi", "mpeg4", 0),
                                                ("sound.mp4", "libx264", 50)])
def test_a_cut_file_warns_where_its_last_packet_is_not_whole(tmp_path, file, codec, sound):
    container = {"movflags": "faststart"} if "mp4" in file else {}
    path = cut(
        film(tmp_path / file, codec, map(textured, range(50)), {"g": "10"}, container=container, sound=sound))
    for call in CALLS:
        with pytest.warns(video.DamagedVideo, match="cut off or damaged") as caught:
            call(path)
        assert len(caught) == 1 and str(caught[0].message).startswith(path)
    with pytest.warns(video.DamagedVideo):
        frames, used = stacked(data.frames(path, [0.2, 1.9]))
    first, last = numbers(frames)
    assert first == 5 and 12 < last < 47 and used == pytest.approx([0.2, last / FPS])


def test_a_frame_that_cannot_be_decoded_warns_and_the_one_before_it_stands_for_it(tmp_path):
    path = film(tmp_path / "a.mkv", "mjpeg", map(textured, range(10)), pix_fmt="yuvj420p")
    mkv = open(path, "rb").read()
    begin, end = ([found.start() for found in re.finditer(b"\xff\xd8\xff", mkv)][i] for i in (5, 6))
    open(path, "wb").write(mkv[:begin] + bytes(end - begin - 40) + mkv[end - 40:])
    with pytest.warns(video.DamagedVideo, match="damaged at 0.20 s; the frame before the damage is shown"):
        assert seen(data.frames(path, [0.16, 0.2, 0.24])) == [4, 4, 6]


@pytest.mark.parametrize("file, codec, container, pix_fmt", [
    ("raw.mov", "rawvideo", {"movflags": "faststart"}, "rgb24"),
    ("fragments.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}, "yuv420p"),
    ("indexed.mp4", "libx264", {"movflags": "frag_keyframe+default_base_moof+global_sidx"}, "yuv420p")])
def test_a_cut_mp4_whose_tables_count_what_is_cut_off_reads_as_far_as_it_goes(
        tmp_path, file, codec, container, pix_fmt):
    path = film(tmp_path / file, codec, map(textured, range(50)), {"g": "10"}, container=container,
                pix_fmt=pix_fmt)
    whole_file = open(path, "rb").read()
    for share in (0.5, 0.55, 0.6, 0.65):
        (tmp_path / "cut").write_bytes(whole_file[:int(share * len(whole_file))])
        with warnings.catch_warnings():
            # fragments do not say how many more there should be
            warnings.simplefilter("ignore", video.DamagedVideo)
            first, last = seen(data.frames(tmp_path / "cut", [0.2, 99]))
        assert first == 5 and 50 * share - 11 < last < 50 * share + 1


def test_whole_files_do_not_warn_however_odd_they_are(tmp_path, clips):
    odd, warned = dict(clips), {}
    # sound twice as long as the pictures
    for file in ("sound.mp4", "sound.mkv", "sound.ts", "sound.avi", "sound.flv"):
        odd[file] = film(tmp_path / file, "flv" if "flv" in file else "mpeg4", map(textured, range(25)),
                         {"g": "12"}, sound=60)
    # a minute without a new picture, and another one at the end
    for file in ("gap.mp4", "gap.mkv", "gap.ts"):
        pts = [*range(10), *range(1500, 1510), 3000]
        odd[file] = film(tmp_path / file, "libx264", map(textured, range(21)), {"g": "6"}, pts=pts)
    odd["short sound.mp4"] = film(tmp_path / "short.mp4", "libx264", map(textured, range(50)), {"g": "12"},
                                  sound=5)
    for name, path in odd.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", video.DamagedVideo)
            duration = data.probe(path).duration
            list(data.frames(path, [0, duration / 2, duration - 0.01, duration + 5]))
            for rule in ("uniform", "linspace"):
                list(data.sample_frames(path, 3, rule))
        if any(w.category is video.DamagedVideo for w in caught):
            warned[name] = str(caught[0].message)
    assert warned == {}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name",
                         ["h264 long gop", "h264 open gop ts", "vp9 webm", "gif", "mpeg4 avi with B-frames"])
def test_a_file_that_leads_round_in_circles_is_given_up(clips, monkeypatch, name, call):
    clock, packets = [0.0], video.Video.packets

    def circling(self, jumped=False):   # the same packets for ever, as a villain's index can make libav read them
        for packet in itertools.cycle(packets(self, jumped)):
            clock[0] += 1
            packet.pts = packet.dts = 0
            self.file.check()
            yield packet
    monkeypatch.setattr(video.time, "thread_time", lambda: clock[0])
    monkeypatch.setattr(video, "TIME_LIMIT", 50)
    call(clips[name])
    monkeypatch.setattr(video.Video, "packets", circling)
    with pytest.raises(data.VideoError, match="in 50 s"):
        call(clips[name])


def test_what_the_caller_does_between_two_pictures_does_not_count(clips, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(video.time, "thread_time", lambda: clock[0])
    for i, _ in enumerate(data.frames(clips["h264 short gop"], [0, 0.5, 1])):
        clock[0] += 2 * video.TIME_LIMIT
    assert i == 2


# -------------------------------------------------------------------------------------------- no second file
def alias(path, levels):
    """An Apple alias, QuickTime's way to say that a track's data are in another file: an absolute path
    (levels 0), or one from the folder of the file itself (levels 1), as dref holds it."""
    name = os.fsencode(path)
    head = bytes(10) + b"\4disk".ljust(28, b"\0") + bytes(12) + b"\4clip".ljust(64, b"\0") + bytes(16)
    head += struct.pack(">HH", levels, levels) + bytes(16)
    head += struct.pack(">HH", 2, len(name)) + name + b"\0" * (len(name) % 2) + struct.pack(">HH", 0xffff, 0)
    return box(b"alis", bytes(4) + head)


def test_an_mp4_whose_pictures_are_in_another_file_does_not_open_that(tmp_path, clips):
    other, mp4 = tmp_path / "other.mp4", open(clips["h264 long gop"], "rb").read()
    os.link(clips["h264 short gop"], other)
    reference, uri = tmp_path / "reference.mp4", b"file://" + os.fsencode(other) + b"\0"
    url, urn = box(b"url ", bytes(4) + uri), box(b"urn ", bytes(4) + b"clip\0" + uri)
    for entry in (alias(other, 0), alias(other, 1), url, urn):
        table = box(b"dref", struct.pack(">II", 0, 1) + entry)
        reference.write_bytes(replaced(mp4, [b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"], table))
        opened = Opened(other)
        refused = try_out(reference)
        assert not opened
        # libav knows no other kind, and takes their pictures to be in the file itself
        if entry[4:8] == b"alis":
            assert refused == 4
            with av.open(str(reference), options={"enable_drefs": "1", "use_absolute_path": "1"}):
                assert opened   # it understands the reference, and would follow it


@pytest.mark.parametrize("head", [
    b"", b"OggS\0\2", b"\x1a\x45\xdf\xa3\x9fB\x86\x81\1", b"\0\0\0\x14ftypisom\0\0\2\0isom",
    b"RIFF\x24\0\0\0AVI ", b"GIF89a", b"FLV\1\1\0\0\0\x09"
], ids=repr)
@pytest.mark.parametrize("text", ["#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\n{}\n#EXT-X-ENDLIST\n",
                                  "ffconcat version 1.0\nfile '{}'\n"], ids=["playlist", "script"])
@pytest.mark.parametrize("file", ["a.mkv", "a.ogg", "a.m3u8", "a.mp4"])
def test_a_playlist_stays_one_behind_the_first_bytes_of_a_video(tmp_path, clips, head, text, file):
    other, path = clips["h264 open gop ts"], tmp_path / file
    path.write_bytes(head + text.format(other).encode())
    opened = Opened(other)
    assert try_out(path) == 4 and not opened


@pytest.mark.parametrize("prefix", [
    "file:", "concat:", "pipe:", "http://localhost/", "subfile,,start,0,end,0,,:", "data:video/mp4;base64,",
    "cache:", "crypto:", "async:", "tee:", "fd:", "-"
])
def test_a_path_is_a_path_even_if_libav_would_take_it_for_an_address(tmp_path, clips, monkeypatch, prefix):
    monkeypatch.chdir(tmp_path)
    other = os.path.relpath(clips["h264 short gop"], tmp_path)
    os.symlink(other, "clip.mp4")
    opened = Opened(clips["h264 short gop"])
    for name in (prefix + "clip.mp4", prefix + os.path.abspath("clip.mp4"), prefix + "clip.mp4|clip.mp4",
                 prefix):
        with pytest.raises(data.VideoError, match="No such file"):
            list(data.frames(name, [0]))
    assert not opened
    name = prefix + "clip.mp4"
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    os.link(clips["h264 short gop"], name)
    assert seen(data.frames(name, [0.4])) == [10]   # a file may be called that


def test_what_is_not_a_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    os.symlink("pipe.mp4", tmp_path / "link.mp4")
    os.symlink("loop.mp4", tmp_path / "loop.mp4")
    for path in (tmp_path / "pipe.mp4", tmp_path / "link.mp4", tmp_path / "loop.mp4", tmp_path, "/dev/zero",
                 "/dev/null", "/dev/stdin", ""):
        for call in CALLS:
            with pytest.raises(data.VideoError):
                call(path)
