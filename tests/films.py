"""Clips whose every frame tells its number, and who opens which file. Not a test itself."""
import ctypes
import fractions
import itertools
import os

import av
import numpy as np
import torch

import data

HEIGHT, WIDTH, FPS = 64, 96, 25


def picture(number):
    """(64, 96, 3) uint8: eight blocks, left to right, are the bits of `number`, lowest first; the top left is
    bright."""
    image = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    for bit in range(8):
        image[24:56, 12 * bit:12 * bit + 12] = 220 if number >> bit & 1 else 40
    image[:12, :24] = 220
    return image


def number(frame):
    """The number in a (3, H, W) frame, of any size that picture() was scaled to."""
    height, width = frame.shape[1:]
    # (8 bits, columns)
    blocks = frame[:, int(height * 0.55):int(height * 0.70)].float().mean((0, 1)).reshape(8, -1)
    return sum(int(block[1:-1].mean() > 128) << bit for bit, block in enumerate(blocks))


def numbers(frames):
    return [number(frame) for frame in frames]


def seen(found):
    """What data.frames or data.sample_frames yields -> the numbers in its pictures."""
    return [number(frame) for _, frame in found]


def stacked(found):
    """The same -> (pictures (T, 3, H, W), times)."""
    times, frames = zip(*found)
    return torch.stack(frames), list(times)


def silence(i):
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.float32), format="fltp", layout="mono")
    frame.rate, frame.pts = 48000, 1920 * i
    return frame


def film(path, codec, pictures, options={}, pts=None, time_base=None, container={}, rotate=0, mirror=(),
         pix_fmt="yuv420p", sound=0, rate=FPS, context={}):
    """Pictures (arrays, or frames of pix_fmt) -> a clip: the i-th is shown at pts[i] (default i) of time_base
    (default 1 / rate).

    rotate: degrees counterclockwise; mirror: horizontally, vertically. sound: so many frames' worth of it;
    context: attributes of the encoder."""
    time_base = time_base or fractions.Fraction(1, rate)
    with av.open(str(path), "w", options=container) as out:
        stream = out.add_stream(codec, rate=rate, options={"threads": "1", **options})
        stream.time_base = stream.codec_context.time_base = time_base
        audio = out.add_stream("aac", rate=48000) if sound else None
        for i, (image, heard) in enumerate(itertools.zip_longest(pictures, range(sound))):
            if image is not None:
                frame = image if isinstance(image, av.VideoFrame) else av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(image))
                if i == 0:
                    stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, pix_fmt
                    for name, value in context.items():
                        setattr(stream.codec_context, name, value)
                    if rotate or mirror:
                        stream.set_display_rotation(rotate, *mirror)
                frame.pts, frame.time_base = (i if pts is None else pts[i]), time_base
                out.mux(stream.encode(frame))
            if heard is not None:
                out.mux(audio.encode(silence(i)))
        out.mux(stream.encode())
        if sound:
            out.mux(audio.encode())
    return str(path)


# every way into a file
CALLS = (data.probe, lambda path: list(data.frames(path, [0, 1])),
         lambda path: list(data.sample_frames(path, 4, "uniform")),
         lambda path: list(data.sample_frames(path, 4, "test")))


class Opened:
    """Has anybody opened this file? Asks the kernel (inotify), since libav does not open files through
    Python."""
    def __init__(self, path):
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self.fd, os.fsencode(path), 0x20) >= 0   # IN_OPEN

    def __bool__(self):
        try:
            return len(os.read(self.fd, 4096)) > 0
        except BlockingIOError:
            return False
