"""plumbing/video.py: frames are right, whatever a container leaves out, halves, cuts, repeats or joins."""
import itertools
import re
import struct

import av
import pytest
import torch
from av.stream import Disposition
from broadcast import broadcast
from test_video import FPS, at, box, replaced, textured

import data
from films import film, picture, seen
from plumbing import video

pytestmark = pytest.mark.filterwarnings("error::plumbing.video.DamagedVideo")
LUMA = 255 / 219   # from a step of limited range to grey levels
GROUPS = {"g": "10", "bf": "3", "x264-params": "scenecut=0"}


def shows(path, expected, rate=FPS, number=seen, counted=True):
    """Whether a film shows just these numbers, i / rate after its beginning; asked in every way."""
    n = len(expected)
    assert data.probe(path).duration == pytest.approx(n / rate)
    times = [i / rate for i in range(n)]
    assert number(data.frames(path, times)) == expected
    assert [number(data.frames(path, [t]))[0] for t in times[::7]] == expected[::7]
    assert number(data.frames(path, [t + 0.9 / rate for t in times[::3]])) == expected[::3]
    if counted:
        assert number(data.sample_frames(path, n, "linspace")) == expected
    assert number(data.sample_frames(path, n, "uniform")) == expected


# -------------------------------------------------------------------------------------------- times, fields
def broadcasts(found):
    """The numbers of broadcast()'s pictures; -1: the rows are not of one picture."""
    greys = [(frame[0, 0, 0].item(), frame[0, 1, 0].item()) for _, frame in found]
    return [round(even / LUMA / 5) if 1 < (odd - even) / LUMA < 3 else -1 for even, odd in greys]


@pytest.mark.parametrize("kind", ["frames", "fields", "timed fields", "mixed"])
@pytest.mark.parametrize("every", [1, 5])
def test_both_fields_make_one_picture_and_pictures_without_a_time_follow_the_last(tmp_path, kind, every):
    shows(broadcast(tmp_path / "a.ts", kind=kind, every=every), list(range(30)), number=broadcasts)


@pytest.mark.parametrize("file", ["a.mp4", "a.mkv"])
def test_fields_that_became_samples_of_another_container_still_make_one_picture(tmp_path, file):
    source = broadcast(tmp_path / "a.ts", kind="timed fields")
    with av.open(source) as found, av.open(str(tmp_path / file), "w") as out:
        stream = out.add_stream_from_template(found.streams.video[0])
        for packet in found.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    shows(tmp_path / file, list(range(30)), number=broadcasts)


def test_pictures_in_another_order_without_times_of_showing_come_one_after_the_other(tmp_path):
    for codec, options in (("libx264", GROUPS), ("mpeg4", {"g": "12", "bf": "2"}),
                           ("libx265", {"x265-params": "keyint=12:bframes=3:log-level=none:pools=none"})):
        path = film(tmp_path / "a.mp4", codec, map(picture, range(50)), options)
        mp4 = open(path, "rb").read()
        assert b"ctts" in mp4
        open(path, "wb").write(mp4.replace(b"ctts", b"free").replace(b"edts", b"free"))
        shows(path, list(range(50)))


# ----------------------------------------------------------------------------------------------------- edits
def edited(path, edits, options):
    """A film of 75 numbers, 25 a second, shown by a list of edits: (seconds, second of the film, or None for
    nothing; the rate)."""
    film(path, "libx264", map(picture, range(75)), options)
    mp4 = open(path, "rb").read()
    movie, = struct.unpack_from(">I", mp4, at(mp4, b"mvhd") + 12)
    media, = struct.unpack_from(">I", mp4, at(mp4, b"mdhd") + 12)
    delay, = struct.unpack_from(">i", mp4, at(mp4, b"elst") + 12)   # of the first frame, until it is shown
    entries = b"".join(struct.pack(">Iii", round(length * movie), -1 if begin is None else
                                   delay + round(begin * media), rate << 16) for length, begin, rate in edits)
    table = box(b"elst", struct.pack(">II", 0, len(edits)) + entries)
    open(path, "wb").write(replaced(mp4, [b"moov", b"trak", b"edts", b"elst"], table))
    return path


@pytest.mark.parametrize("file, group", [("a.mp4", 25), ("a.mov", 10), ("a.mp4", 250)])
@pytest.mark.parametrize("edits, numbers", [
    ([(1, 0.4, 1), (1, 2, 1)], [*range(10, 35), *range(50, 75)]), ([(1, 1, 1)] * 2, [*range(25, 50)] * 2),
    ([(0.4, 2.2, 1), (1, 0.2, 1), (0.6, 1, 1)], [*range(55, 65), *range(5, 30), *range(25, 40)]),
    ([(0.8, None, 1), (1, 1, 1)], [*range(25, 50)])])
def test_edits_cut_repeat_and_put_in_another_order(tmp_path, file, group, edits, numbers):
    shows(edited(tmp_path / file, edits, {"g": str(group), "bf": "0"}), numbers)


def test_edits_amid_frames_in_another_order_are_one_frame_off_at_most(tmp_path):
    path = edited(tmp_path / "a.mp4", [(0.4, 2.2, 1), (1, 0.2, 1), (0.6, 1, 1)], {"g": "250", "bf": "2"})
    expected = [*range(55, 65), *range(5, 30), *range(25, 40)]
    for times in ([i / FPS for i in range(50)], [0.9], [0.36, 1.5], [1.96]):
        for t, n in zip(times, seen(data.frames(path, times))):
            assert n in expected[max(round(t * FPS) - 1, 0):round(t * FPS) + 2]


# ---------------------------------------------------------------------------------------- joined recordings
def join(path, *parts):
    path.write_bytes(b"".join(open(part, "rb").read() for part in parts))
    return path


@pytest.mark.parametrize("file, codec, options", [
    ("a.ts", "libx264", GROUPS), ("a.ts", "mpeg2video", {"g": "12", "bf": "2"}),
    ("a.mpg", "mpeg2video", {"g": "12", "bf": "2"})])
@pytest.mark.parametrize("begins", [[0, 0], [0, 900_000], [450_000, 0, 810_000]])   # 10 hours; 5, 0, 9
def test_recordings_in_one_file_follow_one_another(tmp_path, file, codec, options, begins):
    parts = [film(tmp_path / f"{i}{file}", codec, map(textured, range(60 * i, 60 * i + 60)), options,
                  pts=range(begin, begin + 60)) for i, begin in enumerate(begins)]
    # of a program stream whose clock leaps, one frame of a recording is counted too early
    counted = file == "a.ts" or not any(begins)
    shows(join(tmp_path / file, *parts), list(range(60 * len(parts))), counted=counted)


@pytest.mark.parametrize("lengths", [(4, 600), (600, 4), (4, 4, 600)])
def test_a_recording_beside_a_hundred_times_as_long_a_one_is_seen_too(tmp_path, lengths):
    ends = list(itertools.accumulate(lengths))
    parts = [film(tmp_path / f"{end}.ts", "libx264", (picture(i % 256) for i in range(end - n, end)), GROUPS)
             for n, end in zip(lengths, ends)]
    path, numbers = join(tmp_path / "a.ts", *parts), range(0, ends[-1], 29)
    for n in (*numbers, ends[-1] - 1):
        assert seen(data.frames(path, [n / FPS])) == [n % 256]
    assert seen(data.frames(path, [n / FPS for n in numbers])) == [n % 256 for n in numbers]


@pytest.mark.filterwarnings("default::plumbing.video.DamagedVideo")
def test_where_frames_have_no_times_a_damaged_one_warns_and_later_groups_keep_theirs(tmp_path):
    path = film(tmp_path / "a.avi", "mpeg4", map(textured, range(50)), {"g": "12", "bf": "2"})
    avi = open(path, "rb").read()
    with av.open(path) as found:
        sizes = [packet.size for packet in found.demux(video=0)]
    chunks = [found.start() for found in re.finditer(b"00dc", avi) if found.start() > avi.index(b"movi")]
    for lost in (5, 6, 7):   # all are of the first group
        begin = chunks[lost] + 8
        open(path, "wb").write(avi[:begin] + bytes(sizes[lost]) + avi[begin + sizes[lost]:])
        with pytest.warns(video.DamagedVideo):
            shown = seen(data.frames(path, [i / FPS for i in range(50)]))
        assert shown[:3] == [0, 1, 2] and shown[12:] == [*range(12, 50)]


# ------------------------------------------------------------------------------------------ tracks, cropping
def test_a_track_without_packets_is_passed_by(tmp_path):
    shows(broadcast(tmp_path / "a.ts", silent=True), list(range(30)), number=broadcasts)


def test_of_two_tracks_the_default_one_is_shown(tmp_path):
    for chosen in (0, 1):
        with av.open(str(tmp_path / "a.mkv"), "w") as out:
            tracks = []
            for i in range(2):
                tracks.append(out.add_stream("ffv1", rate=FPS))
                tracks[i].width, tracks[i].height, tracks[i].pix_fmt = 96, 64, "yuv420p"
                tracks[i].disposition = Disposition.default if i == chosen else Disposition.dub
            for i in range(10):
                for j, track in enumerate(tracks):
                    frame = av.VideoFrame.from_ndarray(picture(100 * j + i))
                    frame.pts = i
                    out.mux(track.encode(frame))
            out.mux([packet for track in tracks for packet in track.encode()])
        assert seen(data.frames(tmp_path / "a.mkv", [0, 0.36])) == [100 * chosen, 100 * chosen + 9]


@pytest.mark.parametrize("rotate", [0, 90])
def test_what_the_container_crops_is_not_shown(tmp_path, rotate):
    path = film(tmp_path / "a.mp4", "libx264", [textured(5)], {"crf": "1"}, rotate=rotate)
    mp4, shown = open(path, "rb").read(), next(data.frames(path, [0]))[1]
    # of 96 x 64, 80 x 50, its centre 3 to the right of and 2 above that of the picture
    clap = box(b"clap", struct.pack(">IIIIiIiI", 80, 1, 50, 1, 3, 1, -2, 1))
    entry = [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1", b"avcC"]
    open(path, "wb").write(replaced(mp4, entry, lambda avcc: avcc + clap))
    whole = torch.rot90(shown, -rotate // 90, (1, 2))
    cropped = torch.rot90(whole[:, 5:55, 11:91], rotate // 90, (1, 2))
    found = data.probe(path)
    assert (found.height, found.width) == cropped.shape[1:]
    assert torch.equal(next(data.frames(path, [0]))[1], cropped)


def test_rows_that_matroska_crops_are_not_shown(tmp_path):
    path = film(tmp_path / "a.mkv", "libx264", [textured(5)])
    shown, mkv = next(data.frames(path, [0]))[1], open(path, "rb").read()
    unit, crop = b"\x54\xb2\x81\x04", b"\x54\xbb\x81\x14"   # DisplayUnit: unknown; PixelCropTop: 20
    assert mkv.count(unit) == 1
    open(path, "wb").write(mkv.replace(unit, crop))
    assert torch.equal(next(data.frames(path, [0]))[1], shown[:, 20:])


@pytest.mark.parametrize("title", [
    "Stream #0:0 Frame Cropping: 8/8/8/8", "\n  Stream #0:0\n      Frame Cropping: 8/8/8/8"])
def test_a_title_that_speaks_of_cropping_crops_nothing(tmp_path, title):
    with av.open(film(tmp_path / "a.mkv", "libx264", [picture(5)])) as found, \
            av.open(str(tmp_path / "b.mkv"), "w") as out:
        out.metadata["title"] = title
        stream = out.add_stream_from_template(found.streams.video[0])
        for packet in found.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    assert data.probe(tmp_path / "b.mkv").width == 96


def test_a_container_that_crops_more_than_there_is_crops_nothing(tmp_path):
    path = film(tmp_path / "a.mkv", "libx264", [picture(5)])
    mkv = open(path, "rb").read()
    width, unit = b"\xb0\x81\x60", b"\x54\xb2\x81\x04"   # PixelWidth: 96; DisplayUnit: unknown
    assert mkv.count(width) == mkv.count(unit) == 1
    wide, crop = b"\xb0\x81\xf0", b"\x54\xcc\x81\x70"     # PixelWidth: 240; PixelCropLeft: 112
    open(path, "wb").write(mkv.replace(width, wide).replace(unit, crop))
    assert data.probe(path).width == 96 and seen(data.frames(path, [0])) == [5]
