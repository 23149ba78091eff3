"""Every speed claim of the README, as ratios: ours beside programs that do the same work, in the same run.

    python bench.py frames    # frames of a video, beside decord, OpenCV and PyAV; resizing, beside Pillow   -> a table
    python bench.py flat      # 101 frames of a minute, of ten minutes and of an hour   -> a table, docs/frames_flat.png
    python bench.py line      # a chat about 5 seconds, a minute, ten minutes, an hour   -> two tables, docs/chat_flat.png
    python bench.py pretrain  # a step of pretraining at the size of ViT-L/14, with and without masks   -> a table
    python bench.py load      # how soon ViT-L/14 and a LLaMA-7B are ready, and what memory that takes   -> a table
    python bench.py chat      # prompts and answers of a 7B, beside transformers and llama.cpp   -> a table
    python bench.py quality   # what rounding to int8 and int4 costs: a trained tiny LLaVA, CLIP, layers of a 7B   -> a table

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
first token counts from the end of the imports: weights, video (decoding, CLIP, branch), prompt. The second table is arithmetic.

line, load and chat take weights of the full size with random numbers, made at the first start: 28 GB in out/bench (the 7B in bf16, int8, int4, and
as Q4_0 for llama.cpp); `--layers 2` is a quick look. transformers and llama-cpp-python are used if --peer_python can import them. The
limits are measured in the same run: how fast so many threads read memory, and how fast they multiply 300 rows by a layer of the 7B.
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
import struct
import subprocess
import sys
import tempfile
from typing import Callable

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace
from PIL import Image

import clip
import common
import llm
import quant
import weightfile
from model import Branch


@dataclasses.dataclass
class Config:
    stage: str                              # what to measure: frames, flat, line, pretrain, load, chat or quality
    data: str = "out/bench"                 # where the clips and weights are, or will be
    runs: int = 5                           # measurements of each; the medians are shown
    peer_python: str = sys.executable       # the interpreter that can import decord, cv2, transformers and llama_cpp
    layers: int = 32                        # of the 7B; fewer for a quick look, the work of a layer stays the same
    prompt: int = 300                       # tokens of a prompt
    tokens: int = 16                        # tokens of an answer
    picture: str = "docs/frames_flat.png"   # what flat draws
    weights: str | None = None              # of line: a folder for chat.py; None: random numbers, in the full size
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


def call(python, what, *functions, arguments):
    """Runs the last of `functions` in a process of its own, to which their texts are sent -> what it returns, through JSON, and its peak MB.

    `what` it is, in words, for the error."""
    program = "\n".join(["import json, sys", *map(inspect.getsource, functions), f"print(json.dumps({functions[-1].__name__}(*json.loads(sys.argv[1]))))"])
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, shutil.which(python), "-c", program, json.dumps(arguments)],
                          capture_output=True, text=True, cwd=HERE)
    *printed, last = done.stdout.splitlines()
    code, _, peak = json.loads(last)
    if code:
        raise common.UserError(f"{what} failed: {(done.stderr.splitlines() or [f'exit code {code}'])[-1]}")
    return json.loads(printed[-1]), peak / MEGABYTE


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
    """A chat in a process of its own -> (video tokens, seconds to the first token without imports, seconds of it for the video, peak MB)."""
    command = [sys.executable, "chat.py", path, "--weights", os.path.abspath(cfg.weights), "--num_frames", str(cfg.num_frames), "-q",
               "What happens?", "--max_new_tokens", "1", "--no-cache", "--verbose"]
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True, cwd=HERE)
    code, _, peak = json.loads(done.stdout.splitlines()[-1])
    if code:
        raise common.UserError(f"chat.py failed: {(done.stderr.splitlines() or [f'exit code {code}'])[-1]}")
    spent = {part: float(seconds) for part, seconds in re.findall(r"(import|video|in all) ([\d.]+) s\b", done.stderr.splitlines()[-1])}
    return int(re.search(r"(\d+) video tokens", done.stderr)[1]), spent["in all"] - spent["import"], spent["video"], peak / MEGABYTE


def line(cfg, clips=None):
    """The same question about longer and longer videos: what does the length cost?"""
    common.at_least(cfg, runs=1, num_frames=1)
    rows, clips, what = [], clips or LINE, cfg.weights or f"random weights, a LLaMA-7B of {cfg.layers} layers"
    if cfg.weights is None:
        cfg = dataclasses.replace(cfg, weights=make_chat(cfg, llm.LLaMAConfig(layers=cfg.layers), clip.CLIPConfig()))
    for video in clips:
        path = make(cfg.data, video)
        runs = [one_question(cfg, path) for _ in range(cfg.runs + 1)][1:]   # the first one finds no file in memory
        rows.append((video.seconds * video.copies, *map(statistics.median, zip(*runs))))
        say(f"{video.title}: {rows[-1][2]:.2f} s to the first token")
    print(f"{platform.platform()}, {os.cpu_count()} cores; {what}; {cfg.num_frames} frames of each video; medians of {cfg.runs}.\n")
    print("| video | video tokens | s to the first token | to the shortest | of it s for the video | peak MB | to the shortest |\n|" + "---|" * 7)
    for (_, tokens, seconds, seeing, peak), video in zip(rows, clips):
        print(f"| {video.title} | {tokens:.0f} | {seconds:.2f} | {seconds / rows[0][2]:.2f} | {seeing:.2f} | {peak:.0f} | {peak / rows[0][4]:.2f} |")
    print(f"\n| length | at a frame a second and {PER_FRAME} tokens a frame | KV cache of a 7B | here | KV cache of a 7B |\n|" + "---|" * 5)
    for length, tokens, *_ in rows:
        print(f"| {length} s | {length * PER_FRAME:,} | {length * PER_FRAME * KV_BYTES / 1e9:,.2f} GB | {tokens:.0f} | {tokens * KV_BYTES / 1e9:,.3f} GB |")
    common.make_folder(os.path.dirname(cfg.line_picture) or ".")
    common.plot(cfg.line_picture, [(f"{title}, by the length of the video in minutes", {"chat.py": [(row[0] / 60, row[i]) for row in rows]})
                                   for i, title in ((1, "video tokens"), (2, "seconds to the first token"), (4, "peak MB"))], height=220)


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
        pretrain.backward(learner, [(states, kept)], text, [1, 0.1, 0.8], scaler, torch.manual_seed, dtype)
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
    cases = {(precision, ratio, checkpointed): [] for precision in ("fp32", "bf16") for ratio, checkpointed in ((0.7, False), (0.0, False), (0.7, True))}
    for run in range(cfg.runs):
        for case in cases:
            say(f"{case}, {run + 1} of {cfg.runs}")
            (steps, limit), peak = call(sys.executable, f"a step of {case}", training_steps, arguments=[*case, 3])
            for parts in steps:
                wall, cpu = zip(*parts)
                cases[case].append([sum(wall), sum(cpu), *wall, trunk_flops() / wall[0] / 1e9, limit / 1e9, peak])
    medians = {case: [statistics.median(column) for column in zip(*rows)] for case, rows in cases.items()}
    print("| precision | mask | branch checkpointed | s a step | CPU s | s in frozen CLIP | s in the branch | s in AdamW | to no mask | CLIP, GFLOP/s "
          "| matrix product, GFLOP/s | CLIP / product | peak MB |\n|" + "---|" * 13)
    for (precision, ratio, checkpointed), (wall, cpu, look, learn, adam, speed, limit, peak) in medians.items():
        print(f"| {precision} | {ratio} | {'yes' if checkpointed else 'no'} | {wall:.2f} | {cpu:.2f} | {look:.2f} | {learn:.2f} | {adam:.2f} | "
              f"{wall / medians[precision, 0.0, False][0]:.2f} | {speed:.0f} | {limit:.0f} | {speed / limit:.2f} | {peak:.0f} |")


# ---------------------------------------------------------------------------------------------------- weights of the full size
def random_tensors(shapes, dtype):
    """{name: shape} -> {name: tensor}: parts of one block of random numbers, so that 13 GB are made in the time of writing them."""
    room = 1 << 20   # each begins somewhere else: gate and up must not be the same matrix
    block = torch.randn(max(shape.numel() for shape in shapes.values()) + room, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    starts = {name: i * 7_919 % room for i, name in enumerate(shapes)}
    parts = {name: block[starts[name]:starts[name] + shape.numel()].view(shape) for name, shape in shapes.items()}
    return {name: t + 1 if "norm" in name or "ln_" in name else t for name, t in parts.items()}


def make_llama(cfg, config):
    """A Hugging Face folder of a LLaMA in bf16, with the tokenizer of the tiny one -> its path."""
    folder = os.path.abspath(os.path.join(cfg.data, f"llama_{config.layers}_layers_of_{config.width}"))
    if not os.path.exists(os.path.join(folder, "config.json")):   # the last file that save_llama writes
        say(f"making {folder}")
        with torch.device("meta"):
            model = llm.LLaMA(config)
        model.load_state_dict(random_tensors({name: t.shape for name, t in model.state_dict().items()}, torch.bfloat16), assign=True)
        llm.save_llama(folder, model, os.path.join(HERE, "weights", "tiny", "llava", "tokenizer.model"), dtype=torch.bfloat16)
    return folder


def make_openai_clip(cfg, config):
    """A CLIP in fp16 as OpenAI released it, nested modules in a TorchScript archive -> its path."""
    path = os.path.abspath(os.path.join(cfg.data, f"clip_{config.vision_layers}_layers_of_{config.vision_width}.pt"))
    if not os.path.exists(path):
        say(f"making {path}")
        theirs = {ours: name for name, ours in clip.OPENAI.items()}

        def renamed(name):
            if layer := re.fullmatch(r"(.*\.layers)\.(\d+)\.(.*)", name):
                return f"{theirs[layer[1]]}.{layer[2]}.{renamed(layer[3])}"
            part, _, kind = name.rpartition(".")
            return theirs[name] if name in theirs else f"attn.in_proj_{kind}" if part.endswith("q_proj") else f"{theirs[part]}.{kind}"
        with torch.device("meta"):
            towers = clip.CLIP(config)
        shapes = {}
        for name, t in towers.state_dict().items():
            if not re.search(r"\.[kv]_proj\.", name):   # they are in one tensor with q
                rows = 3 if ".q_proj." in name else 1
                if name.endswith("_projection.weight"):
                    t = t.T
                shapes[renamed(name)] = torch.Size([rows * t.shape[0], *t.shape[1:]]) if t.ndim else t.shape
        root = torch.nn.Module()
        for name, t in random_tensors(shapes, torch.float16).items():
            module, (*parents, leaf) = root, name.split(".")
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, torch.nn.Module())
                module = module._modules[parent]
            module.register_parameter(leaf, torch.nn.Parameter(t.clone(), requires_grad=False))   # else all would be one storage in the file
        common.make_folder(cfg.data)
        common.write_atomic(path, lambda f: torch.jit.save(torch.jit.script(root), f))
    return path


def make_chat(cfg, config, clip_config):
    """A folder for chat.py: these two, and a branch and a projector that are random numbers as well -> its path."""
    folder, D = os.path.abspath(os.path.join(cfg.data, f"chat_{config.layers}_layers_of_{config.width}")), clip_config.vision_width
    common.make_folder(folder)
    for name, path in (("clip", make_openai_clip(cfg, clip_config)), ("llava", make_llama(cfg, config))):
        if not os.path.lexists(os.path.join(folder, name)):
            os.symlink(os.path.relpath(path, folder), os.path.join(folder, name))
    with torch.device("meta"):
        branch = Branch(D, clip_config.vision_heads, clip_config.vision_mlp)
    parts = {"branch.pth": {f"backbone.{name}": t.shape for name, t in branch.state_dict().items()},
             "mm_projector.bin": {"model.mm_projector.weight": torch.Size([config.width, D]), "model.mm_projector.bias": torch.Size([config.width])}}
    for name, shapes in parts.items():
        weightfile.write_safetensors(os.path.join(folder, name), random_tensors(shapes, torch.float16))
    return folder


def make_gguf(cfg, config):
    """The same shapes for llama.cpp, all matrices in Q4_0: 32 weights share an fp16 scale, 18 bytes. -> its path.

    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version, counts; settings; names, shapes and places; then the tensors."""
    path, D = os.path.abspath(os.path.join(cfg.data, f"llama_{config.layers}_layers_of_{config.width}.gguf")), config.width
    if os.path.exists(path):
        return path
    say(f"making {path}")

    def text(string):
        return struct.pack("<Q", len(string.encode())) + string.encode()

    def number(name, value, kind="I"):
        return text(name) + struct.pack("<I" + kind, {"I": 4, "f": 6}[kind], value)

    def array(name, kind, items):
        return text(name) + struct.pack("<IIQ", 9, kind, len(items)) + b"".join(items)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *(f"w{i}" for i in range(config.vocab_size - 259))][:config.vocab_size]
    kinds = [2, 3, 3] + 256 * [6] + (len(words) - 259) * [1]   # unknown, control, bytes, words
    settings = [text("general.architecture") + struct.pack("<I", 8) + text("llama"), number("general.file_type", 2),
                number("llama.context_length", config.context_length), number("llama.embedding_length", D), number("llama.block_count", config.layers),
                number("llama.feed_forward_length", config.mlp), number("llama.attention.head_count", config.heads),
                number("llama.attention.head_count_kv", config.kv_heads), number("llama.rope.dimension_count", config.head_dim),
                number("llama.attention.layer_norm_rms_epsilon", config.norm_eps, "f"), number("llama.vocab_size", config.vocab_size),
                text("tokenizer.ggml.model") + struct.pack("<I", 8) + text("llama"), array("tokenizer.ggml.tokens", 8, [text(w) for w in words]),
                array("tokenizer.ggml.scores", 6, [struct.pack("<f", -i) for i in range(len(words))]),
                array("tokenizer.ggml.token_type", 5, [struct.pack("<i", kind) for kind in kinds[:len(words)]]),
                number("tokenizer.ggml.bos_token_id", 1), number("tokenizer.ggml.eos_token_id", 2)]
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = {"token_embd": (config.vocab_size, D)}
    for i in range(config.layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_norm": (D,), "attn_q": (q, D), "attn_k": (kv, D), "attn_v": (kv, D), "attn_output": (D, q), "ffn_norm": (D,),
            "ffn_gate": (config.mlp, D), "ffn_up": (config.mlp, D), "ffn_down": (D, config.mlp)}.items()}
    shapes |= {"output_norm": (D,), "output": (config.vocab_size, D)}
    header, sizes = b"", []
    for name, shape in shapes.items():
        matrix = len(shape) == 2
        header += text(name + ".weight") + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<IQ", 2 if matrix else 0, sum(sizes))   # Q4_0, fp32
        sizes.append(-(-(math.prod(shape) // 32 * 18 if matrix else 4 * D) // 32) * 32)   # each tensor begins at a multiple of 32 bytes
    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(settings)) + b"".join(settings) + header
    blocks = np.random.default_rng(0).integers(0, 256, (max(sizes) // 18 + 1, 18), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.004).tobytes(), np.uint8)   # 0.004 * (-8 .. 7): numbers of about 0.02

    def write(f):
        f.write(header + b"\0" * (-len(header) % 32))
        for shape, size in zip(shapes.values(), sizes):
            f.write((blocks.ravel() if len(shape) == 2 else np.ones(size // 4, np.float32).view(np.uint8))[:size].data)
    common.make_folder(cfg.data)
    common.write_atomic(path, write)
    return path


# ---------------------------------------------------------------------------------------------------- loading
def loading(kind, path, scheme):   # sent to a process of its own, too
    import time

    import torch

    import clip
    import llm

    def memory():   # MB that are this process's alone, and MB of them that are no file's
        with open("/proc/self/smaps_rollup") as f:
            rows = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in f if line.endswith("kB\n")}
        return rows["Private_Clean"] + rows["Private_Dirty"], rows["Anonymous"]
    before, began = memory(), time.perf_counter()
    model = clip.load_clip_model(path) if kind == "clip" else llm.load_llama(path, quantize=scheme)[0]
    ready, after = time.perf_counter() - began, memory()
    with torch.inference_mode():
        if kind == "llama":
            model(torch.ones(1, 1, dtype=torch.long))
    return [ready, after[0] - before[0], after[1] - before[1], time.perf_counter() - began]


def load(cfg, config=None, clip_config=None):
    """Time and memory from a file to a model that could begin, after one round that is not counted: it writes the quantised files."""
    if sys.platform != "linux":
        raise common.UserError("load: reads a process's memory from /proc, which only Linux has")
    present(cfg, [])
    config, clip_config = config or llm.LLaMAConfig(layers=cfg.layers), clip_config or clip.CLIPConfig()
    archive, folder = make_openai_clip(cfg, clip_config), make_llama(cfg, config)
    cases = {"CLIP, OpenAI's archive": ("clip", archive, None), **{f"LLaMA, {scheme or 'as in the file'}": ("llama", folder, scheme)
                                                                  for scheme in (None, *quant.SCHEMES)}}
    rows = {name: [] for name in cases}
    for run in range(cfg.runs + 1):
        for name, arguments in cases.items():
            measured, _ = call(sys.executable, f"loading {name}", loading, arguments=arguments)
            say(f"{name}: ready in {measured[0]:.3f} s" + (", not counted" if run == 0 else f", {run} of {cfg.runs}"))
            rows[name] += [measured] if run else []
    print("| what | MB of the file | s until ready | private MB | of it no file's | s until first logits |\n" + "|---" * 6 + "|")
    for name, (kind, path, scheme) in cases.items():
        file = path if kind == "clip" else os.path.join(path, f"quantised_{scheme}.safetensors" if scheme in ("int8", "int4") else "model.safetensors")
        ready, private, own, first = (statistics.median(column) for column in zip(*rows[name]))
        print(f"| {name} | {os.path.getsize(file) / 2 ** 20:.0f} | {ready:.3f} | {private:.1f} | {own:.1f} | {f'{first:.2f}' if kind == 'llama' else ''} |")


# ---------------------------------------------------------------------------------------------------- chat
# Each contestant gives `rounds` a function step(start, n): forget all but `start` tokens, take in n more, be ready to choose the next.
def rounds(step, prompt, tokens):
    import statistics
    import time

    def timed(start, n):
        began = time.perf_counter()
        step(start, n)
        return time.perf_counter() - began
    timed(0, 1), timed(1, 1)   # touches all weights once: what is measured is a chat that is under way
    result = {"prefill": timed(0, prompt), "token": statistics.median(timed(prompt + i, 1) for i in range(tokens))}
    second, alone = (statistics.median(timed(start, 20) for _ in range(3)) for start in (prompt + tokens, 0))
    result["turn"] = second / alone   # a second question of 20 tokens, to the same without what came before
    with open("/proc/self/status") as f:
        result["resident"] = next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmRSS"))   # MB
    return result


def ours_chat(path, scheme, threads, prompt, tokens):
    import torch

    import llm
    torch.set_num_threads(threads)
    model = llm.load_llama(path, quantize=scheme)[0].eval()
    weight, ids = model.model.embed_tokens.weight, torch.randint(3, 500, (1, prompt))
    cache = llm.KVCache(model.config, 1, prompt + tokens + 32, weight.device, weight.dtype)

    @torch.inference_mode()
    def step(start, n):
        cache.truncate(start)
        model(ids[:, :n], kv_cache=cache, last_only=True)
    return rounds(step, prompt, tokens)


def transformers_chat(path, scheme, threads, prompt, tokens):
    import torch
    import transformers
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    ids, cache = torch.randint(3, 500, (1, prompt)), transformers.DynamicCache()

    @torch.inference_mode()
    def step(start, n):
        nonlocal cache
        if start == 0:
            cache = transformers.DynamicCache()
        elif start < cache.get_seq_length():
            cache.crop(start - cache.get_seq_length())
        model(ids[:, :n], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return rounds(step, prompt, tokens)


def llama_cpp_chat(path, scheme, threads, prompt, tokens):
    import random

    import llama_cpp
    model = llama_cpp.Llama(path, n_ctx=prompt + tokens + 32, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    ids = [random.randrange(3, 500) for _ in range(prompt)]

    def step(start, n):
        model.n_tokens = start   # eval forgets what comes after
        model.eval(ids[:n])
    return rounds(step, prompt, tokens)


def limits(threads, rows, K, N):
    """Bytes/s that so many threads read from memory; multiplications and additions/s of `rows` rows by a matrix (N, K), fp32, bf16, int8."""
    import time

    import torch
    torch.set_num_threads(threads)

    def best(work, count):
        times = []
        for _ in range(count):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)
    memory = torch.ones(128 << 20)
    result = {"read": memory.nbytes / best(memory.sum, 8)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.int8)):
        x, w = torch.ones(rows, K).to(dtype), torch.ones(N, K).to(dtype)
        multiply = torch._int_mm if dtype == torch.int8 else torch.mm
        result[name] = 2 * rows * K * N / best(lambda: multiply(x, w.T), 3)
    return result


SCHEME_CHATS = {f"ours, {scheme}": scheme for scheme in quant.SCHEMES}
PEER_CHATS = [Contestant("transformers, bf16", "transformers", transformers_chat, "transformers"),
              Contestant("llama.cpp, Q4_0", "llama_cpp", llama_cpp_chat, "llama-cpp-python")]


def chat(cfg, config=None, threads=(1, 2)):
    """A prompt and an answer, ours and the peers, with one thread and with two."""
    if sys.platform != "linux":
        raise common.UserError("chat: reads a process's memory from /proc, which only Linux has")
    common.at_least(cfg, layers=1, prompt=20, tokens=1)
    config = config or llm.LLaMAConfig(layers=cfg.layers)
    names, folder = present(cfg, [Case(None, 0, PEER_CHATS)]), make_llama(cfg, config)
    files = {**{name: folder for name in SCHEME_CHATS}, "transformers, bf16": folder}
    if "llama.cpp, Q4_0" in names:
        files["llama.cpp, Q4_0"] = make_gguf(cfg, config)
    bytes_read = {name: quant.memory_need(config, scheme)["weights"] - config.vocab_size * config.width * 2 for name, scheme in SCHEME_CHATS.items()}
    bytes_read |= {"transformers, bf16": bytes_read["ours, bf16"], "llama.cpp, Q4_0": bytes_read["ours, bf16"] * 4.5 / 16}
    D, kv = config.width, config.kv_heads * config.head_dim
    work = 2 * cfg.prompt * config.layers * (2 * D * config.heads * config.head_dim + 2 * D * kv + 3 * D * config.mlp)   # of the projections
    columns = ["who", "threads", "s for the prompt", "to transformers", "to llama.cpp", "tokens/s", "to transformers", "to llama.cpp",
               "share of reading memory", "prompt, GFLOP/s", "share of the machine's product", "second turn to its words alone", "resident MB"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for n in threads:
        medians, bound = chat_round(cfg, config, names, files, n)
        peers = [medians.get(c.name) for c in PEER_CHATS]
        for name, m in medians.items():
            whole = SCHEME_CHATS.get(name) in ("int8", "int4") or name.startswith("llama.cpp")
            product = bound["int8"] if whole else max(bound["fp32"], bound["bf16"])
            cells = [f"{m['prefill']:.2f}", *(f"{m['prefill'] / p['prefill']:.2f}" if p else "" for p in peers),
                     f"{1 / m['token']:.2f}", *(f"{p['token'] / m['token']:.2f}" if p else "" for p in peers),
                     f"{bytes_read[name] / m['token'] / bound['read']:.2f}", f"{work / m['prefill'] / 1e9:.0f}",
                     f"{work / m['prefill'] / product:.2f}", f"{m['turn']:.2f}", f"{m['resident']:.0f}"]
            print(f"| {name} | {n} | " + " | ".join(cells) + " |")
        speeds = ", ".join(f"{key} {bound[key] / 1e9:.0f}" for key in ("fp32", "bf16", "int8"))
        print(f"| limits | {n} | " + " | " * 6 + f"{bound['read'] / 1e9:.1f} GB/s | {speeds} | | | |", flush=True)
    print("\n" + on_gpu(cfg, config))


def chat_round(cfg, config, names, files, threads):
    """-> {contestant: medians of what `rounds` measures}, medians of `limits`."""
    contestants = [Contestant(name, "", ours_chat) for name in SCHEME_CHATS] + [c for c in PEER_CHATS if c.name in names]
    rows, bounds = {c.name: [] for c in contestants}, []
    for run in range(cfg.runs + 1):   # the first is not counted: it writes the quantised files, and a few tokens do
        if run:
            bounds.append(call(sys.executable, "measuring the limits", limits, arguments=[threads, cfg.prompt, config.width, config.mlp])[0])
        for c in contestants:
            m, _ = call(cfg.peer_python if c.package else sys.executable, c.name, rounds, c.function,
                        arguments=[files[c.name], SCHEME_CHATS.get(c.name), threads, *((cfg.prompt, cfg.tokens) if run else (20, 1))])
            say(f"{c.name}, {threads} threads: prompt {m['prefill']:.2f} s, token {m['token']:.3f} s, {f'{run} of {cfg.runs}' if run else 'not counted'}")
            rows[c.name] += [m] if run else []
    medians = {name: {key: statistics.median(row[key] for row in measured) for key in measured[0]} for name, measured in rows.items()}
    return medians, {key: statistics.median(row[key] for row in bounds) for key in bounds[0]}


def on_gpu(cfg, config):
    """The same on a GPU, in bf16, as a sentence; or that there is none."""
    if not torch.cuda.is_available():
        return "On a GPU: not measured, this machine has none."
    m, _ = call(sys.executable, "the GPU", rounds, gpu_chat, arguments=[make_llama(cfg, config), cfg.prompt, cfg.tokens])
    read = (quant.memory_need(config)["weights"] - config.vocab_size * config.width * 2) / m["token"]
    return (f"On {torch.cuda.get_device_name()}, bf16: {1 / m['token']:.1f} tokens/s, {read / m['read']:.2f} of the {m['read'] / 1e9:.0f} GB/s at which "
            f"it reads its memory; a prompt of {cfg.prompt} tokens {m['prefill']:.3f} s; ViT-L/14 with the branch {100 / m['frames']:.0f} frames/s; "
            f"100 frames to the first token {m['frames'] + m['prefill']:.2f} s.")


def gpu_chat(path, prompt, tokens):
    import time

    import torch

    import clip
    import llm
    import model as video
    llama = llm.load_llama(path)[0].cuda().eval()
    ids = torch.randint(3, 500, (1, prompt), device="cuda")
    cache = llm.KVCache(llama.config, 1, prompt + tokens + 32, "cuda", torch.bfloat16)

    @torch.inference_mode()
    def step(start, n):
        cache.truncate(start)
        llama(ids[:, :n], kv_cache=cache, last_only=True)
        torch.cuda.synchronize()
    step(0, prompt)
    result = rounds(step, prompt, tokens)

    def best(work):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)
    memory = torch.ones(1 << 30, device="cuda")
    towers = clip.CLIP(clip.CLIPConfig()).bfloat16().cuda().eval()
    encoder = video.VideoEncoder(towers, video.Branch.beside(towers).bfloat16().cuda().eval(), skip_last=1)
    frames = torch.randn(1, 100, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        return result | {"read": memory.nbytes / best(memory.sum), "frames": best(lambda: video.branch_tokens(encoder, frames))}


# ---------------------------------------------------------------------------------------------------- quality
def relative(y, reference):
    """|y - reference| / |reference|."""
    return ((y.double() - reference.double()).norm() / reference.double().norm()).item()


@torch.no_grad()
def quality(cfg, config=None):
    """What rounding costs: logits of the trained tiny LLaVA, features of the tiny CLIP, and layers of a 7B one by one."""
    tiny = os.path.join(HERE, "weights", "tiny")
    questions = ["What colour is the shape?", "What does the shape do?", "Which way does the shape move?", "Where is the shape at the end?"]
    print("| what | error | " + " | ".join(quant.SCHEMES) + " |\n" + "|---" * (2 + len(quant.SCHEMES)) + "|")
    logits, answers, features = {}, {}, {}
    for scheme in (None, *quant.SCHEMES):
        model, tokenizer, _ = llm.load_llama(os.path.join(tiny, "llava"))
        towers = clip.load_clip(os.path.join(tiny, "clip"))[0].float()
        model = model.float().eval() if scheme is None else quant.quantize(model.to(torch.bfloat16 if scheme == "bf16" else torch.float32).eval(), scheme)
        if scheme:
            quant.quantize(towers.vision_model.to(torch.bfloat16) if scheme == "bf16" else towers.vision_model, scheme)
        prompts = [torch.tensor([[tokenizer.bos_id] + tokenizer.encode(f"USER: A small red circle moves left, then up. {q} ASSISTANT:")]) for q in questions]
        rows = [model(ids)[0] for ids in prompts]
        logits[scheme] = torch.cat([row - row.mean(-1, keepdim=True) for row in rows])   # a constant makes no difference to softmax
        answers[scheme] = [list(llm.generate(model, ids, max_new_tokens=12, stop_ids=tokenizer.stop_ids)) for ids in prompts]
        pixels = torch.randn(8, 3, towers.config.image_size, towers.config.image_size, generator=torch.Generator().manual_seed(0))
        features[scheme] = towers.float().encode_image(pixels)

    def row(what, error, numbers):
        print(f"| {what} | {error} | " + " | ".join(numbers) + " |", flush=True)
    row("tiny LLaVA", "logits", [f"{relative(logits[s], logits[None]):.4f}" for s in quant.SCHEMES])
    row("tiny LLaVA", "tokens likeliest in both", [f"{(logits[s].argmax(-1) == logits[None].argmax(-1)).double().mean():.3f}" for s in quant.SCHEMES])
    row("tiny LLaVA", "same answers", [f"{sum(map(lambda a, b: a == b, answers[s], answers[None]))} of {len(questions)}" for s in quant.SCHEMES])
    row("tiny CLIP", "image features", [f"{relative(features[s], features[None]):.4f}" for s in quant.SCHEMES])
    c = config or llm.LLaMAConfig()
    for N, K in ((c.mlp, c.width), (c.width, c.mlp)):
        torch.manual_seed(0)
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.normal_(0, 0.02)
        linear.weight.data = linear.weight.bfloat16()
        layers = [kind(kind.convert(linear.weight)) for kind in quant.SCHEMES.values()]
        x = torch.randn(64, K)
        wild = x.index_fill(1, torch.tensor([1, 7, 77]), 100.0)
        for name, rows in (("normal rows", x), ("3 channels of 100", wild)):
            true = rows @ linear.weight.float().T
            for count in (1, 64):
                row(f"layer of a 7B, {K} to {N}", f"{name}, {count} at a time",
                    [f"{relative(torch.cat([layer(part) for part in rows[:max(8, count)].split(count)]), true[:max(8, count)]):.4f}" for layer in layers])


STAGES = {"frames": frames, "flat": flat, "line": line, "pretrain": pretrain, "load": load, "chat": chat, "quality": quality}


def main(cfg):
    if cfg.stage not in STAGES:
        raise common.UserError(f"{cfg.stage}: no such stage; choose one of {', '.join(STAGES)}")
    STAGES[cfg.stage](cfg)


if __name__ == "__main__":
    common.run(main, Config, positional=["stage"])
