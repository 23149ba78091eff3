"""eval_grounding.py: annotations as released, answers as models give them, a file that goes on."""
import json
import math
import os
import re
import shutil

import pytest
import torch
from test_metrics import VTIMELLM, double, java_counts

import eval_grounding
import model
from eval_grounding import Config, read_annotations
from linvt import LinVT, save_linvt
from metrics import caption_scores, grounding_scores, rarity, read_events, read_spans, words
from model import FrameCLS
from plumbing import cli
from plumbing.cli import UserError
from small import write_clip, write_llava


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def score(capsys, tmp_path, clips, answers, **fields):
    """Annotations and answers, rows -> what is printed, and the first number of each column in rows of it."""
    cfg = Config(write_rows(tmp_path / "events.jsonl", clips), **fields,
                 from_=write_rows(tmp_path / "answers.jsonl", answers))
    eval_grounding.main(cfg)
    printed = capsys.readouterr().out
    rows = re.findall(r"^(answers|whole|middle|best|a true event)[^:]*?((?: +\S+ ± \S+)+)$", printed, re.M)
    return printed, [(name, [float(x) for x in re.findall(r"(\S+) ±", numbers)]) for name, numbers in rows]


CLIP = {"video": "a", "events": [{"start": 0, "end": 4, "text": "One."},
                                 {"start": 5, "end": 10, "text": "Two"}]}


def answer(event, text, video="a", duration=10):
    return {"video": video, "duration": duration, "event": event, "answer": text}


# ------------------------------------------------------------------------------- as VTimeLLM's evaluation
def test_iou_of_answers_equals_the_recorded_one_rounded_and_not():
    ious = []
    for said, start, end, duration, rounded, exact in VTIMELLM["grounding"]:
        spans, event = read_spans(said, duration, released=True), double([[start, end]]) / duration
        span = double(spans[:1] or [[math.nan, math.nan]])
        if rounded is None:   # there 0 / 0 raises
            assert grounding_scores(span, event, 0)[0] == 1
            continue
        assert grounding_scores(span, event, 0)[0].item() == pytest.approx(exact, abs=1e-12)
        ious.append(grounding_scores(span, event, 0, digits=2))
        assert ious[-1][0] == rounded
    summary = VTIMELLM["grounding_summary"]
    expected = [summary["mIoU"], *(summary[f"R1@{share}"] for share in (0.3, 0.5, 0.7))]
    assert (100 * torch.stack(ious).mean(0))[:4].tolist() == pytest.approx(expected, abs=1e-9)


def dense_scores(duration, gold, said):
    gold = [(start, end, words(text)) for start, end, text in gold]
    found = [(start * duration, end * duration, words(text)) for start, end, text in read_events(said, True)]
    rare = rarity([text for *_, text in gold])
    return caption_scores(gold, found, rare, java_counts, exchanged=True)[:3] * 100


def test_dense_captions_equal_the_recorded_ones_with_meteor_in_full():
    found = []
    for duration, gold, said, expected in VTIMELLM["dense"].values():
        found.append(dense_scores(duration, gold, said))
        assert found[-1].tolist() == pytest.approx(expected, abs=1e-9)
    assert torch.stack(found).mean(0).tolist() == pytest.approx(VTIMELLM["dense_together"], abs=1e-9)


def test_the_example_that_comes_with_vtimellm_has_its_numbers(capsys, tmp_path):
    example = VTIMELLM["example"]   # its captions are written in numbers, one a word
    found = torch.stack([dense_scores(*clip) for clip in example["dense"]]).mean(0).tolist()
    assert found == pytest.approx(example["dense_together"], abs=1e-9)
    assert [round(x, 2) for x in found] == [3.62, 4.93, 18.33]
    clips, answers = [], []
    for start, end, duration, first, last, _ in example["grounding"]:
        clips.append({"video": f"v{duration}", "events": [{"start": start, "end": end, "text": f"{start}"}]})
        answers.append(answer(f"{start}", f"It is from {first:02} to {last:02}.", f"v{duration}", duration))
    _, rows = score(capsys, tmp_path, clips, answers, protocol="vtimellm")
    assert rows[0][1][:4] == [37.0, 50.0, 33.3, 16.7]


def test_answers_are_read_as_they_are_given():
    said = '[{"event": "A.", "timestamps": "from 10 to 20"},\n {"event": "B", "timestamps": "from 30 to 99"}]'
    assert read_events("Here [1] they are:\n" + said, False) == [(0.1, 0.2, "A."), (0.3, 1, "B")]
    assert read_events("From 10 to 20, a dog runs. From 30 to 99 it sleeps.", False) == [
        (0.1, 0.2, "a dog runs"), (0.3, 1, "it sleeps")]
    assert read_events(said, True) == []                               # there a list has one line
    assert read_events(said.replace("\n", ""), True) == [(0.1, 0.21, "A."), (0.3, 1, "B")]
    assert read_events("From 5 to 9, a dog jumps 1.5 m. It rests.") == [(0.05, 0.09, "a dog jumps 1.5 m")]
    assert read_events('[{"event": 3, "timestamps": "from 1 to 2"}]', False) == []
    assert read_events("[" * 100000, False) == read_events('[{"a": ' * 100000 + "}]", False) == []


@pytest.mark.parametrize("said, spans", [
    ("From 40 to 99.", [[0.4, 1]]), ("between 5 and 09", [[0.05, 0.09]]), ("from 45 to 23", [[0.45, 0.23]]),
    ("12-15, 20 until 30", [[0.12, 0.15], [0.2, 0.3]]), ("from 12 to 15 seconds", [[0.24, 0.3]]),
    ("from 60 to 80 seconds", [[1, 1]]),
    ("12 to 17.5 s", [[0.24, 0.35]]), ("from 10 seconds to 20 seconds", [[0.2, 0.4]]),
    ("100 to 120 seconds", [[1, 1]]), ("at 1:05 to 1:20", []),
    ("100 to 199", []), ("from 1.5 to 2", []), ("now", [])])
def test_times_of_an_answer_are_shares_of_the_clip(said, spans):
    assert read_spans(said, 50) == spans


def test_the_released_code_reads_fewer_answers_and_does_not_know_the_end():
    assert read_spans("From 40 to 99.", 50, released=True) == [[0.4, 0.99]]
    assert read_spans("100 to 199", 50, released=True) == [[0, 0.19]] and not read_spans("5 to 9", 50, True)


# --------------------------------------------------------------------------------------------- annotations
def test_three_formats_say_the_same(tmp_path):
    events = [(0.5, 4.0, "A dog runs."), (5.0, 9.0, "It sleeps.")]
    (tmp_path / "anet.json").write_text(json.dumps({"v_1": {
        "duration": 10.5, "timestamps": [[0.5, 4], [9, 5]], "sentences": ["A dog runs.", " It sleeps."]}}))
    assert read_annotations(str(tmp_path / "anet.json")) == (
        [{"video": "v_1", "window": None, "duration": 10.5, "events": events}], 1)
    (tmp_path / "charades.txt").write_text("v_1 0.5 4.0##A dog runs.\nv_2 1 2##B\nv_1 9.0 5.0##It sleeps.\n")
    clips, turned = read_annotations(str(tmp_path / "charades.txt"))
    assert [clip["video"] for clip in clips] == ["v_1", "v_2"] and turned == 1
    assert clips[0]["events"] == events
    own = {"video": "v_1", "window": [10, 20], "events": [{"start": 10.5, "end": 14, "text": "A dog runs."}]}
    (clip,), turned = read_annotations(write_rows(tmp_path / "own.jsonl", [own]))
    assert clip["window"] == [10, 20] and clip["events"] == events[:1] and turned == 0


@pytest.mark.parametrize("text, message", [
    ('{"video": "a", "events": [{"start": 4, "end": 2, "text": "b"}]}', "in seconds of what is shown"),
    ('{"video": "a", "events": [{"start": 1, "end": 2, "text": " "}]}', "needs 'text'"),
    ('{"video": "a", "events": [{"start": 1, "end": 2, "text": ""}]}', "needs 'text'"),
    ('{"video": "a", "events": [{"start": "1", "end": 2, "text": "b"}]}', "in seconds of what is shown"),
    ('{"video": "a", "events": [{"start": NaN, "end": 2, "text": "b"}]}', "in seconds of what is shown"),
    ('{"video": "a", "events": [{"end": 2, "text": "b"}]}', "in seconds of what is shown"),
    ('{"video": "a", "events": [7]}', "needs 'text'"),
    ('{"video": "a", "window": [3, 2], "events": [{"start": 1, "end": 2, "text": "b"}]}', "in seconds of what is shown"),
    ('{"video": "a", "window": 3, "events": [{"start": 1, "end": 2, "text": "b"}]}', "in seconds of what is shown"),
    ('{"video": "a", "duration": "3", "events": [{"start": 1, "end": 2, "text": "b"}]}', "in seconds of what is shown"),
    ('{"video": "a", "events": []}', "needs 'events'"),
    ('{"video": "a"\n', "not valid JSON"), ("[1, 2]", "not a JSON object"), ("3", "not a JSON object"),
    ('{"v_1": 3}', "needs 'timestamps'"),
    ('{"v_1": {"timestamps": [[3, null]], "sentences": ["a"]}}', "as many timestamps"),
    ('{"v_1": {"timestamps": [[1, 2]], "sentences": ["a", "b"]}}', "as many timestamps"),
    ("v_1 1.0 2.0##a dog\nv_1 1.0##a cat", "line 2: not `id start end##sentence`"),
    ("v_1 1.0 2.0##", "needs 'text'")])
def test_wrong_annotations_are_one_line(tmp_path, text, message):
    (tmp_path / "wrong").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_annotations(str(tmp_path / "wrong"))
    assert str(tmp_path / "wrong") in str(error.value)


# -------------------------------------------------------------------------------------------------- tables
def test_answers_stand_beside_those_that_need_no_model(capsys, tmp_path):
    printed, rows = score(capsys, tmp_path, [CLIP], [answer("One.", "From 00 to 40."), answer("Two", "now")])
    assert dict(rows) == {
        "answers": [50, 50, 50, 50, 50], "whole": [45, 100, 50, 0, 50],       # it agrees best with the longer
        "middle": pytest.approx([(1 / 15 / (2 / 3) + 1 / 6 / (2 / 3)) / 2 * 100, 0, 0, 0, 50], abs=.06),
        "best": pytest.approx([50, 50, 50, 50, 50], abs=.06), "a true event": [50, 50, 50, 50, 50]}
    assert "1 without a time, 0 backwards" in printed


def test_times_beyond_the_clip_are_cut_and_counted(capsys, tmp_path):
    clip = {"video": "a", "events": [{"start": 0, "end": 12, "text": "One."}]}
    for protocol, expected in (("nanobt", 100), ("vtimellm", 83)):   # .99 of 1.2, from 0 to 99 of 100
        printed, rows = score(capsys, tmp_path, [clip], [answer("One.", "00 to 99")], protocol=protocol)
        assert rows[0][1][0] == expected and "1 beyond the clip" in printed


def test_all_events_at_once_are_scored(capsys, tmp_path):
    said = "From 00 to 40, one. From 50 to 99, two."
    answers = [answer("One.", "x"), answer("Two", "from 99 to 50"), answer(None, said)]
    printed, rows = score(capsys, tmp_path, [CLIP], answers)
    assert "1 without a time, 1 backwards" in printed
    assert "all events of 1 clips: 0 answers without any" in printed
    names, columns = zip(*rows[5:])
    assert names == ("answers", "whole", "middle", "best", "a true event")
    assert columns[0][:2] == [100, 100] and all(row[0] < 70 for row in columns[1:])


@pytest.mark.parametrize("rows, message", [
    ([answer("One.", "1 to 2")], "lacks answers about 1 of 2 events"),
    ([{"settings": 1}], "lacks answers about 2 of 2 events"),
    ([answer("One.", None)], "and an answer"), ([answer("One.", "x", duration=None)], "a duration above 0"),
    ([{"answer": "x"}], "needs 'video'")])
def test_answers_that_lack_something_are_one_line(capsys, tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        score(capsys, tmp_path, [CLIP], rows)


def test_events_without_an_answer_may_be_left_out(capsys, tmp_path):
    printed, rows = score(capsys, tmp_path, [CLIP], [answer("One.", "00 to 40")], skip_broken=True)
    assert "1 events, 1 left out" in printed and rows[0][1] == [100, 100, 100, 100, 100]


# --------------------------------------------------------------------------------------------------- asking
@pytest.fixture
def asked(tmp_path, video, weights):
    """-> cfg: two clips of one video and one of another, and where answers go."""
    events = [{"start": 0, "end": 1, "text": "A bar moves."}, {"start": 1, "end": 2, "text": "It stands."}]
    rows = [{"video": "bar.mp4", "events": events}, {"video": "other", "events": events[:1]},
            {"video": "bar.mp4", "window": [1, 9], "events": events[1:]}]
    shutil.copy(video, tmp_path / "bar.mp4")
    shutil.copy(video, tmp_path / "other.mp4")
    return Config(write_rows(tmp_path / "events.jsonl", rows), str(tmp_path), weights=weights, num_frames=2,
                  save=str(tmp_path / "out" / "answers.jsonl"), max_new_tokens=5, captions=True)


def test_what_was_answered_is_not_asked_again(asked, capsys, monkeypatch):
    eval_grounding.main(asked)
    table, (settings, *rows) = capsys.readouterr().out, open(asked.save).read().splitlines(keepends=True)
    found = [json.loads(row) for row in rows]
    assert [(row["video"], row["event"], row["duration"]) for row in found] == [
        ("bar.mp4", "A bar moves.", 2), ("bar.mp4", "It stands.", 2), ("bar.mp4", None, 2),
        ("other", "A bar moves.", 2), ("other", None, 2), ("bar.mp4", "It stands.", 1), ("bar.mp4", None, 1)]
    assert found[0]["question"] == "When does this happen: a bar moves?"
    assert all(row["answer"] for row in found)
    with open(asked.save, "w") as f:   # killed in the middle of the fourth
        f.write(settings + "".join(rows[:3]) + rows[3][:20])
    calls, generate = [], eval_grounding.generate
    monkeypatch.setattr(eval_grounding, "generate", lambda *a, **k: calls.append(1) or generate(*a, **k))
    eval_grounding.main(asked)
    assert len(calls) == 4 and open(asked.save).read() == settings + "".join(rows)
    assert capsys.readouterr().out == table
    eval_grounding.main(Config(asked.annotations, from_=asked.save))
    assert len(calls) == 4 and capsys.readouterr().out == table


def test_tokens_that_depend_on_the_question_are_made_for_each(asked, tmp_path, capsys):
    for name in os.listdir(asked.weights):
        os.symlink(os.path.join(asked.weights, name), tmp_path / name)
    save_linvt(tmp_path / "linvt.bin", LinVT(32, 4, width=16, heads=2))
    asked.weights, asked.tokens = str(tmp_path), "linvt"
    eval_grounding.main(asked)
    assert ": 4 events, 0 left out" in capsys.readouterr().out


def test_frames_pixels_and_prompt_are_those_of_the_kind_of_video_tokens(
        asked, tmp_path, tokenizer_model, monkeypatch):
    write_clip(tmp_path / "w" / "clip")
    write_llava(tmp_path / "w" / "llava", tokenizer_model, visual=16)
    asked.weights, asked.tokens, asked.num_frames, calls = str(tmp_path / "w"), "frame_cls", None, []
    for owner, name in ((model, "prompt_ids"), (FrameCLS, "pixels")):
        done = getattr(owner, name)
        monkeypatch.setattr(owner, name, staticmethod(
            lambda *given, done=done, name=name: calls.append((name, given)) or done(*given)))
    eval_grounding.main(asked)
    names = [name for name, _ in calls]
    assert names.count("pixels") == 300 and names.count("prompt_ids") == 7   # of three clips
    assert all(given[2] == "vtimellm" for name, given in calls if name == "prompt_ids")


def test_a_file_of_other_answers_is_not_touched(asked, tmp_path):
    asked.save = write_rows(tmp_path / "mine.jsonl", [{"video": "a", "answer": "mine"}])
    with pytest.raises(UserError, match="choose another name"):
        eval_grounding.main(asked)
    assert "mine" in open(asked.save).read()


def test_a_video_that_is_missing_or_broken_is_one_line_or_left_out(asked, tmp_path, capsys):
    os.remove(tmp_path / "other.mp4")
    with pytest.raises(UserError, match="1 of its clips are not there, the first is other"):
        eval_grounding.main(asked)
    (tmp_path / "other.mp4").write_text("no video")
    with pytest.raises(UserError, match="other.mp4"):
        eval_grounding.main(asked)
    asked.skip_broken = True
    eval_grounding.main(asked)
    out, err = capsys.readouterr()
    assert "3 events, 1 left out" in out and "skipped: " in err


@pytest.mark.parametrize("fields, message", [
    ({"save": ""}, "--save FILE"), ({"from_": "x"}, "--save FILE"), ({"ask": "When?"}, "needs {} once"),
    ({"protocol": "paper"}, "choose one of nanobt, vtimellm"), ({"max_new_tokens": 0}, "must be from 1")])
def test_flags_that_do_not_fit_are_one_line(asked, fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        eval_grounding.main(Config(**{**vars(asked), **fields}))


def test_a_flag_may_be_a_word_of_python():
    assert cli.parse(Config, ["--annotations", "a", "--from", "x"]).from_ == "x"
