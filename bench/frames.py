"""Frames of a video beside decord, and what a longer video costs.

CPU seconds are user and system time of all threads, as the kernel counts them. Work is all between the last
import and the moment at which the pictures are there. Both decode in one thread, which costs them the fewest
CPU seconds. Memory is the peak of the process, less that after the imports. The pictures are compared: who
shows others than ours is pointed at.
"""
import dataclasses
import math
import os
import statistics

import numpy as np

from bench.measure import MEGABYTE, call, present, say, table
from bench.videos import Clip, make
from plumbing import cli, pictures


# -------------------------------------------------------------------------------- who takes part
# Each returns RGB pictures, uint8 (T, H, W, 3): the frames on the screen at the middles of `count` equal
# stretches of time; with `size`, scaled to that short side. They run in processes of their own.
def ours(path, count, size):
    import numpy

    import data
    found = data.sample_frames(path, count, "uniform", size=size)
    return numpy.stack([picture.permute(1, 2, 0).numpy() for _, picture in found])


def with_decord(path, count, size):
    import decord
    scaled = {"width": size * 16 // 9, "height": size} if size else {}
    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1, **scaled)
    return reader.get_batch([(2 * i + 1) * len(reader) // (2 * count) for i in range(count)]).asnumpy()


def decode(module, function, path, count, size):
    """-> (CPU seconds, peak memory) before and after the work; the pictures, thinned."""
    import importlib
    import resource
    importlib.import_module(module)   # no work

    def used():
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime, usage.ru_maxrss
    before = used()
    pictures = globals()[function](path, count, size)
    return before, used(), pictures[:, 8::16, 8::16].tolist()   # enough to tell frames apart


WHO = {"ours": ("data", ours), "decord": ("decord", with_decord)}
LONG_GOP, SHORT_GOP = Clip(1920, 1080, 60, 250, 6), Clip(1920, 1080, 60, 30, 4)
FRAMES = [(LONG_GOP, 8), (SHORT_GOP, 8), (SHORT_GOP, 100), (dataclasses.replace(LONG_GOP, copies=10), 8),
          (Clip(854, 480, 10, 250, 1.5), 8)]
# not 100 frames: from 10 minutes those are at whole seconds, where this clip has its keyframes, for free
FLAT = [(dataclasses.replace(SHORT_GOP, copies=minutes), 101) for minutes in (1, 10, 60)]
SAME = 2.0   # grey levels of mean difference up to which two pictures are one frame, scaled differently


# -------------------------------------------------------------------------------- measuring
def difference(a, b):
    """Grey levels: the mean over the pixels of the frame that differs most; infinite where sizes differ."""
    a, b = np.array(a, np.int16), np.array(b, np.int16)
    return np.abs(a - b).mean((1, 2, 3)).max().item() if a.shape == b.shape else math.inf


def compare(cfg, clip, count, size, who):
    """-> {name: medians of CPU s of work and of the rest, MB beyond imports; whether frames are ours}."""
    path, rows, seen = make(cfg.data, clip), {name: [] for name in who}, {}
    for run in range(cfg.runs + 1):
        for name in who:
            module, function = WHO[name]
            arguments = [module, function.__name__, path, count, size]
            (before, after, seen[name]), cpu, _ = call(f"{name}, {clip.title},", function, decode,
                                                       arguments=arguments)
            work = after[0] - before[0]
            rows[name] += [(work, cpu - work, (after[1] - before[1]) / MEGABYTE)] if run else []
            say(f"{clip.title}, T = {count}: {name}, round {run} of {cfg.runs}: {work:.2f} s")
    return {name: [*map(statistics.median, zip(*found)),
                   "yes" if difference(seen[name], seen["ours"]) <= SAME else "other frames than ours!"]
            for name, found in rows.items()}


def frames(cfg, cases=FRAMES):
    """Ours against decord, with the ratio of ours to it."""
    who, rows = list(WHO)[:1 + present(cfg, "decord", "decord")], []
    for clip, count in cases:
        found = compare(cfg, clip, count, None, who)
        for name, cells in found.items():
            rows.append([clip.title, str(count), name, *cells, found["ours"][0] / cells[0]])
    table(["video", "T", "who", "CPU s of work", "CPU s of imports", "MB beyond imports", "our frames",
           "work: ours / it"], rows)


def flat(cfg, cases=FLAT):
    """The same number of frames from longer and longer files: what does the length cost?"""
    who, rows, first = list(WHO)[:1 + present(cfg, "decord", "decord")], [], {}
    for clip, count in cases:
        for name, cells in compare(cfg, clip, count, 224, who).items():
            rows.append([name, clip.title, *cells, cells[0] / first.setdefault(name, cells[0])])
    rows.sort(key=lambda row: who.index(row[0]))
    table(["who", "video", "CPU s of work", "CPU s of imports", "MB beyond imports", "our frames",
           "work: to the shortest"], rows)
    cli.make_folder(cfg.pictures)
    title = f"CPU seconds for {cases[0][1]} frames of a video, without imports"
    bars = [(f"{name}, {video.split(' of ')[0]}", work, work, work) for name, video, work, *_ in rows]
    pictures.bars(os.path.join(cfg.pictures, "frames_flat.png"), title, bars, " s")
