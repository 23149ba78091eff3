"""eval_qa.py: questions as files have them, predictions that go on, judges, what official scripts read."""
import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from test_eval_grounding import write_rows

import eval_qa
from eval_qa import Config, option_of, read_questions
from llm import generate, generate_batch
from model import open_chat
from plumbing import cli, quant, training
from plumbing.cli import UserError
from toy import language, world

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def questions(tmp_path, rows, **fields):
    return read_questions(Config("ask", annotations=write_rows(tmp_path / "q.jsonl", rows), **fields))


QUESTION = {"video": "a", "question": "What is it?", "answer": "red"}


# ------------------------------------------------------------------------------------------------ questions
@pytest.mark.parametrize("answer, option", [("2", "2"), (2, "5"), ("D", "4"), ("3", "3"), ("(B)", "1"), ("C. five", "5"),
                                            ("two", "2"), ("E", "E")])
def test_a_right_answer_is_a_place_a_text_or_a_letter(answer, option):
    assert option_of(answer, ["2", "1", "5", "4"]) == option   # of "3" and "E" there is none


@pytest.mark.parametrize("row, message", [
    ({"question": None}, "needs 'question'"), ({"answer": ""}, "an answer"), ({"answer": []}, "an answer"),
    ({"video": ""}, "needs 'video'"), ({"video": None}, "needs 'video'"), ({"answer": {"x": 1}}, "an answer"),
    ({"options": []}, "2 to 26 texts"), ({"options": ["a", 2]}, "2 to 26 texts"),
    ({"options": ["a", "b"], "answer": 2}, "answer 2, but there are 2 options"),
    ({"start": 3, "end": 2}, "not [3, 2]"), ({"start": 3}, "not [3, None]"), ({"id": "0"}, "a second row of the id 0")])
def test_wrong_questions_are_one_line(tmp_path, row, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        questions(tmp_path, [QUESTION, QUESTION | row])
    assert "line 2" in str(error.value)


def test_an_answer_that_no_option_has_is_counted(tmp_path):
    with pytest.warns(UserWarning, match="1 with an answer that is no option"):
        found = questions(tmp_path, [QUESTION | {"options": ["red", "Red."]}, QUESTION | {"options": ["blue", ""]}])
    assert [row["answer"] for row in found] == [["red"], ["red"]]


def test_a_conversation_asks_its_last_question(tmp_path):
    said = [{"from": who, "value": text} for who, text in
            (("human", "One?\n<video>"), ("gpt", "1"), ("human", "Two?"), ("gpt", "2"))]
    [found] = questions(tmp_path, [{"video": "a", "conversations": said}])
    assert (found["turns"], found["question"], found["answer"]) == ([("One?", "1")], "Two?", ["2"])


# --------------------------------------------------------------------------------------------------- asking
@pytest.fixture
def asked(tmp_path, video, weights):
    """-> Config: six questions about two videos, one of them with options."""
    rows = [{"id": f"{name}{i}", "video": name, "question": f"Which way does the {what} move?", "kind": what,
             "answer": ["left", "up"]} for name in ("one", "two") for i, what in enumerate(("circle", "square"))]
    rows += [{"id": f"{name}2", "video": name, "question": "Which?", "options": ["left", "up then", "red"],
              "answer": 1} for name in ("one", "two")]
    for name in ("one", "two"):
        shutil.copy(video, tmp_path / f"{name}.mp4")
    (tmp_path / "words.txt").write_text("left\nup\nred circle\n")
    return Config("ask", annotations=write_rows(tmp_path / "q.jsonl", rows), root=str(tmp_path), weights=weights,
                  out=str(tmp_path / "out" / "p.jsonl"), max_new_tokens=5, num_frames=2, device="cpu",
                  how="generate,rank,likelihood,text,letters", vocabulary=str(tmp_path / "words.txt"))


def lines(cfg):
    with open(cfg.out) as f:
        return f.read().splitlines(keepends=True)


def replaced(cfg, **fields):
    return Config(**{**vars(cfg), **fields})


def test_predictions_are_complete_and_a_killed_run_goes_on(asked, capsys, monkeypatch):
    eval_qa.main(asked)
    whole = lines(asked)
    rows = list(map(json.loads, whole))
    assert [row["id"] for row in rows] == ["one0", "one1", "two0", "two1", "one2", "two2"]
    assert all(row["prediction"] and row["cut"] == "max_new_tokens" and row["tokens"] == 5 for row in rows)
    assert rows[0]["answer"] == ["left", "up"] and rows[4]["answer"] == ["up then"]
    assert set(rows[4]) - set(rows[0]) == {"options", "loglik", "loglik_tokens", "letters", "letters_tokens"}
    tokenizer = open_chat(asked.weights).chat.tokenizer   # of a letter what follows is not asked, not even an end
    assert rows[4]["letters_tokens"] == [len(tokenizer.encode(x)) for x in "ABCDEF"[:len(rows[4]["options"])]]
    assert rows[0]["ranked"] in ("left", "up", "red circle") and len(rows[4]["loglik"]) == 3
    assert "6 of 6" in capsys.readouterr().out
    first = [line for line in whole if '"one' in line]
    for written in (first[0][:30], "".join(first)[:-9], "".join(first) + "{"):   # killed, here and there
        with open(f"{asked.out}.part0", "w") as f:
            f.write(written)
        os.remove(asked.out)
        eval_qa.main(asked)
        assert lines(asked) == whole and len(os.listdir(os.path.dirname(asked.out))) == 2
    looks, look = [], eval_qa.look
    monkeypatch.setattr(eval_qa, "look", lambda *given: looks.append(1) or look(*given))
    eval_qa.main(asked)
    assert not looks and lines(asked) == whole   # what is done is not asked again


def test_several_processes_leave_the_same_file_and_a_trial_goes_on(asked, monkeypatch):
    eval_qa.main(replaced(asked, limit=1))
    assert len(lines(asked)) == 3
    for name, value in (("suffix", "Briefly."), ("blind", "none")):
        with pytest.raises(UserError, match=f"was made with {name} .*, not {value}; choose another --out"):
            eval_qa.main(replaced(asked, **{name: value}))
    eval_qa.main(asked)
    whole = lines(asked)
    open(asked.out, "w").close()   # as the first process leaves it before the others begin
    monkeypatch.setattr(training, "gather_numbers", lambda *_: None)   # one after the other, nobody waits
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for rank in (1, 0):
        world = training.World(rank, 2, torch.device("cpu"))
        monkeypatch.setattr(training, "start_distributed", lambda _, world=world: world)
        eval_qa.main(asked)
        assert (lines(asked) == whole) == (rank == 0) and os.path.exists(f"{asked.out}.part1") == (rank == 1)


@pytest.mark.parametrize("scheme", ["fp32", "int8"])
def test_answers_in_batches_are_those_of_one_after_the_other(scheme):
    chat, rng = open_chat(os.path.join(ROOT, "weights", "tiny")).load(), np.random.default_rng(0)
    if scheme == "int8":
        quant.quantize(chat.llm, scheme)
    pixels, _ = chat.video_tokens.watch(os.path.join(ROOT, "assets", "sample.mp4"), 64)
    seen, prompts = chat.video_tokens.see(chat.clip, pixels[None]), {}
    facts = language.looks(world.SAMPLE) | language.moves(world.SAMPLE)
    with torch.inference_mode():
        while sum(map(len, prompts.values())) < 200:
            [(question, _)] = language.ask(facts, world.SAMPLE, 1, rng)
            embeds = chat.prompt(seen, [(question, None)])
            prompts.setdefault(embeds.shape[1], []).append(embeds)
        ends = {"max_new_tokens": 12, "stop_ids": chat.tokenizer.stop_ids}
        for same in prompts.values():
            found = generate_batch(chat.llm, torch.cat(same), **ends)
            alone = [list(generate(chat.llm, embeds=embeds, **ends)) for embeds in same]
            assert [ids for ids, _ in found] == alone
            assert [cut for _, cut in found] == ["max_new_tokens" if len(ids) == 12 else None for ids in alone]
    assert len(prompts) > 5


def test_the_blind_see_as_many_tokens_or_none(asked):
    chat, path = open_chat(asked.weights).load(), os.path.join(asked.root, "one.mp4")
    seen = {blind: eval_qa.look(replaced(asked, blind=blind), chat, path, None, None, torch.device("cpu"))
            for blind in ("no", "black", "none")}
    turns = [("Which?", None)]
    lengths = {blind: chat.prompt(s, turns).shape[1] for blind, s in seen.items()}
    assert lengths["no"] == lengths["black"] == lengths["none"] + seen["no"].shape[1] + 2
    assert not torch.equal(seen["no"], seen["black"])


@pytest.mark.parametrize("fields, message", [
    ({"how": "guess"}, "some of generate"), ({"vocabulary": ""}, "rank goes with --vocabulary"),
    ({"out": ""}, "ask needs --out"), ({"root": "/nowhere"}, "2 of 2 videos are not there"),
    ({"tokens": "x"}, "choose one of branch"), ({"dataset": "x"}, "choose one of own"),
    ({"dataset": "activitynet_qa"}, "has 8000 or 18000 or 32000 questions, found 6")])
def test_what_does_not_fit_is_one_line_and_nothing_is_written(asked, fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        eval_qa.main(replaced(asked, **fields))
    assert not os.path.exists(os.path.dirname(asked.out))


def test_a_set_of_another_size_than_was_published_is_warned_about(tmp_path):
    row = {"question": "what is it?", "answer": "a dog", "video": 1}
    with pytest.warns(UserWarning, match="msvd_qa has 13157 questions, found 1"):
        assert len(questions(tmp_path, [row], dataset="msvd_qa")) == 1


def test_predictions_of_another_run_or_damaged_ones_stay(asked):
    cli.make_folder(os.path.dirname(asked.out))
    row = json.dumps({"id": "one0", "video": "one", "question": "x", "run": "0"}) + "\n"
    for text, message in ((row, "not a prediction of this run"), ("{\n" + row, "line 1: not valid JSON"),
                          (row + row + "3", "not a prediction of this run")):
        with open(asked.out, "w") as f:
            f.write(text)
        with pytest.raises(UserError, match=message):
            eval_qa.main(asked)
        assert lines(asked) == text.splitlines(keepends=True)


def test_a_broken_video_is_left_out_counted_and_asked_again(asked, tmp_path, capsys):
    os.rename(tmp_path / "two.mp4", tmp_path / "whole.mp4")
    (tmp_path / "two.mp4").write_text("no video")
    with pytest.raises(UserError, match="two.mp4"):
        eval_qa.main(asked)
    asked.skip_broken = True
    eval_qa.main(asked)
    assert "3 of 6 questions answered" in capsys.readouterr().out
    eval_qa.main(Config("score", asked.out))
    assert "answered 2 of 4; the others count as wrong" in capsys.readouterr().out
    shutil.move(tmp_path / "whole.mp4", tmp_path / "two.mp4")
    eval_qa.main(asked)
    assert "6 of 6 questions answered" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- judging
def prediction(i, said, answer, video=None, **more):
    return {"id": str(i), "video": video or f"v{i}", "question": f"What is {i}?", "answer": [answer],
            "prediction": said, **more}


def scored(capsys, tmp_path, rows, **fields):
    eval_qa.main(Config("score", write_rows(tmp_path / "p.jsonl", rows), **fields))
    return re.sub(" +", " ", capsys.readouterr().out)


def test_a_score_of_videos_that_were_all_skipped_is_said(capsys, tmp_path):
    row = prediction(0, "", "red", skipped="broken")
    del row["prediction"]
    out = scored(capsys, tmp_path, [row])
    assert "answered 0 of 1" in out and "exact not run" in out


def test_answers_of_other_questions_are_refused_before_anything_is_written(tmp_path):
    answers = write_rows(tmp_path / "a.jsonl", [{"id": "z", "answer": "red"}])
    with pytest.raises(UserError, match="no questions in it; are --answers those of these?"):
        with pytest.warns(UserWarning, match="1 with no answer"):
            questions(tmp_path, [QUESTION | {"id": "y"}], answers=answers)


def test_a_score_has_its_controls_and_says_what_was_not_run(capsys, tmp_path):
    rows = [prediction(0, "red", "red", "a", kind="free: colour"), prediction(1, "Red.", "red", "a", kind="free: colour"),
            prediction(2, "It is 2", "two", "b", kind="motion"), prediction(3, "", "one", "b", kind="free: number")]
    out = scored(capsys, tmp_path, rows)
    assert "exact 50.0 (0.0 to 100.0)\nwithin 75.0 (" in out and "rank not run" in out
    assert "blind: exact not run" in out and "most frequent, found here: red 50.0 (" in out
    assert re.search(r"^free \(3\) 66\.7 ", out, re.M) and re.search(r"^motion \(1\) 0\.0 ", out, re.M)
    assert re.search(r"^mean over 3 kinds 33\.3 ", out, re.M)
    blind = write_rows(tmp_path / "blind.jsonl", [row | {"prediction": "red"} for row in rows])
    train = write_rows(tmp_path / "train.jsonl", [{"question": "What is 2?", "answer": "two", "type": 1}] * 6
                       + [{"question": "Why?", "answer": "Red", "type": 2}] * 7)
    out = scored(capsys, tmp_path, rows, control=blind, train=train)
    assert "blind: exact 50.0 (0.0 to 100.0)" in out
    assert "most frequent: Red 50.0" in out and "by question 25.0" in out
    train = write_rows(tmp_path / "typed.jsonl", [{"answer": "red", "type": 4}] * 3 + [{"answer": "one", "type": 7}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "by kind 75.0" in scored(capsys, tmp_path, rows, dataset="activitynet_qa", train=train)
    with pytest.warns(UserWarning, match="typed.jsonl: its kinds of questions are not those of .*another --dataset"):
        scored(capsys, tmp_path, rows, train=train)


def test_options_stand_beside_chance_the_best_place_and_the_longest(capsys, tmp_path):
    options = {"options": ["up", "down left", "up"]}
    rows = [prediction(0, "B", "up", **options, loglik=[-6.0, -5.0, -9.0], loglik_tokens=[4, 2, 9]),
            prediction(1, "neither", "down left", **options, loglik=[-3.0, -3.0, -4.0], loglik_tokens=[1, 1, 1])]
    out = scored(capsys, tmp_path, rows)
    assert re.findall(r"^(mean|sum|generated|longest option; chance is 33.3|best place, found here: A) (\S+)", out, re.M) == [
        ("mean", "50.0"), ("sum", "0.0"), ("generated", "0.0"), ("best place, found here: A", "50.0"),
        ("longest option; chance is 33.3", "50.0")]
    assert "letters not run" in out and "1 answers name no option" in out


def test_long_answers_have_their_likelihood_beside_the_blind_one(capsys, tmp_path):
    rows = [prediction(i, "x", "y", answer_loglik=[-12.0], answer_loglik_tokens=[8]) for i in range(2)]
    blind = write_rows(tmp_path / "b.jsonl", [row | {"answer_loglik": [-20.0]} for row in rows])
    assert "nats a token: -1.500; blind: not run" in scored(capsys, tmp_path, rows)
    assert "the picture tells 1.000" in scored(capsys, tmp_path, rows, control=blind)


def test_two_predictions_with_one_answer_and_numbers_have_lines_of_their_own(capsys, tmp_path):
    rows = [prediction("3.1", "a dog runs", "dog", group="pair 3"), prediction("3.2", "dog", "dog", group="pair 3")]
    assert "f1 of two predictions with each other: 66.7" in scored(capsys, tmp_path, rows)
    out = scored(capsys, tmp_path, [prediction(0, "two", "4"), prediction(1, "3", "3"), prediction(2, "often", "2")])
    assert "2 of 3 predictions are a number; mean squared error 2.00" in out


def test_the_ceiling_of_a_closed_set_is_printed(capsys, tmp_path):
    (tmp_path / "v.txt").write_text("red\ntwo\n")
    rows = [prediction(0, "", "Red.", ranked="red"), prediction(1, "", "2", ranked="red"),
            prediction(2, "", "one", ranked="red")]
    out = scored(capsys, tmp_path, rows, vocabulary=str(tmp_path / "v.txt"))
    assert re.search(r"^rank 33\.3 ", out, re.M) and "the most that rank can 66.7" in out


def test_two_runs_are_compared_in_pairs(capsys, tmp_path):
    def run(name, scores):
        rows = [prediction(i, "red" if right else "blue", "red", f"v{i // 2}") for i, right in enumerate(scores)]
        return write_rows(tmp_path / name, rows)
    a, b = run("a.jsonl", [1, 1, 1, 0, 0, 0, 1, 0]), run("b.jsonl", [1, 0, 0, 0, 0, 0, 1, 0])
    eval_qa.main(Config("compare", a, b))
    out = capsys.readouterr().out
    assert "exact      50.0 and 25.0: +25.0 (-3.3 to 53.3); both right 2, the first alone 2, the second alone 0, none 4" in out
    with pytest.raises(UserError, match="2 questions are in one of the two alone"):
        eval_qa.main(Config("compare", run("c.jsonl", [1] * 6), b))


def test_the_official_scripts_can_judge_and_their_verdicts_are_counted(capsys, tmp_path):
    rows = [prediction(0, "red", "red"), prediction(1, "blue", "red"), prediction(2, "x", "y"),
            prediction("3.1", "one", "1", group="pair 3"), prediction("3.2", "two", "1", group="pair 3")]
    path, out = write_rows(tmp_path / "p.jsonl", rows), str(tmp_path / "in.json")
    eval_qa.main(Config("export", path, out))
    with open(out) as f:
        given = json.load(f)
    assert [row.get("pred") for row in given] == ["red", "blue", "x", None] and given[3]["pred2"] == "two"
    said = {}
    for i, (row, verdict) in enumerate(zip(given, ({"pred": "yes", "score": 4.8}, {"pred": "no", "score": 2},
                                                   {"pred": "Yes", "score": 5}, {"pred": "unsure", "score": 3}))):
        about = {"q": row["Q"], "a": row["A"], "pred": row["pred"]} if "Q" in row else {
            "q1": row["Q1"], "q2": row["Q2"], "a": row["A"], "pred1": row["pred1"], "pred2": row["pred2"]}
        said[f"{i}_0.json"] = [verdict, about]
    said["foreign"] = [{"pred": "yes", "score": 1}, {"q": "?", "a": "x", "pred": "x"}]
    verdicts = tmp_path / "out.json"
    verdicts.write_text(json.dumps(said))
    with pytest.raises(UserError, match="--judge_name"):
        eval_qa.main(Config("score", path, verdicts=str(verdicts)))
    eval_qa.main(Config("score", path, verdicts=str(verdicts), judge_name="gpt, of a day"))
    out = capsys.readouterr().out
    assert "4 of 4 questions have a verdict, 1 belong to none" in out
    assert re.findall(r"gpt, of a day: .* (\d+\.\d\d)$", out, re.M) == ["66.67", "50.00", "3.50", "3.70"]


def test_hidden_answers_are_submitted_as_servers_take_them(tmp_path):
    rows = [{"id": f"video_1_{i}", "video": "video_1", "question": "?", "options": ["a", "b"],
             "loglik": [-2.0, -1.0], "loglik_tokens": [1, 3 - 2 * i]} for i in (0, 1)]
    path, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "s.json"
    with pytest.raises(UserError, match="has no answers"):
        eval_qa.main(Config("score", path))
    eval_qa.main(Config("export", path, str(out), dataset="perceptiontest"))
    assert json.loads(out.read_text()) == {"video_1": [{"id": 0, "answer_id": 1, "answer": "b"},
                                                       {"id": 1, "answer_id": 1, "answer": "b"}]}
    with pytest.raises(UserError, match="is there already"):
        eval_qa.main(Config("export", path, str(out), dataset="egoschema"))
    os.remove(out)
    eval_qa.main(Config("export", path, str(out), dataset="egoschema"))
    assert json.loads(out.read_text()) == {"video_1_0": 1, "video_1_1": 1}


@pytest.mark.parametrize("text", ['{"k": 3}', '{"k": [{"pred": "yes", "score": "high"}, {}]}',
                                  '[{"id": "0", "verdict": "yes"}, {"id": "1"}]'])
def test_verdicts_of_another_form_are_one_line(tmp_path, text):
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(UserError, match="no verdicts of an official script"):
        eval_qa.main(Config("score", write_rows(tmp_path / "p.jsonl", [prediction(0, "red", "red")]),
                            verdicts=str(tmp_path / "v.json"), judge_name="j"))


def test_verdicts_of_ones_own_go_by_id(capsys, tmp_path):
    verdicts = write_rows(tmp_path / "v.jsonl", [{"id": "0", "verdict": "yes"}, {"id": "9", "verdict": "no"}])
    out = scored(capsys, tmp_path, [prediction(0, "red", "red")], verdicts=verdicts, judge_name="me")
    assert "1 of 1 questions have a verdict, 1 belong to none" in out and "yes, of all questions 100.00" in out


def test_one_verdict_counts_for_one_of_two_equal_predictions(capsys, tmp_path):
    rows = [prediction(0, "red", "red"), prediction(1, "red", "red") | {"question": "What is 0?"}]
    (tmp_path / "v.json").write_text(json.dumps(
        {"k": [{"pred": "yes", "score": 4}, {"q": "What is 0?", "a": "red", "pred": "red"}]}))
    assert "1 of 2 questions have a verdict" in scored(
        capsys, tmp_path, rows, verdicts=str(tmp_path / "v.json"), judge_name="j")


def test_the_shipped_predictions_have_the_printed_numbers_without_a_model():
    with open(os.path.join(ROOT, "docs", "numbers.md"), encoding="utf-8") as f:
        command, shown = re.search(r"<!-- qa -->\n```\npython eval_qa.py (.*)\n```\n```\n(.*?)```", f.read(), re.S).groups()
    code = (f"import eval_qa, sys\nfrom plumbing import cli\n"
            f"eval_qa.main(cli.parse(eval_qa.Config, {command.split()}, **eval_qa.FLAGS))\n"
            "print(sorted({'model', 'llm', 'clip'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == shown + "[]\n", done.stderr


# ------------------------------------------------------------------------------------------------ data sets
def test_open_questions_join_their_answers_by_id_and_find_their_videos(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps([
        {"video_name": "x", "question": "what", "question_id": f"x_{i}"} for i in range(3)]))
    (tmp_path / "a.json").write_text(json.dumps([
        {"answer": f"{i}", "type": 3 * i, "question_id": f"x_{i}"} for i in (2, 1, 0)]))
    cfg = Config("ask", annotations=str(tmp_path / "q.json"), answers=str(tmp_path / "a.json"),
                 dataset="activitynet_qa", root=str(tmp_path))
    (tmp_path / "v_x.mkv").write_text("")
    rows = read(cfg)
    assert [row["answer"] for row in rows] == [["0"], ["1"], ["2"]]
    assert [row["kind"] for row in rows] == ["motion", "free: yes/no", "free: location"]
    assert eval_qa.find_video(cfg, rows[0], {}).endswith("v_x.mkv")
    assert eval_qa.find_video(cfg, rows[0], {"x": "v_x"}).endswith("v_x.mkv")


def read(cfg):
    """read_questions, whatever the size of the set."""
    eval_qa.SETS[cfg.dataset], old = eval_qa.dataclasses.replace(eval_qa.SETS[cfg.dataset], sizes=()), eval_qa.SETS[cfg.dataset]
    try:
        return read_questions(cfg)
    finally:
        eval_qa.SETS[cfg.dataset] = old


MSVD = {"video_id": 7, "question": "what?", "answer": "dog", "id": 3}
NEXT = ("video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
        "9,1,2,3,why did it,1,4,TP,a b,c,d,e,f\n")
EGO = {"q_uid": "u", "question": "what", **{f"option {i}": f"o{i}" for i in range(5)}}
MME = {"videoID": "y", "question_id": "1-1", "duration": "short", "question": "what",
       "options": ["A. up", "B. down", "C. in", "D. out"], "answer": "B"}
TEMPO = {"12": {"order": [{"question": "Which?\nA. up, then down\nB. down", "answer": "B. down"}]}}
CAPTIONS = {"12": {"speed": [{"question": "Which fits?\nOption 1: fast\nOption 2: slow", "answer": "Option 2: slow"}]}}
TEST = {"video_1": {"mc_question": [{"id": 5, "question": "what", "options": ["a b", "c", "d"], "answer_id": 2,
                                     "area": "memory"}], "metadata": {"split": "valid"}}}
VISTA = [{"question_id": 1, "video_name": "z.mp4", "Question": "what", "Answer_Choices": ["a b", "c"], "Answer": 1,
          "Type": "Action"}, {"Type": "Relation Reasoning-Image"}]
LONG = {"id": "l_0", "video_path": "l.mp4", "question": "what", "candidates": ["a b", "c", "N/A"],
        "correct_choice": 1, "duration_group": 600}
CONSISTENT = [{"video_name": "s", "Q1": "one", "Q2": "two", "A": "yes", "id": 4}]


@pytest.mark.parametrize("dataset, name, text, expected", [
    ("msvd_qa", "q.json", [MSVD], ("3", "7", "what?", None, ["dog"], None)),
    ("tgif_frameqa", "q.csv", "gif_name\tquestion\tanswer\ttype\tkey\ng\tis \"it\ttwo\t1\t8\n",
     ("8", "g", 'is "it', None, ["two"], "number")),
    ("tgif_count", "q.csv", "gif_name\tquestion\tanswer\tkey\ng\thow often\t3\t8\n", ("8", "g", "how often", None, ["3"], None)),
    ("videochatgpt_generic", "q.json", [{"video_name": "s", "Q": "what", "A": "x"}], ("0", "s", "what", None, ["x"], None)),
    ("videochatgpt_consistency", "q.json", CONSISTENT, ("0.1", "s", "one", None, ["yes"], None)),
    ("nextqa", "val.csv", NEXT, ("9_4", "9", "why did it", ["a b", "c", "d", "e", "f"], ["c"], "T: TN")),
    ("egoschema", "q.json", [EGO], ("u", "u", "what", [f"o{i}" for i in range(5)], None, None)),
    ("videomme", "q.jsonl", [MME], ("1-1", "y", "what", ["up", "down", "in", "out"], ["down"], "short")),
    ("tempcompass", "q.json", TEMPO, ("0", "12", "Which?", ["up, then down", "down"], ["down"], "order")),
    ("tempcompass", "q.json", CAPTIONS, ("0", "12", "Which fits?", ["fast", "slow"], ["slow"], "speed")),
    ("tempcompass", "q.json", {"12": {"speed": [{"question": "Is it?", "answer": "no"}]}},
     ("0", "12", "Is it?", None, ["no"], "speed")),
    ("perceptiontest", "q.json", TEST, ("video_1_5", "video_1", "what", ["a b", "c", "d"], ["d"], "memory")),
    ("videovista", "q.json", VISTA, ("1", "z.mp4", "what", ["a b", "c"], ["c"], "Action")),
    ("longvideobench", "q.json", [LONG], ("l_0", "l.mp4", "what", ["a b", "c"], ["c"], "600"))])
@pytest.mark.filterwarnings("ignore:.* left out")
def test_each_set_is_read_as_its_files_are(tmp_path, dataset, name, text, expected):
    (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text))
    row = read(Config("ask", annotations=str(tmp_path / name), dataset=dataset))[0]
    assert tuple(row[key] for key in ("id", "video", "question", "options", "answer", "kind")) == expected


def test_sets_that_are_folders_take_the_task_from_the_name_of_the_file(tmp_path):
    for folder, row in (("m", {"video": "a.mp4", "question": "q", "candidates": ["x", "y"], "answer": "y", "start": 1,
                               "end": 2}), ("l", {"video": "b.mp4", "question": "q", "candidates": ["x", "y"],
                                                  "answer": "x", "question_type": "plot"})):
        (tmp_path / folder).mkdir()
        for task in ("action_sequence", "episodic_reasoning") if folder == "m" else ("1_plotQA",):
            (tmp_path / folder / f"{task}.json").write_text(json.dumps([row]))
    (tmp_path / "l" / "9_summary.json").write_text(json.dumps([{"video": "c", "question": "q", "question_type": "s"}]))
    cfg = Config("ask", annotations=str(tmp_path / "m"), dataset="mvbench", root=str(tmp_path))
    assert [(row["video"], row["window"]) for row in read(cfg)] == [
        ("star/Charades_segment/a.mp4", None), ("tvqa/video_fps3_hq_segment/a.mp4", None)]
    os.makedirs(tmp_path / "tvqa" / "frames_fps3_hq")
    found = read(cfg)[1]
    assert (found["video"], found["window"], found["frames_fps"]) == ("tvqa/frames_fps3_hq/a.mp4", [1, 2], 3)
    with pytest.warns(UserWarning, match="1 with no answer, or other tasks: left out"):
        [row] = read(replaced(cfg, annotations=str(tmp_path / "l"), dataset="mlvu"))
    assert (row["video"], row["kind"], row["answer"]) == ("1_plotQA/b.mp4", "plot", ["x"])


def test_only_questions_whose_answers_are_given_are_asked(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps([EGO, EGO | {"q_uid": "w"}]))
    (tmp_path / "a.json").write_text(json.dumps({"w": 3}))
    with pytest.warns(UserWarning, match="1 with no answer"):
        [row] = read(Config("ask", annotations=str(tmp_path / "q.json"), answers=str(tmp_path / "a.json"),
                            dataset="egoschema"))
    assert (row["id"], row["answer"]) == ("w", ["o3"])


@pytest.mark.parametrize("dataset, name, text, message", [
    ("egoschema", "q.json", '[{"q_uid": "u", "question": "x"}]', "entry 1: not a question of egoschema (KeyError"),
    ("nextqa", "q.csv", NEXT.replace(",1,4,", ",B,4,"), "line 2: not a question of nextqa (ValueError"),
    ("perceptiontest", "q.json", '{"v": {"mc_question": [{"question": "x"}]}}', "(KeyError: 'id')"),
    ("videomme", "q.parquet", "PAR1", "turn it into JSON lines first: python -c"),
    ("own", "q.jsonl", "3", "not a JSON object"), ("own", "q.jsonl", "[]", "no rows in it")])
def test_a_file_of_another_set_is_one_line(tmp_path, dataset, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read(Config("ask", annotations=str(tmp_path / name), dataset=dataset))


def test_a_folder_of_pictures_is_a_video(asked, tmp_path):
    assert [i + 1 for i in eval_qa.picture_numbers(30, 3, (2.0, 6.0), 4)] == [8, 11, 14, 17]
    from PIL import Image
    os.mkdir(tmp_path / "frames")
    for i in range(6):
        Image.new("RGB", (48, 32), (40 * i, 0, 0)).save(tmp_path / "frames" / f"{i:05d}.jpg")
    chat = open_chat(asked.weights).load()
    seen = [eval_qa.look(asked, chat, str(tmp_path / "frames"), window, 3, torch.device("cpu"))
            for window in (None, (0, 0.6))]
    assert seen[0].shape == seen[1].shape and not torch.equal(*seen)


def test_a_closed_set_is_lines_or_the_commonest_answers_of_training(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"answer": x, "question": "q"} for x in ("b", "b ", "c", "a")])
    assert eval_qa.frequent(path, 2) == ["b", "a"]
    (tmp_path / "v.txt").write_text("Up\n\ndown\nUp\n")
    assert eval_qa.frequent(str(tmp_path / "v.txt"), 9) == ["Up", "down"]


def test_the_names_of_videos_are_a_table_of_either_order(tmp_path):
    (tmp_path / "n.txt").write_text("abc vid7\n")
    (tmp_path / "n.json").write_text('{"7": "1164/7"}')
    assert eval_qa.read_names(str(tmp_path / "n.txt")) == {"abc": "vid7", "vid7": "abc"}
    assert eval_qa.read_names(str(tmp_path / "n.json")) == {"7": "1164/7"}
