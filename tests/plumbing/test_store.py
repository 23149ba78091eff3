"""plumbing/store.py: what finds an entry again and what does not, damage, bounds, two processes."""
import importlib
import multiprocessing
import os
import stat
import sys

import pytest
import torch

from plumbing.cli import UserError
from plumbing.store import Store, code_of, state_of


def names(folder):
    return sorted(os.listdir(folder))


@pytest.fixture
def tensors():
    return {"a": torch.randn(3, 4).bfloat16(), "b": torch.arange(5)}


def test_what_was_put_is_got_bit_for_bit_under_the_same_key_alone(tmp_path, tensors):
    store = Store(str(tmp_path / "s"))
    assert store.get(["key", 1]) is None
    store.put(["key", 1], tensors, {"said": "hello"})
    found, metadata = store.get(["key", 1])
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], t) for name, t in tensors.items())
    assert metadata == {"said": "hello"} and store.get(["key", 2]) is None


def test_nobody_else_can_look_into_the_folder(tmp_path, tensors):
    Store(str(tmp_path / "s")).put(0, tensors)
    assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o700


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"hello"])
def test_a_damaged_entry_is_refused_by_name(tmp_path, tensors, damage):
    store = Store(str(tmp_path))
    store.put(0, tensors)
    [path] = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{path.name}: .*delete it|{path.name}.*empty"):
        store.get(0)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, tensors):
    (tmp_path / "s").write_text("a file")
    with pytest.raises(UserError, match="s: ") as error:
        Store(str(tmp_path / "s")).put(0, tensors)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- bounds
def aged(store, keys):
    for age, key in enumerate(keys):
        store.put(key, {"t": torch.zeros(100)})
        os.utime(store.path(key), (age, age))


@pytest.mark.parametrize("max_bytes, left", [(10_000, [0, 1, 2, 3]), (1200, [2, 3]), (10, [3])])
def test_the_oldest_entries_go_beyond_the_bound_but_the_newest_stays(tmp_path, max_bytes, left):
    aged(Store(str(tmp_path)), range(4))   # each of 400 bytes and a header
    store = Store(str(tmp_path), max_bytes)
    store.tidy()
    assert [key for key in range(4) if store.get(key)] == left


def test_an_entry_that_is_used_is_not_the_oldest(tmp_path):
    aged(store := Store(str(tmp_path), 1200), [0, 1])
    store.get(0)
    store.put(2, {"t": torch.zeros(100)})
    assert store.get(0) and not store.get(1) and store.get(2)


def test_files_of_others_stay_and_what_a_killed_process_left_goes(tmp_path):
    store = Store(str(tmp_path), 10, prefix="q_")
    killed, alive = (f"q_{0:032x}.safetensors.{process}.tmp" for process in (99_999_999, os.getpid()))
    kept = ["thesis.safetensors", "notes", f"{1:032x}.safetensors", alive]
    for name in (*kept, killed, newest := f"q_{2:032x}.safetensors"):
        (tmp_path / name).write_bytes(bytes(20))
        os.utime(tmp_path / name, (1, 1)) if name != newest else None
    store.tidy()
    assert names(tmp_path) == sorted([*kept, newest])


def put_many(folder, first):
    for i in range(40):
        Store(folder, 2000).put((first + i) % 50, {"t": torch.full((100,), 7.0)})


def test_two_processes_share_a_folder(tmp_path):
    fork = multiprocessing.get_context("fork")   # each removes what the other has written
    both = [fork.Process(target=put_many, args=(str(tmp_path), first)) for first in (0, 25)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    store = Store(str(tmp_path), 2000)
    store.tidy()
    kept = [entry for entry in map(store.get, range(50)) if entry]
    assert 1 <= len(kept) <= 4 and all(bool((tensors["t"] == 7).all()) for tensors, _ in kept)


# ---------------------------------------------------------------------------------------------------- keys
def test_a_file_is_the_same_until_its_time_or_size_changes_whatever_it_is_called(tmp_path, monkeypatch):
    file = tmp_path / "v.mp4"
    file.write_bytes(b"12")
    os.symlink(file, tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    before = state_of(str(file))
    assert state_of("link") == state_of("v.mp4") == before
    os.utime(file, ns=(1, 1))
    changed = state_of(str(file))
    file.write_bytes(b"123")
    os.utime(file, ns=(1, 1))
    assert len({str(before), str(changed), str(state_of(str(file)))}) == 3


def test_a_folder_is_all_its_files_but_not_quantised_copies(tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "a").touch()
    before = state_of(str(tmp_path))
    (tmp_path / "clip" / "quantised_int8.safetensors").touch()
    assert state_of(str(tmp_path)) == before
    (tmp_path / "clip" / "b").touch()
    assert state_of(str(tmp_path)) != before


@pytest.mark.parametrize("path", ["/nowhere.mp4", "a\0b", "circle"])
def test_a_file_that_is_not_there_is_a_user_error(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("circle")
    os.symlink(".", "circle/again")
    with pytest.raises(UserError):
        state_of(path)


def test_code_is_another_after_a_change_but_not_after_one_of_comments(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    digests = []
    lesson = "def f(x):\n    return x in {'a', 'b', 'c'}\n"
    other = lesson.replace("'c'", "'d'"), lesson.replace("x in", "x.y in")
    for text in (lesson, "# why\n\n" + lesson, *other):
        (tmp_path / "lesson.py").write_text(text)
        sys.modules.pop("lesson", None)
        importlib.invalidate_caches()
        digests.append(code_of(importlib.import_module("lesson")))
    assert digests[0] == digests[1] and len(set(digests)) == 3
