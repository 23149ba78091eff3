"""The command about released weights: what it fetches is right, or not there."""
import contextlib
import hashlib
import http.server
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time

import pytest
import torch

from clip import CLIP, CLIPConfig
from llm import LLaMA, LLaMAConfig
from plumbing import cli, quant
from plumbing.cli import UserError
from weights import __main__ as weights

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ENTRIES = {"clip", "llava", "branch.pth", "mm_projector.bin", "stage2", "stage3"}   # what chat.py reads in a folder of weights
OLD = bytes(torch.randint(256, (3_000_000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8))
FLIPPED = OLD[:1000] + bytes([OLD[1000] ^ 1]) + OLD[1001:]


def sha(data):
    return hashlib.sha256(data).hexdigest()


KNOWN = {"size": len(OLD), "sha256": sha(OLD)}


# ---------------------------------------------------------------------------------------- a server
class Server(http.server.ThreadingHTTPServer):
    """Answers request i with answers[i], the last for ever. seen: (path, first byte) of each request."""
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.seen, self.done = [], [], threading.Event()
        self.daemon_threads, self.address = True, f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, client_address):
        pass   # the client hung up: that is what some tests are about


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.path, self.start()))
        self.close_connection = True
        self.server.answers[min(len(self.server.seen), len(self.server.answers)) - 1](self)

    def log_message(self, *_):
        pass

    def start(self):
        """The first byte that is asked for."""
        return int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))

    def head(self, status, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


def honest(data=OLD, stop=None):
    """Knows ranges. stop: breaks off after so many bytes of the answer."""
    def answer(h):
        rest = data[h.start():]
        h.head(206 if rest else 416, Content_Length=len(rest))
        h.wfile.write(rest[:stop])
    return answer


def stalling(after):
    def answer(h):
        honest(stop=after)(h)
        h.wfile.flush()
        h.server.done.wait()
    return answer


def ignoring_ranges(h):
    h.head(200, Content_Length=len(OLD))
    h.wfile.write(OLD)


def chunked(h):
    h.head(200, Transfer_Encoding="chunked")
    for part in (OLD, b""):
        h.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))


def refusing(status, **headers):
    return lambda h: h.head(status, Content_Length=0, **headers)


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


def toy(address, facts):
    return {"what": "a toy", "for": "tests", "licence": "none", "page": "its page", "address": address,
            "files": {"a.bin": {"to": "toy/a.bin", **facts}}}


@pytest.fixture
def get(tmp_path, monkeypatch):
    """get(*answers) runs the command against a server that answers so -> the requests that it saw."""
    monkeypatch.setattr(weights, "PAUSE", 0)
    monkeypatch.setattr(weights, "TIMEOUT", 2)
    monkeypatch.setattr(weights, "TRIES", 3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def run(*answers, **facts):
        server.answers, server.seen = answers, []
        monkeypatch.setitem(weights.RELEASED, "toy", toy(server.address, facts or KNOWN))
        try:
            weights.main(weights.Config("get", "toy", out=str(tmp_path)))
        finally:
            run.seen = server.seen
        return run.seen
    run.folder = tmp_path / "toy"
    run.file, run.part = run.folder / "a.bin", run.folder / "a.bin.part"
    with serving() as run.server:
        server = run.server
        monkeypatch.setattr(weights, "FOLLOWED", server.address)
        yield run


def names(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []


def arrived(get):
    return names(get.folder) == ["a.bin"] and get.file.read_bytes() == OLD


# ---------------------------------------------------------------------------------------- get
def test_a_file_arrives_whole_and_alone(get):
    assert get(honest()) == [("/a.bin", 0)] and arrived(get)


def test_a_broken_connection_goes_on_where_it_broke(get):
    seen = get(honest(stop=1_000_000), honest(stop=500_000), honest())
    assert [r for _, r in seen] == [0, 1_000_000, 1_500_000] and arrived(get)


def test_without_a_known_hash_a_broken_download_begins_anew(get):
    seen = get(honest(FLIPPED, stop=1_000_000), honest(), size=len(OLD))
    assert [r for _, r in seen] == [0, 0] and arrived(get)


def test_a_stalled_server_is_given_up_with_a_word_and_the_same_command_goes_on(get, monkeypatch):
    monkeypatch.setattr(weights, "TIMEOUT", 0.2)
    with pytest.raises(UserError, match="timed out; give the same command again to go on"):
        get(stalling(700_000), stalling(0))
    assert len(get.seen) == 3 and names(get.folder) == ["a.bin.part"]
    assert get(honest()) == [("/a.bin", 700_000)] and arrived(get)


def test_a_server_that_ignores_ranges_is_taken_from_the_start(get):
    seen = get(honest(stop=1_000_000), ignoring_ranges)
    assert seen[1][1] == 1_000_000 and arrived(get)


def test_a_flipped_bit_is_noticed_and_nothing_of_it_stays(get):
    with pytest.raises(UserError, match=f"sha256 is {sha(FLIPPED)}, but .* is {sha(OLD)}; thrown away"):
        get(honest(FLIPPED))
    assert names(get.folder) == []


def test_a_part_of_another_file_is_noticed_and_thrown_away(get):
    get.folder.mkdir()
    get.part.write_bytes(FLIPPED[:2_000_000])
    with pytest.raises(UserError, match="thrown away, try again"):
        get(honest())
    assert get(honest()) == [("/a.bin", 0)] and arrived(get)


@pytest.mark.parametrize("facts", [KNOWN, {"sha256": sha(OLD)}])
def test_a_part_that_is_whole_only_gets_its_name(get, facts):
    """The power failed between the last byte and the renaming."""
    get.folder.mkdir()
    get.part.write_bytes(OLD)
    assert get(honest(), **facts) == [("/a.bin", 3_000_000)] and arrived(get)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://[::1]/a", "http://127.0.0.1/a", "data:,a"])
def test_a_redirect_to_anything_but_https_is_not_followed(get, address):
    with pytest.raises(UserError, match="not https; not followed|302") as e:
        get(refusing(302, Location=address))
    assert len(get.seen) == 1 and names(get.folder) == [] and str(e.value).isprintable()


def test_a_redirect_is_followed_and_the_rest_is_asked_for_there(get):
    away = refusing(302, Location="/cdn")
    seen = get(away, honest(stop=1_000_000), away, honest())
    assert seen == [(path, at) for at in (0, 1_000_000) for path in ("/a.bin", "/cdn")] and arrived(get)


def test_killed_in_the_middle_leaves_a_part_and_the_same_command_ends_it(get):
    code = ("import json, sys; from weights import __main__ as weights; "
            "weights.RELEASED['toy'] = json.loads(sys.argv[1]); "
            "weights.main(weights.Config('get', 'toy', out=sys.argv[2]))")
    get.server.answers = [stalling(1_000_000)]
    release = json.dumps(toy(get.server.address, KNOWN))
    child = subprocess.Popen([sys.executable, "-c", code, release, str(get.folder.parent)], cwd=ROOT)
    while not get.part.exists() or os.path.getsize(get.part) < 1_000_000:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert names(get.folder) == ["a.bin.part"]
    assert get(honest()) == [("/a.bin", 1_000_000)] and arrived(get)


@pytest.mark.parametrize("status, advice", [(404, "404"), (401, "log in with a browser"), (403, "a.bin$")])
def test_a_refusal_is_told_once_with_what_to_do(get, status, advice):
    with pytest.raises(UserError, match=advice):
        get(refusing(status))
    assert len(get.seen) == 1 and names(get.folder) == []


def test_a_server_in_trouble_is_asked_again_and_then_given_up(get):
    assert len(get(refusing(503), refusing(429), honest())) == 3
    os.remove(get.file)
    with pytest.raises(UserError, match="Error 503: .*; give the same command again"):
        get(refusing(503))


def test_no_network_is_one_line(get, monkeypatch):
    with serving() as server:
        address = server.address
    monkeypatch.setitem(weights.RELEASED, "toy", toy(address, KNOWN))
    with pytest.raises(UserError, match="refused>; give the same command again"):
        weights.main(weights.Config("get", "toy", out=str(get.folder)))


def test_another_size_than_the_released_one_is_noticed_and_nothing_of_it_stays(get):
    with pytest.raises(UserError, match="its size is 3000000, but that of the release is 5; thrown away"):
        get(honest(), size=5)
    assert names(get.folder) == []


def test_a_file_that_comes_in_chunks_arrives(get):
    assert get(chunked) == [("/a.bin", 0)] and arrived(get)


def test_a_full_disk_is_told_and_what_came_stays(get, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(UserError, match="3,000,000 bytes .* no room"):
        m.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
        get(honest())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
    try:
        with pytest.raises(UserError, match="File too large.*; give the same command again"):
            get(honest())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 0 < os.path.getsize(get.part) <= 2_000_000
    get(honest())
    assert arrived(get)


def test_what_is_there_and_right_is_not_fetched_and_what_is_wrong_is_not_touched(get):
    get(honest())
    assert get(refusing(500)) == []
    for content in (OLD[:-1], FLIPPED):
        get.file.write_bytes(content)
        with pytest.raises(UserError, match="move it away"):
            get(honest())
        assert get.file.read_bytes() == content and get.seen == []


def test_an_unknown_name_or_stage_is_told():
    with pytest.raises(UserError, match="choose one of clip, "):
        weights.main(weights.Config("get", "../clip"))
    with pytest.raises(UserError, match="fetch: choose one of list, get"):
        cli.parse(weights.Config, ["fetch"], **weights.FLAGS)


# ---------------------------------------------------------------------------------------- an archive
HOLDS = {"stage1/mm.bin": "mm.bin", "stage2/a.bin": "stage2/a.bin"}


def packed(*names):
    """A tar.gz of small files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    return buffer.getvalue()


@pytest.mark.parametrize("by_hand", [False, True])
def test_of_an_archive_the_files_of_the_table_are_put_at_their_places_and_no_others(get, by_hand):
    content = packed("x-stage1/mm.bin", "x-stage2/a.bin", "../../evil", "x-stage3/a.bin")
    if by_hand:
        get.folder.mkdir()
        get.file.write_bytes(content)
    get(honest(content), holds=HOLDS)
    assert get.seen == ([] if by_hand else [("/a.bin", 0)])
    found = {str(p.relative_to(get.folder.parent)) for p in get.folder.parent.rglob("*") if p.is_file()}
    assert found == {"toy/a.bin", "mm.bin", "stage2/a.bin"}
    assert (get.folder.parent / "stage2/a.bin").read_text() == "x-stage2/a.bin"


def test_what_was_unpacked_stays_and_what_is_missing_comes_again(get):
    get(honest(packed("x-stage1/mm.bin", "x-stage2/a.bin")), holds=HOLDS)
    (get.folder.parent / "mm.bin").write_text("my own")
    os.remove(get.folder.parent / "stage2/a.bin")
    get(refusing(500), holds=HOLDS)
    assert (get.folder.parent / "mm.bin").read_text() == "my own"
    assert (get.folder.parent / "stage2/a.bin").exists()


@pytest.mark.parametrize("content, message", [
    (packed("stage2/a.bin"), "holds no stage1/mm.bin"), (packed("stage2/a.bin")[:60], "move it away"),
    (OLD[:5000], "move it away"), (packed("stage1/mm.bin", "stage2/a.bin")[:-8] + bytes(8), "CRC")])
def test_an_archive_that_is_another_or_damaged_is_one_line(get, content, message):
    with pytest.raises(UserError, match=f"toy/a.bin: .*{message}"):
        get(honest(content), holds=HOLDS)
    assert not (get.folder.parent / "mm.bin").exists()


def test_a_release_comes_with_those_that_it_needs(get, monkeypatch):
    monkeypatch.setitem(weights.RELEASED, "base", toy(get.server.address, KNOWN) | {
        "files": {"b.bin": {"to": "toy/b.bin", **KNOWN}}})
    release = toy(get.server.address, KNOWN) | {"with": ["base"]}
    get.server.answers = [honest()]
    monkeypatch.setitem(weights.RELEASED, "toy", release)
    weights.main(weights.Config("get", "toy", out=str(get.folder.parent)))
    assert [path for path, _ in get.server.seen] == ["/b.bin", "/a.bin"]


# ---------------------------------------------------------------------------------------- list
def test_the_list_names_every_file_with_size_hash_licence_and_source(capsys):
    weights.main(weights.Config("list"))
    shown = capsys.readouterr().out
    for name, release in weights.RELEASED.items():
        block = re.search(rf"^{name}: .*?(?=^\S|\Z)", shown, re.M | re.S)[0]
        assert all(release.get(key, "") in block for key in ("licence", "page", "for", "memory", "note"))
        for file, facts in release["files"].items():
            line = next(line for line in block.splitlines() if line.split()[0] == file)
            size = facts.get("size") or facts.get("about")
            assert (f"{size:,} bytes" if size else "unknown bytes") in line
            places = [facts["to"], *facts.get("holds", {}).values()]
            assert facts.get("sha256", "sha256 unknown") in line and all(place in line for place in places)
    assert "16,777,216" in shown and "almost certainly cut" in shown


def test_the_memory_of_a_7b_is_that_of_its_tensors():
    with torch.device("meta"):
        clip, llama = CLIP(CLIPConfig()), LLaMA(LLaMAConfig())
    sizes = {name: quant.nbytes(clip.vision_model, None, torch.bfloat16)
             + quant.nbytes(llama, scheme, torch.bfloat16)
             for name, scheme in (("bf16", None), ("int8", "int8"), ("int4", "int4"))}
    words = ", ".join(f"{size / 1e9:.1f} GB in {name}" for name, size in sizes.items())
    assert {release["memory"] for release in weights.RELEASED.values() if "memory" in release} == {
        f"{words}, together with CLIP"}


def test_the_table_stays_on_https_and_inside_its_folder():
    for release in weights.RELEASED.values():
        assert release["files"] and release["address"].startswith("https://")
        for file, facts in release["files"].items():
            for place in facts.get("holds", {"": facts["to"]}).values():
                assert os.path.normpath(place).split("/")[0] in ENTRIES
            assert os.path.normpath(facts["to"]).split("/")[0] in (*ENTRIES, file)
            assert not ("size" in facts and "about" in facts)
            assert re.fullmatch("[0-9a-f]{64}", facts.get("sha256", 64 * "0"))


def test_a_reader_of_the_list_who_leaves_is_no_traceback():
    command = f'set -o pipefail; "{sys.executable}" -m weights list | true'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
