"""Video files -> clip tensors: frames by time, the pixels that CLIP sees, data sets of captions, pairs and conversations.

    python data.py video.mp4    # what it is, and a picture of its frames with their times   -> sheet.png

A clip is always (T, 3, H, W) and a batch (B, T, 3, H, W): uint8 RGB while it is pictures, float once it is normalised for
CLIP. Nothing guesses T from a shape. Time is counted in seconds from the moment at which the first frame is shown.

A video file comes from anywhere, so it is never trusted. It is opened here and handed to the demuxer as a stream of bytes
without a name; only real video containers are accepted, and what they say about other files is not followed. Whatever a
file holds, the only exception that it causes is VideoError.
"""
import bisect
import collections
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import re
import stat
import struct
import time
import warnings
import zlib

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.stream import Discard
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import Dataset, default_collate

from common import UserError, run, write_atomic

# libavformat's names. Not among them: playlists and scripts that name other files (hls, concat, dash, sdp), text, pictures.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,gif,ogg,asf"
PICTURES = ["PNG", "JPEG", "WEBP", "BMP", "TIFF"]   # what Pillow may open here: no format that runs another program
MAX_PIXELS = 1 << 25                                # of one frame: 8K is just below; a hostile header can claim far more
MAX_GIF = 1 << 28                                   # bytes: libav reads all up to the end of a frame into memory, and looks long for it
MAX_TABLE = 1 << 26                                 # bytes of one table of an MP4: sizes of 16 million frames
LIMITS = {"max_pixels": str(MAX_PIXELS)}            # the same, for decoders
TIME_LIMIT = 30                                     # seconds without a new frame or packet, then a file is given up
REORDER = 33                                        # packets: a frame is never shown later than that after its place in the file
COLOUR_SPACES = {1, 4, 5, 6, 7, 9}                  # of ITU-T H.273's matrix coefficients, those that libswscale converts
THUMBNAIL = 240                                     # pixels, the width of a frame on a contact sheet
TOLERANCE = 1e-6                                    # seconds: i / fps in floats still finds frame i
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)   # CLIP's statistics of RGB in 0..1
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


class VideoError(UserError):
    """A file that cannot be used as a video: VideoError(path, reason)."""
    def __init__(self, path, reason=None):   # one argument: the finished message, when a worker process hands the error on
        super().__init__(path if reason is None else f"{path}: {reason}")


class DamagedVideo(UserWarning):
    """Frames that a file should hold cannot be had; the ones before them can.

    Where a cut falls is seen as far as a file says how long its picture track is. MPEG-TS does not, nor does Matroska with
    more than one track."""


@dataclasses.dataclass
class Probe:
    """What a video file is."""
    duration: float   # seconds, from the first frame shown to the end of the last one
    fps: float        # frames a second on average, as the container states it; 0 where it does not
    width: int        # pixels, as shown: after the rotation
    height: int
    rotation: int     # degrees clockwise from the stored to the shown picture: 0, 90, 180 or 270
    codec: str


# ---------------------------------------------------------------------------------------------------- frames by time
def probe(path):
    """-> Probe. Decodes one frame. Raises VideoError."""
    with open_video(path) as video:
        height, width = video.shown_size()
        duration = float((video.end() - video.start) * video.time_base)
        return Probe(duration, float(video.stream.average_rate or 0), width, height, -video.first.rotation % 360,
                     video.stream.codec_context.codec.canonical_name)


def frames_at(path, times, size=None, keep=None):
    """The pictures that a viewer sees at `times` (seconds; any order, repeats welcome) -> (frames, used).

    frames: (T, 3, H, W) uint8 RGB, upright, with square pixels; size: their short side, scaled as CLIP scales pictures
    (resize_bicubic), or None for the file's own. keep: a function of one such picture, (3, H, W), that is called as soon as
    the picture is decoded; `frames` is then the list of what it returned, and no more than one picture is ever in memory.
    used: (T,) floats, the time at which each of these frames really appears.

    A frame stays until the next one: at t one sees the last frame that began at or before t; before the first one the first,
    after the end the last readable one. Frames are taken as progressive, and light as it is coded: HDR is not tone-mapped.
    Raises VideoError; warns of DamagedVideo where frames that should be there are not."""
    if not all(map(math.isfinite, times)):
        raise UserError(f"{path}: times must be finite numbers of seconds, not {list(times)}")
    with open_video(path) as video:
        return video.show([video.tick(t) for t in times], size, keep)


def sample_frames(path, num_frames, mode, seed=None, window=None, size=None, keep=None):
    """`num_frames` frames spread over a video by the rule `mode` -> (frames, used) as from frames_at, which says the rest.

    "uniform": the middles of equal stretches of time, (i + 0.5) / T * duration; needs no frame count (chat).
    "seq", "test", "train", "linspace": frame numbers by the rules below; the frames are counted first, without decoding any.
    seed: whatever numpy.random.default_rng takes, for "train". window: (start, end) in seconds, to look at that part alone."""
    if mode != "uniform" and mode not in INDEX_RULES:
        raise UserError(f"sampling mode {mode!r}: choose from uniform, {', '.join(INDEX_RULES)}")
    if num_frames < 1:
        raise UserError(f"{num_frames} frames of a video: at least 1 is needed")
    start, end = (0, math.inf) if window is None else window
    if not 0 <= start < end:
        raise UserError(f"{path}: a window from {start} to {end} s; it must start at 0 or later and end after that")
    with open_video(path) as video:
        if mode == "uniform":
            duration = float((video.end() - video.start) * video.time_base)
            start, end = min(start, duration), min(end, duration)
            times = [start + (i + 0.5) / num_frames * (end - start) for i in range(num_frames)]
            return video.show(list(map(video.tick, times)), size, keep)
        ticks = video.all_ticks()
        first, last = (bisect.bisect_left(ticks, t - TOLERANCE, key=video.seconds) for t in (start, end))
        ticks = ticks[first:last] or [ticks[max(first - 1, 0)]]   # a window between two frames shows the first of them
        chosen = INDEX_RULES[mode](len(ticks), num_frames, np.random.default_rng(seed))
        return video.show([ticks[i] for i in chosen], size, keep)


def get_seq_frames(n, num_frames, rng=None):
    """Video-ChatGPT's rule of that name: middles of num_frames stretches of n frames; all n where there are fewer."""
    m = min(n, num_frames)
    bounds = [round((n - 1) / m * i) for i in range(m + 1)]   # round half to even, here and below, as numpy does
    return [(a + b) // 2 for a, b in itertools.pairwise(bounds)]


def uniform_sample_test(n, num_frames, rng=None):
    """mmaction2's UniformSample at test time. It differs from get_seq_frames by one frame for almost half of all (n, T)."""
    stretch = (n - 1) / num_frames
    return [round(stretch * i) + int(stretch / 2) for i in range(num_frames)]


def uniform_sample_train(n, num_frames, rng):
    """mmaction2's UniformSample in training: one frame at random from each stretch, both ends included."""
    bounds = [round((n - 1) / num_frames * i) for i in range(num_frames + 1)]
    return [int(rng.integers(a, b, endpoint=True)) for a, b in itertools.pairwise(bounds)]


def truncated_linspace(n, num_frames, rng=None):
    """VTimeLLM's rule: from the first frame to the last, evenly, cut down to whole numbers."""
    return np.linspace(0, n - 1, num_frames).astype(int).tolist()


INDEX_RULES = {"seq": get_seq_frames, "test": uniform_sample_test, "train": uniform_sample_train, "linspace": truncated_linspace}


# ---------------------------------------------------------------------------------------------------- one open file
@contextlib.contextmanager
def open_video(path):
    """`with open_video(path) as video`: a Video; what libav has to complain about inside becomes VideoError."""
    with open_regular(path) as file:
        check_tables(file)
        video = Video(path, file)
        try:
            video.read_first_frame()
            yield video
        except av.error.FFmpegError as e:
            raise VideoError(path, f"cannot be read as a video ({e.strerror}); is it cut off or damaged?") from e
        except OverflowError as e:
            raise VideoError(path, "cannot be read as a video: its times do not fit into 64 bits") from e
        finally:
            video.close()
    if video.damage:
        warnings.warn(DamagedVideo(f"{path}: {video.damage}"))


def open_regular(path):
    """A file of bytes, open for reading. Folders, pipes, devices and empty files are refused; none of them can block."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise VideoError(path, e.strerror) from e
    except ValueError as e:   # a NUL in the name
        raise VideoError(repr(path), str(e)) from e
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        os.close(fd)
        raise VideoError(path, "the file is empty" if stat.S_ISREG(status.st_mode) else "not a regular file")
    return ByteSource(fd, path)


class ByteSource(io.FileIO):
    """A file for libav. Its .name is a number, so that the path cannot influence what the file is taken for.

    A hostile file makes libav seek to anywhere, or read the same bytes in a circle. Out of range is an answer here, not an
    exception; and whoever gets no further for TIME_LIMIT seconds is stopped."""
    def __init__(self, fd, path):
        super().__init__(fd)
        self.path = path
        self.start_over()

    def start_over(self):
        """From here on all bytes are new again."""
        self.furthest, self.advanced = 0, False
        self.progress()

    def progress(self):
        """Something was achieved."""
        self.deadline = time.monotonic() + TIME_LIMIT

    def packet(self):
        """A packet was read: that is progress if it came with bytes never read before, else libav may be going in a circle."""
        self.check()
        if self.advanced:
            self.advanced = False
            self.progress()

    def check(self):
        if time.monotonic() > self.deadline:
            raise VideoError(self.path, f"given up: nothing new in it in {TIME_LIMIT} s")

    def read(self, size=-1):
        self.check()
        found = super().read(size)
        self.advanced |= self.tell() > self.furthest
        self.furthest = max(self.furthest, self.tell())
        return found

    def at(self, place, size):
        """-> up to `size` bytes from a place on; where libav reads stays as it is."""
        self.check()
        return os.pread(self.fileno(), size, place)

    def seek(self, offset, whence=os.SEEK_SET):
        try:
            return super().seek(offset, whence)
        except OSError:
            return -1


def is_picture(file):
    """Do the first bytes of an open file say that it is a still picture?"""
    file.seek(0)
    try:
        Image.open(file, formats=PICTURES)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


class Video:
    """The picture track of an open file. Times in here are ticks of its time base, as the file counts them.

    Frames lean on others, from a keyframe on, and a file keeps them in the order of decoding. So a picture costs what it
    takes to decode its way there, and everything below is about taking the shortest: look first, at packets alone, which
    frame is on the screen and where the keyframe before it is; then decode from there, without the frames that nothing leans
    on, and stop. What comes out is checked by its time stamp. Where that fails (damage, or a container that is vague about
    time), `walk` decodes everything in order."""
    def __init__(self, path, file):
        self.path, self.file, self.container, self.stream, self.context = path, file, None, None, None
        self.reformatter = VideoReformatter()   # one for all frames: making it costs more than using it
        self.trouble, self.damage, self.latest = "it is cut off or damaged", "", -math.inf
        self.unproven = False   # has no keyframe come out of the decoder since a jump?

    def read_first_frame(self):
        """It starts the clock and tells the size and which way is up."""
        self.rewind()
        head = list(itertools.islice(self.packets(), REORDER))
        start = min((self.when(p) for p in head if not p.is_discard), default=None)
        # An MP4 without a list of keyframes says that all are. The first few frames show whether that is true.
        doubtful = head[:4] if all(p.is_keyframe for p in head) and not self.context.codec.intra_only else []
        frames = list(self.decode(head, {start, *map(self.when, doubtful)})) if self.timed else []
        self.keyed = not doubtful or all(frame.key_frame for frame in frames)
        found = (frame for frame in frames if frame.pts == start)
        self.first = next(itertools.chain(found, (frame for _, frame in self.walk([-math.inf]))), None)
        if self.first is None:
            large = "" if self.context.width else f" (or a frame has more than {MAX_PIXELS} pixels)"
            raise VideoError(self.path, f"no frame can be decoded: {self.trouble}{large}")
        self.start = self.first.pts
        # Display matrix (ISO 14496-12, 8.5.2.3, as libav stores it): a pixel at (x, y) is shown at (a x + c y, b x + d y).
        matrix = self.first.side_data.get("DISPLAYMATRIX")
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist() if matrix else (1, 0, 0, 0, 1)
        self.transposed = abs(b) + abs(c) > abs(a) + abs(d)
        self.flipped = [axis for axis, sign in enumerate((b, c) if self.transposed else (d, a)) if sign < 0]

    def rewind(self):
        """(Re)opens the container at its beginning: the one way back that every format knows."""
        self.close()
        self.file.seek(0)
        self.file.start_over()
        try:
            self.container = av.open(self.file, metadata_errors="replace", container_options={
                "format_whitelist": CONTAINERS, "protocol_whitelist": "none"}, options=LIMITS)
        except av.error.FFmpegError as e:
            if is_picture(self.file):
                raise VideoError(self.path, "a picture, not a video") from e
            raise VideoError(self.path, f"not a video, or cut off or damaged; known containers: {CONTAINERS}") from e
        tracks = [s for s in self.container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not tracks:
            raise VideoError(self.path, "has no video track, only sound or a cover picture")
        self.stream = tracks[0]
        self.time_base, self.context = self.stream.time_base, self.stream.codec_context
        if self.context is None or not self.time_base:
            raise VideoError(self.path, "no decoder for its video track")
        # AVI counts packets, it does not say when they are shown: with B-frames, libav's guess at that is wrong. In MPEG program
        # streams, and for H.264 in ASF, packets lack times of showing, and after a seek libav guesses them wrongly.
        self.untimed = self.container.format.name == "avi" and self.context.has_b_frames
        vague = self.container.format.name == "mpeg" or self.container.format.name == "asf" and self.context.name == "h264"
        self.timed = not self.untimed and not vague
        self.context.options = LIMITS
        if self.container.format.name == "gif" and os.fstat(self.file.fileno()).st_size > MAX_GIF:
            raise VideoError(self.path, f"a GIF of more than {MAX_GIF >> 20} MB")
        if self.context.width * self.context.height > MAX_PIXELS:
            raise VideoError(self.path, f"frames of {self.context.width} x {self.context.height} are too large")
        for other in self.container.streams:
            if other is not self.stream:
                other.discard = Discard.all   # sound is not even read
        # One thread: a loader's workers are its parallelism; elsewhere a second one took a third more CPU time and saved little, since
        # every jump to another keyframe begins with threads that have nothing to do.
        self.context.thread_count = 1

    def close(self):
        """Ends the decoder and lets go of its memory now; the garbage collector may come late."""
        if self.container is not None:
            self.container.close()
        self.container = self.stream = self.context = None

    def tick(self, seconds):
        """The tick at `seconds` after the first frame; a century at most, so that it fits into 64 bits."""
        return self.start + math.floor((min(max(seconds, 0), 3e9) + TOLERANCE) / self.time_base)

    def seconds(self, tick):
        return float((tick - self.start) * self.time_base)

    def when(self, packet):
        """Tick at which a packet's frame is shown; where only decoding times are known, these stand in, in file order."""
        return packet.dts if self.untimed or packet.pts is None else packet.pts

    def packets(self):
        """Whole packets of the track from here on, in file order. Damage ends them: what came before it is good.

        An empty packet means "repeat the frame" in AVI, but "the end" to a decoder, so none is passed on."""
        self.cut = False   # is damage the last that was read?
        # closing: PyAV leaks a packet otherwise. IndexError: its way to end where tracks turned up midway.
        with contextlib.closing(self.container.demux(self.stream)) as demuxed, contextlib.suppress(IndexError):
            try:
                for packet in demuxed:
                    self.file.packet()
                    self.cut = packet.is_corrupt
                    if packet.size and self.when(packet) is not None and not packet.is_corrupt:
                        yield packet
            except av.error.FFmpegError:
                self.cut = True

    def go(self, jump):
        """To a keyframe (see keyframe_before), or to the beginning."""
        self.file.start_over()
        if jump:
            self.container.seek(jump[0], stream=self.stream)
        else:
            self.rewind()
        self.context.skip_frame, self.latest = "DEFAULT", -math.inf
        self.unproven = jump is not None and self.context.name != "h264"   # that decoder waits by itself until pictures are whole

    def feed(self, packet):
        """A packet into the decoder -> the frames that come out. None: all that it still holds, to sort and to work on."""
        try:
            decoded = self.context.decode(packet)
        except av.error.FFmpegError as e:   # one damaged frame: the one before it stays on the screen
            self.trouble = e.strerror
            return []
        if self.unproven:   # what comes before a keyframe leans on frames never seen; the container may be wrong about where one is
            decoded = list(itertools.dropwhile(lambda frame: not frame.key_frame, decoded))
            self.unproven = not decoded
        for frame in decoded:
            if frame.pts is not None and frame.pts > self.latest:
                self.latest = frame.pts
                self.file.progress()
        return decoded

    def decode(self, packets, wanted):
        """Packets from a keyframe on -> frames, those at the ticks `wanted` among them, at the least cost: what no other frame
        leans on is left out by the decoder unless it is wanted, and after the last wanted packet it is told to finish."""
        left = set(wanted)
        for packet in packets:
            self.context.skip_frame = "DEFAULT" if self.when(packet) in wanted else "NONREF"
            left.discard(self.when(packet))
            yield from self.feed(packet)
            if not left:
                break
        yield from self.feed(None)

    def walk(self, ticks, jump=None):
        """Everything in order, from a keyframe or from the beginning -> (tick, frame on the screen) for sorted ticks."""
        self.go(jump)
        ticks, file_order, held = collections.deque(ticks), collections.deque(), None
        for packet in itertools.chain(self.packets(), [None]):
            if packet is not None:
                file_order.append(self.when(packet))
            for frame in self.feed(packet):
                if self.untimed:   # the n-th frame shown takes the n-th time
                    frame.pts = file_order.popleft() if file_order else None
                if frame.pts is None or frame.pts < (held.pts if held else jump[1] if jump else -math.inf):
                    continue   # before the keyframe: it may lean on frames that were never decoded; before another: damage
                while ticks and held is not None and frame.pts > ticks[0]:
                    yield ticks.popleft(), held
                if not ticks:
                    return
                held = frame
        yield from ((tick, held) for tick in ticks if held is not None)

    def keyframe_before(self, tick):
        """Where decoding can start to reach `tick` -> (place to seek to, tick of the keyframe there); None: the beginning, also
        where the keyframes are none.

        Seeking may land late (its times are those of decoding, not of showing) or on no keyframe at all (MPEG-TS), so the
        packet found is looked at, and the search steps further back until it is right."""
        back, second = 0, math.ceil(1 / self.time_base)
        while self.timed and self.keyed:
            place = max(tick - back, self.start)
            self.file.start_over()
            try:
                self.container.seek(place, stream=self.stream)
            except av.error.FFmpegError:   # a container without any way to seek
                return None
            key = next((self.when(p) for p in self.packets() if p.is_keyframe), None)
            if key is not None and key <= tick:
                return place, key
            if place == self.start:
                return None
            back = max(second, 2 * back)

    def plan(self, wanted):
        """Sorted ticks -> [(keyframe to start from, {tick of a frame: the ticks at which it is on the screen})], from packets alone."""
        starts = [(self.keyframe_before(tick), tick) for tick in wanted]   # all first: looking moves the reader
        groups = []
        for key, group in itertools.groupby(starts, key=lambda start: start[0] and start[0][1]):
            group = list(group)
            jump, ticks = group[0][0], collections.deque(tick for _, tick in group)
            self.go(jump)
            seen, shown = [], collections.defaultdict(list)   # sorted ticks of packets; the result
            for packet in itertools.chain(self.packets(), [None]):   # None: the end
                if packet is None and seen and ticks[-1] > seen[-1]:
                    self.compare_end(seen[-1])
                if packet is not None and not packet.is_discard and self.when(packet) >= (key or self.start):
                    bisect.insort(seen, self.when(packet))
                while ticks and (packet is None or len(seen) - bisect.bisect(seen, ticks[0]) >= REORDER):
                    tick = ticks.popleft()
                    shown[seen[max(bisect.bisect(seen, tick) - 1, 0)] if seen else None].append(tick)
                if not ticks:
                    break
            groups.append((jump, shown))
        return groups

    def show(self, ticks, size=None, keep=None):
        """The frames on the screen at `ticks` -> (frames, seconds): see frames_at."""
        height, width = self.shown_size(size)
        out = [None] * len(ticks) if keep else torch.empty(len(ticks), 3, height, width, dtype=torch.uint8)
        places = collections.defaultdict(list)   # tick: where in `out` it is wanted
        for i, tick in enumerate(ticks):
            places[max(tick, self.start)].append(i)
        used = [0.0] * len(ticks)

        def put(frame, wanted):
            picture = self.picture(frame, height, width)
            picture = keep(picture) if keep else picture
            for i in (i for tick in wanted for i in places.pop(tick)):
                out[i], used[i] = picture, self.seconds(frame.pts)
        expected = {}   # wanted tick: tick of the frame on the screen, from the packets
        for jump, shown in self.plan(sorted(places)) if self.timed else ():
            expected.update((tick, at) for at, ticks in shown.items() for tick in ticks)
            self.go(jump)
            for frame in self.decode(self.packets(), shown):
                if frame.pts in shown:
                    put(frame, shown.pop(frame.pts))
        # What is still missing has no clock, or needs more than the keyframe before it, or was damaged. Decoding everything from
        # further and further back finds what was shown.
        back = 0
        while places:
            jump = self.keyframe_before(min(places) - back)
            for tick, frame in self.walk(sorted(places), jump):
                if frame.pts <= tick:
                    if expected.get(tick, frame.pts) != frame.pts:
                        self.damage = self.damage or f"damaged at {self.seconds(tick):.2f} s; the frame before the damage is shown"
                    put(frame, [tick])
            if jump is None and places:
                self.damage = self.damage or "damaged; the first frame stands for others"
                put(self.first, list(places))
            back = max(math.ceil(10 / self.time_base), 2 * back)
        return out, used

    def shown_size(self, size=None):
        """-> height, width in pixels of what is shown: square pixels, upright, with a short side of `size` if that is given."""
        width, height, aspect = self.first.width, self.first.height, float(self.stream.sample_aspect_ratio or 1)
        if 1 / 8 <= aspect <= 8 and width * aspect * height <= MAX_PIXELS:   # beyond that it is damage
            width = max(1, round(width * aspect))
        height, width = (width, height) if self.transposed else (height, width)
        short = min(height, width)
        return (height, width) if size is None else (max(1, size * height // short), max(1, size * width // short))

    def picture(self, frame, height, width):
        """A decoded frame -> (3, height, width) uint8 RGB, as the display matrix wants it shown."""
        known = frame.format.is_rgb or frame.colorspace in COLOUR_SPACES
        guess = None if known else "ITU709" if frame.width >= 1280 or frame.height > 576 else "ITU601"   # as players do
        rgb = self.reformatter.reformat(frame, self.first.width, self.first.height, "rgb24", src_colorspace=guess, threads=1)
        picture = torch.from_numpy(rgb.to_ndarray()).permute(2, 0, 1)   # (3, H, W)
        picture = (picture.transpose(1, 2) if self.transposed else picture).flip([axis + 1 for axis in self.flipped])
        return picture if picture.shape[1:] == (height, width) else resize_bicubic(picture[None], height, width)[0]

    def claimed_end(self):
        """Tick at which the track ends, or else the longest track, as the file has it: a claim. Of a track the length counts
        from its first packet, of a whole file from zero."""
        if self.stream.duration:
            end = self.stream.duration + min(self.start, self.start if self.stream.start_time is None else self.stream.start_time)
        else:
            end = int((self.container.duration or 0) / av.time_base / self.time_base)
        return max(self.start, min(end, self.tick(math.inf)))

    def compare_end(self, end):
        """Notes if the track ends at the tick `end` although it should go on."""
        slack = (0.25 + 2 / (self.stream.average_rate or 25)) / self.time_base
        certain = self.stream.duration or len(self.container.streams) == 1   # else another track may be the longer one
        if self.cut or certain and self.claimed_end() - end > slack:
            self.damage = f"cut off or damaged after {self.seconds(end):.2f} s; nothing later can be shown"

    def end(self):
        """Tick at which the last frame stops being shown, from the last packets; none is decoded."""
        self.go(self.keyframe_before(self.claimed_end()))
        last = max((p for p in self.packets() if not p.is_discard), key=self.when, default=None)
        if last is None:
            raise VideoError(self.path, "no readable frame in it")
        end = self.when(last) + (last.duration or round(1 / ((self.stream.average_rate or 25) * self.time_base)))
        self.compare_end(end)
        return end

    def all_ticks(self):
        """When each frame appears, sorted, by reading all packets and decoding none."""
        self.rewind()
        ticks = {self.when(p) for p in self.packets() if not p.is_discard and self.when(p) >= self.start}
        self.compare_end(max(ticks, default=self.start))
        return sorted(ticks) or [self.start]


# ---------------------------------------------------------------------------------------------------- tables of an MP4
# ISO 14496-12: boxes in boxes, which begin with their size and name. libav takes a table wherever it finds one; so these are the boxes
# that it looks into, not only those in which a table belongs.
NESTS = set(b"moov free hoov cmov trak edts mdia minf dinf stbl udta meta ilst tref sinf schi wave mvex moof traf".split())
TABLES = {b"stts": 8, b"ctts": 8, b"stsc": 12, b"stco": 4, b"co64": 8, b"stss": 4, b"stps": 4,   # name: bytes of an entry,
          b"sidx": 12, b"stsz": 4, b"stz2": 1, b"elst": 12, b"trun": 0}                           # unless read_table says otherwise


def check_tables(file):
    """Refuses an MP4 whose tables claim what cannot be, by VideoError; what is no MP4 passes.

    libav makes room for every sample that they claim, before one can ask it how many that is: gigabytes, for a file of 30 kB.
    The rule is that a file has a byte for each entry of libav's index. That holds for empty samples too: their sizes are in a
    table. But no sizes are added up, since a file that was cut has less than it claims, and can be read as far as it goes."""
    size = os.fstat(file.fileno()).st_size
    claimed = claimed_entries(file.path, file.at, size)
    if claimed > size:
        raise VideoError(file.path, f"damaged: {claimed:.0f} samples are claimed to be in its {size} bytes")


def boxes(read, begin, end, depth=0):
    """The boxes between two places of an MP4, outer ones first -> (name, where it begins, where its content does, its end as claimed)."""
    while begin + 8 <= end:
        size, name, large = struct.unpack(">I4sQ", read(begin, 16).ljust(16, b"\0"))
        inside, after = begin + (16 if size == 1 else 8), begin + (large if size == 1 else size or end - begin)
        if inside > min(after, end):
            return
        yield name, begin, inside, after
        if name in NESTS and depth < 12:   # libav goes no deeper
            skipped = read(inside, 64).find(b"hdlr") - 4 if name == b"meta" else 0   # QuickTime's has no version before its boxes
            yield from boxes(read, inside + max(skipped, 0), min(after, end), depth + 1)
        begin = after


def claimed_entries(path, read, size, depth=0):
    """How many entries libav's index of an MP4 of `size` bytes will have, at most. read(place, n): up to n bytes of it;
    depth: in how many boxes of another they lie."""
    tracks, packed = [collections.defaultdict(list)], 0   # of a track: name of a table: what read_table returned, each time
    starts, leads = set(), []                             # of all boxes; of fragments, by an index
    for name, start, begin, end in boxes(read, 0, size, depth):
        starts.add(start)
        track, room = tracks[-1], min(end, size, begin + MAX_TABLE) - begin
        if name == b"trak":
            tracks.append(collections.defaultdict(list))
        elif name == b"hdlr":
            track[name].append(read(begin + 8, 4))
        elif name in (b"stsd", b"iprp", b"iref"):   # libav looks into these too, from places that are hard to tell
            if re.search(b"|".join([b"hdlr", *TABLES]), read(begin, room)):
                raise VideoError(path, f"damaged: a table of samples in a box {name.decode()}")
        elif name == b"cmvd":   # QuickTime may deflate the boxes of a moov
            unpack = zlib.decompressobj()
            with contextlib.suppress(zlib.error):   # libav will refuse it
                moov = unpack.decompress(read(begin, room)[4:], MAX_TABLE)
                packed += claimed_entries(path, lambda place, n: moov[place:place + n], len(moov), depth + 3)
            if unpack.unconsumed_tail:
                raise VideoError(path, f"damaged: its header holds more than {MAX_TABLE >> 20} MB")
        elif name == b"sidx":   # how long fragments are that follow one another, after so many other bytes
            gap, rows = read_table(path, read, name, begin, end)
            leads += [end + gap, *(end + gap + np.cumsum(rows[:-1, 0] % 2 ** 31))]
        elif name in TABLES:
            track[name].append(read_table(path, read, name, begin, end))
    if any(place < size and place not in starts for place in leads):   # libav would look for boxes there, amid the pictures
        raise VideoError(path, "damaged: its index leads to places where nothing begins")
    return packed + sum(map(index_entries, tracks))


def read_table(path, read, name, begin, end):
    """A table -> how many entries it has; of stts, ctts, stsc: the entries, floats (n, 2 or 3); of sidx: an offset, the entries."""
    flags, count, second = struct.unpack(">III", read(begin, 12).ljust(12, b"\0"))
    rows, width = begin + 8, TABLES[name]
    if name in (b"stsz", b"stz2"):   # a size for all samples, or how many bits each has in the table; then the count
        width, count = (count & 255) / 8 if name == b"stz2" else 0 if count else 4, second
    elif name == b"elst":
        width = 20 if flags >> 24 == 1 else 12
    elif name == b"trun":   # what is not in it has a default
        width = 4 * (flags >> 8 & 15).bit_count()
    elif name == b"sidx":
        rows = begin + (32 if flags >> 24 else 24)
        gap, count = struct.unpack(">Q2xH" if flags >> 24 else ">4xI2xH", read(rows - 12, 12).ljust(12, b"\0"))
    if count * width > min(end - begin - 8, MAX_TABLE):
        raise VideoError(path, f"damaged: its table {name.decode()} has no room for the {count} entries that it claims")
    if name == b"elst":
        return (end - begin - 8) // width   # libav does not believe the count
    if name not in (b"stts", b"ctts", b"stsc", b"sidx"):
        return count
    table = read(rows, count * width)
    table = np.frombuffer(table[:len(table) // width * width], ">u4").reshape(-1, width // 4).astype(float)
    return (gap, table) if name == b"sidx" else table


def index_entries(track):
    """How many entries libav's index of a track will have, at most: edits of a film repeat those of the film."""
    times, offsets, chunks = (np.concatenate([np.zeros((0, TABLES[name] // 4)), *track[name]]) for name in (b"stts", b"ctts", b"stsc"))
    samples = max(sum(track[b"stsz"] + track[b"stz2"]), times[:, 0].sum(), offsets[:, 0].sum())
    # QuickTime counts the samples of sound as they will be once decompressed. libav puts 160 or more of a chunk into one entry.
    if b"soun" in track[b"hdlr"] and not {b"vide", b"subp", b"clcp"} & set(track[b"hdlr"]) and times[:, 1].tolist() == [1]:
        spans = np.diff(chunks[:, 0], append=sum(track[b"stco"] + track[b"co64"]) + 1).clip(0)   # chunks, each of as many samples
        samples = (spans * np.ceil(chunks[:, 1] / 160)).sum()
    return samples * max(sum(track[b"elst"]), 1) + sum(track[b"trun"])


# ---------------------------------------------------------------------------------------------------- pixels
def normalise(frames):
    """(..., 3, H, W) in 0..255, uint8 or float -> float with CLIP's mean and spread."""
    return (frames / 255 - MEAN.to(frames.device)) / STD.to(frames.device)


def resize_bicubic(frames, height, width):
    """uint8 (T, 3, H, W) -> uint8 (T, 3, height, width): bicubic with antialiasing, as Pillow does it and CLIP's preprocessing
    with it. Of the values one in two hundred differs by 1, and of noise one in ten thousand by 2: the kernel's weights are coarser.
    Fast where the three values of a pixel lie side by side in memory, as decoders write them."""
    return F.interpolate(frames.contiguous(memory_format=torch.channels_last), (height, width), mode="bicubic", antialias=True)


def resize(frames, height, width):
    """uint8 (T, 3, H, W) -> uint8 (T, 3, height, width): bilinear without antialiasing, rounded: OpenCV's INTER_LINEAR.

    OpenCV computes in fixed point: of its values on noise (measured, 5.0.0), one in eight differs from ours, by 1."""
    return torch.cat([F.interpolate(f[None].float(), (height, width), mode="bilinear", align_corners=False, antialias=False)
                      .round().clamp(0, 255).byte() for f in frames])   # frame by frame: floats take four times the memory


def short_side(frames, short):
    """uint8 (T, 3, H, W) -> the same with min(H, W) = short; the long side is int(x + 0.5), as mmcv rounds."""
    height, width = frames.shape[-2:]
    scale = short / min(height, width)
    return resize(frames, int(height * scale + 0.5), int(width * scale + 0.5))


def train_pixels(frames, size, seed=None, min_area=0.08):
    """uint8 (T, 3, H, W) -> float (T, 3, size, size), normalised: short side to 256/224 of size, then one crop per clip.

    The crop has min_area..1 of the area and an aspect of 3/4..4/3 (log-uniform); after 10 tries that do not fit, the
    largest centred square. seed: whatever numpy.random.default_rng takes."""
    rng = np.random.default_rng(seed)
    frames = short_side(frames, round(size * 256 / 224))
    top, left, height, width = random_crop(*frames.shape[-2:], rng, min_area)
    return normalise(resize(frames[:, :, top:top + height, left:left + width], size, size))


def random_crop(height, width, rng, min_area):
    """-> top, left, height, width of a random part of a picture of height x width; see train_pixels."""
    for _ in range(10):
        area, aspect = height * width * rng.uniform(min_area, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if w <= width and h <= height:
            return int(rng.integers(height - h, endpoint=True)), int(rng.integers(width - w, endpoint=True)), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def eval_pixels(frames, size, short=None):
    """uint8 (T, 3, H, W) -> float (T, 3, size, size), normalised: short side to `short` (default: size), centre crop."""
    short = size if short is None else short
    if short < size:
        raise UserError(f"a short side of {short} pixels is too small for a crop of {size}")
    frames = short_side(frames, short)
    top, left = ((side - size) // 2 for side in frames.shape[-2:])
    return normalise(frames[:, :, top:top + size, left:left + size])


def squash(frames, size):
    """uint8 (T, 3, H, W) -> uint8 (T, 3, size, size) by nearest neighbour, whatever that does to the aspect.

    The released chat does this on floats and rounds; picking neighbours gives the same values on uint8."""
    return F.interpolate(frames, (size, size), mode="nearest")


def chat_pixels(frames, size):
    """uint8 (T, 3, H, W) -> float (T, 3, size, size), normalised: squashed to a square."""
    return normalise(squash(frames, size))


# ---------------------------------------------------------------------------------------------------- annotation files
def read_text(path):
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            return f.read()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected JSON, JSON lines or CSV")


def read_rows(path):
    """JSON lines, or one JSON value -> [(where, row)], `where` for messages. A list is its entries, anything else one row.

    Raises UserError with file and line."""
    text, rows = read_text(path), []
    try:
        whole = json.loads(text)
        rows = [(path, whole)]
        if isinstance(whole, list):
            rows = [(f"{path}, entry {i}", row) for i, row in enumerate(whole, 1)]
    except (ValueError, RecursionError):   # not one JSON value: JSON lines, or damage that the lines will show
        for number, line in enumerate(text.splitlines(), 1):
            try:
                rows += [(f"{path}, line {number}", json.loads(line))] if line.strip() else []
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}, line {number}: not valid JSON ({e})")
    if not rows:
        raise UserError(f"{path}: no rows in it")
    return rows


def field(row, where, name, kind=str):
    """row[name], checked. Raises UserError that names the line."""
    if not isinstance(row, dict) or not isinstance(row.get(name), kind) or not row[name]:
        raise UserError(f"{where}: needs {name!r}, a {kind.__name__} that is not empty")
    return row[name]


def read_webvid(path):
    """WebVid's CSV -> [(video, caption)]. The header names the columns: 2M has the caption second, 10M fifth."""
    lines, rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True), []
    try:
        header = next(lines, [])
        caption = next((name for name in ("caption", "name", "title") if name in header), "caption")
        missing = [name for name in ("videoid", "page_dir", caption) if name not in header]
        if missing:
            raise UserError(f"{path}, line 1: the header lacks {', '.join(missing)}; it has {', '.join(header)[:200]}")
        for line in lines:
            if len(line) != len(header):
                raise UserError(f"{path}, line {lines.line_num}: {len(line)} columns where the header has {len(header)}")
            row, where = dict(zip(header, line)), f"{path}, line {lines.line_num}"
            rows.append((os.path.join(row["page_dir"], field(row, where, "videoid") + ".mp4"), field(row, where, caption)))
    except csv.Error as e:
        raise UserError(f"{path}, line {lines.line_num}: not valid CSV ({e})")
    if not rows:
        raise UserError(f"{path}: no rows in it")
    return rows


def read_counts(path):
    """ActivityNet's num_file: a JSON dict {name: number of frames} -> the same dict. Raises UserError."""
    rows = read_rows(path)
    counts = rows[0][1]
    if len(rows) > 1 or not isinstance(counts, dict) or not all(type(n) is int and n > 0 for n in counts.values()):
        raise UserError(f"{path}: needs one JSON dict of names and whole numbers of frames above 0")
    return counts


def read_classes(path):
    """Names of classes, one a line -> [name]; its place in the list is a class's label. Raises UserError."""
    names = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if "" in names or not names:
        raise UserError(f"{path}, line {names.index('') + 1 if names else 1}: needs the name of a class")
    return names


def read_labels(path, classes, offset):
    """Lines `path label`, parted by white space, the last of it in the line -> [(video, label + offset)], labels from 0 to
    classes - 1. Raises UserError with the line."""
    rows = []
    for number, line in enumerate(read_text(path).rstrip().splitlines(), 1):
        video, label = (line.rsplit(None, 1) + ["", ""])[:2]
        if not label.isdecimal() or not 0 <= int(label) + offset < classes:
            raise UserError(f"{path}, line {number}: needs a path and a label from {-offset} to {classes - 1 - offset}")
        rows.append((video, int(label) + offset))
    if not rows:
        raise UserError(f"{path}: no rows in it")
    return rows


def locate(root, name):
    """The file of a video that annotations name, maybe without its extension or as Video-ChatGPT's features, `<id>.pkl`."""
    path = os.path.join(root, name.removesuffix(".pkl"))
    candidates = (path + extension for extension in ("", ".mp4", ".mkv", ".webm", ".avi"))
    return next(filter(os.path.isfile, candidates), path)


def sample_folder(folder, count, num_frames, mode, keep):
    """A video that is kept as pictures 000001.jpg, 000002.jpg, ...: `num_frames` of its `count` frames by the rule `mode` of
    INDEX_RULES -> list of what keep(picture) returns. For a picture that is missing, the next one. Raises VideoError."""
    pairs = ([os.path.join(folder, f"{i + k:06d}.jpg") for k in (1, 2)] for i in INDEX_RULES[mode](count, num_frames))
    return [keep(read_picture(next(filter(os.path.isfile, pair), pair[0]))) for pair in pairs]


# ---------------------------------------------------------------------------------------------------- data sets
@dataclasses.dataclass
class Skipped:
    """In the place of an item whose video is broken."""
    message: str


class CaptionDataset(Dataset):
    """Videos with captions. Item (epoch, i) -> (video (T, 3, H, W), ids (context_length,), i), or Skipped if it is broken.

    annotations: JSON lines {"video", "caption"}, or WebVid's CSV (a name that ends in .csv). tokenizer(text, context_length)
    -> (1, context_length). The frames and the crop follow from (seed, epoch, i) alone. Raises UserError for bad rows."""
    def __init__(self, annotations, root, num_frames, image_size, tokenizer, context_length=64, seed=0, min_area=0.08):
        if os.fspath(annotations).endswith(".csv"):
            rows = read_webvid(annotations)
        else:
            rows = [(field(row, where, "video"), field(row, where, "caption")) for where, row in read_rows(annotations)]
        self.videos, self.captions = zip(*rows)
        self.root, self.num_frames, self.image_size, self.min_area = root, num_frames, image_size, min_area
        self.tokenizer, self.context_length = tokenizer, context_length
        self.seed = seed

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, key):
        epoch, i = key
        rng = np.random.default_rng((self.seed, epoch, i))
        try:
            frames, _ = sample_frames(locate(self.root, self.videos[i]), self.num_frames, "train", rng)
        except VideoError as e:
            return Skipped(str(e))
        video = train_pixels(frames, self.image_size, rng, self.min_area)
        return video, self.tokenizer(self.captions[i], self.context_length)[0], i


def collate_skip(items):
    """Items of one of these data sets, tuples of tensors that end with an index -> dict(video (B, T, 3, H, W), index (B,), ids
    (B, S) where there are some, skipped: messages of broken videos).

    B is what is left: where nothing is, all are empty and len(batch["index"]) is 0."""
    good = [item for item in items if not isinstance(item, Skipped)]
    skipped = [item.message for item in items if isinstance(item, Skipped)]
    video, *ids, index = default_collate(good) if good else (torch.empty(0), torch.empty(0).long(), torch.empty(0).long())
    return {"video": video, "index": index, "skipped": skipped, **({"ids": ids[0]} if ids else {})}


class EvaluationDataset(Dataset):
    """Videos as the released evaluations see them. Item i -> (video (T, 3, H, W), i).

    short: the short side before the crop, 256 for DiDeMo, LSMDC and ActivityNet. counts: {name without extension: frames}, for
    videos that are folders of pictures. A broken video raises VideoError, or gives Skipped if skip."""
    def __init__(self, videos, root, num_frames, image_size, short=None, mode="test", skip=False, counts={}):
        self.videos, self.root, self.num_frames, self.image_size, self.short = videos, root, num_frames, image_size, short
        self.mode, self.skip, self.counts = mode, skip, counts

    def __len__(self):
        return len(self.videos)

    def folder(self, video):
        """Where the pictures of a video are, and how many; None if it is a file."""
        name = os.path.splitext(video)[0]
        path = os.path.join(self.root, name)
        return (path, self.counts[name]) if name in self.counts and os.path.isdir(path) else None

    def missing(self):
        """Names of the videos that are not there."""
        return [v for v in dict.fromkeys(self.videos) if not self.folder(v) and not os.path.isfile(locate(self.root, v))]

    def __getitem__(self, i):
        def pixels(picture):   # one by one: sixty-four pictures as filmed take hundreds of megabytes
            return eval_pixels(picture[None], self.image_size, self.short)[0]   # (3, size, size)
        try:
            if folder := self.folder(self.videos[i]):
                frames = sample_folder(*folder, self.num_frames, self.mode, pixels)
            else:
                frames, _ = sample_frames(locate(self.root, self.videos[i]), self.num_frames, self.mode, keep=pixels)
        except VideoError as e:
            if self.skip:
                return Skipped(str(e))
            raise
        return torch.stack(frames), i


class RetrievalDataset(EvaluationDataset):
    """Pairs of video and text, for retrieval: the text of videos[i] is captions[i].

    annotations: JSON lines or a JSON list of {"video", "caption"}, or a JSON dict {video: caption or captions}. Each caption
    makes a pair of its own (MSR-VTT), or all captions of a row make one text, joined=True (DiDeMo, ActivityNet)."""
    def __init__(self, annotations, root, num_frames, image_size, short=None, mode="test", joined=False, skip=False, counts={}):
        videos, self.captions = [], []
        rows = read_rows(annotations)
        if len(rows) == 1 and isinstance(rows[0][1], dict) and "video" not in rows[0][1]:
            rows = [(f"{annotations}, {video!r}", {"video": video, "caption": value}) for video, value in rows[0][1].items()]
        for where, row in rows:
            video, value = field(row, where, "video"), row.get("caption")
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t for t in texts):
                raise UserError(f"{where}: needs a caption or a list of captions, none of them empty")
            texts = [" ".join(texts)] if joined else texts
            videos += [video] * len(texts)
            self.captions += texts
        super().__init__(videos, root, num_frames, image_size, short, mode, skip, counts)


class RecognitionDataset(EvaluationDataset):
    """Videos of actions: that of videos[i] is classes[labels[i]]. See read_labels and read_classes; offset: what to add to a label
    of the file to count from 0."""
    def __init__(self, annotations, classes, offset, root, num_frames, image_size, short=None, mode="test", skip=False):
        self.classes = read_classes(classes)
        videos, self.labels = zip(*read_labels(annotations, len(self.classes), offset))
        super().__init__(videos, root, num_frames, image_size, short, mode, skip)


class ConversationDataset(Dataset):
    """Questions and answers about videos or pictures. Item i -> (video (T, 3, H, W), [(question, answer), ...], i).

    annotations: JSON lines or a JSON list of {"video" or "image": path, "conversations": [{"from": "human", "value"},
    {"from": "gpt", "value"}, ...]}, Video-ChatGPT's format. The marker "<video>" (or "<image>") and the line break beside it
    are taken out of the question. A picture is a clip with T = 1. pixels(frames, size): chat_pixels, as chat will show them;
    the released tuning used eval_pixels with short = 256 instead. A broken file raises VideoError, or gives Skipped if skip."""
    def __init__(self, annotations, root, num_frames, image_size, mode="uniform", pixels=chat_pixels, skip=False):
        self.rows, self.conversations = [], []   # as in the file, with whatever else a row says; questions and answers
        for where, row in read_rows(annotations):
            field(row, where, "image" if isinstance(row, dict) and "image" in row else "video")
            self.rows.append(row)
            self.conversations.append(turns(field(row, where, "conversations", list), where))
        self.root, self.num_frames, self.image_size = root, num_frames, image_size
        self.mode, self.pixels, self.skip = mode, pixels, skip

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]

        def pixels(picture):   # one by one, as above
            return self.pixels(picture[None], self.image_size)[0]   # (3, size, size)
        try:
            if "image" in row:
                frames = [pixels(read_picture(os.path.join(self.root, row["image"])))]
            else:
                frames, _ = sample_frames(locate(self.root, row["video"]), self.num_frames, self.mode, keep=pixels)
        except VideoError as e:
            if self.skip:
                return Skipped(str(e))
            raise
        return torch.stack(frames), self.conversations[i], i


def turns(conversation, where):
    """Video-ChatGPT's list of messages -> [(question, answer), ...]. Raises UserError."""
    messages = [(field(message, where, "from"), field(message, where, "value")) for message in conversation]
    if [who for who, _ in messages] != ["human", "gpt"] * (len(messages) // 2):
        raise UserError(f"{where}: messages must go human, gpt, human, gpt, ...")
    texts = [text for _, text in messages]
    return [(q.replace("<video>", "").replace("<image>", "").strip("\n"), a) for q, a in zip(texts[::2], texts[1::2])]


def read_picture(path):
    """A picture file -> (3, H, W) uint8 RGB, upright. Raises VideoError."""
    with open_regular(path) as f:
        try:
            picture = ImageOps.exif_transpose(Image.open(f, formats=PICTURES)).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise VideoError(path, f"not a picture that can be read ({', '.join(PICTURES)}; {type(e).__name__})") from e
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)   # (H, W, 3) -> (3, H, W)


# ---------------------------------------------------------------------------------------------------- to look at
def thumbnail(picture):
    """(3, H, W) uint8 -> the same, at most THUMBNAIL pixels wide."""
    height, width = picture.shape[1:]
    small = max(1, height * THUMBNAIL // width)
    return picture if width <= THUMBNAIL else resize_bicubic(picture[None], small, THUMBNAIL)[0]


def boxed(picture):
    """(3, H, W) uint8 -> (3, 180, 240), black bars around it: pictures of many shapes for one sheet."""
    image = ImageOps.pad(Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()), (THUMBNAIL, THUMBNAIL * 3 // 4))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)   # (180, 240, 3) -> (3, 180, 240)


def contact_sheet(frames, times, path, width=THUMBNAIL, names=None):
    """A PNG of all frames, (T, 3, H, W) uint8, each `width` pixels wide with its time in seconds below, and its name if it has one."""
    height, font = max(1, round(width * frames.shape[2] / frames.shape[3])), ImageFont.load_default(14)
    columns = math.ceil(math.sqrt(len(frames)))
    sheet = Image.new("RGB", (columns * (width + 4), math.ceil(len(frames) / columns) * (height + 24)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (frame, seconds) in enumerate(zip(frames, times)):
        x, y = i % columns * (width + 4) + 2, i // columns * (height + 24) + 2
        label = f"{i}: {seconds:.2f} s" + (f", {names[i]}" if names else "")
        draw.text((x + 2, y + height + 2), label, "black", font)
        draw.rectangle((x + width, y, x + 2 * width, y + height + 22), "white")   # cuts a long name
        sheet.paste(Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).resize((width, height)), (x, y))
    write_atomic(path, lambda f: sheet.save(f, "PNG"))


@dataclasses.dataclass
class Config:
    video: str                  # the file to look at
    num_frames: int = 16        # frames on the sheet
    mode: str = "uniform"       # by which rule they are chosen: uniform, seq, test, train or linspace
    start: float = 0            # seconds into the video at which to begin,
    end: float = math.inf       # and to end
    seed: int = 0               # for the mode train
    out: str = "sheet.png"      # the contact sheet


def main(cfg):
    found = probe(cfg.video)
    print(f"{cfg.video}: {found.codec}, {found.width} x {found.height}, turned by {found.rotation} degrees, "
          f"{found.fps:.2f} frames/s, {found.duration:.2f} s")
    frames, times = sample_frames(cfg.video, cfg.num_frames, cfg.mode, cfg.seed, (cfg.start, cfg.end), keep=thumbnail)
    contact_sheet(torch.stack(frames), times, cfg.out)
    print(f"{cfg.out}: {len(times)} frames, at {', '.join(f'{t:.2f}' for t in times)} s")


if __name__ == "__main__":
    run(main, Config, positional=["video"])
