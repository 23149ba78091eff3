"""What the model saw of a video, kept on disk: a second chat about it neither decodes the video nor runs CLIP.

An entry is one safetensors file: the video tokens, the times of the frames, small pictures of them. Its name is a hash of all
that the tokens follow from: which file (path, size, time of change), how it was looked at, and by which weights. So nothing has
to be thrown away when something changes; it is just not found again, and the oldest entries make room for new ones.
"""
import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import re
import time
import zlib

import torch

from plumbing.cli import UserError
from plumbing.weightfile import read_file, read_metadata, write_safetensors

FORMAT = 2                                                      # of an entry; another one is another name
MAX_ENTRIES, MAX_BYTES = 256, 1 << 30                           # 100 frames with the tokens of a 7B take about 12 MB
ENTRY = re.compile(r"[0-9a-f]{32}\.safetensors")
LEFTOVER = re.compile(ENTRY.pattern + r"\.\d+\.tmp")            # what write_atomic leaves where it is killed, or is just writing
HOUR = 3600                                                     # seconds; nobody writes an entry for longer


@dataclasses.dataclass
class Seen:
    """What the model saw of a video, and what it will remember of it."""
    duration: float              # seconds
    damage: str                  # what data.probe said of it
    times: list                  # T floats: seconds at which the frames appear
    frames: torch.Tensor         # (T, 3, h, w) uint8, at most pictures.THUMBNAIL wide
    video_tokens: torch.Tensor   # (K, D_llm)


def default_folder():
    """$XDG_CACHE_HOME/nanobt, or ~/.cache/nanobt where that is not set to an absolute path, as its specification says."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "nanobt")


def state_of(weights):
    """Name, size and time of change of every file in a folder of weights and in its folders: two levels are all there is.

    But for quantised copies, which appear later and follow from the others. To be taken before the weights are read: whoever
    replaces them later must not have the tokens of the old ones filed under the new."""
    names = [name for pattern in ("*", "*/*") for name in glob.glob(pattern, root_dir=weights)
             if os.path.isfile(os.path.join(weights, name)) and not os.path.basename(name).startswith("quantised_")]
    try:
        return [os.path.realpath(weights), *((name, status.st_size, status.st_mtime_ns) for name in sorted(names)
                                             for status in [os.stat(os.path.join(weights, name))])]
    except OSError as e:   # gone since
        raise UserError(f"{e.filename}: {e.strerror}")


def entry(folder, video, how, weights):
    """-> the path of the entry for a video that is looked at in some way (`how`) by weights (what state_of said); JSON can hold both.

    None where there is no such video: whoever opens it says what is wrong."""
    try:
        status = os.stat(video)
    except (OSError, ValueError):
        return None
    key = json.dumps([FORMAT, os.path.realpath(video), status.st_size, status.st_mtime_ns, how, weights])
    return os.path.join(folder, hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32] + ".safetensors")


def checksum(tensors):
    """CRC-32 of the numbers: a file can be damaged without being cut."""
    crc = 0
    for t in tensors:
        crc = zlib.crc32(t.contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return str(crc)


def recall(path):
    """-> Seen, mapped from an entry; None where there is none. Raises UserError for one that is damaged."""
    if not os.path.exists(path):
        return None
    tensors, metadata = read_file(path), read_metadata(path)
    try:
        seen = Seen(float(metadata["duration"]), metadata["damage"], tensors["times"].tolist(), tensors["frames"], tensors["video_tokens"])
        if metadata["crc32"] != checksum(tensors.values()) or len(seen.times) != len(seen.frames):
            raise ValueError
    except (KeyError, ValueError, TypeError) as e:
        raise UserError(f"{path}: this entry of the cache is damaged") from e
    with contextlib.suppress(OSError):   # a folder that is read-only, or another process that has just removed it
        os.utime(path)                   # used now: others are older
    return seen


def keep(path, seen):
    """Seen -> an entry, atomically; the oldest go where there are too many. Raises UserError where the folder cannot be written."""
    folder = os.path.dirname(path)
    tensors = {"times": torch.tensor(seen.times, dtype=torch.float64), "frames": seen.frames, "video_tokens": seen.video_tokens.cpu()}
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)   # pictures of videos are nobody else's business
        write_safetensors(path, tensors, {"duration": repr(seen.duration), "damage": seen.damage, "crc32": checksum(tensors.values())})
        prune(folder)
    except OSError as e:
        raise UserError(f"{e.filename or folder}: {e.strerror}")


def prune(folder):
    """Removes the oldest entries beyond MAX_ENTRIES or MAX_BYTES, but never the newest, and what a killed process left half written.
    Other files are left alone."""
    entries, gone, total = [], [], 0
    for file in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):   # here and below: another process does the same
            if ENTRY.fullmatch(file.name):
                entries.append((file.stat().st_mtime_ns, file.stat().st_size, file.path))
            elif LEFTOVER.fullmatch(file.name) and time.time() - file.stat().st_mtime > HOUR:
                gone.append(file.path)
    for i, (_, size, path) in enumerate(sorted(entries, reverse=True)):
        total += size
        if i and (i >= MAX_ENTRIES or total > MAX_BYTES):
            gone.append(path)
    for path in gone:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
