"""The released weights: what there is, and fetching it.

    python -m weights list        # bytes, sha256, licence, source, and the memory that a chat's weights take
    python -m weights get clip    # fetches one release to --out; given again, it goes on or finds all there

weights/released.json is the list: OpenAI's CLIP, also as Hugging Face's folder; BT-Adapter's branches and
projector; Video-ChatGPT's projector; LLaVA, LLaVA-1.5 and Vicuna, as whole weights. Those that are only
differences to other weights are not read. Sizes and hashes are the ones that the pages show.

A file gets its name when all of it is there and its hash, where one is known, is right. Until then it is
NAME.part. A broken download goes on where it broke if its hash is known, else it begins anew.
"""
import dataclasses
import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request

import torch
from tqdm import tqdm

from clip import CLIP, CLIPConfig
from llm import LLaMA, LLaMAConfig
from plumbing import cli, quant
from plumbing.cli import UserError, say
from plumbing.weightfile import shown

CHUNK = 1 << 20             # bytes
TRIES, PAUSE = 5, 2.0       # PAUSE: seconds before the second try, twice as many before the third, ...
TIMEOUT = 30                # seconds without a byte, after which a server is given up
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "released.json")) as table:
    RELEASED = json.load(table)


@dataclasses.dataclass
class Config:
    stage: str                       # what to do: list or get
    what: str = ""                   # get: a name from the list
    out: str = "weights/released"    # get: the folder of weights that files go to


# ---------------------------------------------------------------------------------------- what there is
def list_released(cfg):
    """Prints every release with its files."""
    for name, release in RELEASED.items():
        print(f"{name}: {release['what']}")
        for key in ("for", "licence", "page", "note"):
            if key in release:
                print(f"    {key:8} {release[key]}")
        if "chat" in release:
            print(f"    memory   {memory(release['chat'])}, together with CLIP")
        for file, facts in release["files"].items():
            size = f"{facts['size']:,}" if "size" in facts else f"about {facts['about']:,}"
            digest = facts.get("sha256", "unknown")
            print(f"    {file} -> {target(release, file)}  {size} bytes  sha256 {digest}")


def target(release, file):
    """Where a file of a release goes in a folder of weights: under a name, or into a folder."""
    return release["to"] + file if release["to"].endswith("/") else release["to"]


def memory(chat):
    """{"clip": settings, "llama": settings} -> the memory that such a chat's weights take, in words."""
    with torch.device("meta"):
        clip, llama = CLIP(CLIPConfig(**chat["clip"])), LLaMA(LLaMAConfig(**chat["llama"]))
    tower = quant.nbytes(clip.vision_model, None, torch.bfloat16)
    sizes = {scheme: tower + quant.nbytes(llama, scheme, torch.bfloat16) for scheme in (None, "int8", "int4")}
    return ", ".join(f"{size / 1e9:.1f} GB in {scheme or 'bf16'}" for scheme, size in sizes.items())


# ---------------------------------------------------------------------------------------- fetching
def get(cfg):
    """Fetches the files of one release. What is there and right is left alone. Raises UserError."""
    if cfg.what not in RELEASED:
        raise UserError(f"{cfg.what or 'no name'}: no released weights; choose one of {', '.join(RELEASED)}")
    release = RELEASED[cfg.what]
    say(f"{cfg.what}: {release['what']}; licence: {release['licence']}; {release['page']}")
    for file, facts in release["files"].items():
        path = os.path.join(cfg.out, target(release, file))
        if not os.path.lexists(path):
            fetch(release["address"] + urllib.parse.quote(file), path, facts)
            print(path)
        elif problem := wrong(path, facts):
            raise UserError(f"{path}: {problem}; move it away, or choose another --out")
        else:
            say(f"{path}: there already")
    if "note" in release:
        say(f"{cfg.what}: {release['note']}")


def fetch(address, path, facts):
    """One file, whole and right, at `path`. facts: its size and sha256, where known. Raises UserError."""
    part = path + ".part"
    cli.make_folder(os.path.dirname(path) or ".")
    for failures in range(TRIES):
        time.sleep(PAUSE * failures)
        try:
            receive(address, part, facts)
            break
        except Again as e:
            problem = e
            say(f"{os.path.basename(path)}: {e}")
    else:
        raise UserError(f"{address}: {problem}; given up after {TRIES} tries, but the same command goes on")
    if problem := wrong(part, facts):
        os.remove(part)
        raise UserError(f"{part}: {problem}; thrown away, try again")
    os.replace(part, path)


def wrong(path, facts):
    """What a file has that the released one has not, in words; None where nothing is known to be wrong."""
    if not os.path.isfile(path):
        return "not a file"
    size, expected = os.path.getsize(path), facts.get("sha256")
    if facts.get("size", size) != size:
        return f"{size:,} bytes, but the released file has {facts['size']:,}"
    try:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest() if expected else None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}")
    return None if digest == expected else f"its sha256 is {digest}, but that of the release is {expected}"


class Again(Exception):
    """A try failed in a way that another may not."""


class OnlyHTTPS(urllib.request.BaseHandler):
    def unknown_open(self, request):
        raise UserError(f"{shown(request.full_url, 300)}: not https; not followed")


HANDLERS = [   # nothing here opens http:, ftp: or file:, also where a server sends us on to such an address
    urllib.request.HTTPSHandler, urllib.request.ProxyHandler, urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPErrorProcessor, urllib.request.HTTPDefaultErrorHandler, OnlyHTTPS]


def receive(address, part, facts):
    """One try to get what is missing of a part. Raises Again or UserError."""
    start = os.path.getsize(part) if os.path.exists(part) and "sha256" in facts else 0
    with ask(address, start, part) as response:
        if response.status == 416:   # all that the server has is here; its hash will tell
            return
        start = start if response.status == 206 else 0
        size = None if response.length is None else start + response.length
        if size is not None and facts.get("size", size) != size:
            raise UserError(f"{address}: {size:,} bytes, but {facts['size']:,} were released; it has changed")
        folder, done = os.path.dirname(part) or ".", start
        if (size or 0) - start > shutil.disk_usage(folder).free:
            raise UserError(f"{part}: {size - start:,} bytes are to come, for which this disk has no room")
        try:
            bar = tqdm(desc=os.path.basename(part), total=size, initial=start, unit="B", unit_scale=True,
                       leave=False, disable=None)   # None: off in a pipe
            with bar, open(part, "ab" if start else "wb") as f:
                for chunk in chunks(response):
                    f.write(chunk)
                    bar.update(len(chunk))
                    done += len(chunk)
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise UserError(f"{part}: cannot write: {e.strerror}")
        if size is not None and done < size:
            raise Again(f"the server stopped at {done:,} of {size:,} bytes")


def ask(address, start, part):
    """A server's answer, from byte `start` on if it can. Raises Again if a try may help, else UserError."""
    opener = urllib.request.OpenerDirector()
    for handler in HANDLERS:
        opener.add_handler(handler())
    request = urllib.request.Request(address, headers={"User-Agent": "nanoBT", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        return opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        says = f"the server says {e.code} {shown(e.reason)}"
        if e.code == 416:
            return e
        if e.code in (408, 425, 429) or e.code >= 500:
            raise Again(says)
        login = f"; log in with a browser, and put the file at {part.removesuffix('.part')}"
        raise UserError(f"{address}: {says}{login if e.code in (401, 403) else ''}")
    except (OSError, http.client.HTTPException) as e:
        raise Again(f"cannot reach the server ({getattr(e, 'reason', e) or type(e).__name__})")


def chunks(response):
    """What comes, as it comes. Raises Again where nothing comes any more."""
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as e:
            raise Again(f"the connection broke ({e or type(e).__name__})")
        if not chunk:
            return
        yield chunk


STAGES = {"list": list_released, "get": get}
FLAGS = dict(positional=["stage", "what"])


def main(cfg):
    if cfg.stage not in STAGES:
        raise UserError(f"{cfg.stage}: no such stage; choose one of {', '.join(STAGES)}")
    STAGES[cfg.stage](cfg)


if __name__ == "__main__":
    cli.run(main, Config, **FLAGS)
