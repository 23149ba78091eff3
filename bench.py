"""Every speed claim of the README, as ratios: ours beside programs that do the same work, in the same run.

    python bench.py frames    # frames of a video, beside decord, OpenCV and PyAV; resizing, beside Pillow   -> a table
    python bench.py flat      # 101 frames of a minute, of ten minutes and of an hour   -> a table, docs/frames_flat.png
    python bench.py line      # a chat about 5 seconds, a minute, ten minutes, an hour   -> two tables, docs/chat_flat.png
    python bench.py pretrain  # a step of pretraining at the size of ViT-L/14, with and without masks   -> a table

decord and OpenCV are used if --peer_python can import them (pip install decord opencv-python-headless), else left out. The
clips are made at the first start, in a few minutes: 2.7 GB in out/bench, of which the hour takes 1.8.

Each measurement is a process of its own. Those of a row of the table are run in turn, ours, peer, ours, peer, after one round
that is not counted; the table has medians. CPU seconds are user and system time of all threads, as the kernel counts them.
Importing (and ending) costs ours more, because torch is among its imports; a program that has torch anyway pays that but
once. So both are printed, and two ratios: of the whole process, and of the work alone, which is all between the last
import and the moment at which the pictures are there. Memory is the peak of the process, and that less the peak after the
imports. Ours, decord and PyAV decode in one thread, which costs them the fewest CPU seconds, OpenCV in as many as it
chooses, and so does decord a second time, as it is usually called; so wall time is shown, but makes no ratio. The round that
is not counted compares the pictures: who shows others than ours is pointed at.

pretrain takes two clips of 8 frames and random weights, as tensors: nothing is decoded. The physical limit is the machine's own
product of matrices, in the size and precision of CLIP's first MLP layer, measured in the same process.

line asks chat.py one question about longer and longer videos, --num_frames of each, and nothing is taken from its cache. Time to the
first token counts from the end of the imports: weights, video, prompt. The second table is arithmetic.
"""
import dataclasses
import fractions
import inspect
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from typing import Callable

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image

import common


@dataclasses.dataclass
class Config:
    stage: str                              # what to measure: frames, flat, line or pretrain
    data: str = "out/bench"                 # where the clips are, or will be
    runs: int = 5                           # measurements of each; the medians are shown
    peer_python: str = sys.executable       # the interpreter that can import decord and cv2
    picture: str = "docs/frames_flat.png"   # what flat draws
    weights: str = "weights/tiny"           # of line: a folder for chat.py
    num_frames: int = 101                   # of line: frames of each video
    line_picture: str = "docs/chat_flat.png"   # what line draws


# ---------------------------------------------------------------------------------------------------- clips
FPS = 30
CODECS = {"libx264": ("mp4", {"preset": "veryfast", "bf": "3", "sc_threshold": "0"}),   # name: (extension, options)
          "libvpx-vp9": ("webm", {"deadline": "realtime", "cpu-used": "8"})}


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video file."""
    width: int
    height: int
    seconds: int      # of what is encoded
    gop: int          # frames from one keyframe to the next
    mbit: float       # Mbit/s
    codec: str = "libx264"
    copies: int = 1   # so many times the same, one after the other, without encoding it again

    @property
    def title(self):
        length = self.seconds * self.copies
        return f"{self.height}p {self.codec[3:]}, {f'{length} s' if length < 60 else f'{length / 60:g} min'}, GOP {self.gop}"

    @property
    def file(self):   # says all that it is, so that one made from another table is not taken for it
        return "_".join(map(str, dataclasses.astuple(self))) + "." + CODECS[self.codec][0]


def make(folder, clip):
    """-> the path of a clip, which is made if it is not there yet."""
    common.make_folder(folder)
    path = os.path.abspath(os.path.join(folder, clip.file))
    if not os.path.exists(path):
        source = make(folder, dataclasses.replace(clip, copies=1)) if clip.copies > 1 else None
        say(f"making {path}")
        common.write_atomic(path, lambda f: repeat(f, source, clip) if source else encode(f, clip))
    return path


def encode(file, clip):
    extension, options = CODECS[clip.codec]
    with av.open(file, "w", format=extension) as out:
        stream = out.add_stream(clip.codec, rate=FPS, options={**options, "g": str(clip.gop), "keyint_min": str(clip.gop)})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = clip.width, clip.height, "yuv420p", int(clip.mbit * 1e6)
        stream.codec_context.colorspace = Colorspace.ITU601   # some peers know no other, and the pictures are to be compared
        for i, planes in enumerate(scene(clip.width, clip.height, clip.seconds * FPS)):
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = i, fractions.Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def repeat(file, source, clip):
    """The packets of `source`, clip.copies times, each time later by its length."""
    with av.open(file, "w", format=CODECS[clip.codec][0]) as out:
        stream = None
        for copy in range(clip.copies):
            with av.open(source) as container:
                stream = stream or out.add_stream_from_template(container.streams.video[0])
                for packet in container.demux(video=0):
                    if packet.size:
                        later = round(copy * clip.seconds / packet.time_base)
                        packet.pts, packet.dts, packet.stream = packet.pts + later, packet.dts + later, stream
                        out.mux(packet)


def scene(width, height, frames):
    """Pictures (3/2 H, W) uint8, YUV 4:2:0: a camera goes round above rough ground, things pass by, the film has grain.

    Everything is a moving window onto a few pictures drawn in advance: drawing must not cost more than encoding."""
    rng = np.random.default_rng(0)

    def rough(height, width, spread):   # coarse and fine noise on top of each other, without flat areas
        layers = [np.asarray(Image.fromarray(rng.normal(0, spread / 2 ** k, (9 * 2 ** k, 16 * 2 ** k)).astype(np.float32))
                             .resize((width, height), Image.Resampling.BICUBIC)) for k in range(5)]
        return (128 + sum(layers)).clip(30, 225).astype(np.uint8)   # room for the grain
    sides = [(height, width, height // 4, 28)] + 2 * [(height // 2, width // 2, height // 8, 10)]   # Y, U, V; last: contrast
    grounds, things = ([rough(h + 2 * reach, w + 2 * reach, spread) for h, w, reach, spread in sides] for _ in range(2))
    grain = rng.normal(0, 2.5, (height + 64, width + 64)).round().astype(np.int8).view(np.uint8)   # sums wrap round: minus works
    for i in range(frames):
        turn, planes = 2 * math.pi * i / (7.3 * FPS), []   # a circle at one speed, so that any two neighbours differ
        for (h, w, reach, _), ground, thing in zip(sides, grounds, things):
            top, left = reach + round(reach * math.sin(turn)), reach + round(reach * math.cos(turn))
            plane = ground[top:top + h, left:left + w].copy()
            for k in range(4):
                y, x = round((0.4 + 0.3 * math.sin(turn * (k + 1) / 3)) * h), round((i / FPS / (k + 2) + k / 4) % 1 * w * 0.8)
                plane[y:y + h // 5, x:x + w // 6] = thing[y:y + h // 5, reach:reach + w // 6]
            planes.append(plane)
        top, left = rng.integers(64, size=2)
        planes[0] += grain[top:top + height, left:left + width]
        yield np.concatenate([plane.ravel() for plane in planes]).reshape(height * 3 // 2, width)


# ---------------------------------------------------------------------------------------------------- contestants
# Each of these functions is sent to a process of its own as text: it can use nothing but its arguments and what it imports.
# They return RGB pictures, uint8 (T, H, W, 3): the frames on the screen at the middles of `count` equal stretches of time.
def ours(path, count, size=None):
    import data
    return data.sample_frames(path, count, "uniform", size=size)[0].permute(0, 2, 3, 1).numpy()


def with_decord(path, count, size=None):
    import decord
    scaled = {"width": size * 16 // 9, "height": size} if size else {}
    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1, **scaled)
    return reader.get_batch([(2 * i + 1) * len(reader) // (2 * count) for i in range(count)]).asnumpy()


def with_decord_as_is(path, count):
    import decord
    reader = decord.VideoReader(path)
    return reader.get_batch([(2 * i + 1) * len(reader) // (2 * count) for i in range(count)]).asnumpy()


def with_opencv(path, count):
    import cv2
    import numpy
    video = cv2.VideoCapture(path)
    height, width, frames = (int(video.get(p)) for p in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_COUNT))
    out = numpy.empty((count, height, width, 3), numpy.uint8)
    for i in range(count):
        video.set(cv2.CAP_PROP_POS_FRAMES, (2 * i + 1) * frames // (2 * count))
        cv2.cvtColor(video.read()[1], cv2.COLOR_BGR2RGB, dst=out[i])
    return out


def with_pyav(path, count):
    import av
    import numpy
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = round(container.duration / av.time_base * stream.average_rate)   # webm has no count of its own
        wanted = [(2 * i + 1) * frames // (2 * count) for i in range(count)]
        return numpy.stack([f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(stream)) if i in wanted])


def ours_resize(path, count, size):   # one picture, made up, `count` times
    import data
    import numpy
    import torch
    picture = numpy.frombuffer(numpy.random.default_rng(0).bytes(1080 * 1920 * 3), numpy.uint8).reshape(1080, 1920, 3).copy()
    for _ in range(count):
        small = data.resize_bicubic(torch.from_numpy(picture).permute(2, 0, 1)[None], size, size * 16 // 9)
    return small.permute(0, 2, 3, 1).numpy()


def pillow_resize(path, count, size):
    import numpy
    from PIL import Image
    picture = numpy.frombuffer(numpy.random.default_rng(0).bytes(1080 * 1920 * 3), numpy.uint8).reshape(1080, 1920, 3).copy()
    for _ in range(count):
        small = Image.fromarray(picture).resize((size * 16 // 9, size), Image.Resampling.BICUBIC)
    return numpy.asarray(small)[None]


@dataclasses.dataclass
class Contestant:
    name: str
    imports: str          # modules, whose import is not work
    function: Callable    # (path, count) or (path, count, size) -> pictures
    package: str = ""     # what pip calls it, if it is none of the packages that this program needs anyway


OURS, OURS_RESIZE = Contestant("ours", "data", ours), Contestant("ours", "data", ours_resize)
DECORD = Contestant("decord", "decord", with_decord, "decord")
DECORD_AS_IS = Contestant("decord, its threads", "decord", with_decord_as_is, "decord")
OPENCV = Contestant("OpenCV", "cv2", with_opencv, "opencv-python-headless")
PYAV, PILLOW = Contestant("PyAV, all frames", "av, numpy", with_pyav), Contestant("Pillow", "PIL.Image, numpy", pillow_resize)


@dataclasses.dataclass
class Case:
    clip: Clip | None
    count: int             # frames
    contestants: list      # ours first
    size: int | None = None   # short side

    @property
    def title(self):
        return self.clip.title if self.clip else f"resizing alone, 1080p to a short side of {self.size}"


LONG_GOP, SHORT_GOP = Clip(1920, 1080, 60, 250, 6), Clip(1920, 1080, 60, 30, 4)
BOTH = [OURS, DECORD, DECORD_AS_IS]
FRAMES = [Case(LONG_GOP, 8, [*BOTH, OPENCV]), Case(SHORT_GOP, 8, BOTH), Case(SHORT_GOP, 100, BOTH),
          Case(dataclasses.replace(LONG_GOP, copies=10), 8, BOTH), Case(Clip(854, 480, 10, 250, 1.5), 8, BOTH),
          Case(Clip(1920, 1080, 20, 250, 4, "libvpx-vp9"), 8, [OURS, PYAV]), Case(None, 100, [OURS_RESIZE, PILLOW], 224)]
# not 100 frames: from 10 minutes, those are all at whole seconds, where this clip has its keyframes, and cost next to nothing
FLAT = [Case(dataclasses.replace(SHORT_GOP, copies=minutes), 101, [OURS, DECORD], 224) for minutes in (1, 10, 60)]


# ---------------------------------------------------------------------------------------------------- measuring
# A new process inherits the peak memory of the one that started it, and this one has torch in it. So a small one stands between.
LAUNCHER = """
import json, os, sys
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""
CHILD = """
import json, resource, sys, time
import {imports}

{source}
def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss, time.perf_counter()

before = used()
pictures = {name}(sys.argv[2], *map(int, sys.argv[3:]))
print(json.dumps([before, used()]))
if sys.argv[1]:
    import numpy
    numpy.save(sys.argv[1], pictures[:, ::4, ::4])   # every 16th pixel is enough to tell frames apart
"""
HERE = os.path.dirname(os.path.abspath(__file__))
MEGABYTE = 2 ** 20 if sys.platform == "darwin" else 2 ** 10   # in units of ru_maxrss
SAME = 2.0   # grey levels of mean difference up to which two pictures are the same frame, scaled a little differently


@dataclasses.dataclass
class Usage:
    process: float   # CPU seconds of the process, all of it
    work: float      # of these, what the function took
    wall: float      # seconds that the function took
    peak: float      # MB, the most memory that the process had
    extra: float     # MB more than when its imports were done


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def launch(cfg, contestant, path, case, save=""):
    """One measurement -> Usage. save: a .npy file for the pictures, thinned."""
    program = CHILD.format(imports=contestant.imports, source=inspect.getsource(contestant.function), name=contestant.function.__name__)
    python = shutil.which(cfg.peer_python) if contestant.package else sys.executable
    numbers = [str(case.count)] + ([str(case.size)] if case.size else [])
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, python, "-c", program, save, path, *numbers],
                          capture_output=True, text=True, cwd=HERE)
    *printed, last = done.stdout.splitlines()
    code, process, peak = json.loads(last)
    if code:
        raise common.UserError(f"{contestant.name} failed, {case.title}: {(done.stderr.splitlines() or [f'exit code {code}'])[-1]}")
    before, after = json.loads(printed[-1])
    return Usage(process, after[0] - before[0], after[2] - before[2], peak / MEGABYTE, (peak - before[1]) / MEGABYTE)


def present(cfg, cases):
    """Says on standard output who takes part -> the names of the contestants that are installed."""
    common.at_least(cfg, runs=1)
    if shutil.which(cfg.peer_python) is None:
        raise common.UserError(f"--peer_python {cfg.peer_python}: no such program")
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}; medians of {cfg.runs}.\n")
    contestants = {c.name: c for case in cases for c in case.contestants}
    for c in [c for c in contestants.values() if c.package]:
        command = [cfg.peer_python, "-c", f"import {c.imports}; print({c.imports}.__version__)"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            del contestants[c.name]
        print(f"- {c.name}: " + (f"not installed (pip install {c.package}); its rows are left out. {done.stderr.splitlines()[-1]}"
                                 if done.returncode else f"{c.package} {done.stdout.strip()}"))
    print(flush=True)
    return list(contestants)


def difference(a, b):
    """Grey levels: the mean over the pixels of the frame that differs most; infinite where sizes or numbers of frames differ."""
    return max(np.abs(x.astype(np.int16) - y).mean().item() for x, y in zip(a, b)) if a.shape == b.shape else math.inf


def compare(cfg, case, names):
    """-> {name: Usage of medians}, {name: grey levels from ours} of the contestants of a case that are among `names`."""
    path, contestants = make(cfg.data, case.clip) if case.clip else "", [c for c in case.contestants if c.name in names]
    usages, pictures = {c.name: [] for c in contestants}, {}
    with tempfile.TemporaryDirectory() as folder:
        for c in contestants:
            say(f"{case.title}, T = {case.count}: {c.name}, not counted")
            launch(cfg, c, path, case, os.path.join(folder, "pictures.npy"))
            pictures[c.name] = np.load(os.path.join(folder, "pictures.npy"))
    for run in range(cfg.runs):
        for c in contestants:
            usages[c.name].append(launch(cfg, c, path, case))
            say(f"{case.title}, T = {case.count}: {c.name}, {run + 1} of {cfg.runs}: {usages[c.name][-1].work:.2f} s of CPU for the work")
    medians = {name: Usage(*map(statistics.median, zip(*map(dataclasses.astuple, rows)))) for name, rows in usages.items()}
    return medians, {name: difference(pictures[name], pictures[contestants[0].name]) for name in pictures}


# ---------------------------------------------------------------------------------------------------- stages
def table(cfg, cases, columns, cells):
    """Compares all cases, prints a row for each contestant. cells(case, name, usages of all of the case) -> what columns hold."""
    names, rows, notes = present(cfg, cases), [], []
    for case in cases:
        usages, differs = compare(cfg, case, names)
        for name, u in usages.items():
            rows.append([case.title, str(case.count), name, u.process, u.process - u.work, u.work, u.wall, f"{u.peak:.0f}",
                         f"{u.extra:.0f}", *cells(case, name, usages), differs[name]])
            if differs[name] > SAME:
                notes.append(f"\nNot the same work: {case.title}, T = {case.count}: {name} shows other frames than ours.")
    columns = ["what", "T", "who", "CPU s of the process", "of it imports and end", "of it work", "wall s of work", "peak MB",
               "MB beyond imports", *columns, "grey levels from ours"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(cell if isinstance(cell, str) else f"{cell:.2f}" for cell in row) + " |")
    print(*notes, sep="\n", flush=True)


def ratios(a, b):   # less than 1 MB is noise
    return [a.process / b.process, a.work / b.work, max(a.extra, 1) / max(b.extra, 1)]


def frames(cfg, cases=None):
    """Ours against each peer, a row for each; the ratios stand in the rows of the peers."""
    def cells(case, name, usages):
        ms = f"{1000 * usages[name].work / case.count:.1f}"
        return [ms, *(ratios(usages["ours"], usages[name]) if name != "ours" else [""] * 3)]
    columns = ["ms of work a frame", "ours / peer: process", "ours / peer: work", "ours / peer: MB beyond imports"]
    table(cfg, cases or FRAMES, columns, cells)


def flat(cfg, cases=None):
    """The same number of frames from longer and longer files: what does the length cost?"""
    cases, first, bars = cases or FLAT, {}, []

    def cells(case, name, usages):
        base = first.setdefault(name, usages[name])   # of the shortest file
        bars.append((list(first).index(name), f"{name}, {case.clip.seconds * case.clip.copies / 60:g} min", usages[name].work))
        return ratios(usages[name], base)
    table(cfg, cases, ["to the first: process", "to the first: work", "to the first: MB beyond imports"], cells)
    bars = [(label, seconds, seconds, seconds) for _, label, seconds in sorted(bars, key=lambda bar: bar[0])]
    common.make_folder(os.path.dirname(cfg.picture) or ".")
    common.bars(cfg.picture, f"CPU seconds for {cases[0].count} frames of a video, without imports", bars, " s")


# ---------------------------------------------------------------------------------------------------- a chat about an hour
LINE = [dataclasses.replace(SHORT_GOP, seconds=5), *(case.clip for case in FLAT)]
PER_FRAME = 256           # tokens, of a design that hands every frame's patches to the language model
KV_BYTES = 2 * 32 * 4096 * 2   # a token's keys and values in a LLaMA-7B: 32 layers, 4096 wide, fp16


def one_question(cfg, path):
    """A chat in a process of its own -> (video tokens, seconds to the first token without imports, peak MB)."""
    command = [sys.executable, "chat.py", path, "--weights", os.path.abspath(cfg.weights), "--num_frames", str(cfg.num_frames), "-q",
               "What happens?", "--max_new_tokens", "1", "--no-cache", "--verbose"]
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True, cwd=HERE)
    code, _, peak = json.loads(done.stdout.splitlines()[-1])
    if code:
        raise common.UserError(f"chat.py failed: {(done.stderr.splitlines() or [f'exit code {code}'])[-1]}")
    imports, total = map(float, re.search(r"\(import ([\d.]+) s.* in all ([\d.]+) s\)", done.stderr).groups())
    return int(re.search(r"(\d+) video tokens", done.stderr)[1]), total - imports, peak / MEGABYTE


def line(cfg, clips=None):
    """The same question about longer and longer videos: what does the length cost?"""
    common.at_least(cfg, runs=1, num_frames=1)
    rows, clips = [], clips or LINE
    for clip in clips:
        path = make(cfg.data, clip)
        runs = [one_question(cfg, path) for _ in range(cfg.runs + 1)][1:]   # the first one finds no file in memory
        rows.append((clip.seconds * clip.copies, *map(statistics.median, zip(*runs))))
        say(f"{clip.title}: {rows[-1][2]:.2f} s to the first token")
    print(f"{platform.platform()}, {os.cpu_count()} cores; {cfg.weights}, {cfg.num_frames} frames of each video; medians of {cfg.runs}.\n")
    print("| video | video tokens | s to the first token | to the shortest | peak MB | to the shortest |\n|" + "---|" * 6)
    for (length, tokens, seconds, peak), clip in zip(rows, clips):
        print(f"| {clip.title} | {tokens:.0f} | {seconds:.2f} | {seconds / rows[0][2]:.2f} | {peak:.0f} | {peak / rows[0][3]:.2f} |")
    print(f"\n| length | at a frame a second and {PER_FRAME} tokens a frame | KV cache of a 7B | here | KV cache of a 7B |\n|" + "---|" * 5)
    for length, tokens, *_ in rows:
        print(f"| {length} s | {length * PER_FRAME:,} | {length * PER_FRAME * KV_BYTES / 1e9:,.2f} GB | {tokens:.0f} | {tokens * KV_BYTES / 1e9:,.3f} GB |")
    common.make_folder(os.path.dirname(cfg.line_picture) or ".")
    common.plot(cfg.line_picture, [(f"{title}, by the length of the video in minutes", {"chat.py": [(row[0] / 60, row[i]) for row in rows]})
                                   for i, title in ((1, "video tokens"), (2, "seconds to the first token"), (3, "peak MB"))], height=220)


# ---------------------------------------------------------------------------------------------------- pretraining
def training_steps(precision, mask_ratio, checkpointed, count):   # sent to a process of its own, too
    import time

    import torch

    import clip
    import model
    import pretrain
    dtype = pretrain.PRECISIONS[precision]
    torch.manual_seed(0)
    with torch.device("meta"):
        towers = clip.CLIP(clip.CLIPConfig())
    towers.load_state_dict({name: torch.randn(t.shape, dtype=dtype) * 0.02 for name, t in towers.state_dict().items()}, assign=True)
    branch = model.Branch.beside(towers, drop_path=0.1, checkpointed=checkpointed)
    learner = model.Pretraining(model.VideoEncoder(pretrain.lighten(towers, dtype), branch))
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=1e-6)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    video, ids = torch.randn(2, 8, 3, 224, 224), torch.randint(1000, (2, 64))

    def clock():
        return time.perf_counter(), time.process_time()
    rows = []
    for _ in range(count):
        kept = model.tube_mask(2, 256, mask_ratio)
        moments = [clock()]
        states, text = learner.look(video, ids, kept)
        moments.append(clock())
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            pretrain.backward(learner, [(states, kept)], text, [1, 0.1, 0.8], scaler, torch.manual_seed)
        moments.append(clock())
        optimizer.step()
        moments.append(clock())
        rows.append([[after - before for before, after in zip(a, b)] for a, b in zip(moments, moments[1:])])   # [part][wall, CPU]
    # the limit: the same number of rows and columns as the first MLP layer has for these 16 frames
    x, w = torch.randn(16 * 257, 1024, dtype=dtype), torch.randn(4096, 1024, dtype=dtype)
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < 2:
        torch.nn.functional.linear(x, w)
        products += 1
    return rows[1:], products * 2 * x.numel() * 4096 / (time.perf_counter() - began)   # the first step warms up


def trunk_flops(frames=16, layers=24, tokens=257, width=1024):
    """Multiplications and additions of CLIP's image tower: projections and MLP, then attention. Patches and norms are left out."""
    return frames * layers * (24 * tokens * width ** 2 + 4 * tokens ** 2 * width)


def pretrain(cfg):
    """A step with the tube mask and without, for each precision."""
    present(cfg, [])
    program = "import json, sys\n" + inspect.getsource(training_steps) + "\nprint(json.dumps(training_steps(*json.loads(sys.argv[1]))))"
    cases = {(precision, ratio, checkpointed): [] for precision in ("fp32", "bf16") for ratio, checkpointed in ((0.7, False), (0.0, False), (0.7, True))}
    for run in range(cfg.runs):
        for case in cases:
            say(f"{case}, {run + 1} of {cfg.runs}")
            done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, sys.executable, "-c", program, json.dumps([*case, 3])],
                                  capture_output=True, text=True, cwd=HERE)
            *printed, last = done.stdout.splitlines()
            if json.loads(last)[0]:
                raise common.UserError(f"a step of {case} failed: {(done.stderr.splitlines() or ['no reason given'])[-1]}")
            steps, limit = json.loads(printed[-1])
            for parts in steps:
                wall, cpu = zip(*parts)
                cases[case].append([sum(wall), sum(cpu), *wall, trunk_flops() / wall[0] / 1e9, limit / 1e9, json.loads(last)[2] / MEGABYTE])
    medians = {case: [statistics.median(column) for column in zip(*rows)] for case, rows in cases.items()}
    print("| precision | mask | branch checkpointed | s a step | CPU s | s in frozen CLIP | s in the branch | s in AdamW | to no mask | CLIP, GFLOP/s "
          "| matrix product, GFLOP/s | CLIP / product | peak MB |\n|" + "---|" * 13)
    for (precision, ratio, checkpointed), (wall, cpu, look, learn, adam, speed, limit, peak) in medians.items():
        print(f"| {precision} | {ratio} | {'yes' if checkpointed else 'no'} | {wall:.2f} | {cpu:.2f} | {look:.2f} | {learn:.2f} | {adam:.2f} | "
              f"{wall / medians[precision, 0.0, False][0]:.2f} | {speed:.0f} | {limit:.0f} | {speed / limit:.2f} | {peak:.0f} |")


STAGES = {"frames": frames, "flat": flat, "line": line, "pretrain": pretrain}


def main(cfg):
    if cfg.stage not in STAGES:
        raise common.UserError(f"{cfg.stage}: no such stage; choose one of {', '.join(STAGES)}")
    STAGES[cfg.stage](cfg)


if __name__ == "__main__":
    common.run(main, Config, positional=["stage"])
