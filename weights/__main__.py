"""The released weights: what there is, and fetching it.

    python -m weights list        # bytes, sha256, licence, source, and the memory that a chat's weights take
    python -m weights get clip    # fetches one release to --out; given again, it goes on or finds all there

weights/released.json is the list, with sizes and hashes as the pages show them: OpenAI's CLIP, and Hugging
Face's; BT-Adapter's branches and projector; Video-ChatGPT's projector; whole LLaVAs and Vicunas; VTimeLLM.

A file gets its name when all of it is there and its hash, where one is known, is right. Until then it is
NAME.part. A broken download goes on where it broke if its hash is known, else it begins anew.
"""
import dataclasses
from typing import Annotated

from plumbing import cli


@dataclasses.dataclass
class Config:
    stage: Annotated[str, "list", "get"]   # what to do
    what: str = ""                   # get: a name from the list
    out: str = "weights/released"    # get: the folder of weights that files go to


FLAGS = dict(positional=["stage", "what"])
if __name__ == "__main__":
    CONFIG = cli.start(Config, **FLAGS)   # before the slow imports: a typing error shows at once

import gzip
import hashlib
import http.client
import json
import os
import shutil
import tarfile
import time
import urllib.parse
import urllib.request
import zlib

from tqdm import tqdm

from plumbing.cli import UserError, say
from plumbing.weightfile import shown

TRIES, PAUSE = 5, 2.0   # PAUSE: seconds before the second try, twice as many before the third, ...
TIMEOUT = 30            # seconds without a byte, after which a try has failed
FOLLOWED = "https:"     # how an address begins that a server may send us on to
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "released.json")) as table:
    RELEASED = json.load(table)


def list_released(cfg):
    """Prints every release with its files."""
    for name, release in RELEASED.items():
        print(f"{name}: {release['what']}")
        for key in ("for", "licence", "page", "memory", "note"):
            if key in release:
                print(f"    {key:8} {release[key]}")
        for file, facts in release["files"].items():
            about = f"about {facts['about']:,}" if "about" in facts else "unknown"
            size, digest = f"{facts['size']:,}" if "size" in facts else about, facts.get("sha256", "unknown")
            places = ", ".join([facts["to"], *facts.get("holds", {}).values()])
            print(f"    {file} -> {places}  {size} bytes  sha256 {digest}")


def get(cfg):
    """Fetches a release and those that it goes with. What is there and right stays. Raises UserError."""
    if cfg.what not in RELEASED:
        raise UserError(f"{cfg.what or 'no name'}: no released weights; choose one of {', '.join(RELEASED)}")
    release = RELEASED[cfg.what]
    for other in release.get("with", []):
        get(dataclasses.replace(cfg, what=other))
    say(f"{cfg.what}: {release['what']}; licence: {release['licence']}; {release['page']}")
    for file, facts in release["files"].items():
        path = os.path.join(cfg.out, facts["to"])
        if not os.path.lexists(path):
            fetch(release["address"] + urllib.parse.quote(file), path, facts)
            print(path)
        elif problem := wrong(path, facts):
            raise UserError(f"{path}: {problem}; move it away, or choose another --out")
        else:
            say(f"{path}: there already")
        unpack(path, facts.get("holds", {}), cfg.out)
    if "note" in release:
        say(f"{cfg.what}: {release['note']}")


def unpack(archive, holds, out):
    """Takes files {how a name ends: place in `out`} from a tar; what is there stays. Raises UserError."""
    missing = {end: to for end, to in holds.items() if not os.path.lexists(os.path.join(out, to))}
    if not missing:
        return
    try:
        with gzip.open(archive) as content:   # tarfile stops before the checksum, which stands at the end
            while content.read(1 << 20):
                pass
        with tarfile.open(archive) as members:
            for member in members:
                end = next((end for end in missing if member.isfile() and member.name.endswith(end)), None)
                if end:
                    path, content = os.path.join(out, missing.pop(end)), members.extractfile(member)
                    cli.make_folder(os.path.dirname(path))
                    cli.write_atomic(path, lambda f: shutil.copyfileobj(content, f))
                    print(path)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as e:
        raise UserError(f"{archive}: {shown(e)}; move it away, and give the same command again")
    if missing:
        raise UserError(f"{archive}: holds no {', '.join(missing)}")


def fetch(address, path, facts):
    """One file, whole and right, at `path`. facts: size and sha256, where known. Raises UserError."""
    part = path + ".part"
    cli.make_folder(os.path.dirname(path))
    for failures in range(1, TRIES + 1):
        try:
            receive(address, part, facts)
            break
        except (OSError, http.client.HTTPException) as e:   # errors of urllib are OSErrors as well
            code, problem = getattr(e, "code", 0), shown(e, 300)
            if code == 416:   # all that the server has is here; its hash will tell
                break
            if failures == TRIES or 300 <= code < 500 and code != 429:   # 429: too many requests for now
                raise UserError(f"{address}: {problem}; give the same command again to go on, or log in with "
                                f"a browser and put the file at {path}")
            say(f"{part}: {problem}")
            time.sleep(PAUSE * failures)
    if problem := wrong(part, facts):
        os.remove(part)
        raise UserError(f"{part}: {problem}; thrown away, try again")
    os.replace(part, path)


def wrong(path, facts):
    """What a file has that the released one has not, in words; "" where nothing is known to be wrong."""
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    found = {"size": os.path.getsize(path), "sha256": digest}
    return "; ".join(f"its {key} is {found[key]}, but that of the release is {facts[key]}"
                     for key in found.keys() & facts.keys() if facts[key] != found[key])


class Redirects(urllib.request.HTTPRedirectHandler):
    """A server may send us on, but only to an address that is as safe as those of the list."""
    def redirect_request(self, request, response, code, message, headers, newurl):
        if not newurl.startswith(FOLLOWED):
            raise UserError(f"{shown(newurl, 300)}: not https; not followed")
        return super().redirect_request(request, response, code, message, headers, newurl)


def receive(address, part, facts):
    """One try to get what is missing of a part. Raises OSError or HTTPException where another may help."""
    start = os.path.getsize(part) if os.path.exists(part) and "sha256" in facts else 0
    request = urllib.request.Request(address, headers={
        "User-Agent": "nanoBT", "Accept-Encoding": "identity", "Range": f"bytes={start}-"})
    with urllib.request.build_opener(Redirects).open(request, timeout=TIMEOUT) as response:
        start = start if response.status == 206 else 0   # 200: from the beginning, whatever was asked for
        size = None if response.length is None else start + response.length   # None: it comes in chunks
        if (response.length or 0) > shutil.disk_usage(os.path.dirname(part)).free:
            raise UserError(f"{part}: {response.length:,} bytes are to come, for which this disk has no room")
        bar = tqdm(desc=os.path.basename(part), total=size, initial=start, unit="B", unit_scale=True,
                   leave=False, disable=None)   # None: off in a pipe
        with bar, open(part, "ab" if start else "wb") as f:
            while chunk := response.read1(1 << 20):
                f.write(chunk)
                bar.update(len(chunk))
            f.flush()
            os.fsync(f.fileno())
            if size is not None and f.tell() < size:
                raise ConnectionError(f"the server stopped at {f.tell():,} of {size:,} bytes")


STAGES = {"list": list_released, "get": get}


def main(cfg):
    STAGES[cfg.stage](cfg)


if __name__ == "__main__":
    cli.run(main, CONFIG)
