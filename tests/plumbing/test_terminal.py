"""chat.py on a terminal: pictures made of characters, typed lines, a conversation on a pseudo-terminal."""
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import types

import pytest
import torch
from PIL import Image

import chat
from plumbing import terminal
from plumbing.cli import Seconds, UserError
from small import write_video

SECONDS = 60   # until a program that says nothing is given up: a guard, not a measurement


# --------------------------------------------------------------------------------------- frames on a terminal
def plain(text):
    """Text as one reads it on a terminal: without escape sequences, a line that was begun anew only once."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n")
    return re.sub(r"[^\n]*\r", "", text)


@pytest.fixture
def shown(monkeypatch):
    """shown(frames, times, environment variables...) -> what show_frames writes to a terminal."""
    def shown(frames, times, **variables):
        stderr = io.StringIO()
        with monkeypatch.context() as patched:
            patched.setattr(stderr, "isatty", lambda: True, raising=False)
            for name, value in {"TERM": "xterm-256color", "NO_COLOR": "", **variables}.items():
                patched.setenv(name, value)
            patched.setattr(sys, "stderr", stderr)
            terminal.show_frames(frames, times)
        return stderr.getvalue()
    return shown


@pytest.mark.parametrize("shape", [(48, 64), (64, 64), (64, 20), (400, 2), (2, 400)], ids=str)
@pytest.mark.parametrize("columns", [10, 40, 80, 200])
def test_no_line_of_frames_is_wider_than_the_terminal(shown, columns, shape):
    frames, times = torch.zeros(7, 3, *shape, dtype=torch.uint8), [0.25 * i for i in range(7)]
    for plainly in ("", "1"):
        text = plain(shown(frames, times, COLUMNS=str(columns), NO_COLOR=plainly))
        assert max(map(len, text.splitlines())) <= columns
        if columns >= 40:
            assert all(f"{i}: {t:.2f} s" in text for i, t in enumerate(times))


def test_80_columns_hold_four_pictures_and_40_hold_two(shown):
    frames = torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
    for columns, across in ((80, 4), (40, 2)):
        lines = shown(frames, [0.0] * 8, COLUMNS=str(columns)).splitlines()
        assert plain(lines[0]).count("\u2580") == 18 * across and len(lines) == 8 // across * (9 + 1)


def test_a_half_block_has_the_upper_pixel_as_its_colour_and_the_lower_as_its_ground():
    picture = torch.tensor([[[1, 4]], [[2, 5]], [[3, 6]]], dtype=torch.uint8).transpose(1, 2)   # (3, 2, 1)
    assert terminal.half_blocks(picture) == ["\x1b[38;2;1;2;3;48;2;4;5;6m\u2580\x1b[0m"]


@pytest.mark.parametrize("columns", [1, 40, 80, 200])
def test_bars_fit_into_the_terminal_and_the_largest_step_is_the_highest_cell(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    chances = [0.001] * 100
    chances[42] = 0.1
    rows = {"start": chances, "": [k == 99 for k in range(100)], "end": None}
    terminal.show_bars(rows)
    lines = capsys.readouterr().err.splitlines()
    first, second = (line.split("|")[1] for line in lines)
    assert len(lines) == 2 and len(lines[0]) == len(lines[1]) <= max(columns, 9) and len(first) <= 100
    assert first.index("#") == 42 * len(first) // 100 and second.endswith("#")
    assert first.count("#") == second.count("#") == 1 and "-" not in first + second


def test_bars_are_ascii_where_a_terminal_is_simple(monkeypatch, capsys):
    rows = {"": [k >= 50 for k in range(100)]}
    terminal.show_bars(rows)
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.show_bars(rows)
    blocks, simple = capsys.readouterr().err.splitlines()
    assert "\u2588" in blocks and simple == blocks.replace("\u2588", "#")


def test_a_terminal_with_colours_shows_pictures(session, shown):
    assert "\u2580" in (text := shown(session.seen.frames, session.seen.times)) and "7: 1.80 s" in text


@pytest.mark.parametrize("terminal", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_without_colour_the_frames_are_only_times(session, shown, terminal):
    text = shown(session.seen.frames, session.seen.times, **terminal)
    assert "\x1b" not in text and "\u2580" not in text and "7: 1.80 s" in text


def test_where_stderr_is_no_terminal_the_frames_are_only_times(session, capsys):
    terminal.show_frames(session.seen.frames, session.seen.times)
    assert "\x1b" not in (err := capsys.readouterr().err) and "0: 0.10 s" in err


# ------------------------------------------------------------------------------------------- as a person does
class Terminal:
    """chat.py on a pseudo-terminal. `text` is all that came out of it, without escape sequences."""
    def __init__(self, *arguments, columns, state):
        command = [sys.executable, os.path.abspath(chat.__file__), *map(str, arguments)]
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        environment |= {
            "TERM": "xterm-256color", "INPUTRC": os.devnull, "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8",
            "XDG_STATE_HOME": str(state), "OMP_NUM_THREADS": "1"}   # small models: threads would only wait
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # a shell ignores it in what it starts in the background, and that is inherited
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execve(sys.executable, command, environment)
        self.raw, self.reads = b"", 0
        self.resize(columns)

    def resize(self, columns):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    @property
    def text(self):
        return plain(self.raw.decode(errors="replace"))

    def read(self):
        """Waits for more. False once the program has gone."""
        assert select.select([self.fd], [], [], SECONDS)[0], f"nothing more comes after: {self.text[-2000:]}"
        try:
            new = os.read(self.fd, 65536)
        except OSError:   # how Linux says that the other side is closed
            new = b""
        self.raw, self.reads = self.raw + new, self.reads + 1
        return bool(new)

    def until(self, condition):
        while not condition():
            assert self.read(), f"ended too early: {self.text[-2000:]}"

    def prompt(self):
        """-> what has been printed since the last call, once the program waits for a line."""
        self.until(lambda: self.text.endswith("\n> ") or self.text == "> ")
        out, self.raw = self.text.removesuffix("> "), b""
        return out

    def press(self, keys):
        os.write(self.fd, keys)

    def interrupt(self):
        """Ctrl-C, once more if nothing happens: Python misses one just after its prompt."""
        for _ in range(SECONDS // 2):
            self.press(b"\x03")
            if select.select([self.fd], [], [], 2)[0]:
                return
        raise AssertionError("Ctrl-C is not answered")

    def type(self, line):
        self.press(line.encode() + b"\r")

    def do(self, line):
        """Types a line -> what it prints until the next prompt, without the echo."""
        self.type(line)
        self.until(lambda: "\n" in self.text)   # after a resize the prompt is drawn once more before the echo
        return self.prompt().split("\n", 1)[1]

    def leave(self, key):
        self.press(key)
        while self.read():
            pass
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


UP, CTRL_D = b"\x1b[A", b"\x04"


@pytest.fixture(scope="module")
def talk(weights, video, tmp_path_factory):
    """One conversation, with weights that never end an answer -> what was printed at each step."""
    folder = tmp_path_factory.mktemp("talk")
    other, bad = write_video(folder / "other.mp4", 48, 64, 1), folder / "bad.mp4"
    bad.write_text("not a video")
    t = types.SimpleNamespace(folder=folder, other=other)
    person = Terminal(video, "--weights", weights, "--max_new_tokens", 1000, columns=80, state=folder)
    person.read()
    t.first = person.raw.decode()
    t.welcome = person.prompt()

    person.type("what moves?")   # and does not want to hear all of it
    person.until(lambda: len(person.text) > len("what moves?\n") + 3)
    person.press(b"\x03")
    t.stopped, before = person.prompt(), person.reads
    t.answers = [person.do("which way?")]
    t.reads = person.reads - before
    t.stats = person.do("/stats")
    person.press(UP + UP)   # past /stats
    t.answers.append(person.do(""))
    t.set = [person.do("/set max_new_tokens 5"), person.do("/set")]
    person.type('"""what moves,')
    person.until(lambda: person.text.endswith("\n... "))
    t.answers.append(person.do('and which way?"""'))
    t.pasted = person.do("\x1b[200~what\n  moves\nthere?\x1b[201~")
    t.help = person.do("/help")
    t.wide = person.do("/frames")
    person.resize(40)
    t.narrow = person.do("/frames")
    t.png = person.do(f"/frames {folder}/frames.png")
    t.saved = person.do(f"/save {folder}/talk.json")

    t.complaints = [(path, person.do(f"/video {path}")) for path in (bad, folder / "nowhere.mp4", folder)]
    t.still = person.do("/frames")
    t.video = person.do(f"/video {other}")
    t.others = person.do("/frames")
    t.words = [person.do(word) for word in ("help", "?", "/?")]
    t.reset, t.dance, t.nothing = person.do("/reset"), person.do("/dance"), person.do("")
    person.interrupt()
    t.ctrl_c = person.prompt()
    person.type('"""what')
    person.until(lambda: person.text.endswith("\n... "))
    person.press(CTRL_D)
    t.cancelled = person.prompt()
    t.code = person.leave(CTRL_D)
    return t


def test_it_begins_with_what_it_sees_and_how_to_get_help(talk, video, weights):
    assert video in talk.welcome and weights in talk.welcome and "/help" in talk.welcome


def test_before_the_slow_imports_a_terminal_sees_that_it_starts(talk):
    assert talk.first.split() == ["chat.py:", "starting"] and "starting" not in talk.welcome


def test_an_answer_comes_in_many_pieces(talk):
    assert talk.reads > 30   # an answer in one piece would take three: a pseudo-terminal hands over 4 kB


def test_ctrl_c_stops_an_answer_that_has_begun(talk):
    assert talk.stopped.endswith("\n(stopped)\n") and "cut after" not in talk.stopped


def test_after_ctrl_c_the_next_answers_are_whole(talk):
    for answer in talk.answers[:2]:
        assert answer.endswith("\n(cut after 1000 tokens, see --max_new_tokens)\n") and len(answer) > 1000


def test_stats_say_what_the_last_answer_took(talk):
    assert re.fullmatch(r"video: 5 tokens from 8 frames\nprompt: \d+ tokens known, \d+ new\n"
                        r"answer: the first token after \d\.\d\d s, all 1000 after \d+\.\d\d s\n"
                        r"memory: 0\.\d\d GB\n", talk.stats)
    known, new = map(int, re.search(r"(\d+) tokens known, (\d+) new", talk.stats).groups())
    assert known > new > 0   # the conversation before, and the question


def test_arrow_up_brings_a_question_back(talk):
    with open(talk.folder / "talk.json") as f:
        asked = [turn["question"] for turn in json.load(f)["turns"]]
    assert asked[:3] == ["what moves?", "which way?", "which way?"]


def test_three_quotes_or_a_paste_hold_a_question_of_several_lines(talk):
    assert "(cut after 5 tokens" in talk.answers[2] and "(cut after 5 tokens" in talk.pasted
    with open(talk.folder / "talk.json") as f:
        asked = [turn["question"] for turn in json.load(f)["turns"]]
    assert asked[3:] == ["what moves,\nand which way?", "what\n  moves\nthere?"]


def test_ctrl_d_within_three_quotes_cancels_the_question(talk):
    assert talk.cancelled.endswith("(cancelled)\n")


def test_set_changes_the_next_answer_and_shows_what_can_be_changed(talk):
    assert talk.set == ["max_new_tokens 5\n", "temperature 0.0\ntop_p 1.0\nmax_new_tokens 5\nseed 0\n"]


def test_help_names_every_command(talk):
    for command in ('"""', "/frames", "/video", "/reset", "/set", "/stats", "/save", "/quit", "Ctrl-C"):
        assert command in talk.help
    assert talk.words == [talk.help] * 3


def test_frames_fit_into_80_and_into_40_columns(talk):
    # the middles of 8 stretches, at 10 frames a second
    times = [(str(i), f"{int(2.5 * i + 1.25) / 10:.2f}") for i in range(8)]
    for columns, pictures in ((80, talk.wide), (40, talk.narrow)):
        lines = pictures.split("\n")
        assert "\u2580" in lines[0] and columns // 2 < max(map(len, lines)) <= columns
        assert re.findall(r"(\d): (\d\.\d\d) s", pictures) == times


def test_frames_and_the_conversation_are_written_to_files(talk):
    assert (talk.png, talk.saved) == (f"wrote {talk.folder}/frames.png\n", f"wrote {talk.folder}/talk.json\n")
    assert Image.open(talk.folder / "frames.png").format == "PNG"


def test_a_video_that_is_broken_is_one_line_and_the_old_one_stays(talk):
    for path, complaint in talk.complaints:
        assert str(path) in complaint.replace("\n", "") and complaint.count("\n") == 1
    assert talk.still == talk.narrow


def test_another_video_takes_its_place(talk):
    assert talk.other in talk.video and talk.others != talk.narrow


def test_commands_and_keys_that_ask_nothing_are_answered_in_a_line(talk):
    assert (talk.reset, talk.nothing) == ("a new conversation\n", "")
    assert talk.dance == "/dance: not a command; /help lists them\n"
    assert "Ctrl-D or /quit leaves" in talk.ctrl_c


def test_ctrl_d_leaves_with_exit_code_0(talk):
    assert talk.code == 0


def test_the_shipped_weights_answer_a_question_of_the_run_before(talk):
    """A second run: what was typed in the first is still above the first line. Its terminal is closed."""
    person = Terminal("--max_new_tokens", 50, columns=80, state=talk.folder)
    assert "sample.mp4" in person.prompt()
    person.press(UP)
    person.until(lambda: person.text.endswith('"""what'))
    person.press(b"\x15")   # Ctrl-U: not that one
    with open(os.path.join(os.path.dirname(chat.__file__), "assets", "sample.answers")) as f:
        assert person.do("What colour is the shape?") == f.readline()
    os.close(person.fd)
    assert os.waitstatus_to_exitcode(os.waitpid(person.pid, 0)[1]) == 129
    lines = (talk.folder / "nanobt" / "history").read_text().splitlines()
    assert lines.count("what moves?") == 1 and lines[-2:] == ['"""what', "What colour is the shape?"]


# --------------------------------------------------------------------------------------- lines that are typed
@pytest.mark.parametrize("lines, text", [
    (['"""one line"""'], "one line"), (['"""', "two", "lines", '"""'], "two\nlines"), (['""""""'], ""),
    (['"""a "" b', 'c""" d', 'e"""'], 'a "" b\nc""" d\ne'),
    (['"""', "  for i in x:", "      print(i)  ", '"""  '], "  for i in x:\n      print(i)")])
def test_a_question_ends_where_a_line_ends_with_three_quotes(monkeypatch, lines, text):
    rest = iter(lines[1:])
    monkeypatch.setattr(terminal, "read_line", lambda prompt: next(rest))
    assert terminal.rest_of(lines[0]) == text and next(rest, None) is None


@pytest.mark.parametrize("text, path", [
    ("/a b/c d.mp4", "/a b/c d.mp4"), ("'/a b/c d.mp4'", "/a b/c d.mp4"), ('"/a b/c d.mp4"', "/a b/c d.mp4"),
    (r"/a\ b/c\ d.mp4", "/a b/c d.mp4"), (r"'/it'\''s.mp4'", "/it's.mp4"), ("/it's.mp4", "/it's.mp4"),
    ("~/v.mp4", "/home/me/v.mp4"), (r"~/a\ b.mp4", "/home/me/a b.mp4"), ("'a' 'b'", "'a' 'b'"), ("", "")])
def test_a_path_may_be_quoted_or_escaped(monkeypatch, text, path):
    monkeypatch.setenv("HOME", "/home/me")
    assert terminal.path_of(text) == path


def test_a_file_with_quotes_in_its_name_is_found_by_this_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "'a.mp4'").touch()
    assert (terminal.path_of("'a.mp4'"), terminal.path_of("'b.mp4'")) == ("'a.mp4'", "b.mp4")


@pytest.mark.parametrize("text, path, span", [
    ("a.mp4", "a.mp4", None), ("a.mp4 1:00-1:15", "a.mp4", (60, 75)), ("1:00-1:15", "", (60, 75)),
    ("'my film.mp4' 12.0-14.0 s", "my film.mp4", (12, 14)), ("a b.mp4 0-1:01:15.5", "a b.mp4", (0, 3675.5)),
    ("12.0-14.0 s  /v/a 1.mp4", "/v/a 1.mp4", (12, 14)), ("2024-05-01", "2024-05-01", None),
    ("a.mp4 0:23.4 to 0:45.9 (± 0.2 s)", "a.mp4", (23.4, 45.9)), ("a 1-2", "a 1-2", None),
    ("a.mp4 1-2-3", "a.mp4 1-2-3", None)])
def test_a_part_of_a_video_stands_behind_its_path_before_it_or_alone(monkeypatch, tmp_path, text, path, span):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a 1-2").touch()
    assert terminal.path_and_part(text) == (path, span)


@pytest.mark.parametrize("text", ["0:40-0:80", "a.mp4 0:80-2:00", "1..2-3"])
def test_a_part_of_no_times_is_no_path(text):
    with pytest.raises(UserError, match="(0:80|1..2) is no time; write seconds, m:ss or h:mm:ss"):
        terminal.path_and_part(text)


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00.0"), (23.44, "0:23.4"), (59.96, "1:00.0"), (61.5, "1:01.5"), (3599.9, "59:59.9"),
    (3599.96, "1:00:00"), (86399.9, "23:59:59")])
def test_a_time_is_written_in_tenths_up_to_an_hour_and_read_back(seconds, text):
    assert terminal.timestamp(seconds) == text
    assert abs(Seconds(text) - seconds) < (1 if seconds > 3600 else 0.06)


@pytest.mark.parametrize("name", ["file/history", "folder"])   # a file for a folder, a folder for a file
def test_a_history_that_cannot_be_written_is_said_once(monkeypatch, tmp_path, name, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with terminal.history(str(tmp_path / name)):
        pass
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path / name) in err and "not kept" in err


def test_a_readline_that_cannot_add_lines_keeps_none(monkeypatch, tmp_path):
    """Some Pythons have libedit in readline's place, and some of these no append_history_file."""
    monkeypatch.setitem(sys.modules, "readline", types.SimpleNamespace())
    with terminal.history(str(tmp_path / "history")):
        pass
    assert list(tmp_path.iterdir()) == []
