"""Flags, files that are never half written, logs."""
import dataclasses
import json
import os

import pytest
import torch
from PIL import Image

from plumbing import cli, pictures, training
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
    assert cli.parse(Config, ["--name", "x", "--size", "4", "--rate", "2e-6", "--no-fast", "--maybe", "7"]) == Config("x", 4, 2e-6, False, 7)
    assert cli.parse(Config, ["x", "-s", "9"], positional=["name"], short={"size": "s"}) == Config("x", 9)


def test_help_shows_the_comments_and_defaults(capsys):
    with pytest.raises(SystemExit) as left:
        cli.parse(Config, ["--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and "with a 50 % sign (default: 3)" in out and "needed (required)" in out


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


def test_log_drops_what_came_after_the_checkpoint_and_half_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    log = training.Log(path, 1)
    log.add(step=2, loss=9)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "loss": 3}, {"step": 2, "loss": 9}]
    assert log.column("loss") == [(1, 3), (2, 9)]


def test_random_numbers_of_a_step_follow_from_seed_step_and_rank():
    draws = set()
    for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        training.seed_step(*key)
        first = torch.rand(1).item()
        training.seed_step(*key)
        assert torch.rand(1).item() == first
        draws.add(first)
    assert len(draws) == 4


def test_warmup_and_cosine():
    share = [training.warmup_cosine(s, 100, 10) for s in range(100)]
    assert share[0] == 0.1 and share[9] == share[10] == 1 and share[55] == pytest.approx(0.5) and 0 < share[99] < 0.01


def test_a_plot_is_drawn_also_of_one_point_nothing_and_nan(tmp_path):
    pictures.plot(tmp_path / "p.png", [("a", {"x": [(0, 1.0), (1, float("nan")), (2, 3.0)]}), ("b", {"y": [(1, 1)]}), ("c", {})])
    picture = Image.open(tmp_path / "p.png")
    assert picture.size == (900, 1080) and len(picture.getcolors(1 << 20)) > 10


@pytest.mark.parametrize("content", [b"", b"PK", b"not a checkpoint", b"\x80\x02."])
def test_a_damaged_checkpoint_is_one_line(tmp_path, content):
    (tmp_path / "last.pth").write_bytes(content)
    with pytest.raises(UserError, match="last.pth: not a checkpoint"):
        training.load_checkpoint(tmp_path / "last.pth")
