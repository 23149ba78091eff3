"""The videos that are read: noisy on purpose, made when they are first wanted."""
import dataclasses
import fractions
import math
import os

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image

from bench.measure import say
from plumbing import cli

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
    cli.make_folder(folder)
    path = os.path.abspath(os.path.join(folder, clip.file))
    if not os.path.exists(path):
        source = make(folder, dataclasses.replace(clip, copies=1)) if clip.copies > 1 else None
        say(f"making {path}")
        cli.write_atomic(path, lambda f: repeat(f, source, clip) if source else encode(f, clip))
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
