"""The released weights: what there is, fetching it, checking it, and the memory to chat with it.

    python -m weights list             # the files that it knows: bytes, sha256, licence, source, what it is for
    python -m weights get clip         # fetches one of them to --out; given again, it goes on or finds that all is there
    python -m weights check weights/released     # what each file is, by its content, and whether they fit together
    python -m weights need llava       # memory to chat with it on a CPU: as it is, in int8 and in int4

A file appears under its final name when all of it is there and nothing in it is known to be wrong; until then it is NAME.part,
with NAME.part.json beside it that says what it is a part of. `check` loads the parts as chat.py does, without copying them where it
can (less than a second for 13 GB); deltas and several shards of Meta are put together in memory. With --hash it reads every byte. Its
exit code is 0 for a part that is whole, and for a set that is complete, for a chat or for retrieval, else 2.
"""
import dataclasses
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import NamedTuple

import torch
from tqdm import tqdm

from clip import CLIPConfig, load_clip, load_clip_model
from llm import LLaMAConfig, is_delta, is_joined, is_meta, load_llama, load_tokenizer, read_llama
from model import load_branch, projector_part, read_branch_file

load_chat = read_sizes = None
from plumbing import cli, memory, weightfile
from plumbing.cli import UserError
from plumbing.weightfile import shown


@dataclasses.dataclass
class Config:
    stage: str                       # what to do: list, get, check or need
    what: str = ""                   # get, need: a name from the list; check, need: a folder of weights, if not --out; check: any part
    out: str = "weights/released"    # the folder of weights that files go to
    hash: bool = False               # check: compare the sha256 of every file with the released one
    base: str = ""                   # check, need: the folder of the LLaMA that delta weights are added to (then their sum is in memory)
    timeout: float = 30.0            # get: seconds without a byte after which a server is given up
    tries: int = 5                   # get: how often in a row nothing may come before the whole is given up


# ---------------------------------------------------------------------------------------------------- what there is
class File(NamedTuple):
    size: int | None = None      # bytes
    sha256: str | None = None
    about: float | None = None   # where the exact number is not known: the size as its page rounds it, to three digits

    def words(self):
        return f"{self.size:,} bytes" if self.size else f"about {self.about:,.0f} bytes"

    def may_have(self, size):
        return self.size in (None, size) and self.about in (None, float(f"{size:.3g}"))


class Release(NamedTuple):
    what: str
    purpose: str
    licence: str
    page: str                    # where a person reads about it
    address: str                 # of its files, but for their names
    to: str                      # where it goes in a folder of weights; ending in a slash: a folder of its own
    files: dict
    ask: str = ""                # how to get what may not be fetched
    note: str = ""
    chat: tuple = ()             # of a whole chat model: the sizes of its CLIP and of its LLaMA
    delta: bool = False          # it is only the difference to a base


def hub(repository, commit):
    """Where Hugging Face serves the files of one commit: what is there never changes."""
    return f"https://huggingface.co/{repository}", f"https://huggingface.co/{repository}/resolve/{commit}/"


# Sizes and hashes are those that the pages show (Hugging Face: "Git LFS Details"); OpenAI puts the hash into the address. What no
# page shows stays unknown here, and then the hash that the server names while it sends is what a file is held against.
OPENAI = "https://openaipublic.azureedge.net/clip/models/"
BT_ADAPTER = hub("farewellthree/BTAdapter-Weight", "1ba63d5cf750398cf064cceb0229213cd151cee9")
LLAMA_TOKENIZER = File(499_723, "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347")
LLAVA_1 = (CLIPConfig(), LLaMAConfig(vocab_size=32003))   # LLaMA-7B, and LLaVA's three tokens
RELEASED = {
    "clip": Release(
        "CLIP ViT-L/14 at 224 pixels, OpenAI's archive", "everything: the backbone of the paper", "MIT",
        "https://github.com/openai/CLIP", OPENAI + "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/", "clip",
        {"ViT-L-14.pt": File(932_768_134, "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836")}),
    "clip-hf": Release(
        "the same CLIP in fp32, as a Hugging Face folder", "the same", "none stated on its page; OpenAI's own release is MIT",
        *hub("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41"), "clip/",
        {"config.json": File(4_519, "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a"),
         "merges.txt": File(None, "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a", 525e3),
         "model.safetensors": File(1_710_540_580, "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb")}),
    "clip-336": Release(
        "CLIP ViT-L/14 at 336 pixels, OpenAI's archive", "llava-1.5, which was trained with it", "MIT",
        "https://github.com/openai/CLIP", OPENAI + "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/", "clip",
        {"ViT-L-14-336px.pt": File(934_088_680, "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02")}),
    "branch": Release(
        "BT-Adapter's branch as pretrained, beside a whole CLIP in fp32", "retrieval, and chat without tuning on video", "Apache-2.0",
        *BT_ADAPTER, "branch.pth",
        {"pretrain_btadapter_weight.pth":
         File(2_000_725_111, "254cf9cb7328f89c973647374c5445d098bb481d51d94b7fb8fb9a25bced77d7")}),
    "branch-chat": Release(
        "BT-Adapter's branch as tuned for chat: three layers, no gates", "chat, in the place of branch", "Apache-2.0", *BT_ADAPTER, "branch.pth",
        {"sft_btadapter_weight.bin": File(214_451_963, "e544bc6d72f61a8c9537924771378aed84b5604ec40afe29255c93b1ffb48c19")},
        note="it was tuned together with projector"),
    "projector": Release(
        "BT-Adapter's projector as tuned for chat", "chat", "Apache-2.0", *BT_ADAPTER, "mm_projector.bin",
        {"sft_mm_projector.bin": File(16_777_216, "c598105aa725ba0f2229b682744809e9cddae3af8b6291054c8e48f373c92dec")},
        note="almost certainly cut: these are 2^24 bytes, and a whole projector in fp32 is 16,795,533"),
    "video-chatgpt": Release(
        "Video-ChatGPT's projector and word embeddings", "chat with --tokens st_pool", "CC-BY-4.0",
        *hub("MBZUAI/Video-ChatGPT-7B", "095de7afdecce81061e0227cc82ef8285a08d0db"), "mm_projector.bin",
        {"video_chatgpt-7B.bin": File(None, "c5d78b70ca98dd8ae06cfc0f49b3fd7a7057dcfdddb33a19736fea9e7eabaff8", 541e6)}),
    "llava": Release(
        "LLaVA-Lightning-7B-v1-1, the delta below already added to LLaMA-7B", "chat: the language model of the paper",
        "CC-BY-4.0 says its page; LLaMA's own licence applies to what is under it",
        *hub("mmaaz60/LLaVA-7B-Lightening-v1-1", "36c0964cf16a0f7d30b08ca79f393eb99ac4c5a9"), "llava/",
        {"config.json": File(839), "tokenizer.model": File(about=500e3), "pytorch_model.bin.index.json": File(about=26.9e3),
         "pytorch_model-00001-of-00002.bin": File(None, "fa993064080568a811caffc00662d5425ed2d0d095c1db19350705fc2152b7d6", 9.98e9),
         "pytorch_model-00002-of-00002.bin": File(None, "754dbea0bf47c11fa898ee721dcf824e8a4c74211e2d5aa52ac90af8dd52953f", 3.51e9)},
        chat=LLAVA_1),
    "llava-delta": Release(
        "LLaVA-Lightning-7B-v1-1 as its authors released it: differences to LLaMA-7B", "chat, together with llama", "Apache-2.0",
        *hub("liuhaotian/LLaVA-Lightning-7B-delta-v1-1", "6ba60f017c5a67ece2101b8650f497e90b7b20e0"), "llava/",
        {"config.json": File(836), "tokenizer.model": LLAMA_TOKENIZER, "pytorch_model.bin.index.json": File(about=26.9e3),
         "pytorch_model-00001-of-00002.bin": File(about=9.98e9),
         "pytorch_model-00002-of-00002.bin": File(None, "d7c89bb170d36a5b7f0cda596ed863db89326b1dde739c6a2a0ef4dc1f949b87", 3.51e9)},
        chat=LLAVA_1, delta=True),
    "llava-1.5": Release(
        "LLaVA-1.5-7B", "chat; its CLIP is clip-336", "LLaMA 2 Community License",
        *hub("liuhaotian/llava-v1.5-7b", "12e054b30e8e061f423c7264bc97d4248232e965"), "llava/",
        {"config.json": File(about=1.16e3), "tokenizer.model": File(about=500e3),
         "pytorch_model.bin.index.json": File(about=27.1e3), "pytorch_model-00001-of-00002.bin": File(about=9.98e9),
         "pytorch_model-00002-of-00002.bin": File(None, "c0eb94eb3fa578a4c63567f2eca6b0acf6a44a891c257aca0df88ffa891de72e", 3.54e9)},
        chat=(CLIPConfig(image_size=336), LLaMAConfig(vocab_size=32000, context_length=4096))),
    "vicuna": Release(
        "Vicuna-7B v1.1, a language model alone", "chat, together with an mm_projector.bin that was trained for it", "unknown; the page of v1.3 says non-commercial",
        *hub("lmsys/vicuna-7b-v1.1", "728928c0e101b2eb4950409dc6e7148919a5e2c9"), "llava/",
        {"config.json": File(582), "tokenizer.model": File(about=500e3), "pytorch_model.bin.index.json": File(about=26.8e3),
         "pytorch_model-00001-of-00002.bin": File(None, "5ed572be140240b212049a3e791271eed8a04c40bc732c91a4da4b1469db23b1", 9.98e9),
         "pytorch_model-00002-of-00002.bin": File(None, "d9382da358f0ec38c4fca3bcf1e3e65274ae4c78090e0775b4bb4dea6a518e08", 3.5e9)},
        chat=(CLIPConfig(), LLaMAConfig())),
    "llama": Release(
        "LLaMA-7B of Meta", "the base that llava-delta is added to", "Meta's LLaMA licence, to be accepted first",
        "https://github.com/facebookresearch/llama", "", "", {}, ask="fill in Meta's form, https://forms.gle/jk851eBVbX1m5TAv5",
        chat=(CLIPConfig(), LLaMAConfig())),
}


def list_released(cfg):
    for name, r in RELEASED.items():
        print(f"{name}: {r.what}\n    for      {r.purpose}\n    licence  {r.licence}\n    from     {r.page}")
        for file, facts in r.files.items():
            print(f"    {file}{'' if r.to.endswith('/') else f' -> {r.to}'}  {facts.words()}  sha256 {facts.sha256 or 'unknown'}")
        for line in (r.note, r.ask):
            if line:
                print(f"    note     {line}")


def target(release, file):
    """Where a file of a release goes, relative to the folder of weights."""
    return release.to + file if release.to.endswith("/") else release.to


# ---------------------------------------------------------------------------------------------------- fetching
PAUSE = 2.0       # seconds before the second try; longer before each that follows
CHUNK = 1 << 20   # bytes


class Again(Exception):
    """A try failed in a way that another may not."""


class WrongBytes(UserError):
    """A file is not what was released."""


class OnlyHTTPS(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https alone (or from this machine to this machine), and keeps the hash that Hugging Face names on its own
    answer, before it sends one on to the server that has the bytes."""
    linked = ""

    def redirect_request(self, request, f, code, message, headers, address):
        check_address(address, request.full_url)
        self.linked = headers.get("X-Linked-Etag") or self.linked
        return super().redirect_request(request, f, code, message, headers, address)


def check_address(address, origin):
    """Raises UserError for an address that may not be followed."""
    def local(a):
        return a.scheme == "http" and a.hostname in ("127.0.0.1", "localhost", "::1")
    try:
        a, b = urllib.parse.urlsplit(address), urllib.parse.urlsplit(origin)
        if a.scheme == "https" or local(a) and local(b):
            return
    except ValueError:
        pass   # no address at all
    raise UserError(f"{origin}: sends one on to {shown(address)}, which is not https; not followed")


def get(cfg):
    """Fetches the files of one release. What is there and right is left alone."""
    cli.at_least(cfg, timeout=0.01, tries=1)
    if cfg.what not in RELEASED:
        raise UserError(f"{cfg.what or 'no name'}: not in the list of released weights; choose one of {', '.join(RELEASED)}")
    release = RELEASED[cfg.what]
    if release.ask:
        raise UserError(f"{cfg.what}: {release.licence}; {release.ask}. See {release.page}")
    print(f"{cfg.what}: {release.what}; licence: {release.licence}; {release.page}", file=sys.stderr)
    files = list(release.files)
    for file in files:
        path = os.path.join(cfg.out, target(release, file))
        get_file(release.address + urllib.parse.quote(file), path, release.files.get(file, File()), cfg)
        if file.endswith(".index.json"):   # it may name shards that the table does not
            files += sorted(set(weightfile.read_index(path).values()) - set(files))
    if release.note:
        print(f"{cfg.what}: {release.note}", file=sys.stderr)


def get_file(address, path, file, cfg):
    """One file, whole and right, at `path`. Raises UserError; what came until then stays in PATH.part."""
    if os.path.lexists(path):
        check_file(path, file, "move it away, or choose another --out")
        forget(path + ".part")
        print(f"{path}: there already", file=sys.stderr)
        return
    cli.make_folder(os.path.dirname(path) or ".")
    note, furthest, failures = {}, 0, 0
    while not note:
        try:
            note = receive(address, path + ".part", file, cfg.timeout)
        except Again as e:
            there = size_of(path + ".part")
            failures = failures + 1 if there <= furthest else 0   # a line that breaks every gigabyte still gets there
            furthest = max(furthest, there)
            if failures >= cfg.tries:
                raise UserError(f"{address}: {e}, {failures} times; {there:,} bytes are in {path}.part, and the same command goes on")
            print(f"{os.path.basename(path)}: {e}; trying again", file=sys.stderr)
            time.sleep(PAUSE * (1 + failures))
    try:
        check_file(path + ".part", file._replace(sha256=file.sha256 or note["sha256"]), "thrown away; try again")
    except WrongBytes:
        forget(path + ".part")
        raise
    try:
        os.replace(path + ".part", path)
        os.remove(path + ".part.json")
    except OSError as e:
        raise UserError(f"{path}: cannot write: {e.strerror}")
    print(path)


def check_file(path, file, advice):
    """Raises WrongBytes where a file is not what was released, as far as that is known; UserError where it cannot be read."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: not a file; {advice}")
    size = size_of(path)
    if not file.may_have(size):
        raise WrongBytes(f"{path}: {size:,} bytes, but the released file has {file.words()}; {advice}")
    if file.sha256 and (found := sha256(path)) != file.sha256:
        raise WrongBytes(f"{path}: its sha256 is {found}, but that of the released file is {file.sha256}; {advice}")


def sha256(path):
    """The hash of a file, in hexadecimal, with a bar: 13 GB take a while."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f, bar(f"sha256 of {os.path.basename(path)}", size_of(path), 0) as progress:
            while chunk := f.read(CHUNK):
                digest.update(chunk)
                progress.update(len(chunk))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}")
    return digest.hexdigest()


def bar(name, total, done):
    return tqdm(desc=name, total=total, initial=done, unit="B", unit_scale=True, leave=False, disable=None)   # None: off in a pipe


def size_of(path):
    """Bytes of a file; 0 where there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def forget(part):
    """Removes a part and its note. Raises UserError."""
    for path in (part, part + ".json"):
        try:
            if os.path.exists(path):
                os.remove(path)
        except OSError as e:
            raise UserError(f"{path}: cannot remove: {e.strerror}")


def read_note(part, address):
    """What the part is a part of: {address, size, etag, sha256}; {} where nothing is known, or it is of something else."""
    try:
        note = weightfile.read_json(part + ".json")
    except UserError:
        return {}   # none yet, or cut: then there is nothing that could safely be gone on with
    fits = note.get("address") == address and {"size", "etag", "sha256"} <= note.keys() and isinstance(note["etag"], str | None)
    return note if fits else {}


def receive(address, part, file, timeout):
    """One try to get what is missing of a part. -> its note, once all is there. Raises Again or UserError."""
    note = read_note(part, address)
    have = size_of(part) if note else 0
    if have and have == note["size"]:
        return note
    headers = {"User-Agent": "nanoBT weights.py", "Accept-Encoding": "identity"}
    if have and (note["etag"] or file.sha256):   # without either, an old half and a new one could be glued together
        headers["Range"] = f"bytes={have}-"
        if note["etag"]:
            headers["If-Range"] = note["etag"]   # changed upstream: the server sends all of the new one
    response, linked = ask(urllib.request.Request(address, headers=headers), part, timeout)
    with response:
        start, size = measure(response, have if "Range" in headers else None, note, part)
        size = file.size if size is None else size
        if size is not None and not file.may_have(size):
            raise UserError(f"{address}: the server has {size:,} bytes, but the released file has {file.words()}; what is there has changed")
        etag, linked = response.headers.get("ETag") or "", linked.strip('"').lower()
        note = {"address": address, "size": size, "etag": etag if etag.startswith('"') else None,   # a weak one promises no bytes
                "sha256": linked if re.fullmatch("[0-9a-f]{64}", linked) else None}
        free, missing = shutil.disk_usage(os.path.dirname(part) or ".").free, (size or 0) - start
        free += size_of(part) if start == 0 else 0   # it begins anew, and what is there goes
        if missing > free:
            raise UserError(f"{part}: {missing:,} bytes are still to come, but the disk has {free:,} left")
        return note | {"size": write(response, part, note, start)}


def ask(request, part, timeout):
    """-> (response, the sha256 that Hugging Face names, or ""). Raises Again where the failure may pass, else UserError."""
    redirects = OnlyHTTPS()
    opener, site = urllib.request.build_opener(redirects), request.full_url
    check_address(site, site)
    try:
        response = opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as e:
        e.close()
        if e.code == 416:   # the part is longer than the file
            forget(part)
            raise Again("the server has less than what is here")
        if e.code in (408, 425, 429) or e.code >= 500:
            raise Again(f"the server says {e.code} {shown(e.reason)}")
        what = {404: "has no such file any more", 410: "has no such file any more"}.get(e.code, "does not give it")
        if e.code in (401, 403):
            what = f"asks who you are: log in with a browser, accept its terms, and put the file at {part.removesuffix('.part')}"
        raise UserError(f"{site}: the server {what} ({e.code} {shown(e.reason)})")
    except ValueError as e:
        raise UserError(f"{site}: sends one on to what is no address ({shown(e)}); not followed")
    except (OSError, http.client.HTTPException) as e:
        raise Again(f"cannot reach the server ({getattr(e, 'reason', e) or type(e).__name__})")
    return response, response.headers.get("X-Linked-Etag") or redirects.linked


def measure(response, wanted, note, part):
    """Where what comes belongs, and how long the whole file is -> (start, size). wanted: the first byte that was asked for, or None.

    A server may ignore the wish and send everything (200). If it sends a piece, it has to be the piece that was asked for. The size
    is None where the file comes in chunks, the last of which says that it is the last."""
    if response.status == 206:
        piece = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range") or "")
        start, end, size = map(int, piece.groups()) if piece else (None, None, None)
        other = response.headers.get("ETag", note.get("etag")) != note.get("etag") and note.get("etag")
        if wanted is None or start != wanted or end != size - 1 or note["size"] not in (None, size) or other:
            forget(part)
            raise Again("the server sends another piece than the one asked for")
        return start, size
    length = response.headers.get("Content-Length") or ""
    if response.status != 200 or response.headers.get("Content-Encoding", "identity") != "identity" or not (length.isdecimal() or response.chunked):
        raise UserError(f"{response.url}: the server does not say how long the file is; nothing was kept")
    return 0, int(length) if length else None


def write(response, part, note, start):
    """Appends what comes to the part (start 0: to an empty one) -> the size of the whole. Raises Again where it ends early, UserError
    where the disk refuses."""
    done = start
    try:
        with open(part, "ab" if start else "wb") as f, bar(os.path.basename(part), note["size"], start) as progress:
            if not start:   # after the part was emptied: a note never stands beside bytes of something else
                cli.write_atomic(part + ".json", lambda n: n.write(json.dumps(note).encode()))
            while done <= (note["size"] or done) and (chunk := piece(response)):
                f.write(chunk)
                done += len(chunk)
                progress.update(len(chunk))
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise UserError(f"{part}: cannot write: {e.strerror}; {size_of(part):,} bytes are there, and the same command goes on")
    if note["size"] is not None and done > note["size"]:
        forget(part)
        raise Again("the server sends more than it said")
    if note["size"] is not None and done < note["size"]:
        raise Again(f"the server stopped at {done:,} of {note['size']:,} bytes")
    if size_of(part) != done:
        forget(part)
        raise UserError(f"{part}: something else writes there; is the same command running twice? Thrown away; start it once more")
    return done


def piece(response):
    """What has come so far, at most CHUNK bytes, so that nothing is lost when the rest does not come; b"" at the end."""
    try:
        return response.read1(CHUNK)
    except TimeoutError:
        raise Again("the server stopped sending")
    except (OSError, http.client.HTTPException) as e:
        raise Again(f"the connection broke ({e or type(e).__name__})")


# ---------------------------------------------------------------------------------------------------- checking
ENTRIES = ("clip", "llava", "branch.pth", "mm_projector.bin", "chat.bin")   # of a folder of weights; see model.load_chat


def check(cfg):
    """Prints what each part of a folder of weights is, by its content, and whether they make a chat, or at least retrieval. What else could
    be weights there is named as well: chat.py reads nothing but ENTRIES. Raises UserError with the first problem."""
    what, problems = cfg.what or cfg.out, []
    parts = parts_of(what)
    if os.path.isdir(what) and not parts and not is_model(what):
        raise UserError(f"{what}: no weights in this folder; it should hold {', '.join(ENTRIES)} or some of them, or be a model itself")
    entries = [name for name in ENTRIES if name in parts]
    for name in parts or [""]:
        path = os.path.join(what, name) if name else what
        try:
            words = look(path)
            unread = "" if name in ENTRIES or not name else f"; not read under this name, only as {', '.join(usual(words))}"
            print(f"{shown(name or path)}: {words}, {sum(map(size_of, files_of(path))):,} bytes{unread}")
        except UserError as e:
            problems.append(str(e))
            print(f"{shown(name or path)}: does not load; {shown(e, longest=300)}")
        if cfg.hash:
            problems += check_hashes(files_of(path))
    chat, retrieval = {"clip", "llava"} <= set(entries), entries == ["clip", "branch.pth"]
    if parts and not (chat or retrieval):
        problems.append(f"{what}: only {', '.join(entries) or 'files that are not read'}; a chat needs clip, llava and a branch, retrieval clip and branch.pth")
    if problems:
        raise UserError(problems[0])
    if chat:   # with what was tuned on video, and without
        for tuned in [True] + [False] * ({"branch.pth", "chat.bin"} <= set(entries)):
            load_chat(what, tuned=tuned, dtype=None, base=cfg.base or None)
    if retrieval:
        load_branch(os.path.join(what, "branch.pth"), load_clip_model(os.path.join(what, "clip")))
    print("complete, and the parts fit together" + ": for retrieval; a chat needs llava as well" * retrieval if parts else "whole")


def parts_of(folder):
    """The names in a folder of weights: those that chat.py reads, then what else could be a part; [] where it is itself one."""
    if not os.path.isdir(folder) or is_model(folder):
        return []
    others = [name for name in sorted(set(os.listdir(folder)) - set(ENTRIES))
              if name.endswith((".pt", ".pth", ".bin", ".safetensors")) or is_model(os.path.join(folder, name))]
    return [name for name in ENTRIES if os.path.lexists(os.path.join(folder, name))] + others


def is_model(folder):
    """Whether this is a folder of one model, by the names that Hugging Face and Meta give its files."""
    name = re.compile(r"(config|params)\.json|(consolidated|pytorch_model|model)\b.*\.(pth|bin|safetensors)")
    return os.path.isdir(folder) and any(map(name.fullmatch, os.listdir(folder)))


def usual(words):
    """What `look` says of a part -> the names under which chat.py would read it."""
    kinds = {"CLIP": "clip", "LLaMA": "llava", "a delta": "llava", "branch": "branch.pth", "projector": "mm_projector.bin"}
    return ["chat.bin"] if words.startswith("branch") and "projector" in words else [name for sign, name in kinds.items() if words.startswith(sign)]


def look(path):
    """What a file or folder is, by its content, in words. Raises UserError for what chat.py could not load either."""
    folder = os.path.isdir(path)
    tensors = {} if folder else weightfile.read_file(path)
    if "visual.conv1.weight" in tensors or folder and is_clip(path):
        clip, _ = load_clip(path)
        c = clip.config
        return (f"CLIP, {'a Hugging Face folder' if folder else 'an archive of OpenAI'}, {c.vision_layers} layers of {c.vision_width}, "
                f"patches of {c.patch_size} in {c.image_size} pixels, {numbers(clip.parameters())}")
    words = []
    if folder:
        c, llama, tensors = read_llama(path)
        delta, kind = is_delta(llama), numbers(llama.values())
        del llama   # shards of Meta are joined in memory, and to load them joins them again
        vocabulary = load_tokenizer(path).vocab_size if delta else load_llama(path)[1].vocab_size
        words.append(f"{'a delta to a LLaMA' if delta else 'LLaMA'}, {layout(path)}, {c.layers} layers of {c.width}, "
                     f"{c.vocab_size} words ({vocabulary} in its tokenizer), {kind}")
    if depth := len({name.split("_S_layers.")[1].split(".")[0] for name in tensors if "_S_layers." in name}):
        branch, tuned = read_branch_file(path)
        old = ", by its older name" if any("timesFPN" in name for name in tensors) else ""
        words.append(f"branch {'tuned for chat' if tuned else 'from pretraining'}, {depth} layers, {'' if 'balance1' in branch else 'no '}gates{old}")
    if projector := projector_part(tensors):
        sizes = [" -> ".join(str(n) for n in reversed(t.shape)) for t in projector.values() if t.ndim == 2]
        words.append(f"projector {', '.join(sizes)} ({'linear' if len(sizes) == 1 else 'mlp2x'})")
    if not words:
        of = next((what for sign, what in PIECES.items() if any(name.startswith(sign) for name in tensors)), None)
        raise UserError(f"{path}: a file of {of}; give the folder that it belongs to" if of else f"{path}: no CLIP, LLaMA, branch or projector")
    return ", ".join(words)


PIECES = {"layers.0.attention.": "Meta's LLaMA", "tok_embeddings.": "Meta's LLaMA", "model.layers.": "a Hugging Face LLaMA",
          "model.embed_tokens.": "a Hugging Face LLaMA", "vision_model.": "a Hugging Face CLIP", "text_model.": "a Hugging Face CLIP"}


def is_clip(folder):
    path = os.path.join(folder, "config.json")
    return os.path.exists(path) and weightfile.read_json(path).get("model_type") == "clip"


def layout(folder):
    """How a LLaMA is stored, in words."""
    shards = [name for name in os.listdir(folder) if re.fullmatch(r"consolidated\.\d+\.pth", name)]
    return f"Meta's layout in {len(shards)} shard{'s' * (len(shards) > 1)}" if is_meta(folder) else "a Hugging Face folder"


def numbers(tensors):
    """The kind of number that a model is stored in, in short."""
    return str(next(iter(tensors)).dtype).replace("torch.float", "fp").replace("torch.bfloat", "bf")


def files_of(path):
    """A file, or the files of a folder; nothing that is not a file, such as a pipe."""
    return sorted(filter(os.path.isfile, [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else [path]))


def check_hashes(paths):
    """Prints the sha256 of files, and which released file that is. -> problems, in words."""
    known = [(f"{name}: {file}", f) for name, r in RELEASED.items() for file, f in r.files.items() if f.sha256]
    problems = []
    for path in paths:
        digest, size = sha256(path), size_of(path)
        label = next((label for label, f in known if f.sha256 == digest), None)
        print(f"    {digest}  {shown(os.path.basename(path))}: {label or 'not in the list'}")
        problems += [f"{path}: as long as the released {other}, but with other bytes; get it again"
                     for other, f in known if f.size == size and not label]
    return problems


# ---------------------------------------------------------------------------------------------------- memory
def need(cfg):
    """Prints what chat.py would ask a CPU for, part by part, with the LLaMA as it is and quantised."""
    if cfg.what in RELEASED and cfg.base:
        raise UserError(f"need {cfg.what}: --base is for a folder of weights; for a delta of the list its base is counted in any case")
    if cfg.what in RELEASED and not RELEASED[cfg.what].chat:
        raise UserError(f"{cfg.what}: not a chat; choose {', '.join(name for name, r in RELEASED.items() if r.chat)}, or a folder of weights")
    folder, cpu = cfg.what or cfg.out, torch.device("cpu")
    clip, llama = RELEASED[cfg.what].chat if cfg.what in RELEASED else read_sizes(folder)
    joined = RELEASED[cfg.what].delta if cfg.what in RELEASED else is_joined(os.path.join(folder, "llava"), cfg.base or None)
    columns = {}
    for quantize in ("none", "int8", "int4"):
        dtype, scheme, words = memory.choose("auto", quantize, cpu, llama)
        columns[words] = memory.needs(clip, llama, memory.usual_frames(clip.image_size), dtype, joined, scheme, cpu)
    parts = list(dict.fromkeys(part for column in columns.values() for part in column))
    print(f"{'GB':26}" + "".join(f"{words:>16}" for words in columns))
    for part in parts:
        print(f"{part:26}" + "".join(f"{column.get(part, 0) / 1e9:16.3f}" for column in columns.values()))
    print(f"{'sum':26}" + "".join(f"{sum(column.values()) / 1e9:16.3f}" for column in columns.values()))


STAGES = {"list": list_released, "get": get, "check": check, "need": need}
FLAGS = dict(positional=["stage", "what"])


def main(cfg):
    if cfg.stage not in STAGES:
        raise UserError(f"{cfg.stage}: no such stage; choose one of {', '.join(STAGES)}")
    STAGES[cfg.stage](cfg)


if __name__ == "__main__":
    cli.run(main, Config, **FLAGS)
