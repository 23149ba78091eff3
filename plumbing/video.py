"""One video file: which frame is on the screen at a time, and the shortest way to decode it.

A video file comes from anywhere, so it is never trusted. libav gets it as a stream of bytes without a name;
only real video containers are accepted, and what they say about other files is not followed. Whatever a file
holds, the only exception that it causes is VideoError.
"""
import bisect
import collections
import contextlib
import io
import itertools
import math
import os
import re
import time
import warnings

import av
import av.logging
import numpy as np
import torch
import torch.nn.functional as F
from av.stream import Discard
from av.video.reformatter import VideoReformatter

from plumbing import mp4
from plumbing.cli import UserError

# libavformat's names. Not among them: playlists and scripts that name other files, text, pictures.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,gif,ogg,asf"
EXTENSIONS = (".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg",
              ".mpeg", ".vob", ".flv", ".gif", ".ogv", ".wmv", ".asf")
MAX_PIXELS = 1 << 25                       # of one frame: 8K is just below; a header can claim far more
LIMITS = {"max_pixels": str(MAX_PIXELS)}   # the same, for decoders
TIME_LIMIT = 30                            # seconds of work without a new frame or packet: a file is given up
REORDER = 33                               # packets: no frame is shown later after its place in a file
LOOKS = 32                                 # places of each half of an MPEG-TS whose clocks are compared
MAX_GAP = 600                              # seconds; where a clock leaps by more, another recording begins
COLOUR_SPACES = {1, 4, 5, 6, 7, 9}         # matrix coefficients of ITU-T H.273 that libswscale converts
TOLERANCE = 1e-6                           # seconds: i / fps in floats still finds frame i
CUT = "cut off or damaged; what cannot be read is not shown"


class VideoError(UserError):
    """A file that cannot be used as a video: VideoError(path, reason)."""
    def __init__(self, path, reason=None):   # without a reason: the message, as a worker process hands it on
        super().__init__(path if reason is None else f"{path}: {reason}")


class DamagedVideo(UserWarning):
    """Frames that a file should hold cannot be had; the ones before them stand for them."""


# --------------------------------------------------------------------------------------------------- opening
@contextlib.contextmanager
def open_video(path):
    """`with open_video(path) as video`: a Video. What libav complains about inside becomes VideoError."""
    with open_regular(path) as file:
        try:
            mp4.check_tables(file.at, os.fstat(file.fileno()).st_size)
        except ValueError as e:
            raise VideoError(path, f"damaged: {e}") from e
        video = Video(path, file)
        try:
            video.read_first_frame()
            yield video
        except (av.error.FFmpegError, OverflowError) as e:   # OverflowError: times beyond 64 bits
            reason = getattr(e, "strerror", e)
            raise VideoError(path, f"cannot be read as a video ({reason}); is it cut or damaged?") from e
        finally:
            video.close()
    if video.damage:
        warnings.warn(DamagedVideo(f"{path}: {video.damage}"))


def open_regular(path):
    """A file of bytes, open for reading; a folder, a pipe or a device is refused. Raises VideoError."""
    if not os.path.isfile(path):   # a pipe would wait for ever
        address = "://" in str(path)
        raise VideoError(path, f"No such file{'; download it first' if address else ', or no regular one'}")
    try:
        return ByteSource(os.open(path, os.O_RDONLY), path)
    except OSError as e:
        raise VideoError(path, e.strerror) from e


class ByteSource(io.FileIO):
    """A file for libav. Its .name is a number, so that the path cannot influence what the file is taken for.
    A hostile file makes libav seek to anywhere, or read the same bytes in a circle. So out of range is an
    answer here, and no progress for TIME_LIMIT seconds of work is an error."""
    def __init__(self, fd, path):
        super().__init__(fd)
        self.path = path
        self.start_over()

    def start_over(self):
        """From here on all bytes are new again."""
        self.furthest = self.known = 0   # how far libav has read; the same when the latest packet came
        self.progress()

    def progress(self):
        self.deadline = time.thread_time() + TIME_LIMIT   # of work: a process may be stopped for an hour

    def packet(self):
        """A packet was read: progress, if it came with new bytes; else libav may be going in a circle."""
        self.check()
        if self.furthest > self.known:
            self.known = self.furthest
            self.progress()

    def check(self):
        if time.thread_time() > self.deadline:
            raise VideoError(self.path, f"given up: nothing new in it in {TIME_LIMIT} s")

    def read(self, size=-1):
        self.check()
        found = super().read(size)
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


# -------------------------------------------------------------------------------------- finding and decoding
class Video:
    """The picture track of an open file. Times in here are ticks of its time base, as the file counts them.

    Frames lean on others, from a keyframe on, and a file keeps them in the order of decoding. A picture is
    decoded from a keyframe before it, without the frames that nothing leans on: packets say which frame is on
    the screen at a time. Where another one comes out, all are decoded, and from further and further back."""
    def __init__(self, path, file):
        self.path, self.file, self.container = path, file, None
        self.reformatter = VideoReformatter()   # one for all frames: making it costs more than using it
        self.damage = ""                        # that frames are missing, in words
        self.spacing = 0     # ticks from one picture to the next, if each half may have a packet of its own
        self.joined = None   # of several recordings in one file: the jumps to all keyframes

    def read_first_frame(self):
        """It starts the clock and tells the size and which way is up."""
        frames = self.read_head()
        if self.context.name == "h264" and (not frames or frames[0].interlaced_frame):
            times = [frame.pts for frame in self.read_head(thorough=True) if frame.interlaced_frame]
            self.spacing = min((b - a for a, b in itertools.pairwise(times) if a < b), default=0)
            frames = self.read_head()
        if not self.timed or not frames:
            frames = self.decode(self.go(None), [], {}, thorough=True)
        self.first = next(iter(frames), None)
        if self.first is None:
            raise VideoError(self.path, f"no frame can be decoded: damaged, or of over {MAX_PIXELS} pixels")
        self.start, height, width = self.first.pts, self.first.height, self.first.width
        left, right, top, bottom = self.cropping()
        self.visible = slice(top, height - bottom), slice(left, width - right)
        height, width = height - top - bottom, width - left - right
        a, b, c, d = display_matrix(self.first)
        self.transposed = abs(b) + abs(c) > abs(a) + abs(d)
        signs = (b, c) if self.transposed else (d, a)
        self.flipped = [axis for axis, sign in zip((1, 2), signs) if sign < 0]
        aspect = float(self.stream.sample_aspect_ratio or 1)
        if 1 / 8 <= aspect <= 8 and width * aspect * height <= MAX_PIXELS:   # beyond that it is damage
            width = max(1, round(width * aspect))
        self.shown_size = (width, height) if self.transposed else (height, width)   # height first
        if self.container.format.name == "mpegts":
            self.find_recordings()

    def read_head(self, thorough=False):
        """The first packets -> their frames, if `thorough`, else the first one. Sees what can be trusted."""
        self.rewind()
        self.timed, self.untimed, self.guessed = True, False, False
        head = list(itertools.islice(self.packets(), REORDER))
        start = [min(map(self.when, filter(self.appears, head)), default=0)]
        frames = list(self.decode(head, [] if thorough else start, {}, thorough))
        # The decoder puts frames into another order, and nothing says when each is shown: AVI, MP4 from it.
        kind = self.container.format.name
        nothing = kind == "avi" or all(packet.pts in (None, packet.dts) for packet in head)
        self.untimed = self.guessed or self.context.has_b_frames and nothing
        # After a seek, packets of MPEG program streams and of H.264 in ASF lack times; libav guesses wrong.
        self.timed = not self.untimed and kind != "mpeg" and (kind, self.context.name) != ("asf", "h264")
        return [frame for frame in frames if thorough or frame.pts == start[0]]

    def find_recordings(self):
        """Looks at a few places of an MPEG-TS whether its clock begins anew or leaps on the way, as in files
        that were joined. If so, reads all packets for a list of keyframes: seeking by time would get lost."""
        size, clock = os.fstat(self.file.fileno()).st_size, []
        for i in range(-LOOKS, LOOKS):   # closest at both ends: the first or last recording may be short
            self.file.start_over()
            place = int(size * (1 + math.copysign(1 - (1 - abs(i) / LOOKS) ** 4, i)) / 2)
            self.container.seek(place, stream=self.stream, unsupported_byte_offset=True)
            clock += [p.dts for p in itertools.islice(self.packets(), 1) if p.dts is not None]
        if not all(itertools.starmap(self.runs_on, itertools.pairwise(clock))):
            self.joined, self.damage = [], ""
            self.joined = [(self.when(p), p.pos, self.behind) for p in self.go(None) if p.is_keyframe]

    def runs_on(self, before, now):
        """Is it the same clock?"""
        return -0.1 <= (now - before) * self.time_base <= MAX_GAP

    def rewind(self):
        """(Re)opens the container at its beginning: the one way back that every format knows."""
        self.close()
        self.file.seek(0)
        self.file.start_over()
        try:
            self.container = av.open(self.file, metadata_errors="replace", container_options={
                "format_whitelist": CONTAINERS, "protocol_whitelist": "none"}, options=LIMITS)
        except av.error.FFmpegError as e:
            raise VideoError(self.path, f"not a video, or cut off or damaged; known: {CONTAINERS}") from e
        tracks = [s for s in self.container.streams.video if s.codec_context and s.time_base
                  and not s.disposition & s.disposition.attached_pic]   # a cover
        if not tracks:
            raise VideoError(self.path, "no video track that can be decoded; only sound or a cover?")
        best = self.container.streams.best("video")
        self.stream = best if best in tracks else tracks[0]
        self.context, self.time_base = self.stream.codec_context, self.stream.time_base
        if (width := self.context.width) * (height := self.context.height) > MAX_PIXELS:
            raise VideoError(self.path, f"frames of {width} x {height} are too large")
        self.context.options = LIMITS
        for other in self.container.streams:
            if other is not self.stream:
                other.discard = Discard.all   # sound is not even read
        # One thread: a loader's workers are its parallelism. Elsewhere a second one took a third more CPU
        # time and saved little: after every jump to another keyframe it has nothing to do at first.
        self.context.thread_count = 1
        self.context.open()   # now, while it leaves out nothing: for AV1 that is decided here
        self.length = round(1 / ((self.stream.average_rate or 25) * self.time_base))   # a frame's, in ticks
        self.behind = 0          # ticks to add to the clock of a later recording
        self.unproven = False    # has no keyframe come out of the decoder since a jump?

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
        """Tick at which a packet's frame is shown, or where only that is known, decoded. None: it is the
        second half of the frame before."""
        return packet.dts if self.untimed or packet.pts is None else packet.pts

    def appears(self, packet):
        """Does it begin a frame that is shown? An edit list hides some that others lean on."""
        return not packet.is_discard and self.when(packet) is not None

    def packets(self, jumped=False):
        """The packets of the track from here on, after a jump from a keyframe on, in file order, up to damage
        that libav cannot pass; with times, also where a container gives none or its clock begins anew. An
        empty packet means "repeat the frame" in AVI, but "the end" to a decoder, so none is passed on."""
        last, due, clock, half = None, None, None, False   # of the packet before; when the next one is due
        # closing: PyAV leaks a packet otherwise. IndexError: its way to end where tracks turned up midway.
        with contextlib.closing(self.container.demux(self.stream)) as found, contextlib.suppress(IndexError):
            try:
                for packet in found:
                    self.file.packet()
                    if packet.is_corrupt and self.joined is None:   # beside a seam it is whole
                        self.damage = self.damage or CUT
                        continue
                    now = packet.pts if packet.dts is None else packet.dts
                    if not packet.size or now is due is None or jumped and not packet.is_keyframe:
                        continue
                    jumped, length = False, packet.duration or self.length
                    if now is None:
                        packet.pts = packet.dts = due
                    elif self.container.format.name in ("mpegts", "mpeg"):
                        if clock is not None and not self.runs_on(clock, now + self.behind):
                            if not packet.is_keyframe:
                                continue
                            self.behind = clock + length - now   # a recording follows the one before
                        clock = now + self.behind
                        if packet.pts is not None and not self.runs_on(now, packet.pts):
                            packet.pts = None   # libav guessed it from the next recording
                        packet.pts, packet.dts = (t if t is None else t + self.behind
                                                  for t in (packet.pts, packet.dts))
                    gap = math.inf if half or last is None else self.when(packet) - last
                    half, last = 0 <= gap < 0.75 * self.spacing, self.when(packet)
                    due = last + length
                    if half:
                        packet.pts = packet.dts = None
                    elif now is None:
                        self.guessed = True
                    yield packet
            except av.error.FFmpegError:
                self.damage = self.damage or CUT

    def go(self, jump):
        """To a keyframe (see keyframe_before), or to the beginning -> the packets from there on."""
        if jump:
            self.file.start_over()
            self.container.seek(jump[1], stream=self.stream, unsupported_byte_offset=self.joined is not None)
            self.behind = jump[2]
        else:
            self.rewind()
        self.unproven = jump is not None and self.context.name != "h264"   # whose decoder waits by itself
        return self.packets(jumped=jump is not None)

    def choose(self, packets, ticks, due, thorough):
        """Packets in file order, as far as the sorted ticks need them: those that follow tell how long a
        frame is on the screen. due[tick]: will be when the frame that is on the screen then began. Unless
        `thorough`, the decoder leaves out frames that are neither wanted nor leaned on."""
        times, ahead = [], collections.deque()
        reorder = 1 if self.context.codec.intra_only else REORDER
        for packet in itertools.chain(packets, [None]):   # None: the end
            if packet is not None:
                ahead.append(packet)
                if self.appears(packet):
                    bisect.insort(times, self.when(packet))
            while ahead:
                begin, shown = self.when(ahead[0]), []
                if self.appears(ahead[0]):
                    later = bisect.bisect(times, begin)
                    if packet is not None and len(times) - later < reorder:
                        break
                    until = times[later] if later < len(times) else math.inf
                    shown = ticks[bisect.bisect_left(ticks, begin):bisect.bisect_left(ticks, until)]
                if begin is not None:   # else: it goes with the half before
                    if self.timed and ticks and ticks[-1] in due and len(due) == len(set(ticks)):
                        return
                    due.update(dict.fromkeys(shown, begin))
                    self.context.skip_frame = "DEFAULT" if thorough or shown else "NONREF"
                yield ahead.popleft()

    def decode(self, packets, ticks, due, thorough):
        """Packets from a keyframe on -> frames in the order of showing, those on the screen at the sorted
        ticks among them; the rest as for `choose`."""
        latest, order = -math.inf, collections.deque()
        for packet in itertools.chain(self.choose(packets, ticks, due, thorough), [None]):   # None: the end
            if packet is not None and self.when(packet) is not None:
                order.append(self.when(packet))
            try:
                frames, lost = self.context.decode(packet), False
            except av.error.FFmpegError:   # one damaged frame: the one before it stays on the screen
                frames, lost = [], True
            if self.untimed and not frames and latest > -math.inf and (lost or self.context.name == "mpeg4"):
                order.popleft()   # its time goes with it, also where nothing was coded
                self.damage = self.damage or CUT * lost
            if self.unproven:   # frames before a keyframe lean on others; a container may misplace one
                frames = list(itertools.dropwhile(lambda frame: not frame.key_frame, frames))
                self.unproven = not frames
            for frame in frames:
                if self.untimed:   # the n-th frame takes the n-th time
                    frame.pts = order.popleft() if order else None
                elif frame.pts is None and latest > -math.inf:
                    frame.pts = latest + self.length
                if frame.pts is not None:
                    if frame.pts > latest:
                        latest = frame.pts
                        self.file.progress()
                    yield frame

    def play(self, ticks, jump, thorough):
        """Sorted ticks -> (the frame on the screen, when it should have begun) at each, decoded from a jump
        on. No frame: None comes from there so early."""
        # what is shown before the keyframe may lean on frames never decoded
        held, earliest, due = None if jump else self.first, jump[0] if jump else self.start, {}
        frames = self.decode(self.go(jump), ticks, due, thorough)
        coming = next(frames, None)
        for tick in ticks:
            while coming and coming.pts <= tick:
                if coming.pts >= earliest:
                    held, earliest = coming, coming.pts
                coming = next(frames, None)
            yield held, due.get(tick)

    def keyframe_before(self, tick):
        """Where decoding can start to reach `tick` -> jump: (tick of the keyframe, place to seek to, ticks
        that the clock there is behind). None: at the beginning.

        Seeking may land late (its times are those of decoding, not of showing), on no keyframe at all
        (MPEG-TS), or in another part of a film with edits. So the packets found are looked at, and the search
        steps further back until they are right."""
        if self.joined is not None:
            before = bisect.bisect(self.joined, tick, key=lambda jump: jump[0])
            return self.joined[before - 1] if before else None
        back, second = 0, math.ceil(1 / self.time_base)
        while self.timed:
            place = max(tick - back, self.start)
            self.file.start_over()
            try:
                self.container.seek(place, stream=self.stream)
            except av.error.FFmpegError:   # a container without any way to seek
                return None
            key = next(map(self.when, filter(self.appears, self.packets(jumped=True))), None)
            if key is not None and key <= tick:
                return key, place, 0
            if place == self.start:
                return None
            back = max(second, 2 * back)

    def show(self, ticks):
        """Sorted ticks -> the frame on the screen at each."""
        starts = {tick: self.keyframe_before(tick) for tick in ticks}   # all first: looking moves the reader
        for _, group in itertools.groupby(ticks, key=lambda tick: starts[tick] and starts[tick][0]):
            left, thorough, back = collections.deque(group), not self.timed, 0
            jump = starts[left[0]]
            while left:
                for frame, due in self.play(list(left), jump, thorough):
                    if frame is None:
                        back = max(math.ceil(10 / self.time_base), 2 * back)
                        jump = self.keyframe_before(left[0] - back)
                        break
                    if self.timed and frame.pts != due:
                        if not thorough:
                            break
                        at = f"{self.seconds(left[0]):.2f} s"
                        self.damage = self.damage or f"damaged at {at}; the frame before the damage is shown"
                    left.popleft()
                    yield frame
                thorough = True

    def pictures(self, ticks):
        """Sorted ticks -> (seconds, picture (3, H, W) uint8 RGB) at each."""
        shown = None
        for frame in self.show(ticks):
            if frame is not shown:
                shown, picture = frame, self.picture(frame)
            yield self.seconds(frame.pts), picture
            self.file.progress()   # what the caller does meanwhile takes time, too

    def picture(self, frame):
        """A decoded frame -> (3, H, W) uint8 RGB as shown: square pixels, upright."""
        known = frame.format.is_rgb or frame.colorspace in COLOUR_SPACES
        large = frame.width >= 1280 or frame.height > 576
        guess = None if known else "ITU709" if large else "ITU601"      # as players do
        rgb = self.reformatter.reformat(frame, self.first.width, self.first.height, "rgb24",
                                        src_colorspace=guess, threads=1)
        picture = torch.from_numpy(rgb.to_ndarray()).permute(2, 0, 1)   # (3, H, W)
        picture = picture[:, *self.visible]
        picture = (picture.transpose(1, 2) if self.transposed else picture).flip(self.flipped)
        square = picture.shape[1:] == self.shown_size
        return picture if square else resize_bicubic(picture[None], *self.shown_size)[0]

    def end(self):
        """Tick at which the last frame stops being shown, from the last packets; none is decoded."""
        key = self.keyframe_before(self.tick(math.inf))
        # Further back: an MP4 without a list of keyframes says that all are; the last one is not shown last.
        packets = self.go(key and self.keyframe_before(key[0] - REORDER * self.length))
        last = max(filter(self.appears, packets), key=self.when, default=None)
        if last is None:
            raise VideoError(self.path, "no readable frame in it")
        return self.when(last) + (self.spacing or last.duration or self.length)

    def all_ticks(self):
        """When each frame appears, sorted, by reading all packets and decoding none."""
        ticks = set(map(self.when, filter(self.appears, self.go(None))))
        return sorted(tick for tick in ticks if tick >= self.start) or [self.start]

    def cropping(self):
        """-> columns at the left and right, rows at the top and bottom that the container hides (PixelCrop of
        Matroska, clap of MP4). Only libav's description of a file tells them, and only where it may log."""
        level = av.logging.get_level()
        av.logging.set_level(av.logging.INFO)
        described = self.container.dumps_format()
        av.logging.set_level(level)
        # at the beginning of a line, as a title may say the same
        found = re.search(rf"^  Stream #0:{self.stream.index}\b(?:(?!^  Stream #).)*?"
                          r"^      Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)", described, re.DOTALL | re.M)
        left, right, top, bottom = map(int, found.groups() if found else "0000")
        fits = left + right < self.first.width and top + bottom < self.first.height   # else it is damage
        return (left, right, top, bottom) if fits else (0, 0, 0, 0)


def display_matrix(frame):
    """-> a, b, c, d: a pixel at (x, y) is shown at (a x + c y, b x + d y); ISO 14496-12, 8.5.2.3."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:   # PyAV ends at kinds that it has no name for (EXIF), but tells the angle
        return ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[round(frame.rotation / 90) % 4]
    return np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]].tolist() if matrix else (1, 0, 0, 1)


def resize_bicubic(frames, height, width):
    """uint8 (T, 3, H, W) -> uint8 (T, 3, height, width): bicubic with antialiasing, as in Pillow and CLIP's
    preprocessing. Of the values one in two hundred differs by 1, and of noise one in ten thousand by 2: the
    kernel's weights are coarser. Fast where the three values of a pixel lie side by side in memory."""
    frames = frames.contiguous(memory_format=torch.channels_last)
    return F.interpolate(frames, (height, width), mode="bicubic", antialias=True)
