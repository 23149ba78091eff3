"""Tensors that are computed once and kept: what a chat saw of a video, quantised weights, rows of a search.

An entry is one safetensors file. Its name is a hash of its key, and the key is all that the tensors follow
from. Nothing is ever invalidated: when a file, a flag or the code changes, the old entry is not found again.
"""
import ast
import contextlib
import hashlib
import inspect
import json
import os
import re

from plumbing.cli import UserError, make_folder
from plumbing.weightfile import read_file, read_metadata, write_safetensors

ANEW = "delete it, and it will be made anew"


class Store:
    """A folder of entries. prefix: how their file names begin. max_bytes: beyond it the entries that were
    used longest ago make room; None: all stay."""
    def __init__(self, folder, max_bytes=None, prefix=""):
        self.folder, self.max_bytes, self.prefix = folder, max_bytes, prefix

    def path(self, key):
        """key: whatever JSON can hold -> the file of its entry, which need not exist."""
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        return os.path.join(self.folder, f"{self.prefix}{digest}.safetensors")

    def get(self, key):
        """-> ({name: mapped tensor}, {name: text}), or None. Raises UserError for a damaged entry."""
        path = self.path(key)
        try:
            entry = read_file(path, ANEW), read_metadata(path)
        except UserError:
            if os.path.exists(path):   # else there is none, or another process has just made room
                raise
            return None
        with contextlib.suppress(OSError):   # a read-only folder
            os.utime(path)                   # used now: the others are older, and go first
        return entry

    def put(self, key, tensors, metadata={}, values=None):
        """Writes an entry, atomically; see write_safetensors. Raises UserError if it cannot be written."""
        make_folder(self.folder, 0o700)   # videos are nobody else's business
        write_safetensors(self.path(key), tensors, metadata, values)
        if self.max_bytes is not None:
            self.tidy()

    def tidy(self):
        """Removes the files used longest ago beyond max_bytes, never the newest; halves of entries, too, but
        for those that a living process writes."""
        ours = re.compile(rf"{re.escape(self.prefix)}[0-9a-f]{{32}}\.safetensors(\.(\d+)\.tmp)?")
        entries, total = [], 0
        for file in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):   # here and below: another process tidies, too
                if (name := ours.fullmatch(file.name)) and not (name[2] and alive(int(name[2]))):
                    entries.append((file.stat().st_mtime_ns, file.stat().st_size, file.path))
        for i, (_, size, path) in enumerate(sorted(entries, reverse=True)):
            total += size
            if i and total > self.max_bytes:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)


def alive(pid):
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)   # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:   # another user's
        pass
    return True


def state_of(path):
    """A file -> its real path, size, time of change; a folder -> those of its files but quantised copies.

    This is what "the same file as before" means everywhere. Take it before you read. Raises UserError."""
    try:
        real = os.path.realpath(path)
        if os.path.isdir(real):
            inside = [os.path.join(real, name) for name in sorted(os.listdir(real))
                      if not name.startswith(("quantised_", "."))]
            return [state_of(file) for file in inside if os.path.exists(file)]   # a link may lead nowhere
        status = os.stat(real)
    except (OSError, ValueError, RecursionError) as e:   # a NUL in the name; links in a circle
        raise UserError(f"{path}: {getattr(e, 'strerror', e)}")
    return [real, status.st_size, status.st_mtime_ns]


def code_of(*modules):
    """A digest of the code of modules: it changes with them, but not with comments and line breaks."""
    trees = [ast.dump(ast.parse(inspect.getsource(module))) for module in modules]
    return hashlib.sha256("".join(trees).encode()).hexdigest()
