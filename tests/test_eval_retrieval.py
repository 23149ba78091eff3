"""eval_retrieval.py: the numbers of a table, and data sets as released."""
import dataclasses
import json
import os

import pytest
import torch

import data
import eval_retrieval
import model
from eval_retrieval import SETTINGS, Config, read_labels, read_pairs
from films import stacked
from plumbing import training
from plumbing.cli import UserError
from toy.world import COLOURS, film, make_clips, write_video

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.join(ROOT, "weights", "tiny")
CPU = torch.device("cpu")


def config(**options):
    return Config(**{"weights": TINY, "workers": 0, "device": "cpu", **options})


def refused(message, cfg, **options):
    with pytest.raises(UserError, match=message) as error:
        eval_retrieval.main(dataclasses.replace(cfg, **options))
    assert "\n" not in str(error.value)


def table(out):
    """{what: numbers} of a printed table."""
    return {line[:36].strip(): list(map(float, line[36:].split())) for line in out.splitlines()[2:]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Eight clips of the toy world and their captions."""
    folder = tmp_path_factory.mktemp("world")
    rows = []
    for i, clip in enumerate(make_clips(0, 0, True)[:16:2]):
        write_video(str(folder / f"{i}.mp4"), film(clip))
        rows.append({"video": f"{i}.mp4", "caption": clip.caption})
    write(folder / "test_captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write(path, what):
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return str(path)


def scoring(world, **options):
    return config(**{"annotations": str(world / "test_captions.jsonl"), "root": str(world), **options})


# ------------------------------------------------------------------------------------ encode
def test_a_video_with_several_captions_is_read_once(world, tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", {"1.mp4": ["one", "two"], "0.mp4": ["three"]})
    dataset = data.RetrievalDataset(read_pairs(path), world, 8, 64)
    asked, get = [], data.RetrievalDataset.__getitem__
    monkeypatch.setattr(data.RetrievalDataset, "__getitem__", lambda self, i: asked.append(i) or get(self, i))
    encoder, _ = model.load_encoder(TINY, "", CPU)
    videos, branch, mean, broken = model.encode_videos(encoder, dataset, CPU)
    assert asked == [0, 2] and list(videos) == ["1.mp4", "0.mp4"] and mean.shape == (2, 128) and broken == []
    expected = encoder.encode_video(get(dataset, 2)[0][None])
    assert torch.allclose(branch[1], torch.nn.functional.normalize(expected, dim=1), atol=1e-6)


def encode_in_a_group(rank, size, folder):
    if size > 1:
        where = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": size}
        torch.distributed.init_process_group("gloo", **where)
    torch.set_num_threads(1)
    encoder, _ = model.load_encoder(TINY, "", CPU)
    dataset = data.RetrievalDataset(read_pairs(os.path.join(folder, "a.jsonl")), folder, 8, 64, skip=True)
    found = model.encode_videos(encoder, dataset, CPU, batch_size=2)
    training.save_checkpoint(os.path.join(folder, f"{rank} of {size}"), found)


def test_two_processes_have_both_the_features_of_one_in_its_order(world, tmp_path):
    for i in range(8):
        os.symlink(world / f"{i}.mp4", tmp_path / f"{i}.mp4")
    rows = (world / "test_captions.jsonl").read_text().splitlines()
    more = [json.dumps({"video": video, "caption": "x"}) for video in ("gone.mp4", "1.mp4")]
    write(tmp_path / "a.jsonl", "\n".join([*rows[:3], more[0], *rows[3:], more[1]]))
    encode_in_a_group(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(encode_in_a_group, (2, str(tmp_path)), 2)
    one, *both = (training.load_checkpoint(tmp_path / name) for name in ("0 of 1", "0 of 2", "1 of 2"))
    for two in both:
        assert list(two[0]) == list(one[0]) == [f"{i}.mp4" for i in range(8)]
        assert all(torch.allclose(two[k], one[k], atol=1e-6) for k in (1, 2))
        assert two[3] == one[3] and len(one[3]) == 1


# ------------------------------------------------------------------------------------ score
@pytest.fixture
def reported(monkeypatch):
    """A list of what `report` was called with last."""
    given, report = [], eval_retrieval.report
    monkeypatch.setattr(eval_retrieval, "report", lambda *what: given.extend(what) or report(*what))
    return given


def test_both_models_and_both_directions_are_printed_and_the_branch_finds_the_clips(world, capsys):
    eval_retrieval.main(scoring(world))
    out = capsys.readouterr().out
    assert "evaluated 8 of 8 captions" in out and "paper" not in out
    assert list(table(out)) == ["mean-pooled CLIP, text to video", "mean-pooled CLIP, video to text",
                                "branch, text to video", "branch, video to text"]
    assert table(out)["branch, text to video"][1] == 100   # R@5


def test_without_annotations_it_is_the_toy_world_and_one_line_says_how_to_render_it(world, tmp_path, capsys):
    refused(f"`python -m toy render` makes the toy world in {tmp_path}", config(root=str(tmp_path)))
    eval_retrieval.main(config(root=str(world)))
    assert "evaluated 8 of 8 captions" in capsys.readouterr().out


def test_a_broken_video_is_an_error_in_evaluation_unless_it_may_be_left_out(world, tmp_path, capsys):
    rows = (world / "test_captions.jsonl").read_text()
    gone = '{"video": "nowhere.mp4", "caption": "a red ring"}\n'
    bad = json.dumps({"video": write(tmp_path / "bad.mp4", "not a video"), "caption": "a"})
    cfg = scoring(world)
    refused("lacks 1 of 9 videos, the first is nowhere", cfg, annotations=write(tmp_path / "a", rows + gone))
    refused("bad.mp4: not a video", cfg, annotations=write(tmp_path / "b", rows + bad))
    assert capsys.readouterr().out == ""   # no number over fewer videos than asked for
    both = write(tmp_path / "c", rows + gone + bad)
    eval_retrieval.main(scoring(world, annotations=both, skip_broken=True))
    said = capsys.readouterr()
    assert "evaluated 8 of 10 captions" in said.out and "nowhere.mp4" in said.err and "bad.mp4" in said.err
    eval_retrieval.main(cfg)
    assert said.out.splitlines()[2:] == capsys.readouterr().out.splitlines()[2:]
    refused("none of 1 videos", cfg, annotations=write(tmp_path / "d", gone), skip_broken=True)


def test_the_papers_numbers_stand_beside_ours_only_where_the_sets_match(world, capsys, monkeypatch, reported):
    monkeypatch.setitem(SETTINGS, "msrvtt", dataclasses.replace(SETTINGS["msrvtt"], size=(8,)))
    eval_retrieval.main(scoring(world, dataset="msrvtt"))
    found = table(capsys.readouterr().out)
    assert len(found) == 6 and found["BT-Adapter (paper), text to video"] == [40.9, 64.7, 73.5]
    cfg, total, *features = reported
    eval_retrieval.report(cfg, total + 1, *features)
    assert len(table(capsys.readouterr().out)) == 4


# ------------------------------------------------------------------------------------ the sets' own files
@pytest.mark.parametrize("name, rows, captions, frames, short", [
    ("msrvtt", {"0.mp4": ["a", "b"], "1.mp4": ["c"]}, ["a", "b", "c"], 12, 64),
    ("didemo", {"0.mp4": ["a", "b"], "1.mp4": ["c"]}, ["a b", "c"], 64, 73),   # 256 for 224 is 73 for 64
    ("lsmdc", {"0.mp4": "a", "1": "c"}, ["a", "c"], 64, 73),
    ("activitynet", [{"video": f"{i}.mp4", "caption": texts} for i, texts in enumerate((["a", "b"], ["c"]))],
     ["a b", "c"], 64, 73)])
def test_released_annotations_and_settings(world, tmp_path, monkeypatch, name, rows, captions, frames, short):
    seen, encode = [], eval_retrieval.encode_videos
    monkeypatch.setattr(eval_retrieval, "encode_videos", lambda encoder, dataset, *rest: (
        seen.append(dataset) or encode(encoder, dataset, *rest)))
    monkeypatch.setitem(SETTINGS, name, dataclasses.replace(SETTINGS[name], size=(len(captions),)))
    eval_retrieval.main(scoring(world, dataset=name, annotations=write(tmp_path / "a", rows)))
    assert seen[0].captions == captions
    expected = data.eval_pixels(stacked(data.sample_frames(world / "1.mp4", frames, "test"))[0], 64, short)
    assert torch.equal(seen[0][len(captions) - 1][0], expected)


@pytest.mark.parametrize("name, count", [("msrvtt", "1000"), ("lsmdc", "1000"), ("didemo", "1003 or 1004"),
                                         ("activitynet", "4917")])
def test_a_test_set_of_another_size_is_refused(world, name, count):
    refused(f"{name} has {count} items, found 8", scoring(world, dataset=name))


@pytest.mark.parametrize("name, what, message", [
    ("pairs", '{"a.mp4": "x", "b.mp4": []}', "'b.mp4': needs a caption"),
    ("pairs", '[{"video": "a.mp4", "caption": [1]}]', "entry 1: needs a caption"),
    ("classes", "a\n\nb", "a name in each line"), ("classes", "", "a name in each line"),
    ("labels", "v.mp4 3", "line 1: needs a path and a label from 1 to 2"), ("labels", "a 1\n\na 1", "line 2"),
    ("labels", "v.mp4 0", "line 1"), ("labels", "v.mp4 1\nv.mp4 x", "line 2"), ("labels", "", "line 1")])
def test_bad_files_of_a_test_set_are_user_errors_that_name_the_place(tmp_path, name, what, message):
    path, more = write(tmp_path / "a", what), {"classes": [0], "labels": [2, -1]}.get(name, [])
    with pytest.raises(UserError, match=message):
        getattr(eval_retrieval, f"read_{name}")(path, *more)


# ------------------------------------------------------------------------------------ recognition
def test_labels_are_the_last_word_of_a_line_with_the_offset_of_the_data_set(tmp_path):
    path = write(tmp_path / "a", "playing guitar/x y.mp4 0\nb.mp4\t2\n")
    assert read_labels(path, 3, 0) == [("playing guitar/x y.mp4", 0), ("b.mp4", 2)]
    path = write(tmp_path / "a", "b.mp4\t1\nc.mp4\t3")
    assert read_labels(path, 3, -1) == [("b.mp4", 0), ("c.mp4", 2)]


def test_top_1_and_top_5_are_those_worked_by_hand(capsys):
    similarity, right = torch.zeros(4, 8), torch.tensor([3, 2, 3, 0])
    similarity[0, 3] = 1                                   # alone
    similarity[1, :6] = 1                                  # one of six that tie
    similarity[2, :4] = torch.tensor([.4, .3, .2, .1])     # the fourth; and of the last row, one of eight
    videos = {"mean-pooled CLIP": similarity, "branch": similarity}
    eval_retrieval.report(config(classes="x"), 4, videos, torch.eye(8), right)
    found = table(capsys.readouterr().out)
    top_1, top_5 = 25 * (1 + 1 / 6 + 0 + 1 / 8), 25 * (1 + 5 / 6 + 1 + 5 / 8)
    assert found["branch"] == found["mean-pooled CLIP"] == pytest.approx([top_1, top_5], abs=0.05)


def test_recognition_of_the_toy_worlds_colours(world, tmp_path, capsys, monkeypatch, reported):
    rows = [json.loads(line) for line in (world / "test_captions.jsonl").read_text().splitlines()]
    names = list(COLOURS)
    colour = {row["video"]: next(i for i, name in enumerate(names) if name in row["caption"]) for row in rows}
    labels = write(tmp_path / "labels", "".join(f"{video}\t{label + 1}\n" for video, label in colour.items()))
    monkeypatch.setitem(SETTINGS, "hmdb51", dataclasses.replace(SETTINGS["hmdb51"], classes=8, size=(8,)))
    classes = write(tmp_path / "classes", "\n".join(names))
    eval_retrieval.main(scoring(world, dataset="hmdb51", annotations=labels, classes=classes))
    out, (_, _, videos, text, right) = capsys.readouterr().out, reported
    assert "evaluated 8 of 8 videos, 16 frames" in out and right.tolist() == list(colour.values())
    hits = (videos["branch"] @ text.T).argmax(1) == right
    assert table(out)["branch"][0] == pytest.approx(100 * hits.float().mean().item(), abs=0.05)
    assert table(out)["BT-Adapter (paper)"] == [54.6, 79.7]


@pytest.mark.parametrize("options, message", [
    ({"dataset": "k400"}, "needs --classes"), ({"dataset": "lsmdc", "classes": "x"}, "has no --classes"),
    ({"annotations": "", "dataset": "msrvtt"}, "give --annotations"),
    ({"weights": "nowhere"}, "nowhere")])
def test_scoring_refuses_what_it_cannot_use(world, options, message):
    refused(message, scoring(world), **options)


@pytest.mark.parametrize("text, message", [
    ("{}", "no videos in it"), ("[{}]", "entry 1: needs 'video'"), ('[{"caption": "x"}]', "needs 'video'"),
    ('{"0.mp4": "one", "0.mp4": "two"}', "'0.mp4' stands twice in one object")])
def test_captions_that_would_be_lost_or_are_none_are_refused(world, tmp_path, text, message):
    refused(message, scoring(world), annotations=write(tmp_path / "a.json", text))


def test_a_set_with_too_few_classes_is_refused(world, tmp_path):
    refused("a name in each line, 400 in all, not 2", scoring(world), dataset="k400",
            classes=write(tmp_path / "c", "run\njump"), annotations=write(tmp_path / "a", "0.mp4 1\n"))
