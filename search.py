"""Find a moment in a folder of your own videos.

    python search.py index FOLDER                                   # window by window -> out/index
    python search.py "a dog jumps over a fence" --sheet hits.png    # the nearest windows, and their pictures

--weights is a folder with `clip` and `branch.pth`. Results are on stdout, all else on stderr. Your files are
only read. Give `index` again after an interruption, or later: it encodes what is new or changed.
"""
import dataclasses
from typing import Annotated

from plumbing import cli


@dataclasses.dataclass
class Config:
    what: str                        # the text to search for; or the word index
    folder: str = ""                 # after index: where your videos are
    weights: str = cli.shipped("weights/tiny")   # folder with clip and branch.pth
    branch: str = ""                 # another branch file than the one in --weights
    index: str = "out/index"         # folder of the index; it lists the videos of one FOLDER, the last
    window: Annotated[float, 0.1, 1e9] = 4.0   # seconds of video, about, that one row of the index stands for
    batch_size: cli.Count = 16       # windows of a video at a time
    workers: cli.Whole = 1           # processes that decode
    device: cli.Device = "auto"      # where to compute
    amp: bool = True                 # half precision on a GPU
    top: cli.Count = 5               # hits to show
    sheet: str = ""                  # a PNG with a picture of each hit


FLAGS = {"positional": ["what", "folder"], "hint": "; quotes go around a text"}
if __name__ == "__main__":
    CONFIG = cli.start(Config, **FLAGS)   # before the slow imports: a typing error shows at once

import functools
import hashlib
import json
import os
import sys

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from model import encode_texts, load_encoder, require
from plumbing import memory, training
from plumbing.cli import UserError
from plumbing.pictures import boxed, contact_sheet
from plumbing.store import Store, state_of
from plumbing.video import EXTENSIONS

VERSION = 1   # of the rows that `index` makes: whoever changes how, counts up
NUM_FRAMES, TEXT_LENGTH = 8, 77   # of a window; tokens of a query


def main(cfg):
    if not cfg.what.strip() or (cfg.what == "index") != bool(cfg.folder):
        raise UserError('give `index FOLDER`, or one text in quotes, as "a dog jumps over a fence"')
    device, store = training.pick_device(cfg.device), Store(cfg.index)
    clip, branch = os.path.join(cfg.weights, "clip"), cfg.branch or os.path.join(cfg.weights, "branch.pth")
    require(cfg.weights, {"clip": clip} if cfg.branch else {"clip": clip, "branch": branch})
    weights = [VERSION, state_of(clip), state_of(branch)]   # before they are read
    encoder, tokenizer = load_encoder(cfg.weights, cfg.branch, device)
    memory.choose_threads(encoder)
    if cfg.what == "index":
        return index(cfg, store, weights, encoder, device)
    search(cfg, store, weights, encode_texts(encoder, tokenizer, [cfg.what], TEXT_LENGTH, device, cfg.amp)[0])


# ------------------------------------------------------------------------------------------------------ index
@dataclasses.dataclass
class Video:
    """What the index knows of a file. One that cannot be read has an error and no windows."""
    path: str
    rows: torch.Tensor       # (windows that are done, P), normalised
    key: list = None         # of its entry in the store
    duration: float = 0.0    # seconds
    windows: int = 0         # equal parts of about --window seconds
    error: str = ""

    def save(self, store):
        about = json.dumps([self.duration, self.windows, self.error])
        store.put(self.key, {"rows": self.rows}, {"about": about})

    def fail(self, reason):
        self.error, self.windows, self.rows = str(reason).removeprefix(f"{self.path}: "), 0, self.rows[:0]


def content_of(path):
    """Size, time of change, digest of the first bytes: what a rename leaves. Raises VideoError."""
    with data.open_regular(path) as f:
        status = os.fstat(f.fileno())
        return [status.st_size, status.st_mtime_ns, hashlib.sha256(f.read(1 << 16)).hexdigest()]


def look(path, store, weights, seconds, nothing):
    """-> Video, as the store has it; or a new one, of which nothing is encoded."""
    video = Video(path, nothing)
    try:
        video.key = [content_of(path), weights, seconds]
        if entry := store.get(video.key):
            video.rows = entry[0]["rows"].clone()   # thousands of mapped files would be too many
            video.duration, video.windows, video.error = json.loads(entry[1]["about"])
        else:
            video.duration = data.probe(path).duration
            if video.duration > 100 * 3600:   # a damaged file can claim a century
                raise data.VideoError(path, f"claims to last {video.duration / 3600:.0f} hours")
            video.windows = max(1, round(video.duration / seconds))
    except data.VideoError as e:
        video.fail(e)
        if video.key:   # else not even its bytes can be read: tried again the next time
            video.save(store)
    return video


def pixels_of(group, image_size):
    """(Video, first window, end) -> (n, T, 3, H, W) uint8, or why there are none."""
    video, first, end = group
    if video.error:   # found in an earlier group
        return video.error
    span = first * video.duration / video.windows, end * video.duration / video.windows
    try:
        frames = data.sample_frames(video.path, (end - first) * NUM_FRAMES, "uniform", window=span)
        pixels = torch.cat([data.eval_pixels(picture[None], image_size) for _, picture in frames])
    except UserError as e:   # VideoError; or a video of no length
        return str(e)
    return pixels.unflatten(0, (-1, NUM_FRAMES))   # (n * T, ...) -> (n, T, ...)


@torch.no_grad()
def index(cfg, store, weights, encoder, device):
    """Encodes what is new or changed in a folder and those below it, and lists what is there."""
    config = encoder.clip.config
    nothing = torch.empty(0, config.projection_dim)
    root = os.path.abspath(cfg.folder)
    found = os.walk(root, onerror=cli.say)
    paths = sorted(os.path.join(parent, name) for parent, _, names in found
                   for name in names if name.lower().endswith(EXTENSIONS))
    if not paths:
        raise UserError(f"{cfg.folder}: no videos in it ({' '.join(EXTENSIONS)})")
    listed = json.loads(before[1]["table"]) if (before := store.get(["all", weights])) else []
    if gone := [path for path, *_ in listed if os.path.commonpath([path, root]) != root]:
        cli.say(f"{cfg.index}: no longer lists {len(gone)} videos outside {cfg.folder}, as {gone[0]}; "
                "another --index would keep both")
    videos = [look(path, store, weights, cfg.window, nothing) for path in paths]
    groups = [(video, first, min(first + cfg.batch_size, video.windows))   # an hour needs no more memory
              for video in videos for first in range(len(video.rows), video.windows, cfg.batch_size)]
    todo = len({video.path for video, *_ in groups})
    load = functools.partial(pixels_of, image_size=config.image_size)
    loader = DataLoader(groups, batch_size=None, collate_fn=load, num_workers=cfg.workers,
                        worker_init_fn=training.leave_signals_to_the_parent)
    try:
        for (video, *_), pixels in tqdm(zip(groups, loader), "index", len(groups), leave=False):
            if isinstance(pixels, str):
                video.fail(pixels)
            elif not video.error:   # of an earlier group
                with torch.autocast(device.type, torch.float16, enabled=cfg.amp and device.type == "cuda"):
                    rows = F.normalize(encoder.encode_video(pixels.to(device)).float(), dim=-1)   # (n, P)
                video.rows = torch.cat([video.rows, rows.cpu()])
            video.save(store)   # as far as it is done
    finally:   # also after Ctrl-C. One file for search: to open ten thousand takes seconds
        table = [[video.path, video.duration, video.windows, len(video.rows)] for video in videos]
        rows = torch.cat([video.rows for video in videos])
        store.put(["all", weights], {"rows": rows}, {"table": json.dumps(table)})
    broken = [video for video in videos if video.error]
    for video in broken:
        print(f"broken: {video.path}: {video.error}", file=sys.stderr)
    print(f"{cfg.index}: {len(rows)} windows of {len(videos) - len(broken)} videos ({todo} files to do); "
          f"{len(broken)} broken")


# ----------------------------------------------------------------------------------------------------- search
def search(cfg, store, weights, query):
    """Prints score, span and file of the windows that are nearest to a text's feature (P,), best first."""
    entry = store.get(["all", weights])
    if not entry:
        raise UserError(f"{cfg.index}: no index of these weights; `python search.py index FOLDER` makes it")
    table = json.loads(entry[1]["table"])
    if unfinished := sum(done < windows for *_, windows, done in table):
        print(f"{cfg.index}: {unfinished} of {len(table)} files are to do; index goes on", file=sys.stderr)
    moments = [(path, i * duration / windows, (i + 1) * duration / windows)   # a row each
               for path, duration, windows, done in table for i in range(done)]
    scores, order = (entry[0]["rows"] @ query).sort(descending=True, stable=True)
    hits = [moments[row] for row in order[:cfg.top].tolist()]
    for score, (path, start, end) in zip(scores.tolist(), hits):
        print(f"{score:.3f}  {start:.1f}-{end:.1f} s  {path}")
    if cfg.sheet and hits:
        middles = [(start + end) / 2 for _, start, end in hits]
        frames = [boxed(picture) for (path, *_), middle in zip(hits, middles)
                  for _, picture in data.frames(path, [middle])]
        names = [f"{score:.3f} {os.path.basename(path)}" for score, (path, *_) in zip(scores.tolist(), hits)]
        contact_sheet(torch.stack(frames), middles, cfg.sheet, names=names)
        cli.say(f"wrote {cfg.sheet}")


if __name__ == "__main__":
    cli.run(main, CONFIG)
