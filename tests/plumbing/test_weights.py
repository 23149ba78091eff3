"""The command about released weights: what it fetches is right or not there, and what it says of a folder is true."""
import contextlib
import hashlib
import http.server
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from clip import load_clip
from llm import load_llama
from model import Branch, branch_tensors
from plumbing import weightfile
from plumbing.cli import UserError
from weights import __main__ as weights
from weights.__main__ import File, Release

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TINY = os.path.join(ROOT, "weights", "tiny")
OLD, NEW = (bytes(torch.randint(256, (3_000_000,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)) for seed in (0, 1))


def sha(data):
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------------------------------------------- a server and its vices
class Server(http.server.ThreadingHTTPServer):
    """Answers request i with answers[i], the last of them for ever. seen: (path, Range, If-Range) of each request."""
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.seen, self.done = [], [], threading.Event()
        self.daemon_threads, self.address = True, f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, client_address):
        pass   # the client hung up: that is what some tests are about


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Range"], self.headers["If-Range"]))
        self.close_connection = True
        self.server.answers[min(len(self.server.seen), len(self.server.answers)) - 1](self)

    def log_message(self, *_):
        pass

    def head(self, status, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


def honest(data=OLD, etag='"1"', stop=None, **headers):
    """Knows ranges and If-Range. stop: breaks off after so many bytes of the answer."""
    def answer(h):
        piece = re.fullmatch(r"bytes=(\d+)-", h.headers["Range"] or "")
        if piece and h.headers["If-Range"] in (None, etag):
            start = int(piece[1])
            h.head(206, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}", Content_Length=len(data) - start, ETag=etag, **headers)
        else:
            start = 0
            h.head(200, Content_Length=len(data), ETag=etag, **headers)
        h.wfile.write(data[start:][:stop])
    return answer


def stalling(after):
    def answer(h):
        honest(stop=after)(h)
        h.wfile.flush()
        h.server.done.wait()
    return answer


def ignoring_ranges(h):
    h.head(200, Content_Length=len(OLD), ETag='"1"')
    h.wfile.write(OLD)


def lying(content_range, data=OLD, etag='"1"'):
    def answer(h):
        h.head(206, Content_Range=content_range, Content_Length=len(data), ETag=etag)
        h.wfile.write(data)
    return answer


def refusing(status, **headers):
    return lambda h: h.head(status, Content_Length=0, **headers)


def flipped(data=OLD):
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]


@pytest.fixture
def get(tmp_path, monkeypatch):
    """get(*answers) runs the command against a server that answers so -> the requests that it saw. get.folder: what it filled."""
    monkeypatch.setattr(weights, "PAUSE", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def run(*answers, file=File(len(OLD), sha(OLD)), files=None, timeout=5, tries=3):
        server.answers, server.seen = answers, []
        monkeypatch.setitem(weights.RELEASED, "toy", toy(server.address, files or {"a.bin": file}))
        try:
            weights.main(weights.Config("get", "toy", out=str(tmp_path), timeout=timeout, tries=tries))
        finally:
            run.seen = server.seen
        return run.seen
    run.folder = tmp_path / "toy"
    with serving() as run.server:
        server = run.server
        yield run


@contextlib.contextmanager
def serving():
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.done.set()   # whoever stalls goes on and ends
        server.shutdown()
        server.server_close()


def toy(address, files):
    return Release("a toy", "tests", "none", "its page", address, "toy/", files)


def names(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []


# ---------------------------------------------------------------------------------------------------- get
def test_a_file_arrives_whole_and_alone(get):
    assert get(honest()) == [("/a.bin", None, None)]
    assert names(get.folder) == ["a.bin"] and (get.folder / "a.bin").read_bytes() == OLD


def test_a_broken_connection_goes_on_where_it_broke(get):
    seen = get(honest(stop=1_000_000), honest(stop=500_000), honest())
    assert seen == [("/a.bin", None, None), ("/a.bin", "bytes=1000000-", '"1"'), ("/a.bin", "bytes=1500000-", '"1"')]
    assert names(get.folder) == ["a.bin"] and (get.folder / "a.bin").read_bytes() == OLD


def test_tries_that_bring_something_do_not_use_up_patience(get):
    get(*[honest(stop=400_000)] * 7, honest(), tries=2)
    assert (get.folder / "a.bin").read_bytes() == OLD


def test_a_stalled_server_is_given_up_with_a_word_and_the_same_command_goes_on(get):
    with pytest.raises(UserError, match=r"stopped sending, 2 times; 700,000 bytes are in .*a\.bin\.part, and the same command goes on"):
        get(stalling(700_000), stalling(0), timeout=0.2, tries=2)
    assert len(get.seen) == 3 and names(get.folder) == ["a.bin.part", "a.bin.part.json"]
    assert get(honest()) == [("/a.bin", "bytes=700000-", '"1"')]
    assert names(get.folder) == ["a.bin"] and (get.folder / "a.bin").read_bytes() == OLD


def test_a_server_that_ignores_ranges_is_taken_from_the_start(get):
    seen = get(honest(stop=1_000_000), ignoring_ranges)
    assert seen[1][1] == "bytes=1000000-" and (get.folder / "a.bin").read_bytes() == OLD


@pytest.mark.parametrize("answer", [
    lying(f"bytes 0-{len(OLD) - 1}/{len(OLD)}"), lying(f"bytes 1000000-{len(NEW)}/{len(NEW) + 1}", NEW[1_000_000:] + b"x"),
    lying("bytes 1000000-1999999/3000000", NEW[1_000_000:2_000_000]), lying("none", NEW), lying("bytes */3000000", NEW),
    lying("bytes 1000000-2999999/3000000", NEW[1_000_000:], '"2"')])
def test_a_piece_that_was_not_asked_for_is_not_glued_on(get, answer):
    seen = get(honest(stop=1_000_000), answer, honest(), file=File())
    assert [r for _, r, _ in seen] == [None, "bytes=1000000-", None]   # the lie cost what was there
    assert (get.folder / "a.bin").read_bytes() == OLD


def test_a_flipped_bit_is_noticed_and_nothing_of_it_stays(get):
    with pytest.raises(UserError, match=f"its sha256 is {sha(flipped())}, but that of the released file is {sha(OLD)}; thrown away; try again"):
        get(honest(flipped()))
    assert names(get.folder) == []


def test_where_the_list_knows_no_hash_the_one_that_hugging_face_names_is_held_against(get):
    with pytest.raises(UserError, match="its sha256"):
        get(honest(flipped(), X_Linked_Etag=f'"{sha(OLD)}"'), file=File())
    assert names(get.folder) == []
    with pytest.raises(UserError, match="its sha256"):   # named on the way to the server that has the bytes
        get(refusing(302, Location="/cdn", X_Linked_Etag=f'"{sha(OLD)}"'), honest(flipped()), file=File())
    assert get.seen[1][0] == "/cdn" and names(get.folder) == []


def test_a_file_that_changed_upstream_is_not_glued_to_the_old_half(get):
    assert get(honest(stop=1_000_000), honest(NEW, '"2"'), file=File())[1] == ("/a.bin", "bytes=1000000-", '"1"')
    assert (get.folder / "a.bin").read_bytes() == NEW


def test_without_a_validator_or_a_hash_nothing_is_resumed(get):
    seen = get(honest(stop=1_000_000, etag='W/"1"'), honest(NEW, 'W/"2"'), file=File())
    assert [r for _, r, _ in seen] == [None, None] and (get.folder / "a.bin").read_bytes() == NEW


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/a", "http://example.com/a", "http://[::/", "data:,a"])
def test_a_redirect_to_anything_but_https_is_not_followed(get, address):
    with pytest.raises(UserError, match="not followed|does not give it") as e:
        get(refusing(302, Location=address))
    assert len(get.seen) == 1 and names(get.folder) == [] and str(e.value).isprintable()


def test_a_redirect_is_followed_and_the_rest_is_asked_for_there(get):
    away = refusing(302, Location="/cdn")
    seen = get(away, honest(stop=1_000_000), away, honest())
    assert seen == [("/a.bin", None, None), ("/cdn", None, None), ("/a.bin", "bytes=1000000-", '"1"'), ("/cdn", "bytes=1000000-", '"1"')]
    assert (get.folder / "a.bin").read_bytes() == OLD


def test_interrupted_leaves_a_part_and_the_same_command_ends_it(get, monkeypatch):
    class Interrupting:
        count = 0

        def __call__(self, response):
            self.count += 1
            if self.count == 3:
                raise KeyboardInterrupt
            return response.read1(100_000)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(weights, "piece", Interrupting())
        get(honest())
    there = os.path.getsize(get.folder / "a.bin.part")
    assert names(get.folder) == ["a.bin.part", "a.bin.part.json"] and 0 < there < len(OLD)
    assert get(honest()) == [("/a.bin", f"bytes={there}-", '"1"')]
    assert names(get.folder) == ["a.bin"] and (get.folder / "a.bin").read_bytes() == OLD


def test_killed_in_the_middle_leaves_a_part_and_the_same_command_ends_it(get):
    code = ("import sys, weights; weights.RELEASED['toy'] = weights.Release('', '', '', '', sys.argv[1], 'toy/', {'a.bin': weights.File()}); "
            "weights.main(weights.Config('get', 'toy', out=sys.argv[2]))")
    get.server.answers = [stalling(1_000_000)]
    child = subprocess.Popen([sys.executable, "-c", code, get.server.address, str(get.folder.parent)], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (get.folder / "a.bin.part").exists() or os.path.getsize(get.folder / "a.bin.part") < 1_000_000:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert names(get.folder) == ["a.bin.part", "a.bin.part.json"]
    assert get(honest(), file=File()) == [("/a.bin", "bytes=1000000-", '"1"')]
    assert names(get.folder) == ["a.bin"] and (get.folder / "a.bin").read_bytes() == OLD


def test_a_part_that_is_whole_is_checked_and_not_asked_for_again(get, monkeypatch):
    """The power fails between the last byte and the renaming."""
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(weights.os, "replace", lambda old, new: (_ for _ in ()).throw(KeyboardInterrupt) if new.endswith("a.bin") else os.rename(old, new))
        get(honest())
    assert get(refusing(500)) == [] and names(get.folder) == ["a.bin"] and (get.folder / "a.bin").read_bytes() == OLD


def test_a_disk_that_cannot_be_read_for_a_moment_costs_no_download(get, monkeypatch):
    def hiccup(path):
        raise UserError(f"{path}: Input/output error")
    with monkeypatch.context() as m, pytest.raises(UserError, match="Input/output error"):
        m.setattr(weights, "sha256", hiccup)
        get(honest())
    assert names(get.folder) == ["a.bin.part", "a.bin.part.json"]
    assert get(refusing(500)) == [] and (get.folder / "a.bin").read_bytes() == OLD


def test_a_part_that_goes_makes_room_for_the_whole(get, monkeypatch):
    get.folder.mkdir()
    (get.folder / "a.bin.part").write_bytes(NEW[:2_000_000])   # of unknown origin, so the file is sent from its beginning
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 1_500_000))
    get(honest())
    assert (get.folder / "a.bin").read_bytes() == OLD


@pytest.mark.parametrize("note", [None, b"{", b"[]", b'{"size": 5}'])
def test_a_part_of_unknown_origin_is_begun_anew(get, note):
    get.folder.mkdir()
    (get.folder / "a.bin.part").write_bytes(NEW[:1000])
    if note is not None:
        (get.folder / "a.bin.part.json").write_bytes(note)
    assert get(honest()) == [("/a.bin", None, None)] and (get.folder / "a.bin").read_bytes() == OLD


@pytest.mark.parametrize("status, advice", [(404, "no such file any more"), (401, "log in with a browser"), (403, "put the file at .*a.bin "), (400, "400")])
def test_a_refusal_is_told_once_with_what_to_do(get, status, advice):
    with pytest.raises(UserError, match=advice):
        get(refusing(status))
    assert len(get.seen) == 1 and names(get.folder) == []


def test_a_server_in_trouble_is_asked_again_and_then_given_up(get):
    assert len(get(refusing(503), refusing(429), honest())) == 3
    os.remove(get.folder / "a.bin")
    with pytest.raises(UserError, match="the server says 503 .*, 2 times; 0 bytes are in"):
        get(refusing(503), tries=2)


def test_no_network_is_one_line(get, monkeypatch):
    with serving() as server:
        address = server.address
    monkeypatch.setitem(weights.RELEASED, "toy", toy(address, {"a.bin": File()}))
    with pytest.raises(UserError, match=r"cannot reach the server \(.*refused\), 2 times; 0 bytes"):
        weights.main(weights.Config("get", "toy", out=str(get.folder), tries=2))


def test_another_size_than_the_released_one_is_refused_before_a_byte_is_written(get):
    with pytest.raises(UserError, match="the server has 3,000,000 bytes, but the released file has 5 bytes"):
        get(honest(), file=File(5))
    assert names(get.folder) == []


def test_a_length_that_is_not_told_is_refused_but_chunks_tell_their_end(get):
    def until_closed(h):
        h.head(200)
        h.wfile.write(OLD)

    def chunks(*parts):
        def answer(h):
            h.head(200, Transfer_Encoding="chunked", ETag='"1"')
            for part in parts:
                h.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        return answer
    with pytest.raises(UserError, match="does not say how long"):
        get(until_closed, file=File())
    with pytest.raises(UserError, match="sends more than it said"):
        get(chunks(OLD, OLD, OLD), tries=1)
    seen = get(chunks(OLD[:1_000_000], OLD[1_000_000:2_000_000]), chunks(OLD, b""), file=File())
    assert len(seen) == 2 and seen[1][1] == "bytes=2000000-" and (get.folder / "a.bin").read_bytes() == OLD


def test_a_full_disk_is_told_and_what_came_stays(get, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(UserError, match="3,000,000 bytes are still to come, but the disk has 5 left"):
        m.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
        get(honest())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"a\.bin\.part: cannot write: File too large; .* bytes are there, and the same command goes on"):
            get(honest())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    there = os.path.getsize(get.folder / "a.bin.part")
    assert 0 < there <= 2_000_000


def test_what_is_there_and_right_is_not_fetched_and_what_is_wrong_is_not_touched(get):
    get(honest())
    assert get(refusing(500)) == []
    for wrong in (OLD[:-1], flipped()):
        (get.folder / "a.bin").write_bytes(wrong)
        with pytest.raises(UserError, match="move it away"):
            get(honest())
        assert (get.folder / "a.bin").read_bytes() == wrong and get.seen == []


def test_where_only_a_rounded_size_is_known_that_is_held_against(get):
    with pytest.raises(UserError, match="the server has 3,000,000 bytes, but the released file has about 2,990,000 bytes"):
        get(honest(), file=File(about=2.99e6))
    assert names(get.folder) == []
    get(honest(), file=File(about=3.00e6))
    with pytest.raises(UserError, match="3,000,000 bytes, but the released file has about 2,990,000 bytes; move it away"):
        get(honest(), file=File(about=2.99e6))


def test_shards_come_from_the_index_and_stay_in_the_folder(get):
    index, wanted = b'{"weight_map": {"a": "x-1.bin", "b": "x-2.bin"}}', {"model.safetensors.index.json": File(), "x-1.bin": File(sha256=sha(OLD))}
    assert [path for path, _, _ in get(honest(index), honest(), honest(NEW), files=wanted)] == ["/model.safetensors.index.json", "/x-1.bin", "/x-2.bin"]
    assert (get.folder / "x-2.bin").read_bytes() == NEW
    shutil.rmtree(get.folder)
    with pytest.raises(UserError, match="outside its own folder"):
        get(honest(b'{"weight_map": {"a": "../x-1.bin"}}'), honest(), files=dict(list(wanted.items())[:1]))
    assert len(get.seen) == 1


def test_meta_is_not_asked_in_your_place():
    with pytest.raises(UserError, match="llama: Meta's LLaMA licence, to be accepted first; .*form"):
        weights.main(weights.Config("get", "llama"))
    with pytest.raises(UserError, match="choose one of clip, "):
        weights.main(weights.Config("get", "../clip"))


# ---------------------------------------------------------------------------------------------------- list
def test_the_list_names_every_file_with_size_hash_licence_and_source(capsys):
    weights.main(weights.Config("list"))
    shown = capsys.readouterr().out
    for name, release in weights.RELEASED.items():
        block = re.search(rf"^{name}: .*?(?=^\S|\Z)", shown, re.M | re.S)[0]
        assert release.licence in block and release.page in block and release.purpose in block and release.note in block
        for file, (size, digest, about) in release.files.items():
            line = next(line for line in block.splitlines() if line.split()[0] == file)
            assert f"  {size:,} bytes" in line if size else f"  about {about:,.0f} bytes" in line
            assert (digest or "sha256 unknown") in line
    assert "16,777,216" in shown and "almost certainly cut" in shown


def test_the_table_stays_on_https_and_inside_its_folder():
    for release in weights.RELEASED.values():
        assert release.files or release.ask
        for file, (size, digest, about) in release.files.items():
            where = os.path.normpath(weights.target(release, file))
            assert release.address.startswith("https://") and not where.startswith((".", "/")) and where.split("/")[0] in weights.ENTRIES
            assert size or about and about == float(f"{about:.3g}")
            assert digest is None or re.fullmatch("[0-9a-f]{64}", digest)


# ---------------------------------------------------------------------------------------------------- check
@pytest.fixture
def tiny(tmp_path):
    return shutil.copytree(TINY, tmp_path / "tiny")


def check(folder, **options):
    weights.main(weights.Config("check", str(folder), **options))


def test_the_shipped_weights_are_complete(capsys):
    check(TINY)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["clip", "llava", "branch.pth", "chat.bin"] and lines[-1].startswith("complete")
    for line, words in zip(lines, ("CLIP, a Hugging Face folder, 6 layers of 128, .* fp16", "LLaMA, a Hugging Face folder, 4 layers of 128, .*projector 128 -> 128 .linear",
                                   "branch from pretraining, 4 layers, gates", "branch tuned for chat, 3 layers, .*projector 128 -> 128")):
        assert re.search(words, line), line
        name = line.split(":")[0]
        size = sum(e.stat().st_size for e in os.scandir(f"{TINY}/{name}")) if os.path.isdir(f"{TINY}/{name}") else os.path.getsize(f"{TINY}/{name}")
        assert line.endswith(f", {size:,} bytes")


def cut(path):
    os.truncate(path, os.path.getsize(path) // 2)


def narrow_branch(folder):
    os.remove(folder / "chat.bin")
    torch.save(branch_tensors(Branch(64, 4, 128), "backbone."), folder / "branch.pth")


def narrow_projector(folder):
    torch.save({"mm_projector.weight": torch.zeros(128, 64), "mm_projector.bias": torch.zeros(128)}, folder / "mm_projector.bin")
    os.remove(folder / "chat.bin")


BREAKS = {
    "no clip": lambda f: shutil.rmtree(f / "clip"), "no llava": lambda f: shutil.rmtree(f / "llava"),
    "no branch": lambda f: (os.remove(f / "branch.pth"), os.remove(f / "chat.bin")),
    "clip cut": lambda f: cut(f / "clip" / "model.safetensors"), "llava cut": lambda f: cut(f / "llava" / "model.safetensors"),
    "branch cut": lambda f: cut(f / "branch.pth"), "no tokenizer": lambda f: os.remove(f / "llava" / "tokenizer.model"),
    "no config": lambda f: os.remove(f / "llava" / "config.json"),
    "shard missing": lambda f: (f / "llava" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
    "clip and llava swapped": lambda f: (os.rename(f / "clip", f / "x"), os.rename(f / "llava", f / "clip"), os.rename(f / "x", f / "llava")),
    "branch is a clip": lambda f: shutil.copy(f / "clip" / "model.safetensors", f / "branch.pth"),
    "branch of another clip": narrow_branch, "projector of another clip": narrow_projector,
    "an empty file": lambda f: (f / "chat.bin").write_bytes(b""),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_set_is_not_called_complete(tiny, capsys, broken):
    BREAKS[broken](tiny)
    with pytest.raises(UserError) as e:
        check(tiny)
    assert str(tiny) in str(e.value) and "complete" not in capsys.readouterr().out


@pytest.mark.parametrize("broken, words", [("no clip", "only llava, branch.pth, chat.bin; a chat needs clip, llava and a branch"),
                                           ("no branch", "branch.pth: No such file"), ("clip and llava swapped", "clip.*'llava', not 'clip'"),
                                           ("branch is a clip", "branch.pth: a file of a Hugging Face CLIP; give the folder"), ("shard missing", "b.safetensors: No such file"),
                                           ("no tokenizer", "tokenizer.model"), ("projector of another clip", "from a CLIP 64 wide")])
def test_a_broken_set_is_told_by_its_first_problem(tiny, broken, words):
    BREAKS[broken](tiny)
    with pytest.raises(UserError, match=words):
        check(tiny)


def test_a_single_file_or_folder_is_told_by_its_content(tiny, capsys):
    shutil.move(tiny / "branch.pth", tiny / "photo.jpg")
    check(tiny / "photo.jpg")
    check(tiny / "llava")
    check(tiny / "clip")
    shown = [line.removeprefix(str(tiny)) for line in capsys.readouterr().out.splitlines()[::2]]
    assert [line.split(",")[0] for line in shown] == ["/photo.jpg: branch from pretraining", "/llava: LLaMA", "/clip: CLIP"]
    with pytest.raises(UserError, match="neither safetensors nor"):
        check(tiny / "clip" / "merges.txt")
    weightfile.write_safetensors(tiny / "x", {"\x1b[2J": torch.zeros(1)})
    with pytest.raises(UserError, match="x: no CLIP, LLaMA, branch or projector"):
        check(tiny / "x")


def test_what_chat_would_not_read_is_named_with_the_name_that_it_would(tiny, capsys):
    shutil.copy(tiny / "branch.pth", tiny / "pretrain_btadapter_weight.pth")
    shutil.copytree(tiny / "llava", tiny / "vicuna")
    (tiny / "notes.txt").write_text("not weights")
    check(tiny)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["clip", "llava", "branch.pth", "chat.bin", "pretrain_btadapter_weight.pth", "vicuna"]
    assert lines[4].endswith("; not read under this name, only as branch.pth") and lines[5].endswith("; not read under this name, only as llava")
    cut(tiny / "pretrain_btadapter_weight.pth")
    with pytest.raises(UserError, match="pretrain_btadapter_weight.pth: cut"):
        check(tiny)
    assert re.search("^pretrain_btadapter_weight.pth: does not load; .*: cut", capsys.readouterr().out, re.M)


def test_released_files_under_their_own_names_are_no_set_and_are_named(tiny, capsys):
    for name, released in (("branch.pth", "pretrain_btadapter_weight.pth"), ("chat.bin", "sft.bin"), ("llava", "LLaVA-7B"), ("clip", "clip-vit")):
        os.rename(tiny / name, tiny / released)
    with pytest.raises(UserError, match="only files that are not read; a chat needs clip, llava and a branch"):
        check(tiny)
    out = capsys.readouterr().out
    assert [re.search(f"^{name}: .*only as (.*)", out, re.M)[1] for name in ("LLaVA-7B", "clip-vit", "pretrain_btadapter_weight.pth", "sft.bin")] == \
        ["llava", "clip", "branch.pth", "chat.bin"]


def test_a_folder_without_weights_is_told_what_it_should_hold(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="no weights in this folder; it should hold clip, llava, branch.pth"):
        check(tmp_path)


def test_a_set_for_retrieval_is_complete_without_a_llava(tiny, capsys):
    shutil.rmtree(tiny / "llava")
    os.remove(tiny / "chat.bin")
    check(tiny)
    assert capsys.readouterr().out.splitlines()[-1] == "complete, and the parts fit together: for retrieval; a chat needs llava as well"
    torch.save(branch_tensors(Branch(64, 4, 128), "backbone."), tiny / "branch.pth")
    with pytest.raises(UserError, match="branch.pth"):
        check(tiny)


def test_names_that_are_no_text_and_readers_that_leave_are_no_tracebacks(tiny):
    shutil.copy(tiny / "branch.pth", os.fsencode(tiny) + b"/\xff\x1b[2J.pth")
    for command, code in ((f"check {tiny}", 0), (f"check {tiny} | true", 0), ("list | true", 0)):
        done = subprocess.run(["bash", "-c", f'set -o pipefail; "{sys.executable}" -m weights {command}'], cwd=ROOT, capture_output=True)
        assert (done.returncode, done.stderr) == (code, b"") and b"\x1b" not in done.stdout


def test_a_delta_is_called_one_and_is_complete_with_its_base(tiny, capsys):
    base = weightfile.read_file(f"{tiny}/llava/model.safetensors")
    whole = shutil.copytree(tiny / "llava", tiny / "base")
    weightfile.write_safetensors(tiny / "llava" / "model.safetensors", {n: t if "mm_projector" in n else t * 0 for n, t in base.items()})
    with pytest.raises(UserError, match="llava: a delta.*--base FOLDER"):
        check(tiny)
    assert "llava: a delta to a LLaMA, " in capsys.readouterr().out
    check(tiny, base=str(whole))
    assert capsys.readouterr().out.splitlines()[-1].startswith("complete")


def test_the_released_files_of_chat_are_known(tiny, capsys):
    """A tuned branch of three layers without gates, and a projector of which the second half is missing."""
    branch = {name: t for name, t in weightfile.read_file(f"{tiny}/chat.bin").items() if "btadapter" in name}
    torch.save(branch, tiny / "branch.pth")
    os.remove(tiny / "chat.bin")
    check(tiny)
    assert "branch.pth: branch tuned for chat, 3 layers, no gates, " in capsys.readouterr().out
    torch.save({"model.mm_projector.weight": torch.zeros(128, 128), "model.mm_projector.bias": torch.zeros(128)}, tiny / "mm_projector.bin")
    check(tiny)
    assert "mm_projector.bin: projector 128 -> 128 (linear), " in capsys.readouterr().out
    cut(tiny / "mm_projector.bin")
    with pytest.raises(UserError, match="mm_projector.bin: cut"):
        check(tiny)


def test_a_piece_of_a_model_asks_for_its_folder(tmp_path):
    for name, owner in (("layers.0.attention.wq.weight", "Meta's LLaMA"), ("model.layers.0.mlp.up_proj.weight", "a Hugging Face LLaMA")):
        torch.save({name: torch.zeros(1)}, tmp_path / "a.bin")
        with pytest.raises(UserError, match=f"a file of {owner}; give the folder that it belongs to"):
            check(tmp_path / "a.bin")


def test_hashes_find_a_released_file_and_a_damaged_one(tiny, capsys, monkeypatch):
    whole = (tiny / "branch.pth").read_bytes()
    monkeypatch.setitem(weights.RELEASED, "toy", toy("", {"b.pth": File(len(whole), sha(whole))}))
    check(tiny, hash=True)
    shown = capsys.readouterr().out
    assert f"{sha(whole)}  branch.pth: toy: b.pth" in shown and f"{sha((tiny / 'chat.bin').read_bytes())}  chat.bin: not in the list" in shown
    at = len(whole) // 2   # among the numbers of a tensor: no reader could notice
    (tiny / "branch.pth").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    check(tiny)
    with pytest.raises(UserError, match="branch.pth: as long as the released toy: b.pth, but with other bytes"):
        check(tiny, hash=True)


# ---------------------------------------------------------------------------------------------------- need
def table(capsys, what, **flags):
    weights.main(weights.Config("need", str(what), **flags))
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("GB") and len(head) == 26 + 3 * 16
    return {row[:26].strip(): [float(n) for n in row[26:].split()] for row in rows}


def test_the_sum_is_the_sum_of_the_parts(capsys):
    rows = table(capsys, "llava")
    total = rows.pop("sum")
    assert total == pytest.approx([sum(column) for column in zip(*rows.values())], abs=0.003)
    assert total[0] > total[1] > total[2]


def test_seven_billion_parameters_are_counted_one_by_one(capsys):
    """LLaMA-7B has 6,738,415,616; LLaVA adds three rows to two tables. What quantises a delta adds it to its base in memory first."""
    rows, delta = table(capsys, "llava"), table(capsys, "llava-delta")
    assert rows["LLaMA"][0] == round(2 * (6_738_415_616 + 2 * 3 * 4096) / 1e9, 3)
    assert rows["CLIP, image tower"][0] == round(2 * 303_179_776 / 1e9, 3)   # a ViT-L/14 without its projection
    assert delta.pop("LLaMA, as it is joined")[0] == 0 and delta.pop("sum")[0] == rows.pop("sum")[0] and delta == rows


def test_a_folder_of_weights_is_measured_by_what_is_in_it(capsys):
    rows, (clip, _), (llama, _, _) = table(capsys, TINY), load_clip(f"{TINY}/clip"), load_llama(f"{TINY}/llava")
    assert rows["CLIP, image tower"][0] == round(4 * sum(p.numel() for p in clip.vision_model.parameters()) / 1e9, 3)   # fp32: it is small
    assert rows["LLaMA"][0] == round(4 * sum(p.numel() for p in llama.parameters()) / 1e9, 3)
    assert "LLaMA, as it is joined" in table(capsys, TINY, base=TINY)
    with pytest.raises(UserError, match="need llava: --base is for a folder of weights"):
        weights.main(weights.Config("need", "llava", base="x"))
    with pytest.raises(UserError, match="clip: not a chat; choose llava"):
        weights.main(weights.Config("need", "clip"))
    with pytest.raises(UserError, match="clip"):
        weights.main(weights.Config("need", ROOT))


def test_an_unknown_stage_is_told():
    with pytest.raises(UserError, match="fetch: no such stage; choose one of list, get, check, need"):
        weights.main(weights.Config("fetch"))
