"""Flags, and files that are never half written."""
import dataclasses
import os

import numpy as np
import pytest
from PIL import Image

from plumbing import cli, pictures
from plumbing.cli import UserError


@dataclasses.dataclass
class Config:
    """A config as the scripts have them."""
    name: str                # needed
    size: int = 3            # with a 50 % sign
    rate: float = 1e-3       # small
    fast: bool = True        # a switch
    maybe: int | None = None # unset


def test_flags_come_from_the_dataclass():
    assert cli.parse(Config, ["--name", "x"]) == Config("x")
    flags = "--name x --size 4 --rate 2e-6 --no-fast --maybe 7".split()
    assert cli.parse(Config, flags) == Config("x", 4, 2e-6, False, 7)
    assert cli.parse(Config, ["x", "-s", "9"], positional=["name"], short={"size": "s"}) == Config("x", 9)


def test_help_shows_the_comments_and_defaults(capsys):
    with pytest.raises(SystemExit) as left:
        cli.parse(Config, ["--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and "with a 50 % sign (default: 3)" in out and "--name STR " in out


def test_a_field_that_is_none_of_its_choices_or_too_small_is_refused():
    cli.one_of(Config("x"), name={"x": 1, "y": 2})
    with pytest.raises(UserError, match="--name z: choose one of x, y"):
        cli.one_of(Config("z"), name={"x": 1, "y": 2})
    cli.at_least(Config("x"), size=3)
    for config in (Config("x", size=2), Config("x", size=float("nan"))):
        with pytest.raises(UserError, match=f"--size {config.size}: must be at least 3"):
            cli.at_least(config, size=3)


def test_only_a_file_of_the_same_kind_may_be_replaced_and_no_pipe_is_waited_for(tmp_path):
    (tmp_path / "own").write_bytes(b"mine: 1")
    (tmp_path / "other").write_bytes(b"thesis")
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", tmp_path / "link")
    for name in ("own", "new"):
        cli.replaceable(tmp_path / name, "note", lambda start: start.startswith(b"mine"))
    for name in ("other", "pipe", "link", "."):
        with pytest.raises(UserError, match="something that is not a note; choose another name"):
            cli.replaceable(tmp_path / name, "note", lambda start: start.startswith(b"mine"))


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


def test_the_default_of_a_script_is_found_from_any_folder(tmp_path, monkeypatch):
    for folder in (tmp_path, os.path.dirname(os.path.dirname(cli.__file__)), "/"):
        monkeypatch.chdir(folder)
        assert os.path.isdir(cli.shipped("weights/tiny"))
    monkeypatch.chdir(os.path.dirname(os.path.dirname(cli.__file__)))
    assert cli.shipped("weights/tiny") == "weights/tiny"
