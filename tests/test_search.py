"""search.py: an index that is right whatever happens to its folder."""
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
from plumbing.pictures import boxed
from plumbing.store import Store, state_of
from search import Config
from toy.world import Clip, draw, make_clips

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.join(ROOT, "weights", "tiny")


def indexing(folder, **options):
    return {"what": "index", "folder": str(folder / "videos"), "index": str(folder / "index"), **options}


def searching(folder, text, **options):
    return {"what": text, "index": str(folder / "index"), **options}


def run(options):
    search.main(Config(**{"weights": TINY, "workers": 0, "device": "cpu", **options}))


def refused(message, options):
    with pytest.raises(UserError, match=message) as error:
        run(options)
    assert "\n" not in str(error.value)


def hits(out):
    """[(score, span, file)] of what search prints."""
    return [(float(score), *rest) for score, *rest in (line.split("  ", 2) for line in out.splitlines())]


# ------------------------------------------------------------------------------------------- index
KINDS = {"mp4": "libx264", "mkv": "libx264", "mov": "mpeg4", "webm": "libvpx", "gif": "gif",
         "ts": "mpeg2video", "avi": "mpeg4", "mpg": "mpeg2video", "flv": "flv", "wmv": "wmv2"}
BROKEN = {"text.mp4": "not a video", "empty.avi": "not a video", "picture.mkv": "not a video",
          "cut.webm": ""}
TWO = ["a big red circle moves left in the middle", "a small blue star moves down on the left"]


def clip_of(caption, seconds):
    _, size, colour, shape, verb, way, *place = caption.split()
    clip = Clip(colour, shape, f"{verb} {way}", " ".join(place), size, (0.5,) * 6)
    return [draw(clip, (k + 0.5) / (12 * seconds)) for k in range(12 * seconds)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder `videos` with 51 videos, broken ones and other files, and its index."""
    folder = tmp_path_factory.mktemp("made")
    videos, clips = folder / "videos", make_clips(0, 1, True)
    for i, (kind, codec) in enumerate(sorted(KINDS.items())):
        (videos / kind).mkdir(parents=True)
        for k in range(5):
            pictures = [draw(clips[7 * (5 * i + k)], (t + 0.5) / 24) for t in range(24)]
            film(videos / kind / f"{k}.{kind}", codec, pictures, rate=25 if kind in ("ts", "mpg") else 12,
                 pix_fmt="rgb8" if kind == "gif" else "yuv420p")
    film(videos / "two.mp4", "libx264", [picture for text in TWO for picture in clip_of(text, 4)], rate=12)
    (videos / "text.mp4").write_text("not a video")
    (videos / "notes.txt").write_text("not a video either, and not called one")
    (videos / "empty.avi").touch()
    Image.new("RGB", (8, 8)).save(videos / "picture.mkv", "PNG")
    (videos / "cut.webm").write_bytes((videos / "webm" / "0.webm").read_bytes()[:300])
    run(indexing(folder))
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the folder and its index, free to be changed."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)   # with times
    return tmp_path


def indexed(folder):
    """{name: rows (n, P)} of the index, without broken files."""
    weights = [search.VERSION, *(state_of(os.path.join(TINY, name)) for name in ("clip", "branch.pth"))]
    tensors, about = Store(str(folder / "index")).get(["all", weights])
    table = json.loads(about["table"])
    parts = tensors["rows"].split([windows for *_, windows in table])
    names = [os.path.relpath(path, folder / "videos") for path, *_ in table]
    return {name: part for name, part in zip(names, parts) if len(part)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def encoded(monkeypatch):
    """A list of how many windows were encoded at a time."""
    counts, encode = [], VideoEncoder.encode_video

    def counted(self, video):
        counts.append(len(video))
        return encode(self, video)
    monkeypatch.setattr(VideoEncoder, "encode_video", counted)
    return counts


def test_an_index_holds_videos_of_every_kind_and_names_the_broken_ones(copy, capsys, encoded):
    run(indexing(copy))
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
        expected = encoder.encode_video(data.eval_pixels(frames, 64)[None])[0]
    assert torch.allclose(indexed(made)["two.mp4"][1], expected / expected.norm(), atol=1e-5)


def test_renamed_videos_move_changed_ones_are_encoded_and_removed_ones_leave(made, copy, encoded, capsys):
    before, videos = indexed(made), copy / "videos"
    os.rename(videos / "mp4" / "0.mp4", videos / "elsewhere.mp4")
    os.rename(videos / "mp4" / "1.mp4", videos / "swap")                    # two swap their names
    os.rename(videos / "mp4" / "2.mp4", videos / "mp4" / "1.mp4")
    os.rename(videos / "swap", videos / "mp4" / "2.mp4")
    os.remove(videos / "avi" / "0.avi")
    shutil.copyfile(videos / "avi" / "2.avi", videos / "avi" / "1.avi")     # changed
    shutil.copyfile(videos / "mkv" / "2.mkv", videos / "text.mp4")          # repaired
    run(indexing(copy))
    after = indexed(copy)
    assert sum(encoded) == 2 and "52 windows of 51 videos" in capsys.readouterr().out
    moved = {"elsewhere.mp4": "mp4/0.mp4", "mp4/1.mp4": "mp4/2.mp4", "mp4/2.mp4": "mp4/1.mp4",
             "avi/1.avi": "avi/2.avi", "text.mp4": "mkv/2.mkv"}
    assert after.keys() == before.keys() - {"mp4/0.mp4", "avi/0.avi"} | {"elsewhere.mp4", "text.mp4"}
    assert all(torch.allclose(after[name], before[moved.get(name, name)], atol=1e-6) for name in after)


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
def test_an_interrupted_index_goes_on_with_the_rest(made, tmp_path, monkeypatch, encoded, capsys, workers):
    (tmp_path / "videos").mkdir()
    for name in ("two.mp4", "text.mp4", "ts/0.ts", "mkv/0.mkv"):
        shutil.copy2(made / "videos" / name, tmp_path / "videos")
    cfg = indexing(tmp_path, window=0.5, batch_size=3, workers=workers)   # 16 windows of two.mp4
    run(cfg)
    straight, groups = indexed(tmp_path), list(encoded)
    shutil.rmtree(tmp_path / "index")
    encoded.clear()
    for _ in range(2):
        with monkeypatch.context() as patch:
            stop_after(patch, 3)
            with pytest.raises(KeyboardInterrupt):
                run(cfg)
    encoded.clear()
    run(cfg)
    assert sum(encoded) < sum(groups) and same(indexed(tmp_path), straight)


def test_a_long_video_is_read_a_group_of_windows_at_a_time(tmp_path, encoded, monkeypatch):
    (tmp_path / "videos").mkdir()
    pictures = (np.full((64, 64, 3), i % 250, np.uint8) for i in range(300))
    film(tmp_path / "videos" / "long.mkv", "libx264", pictures, rate=1)   # 5 minutes
    run(indexing(tmp_path, batch_size=10))
    assert encoded == [10] * 7 + [5]


def test_a_video_that_claims_a_century_is_broken(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    film(tmp_path / "videos" / "a.mkv", "libx264", [np.zeros((64, 64, 3), np.uint8)] * 2, {"g": "1"},
         pts=[0, 3_000_000_000], rate=1)
    run(indexing(tmp_path))
    said = capsys.readouterr()
    assert "0 windows of 0 videos" in said.out and "claims to last 833333 hours" in said.err
    run(searching(tmp_path, "a red circle"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("options, message", [
    ({"folder": "nowhere"}, "nowhere: no such folder"),
    ({"folder": ""}, "give `index FOLDER`"),
    ({"folder": TINY}, "no folder with videos in it"), 
    ({"weights": "nowhere"}, "nowhere: lacks clip .*, branch.pth .python -m weights get branch")])
def test_indexing_refuses_what_it_cannot_use_and_leaves_the_index(made, options, message):
    before = indexed(made)
    refused(message, {**indexing(made), **options})
    assert same(indexed(made), before)


def other_weights(folder):
    """The tiny weights, but one number."""
    shutil.copytree(os.path.join(TINY, "clip"), folder / "clip")
    tensors = {name: t.clone() for name, t in weightfile.read_file(os.path.join(TINY, "branch.pth")).items()}
    tensors["backbone.balance1"][0] += 1
    training.save_checkpoint(folder / "branch.pth", {"state_dict": tensors})
    return str(folder)


def test_an_index_is_not_mixed_with_other_weights_or_windows(made, tmp_path, encoded):
    other = other_weights(tmp_path)
    (tmp_path / "videos").mkdir()
    shutil.copy2(made / "videos" / "two.mp4", tmp_path / "videos")
    run(indexing(tmp_path))
    refused("no index of these weights", searching(tmp_path, "a red circle", weights=other))
    for options in ({"weights": other}, {}, {"window": 2.0}, {}):
        run(indexing(tmp_path, **options))
    assert encoded == [2, 2, 4] and len(indexed(tmp_path)["two.mp4"]) == 2


def test_an_index_lists_the_last_folder_alone(copy):
    run(indexing(copy))
    run({**indexing(copy), "folder": str(copy / "videos" / "mp4")})
    assert len(indexed(copy)) == 5


def test_damaged_files_of_an_index_are_refused_by_name_and_kept(copy):
    for file in (copy / "index").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    before = {file: file.read_bytes() for file in (copy / "index").iterdir()}
    for options in (indexing(copy), searching(copy, "a red circle")):
        refused(f"^{copy / 'index'}/[0-9a-f]+.safetensors: ", options)
    assert {file: file.read_bytes() for file in (copy / "index").iterdir()} == before


# ------------------------------------------------------------------------------------------- search
@pytest.mark.parametrize("text, span", [(TWO[0], "0.0-4.0 s"), (TWO[1], "4.0-8.0 s")])
def test_search_finds_the_moment_in_a_video_of_two(made, capsys, text, span):
    run(searching(made, text))
    found = hits(capsys.readouterr().out)
    assert len(found) == 5 and found[0][1:] == (span, str(made / "videos" / "two.mp4"))
    assert [score for score, *_ in found] == sorted((score for score, *_ in found), reverse=True)
    assert found[1][0] < found[0][0]


def test_search_scores_are_the_cosines_of_text_and_window(made, capsys):
    run(searching(made, TWO[0], top=100))
    found = hits(capsys.readouterr().out)
    encoder, tokenizer = model.load_encoder(TINY, "", torch.device("cpu"))
    text = model.encode_texts(encoder, tokenizer, TWO[:1], 77, torch.device("cpu"))[0]
    scores = {str(made / "videos" / name): rows @ text for name, rows in indexed(made).items()}
    assert len(found) == 52 and all((scores[file] - score).abs().min() < 0.00051 for score, _, file in found)


def test_the_sheet_has_a_picture_of_each_hit(made, tmp_path, capsys):
    run(searching(made, TWO[0], top=3, sheet=str(tmp_path / "hits.png")))
    assert capsys.readouterr().err == f"wrote {tmp_path / 'hits.png'}\n"
    sheet = np.asarray(Image.open(tmp_path / "hits.png"))
    assert sheet.shape == (2 * 204, 2 * 244, 3)
    [(_, frame)] = data.frames(made / "videos" / "two.mp4", [2.0])
    assert np.array_equal(sheet[2:182, 2:242], boxed(frame).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("options, message", [
    ({"what": " "}, "one text in quotes"), ({"folder": "dog"}, "one text in quotes"),
    ({"index": "nowhere"}, "nowhere: no index of these weights; `python search.py index FOLDER`")])
def test_search_refuses_what_it_cannot_use(made, options, message):
    refused(message, {**searching(made, "a red circle"), **options})


def test_a_hit_that_is_gone_is_said_to_be_gone(copy, capsys):
    run(indexing(copy))
    os.remove(copy / "videos" / "two.mp4")
    capsys.readouterr()
    refused("two.mp4: No such file", searching(copy, TWO[0], sheet=str(copy / "hits.png")))
    assert hits(capsys.readouterr().out)[0][1] == "0.0-4.0 s" and not (copy / "hits.png").exists()


# ------------------------------------------------------------------------------------------- command line
def test_flags_may_stand_between_the_words():
    cfg = cli.parse(Config, ["index", "--top", "3", "videos"], **search.FLAGS)
    assert (cfg.what, cfg.folder, cfg.top) == ("index", "videos", 3)


def test_the_command_line_takes_any_file_name_with_few_open_files_and_ends_in_one_line_on_bad_input(copy):
    os.rename(os.fsencode(copy / "videos" / "two.mp4"), os.fsencode(copy / "videos") + b"/\xff.mp4")
    done = []
    few = ["bash", "-c", 'ulimit -n 40; "$@"', "-", sys.executable, os.path.join(ROOT, "search.py")]
    for words in (["index", copy / "videos"], [TWO[0]], ["nothing", "--index", "nowhere"]):
        command = [*few, "--index", copy / "index", "--weights", TINY, *words]
        done.append(subprocess.run(command, capture_output=True, text=True))
    assert [each.returncode for each in done] == [0, 0, 2]
    assert "52 windows of 51 videos" in done[0].stdout and not done[1].stderr
    assert done[1].stdout.splitlines()[0].endswith(f"0.0-4.0 s  {copy}/videos/\\udcff.mp4")
    assert (done[2].stdout, done[2].stderr.count("\n")) == ("", 1) and "no index" in done[2].stderr
