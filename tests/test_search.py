"""search.py: an index that is right whatever happens to its folder."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model
import search
from films import film, stacked
from model import VideoEncoder
from plumbing import cli, training, weightfile
from plumbing.cli import UserError
from search import Config
from toy import shapes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.join(ROOT, "weights", "tiny")


def config(**options):
    return Config(**{"weights": TINY, "workers": 0, "device": "cpu", **options})


def refused(message, **options):
    with pytest.raises(UserError, match=message) as error:
        search.main(config(**options))
    assert "\n" not in str(error.value)


def write(path, what):
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return str(path)


# ---------------------------------------------------------------------------------------------------- index
KINDS = {"mp4": "libx264", "mkv": "libx264", "mov": "mpeg4", "webm": "libvpx", "gif": "gif", "ts": "mpeg2video", "avi": "mpeg4", "mpg": "mpeg2video",
         "flv": "flv", "wmv": "wmv2"}
EACH, BROKEN = 5, {"text.mp4": "not a video", "empty.avi": "the file is empty", "picture.mkv": "a picture", "cut.webm": ""}
TWO = ["a big red circle moves left in the middle", "a small blue star moves down on the left"]


def clip_of(caption, seconds):
    _, size, colour, shape, verb, way, *place = caption.split()
    clip = shapes.Clip(colour, shape, f"{verb} {way}", " ".join(place), size, (0.5,) * 6)
    return [shapes.draw(clip, (k + 0.5) / (12 * seconds)) for k in range(12 * seconds)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder `videos` with 51 videos, broken ones and other files, and its index."""
    folder = tmp_path_factory.mktemp("made")
    clips = shapes.world(0, 1, True)
    for i, (kind, codec) in enumerate(sorted(KINDS.items())):
        (folder / "videos" / kind).mkdir(parents=True)
        for k in range(EACH):
            pictures = [shapes.draw(clips[7 * (EACH * i + k)], (t + 0.5) / 24) for t in range(24)]
            film(folder / "videos" / kind / f"{k}.{kind}", codec, pictures, pix_fmt="rgb8" if kind == "gif" else "yuv420p",
                 rate=25 if codec == "mpeg2video" else 12)
    film(folder / "videos" / "two.mp4", "libx264", [picture for caption in TWO for picture in clip_of(caption, 4)], rate=12)
    write(folder / "videos" / "text.mp4", "not a video")
    write(folder / "videos" / "notes.txt", "not a video either, and not called one")
    write(folder / "videos" / "empty.avi", "")
    Image.new("RGB", (8, 8)).save(folder / "videos" / "picture.mkv", "PNG")
    (folder / "videos" / "cut.webm").write_bytes((folder / "videos" / "webm" / "0.webm").read_bytes()[:300])
    search.main(indexing(folder))
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the folder and its index, free to be changed."""
    shutil.copytree(made / "videos", tmp_path / "videos")   # with times
    before, files, _ = search.read_index(str(made / "index"))
    search.write_index(str(tmp_path / "index"), {**before, "folder": str(tmp_path / "videos")}, files)
    return tmp_path


def indexing(folder, **options):
    return config(stage="index", what=str(folder / "videos"), index=str(folder / "index"), **options)


def searching(folder, text, **options):
    return config(stage="search", what=text, index=str(folder / "index"), **options)


def indexed(folder):
    """{name: features (n, P)} of an index on the disk, without broken files."""
    return {name: torch.cat(e.features) for name, e in search.read_index(str(folder / "index"))[1].items() if e.features}


@pytest.fixture
def encoded(monkeypatch):
    """A list of how many windows were encoded at a time."""
    counts, encode = [], VideoEncoder.encode_video
    monkeypatch.setattr(VideoEncoder, "encode_video", lambda self, video: counts.append(len(video)) or encode(self, video))
    return counts


def test_an_index_holds_every_video_of_every_kind_and_names_the_broken_ones(copy, capsys, encoded, monkeypatch):
    monkeypatch.setattr(data, "probe", None)   # nothing is opened again, not even broken files
    search.main(indexing(copy))
    said = capsys.readouterr()
    assert "52 windows of 51 videos" in said.out and "4 broken" in said.out and encoded == []
    for name, reason in BROKEN.items():
        assert f"broken: {copy / 'videos' / name}: {reason}" in said.err
    assert said.err.count("broken: ") == 4 and "notes" not in said.err
    assert sorted(map(len, indexed(copy).values())) == [1] * 50 + [2]


def test_a_window_holds_what_the_branch_says_of_its_frames(made):
    encoder, _ = model.load_encoder(TINY, "", torch.device("cpu"))
    frames, _ = stacked(data.sample_frames(made / "videos" / "two.mp4", 8, "uniform", window=(4, 8)))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(encoder.encode_video(data.eval_pixels(frames, 64)[None]), dim=1)[0]
    assert torch.allclose(indexed(made)["two.mp4"][1], expected, atol=1e-5)


def test_renamed_videos_move_changed_ones_are_encoded_anew_and_removed_ones_leave(copy, encoded, capsys):
    before, videos = indexed(copy), copy / "videos"
    os.rename(videos / "mp4" / "0.mp4", videos / "elsewhere.mp4")
    os.rename(videos / "mp4" / "1.mp4", videos / "swap")                    # two swap their names
    os.rename(videos / "mp4" / "2.mp4", videos / "mp4" / "1.mp4")
    os.rename(videos / "swap", videos / "mp4" / "2.mp4")
    os.remove(videos / "avi" / "0.avi")
    shutil.copyfile(videos / "avi" / "2.avi", videos / "avi" / "1.avi")     # changed
    shutil.copyfile(videos / "mkv" / "2.mkv", videos / "text.mp4")          # repaired
    search.main(indexing(copy))
    after = indexed(copy)
    assert sum(encoded) == 2 and "52 windows of 51 videos" in capsys.readouterr().out
    same = {"elsewhere.mp4": "mp4/0.mp4", "mp4/1.mp4": "mp4/2.mp4", "mp4/2.mp4": "mp4/1.mp4", "avi/1.avi": "avi/2.avi", "text.mp4": "mkv/2.mkv"}
    assert after.keys() == before.keys() - {"mp4/0.mp4", "avi/0.avi"} | {"elsewhere.mp4", "text.mp4"}
    assert all(torch.allclose(after[name], before[same.get(name, name)], atol=1e-6) for name in after)


def stop_after(monkeypatch, groups):
    """Ctrl-C in the middle of the work."""
    calls, encode = [], VideoEncoder.encode_video

    def stopped(self, video):
        calls.append(1)
        if len(calls) > groups:
            raise KeyboardInterrupt
        return encode(self, video)
    monkeypatch.setattr(VideoEncoder, "encode_video", stopped)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_index_goes_on_as_if_nothing_had_happened(made, tmp_path, monkeypatch, workers):
    (tmp_path / "videos").mkdir()
    for name in ("two.mp4", "text.mp4", "ts/0.ts", "mkv/0.mkv"):
        shutil.copy2(made / "videos" / name, tmp_path / "videos")
    straight = indexing(tmp_path, window=0.5, batch_size=3, workers=workers)   # 16 windows of two.mp4, 4 or so of the others
    search.main(straight)
    whole, resumed = (tmp_path / "index").read_bytes(), dataclasses.replace(straight, index=str(tmp_path / "resumed"))
    for groups in (1, 3):
        with monkeypatch.context() as patch:
            stop_after(patch, groups)
            with pytest.raises(KeyboardInterrupt):
                search.main(resumed)
        assert (tmp_path / "resumed").read_bytes() != whole
    search.main(resumed)
    assert (tmp_path / "resumed").read_bytes() == whole


def test_a_killed_index_goes_on_from_its_last_save_and_encodes_only_the_rest(made, tmp_path, monkeypatch, encoded, capsys):
    (tmp_path / "videos").mkdir()
    shutil.copy2(made / "videos" / "two.mp4", tmp_path / "videos")
    states, save = [], search.write_index

    def keep(path, *rest):
        save(path, *rest)
        states.append(open(path, "rb").read())
    monkeypatch.setattr(search, "write_index", keep)
    cfg = indexing(tmp_path, window=1, batch_size=3, save_every=0)
    search.main(cfg)
    assert encoded == [3, 3, 2] and len(states) == 4
    capsys.readouterr()
    (tmp_path / "index").write_bytes(states[1])   # the disk of a machine that was switched off after the second group
    search.main(searching(tmp_path, TWO[0], top=100))
    said = capsys.readouterr()
    assert len(hits(said.out)) == 6 and "1 of 1 files are not indexed yet" in said.err
    search.main(cfg)
    assert encoded == [3, 3, 2, 2] and (tmp_path / "index").read_bytes() == states[-1]


def test_a_long_video_is_read_a_group_of_windows_at_a_time(tmp_path, encoded, monkeypatch):
    (tmp_path / "videos").mkdir()
    film(tmp_path / "videos" / "long.mkv", "libx264", (np.full((64, 64, 3), i % 250, np.uint8) for i in range(300)), rate=1)   # 5 minutes
    asked, at = [], data.frames
    monkeypatch.setattr(data, "frames", lambda path, times: asked.append(len(times)) or at(path, times))
    search.main(indexing(tmp_path, batch_size=10))
    assert encoded == [10] * 7 + [5] and asked == [80] * 7 + [40]


def test_a_video_that_claims_a_century_is_broken(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    film(tmp_path / "videos" / "a.mkv", "libx264", [np.zeros((64, 64, 3), np.uint8)] * 2, {"g": "1"}, pts=[0, 3_000_000_000], rate=1)
    search.main(indexing(tmp_path))
    said = capsys.readouterr()
    assert "0 windows of 0 videos" in said.out and "claims to last 833333 hours" in said.err
    refused("holds no windows", **vars(searching(tmp_path, "a red circle")))


@pytest.mark.parametrize("options, message", [
    ({"window": 2.0}, "made with the window 4.0, not 2.0"), ({"window": float("nan")}, "--window nan"), ({"what": "nowhere"}, "nowhere: no such folder"),
    ({"what": ""}, "give the folder"), ({"batch_size": 0}, "--batch_size 0"), ({"what": TINY, "index": "fresh"}, "no videos in it"),
    ({"what": ROOT}, "made with the folder")])
def test_indexing_refuses_what_it_cannot_use_and_leaves_the_index(made, options, message):
    before = (made / "index").read_bytes()
    refused(message, **{**vars(indexing(made)), **options})
    assert (made / "index").read_bytes() == before


def other_weights(folder):
    """The tiny weights, but one number."""
    shutil.copytree(os.path.join(TINY, "clip"), folder / "clip")
    tensors = {name: t.clone() for name, t in weightfile.read_file(os.path.join(TINY, "branch.pth")).items()}
    tensors["backbone.balance1"][0] += 1
    training.save_checkpoint(folder / "branch.pth", {"state_dict": tensors})
    return str(folder)


def test_an_index_is_not_mixed_with_other_weights(made, tmp_path):
    other = other_weights(tmp_path)
    refused("made with the weights", **vars(indexing(made, weights=other)))
    refused("made with other weights", **vars(searching(made, "a red circle", weights=other)))


@pytest.mark.parametrize("damage", [lambda whole: whole[:-100], lambda whole: b"mine", lambda whole: whole.replace(b"mkv/0.mkv", b"mkv\\0.mkv"),
                                    lambda whole: whole.replace(b'"files"', b'"filez"'), lambda whole: b"", lambda whole: whole[:40] + whole[41:]])
def test_a_damaged_index_is_refused_and_kept(made, tmp_path, damage):
    broken = damage((made / "index").read_bytes())
    (tmp_path / "index").write_bytes(broken)
    (tmp_path / "videos").mkdir()
    for cfg in (indexing(tmp_path), searching(tmp_path, "a red circle")):
        refused(f"^{tmp_path / 'index'}: ", **vars(cfg))
    assert (tmp_path / "index").read_bytes() == broken


# ---------------------------------------------------------------------------------------------------- search
def hits(out):
    """[(score, span, file)] of what search prints."""
    return [(float(line.split("  ")[0]), line.split("  ")[1], line.split("  ", 2)[2]) for line in out.splitlines()]


@pytest.mark.parametrize("text, span", [(TWO[0], "0.0-4.0 s"), (TWO[1], "4.0-8.0 s")])
def test_search_finds_the_moment_in_a_video_of_two(made, capsys, text, span):
    search.main(searching(made, text))
    found = hits(capsys.readouterr().out)
    assert len(found) == 5 and found[0][1:] == (span, str(made / "videos" / "two.mp4"))
    assert [score for score, *_ in found] == sorted((score for score, *_ in found), reverse=True)
    assert found[1][0] < found[0][0]


def test_search_scores_are_the_cosines_of_text_and_window(made, capsys):
    search.main(searching(made, TWO[0], top=100))
    found = hits(capsys.readouterr().out)
    encoder, tokenizer = model.load_encoder(TINY, "", torch.device("cpu"))
    text = model.encode_texts(encoder, tokenizer, TWO[:1], 77, torch.device("cpu"))[0]
    scores = {os.path.join(made, "videos", name): (f @ text).tolist() for name, f in indexed(made).items()}
    assert len(found) == 52 and all(min(abs(score - s) for s in scores[file]) < 0.00051 for score, _, file in found)


def test_the_sheet_has_a_picture_of_each_hit(made, tmp_path, capsys):
    search.main(searching(made, TWO[0], top=3, sheet=str(tmp_path / "hits.png")))
    sheet = np.asarray(Image.open(tmp_path / "hits.png"))
    assert sheet.shape == (2 * 204, 2 * 244, 3)
    [(_, frame)] = data.frames(made / "videos" / "two.mp4", [2.0])
    assert np.array_equal(sheet[2:182, 2:242], data.boxed(frame).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("options, message", [
    ({"what": " "}, "needs a text"), ({"index": "nowhere"}, "nowhere: no such index; `python search.py index FOLDER`"), ({"top": 0}, "--top 0"),
    ({"sheet": "hits.mp4"}, "must end in .png")])
def test_search_refuses_what_it_cannot_use(made, options, message):
    refused(message, **{**vars(searching(made, "a red circle")), **options})


def test_a_hit_that_is_gone_is_said_to_be_gone(copy, capsys):
    os.remove(copy / "videos" / "two.mp4")
    refused("two.mp4: No such file", **vars(searching(copy, TWO[0], sheet=str(copy / "hits.png"))))
    assert hits(capsys.readouterr().out)[0][1] == "0.0-4.0 s" and not (copy / "hits.png").exists()


# ---------------------------------------------------------------------------------------------------- command line
def test_flags_may_stand_between_the_words_and_a_flag_may_be_a_word_of_python():
    cfg = cli.parse(Config, ["search", "--top", "3", "a dog"], **search.FLAGS)
    assert (cfg.stage, cfg.what, cfg.top) == ("search", "a dog", 3)


def test_the_command_line_searches_in_any_file_name_and_ends_in_one_line_on_bad_input(made, tmp_path):
    (tmp_path / "videos").mkdir()
    shutil.copy(made / "videos" / "two.mp4", os.fsencode(tmp_path / "videos") + b"/\xff.mp4")
    search.main(indexing(tmp_path))
    command = [sys.executable, os.path.join(ROOT, "search.py"), "search", TWO[0], "--weights", TINY, "--index"]
    done = subprocess.run([*command, str(tmp_path / "index")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[0].endswith("0.0-4.0 s  " + str(tmp_path / "videos" / "\\udcff.mp4")) and not done.stderr
    done = subprocess.run([*command, "nowhere"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "no such index" in done.stderr
