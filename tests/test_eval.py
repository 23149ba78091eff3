"""eval_retrieval.py: metrics as worked by hand, data sets as released, and an index that is right whatever happens to its folder."""
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

import common
import data
import eval_retrieval
import shapes
import weightfile
from common import UserError
from eval_retrieval import SETTINGS, Config, retrieval_metrics
from model import VideoEncoder
from test_frames import film

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.join(ROOT, "weights", "tiny")


def config(**options):
    return Config(**{"weights": TINY, "workers": 0, "device": "cpu", **options})


def refused(message, **options):
    with pytest.raises(UserError, match=message) as error:
        eval_retrieval.main(config(**options))
    assert "\n" not in str(error.value)


def table(out):
    """{what: numbers} of a printed table."""
    return {line[:36].strip(): [float(number) for number in line[36:].split()] for line in out.splitlines()[2:]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Eight clips of the toy world and their captions."""
    folder = tmp_path_factory.mktemp("world")
    rows = []
    for i, clip in enumerate(shapes.world(0, 0, True)[:16:2]):
        shapes.write_video(str(folder / f"{i}.mp4"), [shapes.draw(clip, (k + 0.5) / 24) for k in range(24)])
        rows.append({"video": f"{i}.mp4", "caption": clip.caption})
    write(folder / "captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write(path, what):
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return str(path)


def scoring(world, **options):
    return config(**{"annotations": str(world / "captions.jsonl"), "root": str(world), **options})


# ---------------------------------------------------------------------------------------------------- metrics
def test_metrics_equal_the_recorded_ones_of_the_released_code():
    cases = weightfile.read_file(os.path.join(ROOT, "tests", "fixtures", "retrieval_metric.safetensors"))
    for name in ("random", "one", "two"):
        video, text = (torch.nn.functional.normalize(cases[f"{name}.{what}"], dim=1) for what in ("video", "text"))
        found = retrieval_metrics(text @ video.T)
        for ours, theirs in (("R@1", "R1"), ("R@5", "R5"), ("R@10", "R10"), ("MdR", "MdR"), ("MnR", "MnR")):
            assert found[ours] == pytest.approx(cases[f"{name}.{theirs}"].item(), rel=1e-5)


def test_ties_are_a_fair_coin():
    similarity = torch.tensor([[1.0, 1, 0], [1, 1, 1], [0, 1, 2]])   # tied with one, tied with two, alone
    assert eval_retrieval.recall_at_k(similarity, 1) == pytest.approx(100 * (1 / 2 + 1 / 3 + 1) / 3)
    assert eval_retrieval.recall_at_k(similarity, 2) == pytest.approx(100 * (1 + 2 / 3 + 1) / 3)
    assert retrieval_metrics(similarity)["MnR"] == pytest.approx((1.5 + 2 + 1) / 3)


def test_captions_of_one_video_do_not_compete_and_the_best_of_them_counts():
    similarity = torch.tensor([[.9, .1, .1], [.2, .5, .5], [.3, .3, .1], [.1, .2, .8]])   # captions x videos
    right = torch.tensor([0, 0, 1, 2])[:, None] == torch.arange(3)
    found = retrieval_metrics(similarity, right)   # ranks 1, 3, 1.5 (a tie), 1
    assert (found["R@1"], found["MdR"], found["MnR"]) == (62.5, 1.25, 1.625)
    found = retrieval_metrics(similarity.T, right.T)   # ranks 1, 2 (behind a foreign caption, not behind none), 1
    assert (found["R@1"], found["MdR"], found["MnR"]) == pytest.approx((200 / 3, 1, 4 / 3))
    tied = torch.tensor([[.5, .5, .5]])   # two own captions and a foreign one: one coin, not two
    assert eval_retrieval.recall_at_k(tied, 1, torch.tensor([[True, True, False]])) == 50


def test_similarities_that_are_not_numbers_are_no_success():
    with pytest.raises(UserError, match="not numbers"):
        retrieval_metrics(torch.tensor([[float("nan"), 0], [0, 1]]))


# ---------------------------------------------------------------------------------------------------- encode
def test_a_video_with_several_captions_is_read_once_and_has_a_row_for_each(world, tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", {"1.mp4": ["one", "two"], "0.mp4": ["three"]})
    dataset = data.RetrievalDataset(path, world, 4, 64)
    asked, get = [], data.RetrievalDataset.__getitem__
    monkeypatch.setattr(data.RetrievalDataset, "__getitem__", lambda self, i: asked.append(i) or get(self, i))
    encoder, tokenizer = eval_retrieval.load_encoder(TINY, "", torch.device("cpu"))
    branch, mean, text, broken = eval_retrieval.encode(encoder, tokenizer, dataset, SETTINGS["own"], torch.device("cpu"))
    assert asked == [0, 2] and branch.shape == mean.shape == text.shape == (3, 128) and broken == []
    assert torch.equal(branch[0], branch[1]) and not torch.equal(branch[1], branch[2])
    assert torch.allclose(branch[2], torch.nn.functional.normalize(encoder.encode_video(data.normalise(get(dataset, 2)[0])[None]), dim=1), atol=1e-6)


def encode_in_a_group(rank, size, folder):
    if size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.set_num_threads(1)
    encoder, tokenizer = eval_retrieval.load_encoder(TINY, "", torch.device("cpu"))
    dataset = data.RetrievalDataset(os.path.join(folder, "a.jsonl"), folder, 8, 64, mode="uniform", skip=True)
    *features, broken = eval_retrieval.encode(encoder, tokenizer, dataset, SETTINGS["own"], torch.device("cpu"), batch_size=2)
    common.save_checkpoint(os.path.join(folder, f"{rank} of {size}"), {"features": features, "broken": broken})


def test_two_processes_have_both_the_features_of_one_in_its_order(world, tmp_path):
    for i in range(8):
        os.symlink(world / f"{i}.mp4", tmp_path / f"{i}.mp4")
    rows = (world / "captions.jsonl").read_text().splitlines()
    write(tmp_path / "a.jsonl", "\n".join([*rows[:3], '{"video": "gone.mp4", "caption": "x"}', *rows[3:], '{"video": "1.mp4", "caption": "y"}']))
    encode_in_a_group(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(encode_in_a_group, (2, str(tmp_path)), 2)
    one, *both = (common.load_checkpoint(tmp_path / name) for name in ("0 of 1", "0 of 2", "1 of 2"))
    for two in both:
        assert two["broken"] == one["broken"] and len(one["broken"]) == 1
        for a, b in zip(one["features"], two["features"], strict=True):
            assert len(a) == 9 and torch.allclose(a, b, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- score
def test_both_models_and_both_directions_are_printed_and_the_branch_finds_the_clips(world, capsys):
    eval_retrieval.main(scoring(world))
    out = capsys.readouterr().out
    assert "evaluated 8 of 8 captions" in out and "paper" not in out
    assert list(table(out)) == [f"{name}, {way}" for name in ("mean-pooled CLIP", "branch") for way in ("text to video", "video to text")]
    assert table(out)["branch, text to video"][1] == 100   # R@5


def test_a_broken_video_is_an_error_in_evaluation_unless_it_may_be_left_out(world, tmp_path, capsys):
    rows = (world / "captions.jsonl").read_text()
    gone, bad = '{"video": "nowhere.mp4", "caption": "a red ring"}\n', json.dumps({"video": str(tmp_path / "bad.mp4"), "caption": "a"})
    write(tmp_path / "bad.mp4", "not a video")
    refused("lacks 1 of 9 videos, the first is nowhere.mp4", **vars(scoring(world, annotations=write(tmp_path / "a", rows + gone))))
    refused("bad.mp4: not a video", **vars(scoring(world, annotations=write(tmp_path / "b", rows + bad))))
    assert capsys.readouterr().out == ""   # no number over fewer videos than asked for
    eval_retrieval.main(scoring(world, annotations=write(tmp_path / "c", rows + gone + bad), skip_broken=True))
    skipping = capsys.readouterr()
    assert "evaluated 8 of 10 captions" in skipping.out and "nowhere.mp4" in skipping.err and "bad.mp4" in skipping.err
    eval_retrieval.main(scoring(world))
    assert skipping.out.splitlines()[2:] == capsys.readouterr().out.splitlines()[2:]
    refused("none of 1 videos", **vars(scoring(world, annotations=write(tmp_path / "d", gone), skip_broken=True)))


def test_saved_features_are_scored_again_without_model_and_videos(world, tmp_path, capsys, monkeypatch):
    file = str(tmp_path / "scores.safetensors")
    eval_retrieval.main(scoring(world, save=file))
    first = capsys.readouterr().out
    saved = weightfile.read_file(file)
    assert torch.equal(saved["similarity.branch"], saved["text"] @ saved["branch"].T)
    monkeypatch.setattr(eval_retrieval, "load_encoder", None)
    eval_retrieval.main(config(from_=file, weights="nowhere"))
    assert capsys.readouterr().out == first
    refused("not a file that --save wrote", from_=os.path.join(TINY, "branch.pth"))
    weightfile.write_safetensors(file, {**saved, "right": saved["right"] + 1}, weightfile.read_metadata(file))
    refused("not a file that --save wrote", from_=file)


def test_the_papers_numbers_stand_beside_ours_where_the_sets_match_and_only_there(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SETTINGS, "msrvtt", dataclasses.replace(SETTINGS["msrvtt"], size=(8,)))
    file = str(tmp_path / "scores.safetensors")
    eval_retrieval.main(scoring(world, dataset="msrvtt", save=file))
    found = table(capsys.readouterr().out)
    assert len(found) == 6 and found["BT-Adapter (paper), text to video"] == [40.9, 64.7, 73.5]
    eval_retrieval.report(*eval_retrieval.read_scores(file)[:2], {**weightfile.read_metadata(file), "total": "9"})   # one was left out
    assert len(table(capsys.readouterr().out)) == 4


# ---------------------------------------------------------------------------------------------------- the data sets' own files
@pytest.mark.parametrize("name, rows, captions, frames, short", [
    ("msrvtt", {"0.mp4": ["a", "b"], "1.mp4": ["c"]}, ["a", "b", "c"], 12, 64),
    ("didemo", {"0.mp4": ["a", "b"], "1.mp4": ["c"]}, ["a b", "c"], 64, 73),   # 256 for 224 is 73 for 64
    ("lsmdc", {"0.mp4": "a", "1": "c"}, ["a", "c"], 64, 73),
    ("activitynet", [{"video": "0.mp4", "caption": ["a", "b"]}, {"video": "1.mp4", "caption": ["c"]}], ["a b", "c"], 64, 73)])
def test_released_annotations_and_settings(world, tmp_path, monkeypatch, name, rows, captions, frames, short):
    setting = dataclasses.replace(SETTINGS[name], size=(len(captions),))
    dataset = eval_retrieval.open_dataset(scoring(world, dataset=name, annotations=write(tmp_path / "a", rows)), setting, 64)
    assert dataset.captions == captions
    expected = data.eval_pixels(data.sample_frames(world / "1.mp4", frames, "test")[0], 64, short)
    assert torch.equal(dataset[len(captions) - 1][0], expected)


@pytest.mark.parametrize("name, count, what", [("msrvtt", "1000", "pairs"), ("lsmdc", "1000", "pairs"), ("didemo", "1003 or 1004", "pairs"),
                                               ("activitynet", "4917", "pairs")])
def test_a_test_set_of_another_size_is_refused(world, name, count, what):
    refused(f"the test set of {name} has {count} {what}, found 8", **vars(scoring(world, dataset=name)))


def test_activitynet_as_folders_of_frames_with_a_hole_and_as_a_file(world, tmp_path):
    (tmp_path / "v_1").mkdir()
    for i in range(1, 41):
        Image.new("L", (90, 70), 6 * i).save(tmp_path / "v_1" / f"{i:06d}.jpg", quality=95)
    os.remove(tmp_path / "v_1" / "000020.jpg")
    shutil.copy(world / "0.mp4", tmp_path / "v_2.mp4")
    annotations = write(tmp_path / "a", [{"video": f"v_{i}.mp4", "caption": ["a"]} for i in (1, 2)])
    cfg = scoring(tmp_path, dataset="activitynet", annotations=annotations, num_file=write(tmp_path / "n", {"v_1": 40, "v_2": 9}))
    dataset = eval_retrieval.open_dataset(cfg, dataclasses.replace(SETTINGS["activitynet"], size=(2,), num_frames=3), 64)
    pixels, _ = dataset[0]
    assert pixels.shape == dataset[1][0].shape == (3, 3, 64, 64)
    assert data.uniform_sample_test(40, 3) == [6, 19, 32]   # from 0; the files count from 1, and the 20th is missing
    assert (pixels.float().mean((1, 2, 3)) / 6).round().tolist() == [7, 21, 33]
    os.remove(tmp_path / "v_1" / "000021.jpg")
    with pytest.raises(data.VideoError, match="000020.jpg"):   # two in a row
        dataset[0]


@pytest.mark.parametrize("name, what, message", [
    ("num_file", "[1]", "needs one JSON dict"), ("num_file", '{"v": 0}', "above 0"), ("num_file", '{"v": true}', "above 0"),
    ("classes", "a\n\nb", "line 2: needs the name"), ("classes", "", "line 1: needs the name"),
    ("labels", "v.mp4 3", "line 1: needs a path and a label from 1 to 2"), ("labels", "v.mp4 1\n\nv.mp4 1", "line 2: needs"),
    ("labels", "v.mp4 0", "line 1"), ("labels", "v.mp4 1\nv.mp4 x", "line 2"), ("labels", "", "no rows")])
def test_bad_files_of_counts_classes_and_labels_are_user_errors_that_name_the_line(tmp_path, name, what, message):
    path = write(tmp_path / "a", what)
    read = {"num_file": data.read_counts, "classes": data.read_classes, "labels": lambda path: data.read_labels(path, 2, -1)}[name]
    with pytest.raises(UserError, match=message):
        read(path)


# ---------------------------------------------------------------------------------------------------- recognition
def test_labels_are_the_last_word_of_a_line_with_the_offset_of_the_data_set(tmp_path):
    rows = data.read_labels(write(tmp_path / "a", "playing guitar/x y.mp4 0\nb.mp4\t2\n"), 3, 0)
    assert rows == [("playing guitar/x y.mp4", 0), ("b.mp4", 2)]
    assert data.read_labels(write(tmp_path / "a", "b.mp4\t1\nc.mp4\t3"), 3, -1) == [("b.mp4", 0), ("c.mp4", 2)]


def test_top_1_and_top_5_are_those_worked_by_hand(capsys):
    similarity = torch.zeros(4, 8)
    similarity[0, 3], similarity[1, :6], similarity[2, :4] = 1, 1, torch.tensor([.4, .3, .2, .1])   # alone; one of six tied; the fourth
    right = torch.tensor([3, 2, 3, 0])                                                             # ... and one of eight tied
    about = {"task": "recognition", "dataset": "own", "annotations": "x", "total": "4"}
    eval_retrieval.report({"mean": similarity, "branch": similarity}, right, about)
    found = table(capsys.readouterr().out)
    assert found["branch"] == found["mean-pooled CLIP"] == pytest.approx([100 * (1 + 1 / 6 + 0 + 1 / 8) / 4, 100 * (1 + 5 / 6 + 1 + 5 / 8) / 4], abs=0.05)


def test_recognition_of_the_toy_worlds_colours(world, tmp_path, capsys, monkeypatch):
    rows = [json.loads(line) for line in (world / "captions.jsonl").read_text().splitlines()]
    classes = write(tmp_path / "classes", "\n".join(shapes.COLOURS))
    colour = {row["video"]: next(i for i, name in enumerate(shapes.COLOURS) if name in row["caption"]) for row in rows}
    labels = write(tmp_path / "labels", "".join(f"{video}\t{label + 1}\n" for video, label in colour.items()))
    monkeypatch.setitem(SETTINGS, "hmdb51", dataclasses.replace(SETTINGS["hmdb51"], classes=8, size=(8,)))
    cfg = scoring(world, dataset="hmdb51", annotations=labels, classes=classes, save=str(tmp_path / "s"))
    eval_retrieval.main(cfg)
    out = capsys.readouterr().out
    saved = weightfile.read_file(cfg.save)
    assert "evaluated 8 of 8 videos, 16 frames" in out and saved["right"].tolist() == list(colour.values())
    top = (saved["branch"] @ saved["text"].T).argmax(1)
    assert table(out)["branch"][0] == pytest.approx(100 * (top == saved["right"]).float().mean().item(), abs=0.05)
    assert table(out)["BT-Adapter (paper)"] == [54.6, 79.7]
    eval_retrieval.main(config(from_=cfg.save))
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("options, message", [
    ({"dataset": "k400"}, "needs --classes"), ({"dataset": "msrvtt", "classes": "x"}, "has no names of classes"), ({"annotations": ""}, "score needs"),
    ({"dataset": "imagenet"}, "--dataset imagenet: choose"), ({"num_file": "x"}, "has no folders of frames"), ({"batch_size": 0}, "--batch_size 0"),
    ({"weights": "nowhere"}, "nowhere"), ({"from_": "nowhere"}, "nowhere: No such file"), ({"stage": "sing"}, "sing: no such stage"),
    ({"what": "folder"}, "score needs --annotations")])
def test_scoring_refuses_what_it_cannot_use(world, options, message):
    refused(message, **{**vars(scoring(world)), **options})


def test_a_set_with_too_few_classes_is_refused(world, tmp_path):
    options = {"classes": write(tmp_path / "c", "run\njump"), "annotations": write(tmp_path / "a", "0.mp4 1\n")}
    refused("k400 has 400 classes, found 2", **{**vars(scoring(world, dataset="k400")), **options})


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
    eval_retrieval.main(indexing(folder))
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the folder and its index, free to be changed."""
    shutil.copytree(made / "videos", tmp_path / "videos")   # with times
    before, files, _ = eval_retrieval.read_index(str(made / "index"))
    eval_retrieval.write_index(str(tmp_path / "index"), {**before, "folder": str(tmp_path / "videos")}, files)
    return tmp_path


def indexing(folder, **options):
    return config(stage="index", what=str(folder / "videos"), index=str(folder / "index"), **options)


def searching(folder, text, **options):
    return config(stage="search", what=text, index=str(folder / "index"), **options)


def indexed(folder):
    """{name: features (n, P)} of an index on the disk, without broken files."""
    return {name: torch.cat(e.features) for name, e in eval_retrieval.read_index(str(folder / "index"))[1].items() if e.features}


@pytest.fixture
def encoded(monkeypatch):
    """A list of how many windows were encoded at a time."""
    counts, encode = [], VideoEncoder.encode_video
    monkeypatch.setattr(VideoEncoder, "encode_video", lambda self, video: counts.append(len(video)) or encode(self, video))
    return counts


def test_an_index_holds_every_video_of_every_kind_and_names_the_broken_ones(copy, capsys, encoded, monkeypatch):
    monkeypatch.setattr(data, "probe", None)   # nothing is opened again, not even broken files
    eval_retrieval.main(indexing(copy))
    said = capsys.readouterr()
    assert "52 windows of 51 videos" in said.out and "4 broken" in said.out and encoded == []
    for name, reason in BROKEN.items():
        assert f"broken: {copy / 'videos' / name}: {reason}" in said.err
    assert said.err.count("broken: ") == 4 and "notes" not in said.err
    assert sorted(map(len, indexed(copy).values())) == [1] * 50 + [2]


def test_a_window_holds_what_the_branch_says_of_its_frames(made):
    encoder, _ = eval_retrieval.load_encoder(TINY, "", torch.device("cpu"))
    frames, _ = data.sample_frames(made / "videos" / "two.mp4", 8, "uniform", window=(4, 8))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(encoder.encode_video(data.normalise(data.eval_pixels(frames, 64))[None]), dim=1)[0]
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
    eval_retrieval.main(indexing(copy))
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
    eval_retrieval.main(straight)
    whole, resumed = (tmp_path / "index").read_bytes(), dataclasses.replace(straight, index=str(tmp_path / "resumed"))
    for groups in (1, 3):
        with monkeypatch.context() as patch:
            stop_after(patch, groups)
            with pytest.raises(KeyboardInterrupt):
                eval_retrieval.main(resumed)
        assert (tmp_path / "resumed").read_bytes() != whole
    eval_retrieval.main(resumed)
    assert (tmp_path / "resumed").read_bytes() == whole


def test_a_killed_index_goes_on_from_its_last_save_and_encodes_only_the_rest(made, tmp_path, monkeypatch, encoded, capsys):
    (tmp_path / "videos").mkdir()
    shutil.copy2(made / "videos" / "two.mp4", tmp_path / "videos")
    states, save = [], eval_retrieval.write_index

    def keep(path, *rest):
        save(path, *rest)
        states.append(open(path, "rb").read())
    monkeypatch.setattr(eval_retrieval, "write_index", keep)
    cfg = indexing(tmp_path, window=1, batch_size=3, save_every=0)
    eval_retrieval.main(cfg)
    assert encoded == [3, 3, 2] and len(states) == 4
    capsys.readouterr()
    (tmp_path / "index").write_bytes(states[1])   # the disk of a machine that was switched off after the second group
    eval_retrieval.main(searching(tmp_path, TWO[0], top=100))
    said = capsys.readouterr()
    assert len(hits(said.out)) == 6 and "1 of 1 files are not indexed yet" in said.err
    eval_retrieval.main(cfg)
    assert encoded == [3, 3, 2, 2] and (tmp_path / "index").read_bytes() == states[-1]


def test_a_long_video_is_read_a_group_of_windows_at_a_time(tmp_path, encoded, monkeypatch):
    (tmp_path / "videos").mkdir()
    film(tmp_path / "videos" / "long.mkv", "libx264", (np.full((64, 64, 3), i % 250, np.uint8) for i in range(300)), rate=1)   # 5 minutes
    asked, at = [], data.frames_at
    monkeypatch.setattr(data, "frames_at", lambda path, times, **options: asked.append(len(times)) or at(path, times, **options))
    eval_retrieval.main(indexing(tmp_path, batch_size=10))
    assert encoded == [10] * 7 + [5] and asked == [80] * 7 + [40]


def test_a_video_that_claims_a_century_is_broken(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    film(tmp_path / "videos" / "a.mkv", "libx264", [np.zeros((64, 64, 3), np.uint8)] * 2, {"g": "1"}, pts=[0, 3_000_000_000], rate=1)
    eval_retrieval.main(indexing(tmp_path))
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
    common.save_checkpoint(folder / "branch.pth", {"state_dict": tensors})
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
    eval_retrieval.main(searching(made, text))
    found = hits(capsys.readouterr().out)
    assert len(found) == 5 and found[0][1:] == (span, str(made / "videos" / "two.mp4"))
    assert [score for score, *_ in found] == sorted((score for score, *_ in found), reverse=True)
    assert found[1][0] < found[0][0]


def test_search_scores_are_the_cosines_of_text_and_window(made, capsys):
    eval_retrieval.main(searching(made, TWO[0], top=100))
    found = hits(capsys.readouterr().out)
    encoder, tokenizer = eval_retrieval.load_encoder(TINY, "", torch.device("cpu"))
    text = eval_retrieval.encode_texts(encoder, tokenizer, TWO[:1], 77, torch.device("cpu"))[0]
    scores = {os.path.join(made, "videos", name): (f @ text).tolist() for name, f in indexed(made).items()}
    assert len(found) == 52 and all(min(abs(score - s) for s in scores[file]) < 0.00051 for score, _, file in found)


def test_the_sheet_has_a_picture_of_each_hit(made, tmp_path, capsys):
    eval_retrieval.main(searching(made, TWO[0], top=3, sheet=str(tmp_path / "hits.png")))
    sheet = np.asarray(Image.open(tmp_path / "hits.png"))
    assert sheet.shape == (2 * 204, 2 * 244, 3)
    frame = data.frames_at(made / "videos" / "two.mp4", [2.0], keep=data.boxed)[0][0]
    assert np.array_equal(sheet[2:182, 2:242], frame.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("options, message", [
    ({"what": " "}, "needs a text"), ({"index": "nowhere"}, "nowhere: no such index; `python eval_retrieval.py index FOLDER`"), ({"top": 0}, "--top 0"),
    ({"sheet": "hits.mp4"}, "must end in .png")])
def test_search_refuses_what_it_cannot_use(made, options, message):
    refused(message, **{**vars(searching(made, "a red circle")), **options})


def test_a_hit_that_is_gone_is_said_to_be_gone(copy, capsys):
    os.remove(copy / "videos" / "two.mp4")
    refused("two.mp4: No such file", **vars(searching(copy, TWO[0], sheet=str(copy / "hits.png"))))
    assert hits(capsys.readouterr().out)[0][1] == "0.0-4.0 s" and not (copy / "hits.png").exists()


# ---------------------------------------------------------------------------------------------------- command line
def test_flags_may_stand_between_the_words_and_a_flag_may_be_a_word_of_python():
    cfg = common.parse(Config, ["search", "--top", "3", "a dog"], **eval_retrieval.FLAGS)
    assert (cfg.stage, cfg.what, cfg.top) == ("search", "a dog", 3)
    assert common.parse(Config, ["--from", "x"], **eval_retrieval.FLAGS).from_ == "x"


def test_the_command_line_searches_in_any_file_name_and_ends_in_one_line_on_bad_input(made, tmp_path):
    (tmp_path / "videos").mkdir()
    shutil.copy(made / "videos" / "two.mp4", os.fsencode(tmp_path / "videos") + b"/\xff.mp4")
    eval_retrieval.main(indexing(tmp_path))
    command = [sys.executable, os.path.join(ROOT, "eval_retrieval.py"), "search", TWO[0], "--weights", TINY, "--index"]
    done = subprocess.run([*command, str(tmp_path / "index")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[0].endswith("0.0-4.0 s  " + str(tmp_path / "videos" / "\\udcff.mp4")) and not done.stderr
    done = subprocess.run([*command, "nowhere"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "no such index" in done.stderr
