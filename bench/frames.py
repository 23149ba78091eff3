"""Frames of a video beside other readers, and what a longer video costs.

CPU seconds are user and system time of all threads, as the kernel counts them. Importing (and ending) costs ours more, because torch is
among its imports; a program that has torch anyway pays that but once. So both are printed, and two ratios: of the whole process, and of the
work alone, which is all between the last import and the moment at which the pictures are there. Memory is the peak of the process, and that
less the peak after the imports. Ours, decord and PyAV decode in one thread, which costs them the fewest CPU seconds, OpenCV in as many as it
chooses, and so does decord a second time, as it is usually called; so wall time is shown, but makes no ratio. The round that is not counted
compares the pictures: who shows others than ours is pointed at.

`line` asks chat.py one question about longer and longer videos, --num_frames of each, and nothing is taken from its cache. Time to the first
token is what chat.py -v names after its imports: weights, video (decoding, CLIP, branch), prompt. The second table is arithmetic.
"""
import dataclasses
import inspect
import json
import math
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile

import numpy as np

import clip
import llm
from bench.clips import Clip, make
from bench.full_size import make_chat
from bench.measure import MEGABYTE, Contestant, last_line, launch, present, say
from plumbing import cli, pictures


# ---------------------------------------------------------------------------------------------------- contestants
# Each of these functions is sent to a process of its own as text: it can use nothing but its arguments and what it imports.
# They return RGB pictures, uint8 (T, H, W, 3): the frames on the screen at the middles of `count` equal stretches of time.
def ours(path, count, size=None):
    import numpy

    import data
    return numpy.stack([picture.permute(1, 2, 0).numpy() for _, picture in data.sample_frames(path, count, "uniform", size=size)])


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
    import numpy
    import torch

    import data
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
SAME = 2.0   # grey levels of mean difference up to which two pictures are the same frame, scaled a little differently


@dataclasses.dataclass
class Usage:
    process: float   # CPU seconds of the process, all of it
    work: float      # of these, what the function took
    wall: float      # seconds that the function took
    peak: float      # MB, the most memory that the process had
    extra: float     # MB more than when its imports were done


def decode(cfg, contestant, path, case, save=""):
    """One measurement -> Usage. save: a .npy file for the pictures, thinned."""
    program = CHILD.format(imports=contestant.imports, source=inspect.getsource(contestant.function), name=contestant.function.__name__)
    python = shutil.which(cfg.peer_python) if contestant.package else sys.executable
    numbers = [str(case.count)] + ([str(case.size)] if case.size else [])
    printed, process, peak, _ = launch([python, "-c", program, save, path, *numbers], f"{contestant.name}, {case.title},")
    before, after = json.loads(printed[-1])
    return Usage(process, after[0] - before[0], after[2] - before[2], peak, peak - before[1] / MEGABYTE)


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
            decode(cfg, c, path, case, os.path.join(folder, "pictures.npy"))
            pictures[c.name] = np.load(os.path.join(folder, "pictures.npy"))
    for run in range(cfg.runs):
        for c in contestants:
            usages[c.name].append(decode(cfg, c, path, case))
            say(f"{case.title}, T = {case.count}: {c.name}, {run + 1} of {cfg.runs}: {usages[c.name][-1].work:.2f} s of CPU for the work")
    medians = {name: Usage(*map(statistics.median, zip(*map(dataclasses.astuple, rows)))) for name, rows in usages.items()}
    return medians, {name: difference(pictures[name], pictures[contestants[0].name]) for name in pictures}


# ---------------------------------------------------------------------------------------------------- stages
def table(cfg, cases, columns, cells):
    """Compares all cases, prints a row for each contestant. cells(case, name, usages of all of the case) -> what columns hold."""
    contestants = {c.name: c for case in cases for c in case.contestants}   # each once, though in many cases
    names, rows, notes = present(cfg, list(contestants.values())), [], []
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
    cli.make_folder(os.path.dirname(cfg.picture) or ".")
    pictures.bars(cfg.picture, f"CPU seconds for {cases[0].count} frames of a video, without imports", bars, " s")


# ---------------------------------------------------------------------------------------------------- a chat about an hour
LINE = [dataclasses.replace(SHORT_GOP, seconds=5), *(case.clip for case in FLAT)]
PER_FRAME = 256           # tokens, of a design that hands every frame's patches to the language model
KV_BYTES = 2 * 32 * 4096 * 2   # a token's keys and values in a LLaMA-7B: 32 layers, 4096 wide, fp16


def one_question(cfg, path):
    """A chat in a process of its own -> (video tokens, seconds to the first token without imports, seconds of it for the video, peak MB)."""
    command = [sys.executable, "chat.py", path, "--weights", os.path.abspath(cfg.weights), "--num_frames", str(cfg.num_frames), "-q",
               "What happens?", "--max_new_tokens", "1", "--no-cache", "--verbose"]
    _, _, peak, said = launch(command, "chat.py")
    spent = {part: float(seconds) for part, seconds in re.findall(r"(import|video|in all) ([\d.]+) s\b", last_line(said))}
    return int(re.search(r"(\d+) video tokens", said)[1]), spent["in all"] - spent["import"], spent["video"], peak


def line(cfg, clips=None):
    """The same question about longer and longer videos: what does the length cost?"""
    cli.at_least(cfg, runs=1, num_frames=1)
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
    cli.make_folder(os.path.dirname(cfg.line_picture) or ".")
    pictures.plot(cfg.line_picture, [(f"{title}, by the length of the video in minutes", {"chat.py": [(row[0] / 60, row[i]) for row in rows]})
                                   for i, title in ((1, "video tokens"), (2, "seconds to the first token"), (4, "peak MB"))], height=220)
