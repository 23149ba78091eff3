"""Which containers and codecs give the right frames: the table of docs/containers.md.

    python tests/containers.py

Each film is made here, and each of its pictures carries its number. The time of picture i is i / 25 s. Every
frame is asked for, one by one and all at once.
"""
import os
import sys
import tempfile
import warnings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
from films import FPS, film, number, picture

B_FRAMES = {"g": "10", "bf": "3"}
X265 = {"x265-params": "keyint=12:bframes=3:log-level=none:pools=none"}
VP9 = {"g": "12", "deadline": "realtime", "cpu-used": "8"}
FILMS = [   # file, encoder, options, pixels, boxes of an MP4 to make unreadable
    *((f"H.264, B-frames in {name}", f"a.{end}", "libx264", B_FRAMES)
      for end, name in (("mp4", "MP4"), ("mov", "MOV"), ("mkv", "Matroska"), ("ts", "MPEG-TS"), ("flv", "FLV"),
                        ("avi", "AVI"), ("asf", "ASF"))),
    ("H.264 in ASF", "a.asf", "libx264", {"g": "10", "bf": "0"}),
    ("H.264, B-frames in MP4 without `ctts`", "a.mp4", "libx264", B_FRAMES, b"ctts", b"edts"),
    ("H.264 in MP4 without `stss`", "a.mp4", "libx264", B_FRAMES, b"stss"),
    *((f"HEVC in {name}", f"a.{end}", "libx265", X265)
      for end, name in (("mp4", "MP4"), ("mkv", "Matroska"), ("ts", "MPEG-TS"))),
    ("AV1 in MP4", "a.mp4", "libsvtav1", {"g": "16", "preset": "10"}),
    ("AV1 in WebM", "a.webm", "libsvtav1", {"g": "16", "preset": "10"}),
    ("VP9 in WebM", "a.webm", "libvpx-vp9", VP9), ("VP8 in WebM", "a.webm", "libvpx", VP9),
    ("MPEG-4 in AVI", "a.avi", "mpeg4", {"g": "12"}),
    ("MPEG-4, B-frames in AVI", "a.avi", "mpeg4", {"g": "12", "bf": "2"}),
    ("MPEG-2 in MPEG-TS", "a.ts", "mpeg2video", {"g": "12", "bf": "2"}),
    ("MPEG-2 in MPEG-PS, VOB", "a.mpg", "mpeg2video", {"g": "12", "bf": "2"}),
    ("MPEG-1 in MPEG-PS", "b.mpg", "mpeg1video", {"g": "12", "bf": "2"}),
    ("Motion JPEG in AVI", "b.avi", "mjpeg", {}), ("ProRes in MOV", "a.mov", "prores_ks", {}),
    ("FLV1 in FLV", "b.flv", "flv", {}), ("WMV2 in ASF", "a.wmv", "wmv2", {}), ("GIF", "a.gif", "gif", {}),
    ("Theora in Ogg", "a.ogv", "libtheora", {"g": "12"}), ("H.264 in MXF", "a.mxf", "libx264", {"bf": "0"}),
    ("MPEG-4 in NUT", "a.nut", "mpeg4", {})]
PIXELS = {"gif": "rgb8", "mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}


def judge(path, frames=50):
    """-> (what comes of a film of so many pictures, how it is read)."""
    times = [i / FPS for i in range(frames)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = [*data.frames(path, times), *(next(data.frames(path, [t])) for t in times)]
            counted = data.sample_frames(path, frames, "linspace")
            off = [abs(number(frame) - i % frames) for i, (_, frame) in enumerate([*found, *counted])]
            exact = max(off) == 0 and abs(data.probe(path).duration - frames / FPS) < 0.02
        with data.open_video(path) as video:
            how = "from a keyframe" if video.timed else "from the beginning"
        return "exact" if exact else f"up to {max(off)} frames off", how
    except data.VideoError as e:
        return f"refused: {str(e).split(': ', 1)[1].split(';')[0]}", ""


def main():
    print("| film | frames | read |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for title, file, codec, options, *hidden in FILMS:
            path = os.path.join(folder, file)
            try:
                film(path, codec, map(picture, range(50)), options, pix_fmt=PIXELS.get(codec, "yuv420p"))
            except ValueError as e:   # not among PyAV's encoders
                print(f"| {title} | not tried | {e} |")
                continue
            with open(path, "rb") as f:
                content = f.read()
            for name in hidden:
                content = content.replace(name, b"free")
            with open(path, "wb") as f:
                f.write(content)
            print(f"| {title} | {' | '.join(judge(path))} |", flush=True)


if __name__ == "__main__":
    main()
