"""The videos that are read: moving and noisy on purpose, made when they are first wanted."""
import dataclasses
import os

import av
from av.video.frame import PictureType
from av.video.reformatter import Colorspace

from plumbing import cli

FPS = 30


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video file."""
    width: int
    height: int
    seconds: int      # of what is encoded
    gop: int          # frames from one keyframe to the next
    mbit: float       # Mbit/s
    copies: int = 1   # so many times the same, one after the other, without encoding it again

    @property
    def title(self):
        seconds = self.seconds * self.copies
        length = f"{seconds} s" if seconds < 60 else f"{seconds / 60:g} min"
        return f"{length} of {self.height}p, keyframe every {self.gop}"


def make(folder, clip):
    """-> the path of a clip, which is made if it is not there yet. The name says all that the clip is."""
    path = os.path.abspath(os.path.join(folder, "_".join(map(str, dataclasses.astuple(clip))) + ".mp4"))
    if not os.path.exists(path):
        cli.make_folder(folder)
        source = make(folder, dataclasses.replace(clip, copies=1)) if clip.copies > 1 else None
        cli.say(f"making {path}")
        cli.write_atomic(path, lambda f: repeat(f, source, clip) if source else encode(f, clip))
    return path


def encode(file, clip):
    """libav's moving test picture under film grain, so that any two frames differ and none is cheap."""
    options = {"preset": "veryfast", "bf": "3", "sc_threshold": "0", "g": str(clip.gop)}
    picture = f"testsrc2=size={clip.width}x{clip.height}:rate={FPS}:duration={clip.seconds}"
    noisy = f"{picture},noise=alls=12:allf=t+u"
    with av.open(noisy, format="lavfi") as source, av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
        stream.bit_rate = int(clip.mbit * 1e6)
        stream.codec_context.colorspace = Colorspace.ITU601   # decord knows no other
        for frame in source.decode(video=0):
            frame = frame.reformat(format="yuv420p")
            frame.pict_type = PictureType.NONE   # the encoder decides
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def repeat(file, source, clip):
    """The packets of `source`, clip.copies times, each time later by its length."""
    with av.open(file, "w", format="mp4") as out:
        stream = None
        for copy in range(clip.copies):
            with av.open(source) as container:
                stream = stream or out.add_stream_from_template(container.streams.video[0])
                for packet in container.demux(video=0):
                    if packet.size:
                        later = round(copy * clip.seconds / packet.time_base)
                        packet.pts, packet.dts, packet.stream = packet.pts + later, packet.dts + later, stream
                        out.mux(packet)
