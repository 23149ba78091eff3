"""chat.py as scripts drive it, as a Session, and with all that can be wrong."""
import dataclasses
import functools
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import types
import warnings

import av
import numpy as np
import pytest
import torch
from PIL import Image

import chat
import clip
import data
import model
import plumbing.video
from films import silence
from linvt import LinVT, save_linvt
from model import Branch, branch_tensors
from plumbing import cli, pictures, quant
from plumbing.cli import UserError
from plumbing.training import save_checkpoint
from small import write_branch, write_clip, write_llava, write_video
from toy import world as shapes

SECONDS = 60   # until a program that says nothing is given up: a guard, not a measurement
ASK = ("-q", "what?")


@pytest.fixture
def call(monkeypatch, capsys, weights, video):
    """call(flags..., stdin=text or bytes) -> (exit code, stdout, stderr) of chat.py, run in this process."""
    def call(*flags, stdin="", video=video, weights=weights):
        flags = (video, "--weights", weights, "--max_new_tokens", 9, *flags)
        monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, flags)])
        stdin = io.BufferedReader(io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode()))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin, encoding="utf-8"))
        code = 0
        try:
            cli.run(chat.main, cli.start(chat.Config, **chat.FLAGS))
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()
    return call


@pytest.fixture
def folder(weights, tmp_path):
    """A copy of the weights, for a test to change."""
    return shutil.copytree(weights, tmp_path / "w")


@pytest.fixture
def short(begin, folder, tokenizer_model):
    """short(context, fields of chat.Config...) -> a chat whose LLaMA reads so many tokens."""
    def short(context, **fields):
        write_llava(folder / "llava", tokenizer_model, context=context)
        return begin(weights=str(folder), **fields)
    return short


def said(session, question="what?"):
    """Asks -> the answer."""
    pieces = []
    session.ask(question, pieces.append)
    return "".join(pieces)


def interrupted(session, question, pieces=1):
    """Asks, with a Ctrl-C once so many pieces of the answer have come -> these pieces as one text."""
    shown = []

    def show(piece):
        shown.append(piece)
        if len(shown) == pieces:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        session.ask(question, show)
    return "".join(shown[:pieces])


def questions(turns):
    return [question for question, _ in turns]


def refused(result, *words):
    """Exit code 2, nothing on stdout, and one line on stderr that holds all of `words`."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("chat.py: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for word in words:
        assert str(word) in err
    return True


# ------------------------------------------------------------------------------ questions without a terminal
def program(*arguments, **options):
    """chat.py as a program of its own, from a folder that is not its own."""
    command = [sys.executable, os.path.abspath(chat.__file__), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, text=True, cwd="/", **pipes)


def test_one_question_prints_one_line_and_all_else_goes_to_stderr(weights, video):
    with program(video, "--weights", weights, *ASK, "--max_new_tokens", 12, "-v") as p:
        out, err = p.communicate(timeout=SECONDS)
    assert p.returncode == 0
    assert out.endswith("\n") and out.count("\n") == 1 and out.strip()
    assert video in err and weights in err   # what is watched, and by whom
    assert re.search(r"weights \d+\.\d\d s, then waited for the video .* s\)", err)   # --verbose
    assert "Traceback" not in err


def test_piped_questions_get_one_line_each_and_blank_lines_none(call):
    code, out, err = call(stdin="what moves?\n\n  \nwhich way?\nwhat moves?")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 3 and all(lines)
    assert lines[0] == lines[2]
    assert "cut after 9 tokens" in err


def test_a_chat_joins_no_group_of_processes(call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")   # as many containers have it, and nobody is there to be met
    assert call(*ASK)[0] == 0


def test_no_questions_no_answers(call):
    assert call()[:2] == (0, "")


def test_questions_are_the_same_from_flags_and_from_a_pipe(call):
    asked = call("-q", "what moves?", "-q", "which way?")[1]
    assert asked == call(stdin="what moves?\nwhich way?\n")[1] and asked.count("\n") == 2


def test_piped_commands_are_run_as_in_a_conversation(call):
    code, out, err = call(stdin="/help\n/set max_new_tokens 2\nwhat moves?\n/quit\nwhich way?\n")
    assert code == 0 and out.count("\n") == 1 and chat.HELP in err and "cut after 2 tokens" in err
    code, out, err = call(stdin="/dance\nwhat moves?\n")
    assert refused((code, out, err.splitlines(keepends=True)[-1]), "/dance: not a command")


def test_sampling_with_the_same_seed_repeats_itself_and_another_seed_differs(call):
    first, again, other = (call(*ASK, "--temperature", 1, "--seed", seed)[1] for seed in (5, 5, 6))
    assert first == again != other


def test_what_the_llama_reads_depends_on_the_video(begin, tmp_path):
    session = begin()
    before = session.video_tokens
    session.open(write_video(tmp_path / "other.mp4", seconds=1))
    assert before.shape == session.video_tokens.shape and not torch.equal(before, session.video_tokens)


def test_white_space_in_an_answer_becomes_one_space():
    class Talker:
        cfg, cost = chat.Config(), None

        def ask(self, question, show):
            for piece in (" one\n", "\n two\t", "three\u2028four", "\n"):
                show(piece)
    assert chat.answer_line(Talker(), "?") == "one two three four"


def test_json_is_one_object_a_question(call):
    code, out, _ = call("--json", stdin="what moves?\nwhich way?\n")
    first, second = map(json.loads, out.splitlines())
    assert code == 0 and [first["question"], second["question"]] == ["what moves?", "which way?"]
    assert first["answer"].split() == call("-q", "what moves?")[1].split()
    assert set(first) == {"question", "answer", "seconds_to_first_token", "tokens", "cached", "cut"}
    assert (first["tokens"], first["cached"], first["cut"]) == (9, 0, "max_new_tokens")
    assert first["seconds_to_first_token"] > 0
    assert second["cached"] > 0   # the sentence before the question


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])   # as programs of Windows write
def test_a_byte_order_mark_says_how_questions_are_written(call, encoding):
    mark = "\ufeff" * (encoding == "utf-16-be")   # the others write it by themselves
    _, out, _ = call("--json", stdin=f"{mark}what moves?\r\nwhich w\u00e4y?\r\n".encode(encoding))
    assert [json.loads(line)["question"] for line in out.splitlines()] == ["what moves?", "which w\u00e4y?"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32", "latin-1"])
def test_other_text_than_utf8_is_refused(call, encoding):
    code, out, err = call(stdin="which w\u00e4y?\n".encode(encoding))
    assert refused((code, out, err.splitlines(keepends=True)[-1]), "must be UTF-8")
    code, out, err = call("-q", "what \udcff?")
    assert refused((code, out, err.splitlines(keepends=True)[-1]), "must be UTF-8", r"\udcff")


def test_a_video_that_alone_fills_the_context_is_told_by_its_frames(short):
    session = short(40, tokens="st_pool", num_frames=60)
    message = "no room for an answer: .* of them the video's, and a conversation 40"
    with pytest.raises(UserError, match=message):
        said(session)


@pytest.mark.parametrize("field", [dict(json=True), dict(explain="why.png")])
def test_what_goes_with_questions_of_their_own_is_refused_where_someone_talks(monkeypatch, field):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UserError, match="^--json and --explain: go with -q"):
        chat.main(chat.Config(**field))


def test_a_reader_who_leaves_ends_the_program_without_a_word(weights, video):
    with program(video, "--weights", weights, "--max_new_tokens", 5, stdin=subprocess.PIPE) as p:
        p.stdin.write("first?\n")
        p.stdin.flush()
        assert p.stdout.readline().strip()
        p.stdout.close()   # as `head -1` does
        p.stdin.write("second?\nthird?\n")
        p.stdin.close()
        err = p.stderr.read()
        assert p.wait(SECONDS) == 0
    assert "Error" not in err and "Traceback" not in err


# --------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("tokens, count", [("branch", 5), ("mean", 4), ("st_pool", 12)])
def test_every_kind_of_video_tokens_answers(call, tokens, count):
    code, out, err = call(*ASK, "--tokens", tokens)
    assert code == 0 and out.count("\n") == 1
    assert f"{count} video tokens" in err   # of 4 patches, a CLS, 8 frames


def test_plain_llava_needs_no_branch(call, folder):
    (folder / "branch.pth").unlink()
    assert call(*ASK, "--tokens", "mean", weights=folder)[0] == 0


def test_no_tuned_leaves_out_what_was_tuned_on_video(call, folder):
    torch.manual_seed(1)
    tensors = branch_tensors(Branch(32, 2, 64, 1), "model.vision_tower.")
    tensors |= {"model.mm_projector.weight": torch.randn(32, 32), "model.mm_projector.bias": torch.zeros(32)}
    save_checkpoint(folder / "chat.bin", tensors)
    tuned, zero_shot, plain = call(*ASK, weights=folder), call(*ASK, "--no-tuned", weights=folder), call(*ASK)
    assert ": tuned for video, branch.pth unused, " in tuned[2] and "without chat.bin" in zero_shot[2]
    assert tuned[1] != zero_shot[1] == plain[1]


def test_quantised_weights_are_written_once_and_what_was_seen_is_still_known(call, folder, tmp_path):
    flags = (*ASK, "--quantize", "int8", "--cache_dir", tmp_path / "c")
    first, kept = call(*flags, weights=folder), list((folder / "llava").glob("quantised_int8_*"))
    written, second = os.stat(kept[0]).st_ino, call(*flags, weights=folder)
    assert first[0] == second[0] == 0 and first[1] == second[1]
    assert len(kept) == 1 and os.stat(kept[0]).st_ino == written and len(os.listdir(tmp_path / "c")) == 1
    assert len(list((folder / "llava").glob("quantised_clip_int8_*"))) == 1


def test_where_the_llama_is_quantised_clip_looks_in_int8_and_sees_nearly_the_same(begin, folder):
    seen = {}
    for scheme in ("none", "int8"):
        session = begin(weights=str(folder), quantize=scheme, cache=False, device="cpu")
        seen[scheme] = session.video_tokens
        linears = [m for m in session.chat.clip.vision_model.modules() if isinstance(m, torch.nn.Linear)]
        assert bool(linears) == (scheme == "none")
    assert 0 < (seen["int8"] - seen["none"]).norm() / seen["none"].norm() < 0.05


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_precision_answers(call, dtype):
    code, out, _ = call(*ASK, "--dtype", dtype)
    assert code == 0 and out.strip()


def test_num_frames_is_8_for_small_pictures_unless_it_is_given(call):
    assert "8 frames" in call(*ASK)[2] and "3 frames" in call(*ASK, "--num_frames", 3)[2]


@pytest.mark.parametrize("flags, words", [
    (["--tokens", "magic"], ["--tokens magic", "branch, mean, st_pool"]),
    (["--num_frames", "0"], ["--num_frames 0", "from 1 to"]),
    (["--max_new_tokens", "0"], ["--max_new_tokens 0"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--temperature", "-1"], ["--temperature -1"]),
    (["--dtype", "int3"], ["--dtype int3", "bf16"]),
    (["--quantize", "int2"], ["--quantize int2", "int8"])])
def test_a_flag_that_cannot_be_is_refused(call, flags, words):
    assert refused(call(*ASK, *flags), *words)


def test_ctrl_c_while_loading_exits_with_130(call, monkeypatch):
    monkeypatch.setattr(chat, "open_chat", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call(*ASK) == (130, "", "chat.py: interrupted\n")


def test_ctrl_c_while_importing_exits_with_130(tmp_path):
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 2)\n")
    with program(*ASK, env={**os.environ, "PYTHONPATH": str(tmp_path)}) as p:
        assert (*p.communicate(timeout=SECONDS), p.returncode) == ("", "chat.py: interrupted\n", 130)


# --------------------------------------------------------------------------------------------- a conversation
def logits_of_a_first_token(session, question, monkeypatch):
    """Asks -> logits (V,) as the chat computed them, and as its whole prompt gives them when read at once."""
    seen, forward = [], session.chat.llm.forward
    with monkeypatch.context() as patched:
        patched.setattr(session.chat.llm, "forward",
                        lambda *given, **more: seen.append(forward(*given, **more)) or seen[-1])
        said(session, question)
    turns = [*session.turns[session.forgotten:-1], (question, None)]
    ids, _ = chat.prompt_ids(session.chat.tokenizer, turns)
    with torch.inference_mode():
        whole = forward(embeds=session.chat.splice(ids, session.video_tokens)[None])
    return seen[0][0, -1], whole[0, -1]


def next_answer_is_that_of_the_whole_prompt(session):
    """Is the next answer the same, whether the LLaMA remembers the turns or works through them anew?"""
    answers, turns = [], list(session.turns)
    for cached_ids in (session.cached_ids, []):
        session.turns, session.cached_ids = list(turns), cached_ids
        answers.append(said(session, "And that?"))
    return answers[0] == answers[1]


def test_every_piped_question_is_a_conversation_of_its_own(session):
    for question in ("first?", "second?"):
        chat.answer_line(session, question)
        assert questions(session.turns) == [question]


def test_the_second_answer_starts_from_the_logits_of_the_whole_conversation(session, monkeypatch):
    said(session, "What is this?")
    computed, whole = logits_of_a_first_token(session, "And that?", monkeypatch)
    assert questions(session.turns) == ["What is this?", "And that?"] and session.forgotten == 0
    assert (computed - whole).abs().max() < 1e-4


def test_a_second_question_costs_its_own_words(session):
    said(session, "What is this?")
    assert session.cost.cached == 0 and session.cost.new > len(session.video_tokens)
    said(session, "And that?")
    tokenizer = session.chat.tokenizer
    empty, own = chat.prompt_ids(tokenizer, [("", None)])[0], tokenizer.encode("USER: And that? ASSISTANT:")
    assert session.cost.new < len(empty) + len(own)


def test_an_answer_that_fills_the_context_is_cut_and_the_next_question_takes_its_place(short, capsys):
    session = short(200, max_new_tokens=1000)
    assert said(session).strip() and "fill the 200 tokens" in capsys.readouterr().err
    said(session, "and then?")
    assert questions(session.turns[session.forgotten:]) == ["and then?"]
    assert "forgotten, for lack of room: what?" in capsys.readouterr().err
    with pytest.raises(UserError, match="no room for an answer"):
        said(session, "why? " * 200)
    assert questions(session.turns[session.forgotten:]) == ["and then?"]


def test_the_oldest_turns_are_forgotten_one_by_one_and_the_rest_is_as_if_they_had_never_been(
        short, monkeypatch, capsys):
    session, asked = short(300, max_new_tokens=24), [f"question {i}?" for i in range(8)]   # room for 3
    for question in asked:
        before = session.forgotten
        computed, whole = logits_of_a_first_token(session, question, monkeypatch)
        assert session.forgotten - before == ("(forgotten" in capsys.readouterr().err)
        assert (computed - whole).abs().max() < 1e-4
    assert questions(session.turns) == asked and 2 <= session.forgotten <= 6


def test_what_was_forgotten_is_saved_too(short, tmp_path):
    session = short(300, max_new_tokens=24)
    for i in range(8):
        said(session, f"question {i}?")
    chat.run_command(session, f"/save {tmp_path / 'talk.json'}")
    turns = json.loads((tmp_path / "talk.json").read_text())["turns"]
    assert [(turn["question"], turn["answer"]) for turn in turns] == session.turns
    assert [turn["forgotten"] for turn in turns] == [i < session.forgotten for i in range(8)]


@pytest.mark.parametrize("pieces", [1, 3])
def test_an_answer_that_is_stopped_stays_in_the_conversation_as_far_as_it_got(session, pieces):
    shown = interrupted(session, "What is this?", pieces)
    assert session.turns == [("What is this?", shown.strip())]
    assert len(session.cached_ids) == session.kv_cache.length
    assert next_answer_is_that_of_the_whole_prompt(session)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["the cache is cut", "the prompt is read"])
def test_ctrl_c_before_the_first_word_leaves_the_conversation_as_it_was(session, monkeypatch, when, what):
    said(session, "What is this?")
    turns = list(session.turns)
    owner, name = (session.kv_cache, "truncate") if "cache" in what else (session.chat.llm, "forward")
    done = getattr(owner, name)

    def stopped(*given, **more):
        if when == "after":
            done(*given, **more)
        raise KeyboardInterrupt
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, name, stopped)
        said(session, "Never mind?")
    assert session.turns == turns and len(session.cached_ids) <= session.kv_cache.length
    assert next_answer_is_that_of_the_whole_prompt(session)


def test_nothing_of_one_video_is_remembered_with_another(session, begin, tmp_path):
    other = str(tmp_path / "other.mp4")
    shapes.write_video(other, [np.full((64, 64, 3), 200, np.uint8)] * 12)
    said(session)
    session.open(other)
    assert said(session) == said(begin(video=other))


def test_control_characters_of_an_answer_do_not_reach_the_terminal(session, monkeypatch):
    monkeypatch.setattr(chat, "stream_text", lambda tokenizer, new: iter(["a\x1b]0;b", "\x07c\x9b\r\nd\te"]))
    assert said(session) == "a\ufffd]0;b\ufffdc\ufffd\ufffd\nd\te\n"


def test_large_frames_are_kept_small(begin, tmp_path):
    seen = begin(video=write_video(tmp_path / "large.mp4", 640, 360, 1)).seen
    assert seen.frames.shape == (8, 3, 135, 240) and seen.frames.dtype == torch.uint8


# --------------------------------------------------------------------------------------------------- commands
def test_frames_are_saved_and_replace_a_png_but_nothing_else(session, tmp_path):
    path = tmp_path / "frames.png"
    for _ in range(2):
        assert chat.run_command(session, f"/frames {path}")
        assert Image.open(path).format == "PNG"
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "notes.png").write_text("my thesis")
    (tmp_path / "empty.png").touch()
    for name in ("notes.png", "empty.png", "fifo", ""):
        with pytest.raises(UserError, match="did not write"):
            chat.run_command(session, f"/frames {tmp_path / name}")
    assert (tmp_path / "notes.png").read_text() == "my thesis"
    with pytest.raises(UserError, match="No such file"):
        chat.run_command(session, f"/frames {tmp_path}/nowhere/frames.png")


def test_a_conversation_is_saved_as_json_and_replaces_only_such_a_file(session, tmp_path):
    path, seen = tmp_path / "talk.json", session.seen
    for _ in range(2):
        said(session)
        assert chat.run_command(session, f"/save {path}")
        saved = json.loads(path.read_text())
        assert [(turn["question"], turn["answer"]) for turn in saved["turns"]] == session.turns
    assert len(saved["turns"]) == 2
    assert (saved["video"], saved["times"]) == (seen.path, seen.times)
    assert saved["settings"]["max_new_tokens"] == 12
    (tmp_path / "thesis.json").write_text('{"title": "On chat"}')
    (tmp_path / "empty.json").touch()
    for name in ("thesis.json", "empty.json", ""):
        with pytest.raises(UserError, match="did not write"):
            chat.run_command(session, f"/save {tmp_path / name}")
    assert (tmp_path / "thesis.json").read_text() == '{"title": "On chat"}'


def test_set_changes_the_next_answer_and_shows_one_setting_or_all(session, capsys):
    for line in ("/set max_new_tokens 3", "/set max_new_tokens", "/set"):
        assert chat.run_command(session, line)
        err = capsys.readouterr().err
        assert "max_new_tokens 3\n" in err and ("seed 0" in err) == (line == "/set")
    said(session)
    assert len(session.cost.times) == 3 and session.cost.cut == "max_new_tokens"


@pytest.mark.parametrize("words, complaint", [
    ("temperature hot", "^/set temperature: invalid float"), ("temperature nan", "must be from 0 to"),
    ("temperature 5", "from 0 to 2"), ("top_p 0", "^/set top_p 0.0: must be from 0.001"),
    ("seed 1.5", "invalid int"), ("seed -1", "from 0 to"), ("max_new_tokens 0", "from 1 to"),
    ("weights other", "can be changed are temperature, top_p"), ("weights", "can be changed are")])
def test_a_setting_that_cannot_be_is_refused_and_changes_nothing(session, words, complaint):
    before = session.cfg
    with pytest.raises(UserError, match=complaint):
        chat.run_command(session, f"/set {words}")
    assert session.cfg == before


def test_stats_before_a_question_tell_of_the_video_alone(session):
    expected = r"video: 5 tokens from 8 frames\nmemory: \d\.\d\d GB"
    assert re.fullmatch(expected, session.stats())


def test_stats_count_a_stopped_answer_too(session):
    interrupted(session, "what?")
    assert "prompt: 0 tokens known" in session.stats()


def test_quit_leaves(session):
    assert chat.run_command(session, "/quit") is False


@pytest.mark.parametrize("line, usage", [
    ("/quit now", "/quit "), ("/video", "/video PATH "), ("/save", "/save FILE "), ("/reset all", "/reset "),
    ("/set a b c", "/set .*\n/set NAME VALUE ")])
def test_a_command_that_is_typed_wrong_says_how_it_is_used(session, line, usage):
    with pytest.raises(UserError, match=f"^{usage}"):
        chat.run_command(session, line)


@pytest.mark.parametrize("line, advice", [
    ("/", "/help lists them"), ("/dance", "/help lists them"), ("/frame", r"did you mean /frames\?"),
    ("/sav talk.json", r"did you mean /save\?")])
def test_what_is_no_command_is_said_in_one_line(session, line, advice):
    with pytest.raises(UserError, match=f"^{line}: not a command; {advice}$"):
        chat.run_command(session, line)


def test_a_new_video_begins_a_new_conversation_and_a_bad_one_changes_nothing(session, tmp_path):
    said(session)
    before = dict(vars(session))
    (tmp_path / "bad.mp4").write_text("not a video")
    os.symlink(".", tmp_path / "again")   # a folder is not looked through
    for bad in ("/bad.mp4", ""):
        with pytest.raises(plumbing.video.VideoError):
            chat.run_command(session, f"/video {tmp_path}{bad}")
    assert vars(session) == before and session.turns
    chat.run_command(session, f"/video {write_video(tmp_path / 'other video.mp4')}")
    assert session.turns == [] and session.seen.path.endswith("other video.mp4")


def test_paths_may_be_as_a_terminal_writes_what_is_dropped_into_it(session, tmp_path):
    path = write_video(tmp_path / "my film.mp4")
    for typed in (f"'{path}' ", path.replace(" ", "\\ "), path):
        chat.run_command(session, f"/video {typed}")
        assert session.seen.path == path
    for command in ("save", "frames"):
        chat.run_command(session, f"/{command} '{tmp_path}/my {command}'")
        assert (tmp_path / f"my {command}").exists()


def test_shipped_weights_say_what_they_know_before_a_video_of_ones_own(capsys, video, monkeypatch, weights):
    monkeypatch.chdir(os.path.dirname(chat.__file__))
    for fields, said in ((dict(), 0), (dict(video="assets/sample.mp4"), 0), (dict(video=video), 1),
                         (dict(video=video, weights="weights/tiny/"), 1),
                         (dict(video="assets/events.mp4", weights="weights/tiny_time"), 0),
                         (dict(video=video, weights="weights/tiny_time"), 1),
                         (dict(video=video, weights=weights), 0)):
        chat.begin(chat.Config(**fields))
        assert capsys.readouterr().err.count("(the shipped weights know coloured shapes") == said, fields


# ------------------------------------------------------------------------------------------------- bad videos
def text(what):
    return lambda path, good: path.write_text(what.format(good=good))


def sound(path, good):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=48000)
        for i in range(5):
            out.mux(stream.encode(silence(i)))
        out.mux(stream.encode())


def cut(path, good):
    path.write_bytes(open(good, "rb").read()[:600])


def photo(path, good):
    Image.new("RGB", (64, 64), "red").save(path, "JPEG")


PLAYLIST = text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{good}\n#EXT-X-ENDLIST\n")
CONCAT = text("ffconcat version 1.0\nfile '{good}'\n")
BAD_VIDEOS = {   # name: (what makes it, a word of the complaint)
    "missing.mp4": (lambda path, good: None, "No such file"),
    "folder.mp4": (lambda path, good: path.mkdir(), "no regular one"),
    "empty.mp4": (text(""), "empty"),
    "text.mp4": (text("this is not a video\n" * 100), "not a video"),
    "sound.mp4": (sound, "no video track"),
    "cut.mp4": (cut, "cut"),
    "photo.mp4": (photo, "not a video"),
    "photo.jpg": (photo, "not a video"),
    "list.m3u8": (PLAYLIST, "not a video"),
    "list.mp4": (PLAYLIST, "not a video"),
    "script.ffconcat": (CONCAT, "not a video"),
    "script.mp4": (CONCAT, "not a video")}


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_a_bad_video_is_one_line_and_exit_code_2(call, video, tmp_path, name):
    make, word = BAD_VIDEOS[name]
    make(tmp_path / name, video)
    assert refused(call(*ASK, video=tmp_path / name), tmp_path / name, word)


def test_a_bad_video_is_reported_before_weights_are_made_ready(call, tmp_path, monkeypatch):
    monkeypatch.setattr(model.OpenChat, "load", None)
    (tmp_path / "bad.mp4").write_text("no video")
    for name in ("missing.mp4", "bad.mp4"):
        assert refused(call(*ASK, video=tmp_path / name), name)


def test_a_video_is_probed_once(begin, tmp_path, monkeypatch):
    probed, probe = [], data.probe
    monkeypatch.setattr(data, "probe", lambda path: probed.append(path) or probe(path))
    begin(video=(path := write_video(tmp_path / "new.mp4")))
    assert probed == [path]


def test_a_video_is_decoded_while_weights_are_read(begin, tmp_path, monkeypatch):
    """Reading weights waits here until the video is decoded: one after the other, neither would end."""
    decoded, sample_frames, load = threading.Event(), data.sample_frames, model.OpenChat.load

    def told(*given, **more):
        yield from sample_frames(*given, **more)
        decoded.set()
    monkeypatch.setattr(data, "sample_frames", told)
    monkeypatch.setattr(model.OpenChat, "load",
                        lambda *given: load(*given) if decoded.wait(SECONDS) else None)
    begin(video=write_video(tmp_path / "new.mp4"))


def test_a_video_that_breaks_while_it_is_decoded_beside_the_weights_is_one_line(call, video, monkeypatch):
    def broken(path, *given, **more):
        raise data.VideoError(f"{path}: breaks off")
    monkeypatch.setattr(data, "sample_frames", broken)
    assert refused(call(*ASK, "--no-cache"), video, "breaks off")


def test_who_leaves_while_a_video_is_decoded_does_not_wait_for_its_end(session, tmp_path, monkeypatch):
    begun, decoded, before = threading.Event(), [], threading.active_count()

    def endless(path, *given, **more):
        while True:
            yield 0.0, torch.zeros(3, 4, 4, dtype=torch.uint8)
            decoded.append(path)
            begun.set()
    monkeypatch.setattr(data, "sample_frames", endless)
    path = write_video(tmp_path / "new.mp4")
    with pytest.raises(KeyboardInterrupt):
        with session.viewer.looking(path):
            begun.wait(SECONDS)
            raise KeyboardInterrupt
    assert decoded and threading.active_count() == before


# -------------------------------------------------------------------------------------------------- the cache
@pytest.fixture
def start(begin, tmp_path):
    """The same as begin, with a cache of this test."""
    return functools.partial(begin, cache_dir=str(tmp_path / "c"))


def test_a_second_chat_neither_decodes_the_video_nor_runs_clip_and_says_the_same(start, monkeypatch):
    first = start()
    answer = said(first)
    monkeypatch.setattr(data, "open_video", None)
    monkeypatch.setattr(model.BranchTokens, "see", None)
    second = start()
    assert second.seen.before and not first.seen.before
    assert torch.equal(first.video_tokens, second.video_tokens)
    assert torch.equal(first.seen.frames, second.seen.frames)
    assert (first.seen.times, answer) == (second.seen.times, said(second))


@pytest.mark.parametrize("flags", [dict(num_frames=3), dict(tokens="mean"), dict(dtype="bf16")], ids=str)
def test_other_flags_look_at_the_video_again(start, tmp_path, flags):
    start()
    tokens = start(**flags).video_tokens
    assert len(os.listdir(tmp_path / "c")) == 2
    assert torch.equal(start(**flags, cache=False).video_tokens, tokens)


def test_who_edits_how_a_video_is_seen_sees_the_effect(start, monkeypatch):
    start()
    code_of = chat.code_of
    monkeypatch.setattr(chat, "code_of", lambda *modules: code_of(*modules) + "edited")   # see test_store
    assert not start().seen.before
    named = inspect.getclosurevars(chat.Viewer.__init__).globals.values()
    assert all(module in named for module in (clip, data, model, plumbing.video, pictures, quant))


@pytest.mark.parametrize("name", [
    "branch.pth", "clip/model.safetensors", "llava/model.safetensors", "chat.bin"])
def test_other_weights_look_at_the_video_again_if_they_are_those_that_see(start, folder, name):
    start(weights=str(folder))
    assert start(weights=str(folder)).seen.before
    if name == "chat.bin":
        projector = {"weight": torch.randn(32, 32), "bias": torch.zeros(32)}
        save_checkpoint(folder / name, {f"model.mm_projector.{kind}": t for kind, t in projector.items()})
    os.utime(folder / name, ns=(1, 1))
    assert start(weights=str(folder)).seen.before == (name in ("llava/model.safetensors", "chat.bin"))


def test_weights_replaced_while_a_chat_is_open_do_not_get_its_rows(start, folder, tmp_path):
    session, other = start(weights=str(folder)), write_video(tmp_path / "other.mp4", seconds=1)
    write_branch(folder / "branch.pth")
    session.open(other)
    assert not start(weights=str(folder), video=other).seen.before


def test_without_a_cache_nothing_is_written(start, tmp_path):
    start(cache=False)
    assert not (tmp_path / "c").exists()


def test_a_full_disk_behind_standard_output_is_one_line(weights):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, chat.__file__, *map(str, ASK), "--weights", weights, "--no-cache"],
                              stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "standard output: No space left" in done.stderr.splitlines()[-1]


def test_a_damaged_entry_is_said_and_made_anew(start, tmp_path, capsys):
    tokens = start().video_tokens.clone()
    [path] = (tmp_path / "c").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    capsys.readouterr()
    assert torch.equal(start().video_tokens, tokens)
    first, *_ = capsys.readouterr().err.splitlines()
    assert str(path) in first and "cut" in first and path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_said_and_harms_nothing(start, tmp_path, capsys):
    (tmp_path / "c").write_text("a file, not a folder")
    assert said(start())
    err = capsys.readouterr().err
    assert f"{tmp_path}/c" in err and "going on without it" in err


def test_a_damaged_video_warns_again_when_it_is_not_decoded_again(start, monkeypatch, capsys):
    decode = data.sample_frames

    def damaged(*given, **more):
        yield from decode(*given, **more)
        warnings.warn(plumbing.video.DamagedVideo("v.mp4: damaged"))
    monkeypatch.setattr(data, "sample_frames", damaged)
    for before in (False, True):
        assert start().seen.before is before
        assert capsys.readouterr().err.count("v.mp4: damaged\n") == 1


def test_a_wait_of_half_a_minute_is_announced(begin, weights, tmp_path, monkeypatch, capsys):
    """How long is told by one layer, here of 5 s; the CLIP has three of them, and sees 128 frames at a time."""
    shutil.copytree(weights, tmp_path / "large")
    write_clip(tmp_path / "large" / "clip", image_size=224, patch_size=112)
    now, forward = [0.0], clip.EncoderLayer.forward

    def slow(*given):
        now[0] += 5
        return forward(*given)
    monkeypatch.setattr(clip.EncoderLayer, "forward", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    begin(weights=str(tmp_path / "large"), num_frames=256, cache=False)
    assert "looking at 256 frames, about 30 s (--num_frames 32 takes 12%)\n" in capsys.readouterr().err
    begin(weights=str(tmp_path / "large"), num_frames=32, cache=False)
    assert "looking" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- a part of a video
@pytest.mark.parametrize("rule, tokens", [("uniform", "mean"), ("linspace", "branch")])
def test_a_part_is_seen_as_data_samples_it_with_times_of_the_whole(begin, monkeypatch, video, rule, tokens):
    monkeypatch.setattr(model.VIDEO_TOKENS[tokens], "rule", rule)
    session = begin(tokens=tokens, start=0.5, end=1.25, cache=False)
    expected = list(data.sample_frames(video, 8, rule, window=(0.5, 1.25)))
    assert session.seen.times == [t for t, _ in expected] and 0.5 <= min(session.seen.times)
    assert torch.equal(session.seen.frames, torch.stack([picture for _, picture in expected]))
    assert (session.seen.window, session.seen.duration) == ((0.5, 1.25), 2.0)


def test_a_part_is_asked_for_with_flags_and_with_video_and_is_saved(call, session, video, tmp_path):
    assert "bar.mp4, 0:00.5 to 0:02.0: 1.5 s, 8 frames" in call(*ASK, "--start", "0:00.5", "--end", 75)[2]
    for typed in (f"'{video}' 0:00.5-0:01.5", "0.5-1.5 s", f"0.5-1.5 s  {video}",
                  "0:00.5 to 0:01.5 (± 0.1 s)"):
        session.open(video)
        chat.run_command(session, f"/video {typed}")
        assert (session.seen.path, session.seen.window) == (video, (0.5, 1.5))
    chat.run_command(session, f"/save {tmp_path / 'talk.json'}")
    assert json.loads((tmp_path / "talk.json").read_text())["window"] == [0.5, 1.5]
    chat.run_command(session, f"/video {video}")
    assert session.seen.window == (0, 2)


@pytest.mark.parametrize("flags, words", [
    (["--start", 60, "--end", 75], ["bar.mp4", "60 to 75 s", "of 2.00 s"]), (["--start", 2], ["from 2 s on, of"]),
    (["--start", 1, "--end", 0.5], ["from 1 to 0.5 s"]), (["--start", "1:75"], ["--start", "1:75", "m:ss"]),
    (["--end", "soon"], ["--end", "soon"]), (["--start", "nan"], ["--start"]), (["--end", -1], ["--end"])])
def test_a_part_that_cannot_be_is_refused_before_weights_are_made_ready(call, monkeypatch, flags, words):
    monkeypatch.setattr(model.OpenChat, "load", None)
    assert refused(call(*ASK, *flags), *words)


def test_a_part_that_cannot_be_leaves_the_conversation_as_it_was(session):
    said(session)
    before = dict(vars(session))
    with pytest.raises(UserError, match="nothing is from 3 to 4 s, of a video of 2.00 s"):
        chat.run_command(session, "/video 3-4")
    assert vars(session) == before and session.turns


def test_each_part_is_kept_for_itself(start):
    for fields in (dict(), dict(start=0.5), dict(start=0.5, end=1.0)):
        first, again = start(**fields), start(**fields)
        assert not first.seen.before and again.seen.before
        assert (again.seen.window, again.seen.times) == (first.seen.window, first.seen.times)


# ------------------------------------------------------------------------------------------- LinVT
@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", seconds=7)


@pytest.fixture(params=["linvt", "branch+linvt"])
def choosing(request, begin, folder, long_video):
    """choosing(fields of chat.Config...) -> a chat whose rows follow the question: 7 frames, or 4 windows."""
    def choosing(content=True, **fields):
        torch.manual_seed(1)
        linvt = LinVT(32, 5 if "+" in request.param else 4, width=16, heads=2, content=content)
        for parameter in linvt.parameters():   # as after a training
            torch.nn.init.normal_(parameter, std=0.5)
        save_linvt(str(folder / "linvt.bin"), linvt)
        return begin(**{"video": long_video, "weights": str(folder), "tokens": request.param, **fields})
    return choosing


def test_a_second_question_is_answered_from_its_own_rows_and_never_from_the_first_ones(choosing, monkeypatch):
    session = choosing()
    said(session, "What is red?")
    first, seen, tokenizer = session.video_tokens, session.seen.rows, session.chat.tokenizer
    computed, whole = logits_of_a_first_token(session, "And that?", monkeypatch)
    assert torch.equal(session.video_tokens, session.chat.embed_video(seen, ["And that?"])[0])
    assert first.shape == session.video_tokens.shape and not torch.equal(first, session.video_tokens)
    assert (computed - whole).abs().max() < 1e-4
    ids, _ = chat.prompt_ids(tokenizer, [("What is red?", None)])
    assert session.cost.cached == ids.index(model.VIDEO_INDEX)   # the cache is cut where the rows begin
    said(session, "And that?")
    assert next_answer_is_that_of_the_whole_prompt(session)
    assert session.cost.cached == 0   # that was from nothing


def test_with_keep_tokens_the_first_rows_stay_and_a_second_question_costs_its_own_words(choosing):
    session = choosing(keep_tokens=True)
    said(session, "What is red?")
    first, shares, known = session.video_tokens, session.shares(), session.cost.new
    said(session, "And that?")
    assert session.video_tokens is first and session.cost.cached >= known
    assert torch.equal(session.shares(), shares)
    chat.run_command(session, "/reset")
    said(session, "And that?")
    assert not torch.equal(session.video_tokens, first)


@pytest.mark.parametrize("fields", [dict(end=0.04), dict(num_frames=1), dict(tokens="branch")], ids=str)
def test_where_rows_are_the_same_a_second_question_costs_its_own_words(choosing, fields):
    session = choosing(**{"num_frames": 1, **fields})
    said(session, "What is red?")
    first, known = session.video_tokens, session.cost.new
    said(session, "And that?")
    assert session.video_tokens is first and session.cost.cached >= known


def test_questions_of_their_own_have_rows_of_their_own(choosing):
    session, questions = choosing(), ("what moves?", "\u043a\u0443\u0434\u0430?", "left? " * 50, "what moves?")
    lines = [chat.answer_line(session, question) for question in questions]
    assert lines[0] == lines[3] != lines[1]


def test_an_hour_of_video_is_seen_to_its_end_and_a_moment_whole(choosing, capsys):
    session = choosing()
    assert len(session.seen.times) == (8 if session.cfg.tokens == "linvt" else 32)
    session.show(dataclasses.replace(session.seen, rows=session.seen.rows[:, :1], times=[0.0]))
    said(session)
    chat.run_command(session, "/explain")
    assert capsys.readouterr().err.endswith("0.0-7.0 s  100 %\n")


def test_a_linvt_of_another_training_throws_no_frames_away(choosing, tmp_path):
    fields = {"cache_dir": str(tmp_path / "c")}
    choosing(**fields)
    again = choosing(content=False, **fields)
    assert again.seen.before and len(os.listdir(tmp_path / "c")) == 1


def test_the_first_line_says_that_there_is_a_linvt(choosing, capsys):
    choosing(tokens="branch", num_frames=1)
    assert "; --tokens branch+linvt for long videos" in capsys.readouterr().err
    choosing()
    assert "linvt" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- /explain
@pytest.mark.parametrize("content", [True, False])
def test_explain_tells_the_weights_of_the_last_answer(choosing, content, capsys, tmp_path, monkeypatch):
    session, path = choosing(content), tmp_path / "why.png"
    said(session, "What is red?"), said(session, "And that?")
    words, tokens = session.chat.embed_questions(["And that?"]), session.chat.video_tokens
    W = tokens.weigh(session.seen.rows, *words)[0]                                           # (M, T, N)
    values = tokens.mm_projector(session.seen.rows)[0].flatten(0, 1)
    assert (W.flatten(1) @ values - session.video_tokens).abs().max() < 1e-4   # it is what was given
    assert (W.sum((1, 2)) - 1).abs().max() < 1e-5
    capsys.readouterr()
    units = W.sum(2).mean(0)
    chat.run_command(session, "/explain")
    lines = capsys.readouterr().err.splitlines()
    step = 7 / len(units)
    for i in units.argsort(descending=True)[:int((units >= 0.05).sum())].tolist():
        assert lines.pop(0) == f"{i * step:.1f}-{(i + 1) * step:.1f} s  {100 * units[i]:.0f} %"
    assert len(lines) == ((units < 0.05).any())
    drawn, explanation = [], pictures.explanation
    monkeypatch.setattr(pictures, "explanation", lambda *given: drawn.append(given) or explanation(*given))
    for _ in range(2):
        chat.run_command(session, f"/explain {path}")
    assert Image.open(path).format == "PNG" and capsys.readouterr().err == f"wrote {path}\n" * 2
    _, heading, edges, shares, names, frames, places = drawn[0]
    assert heading.startswith("And that?\n") and sum(shares) == pytest.approx(1, abs=1e-5)
    assert shares == pytest.approx(units.tolist()) and len(edges) == len(names) + 1 == len(frames) + 1
    assert (places is not None) == content
    assert f"LinVT: {len(units)} units, {W[0].numel()} tokens seen, {len(W)} given" in session.stats()
    (tmp_path / "thesis.png").write_text("mine")
    with pytest.raises(UserError, match="did not write"):
        chat.run_command(session, f"/explain {tmp_path / 'thesis.png'}")


def test_explain_needs_an_answer_and_a_linvt(choosing, session):
    with pytest.raises(UserError, match="nothing has been asked yet"):
        chat.run_command(choosing(), "/explain")
    with pytest.raises(UserError, match="^explain: branch tokens are the same for every question; [^\n]*$"):
        chat.run_command(session, "/explain")


def test_a_question_from_a_flag_is_explained_in_a_picture(call, choosing, folder, long_video, tmp_path):
    tokens = choosing().cfg.tokens
    flags = ("--explain", tmp_path / "why.png")
    code, out, err = call(*ASK, *flags, "--tokens", tokens, video=long_video, weights=folder)
    assert code == 0 and out.count("\n") == 1 and err.endswith(f"wrote {tmp_path / 'why.png'}\n")


def test_what_cannot_be_explained_is_refused_before_the_answer(call, tmp_path):
    code, out, err = call(*ASK, "--explain", tmp_path / "why.png")
    assert (code, out) == (2, "") and "explain: branch tokens are the same" in err


# ------------------------------------------------------------------------------------------- when it happens
@pytest.fixture(scope="module")
def clock_weights(tmp_path_factory, tokenizer_model):
    """Weights for `frame_cls`: their LLaMA reads CLIP's projected features."""
    folder = tmp_path_factory.mktemp("clock")
    write_clip(folder / "clip")
    write_llava(folder / "llava", tokenizer_model, visual=16)
    return str(folder)


@pytest.fixture
def clock(begin, clock_weights, monkeypatch):
    """clock(answer, chances, fields of chat.Config...) -> a chat whose LLaMA gives this answer to everything.

    It works through all tokens as ever; only then its logits are replaced. chances {place: (p(a), p(b | a))},
    a tensor (10,) and one (10, 10): what it thinks of the digits from this token of the answer on."""
    def clock(answer, chances={}, **fields):
        session = begin(**{"weights": clock_weights, "tokens": "frame_cls", "max_new_tokens": 99, **fields})
        tokenizer, worked, start = session.chat.tokenizer, session.chat.llm.forward, [0]
        script = [*tokenizer.encode(answer), tokenizer.eos_id]

        def forward(ids=None, embeds=None, kv_cache=None, last_only=False, apart=False):
            logits = torch.full_like(worked(ids, embeds, kv_cache, last_only, apart), -50)
            start[0] = start[0] if embeds is None else kv_cache.length   # where the answer begins
            place = kv_cache.length - start[0] - (len(logits[0]) if apart else 0)
            if apart:
                logits[0][:, digits(session)] = chances[place][1].log()
            elif place in chances:
                logits[0, -1, digits(session)] = chances[place][0].log()
                logits[0, -1, tokenizer.eos_id] = (1 - chances[place][0].sum()).log()
            else:
                logits[0, -1, script[place]] = 50
            return logits
        monkeypatch.setattr(session.chat.llm, "forward", forward)
        return session
    return clock


def digits(session):
    return [session.chat.tokenizer.encode(str(digit))[-1] for digit in range(10)]


def state(session):
    """What a conversation has in mind, with its keys and values."""
    cache = session.kv_cache
    tensors = [t[:, :, :cache.length].clone() for t in (*cache.k, *cache.v)]
    return session.turns, session.forgotten, session.cached_ids, session.cfg, cache.length, tensors


def same_state(a, b):
    return a[:-1] == b[:-1] and all(map(torch.equal, a[-1], b[-1]))


@pytest.mark.parametrize("template", ["vtimellm", "vicuna_v1"])   # the video before the question, or behind
def test_when_prints_the_time_and_leaves_the_conversation_to_the_bit(clock, capsys, monkeypatch, template):
    monkeypatch.setenv("COLUMNS", "103")
    monkeypatch.setattr(model.FrameCLS, "template", template)
    session = clock("It is from 25 to 75.")
    said(session, "What is this?" * 9), said(session)
    before = state(session)
    capsys.readouterr()
    chat.run_command(session, "/when a dog jumps")
    out, err = capsys.readouterr()
    assert out == "0:00.5 to 0:01.5 (± 0.1 s)\n"
    bar = "." * 25 + "\u2588" * 50 + "." * 25
    assert err == f" |{bar}|\n(a step of the clock, of 100, is 0.02 s)\n"
    assert same_state(state(session), before)
    said(session, "And that?")
    assert session.cost.cached == before[4] and session.turns[-1][0] == "And that?"


def test_ctrl_c_within_when_leaves_the_conversation_as_it_was(clock, monkeypatch):
    session = clock("It is from 25 to 75.")
    said(session, "What is this?")
    before, calls, forward = state(session), [], session.chat.llm.forward

    def stopped(*given, **more):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(*given, **more)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(session.chat.llm, "forward", stopped)
        chat.run_command(session, "/when a dog jumps")
    assert len(calls) == 4 and same_state(state(session), before)


def test_the_chances_of_100_starts_and_ends_are_read_from_the_logits(clock, capsys):
    torch.manual_seed(0)
    answer = "In 150 to 160, from 23 to 45."   # of which the first is no time of the clock
    session = clock(answer)
    script = session.chat.tokenizer.encode(answer)
    places = [i for i, token in enumerate(script) if token in digits(session)][6:]
    chances = {}
    for place, (a, b) in ((places[0], (2, 3)), (places[2], (4, 5))):   # the named digits are the likeliest
        tens, units = torch.rand(10), torch.rand(10, 10).softmax(1)
        tens[a] = 2
        chances[place] = tens / tens.sum() * 0.9, units   # in 1 of 10 it ends here
    session = clock(answer, chances, json=True, temperature=2.0)   # it is asked greedily
    before = state(session)
    chat.run_command(session, "/when! it jumps")
    row = json.loads(capsys.readouterr().out)
    for name, place in (("p_start", places[0]), ("p_end", places[2])):
        tens, units = chances[place]
        assert row[name] == pytest.approx((tens[:, None] * units).flatten().tolist(), abs=2e-6)
        assert sum(row[name]) == pytest.approx(0.9, abs=1e-3)
    assert (row["answer"], row["from"], row["to"]) == (answer, 23, 45) and same_state(state(session), before)
    chat.run_command(session, "/when! it jumps")
    lines = capsys.readouterr().err.splitlines()
    assert [line[:7] for line in lines[:3]] == ["start |", "end   |", "      |"]


def test_times_are_those_of_the_whole_video_and_the_step_of_the_clock_is_said(clock, capsys):
    session = clock("From 00 to 50.", start=1.0)
    chat.run_command(session, "/when it moves")
    assert capsys.readouterr().out == "0:01.0 to 0:01.5 (± 0.1 s)\n"
    session.seen = dataclasses.replace(session.seen, window=(1800, 5400), duration=5400)
    chat.run_command(session, "/when it moves")
    out, err = capsys.readouterr()
    assert out == "30:00.0 to 1:00:00 (± 18.0 s)\n" and "is 36.00 s" in err


@pytest.mark.parametrize("answer, lines", [
    ("From 10 to 20 and from 60 to 99.", ["0:00.2 to 0:00.4 (± 0.1 s)", "0:01.2 to 0:02.0 (± 0.1 s)"]),
    ("From 75 to 25.", ["0:00.5 to 0:01.5 (± 0.1 s, named backwards)"]),
    ("From 40 to 40.", ["0:00.8 to 0:00.8 (± 0.1 s)"]),
    ("1 - 1 seconds", ["0:01.0 to 0:01.0 (± 0.1 s)"])])
def test_every_time_of_an_answer_is_a_line(clock, capsys, answer, lines):
    session = clock(answer)
    chat.run_command(session, "/when it moves")
    assert capsys.readouterr().out.splitlines() == lines


def test_an_answer_without_a_time_is_one_line_and_null_in_json(clock, capsys):
    session = clock("A red\ncircle.")
    for line in ("/when it moves", "/when! it moves", "/when"):
        capsys.readouterr()
        chat.run_command(session, line)
        assert capsys.readouterr() == ("", "(the model did not name a time: A red circle.)\n")
    session = clock("A circle.", json=True)
    capsys.readouterr()
    chat.run_command(session, "/when! it moves")
    nothing = dict.fromkeys(("start", "end", "from", "to", "p_start", "p_end"))
    assert json.loads(capsys.readouterr().out) == {"event": "it moves", "answer": "A circle.", **nothing}


def test_all_events_are_listed_and_written_as_subtitles(clock, capsys, tmp_path):
    session = clock("From 50 to 99, a star spins. From 05 to 25, a ring moves left.")
    path = tmp_path / "a b.srt"
    chat.run_command(session, f"/when --srt '{path}'")
    assert capsys.readouterr().out == ("0:00.1 to 0:00.5 (± 0.1 s)  a ring moves left\n"
                                       "0:01.0 to 0:02.0 (± 0.1 s)  a star spins\n")
    assert path.read_text() == ("1\n00:00:00,100 --> 00:00:00,500\na ring moves left\n\n"
                                "2\n00:00:01,000 --> 00:00:02,000\na star spins\n")
    with pytest.raises(UserError, match="a b.srt: is there already"):
        chat.run_command(session, f"/when --srt {path}")
    chat.run_command(clock("From 50 to 99, a star spins.", json=True), "/when")
    row = json.loads(capsys.readouterr().out)
    assert (row["event"], row["start"], row["end"], row["from"], row["to"]) == ("a star spins", 1, 2, 50, 99)


def test_weights_without_a_clock_are_told_which_have_one(call):
    code, out, err = call("-q", "/when a dog jumps")
    line = err.splitlines(keepends=True)[-1]
    assert refused((code, out, line), "frame_cls", "VTimeLLM's (python -m weights get vtimellm)")


def test_a_llama_that_writes_numbers_whole_is_told_at_when_with_bars(clock, monkeypatch):
    session = clock("From 23 to 45.")
    tokenizer, encode = session.chat.tokenizer, session.chat.tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: [0] if text.isdigit() else encode(text))
    with pytest.raises(UserError, match="digit by digit"):
        chat.run_command(session, "/when! it moves")


@pytest.mark.parametrize("line, usage", [("/when!", "/when! EVENT "), ("/when --srt", "/when EVENT ")])
def test_when_that_is_typed_wrong_says_how_it_is_used(clock, line, usage):
    with pytest.raises(UserError, match=f"^{re.escape(usage)}"):
        chat.run_command(clock(""), line)


# --------------------------------------------------------------------------------------- results of training
def test_a_branch_of_pretraining_takes_the_place_of_the_one_in_the_folder(call, folder, tmp_path):
    write_branch(tmp_path / "new.pth", seed=1)
    given = call(*ASK, "--branch", tmp_path / "new.pth")
    shutil.copy(tmp_path / "new.pth", folder / "branch.pth")
    assert given[:2] == call(*ASK, weights=folder)[:2] and given[1] != call(*ASK)[1]


def test_a_file_of_chat_tuning_says_for_which_kind_of_tokens_it_is(call, weights, tmp_path):
    chat_model = model.open_chat(weights, "mean").load()
    torch.nn.init.normal_(chat_model.video_tokens.mm_projector.weight)
    model.save_chat(tmp_path / "chat.bin", chat_model)
    tuned = call(*ASK, "--chat", tmp_path / "chat.bin")
    assert "4 video tokens" in tuned[2] and ": tuned for mean," in tuned[2]
    with pytest.warns(UserWarning, match="tuned for mean, not for st_pool"):
        call(*ASK, "--chat", tmp_path / "chat.bin", "--tokens", "st_pool")


# ------------------------------------------------------------------------------------------------ bad weights
class Bomb:
    """What a pickle of it does on loading is to create a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def bomb(folder, tokenizer_model):
    tensors = {"backbone.btadapter_cls_token": Bomb(folder / "it-ran")}
    torch.save({"state_dict": tensors}, folder / "branch.pth")


def narrow_llama(folder, tokenizer_model):
    config = json.loads((folder / "llava/config.json").read_text())
    (folder / "llava/config.json").write_text(json.dumps({**config, "intermediate_size": 64}))


def edit(name, change):
    return lambda folder, _: (folder / name).write_bytes(change((folder / name).read_bytes()))


def remove(name):
    return lambda folder, _: (folder / name).unlink()


def without(name):
    return lambda folder, _: shutil.rmtree(folder / name)


BAD_WEIGHTS = {   # name: (what is done to a good folder, words of the complaint)
    "no clip": (without("clip"), ["clip"]),
    "no llava": (without("llava"), ["llava"]),
    "no branch": (remove("branch.pth"), ["lacks branch.pth (python -m weights get branch --out "]),
    "no tokenizer": (remove("llava/tokenizer.model"), ["tokenizer.model", "No such file"]),
    "clip of another width": (lambda folder, _: write_clip(folder / "clip", vision_width=48),
                              ["llava", "does not fit", "48"]),
    "llava of another clip": (lambda folder, model: write_llava(folder / "llava", model, visual=48),
                              ["llava", "does not fit", "48"]),
    "llava of other sizes than it says": (narrow_llama, ["llava", "does not fit", "mlp"]),
    "branch of another width": (lambda folder, _: write_branch(folder / "branch.pth", 48),
                                ["branch.pth", "does not fit"]),
    "branch that wants to run code": (bomb, ["branch.pth", "it asks for posix.system"]),
    "branch that is text": (edit("branch.pth", lambda b: b"hello"),
                            ["branch.pth", "neither safetensors nor"]),
    "cut branch": (edit("branch.pth", lambda b: b[:len(b) // 2]), ["branch.pth", "cut"]),
    "cut safetensors": (edit("llava/model.safetensors", lambda b: b[:-1]), ["model.safetensors", "cut"]),
    "safetensors with a damaged header": (edit("clip/model.safetensors", lambda b: b[:8] + b"{{" + b[10:]),
                                          ["model.safetensors", "damaged"]),
    "empty safetensors": (edit("llava/model.safetensors", lambda b: b""), ["model.safetensors", "empty"]),
    "damaged config": (edit("llava/config.json", lambda b: b[:-9]), ["config.json", "JSON"])}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_one_line_and_exit_code_2(call, folder, tokenizer_model, name):
    def contents():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    make, words = BAD_WEIGHTS[name]
    make(folder, tokenizer_model)
    before = contents()
    assert refused(call(*ASK, weights=folder), folder, *words)
    assert before == contents()   # also: no file `it-ran`


def test_the_code_in_that_branch_would_run_elsewhere(tmp_path):
    """Without this the test above would prove nothing."""
    bomb(tmp_path, None)
    torch.load(tmp_path / "branch.pth", weights_only=False)
    assert (tmp_path / "it-ran").exists()


def test_missing_weights_are_one_line_that_names_all_and_how_to_get_them(call, video, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty"):
        lines = [f"{part} (python -m weights get {name} --out {folder})"
                 for part, name in (("clip", "clip"), ("llava", "llava"), ("branch.pth", "branch"))]
        assert refused(call(*ASK, weights=folder), f"{folder}: lacks {', '.join(lines)}")
    assert refused(call(*ASK, weights=video), video)


def test_a_branch_beside_one_that_was_tuned_is_refused_and_alone_it_is_the_zero_shot_setting(call):
    tiny = os.path.join(os.path.dirname(chat.__file__), "weights", "tiny")
    branch, tuned = os.path.join(tiny, "branch.pth"), os.path.join(tiny, "chat.bin")
    both = call(*ASK, "--branch", branch, "--chat", tuned, weights=tiny)
    assert refused(both, tuned, "a branch of its own")
    assert "without chat.bin" in call(*ASK, "--branch", branch, weights=tiny)[2]
