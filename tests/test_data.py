"""data.py: which frames are shown, what their pixels become, what is refused, what the data sets yield."""
import collections
import fractions
import json
import os
import pickle

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

import data
from films import CALLS, FPS, HEIGHT, WIDTH, Opened, film, number, numbers, picture, seen, silence, stacked
from plumbing import video
from plumbing.cli import UserError
from plumbing.pictures import contact_sheet

torch.set_num_threads(1)
FRAMES = 60


# ------------------------------------------------------------------------------------ clips that can be read
def write(path, codec, frames=FRAMES, options={}, **more):
    """A clip whose i-th frame shows the number i."""
    pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
    return film(path, codec, map(picture, range(frames)), options, pix_fmt=pix_fmt, **more)


CLIPS = {   # name: (file, encoder, options)
    "h264 long gop": ("long.mp4", "libx264", {"g": "250", "bf": "3"}),
    "h264 short gop": ("short.mp4", "libx264", {"g": "10", "bf": "3", "sc_threshold": "0"}),
    "h264 open gop": ("open.mkv", "libx264", {"g": "10", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "hevc mkv": ("hevc.mkv", "libx265", {"x265-params": "keyint=12:log-level=none:pools=none"}),
    "vp9 webm": ("vp9.webm", "libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    "h264 ts": ("h264.ts", "libx264", {"g": "20", "bf": "3"}),
    "mpeg2 ts": ("mpeg2.ts", "mpeg2video", {"g": "12", "bf": "2"}),
    "mpeg2 ps": ("mpeg2.mpg", "mpeg2video", {"g": "12", "bf": "2"}),
    "mpeg4 avi": ("mpeg4.avi", "mpeg4", {"g": "12"}),
    "mpeg4 avi with B-frames": ("mpeg4b.avi", "mpeg4", {"g": "12", "bf": "2"}),
    "h264 avi with B-frames": ("h264b.avi", "libx264", {"g": "20", "bf": "3"}),
    "flv": ("flv.flv", "flv", {}), "wmv": ("wmv.wmv", "wmv2", {}), "gif": ("gif.gif", "gif", {})}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {
        name: write(folder / file, codec, options=options) for name, (file, codec, options) in CLIPS.items()
    }


# -------------------------------------------------------------------------------------------- frames by time
@pytest.mark.parametrize("name", CLIPS)
def test_probe_finds_the_exact_duration_also_where_the_container_states_none(clips, name):
    found = data.probe(clips[name])
    assert found.duration == pytest.approx(FRAMES / FPS)
    assert (found.width, found.height, found.rotation) == (WIDTH, HEIGHT, 0)
    assert found.fps == pytest.approx(FPS) and found.codec != ""


def test_webm_written_to_a_pipe_has_neither_duration_nor_index_and_still_works(tmp_path):
    path = write(tmp_path / "live.webm", "libvpx-vp9",
                 options={"g": "20", "deadline": "realtime", "cpu-used": "8"}, container={"live": "1"})
    assert av.open(path).duration is None
    assert data.probe(path).duration == pytest.approx(FRAMES / FPS)
    assert seen(data.frames(path, [0.1, 2.0, 9.0])) == [2, 50, 59]


def test_a_late_frame_costs_one_group_of_pictures(clips, monkeypatch):
    decoded = []
    decode = video.Video.decode

    def counted(self, *args, **more):
        for frame in decode(self, *args, **more):
            decoded.append(frame)
            yield frame
    monkeypatch.setattr(video.Video, "decode", counted)
    # TS: a seek lands anywhere, the search steps a second back
    for name, most in (("h264 short gop", 10), ("h264 ts", 45)):
        for i in range(FRAMES):
            decoded.clear()
            assert seen(data.frames(clips[name], [i / FPS])) == [i]
            assert len(decoded) <= 1 + most   # the first of the file, a group
    decoded.clear()
    assert seen(data.frames(clips["h264 short gop"], [0.08, 2.28])) == [2, 57]
    assert len(decoded) <= 1 + 4 + 10
    decoded.clear()
    thirds = list(range(0, FRAMES, 3))
    assert seen(data.frames(clips["h264 long gop"], [i / FPS for i in thirds])) == thirds
    assert len(decoded) <= 1 + FRAMES   # a group is decoded once, however many frames are wanted of it
    decoded.clear()
    assert seen(data.frames(clips["h264 long gop"], [2.28])) == [57]
    assert len(decoded) < 40   # frames that no other leans on are left out on the way


def test_whole_clips_with_a_clock_never_need_the_slow_way(clips, monkeypatch):
    play = video.Video.play
    monkeypatch.setattr(video.Video, "play", lambda self, ticks, jump, thorough:
                        pytest.fail("all are decoded") if thorough else play(self, ticks, jump, thorough))
    for name, path in clips.items():
        if "avi with B" not in name and not path.endswith(".mpg"):
            assert seen(data.sample_frames(path, 12, "test")) == data.uniform_sample_test(FRAMES, 12)


def test_variable_frame_rate_follows_the_time_stamps(tmp_path):
    milliseconds = [0, 40, 50, 400, 410, 900, 1500, 1501, 1600]
    path = write(tmp_path / "vfr.mp4", "libx264", len(milliseconds), {"bf": "2"}, pts=milliseconds, rate=1000)
    times = [0.0, 0.039, 0.04, 0.049, 0.3, 0.405, 0.899, 0.9, 1.4999, 1.5, 1.5015, 5]
    frames, used = stacked(data.frames(path, times))
    assert numbers(frames) == [0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert used == pytest.approx([milliseconds[i] / 1000 for i in numbers(frames)])
    assert seen(data.sample_frames(path, 4, "uniform")) == [2, 4, 5, 5]   # 0.2, 0.6, 1.0, 1.4 s: by time


def test_clips_of_one_frame_in_many_seconds(tmp_path):
    path = write(tmp_path / "lapse.avi", "mpeg4", 20, {"g": "4"}, rate=fractions.Fraction(1, 5))
    assert seen(data.frames(path, [4.9, 7.4, 62, 99])) == [0, 1, 12, 19]
    assert data.probe(path).duration == pytest.approx(100)
    with data.open_video(path) as video:
        video.packets = lambda jumped: iter(())   # nothing readable where the search looks: it must come to an end
        assert video.keyframe_before(10 ** 12) is None


def test_frames_that_an_edit_list_hides_are_neither_shown_nor_counted(tmp_path):
    path = write(tmp_path / "edit.mp4", "libx264", 20, {"g": "30", "bf": "2"}, pts=range(-5, 15),
                 container={"avoid_negative_ts": "disabled"})
    assert seen(data.frames(path, [0, 0.2, 9])) == [5, 10, 19]
    assert seen(data.sample_frames(path, 15, "test")) == [5 + i for i in data.uniform_sample_test(15, 15)]
    assert data.probe(path).duration == pytest.approx(0.6)


def test_a_stream_that_starts_amid_a_group_begins_with_its_first_whole_frame(tmp_path):
    path = write(tmp_path / "front.ts", "libx264", options={"g": "20", "sc_threshold": "0"})
    whole = open(path, "rb").read()
    open(path, "wb").write(whole[12 * 188:])   # MPEG-TS: packets of 188 bytes; these hold the first keyframe
    assert seen(data.frames(path, [0, 0.4])) == [20, 30]
    assert seen(data.sample_frames(path, 20, "seq")) == [20 + i for i in data.get_seq_frames(40, 20)]


def test_frames_of_absurd_size_are_refused_before_any_is_decoded(clips, monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(data.VideoError, match="96 x 64 are too large"):
        list(data.frames(clips["vp9 webm"], [0]))
    monkeypatch.undo()
    # what a decoder finds out by itself
    monkeypatch.setattr(video, "LIMITS", {"max_pixels": str(HEIGHT * WIDTH - 1)})
    with pytest.raises(data.VideoError, match="cannot be read as a video"):
        list(data.frames(clips["h264 ts"], [0]))


def test_a_seek_to_nowhere_is_answered_not_raised(clips):
    with data.open_regular(clips["gif"]) as file:
        assert file.seek(-5) == -1 and file.seek(3) == 3


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_very_short_clips(tmp_path, length):
    path = write(tmp_path / "short.mp4", "libx264", length)
    assert seen(data.frames(path, [-9, 0, 0.05, 9])) == [0, 0, min(1, length - 1), length - 1]
    assert seen(data.sample_frames(path, 8, "uniform")) == [int((i + 0.5) / 8 * length) for i in range(8)]
    assert seen(data.sample_frames(path, 8, "test")) == data.uniform_sample_test(length, 8)
    assert len(list(data.sample_frames(path, 8, "seq"))) == length


@pytest.mark.parametrize("rotate", [(0, ), (90, ), (180, ), (270, ), (0, True), (90, True), (0, False, True),
                                    (270, True)])
def test_the_display_matrix_turns_and_mirrors_frames(tmp_path, rotate):
    path = write(tmp_path / "turned.mp4", "libx264", 3, rotate=rotate[0], mirror=rotate[1:])
    expected = np.rot90(picture(0), rotate[0] // 90)   # counterclockwise, then mirrored
    for axis, flip in enumerate(reversed((*rotate[1:], False, False)[:2])):
        expected = np.flip(expected, axis) if flip else expected
    frames, _ = stacked(data.frames(path, [0]))
    assert (frames[0].permute(1, 2, 0).float() - torch.tensor(expected.copy()).float()).abs().mean() < 4
    found = data.probe(path)
    assert (found.height, found.width) == expected.shape[:2]
    assert len(rotate) > 1 or found.rotation == -rotate[0] % 360


def test_times_ascend_and_may_be_none_or_far_away(clips):
    assert seen(data.frames(clips["gif"], [])) == []
    assert seen(data.frames(clips["h264 ts"], [-1e300, 1e300, float("inf")])) == [0, 59, 59]
    for times in ([1, 0], [0, float("nan")]):
        with pytest.raises(AssertionError, match="ascend"):
            list(data.frames(clips["gif"], times))


def test_a_frame_is_decoded_when_it_is_asked_for_and_the_file_closed_when_nobody_asks_any_more(clips):
    def files():
        return len(os.listdir("/proc/self/fd"))
    before, found = files(), data.frames(clips["h264 long gop"], [0, 1, 2])
    assert number(next(found)[1]) == 0 and files() == before + 1
    found.close()
    assert files() == before


# ------------------------------------------------------------------------------------------------- the rules
# worked by hand; half rounds to even: 4.5 -> 4, 14.5 -> 14
@pytest.mark.parametrize("n, num_frames, seq, test", [
    (10, 4, [1, 3, 5, 8], [1, 3, 5, 8]),
    (30, 8, [2, 5, 9, 12, 16, 20, 23, 27], [1, 5, 8, 12, 15, 19, 23, 26]),
    (3, 8, [0, 1, 1], [0, 0, 0, 1, 1, 1, 2, 2]),
    (1, 3, [0], [0, 0, 0])])
def test_index_rules_against_tables(n, num_frames, seq, test):
    assert data.get_seq_frames(n, num_frames) == seq
    assert data.uniform_sample_test(n, num_frames) == test


def test_training_indices_fill_each_stretch_with_both_ends():
    draws = np.array([data.uniform_sample_train(10, 4, np.random.default_rng(seed)) for seed in range(300)])
    drawn = [sorted(set(column.tolist())) for column in draws.T]
    assert drawn == [[0, 1, 2], [2, 3, 4], [4, 5, 6, 7], [7, 8, 9]]


def test_sample_frames_follows_each_rule_and_its_seed(clips):
    path = clips["h264 short gop"]
    assert seen(data.sample_frames(path, 8, "uniform")) == [3, 11, 18, 26, 33, 41, 48, 56]
    assert seen(data.sample_frames(path, 8, "seq")) == data.get_seq_frames(60, 8)
    assert seen(data.sample_frames(path, 8, "test")) == data.uniform_sample_test(60, 8)
    for seed in (0, (1, 2, 3)):
        expected = data.uniform_sample_train(60, 8, np.random.default_rng(seed))
        assert seen(data.sample_frames(path, 8, "train", seed)) == expected


def test_a_window_between_two_frames_shows_the_first_of_them(clips):
    window = 10.3 / FPS, 10.6 / FPS
    assert seen(data.sample_frames(clips["h264 short gop"], 2, "test", window=window)) == [10, 10]


# ------------------------------------------------------------------------------------------------- bad files
CLIP_NAMERS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\n{clip}\n#EXT-X-ENDLIST\n",
    "script.ffconcat": "ffconcat version 1.0\nfile '{clip}'\n",
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
                   "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "manifest.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
                    '<AdaptationSet mimeType="video/mp4"><Representation id="0" bandwidth="1"><BaseURL>{clip}'
                    '</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "stream.strm": "{clip}\n"}


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("file", CLIP_NAMERS)
def test_a_script_that_names_another_file_is_refused_and_the_file_not_opened(tmp_path, clips, file, renamed):
    clip = clips["h264 ts"]
    script = tmp_path / (file + ".mp4" if renamed else file)
    script.write_text(CLIP_NAMERS[file].format(clip=clip))
    opened = Opened(clip)
    for call in CALLS:
        with pytest.raises(data.VideoError, match="not a video"):
            call(script)
    assert not opened
    with open(clip):
        assert opened   # the watch works


def junk(folder, clips):
    """{kind of bad file: (path, part of the message)}."""
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("Once upon a time there was a video.\n" * 50)
    (folder / "subtitles.mp4").write_text("1\n00:00:00,000 --> 00:00:02,000\nHello\n\n" * 5)
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20000))
    for kind in ("png", "jpeg", "webp", "bmp"):
        Image.fromarray(picture(5)).save(folder / f"{kind}.mp4", kind)
    with av.open(str(folder / "sound.m4a"), "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=48000)
        for i in range(5):
            out.mux(stream.encode(silence(i)))
        out.mux(stream.encode())
    with av.open(str(folder / "cover.m4a"), "w", format="mp4") as out:
        stream, cover = out.add_stream("aac", rate=48000), out.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        out.mux(cover.encode(av.VideoFrame.from_ndarray(picture(5))))
        for i in range(5):
            out.mux(stream.encode(silence(i)))
        out.mux([*stream.encode(), *cover.encode()])
    whole = open(clips["h264 long gop"], "rb").read()
    (folder / "no_index.mp4").write_bytes(whole[:len(whole) // 2])   # an MP4's table of frames is at its end
    reasons = {
        "folder.mp4": "regular one", "pipe.mp4": "regular one", "empty.mp4": "not a video",
        "text.mp4": "not a video", "subtitles.mp4": "not a video", "noise.mp4": "not a video",
        "no_index.mp4": "cut off", "sound.m4a": "no video track", "cover.m4a": "no video track",
        "missing.mp4": "No such file", "http://localhost/clip.mp4": "download it first",
        **{f"{kind}.mp4": "not a video" for kind in ("png", "jpeg", "webp", "bmp")}
    }
    return {
        name: (name if "://" in name else str(folder / name), reason) for name, reason in reasons.items()
    } | {"device": ("/dev/zero", "regular one"), "NUL in the name": ("a\0b.mp4", "regular one")}


def test_every_bad_file_is_a_video_error_of_one_line_with_its_path(tmp_path, clips):
    for name, (path, reason) in junk(tmp_path, clips).items():
        for call in CALLS:
            with pytest.raises(data.VideoError, match=reason) as error:
                call(path)
            assert "\n" not in str(error.value) and (path in str(error.value) or "\0" in path), name


def test_what_a_file_is_does_not_depend_on_its_name(tmp_path, clips):
    for name in ("clip.jpg", "clip.txt", "clip.m3u8", "clip%03d.png", "clip"):
        os.symlink(clips["h264 short gop"], tmp_path / name)
        assert seen(data.frames(tmp_path / name, [1.0])) == [25]


@pytest.mark.parametrize("file, codec", [("cut.mp4", "libx264"), ("cut.mkv", "libx264"),
                                         ("cut.ts", "libx264"), ("cut.avi", "mpeg4")])
def test_a_cut_file_shows_what_is_left_and_then_its_last_frame(tmp_path, file, codec):
    container = {"movflags": "faststart"} if file == "cut.mp4" else {}
    path = write(tmp_path / file, codec, options={"g": "10"}, container=container)
    whole = open(path, "rb").read()
    open(path, "wb").write(whole[:int(len(whole) * 0.7)])
    assert seen(data.frames(path, [0.0, 0.2])) == [0, 5]
    tenth, last, still = seen(data.frames(path, [0.4, 2.39, 50]))
    assert tenth == 10 and 15 < last < 55 and still == last
    assert data.probe(path).duration == pytest.approx((last + 1) / FPS, abs=2 / FPS)
    assert seen(data.sample_frames(path, 8, "uniform"))[-1] <= last


def test_a_file_cut_before_its_first_frame_is_a_video_error(tmp_path):
    path = write(tmp_path / "cut.mp4", "libx264", container={"movflags": "faststart"})
    whole = open(path, "rb").read()
    open(path, "wb").write(whole[:whole.index(b"mdat") + 6])
    with pytest.raises(data.VideoError):
        list(data.frames(path, [0]))


# ---------------------------------------------------------------------------------------------------- pixels
def test_resize_is_bilinear_without_antialiasing():
    row = torch.tensor([0, 100]).byte().expand(1, 3, 1, 2)
    # pixel centres at -0.25, 0.25, 0.75, 1.25
    assert data.resize(row, 1, 4)[0, 0, 0].tolist() == [0, 25, 75, 100]
    row = torch.tensor([0, 0, 200, 0, 0, 0, 0, 200]).byte().expand(1, 3, 1, 8)
    # centres at 1.5 and 5.5: two neighbours each
    assert data.resize(row, 1, 2)[0, 0, 0].tolist() == [100, 0]


def test_eval_pixels_scales_the_short_side_and_cuts_the_centre():
    columns = (torch.arange(8) * 10).byte().expand(1, 3, 4, 8)
    assert data.eval_pixels(columns, 4)[0, 0, 0].tolist() == [20, 30, 40, 50]
    assert data.eval_pixels(columns, 2, short=4)[0, 0, 0].tolist() == [30, 40]
    assert data.eval_pixels(columns, 2)[0, 0, 0].tolist() == [25, 45]   # 8 -> 4 wide
    rows = columns.transpose(2, 3)
    assert torch.equal(data.eval_pixels(rows, 4), data.eval_pixels(columns, 4).transpose(2, 3))
    # int(455.82 + 0.5)
    assert data.short_side(torch.zeros(1, 3, 360, 641).byte(), 256).shape == (1, 3, 256, 456)


def test_squash_squashes_to_a_square_by_nearest_neighbour():
    frames = torch.arange(8).byte().view(1, 1, 2, 4).expand(1, 3, 2, 4)   # rows 0 1 2 3 and 4 5 6 7
    assert data.squash(frames, 2)[0, 1].flatten().tolist() == [0, 2, 4, 6]
    square = torch.randint(0, 256, (2, 3, 6, 6)).byte()
    assert torch.equal(data.squash(square, 6), square)


def test_training_crops_all_frames_of_a_clip_alike_and_differ_by_seed():
    torch.manual_seed(0)
    still = torch.randint(0, 256, (1, 3, 40, 60)).byte().expand(4, 3, 40, 60)
    crops = [data.train_pixels(still, 28, seed) for seed in range(5)]
    for crop in crops:
        assert crop.shape == (4, 3, 28, 28) and all(torch.equal(frame, crop[0]) for frame in crop)
    assert all(not torch.equal(a, b) for i, a in enumerate(crops) for b in crops[:i])
    assert torch.equal(data.train_pixels(still, 28, 3), crops[3])
    # where the crop is all: 256 / 224 of 28 is 32, then 28
    square = torch.randint(0, 256, (1, 3, 60, 60)).byte()
    whole = data.train_pixels(square, 28, 0, min_area=1)
    assert torch.equal(whole, data.resize(data.resize(square, 32, 32), 28, 28))


def test_random_crops_keep_to_their_area_and_aspect():
    rng = np.random.default_rng(0)
    for _ in range(500):
        top, left, height, width = data.random_crop(256, 340, rng, min_area=0.3)
        assert 0 <= top <= 256 - height and 0 <= left <= 340 - width
        assert 0.29 < height * width / (256 * 340) < 1.01 and 0.74 < width / height < 1.35
    # nothing fits: the centred square
    assert data.random_crop(10, 1000, rng, min_area=1) == (0, 495, 10, 10)


# ------------------------------------------------------------------------------------------------- data sets
def tokenizer(text, context_length):
    return torch.tensor([[len(text)] + [0] * (context_length - 1)])


@pytest.fixture
def world(tmp_path, clips):
    """A folder with a clip, a broken one and a picture."""
    os.symlink(clips["h264 short gop"], tmp_path / "good.mp4")
    (tmp_path / "broken.mp4").write_text("not a video")
    Image.fromarray(picture(9)).save(tmp_path / "still.png")
    (tmp_path / "page").mkdir()
    os.symlink(clips["h264 short gop"], tmp_path / "page" / "17.mp4")
    return tmp_path


def lines(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def captions(world, annotations, **options):
    return data.CaptionDataset(annotations, world, 4, 28, tokenizer, context_length=6, **options)


def test_caption_items_are_a_training_clip_ids_and_an_index(world):
    items = captions(world, lines(world / "a.jsonl", {"video": "good.mp4", "caption": "abc"}, "\n",
                                  {"video": "good.mp4", "caption": "abcde"}))
    pixels, ids, index = items[0, 1]
    assert len(items) == 2 and index == 1 and ids.tolist() == [5, 0, 0, 0, 0, 0]
    assert pixels.shape == (4, 3, 28, 28) and pixels.dtype == torch.uint8
    rng = np.random.default_rng((0, 0, 1))
    frames, _ = stacked(data.sample_frames(world / "good.mp4", 4, "train", rng))
    assert torch.equal(pixels, data.train_pixels(frames, 28, rng))


def test_caption_items_follow_from_seed_epoch_and_index_alone(world):
    path = lines(world / "a.jsonl", *[{"video": "good.mp4", "caption": "a"}] * 2)
    items, again, other = captions(world, path), captions(world, path), captions(world, path, seed=1)
    first = items[0, 0][0]
    assert torch.equal(first, again[0, 0][0])
    assert not any(torch.equal(first, pixels) for pixels in (items[0, 1][0], items[1, 0][0], other[0, 0][0]))


@pytest.mark.parametrize("header, row", [
    ("\ufeffvideoid,name,duration,page_dir", '17,"a dog, running",PT1S,page'),
    ("videoid,contentUrl,duration,page_dir,name", '17,http://x/17.mp4,PT1S,page,"a dog, running"')])
def test_webvid_csv_of_both_releases(world, header, row):
    items = captions(world, lines(world / "a.CSV", header + "\n", row + "\n"))
    assert items.row(0) == ["page/17.mp4", "a dog, running"] and items[0, 0][0].shape == (4, 3, 28, 28)


def test_rows_come_back_as_they_are_written_also_in_a_loaders_process(world):
    texts = ["ab", "\u00e4\u4e2d", "\ud800", "end"]
    items = captions(world, lines(world / "a.jsonl", *[{"video": "a.mp4", "caption": t} for t in texts]))
    for items in (items, pickle.loads(pickle.dumps(items))):
        assert [items.row(i) for i in range(4)] == [["a.mp4", t] for t in ("ab", "\u00e4\u4e2d", "?", "end")]


def test_collate_skip_drops_broken_videos_and_says_which(world):
    videos = "good.mp4", "broken.mp4", "missing.mp4", "good.mp4"
    items = captions(world, lines(world / "a.jsonl", *[{"video": v, "caption": "x"} for v in videos]))
    batch = data.collate_skip([items[0, i] for i in range(4)])
    assert batch["pixels"].shape == (2, 4, 3, 28, 28) and batch["text"].shape == (2, 6)
    assert batch["index"] == (0, 3)
    assert [("broken.mp4" in m or "missing.mp4" in m) for m in batch["skipped"]] == [True, True]
    nothing = data.collate_skip([items[0, 1]])
    assert len(nothing["index"]) == 0 and len(nothing["skipped"]) == 1
    with pytest.raises(UserError, match="pictures and videos"):
        data.collate_skip([(torch.zeros(1, 3, 4, 4), [], 0), (torch.zeros(2, 3, 4, 4), [], 1)])


def test_retrieval_shows_uniform_frames_and_says_which_videos_are_missing(world):
    row, gone = ({"video": video, "caption": "one"} for video in ("page/17", "nowhere.mp4"))
    with pytest.raises(UserError, match="lacks 1 of 2 videos, the first is nowhere.mp4"):
        data.RetrievalDataset(data.read_captions(lines(world / "a.jsonl", row, gone)), world, 4, 28)
    items = data.RetrievalDataset(data.read_captions(lines(world / "a.jsonl", row)), world, 4, 28)
    pixels, index = items[0]   # the name lacks its extension
    frames, _ = stacked(data.sample_frames(world / "good.mp4", 4, "uniform"))
    assert index == 0 and items.captions == ["one"] and torch.equal(pixels, data.eval_pixels(frames, 28))


def test_a_broken_retrieval_video_stops_also_in_a_worker_process(world):
    path = lines(world / "a.jsonl", {"video": "broken.mp4", "caption": "x"})
    items = data.RetrievalDataset(data.read_captions(path), world, 4, 28)
    for workers in (0, 1):
        with pytest.raises(data.VideoError, match="broken.mp4: not a video"):
            list(DataLoader(items, num_workers=workers))


def talk(*values, **source):
    who = ["human", "gpt"] * len(values)
    return {"id": 1, **source, "conversations": [{"from": w, "value": v} for w, v in zip(who, values)]}


def test_conversations_lose_the_marker_and_keep_their_turns(world):
    rows = [talk("What?\n<video>", "A dog.", "Why?", "So.", video="page/17.pkl"),
            talk("<video>\nWho?", "It.", video="good.mp4")]
    for path in (lines(world / "a.json", rows), lines(world / "a.jsonl", *rows)):
        items = data.ConversationDataset(path, world, 4, 28)
        pixels, conversation, index = items[0]
        assert conversation == [("What?", "A dog."), ("Why?", "So.")] and index == 0
        assert items[1][1] == [("Who?", "It.")]
        frames, _ = stacked(data.sample_frames(world / "good.mp4", 4, "uniform"))
        assert torch.equal(pixels, data.squash(frames, 28))


@pytest.mark.parametrize("row", [
    {"video": "good.mp4", "question": "What? ", "answer": "A dog."}, {"video_id": "good", "q": "What?", "a": "A dog."},
    {"video": "good.mp4", "messages": [{"role": "user", "content": "What?"},
                                       {"role": "assistant", "content": "A dog."}]}])
def test_rows_of_others_are_conversations_too(row, world):
    found = data.talk_of(row | {"window": [1, 2]}, "here")
    assert found.turns == [("What?", "A dog.")] and found.window == [1, 2]
    assert found.paths(world) == [str(world / "good.mp4")]


@pytest.mark.parametrize("row, message", [
    ({"question": "What?"}, "needs 'answer'"), ({"messages": [{"role": "user", "content": "What?"}]}, "user, assistant"),
    ({"messages": [{"role": "user"}]}, "needs 'content'"), ({}, "needs 'conversations'")])
def test_rows_without_an_answer_are_one_line(row, message):
    with pytest.raises(UserError, match=f"here: .*{message}"):
        data.talk_of(row | {"video": "good.mp4"}, "here")


EVENTS = [{"start": 4, "end": 6.5, "text": "A dog Barks."}, {"start": 9, "end": 12, "text": "it sleeps"}]


def test_videos_that_follow_each_other_lie_side_by_side(world):
    rows = [talk("What?", "A dog.", videos=["good.mp4", "page/17"]), talk("What?", "A dog.", video="good.mp4")]
    long, short = (data.ConversationDataset(lines(world / "l.json", [row]), world, 4, 28)[0][0] for row in rows)
    assert long.shape[0] == 8 and torch.equal(long[:4], short)
    with pytest.raises(UserError, match="here: needs 'videos', a list"):
        data.talk_of(talk("What?", "A dog.", videos="good.mp4"), "here")


def test_a_marker_amid_a_question_stays_and_an_answer_without_words_is_an_error():
    said = data.talk_of(talk("Is <image> nice? ", " Yes.", "<video> Why?", "So.", video="v"), "here").turns
    assert said == [("Is <video> nice?", "Yes."), ("Why?", "So.")]
    with pytest.raises(UserError, match="here: needs 'value'"):
        data.talk_of(talk("Why?", " ", video="v"), "here")


def test_events_become_dialogues_in_which_each_is_asked_once_or_all_together():
    row, kinds = {"video": "a.mp4", "window": [2, 12], "duration": 60, "events": EVENTS}, collections.Counter()
    for i in range(200):
        talked = data.talk_of(row, "here", i)
        assert (talked.window, talked.duration) == ([2, 12], 10) and talked == data.talk_of(row, "here", i)
        said = talked.said("")
        if len(said) == 1:
            kinds["all"] += said[0][0] in data.ASK_ALL
            assert said[0][1] == "From 20 to 45, A dog Barks. From 70 to 99, it sleeps."
            continue
        (first, answer), _ = sorted(said, key=lambda turn: "sleeps" in str(turn) or "70" in str(turn))
        kinds["words"] += answer == "From 20 to 45." and "a dog barks" in first
        kinds["time"] += answer == "A dog Barks." and "20" in first and "45" in first
    assert kinds.total() == 200 and 20 < kinds["all"] < 60 and min(kinds["words"], kinds["time"]) > 50


def test_a_file_says_how_long_it_is_where_its_row_does_not(world):
    events = [{"start": 0, "end": data.probe(world / "good.mp4").duration / 2, "text": "x"}]
    rows = lines(world / "a.jsonl", {"video": "good", "events": events}, {"video": "broken", "events": events})
    items = data.ConversationDataset(rows, world, 2, 28, skip=True)
    assert {text for turn in items[0][1] for text in turn if "50" in text}
    assert isinstance(items[1], data.VideoError)


def test_a_part_of_a_video_shows_its_own_frames(world):
    meta = {"split": [0.5, 1.0], "duration": 0.5, "token": {"<s0>": 0.25}}
    row = talk("<video>\nWhat?", "At <s0>.", meta=meta) | {"id": "good"}
    pixels, said, _ = data.ConversationDataset(lines(world / "a.json", [row]), world, 2, 28)[0]
    frames, _ = stacked(data.sample_frames(world / "good.mp4", 2, "uniform", window=(0.5, 1.0)))
    assert torch.equal(pixels, data.squash(frames, 28)) and said == [("What?", "At 50.")]


def test_a_picture_is_a_clip_of_one_frame_through_the_same_pixels(world):
    path = lines(world / "a.jsonl", talk("<image>\nWhat?", "It.", image="still.png"))
    items = data.ConversationDataset(path, world, 4, 28)
    pixels, conversation, _ = items[0]
    assert conversation == [("What?", "It.")]
    assert torch.equal(pixels, data.squash(torch.from_numpy(picture(9)).permute(2, 0, 1)[None], 28))
    turned = Image.fromarray(picture(9))
    turned.getexif()[0x0112] = 6   # Orientation: turn by 90 degrees clockwise to see it upright
    turned.save(world / "still.png", exif=turned.getexif())
    upright = data.read_picture(world / "still.png").permute(1, 2, 0)   # (H, W, 3)
    assert np.array_equal(upright, np.rot90(picture(9), -1))
    os.replace(world / "broken.mp4", world / "still.png")
    with pytest.raises(data.VideoError, match="not a picture"):
        items[0]


GOOD = {"video": "good.mp4", "caption": "x"}


def retrieval(folder, annotations):
    return data.RetrievalDataset(data.read_captions(annotations), folder, 4, 28)


def conversations(folder, annotations):
    return data.ConversationDataset(annotations, folder, 4, 28)


@pytest.mark.parametrize("make, rows, message", [
    (captions, [GOOD, "{'video': 1}\n"], "line 2: not valid JSON"),
    (captions, [GOOD, GOOD, {"video": "good.mp4"}], "line 3: needs 'caption'"),
    (captions, [GOOD, {"video": 7, "caption": "x"}], "line 2: needs 'video'"),
    (captions, [GOOD, "[1, 2]\n"], "line 2: not a JSON object"),
    (captions, [""], "no rows"), (captions, [{}], "a.jsonl: needs 'video'"),
    (captions, [[{}]], "entry 1: needs 'video'"), (captions, [GOOD, {}], "line 2: needs 'video'"),
    (captions, ['{"video": "v", "caption": "x", "video": "w"}'], "'video' stands twice"),
    (captions, [GOOD, '{"video": "v", "caption": "x", "caption": "y"}'], "line 2: .*'caption' stands twice"),
    (conversations, [{}], "needs 'video'"), (conversations, [[{}]], "entry 1: needs 'video'"),
    (retrieval, [[GOOD, {"video": "b.mp4", "caption": [1]}]], "entry 2: needs 'caption'"),
    (conversations, [[talk("q", "a", video="v"), talk("q", video="v")]], "entry 2: conversations must go"),
    (conversations, [[talk("q", "a", video="v"), 5]], "entry 2: not a JSON object"),
    (conversations, [talk("q", "a")], "a.jsonl: needs 'id'"),
    (conversations, [{"video": "v", "window": [5, 60], "events": EVENTS}], "of what is shown, not .0, -1."),
    (conversations, [talk("q", "\n", video="v")], "needs 'value'"),
    (conversations, [talk("q", "a", video="v", meta=["x"])], "needs 'meta', a dict"),
    (conversations, [{"videos": ["a", 3], "conversations": talk("q", "a")["conversations"]}], "a list of names"),
    (conversations, [talk("q", "a", video="v", window=[1, 1])], "nothing is shown from 1 to 1 s"),
    (conversations, [talk("q", "a", video="v", meta={"duration": "12"})], "of what is shown, not .0, '12'."),
    (conversations, [{"video": "v", "duration": -1, "events": EVENTS}], "of what is shown, not .0, -1."),
    (conversations, [{"video": "v", "duration": 9, "window": [9, 10], "events": EVENTS}], "v: nothing is from 9 to 10 s"),
    (conversations, [talk("q", "a", video="v", meta={"split": [4, 2]})], "of what is shown, not .4, 2."),
    (conversations, [talk("q", "a", video="v", meta={"token": {"<s0>": "1"}})], "of what is shown, not .0, '1'."),
    (conversations, [talk("q", "a", video="v"), talk("q", 3, video="v")], "line 2: needs 'value'")])
def test_bad_annotations_are_user_errors_that_name_the_place(tmp_path, make, rows, message):
    path = lines(tmp_path / "a.jsonl", *rows)
    with pytest.raises(UserError, match=message) as error:
        make(tmp_path, path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("videoid,name,page_dir\n1,a,b\n2,c\n", "line 3: has not as many columns as the header, 3"),
    ("videoid,name,page_dir\n1,a,b,c\n", "line 2: has not as many columns as the header, 3"),
    ("videoid,name,page_dir\n1,,b\n", "line 2: needs 'name'"), ("id,text\n1,a\n", "line 2: needs 'videoid'"),
    ('videoid,name,page_dir\n1,"a" b,c\n', "line 2: not valid CSV")])
def test_bad_webvid_files_are_user_errors_that_name_the_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        captions(tmp_path, lines(tmp_path / "a.csv", text))


def test_json_lines_end_with_a_line_feed_and_with_nothing_else(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "b\u2028c"}\n\n{"a": "d\x85e"}\r\n', encoding="utf-8")
    assert [row["a"] for _, row in data.read_rows(tmp_path / "a.jsonl")] == ["b\u2028c", "d\x85e"]


def test_annotations_that_are_missing_or_not_text_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        captions(tmp_path, tmp_path / "missing.jsonl")
    for encoding, kind in (("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("latin-1", "Latin-1")):
        for name, text in (("a.jsonl", json.dumps(GOOD | {"caption": "\xe9"}, ensure_ascii=False)),
                           ("a.CSV", "videoid,name\n1,caf\xe9\n")):
            (tmp_path / name).write_bytes(text.encode(encoding))
            message = f"{name}.*(not UTF-8 text; it looks like {kind}|needs 'videoid')"
            with pytest.raises(UserError, match=message):
                captions(tmp_path, tmp_path / name)


@pytest.mark.parametrize("file", ["clip.mov", "clip.MP4", "clip.m4v", "clip.MKV", "clip"])
def test_a_video_is_found_by_a_name_without_extension(tmp_path, file):
    (tmp_path / file).touch()
    assert [data.locate(tmp_path, name) for name in ("clip", "clip.pkl")] == [str(tmp_path / file)] * 2


# ------------------------------------------------------------------------------------------------ to look at
def test_contact_sheet_is_a_grid_of_all_frames(tmp_path, clips):
    frames, times = stacked(data.sample_frames(clips["h264 short gop"], 5, "uniform"))
    contact_sheet(frames, times, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 184, 3 * 244, 3)   # 3 columns, 2 rows; 4 pixels of gap, 20 more for the time
    assert number(torch.tensor(sheet[2:162, 246:486]).permute(2, 0, 1)) == number(frames[1])
    assert (sheet[164:182, 2:60] < 100).any()     # the label
    assert os.listdir(tmp_path) == ["sheet.png"]


def test_a_sheet_of_narrow_pictures_stays_small(tmp_path):
    contact_sheet(torch.zeros(16, 3, 240, 1, dtype=torch.uint8), [0.0] * 16, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (976, 4 * (960 + 24))


def test_a_sheet_shows_what_its_font_lacks_as_escapes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda image, at, text, *_: drawn.append(text))
    frames = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    contact_sheet(frames, [1.5], tmp_path / "sheet.png", ["0.9 \u4e2d\n\udcff.mp4"])
    assert drawn == [r"0: 1.50 s, 0.9 \u4e2d\n\udcff.mp4"]


def test_data_py_prints_what_a_video_is_and_writes_its_contact_sheet(tmp_path, clips, capsys):
    out = str(tmp_path / "sheet.png")
    data.main(data.Config(clips["h264 short gop"], num_frames=4, start=0.4, end=1.2, out=out))
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("h264, 96 x 64, turned by 0 degrees, 25.00 frames/s, 2.40 s")
    # the middles 0.5, 0.7, ... show the frames before them
    assert out[1].endswith("4 frames, at 0.48, 0.68, 0.88, 1.08 s")
    assert Image.open(tmp_path / "sheet.png").size == (2 * 244, 2 * 184)


def test_a_sheet_replaces_a_sheet_and_no_other_file(tmp_path, clips):
    video, photo, sheet = tmp_path / "v.mp4", tmp_path / "photo.png", tmp_path / "sheet.png"
    video.write_bytes(open(clips["h264 short gop"], "rb").read())
    Image.new("RGB", (8, 8)).save(photo)
    for path in (video, photo):
        before = path.read_bytes()
        with pytest.raises(UserError, match=f"{path}: there is something that this program did not write"):
            data.main(data.Config(str(video), num_frames=2, out=str(path)))
        assert path.read_bytes() == before
    for count in (1, 5):
        data.main(data.Config(str(video), num_frames=count, out=str(sheet)))
    assert Image.open(sheet).size == (3 * 244, 2 * 184)
