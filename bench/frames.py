"""Frames of a video beside decord, and what the loader of a training feeds.

Both decode in one thread, which costs them the fewest CPU seconds. The pictures are compared: who shows
others than ours is pointed at.
"""
import dataclasses
import importlib.util
import os
import statistics
import time

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import Colorspace
from torch.utils.data import DataLoader

import data
from bench.measure import TINY, call, heading, medians
from clip import load_clip
from plumbing import cli
from toy.world import join

if importlib.util.find_spec("decord"):   # here: to import it is not its work
    import decord

FPS = 30


# -------------------------------------------------------------------------------- clips
@dataclasses.dataclass(frozen=True)
class Clip:
    """A video file: moving and noisy on purpose, made when it is first wanted."""
    width: int
    height: int
    seconds: int      # of what is encoded
    gop: int          # frames from one keyframe to the next
    mbit: float       # Mbit/s
    copies: int = 1   # so many times the same, one after the other, without encoding it again

    @property
    def title(self):
        return f"{self.seconds * self.copies} s of {self.height}p, keyframe every {self.gop}"


def make(folder, clip):
    """-> the path of a clip, which is made if it is not there yet. The name says all that the clip is."""
    path = os.path.abspath(os.path.join(folder, "_".join(map(str, dataclasses.astuple(clip))) + ".mp4"))
    if not os.path.exists(path):
        cli.make_folder(folder)
        source = make(folder, dataclasses.replace(clip, copies=1)) if clip.copies > 1 else None
        cli.say(f"making {path}")
        cli.write_atomic(path, lambda f: join([source] * clip.copies, f) if source else encode(f, clip))
    return path


def encode(file, clip):
    """libav's moving test picture under film grain, so that any two frames differ and none is cheap."""
    options = {"preset": "veryfast", "bf": "3", "sc_threshold": "0", "g": str(clip.gop)}
    picture = f"testsrc2=size={clip.width}x{clip.height}:rate={FPS}:duration={clip.seconds}"
    grain = ",noise=alls=12:allf=t+u"
    with av.open(picture + grain, format="lavfi") as source, av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
        stream.bit_rate = int(clip.mbit * 1e6)
        stream.codec_context.colorspace = Colorspace.ITU601   # decord knows no other
        for frame in source.decode(video=0):
            frame = frame.reformat(format="yuv420p")
            frame.pict_type = PictureType.NONE   # the encoder decides
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


# -------------------------------------------------------------------------------- who takes part
# Each returns RGB pictures, uint8 (T, H, W, 3): the frames on the screen at the middles of `count` equal
# stretches of time.
def ours(path, count):
    for i, (_, picture) in enumerate(data.sample_frames(path, count, "uniform")):
        if i == 0:
            rows = np.empty((count, *picture.shape[1:], 3), np.uint8)
        rows[i] = picture.permute(1, 2, 0).numpy()
    return rows


def with_decord(path, count):
    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    return reader.get_batch([(2 * i + 1) * len(reader) // (2 * count) for i in range(count)]).asnumpy()


WHO = {"ours": ours} | ({"decord": with_decord} if importlib.util.find_spec("decord") else {})
WEBVID = Clip(596, 336, 18, 250, 0.7)   # as one of WebVid's
LONG_GOP, SHORT_GOP = Clip(1920, 1080, 60, 250, 6), Clip(1920, 1080, 60, 30, 4)
FRAMES = [(LONG_GOP, 8), (SHORT_GOP, 8), (SHORT_GOP, 100), (dataclasses.replace(LONG_GOP, copies=10), 8),
          (Clip(854, 480, 10, 250, 1.5), 8), (WEBVID, 8)]
SAME = 2.0   # grey levels of mean difference up to which two pictures are one frame, converted differently


# -------------------------------------------------------------------------------- measuring
def thinned(function, *arguments):
    return function(*arguments)[:, 8::16, 8::16].astype(np.int16)   # enough to tell frames apart


def frames(cfg, cases=FRAMES):
    """Ours against decord, with the ratio of ours to it."""
    heading(cfg)
    rows = []
    for clip, count in cases:
        path, costs, shown = make(cfg.data, clip), {name: [] for name in WHO}, {}
        for run in range(cfg.runs + 1):
            cli.say(f"{clip.title}, {count} frames: round {run} of {cfg.runs}")
            for name, function in WHO.items():
                shown[name], *cost = call(thinned, function, path, count)
                costs[name] += [cost] * (run > 0)
        for name in WHO:
            seconds, memory = medians(costs[name])
            apart = np.abs(shown[name] - shown["ours"]).mean((1, 2, 3)).max()
            alike = "yes" if apart <= SAME else "other frames than ours!"
            ratio = medians(costs["ours"])[0] / seconds
            rows.append([clip.title, str(count), name, seconds, memory, alike, ratio])
    cli.table(["video", "T", "who", "CPU s without imports", "MB without imports", "our frames",
               "CPU: ours / it"], rows)


def feeding(annotations, workers):
    """-> clips/s that come from the loader of pretrain.py, with so many processes of its own."""
    dataset = data.CaptionDataset(annotations, "", 8, 224, load_clip(os.path.join(TINY, "clip"))[1])
    order = [[(0, 4 * step + i) for i in range(4)] for step in range(10 * workers)]
    batches = iter(DataLoader(dataset, batch_sampler=order, num_workers=workers,
                              collate_fn=data.collate_skip))
    for _ in range(2 * workers):   # those that the processes have in hand when they start
        next(batches)
    began = time.perf_counter()
    return sum(len(batch["index"]) for batch in batches) / (time.perf_counter() - began)


def loader(cfg, clip=WEBVID, counts=(1, 2, 4)):
    """Clips a second by the number of decoding processes."""
    heading(cfg)
    annotations = os.path.join(cfg.data, "loader.jsonl")
    cli.write_rows(annotations, [{"video": make(cfg.data, clip), "caption": clip.title}] * 40 * max(counts))
    cli.table(["processes", "clips/s"], [
        [str(workers), statistics.median(call(feeding, annotations, workers)[0] for _ in range(cfg.runs))]
        for workers in counts])
