"""eval_retrieval.py: the numbers of a table, and data sets as released."""
import dataclasses
import json
import os
import shutil

import pytest
import torch
from PIL import Image

import data
import eval_retrieval
import model
from eval_retrieval import SETTINGS, Config, EvaluationSet
from films import stacked
from plumbing import cli, training, weightfile
from plumbing.cli import UserError
from toy.world import COLOURS, film, make_clips, write_video

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
    for i, clip in enumerate(make_clips(0, 0, True)[:16:2]):
        write_video(str(folder / f"{i}.mp4"), film(clip))
        rows.append({"video": f"{i}.mp4", "caption": clip.caption})
    write(folder / "captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write(path, what):
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return str(path)


def scoring(world, **options):
    return config(**{"annotations": str(world / "captions.jsonl"), "root": str(world), **options})

# ---------------------------------------------------------------------------------------------------- encode
def test_a_video_with_several_captions_is_read_once_and_has_a_row_for_each(world, tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", {"1.mp4": ["one", "two"], "0.mp4": ["three"]})
    dataset = EvaluationSet(scoring(world, annotations=path), SETTINGS["own"], 64)
    asked, get = [], EvaluationSet.__getitem__
    monkeypatch.setattr(EvaluationSet, "__getitem__", lambda self, i: asked.append(i) or get(self, i))
    encoder, tokenizer = model.load_encoder(TINY, "", torch.device("cpu"))
    videos, branch, mean, broken = model.encode_videos(encoder, dataset, torch.device("cpu"))
    assert asked == [0, 2] and videos == ["1.mp4", "0.mp4"] and branch.shape == mean.shape == (2, 128) and broken == []
    assert torch.allclose(branch[1], torch.nn.functional.normalize(encoder.encode_video(get(dataset, 2)[0][None]), dim=1), atol=1e-6)


def encode_in_a_group(rank, size, folder):
    if size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.set_num_threads(1)
    encoder, tokenizer = model.load_encoder(TINY, "", torch.device("cpu"))
    cfg = config(annotations=os.path.join(folder, "a.jsonl"), root=folder, skip_broken=True)
    videos, branch, mean, broken = model.encode_videos(encoder, EvaluationSet(cfg, SETTINGS["own"], 64), torch.device("cpu"), batch_size=2)
    training.save_checkpoint(os.path.join(folder, f"{rank} of {size}"), {"videos": videos, "branch": branch, "mean": mean, "broken": broken})


def test_two_processes_have_both_the_features_of_one_in_its_order(world, tmp_path):
    for i in range(8):
        os.symlink(world / f"{i}.mp4", tmp_path / f"{i}.mp4")
    rows = (world / "captions.jsonl").read_text().splitlines()
    write(tmp_path / "a.jsonl", "\n".join([*rows[:3], '{"video": "gone.mp4", "caption": "x"}', *rows[3:], '{"video": "1.mp4", "caption": "y"}']))
    encode_in_a_group(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(encode_in_a_group, (2, str(tmp_path)), 2)
    one, *both = (training.load_checkpoint(tmp_path / name) for name in ("0 of 1", "0 of 2", "1 of 2"))
    for two in both:
        assert two["broken"] == one["broken"] and len(one["broken"]) == 1
        assert two["videos"] == one["videos"] == [f"{i}.mp4" for i in range(8)]
        assert all(torch.allclose(two[what], one[what], atol=1e-6) for what in ("branch", "mean"))


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
    eval_retrieval.main(scoring(world, save=file))   # its own file it replaces, another it does not
    assert capsys.readouterr().out == first
    refused("not a file that --save wrote", **vars(scoring(world, save=os.path.join(TINY, "branch.pth"))))
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
    dataset = EvaluationSet(scoring(world, dataset=name, annotations=write(tmp_path / "a", rows)), setting, 64)
    assert dataset.texts == captions
    expected = data.eval_pixels(stacked(data.sample_frames(world / "1.mp4", frames, "test"))[0], 64, short)
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
    dataset = EvaluationSet(cfg, dataclasses.replace(SETTINGS["activitynet"], size=(2,), num_frames=3), 64)
    pixels, _ = dataset[0]
    assert pixels.shape == dataset[1][0].shape == (3, 3, 64, 64)
    assert data.uniform_sample_test(40, 3) == [6, 19, 32]   # from 0; the files count from 1, and the 20th is missing
    assert (pixels.float().mean((1, 2, 3)) / 6).round().tolist() == [7, 21, 33]
    os.remove(tmp_path / "v_1" / "000021.jpg")
    with pytest.raises(data.VideoError, match="000020.jpg"):   # two in a row
        dataset[0]


@pytest.mark.parametrize("name, what, message", [
    ("num_file", "[1]", "needs one JSON dict"), ("num_file", '{"v": 0}', "above 0"), ("num_file", '{"v": true}', "above 0"), ("pairs", '{"a.mp4": "x", "b.mp4": []}', "'b.mp4': needs a caption"),
    ("pairs", '[{"video": "a.mp4", "caption": [1]}]', "entry 1: needs a caption"),
    ("classes", "a\n\nb", "line 2: needs the name"), ("classes", "", "line 1: needs the name"),
    ("labels", "v.mp4 3", "line 1: needs a path and a label from 1 to 2"), ("labels", "v.mp4 1\n\nv.mp4 1", "line 2: needs"),
    ("labels", "v.mp4 0", "line 1"), ("labels", "v.mp4 1\nv.mp4 x", "line 2"), ("labels", "", "line 1")])
def test_bad_files_of_a_test_set_are_user_errors_that_name_the_line(tmp_path, name, what, message):
    path = write(tmp_path / "a", what)
    read = {"pairs": eval_retrieval.read_pairs, "num_file": eval_retrieval.read_counts, "classes": eval_retrieval.read_classes, "labels": lambda path: eval_retrieval.read_labels(path, 2, -1)}[name]
    with pytest.raises(UserError, match=message):
        read(path)


# ---------------------------------------------------------------------------------------------------- recognition
def test_labels_are_the_last_word_of_a_line_with_the_offset_of_the_data_set(tmp_path):
    videos, labels = eval_retrieval.read_labels(write(tmp_path / "a", "playing guitar/x y.mp4 0\nb.mp4\t2\n"), 3, 0)
    assert videos == ["playing guitar/x y.mp4", "b.mp4"] and labels == [0, 2]
    assert eval_retrieval.read_labels(write(tmp_path / "a", "b.mp4\t1\nc.mp4\t3"), 3, -1) == (["b.mp4", "c.mp4"], [0, 2])


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
    classes = write(tmp_path / "classes", "\n".join(COLOURS))
    colour = {row["video"]: next(i for i, name in enumerate(COLOURS) if name in row["caption"]) for row in rows}
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
    ({"dataset": "k400"}, "needs --classes"), ({"dataset": "msrvtt", "classes": "x"}, "has no names of classes"), ({"annotations": "", "dataset": "msrvtt"}, "--annotations is needed"),
    ({"dataset": "imagenet"}, "--dataset imagenet: choose"), ({"batch_size": 0}, "--batch_size 0"),
    ({"weights": "nowhere"}, "nowhere"), ({"from_": "nowhere"}, "nowhere: No such file")])
def test_scoring_refuses_what_it_cannot_use(world, options, message):
    refused(message, **{**vars(scoring(world)), **options})


def test_a_set_with_too_few_classes_is_refused(world, tmp_path):
    options = {"classes": write(tmp_path / "c", "run\njump"), "annotations": write(tmp_path / "a", "0.mp4 1\n")}
    refused("k400 has 400 classes, found 2", **{**vars(scoring(world, dataset="k400")), **options})


def test_a_flag_may_be_a_word_of_python():
    assert cli.parse(Config, ["--from", "x"]).from_ == "x"


def test_without_annotations_it_is_the_toy_world_and_one_line_says_how_to_render_it(world, tmp_path, capsys):
    refused("test_captions.jsonl: no such file; `python -m toy render`", root=str(tmp_path))
    for i in range(8):
        os.symlink(world / f"{i}.mp4", tmp_path / f"{i}.mp4")
    shutil.copy(world / "captions.jsonl", tmp_path / "test_captions.jsonl")
    eval_retrieval.main(config(root=str(tmp_path)))
    assert "evaluated 8 of 8 captions" in capsys.readouterr().out
