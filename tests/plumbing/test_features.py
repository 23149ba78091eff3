"""The cache of what a model saw of a video: what finds an entry again and what does not, damage, bounds, and chats that use it."""
import multiprocessing
import os
import shutil
import stat

import pytest
import torch

import chat
import data
import model
from plumbing import features as store
from plumbing.cli import UserError
from plumbing.video import DamagedVideo
from small import write_branch, write_video


@pytest.fixture
def seen():
    return store.Seen(2.5, "cut off", [0.1, 1 / 3], torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8), torch.randn(4, 6).bfloat16())


def same(a, b):
    return (a.duration, a.damage, a.times) == (b.duration, b.damage, b.times) and torch.equal(a.frames, b.frames) and torch.equal(a.video_tokens, b.video_tokens)


def test_what_was_kept_is_recalled_bit_for_bit(seen, tmp_path):
    path = str(tmp_path / "cache" / "0.safetensors")
    assert store.recall(path) is None
    store.keep(path, seen)
    assert same(store.recall(path), seen) and os.listdir(tmp_path / "cache") == ["0.safetensors"]


def test_nobody_else_can_look_into_the_folder(seen, tmp_path):
    store.keep(str(tmp_path / "cache" / "0.safetensors"), seen)
    assert stat.S_IMODE(os.stat(tmp_path / "cache").st_mode) == 0o700


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"hello", lambda b: b[:-1] + bytes([b[-1] ^ 1]),
                                    lambda b: b.replace(b"crc32", b"crc33"), lambda b: b.replace(b"frames", b"flames"), lambda b: b.replace(b"duration", b"durathon"),
                                    lambda b: b.replace(b'"2.5"', b'"x.5"')])
def test_a_damaged_entry_is_refused_by_name(seen, tmp_path, damage):
    path = tmp_path / "0.safetensors"
    store.keep(str(path), seen)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="0.safetensors"):
        store.recall(str(path))


# ---------------------------------------------------------------------------------------------------- names
def rewrite(path):
    os.utime(path, ns=(1, 1))


CHANGES = {   # name: what is done to (copy of the weights, the video)
    "the video's time": lambda w, v: rewrite(v), "its size": lambda w, v: open(v, "ab").write(b"\0"),
    "a file of CLIP": lambda w, v: rewrite(w / "clip" / "model.safetensors"), "the projector's": lambda w, v: rewrite(w / "llava" / "model.safetensors"),
    "the branch": lambda w, v: write_branch(w / "branch.pth"), "a new chat.bin": lambda w, v: shutil.copy(w / "branch.pth", w / "chat.bin"),
    "a file gone": lambda w, v: (w / "branch.pth").unlink()}


@pytest.fixture
def copies(weights, video, tmp_path):
    return shutil.copytree(weights, tmp_path / "w"), shutil.copy2(video, tmp_path / "v.mp4")


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_seen_is_not_found_again_after_a_change_of(copies, change):
    before = store.entry("c", copies[1], [], store.state_of(str(copies[0])))
    CHANGES[change](*copies)
    assert store.entry("c", copies[1], [], store.state_of(str(copies[0]))) != before


def test_another_way_of_looking_is_another_entry(copies):
    weights, video = map(str, copies)
    assert len({store.entry("c", video, how, store.state_of(weights)) for how in (["uniform", 8], ["uniform", 9], ["seq", 8])}) == 3


def test_the_way_to_a_video_and_quantised_copies_of_the_weights_do_not_matter(copies, monkeypatch):
    weights, video = copies
    before = store.entry("c", video, [], store.state_of(str(weights)))
    (weights / "llava" / "quantised_int8.safetensors").write_bytes(b"later")
    monkeypatch.chdir(weights.parent)
    os.symlink(video, "link.mp4")
    assert store.entry("c", "v.mp4", [], store.state_of("w")) == store.entry("c", "link.mp4", [], store.state_of("./w/")) == before


def test_weights_replaced_while_a_chat_is_open_do_not_get_its_tokens(copies, tmp_path):
    weights, video = copies
    session = chat.Session(chat.Config(video=str(video), weights=str(weights), device="cpu", cache_dir=str(tmp_path / "c")))
    write_branch(weights / "branch.pth")
    session.open(str(shutil.copy2(video, tmp_path / "other.mp4")))
    later = store.entry(str(tmp_path / "c"), tmp_path / "other.mp4", session.how(), store.state_of(weights))
    assert store.recall(later) is None and len(os.listdir(tmp_path / "c")) == 2


def test_a_video_that_is_not_there_has_no_entry(weights):
    assert store.entry("c", "/nowhere.mp4", [], store.state_of(weights)) is store.entry("c", "a\0b", [], store.state_of(weights)) is None


@pytest.mark.parametrize("base, path", [("/cache", "/cache/nanobt"), ("", "/home/me/.cache/nanobt"), ("relative", "/home/me/.cache/nanobt")])
def test_the_folder_is_where_the_system_wants_caches(monkeypatch, base, path):
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setenv("HOME", "/home/me")
    assert store.default_folder() == path


# ---------------------------------------------------------------------------------------------------- bounds
def fill(folder, count, size):
    for i in range(count):
        path = folder / f"{i:032x}.safetensors"
        path.write_bytes(bytes(size))
        os.utime(path, (i, i))


def names(folder):
    return sorted(int(name[:32], 16) for name in os.listdir(folder) if name.endswith(".safetensors"))


def test_the_oldest_entries_go_where_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_ENTRIES", 3)
    fill(tmp_path, 5, 1)
    store.prune(tmp_path)
    assert names(tmp_path) == [2, 3, 4]


def test_the_oldest_entries_go_where_they_are_too_large_but_the_newest_stays(tmp_path, monkeypatch):
    fill(tmp_path, 5, 100)
    for bound, left in ((250, [3, 4]), (10, [4])):
        monkeypatch.setattr(store, "MAX_BYTES", bound)
        store.prune(tmp_path)
        assert names(tmp_path) == left


def test_files_of_others_are_left_alone_and_what_a_killed_process_left_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_ENTRIES", 1)
    old, young = f"{0:032x}.safetensors.77.tmp", f"{0:032x}.safetensors.78.tmp"   # the latter is just being written
    for name in ("thesis.safetensors", "notes", old):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    for name in (young, f"{1:032x}.safetensors"):
        (tmp_path / name).touch()
    store.prune(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [young, f"{1:032x}.safetensors", "notes", "thesis.safetensors"]


def test_an_entry_that_is_used_is_not_the_oldest(seen, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_ENTRIES", 2)
    paths = [str(tmp_path / f"{i:032x}.safetensors") for i in range(3)]
    for i in (0, 1):
        store.keep(paths[i], seen)
        os.utime(paths[i], (i, i))
    store.recall(paths[0])
    store.keep(paths[2], seen)
    assert names(tmp_path) == [0, 2]


def keep_many(folder, first):
    for i in range(40):
        store.keep(os.path.join(folder, f"{(first + i) % 50:032x}.safetensors"),
                      store.Seen(1.0, "", [0.5], torch.full((1, 3, 8, 8), 7, dtype=torch.uint8), torch.ones(2, 3)))


def test_two_processes_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_ENTRIES", 4)   # so that each removes what the other has written
    others = [multiprocessing.get_context("fork").Process(target=keep_many, args=(str(tmp_path), first)) for first in (0, 25)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0]
    store.prune(tmp_path)
    assert len(os.listdir(tmp_path)) == 4
    assert all(store.recall(str(file)).duration == 1.0 for file in tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- in a chat
@pytest.fixture
def begin(weights, video, tmp_path):
    """begin(flags...) -> a Session on a copy of the video, with a cache of this test."""
    copy = shutil.copy(video, tmp_path / "v.mp4")
    return lambda **flags: chat.Session(chat.Config(str(copy), **{"weights": weights, "cache_dir": str(tmp_path / "c"), "max_new_tokens": 12, **flags}))


def answer(session):
    pieces = []
    session.ask("what?", pieces.append)
    return "".join(pieces)


def test_a_second_chat_neither_decodes_the_video_nor_runs_clip_and_says_the_same(begin, monkeypatch):
    first = begin()
    said = answer(first)
    monkeypatch.setattr(data, "open_video", None)
    monkeypatch.setattr(model.VideoChat, "encode_video", None)
    second = begin()
    assert torch.equal(first.video_tokens, second.video_tokens) and torch.equal(first.frames, second.frames)
    assert (first.times, first.describe(), said) == (second.times, second.describe(), answer(second))


@pytest.mark.parametrize("flags", [dict(num_frames=3), dict(tokens="mean"), dict(dtype="bf16")], ids=str)
def test_other_flags_look_at_the_video_again(begin, tmp_path, flags):
    begin()
    tokens = begin(**flags).video_tokens
    assert len(os.listdir(tmp_path / "c")) == 2 and torch.equal(begin(**flags, cache=False).video_tokens, tokens)


def test_without_a_cache_nothing_is_written(begin, tmp_path):
    begin(cache=False)
    assert not (tmp_path / "c").exists()


def test_a_damaged_entry_is_made_anew_with_a_word(begin, tmp_path, capsys):
    tokens = begin().video_tokens.clone()
    [path] = (tmp_path / "c").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert torch.equal(begin().video_tokens, tokens)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(path) in err and "cut" in err
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_said_and_harms_nothing(begin, tmp_path, capsys):
    (tmp_path / "c").write_text("a file, not a folder")
    assert answer(begin())
    err = capsys.readouterr().err
    assert f"{tmp_path}/c" in err and "going on without it" in err


def test_that_a_video_is_cut_is_said_again_when_it_is_not_decoded_again(begin, tmp_path):
    path = write_video(tmp_path / "cut.mkv", seconds=5)
    os.truncate(path, os.path.getsize(path) * 3 // 5)
    for _ in range(2):
        with pytest.warns(DamagedVideo, match="cut.mkv: cut off or damaged after") as told:
            begin().open(path)
        assert len({str(warning.message) for warning in told}) == 1
    assert len(os.listdir(tmp_path / "c")) == 2   # and the second time it came from here


def test_another_video_in_a_conversation_is_kept_too(begin, tmp_path, monkeypatch):
    session, other = begin(), write_video(tmp_path / "other.mp4", seconds=1)
    session.open(other)
    tokens = session.video_tokens
    monkeypatch.setattr(data, "open_video", None)
    again = begin()
    again.open(other)
    assert torch.equal(again.video_tokens, tokens)
