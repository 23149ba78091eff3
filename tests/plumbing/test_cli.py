"""Flags, and files that are never half written."""
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import chat
import chat_tune
import data
import eval_retrieval
import pretrain
import search
from plumbing import cli, pictures
from plumbing.cli import UserError


@dataclasses.dataclass
class Config:
    """A config as the scripts have them."""
    name: str                # needed
    size: int = 3            # with a 50 % sign
    rate: float = 1e-3       # small
    fast: bool = True        # a switch
    maybe: cli.Count | None = None   # unset
    size_of_word: cli.Share = 1      # bounded


def test_flags_come_from_the_dataclass():
    assert cli.parse(Config, ["--name", "x"]) == Config("x")
    flags = "--name x --size 4 --rate 2e-6 --no-fast --maybe 7 --size_of_word 0.5".split()
    assert cli.parse(Config, flags) == Config("x", 4, 2e-6, False, 7, 0.5)
    assert cli.parse(Config, ["x", "-s", "9"], positional=["name"], short={"size": "s"}) == Config("x", 9)


def test_help_shows_the_comments_and_defaults(capsys):
    with pytest.raises(SystemExit) as left:
        cli.parse(Config, ["--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and "with a 50 % sign (default: 3)" in out and "--name STR " in out


def test_a_field_that_is_none_of_its_choices_or_beyond_its_bounds_is_refused():
    cli.check(Config("x"), name={"x": 1, "y": 2})
    with pytest.raises(UserError, match="--name z: choose one of x, y"):
        cli.check(Config("z"), name={"x": 1, "y": 2})
    for value in (2, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"--size_of_word {value}: must be from 0 to 1"):
            cli.check(Config("x", size_of_word=value))


@pytest.mark.parametrize("script, flags, message", [
    (chat_tune, "--system foo", "--system: no such flag; --help lists them"),
    (chat_tune, "--stage song", "--stage song: choose one of projector, language, video"),
    (chat_tune, "", "--stage: needed"),
    (chat_tune, "--stage video --lr -1", "--lr -1.0: must be from 0 to 1e.09"),
    (chat_tune, "--stage video --lr nan", "--lr nan: must be"),
    (chat_tune, "--stage video --workers -1", "--workers -1"),
    (chat_tune, "--stage video --clip_norm -1", "--clip_norm -1"),
    (chat_tune, "--stage video --drop_path 1.5", "--drop_path 1.5: must be from 0 to 0.99"),
    (chat_tune, "--stage video --steps 0", "--steps 0"), (pretrain, "--steps 0", "--steps 0"),
    (chat_tune, "--stage video --batch_size 0", "--batch_size 0: must be from 1"),
    (pretrain, "--lr fast", "--lr: invalid float value: 'fast'"), (pretrain, "--lr", "--lr: expected one"),
    (pretrain, "--batchsize=4", "--batchsize=4: no such flag; did you mean --batch_size?"),
    (pretrain, "--colour red", "--colour: no such flag; --help lists them"),
    (pretrain, "--mask_ratio 1", "--mask_ratio 1.0"), (pretrain, "--num_frames 0", "--num_frames 0"),
    (pretrain, "--batch_size 1", "--batch_size 1: must be from 2"),
    (pretrain, "--recipe mine", "--recipe mine: choose one of released, paper, toy"),
    (pretrain, "--precision fp8", "--precision fp8"), (pretrain, "--device tpu", "--device tpu: choose"),
    (search, "index videos --window nan", "--window nan"), (search, "dog --batch_size 0", "--batch_size 0"),
    (search, "dog --top 0", "--top 0"), (search, "a dog jumps", "jumps: one word too many; quotes"),
    (search, "", "what: needed"), (eval_retrieval, "--dataset tv", "--dataset tv"),
    (eval_retrieval, "--workers -1", "--workers -1"), (eval_retrieval, "--batch_size 0", "--batch_size 0"),
    (data, "--start 1:75", "--start: 1:75 is no time; write seconds, m:ss or h:mm:ss"),
    (chat, "--video v.mp4", "--video: no such flag; give it without a flag"),
    (chat, "v.mp4 What?", r"What\?: one word too many; a question goes behind -q"),
    (chat, "--qestion What?", r"--qestion: no such flag; did you mean --question\?")])
def test_a_flag_that_cannot_be_is_one_line(script, flags, message):
    with pytest.raises(UserError, match=message) as e:
        cli.parse(script.Config, flags.split(), **getattr(script, "FLAGS", {}))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("script", ["pretrain.py", "chat_tune.py", "eval_retrieval.py", "search.py", "chat.py",
                                    "data.py", "weights/__main__.py"])
def test_flags_are_read_before_the_imports_that_take_seconds(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    command = [sys.executable, os.path.join(os.path.dirname(chat.__file__), script), "--colour", "red"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(
        tmp_path) + os.pathsep + os.path.dirname(chat.__file__)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "torch" not in done.stderr and "Traceback" not in done.stderr


def test_only_a_file_of_the_same_kind_may_be_replaced_and_no_pipe_is_waited_for(tmp_path):
    (tmp_path / "own").write_bytes(b"mine: 1")
    (tmp_path / "other").write_bytes(b"thesis")
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", tmp_path / "link")
    for name in ("own", "new"):
        cli.replaceable(tmp_path / name, b"mine")
    for name in ("other", "pipe", "link", "."):
        with pytest.raises(UserError, match="did not write; choose another name"):
            cli.replaceable(tmp_path / name, b"mine")


def test_a_row_of_settings_fills_what_is_not_given_and_what_stays_open_is_needed():
    assert cli.fill(Config("x"), {"maybe": 7, "size": 9, "other": 0}) == Config("x", maybe=7)
    assert cli.fill(Config("x", maybe=0), {"maybe": 7}).maybe == 0
    with pytest.raises(UserError, match="--maybe: needed"):
        cli.fill(Config("x"), {})


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(f):
        f.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        cli.write_atomic(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        cli.write_atomic(tmp_path / "nowhere" / "file", lambda f: None)


def test_a_plot_is_drawn_also_of_one_point_nothing_and_nan(tmp_path):
    series = {"x": [(0, 1.0), (1, float("nan")), (2, 3.0)]}
    pictures.plot(tmp_path / "p.png", [("a", series), ("b", {"y": [(1, 1)]}), ("c", {})])
    picture = Image.open(tmp_path / "p.png")
    assert picture.size == (900, 1080) and len(picture.getcolors(1 << 20)) > 10


def test_few_points_of_a_plot_are_marked_one_too(tmp_path):
    for count in (1, 3, 200):
        pictures.plot(tmp_path / "p.png", [("a", {"x": [(i, 1.0) for i in range(1, count + 1)]})])
        blue = (np.asarray(Image.open(tmp_path / "p.png"))[54:] == (31, 119, 180)).all(-1)   # under the legend
        assert (blue.sum(0).max() > 3) == (count < 200)   # higher than a line


@pytest.mark.parametrize("given, parent", [("/cache", "/cache"), ("", "/home/me/.cache")])
def test_what_is_kept_for_a_user_is_where_the_system_wants_it(monkeypatch, given, parent):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", "/home/me")
    assert cli.own_folder("XDG_CACHE_HOME", "~/.cache") == f"{parent}/nanobt"


def test_the_default_of_a_script_is_found_from_any_folder(tmp_path, monkeypatch):
    for folder in (tmp_path, os.path.dirname(os.path.dirname(cli.__file__)), "/"):
        monkeypatch.chdir(folder)
        assert os.path.isdir(cli.shipped("weights/tiny"))
    monkeypatch.chdir(os.path.dirname(os.path.dirname(cli.__file__)))
    assert cli.shipped("weights/tiny") == "weights/tiny"
