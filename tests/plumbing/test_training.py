"""What training loops share: batches, the same for any number of processes, logs, checkpoints."""
import json
import os
import subprocess
import sys

import pytest
import torch

from plumbing import training
from plumbing.cli import UserError

CPU = torch.device("cpu")


def batches(n, batch_size, together, seed, start, rank=0, size=1):
    return training.batches(n, batch_size, together, seed, start, training.World(rank, size, CPU))


def test_batches_cover_an_epoch_once_keep_twins_together_and_split_evenly():
    a, b = (batches(10, 4, 2, 0, 0, rank, 2) for rank in (0, 1))
    steps = [(next(a), next(b)) for _ in range(4)]
    for epoch in (0, 1):
        seen = [i for left, right in steps[2 * epoch:2 * epoch + 2] for e, i in left + right if e == epoch]
        assert len(set(seen)) == 8
    for left, right in steps:
        members = {i for _, i in left + right}
        assert len(left) == len(right) == 2 and all(i ^ 1 in members for i in members)
    again = batches(10, 4, 2, 0, 3, 0, 2)
    assert next(again) == steps[3][0] and steps[0] != steps[2]


def test_all_rows_together_come_in_their_own_order():
    order = batches(7, 3, 7, 5, 0)
    assert [[i for _, i in next(order)] for _ in range(4)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]


def test_the_shares_of_several_processes_are_the_batches_of_one():
    one, four = batches(40, 8, 2, 3, 2), [batches(40, 8, 2, 3, 2, rank, 4) for rank in range(4)]
    for _ in range(7):
        shares = sum((next(b) for b in four), [])
        assert sorted(next(one)) == sorted(shares) and len(set(shares)) == 8


def test_a_log_drops_what_came_after_the_checkpoint_half_lines_and_leftovers(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    (tmp_path / "last.pth.77.tmp").write_bytes(b"half")
    (tmp_path / "my.notes.tmp").touch()   # a user's
    log = training.Log(tmp_path, 1)
    log.add(step=2, loss=9)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 3}, {"step": 2, "loss": 9}]
    assert log.column("loss") == [(1, 3), (2, 9)] and sorted(os.listdir(tmp_path)) == ["log.jsonl", "my.notes.tmp"]


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
    assert share[0] == 0.1 and share[9] == share[10] == 1
    assert share[55] == pytest.approx(0.5) and 0 < share[99] < 0.01


def test_a_folder_is_for_one_run_at_a_time_and_not_for_other_files(tmp_path):
    (tmp_path / "mine.txt").write_text("thesis")
    with pytest.raises(UserError, match="other files than those of a run"):
        training.take_folder(tmp_path)
    training.take_folder(tmp_path / "out")
    training.take_folder(tmp_path / "out")   # the same process
    hold = "import fcntl; f = open('run.lock', 'w'); fcntl.lockf(f, 2); print(flush=True); input()"   # LOCK_EX
    other = tmp_path / "other"
    other.mkdir()
    with subprocess.Popen([sys.executable, "-c", hold], cwd=other, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(UserError, match="another run is at work"):
            training.take_folder(other)
        holder.kill()
    training.take_folder(other)   # a killed run leaves no lock


@pytest.mark.parametrize("content", [b"", b"PK", b"not a checkpoint", b"\x80\x02."])
def test_a_damaged_checkpoint_is_one_line(tmp_path, content):
    (tmp_path / "last.pth").write_bytes(content)
    with pytest.raises(UserError, match="last.pth: not a checkpoint"):
        training.load_checkpoint(tmp_path / "last.pth")
