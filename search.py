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

import collections
import hashlib
import itertools
import json
import os

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

import data
from model import encode_texts, load_encoder, require
from plumbing import memory, training
from plumbing.cli import UserError
from plumbing.pictures import boxed, contact_sheet
from plumbing.store import Store, state_of
from plumbing.video import EXTENSIONS

VERSION = 2   # of the rows that `index` makes: whoever changes how, counts up
NUM_FRAMES, TEXT_LENGTH = 8, 77   # of a window; tokens of a query


def main(cfg):
    if not cfg.what.strip() or (cfg.what == "index") != bool(cfg.folder):
        raise UserError('give `index FOLDER`, or one text in quotes, as "a dog jumps over a fence"')
    device, store = training.pick_device(cfg.device), Store(cfg.index)
    clip, branch = os.path.join(cfg.weights, "clip"), cfg.branch or os.path.join(cfg.weights, "branch.pth")
    require(cfg.weights, {"clip": clip} if cfg.branch else {"clip": clip, "branch": branch})
    weights = [VERSION, state_of(clip), state_of(branch)]   # before they are read
    encoder, tokenizer = load_encoder(cfg.weights, cfg.branch, device)
    memory.prepare_cpu(encoder)
    if cfg.what == "index":
        return index(cfg, store, weights, encoder, device)
    search(cfg, store, weights, encode_texts(encoder, tokenizer, [cfg.what], TEXT_LENGTH, device, cfg.amp)[0])


# ------------------------------------------------------------------------------------------------------ index
def content_of(path):
    """Size, time of change, digest of the first bytes: what a rename leaves. Raises VideoError."""
    with data.open_regular(path) as f:
        return [*state_of(path)[1:], hashlib.sha256(f.read(1 << 16)).hexdigest()]


@dataclasses.dataclass
class Windows(IterableDataset):
    """Videos, each cut into equal parts of about so many seconds. Yields (path, its duration, pixels
    (n, T, 3, H, W) uint8 of at most `count` windows, whether they are its last); of a video that cannot be
    read, the VideoError in the place of pixels."""
    paths: list
    seconds: float
    count: int
    image_size: int

    def __iter__(self):
        worker = get_worker_info()
        for path in self.paths[worker.id::worker.num_workers] if worker else self.paths:
            try:
                for found in self.windows(path, data.probe(path).duration):
                    yield path, *found
            except data.VideoError as e:
                yield path, 0, e, True

    def windows(self, path, duration):
        if duration > 100 * 3600:   # a damaged file can claim a century
            raise data.VideoError(path, f"claims to last {duration / 3600:.0f} hours")
        windows = max(1, round(duration / self.seconds))
        frames = data.sample_frames(path, windows * NUM_FRAMES, "uniform")
        pixels = (data.eval_pixels(picture[None], self.image_size) for _, picture in frames)
        for first in range(0, windows, self.count):   # an hour needs no more memory than a minute
            n = min(self.count, windows - first)
            group = torch.cat(list(itertools.islice(pixels, n * NUM_FRAMES)))   # (n * T, 3, H, W)
            yield duration, group.unflatten(0, (n, NUM_FRAMES)), first + n == windows


@torch.no_grad()
def index(cfg, store, weights, encoder, device):
    """Encodes what is new or changed in a folder and those below it, and lists what is there."""
    root = os.path.abspath(cfg.folder)
    if not os.path.isdir(root):
        raise UserError(f"{cfg.folder}: no such folder")
    found = os.walk(root, onerror=lambda e: cli.say(f"{e.filename}: {e.strerror}"))
    paths = sorted(os.path.join(parent, name) for parent, _, names in found
                   for name in names if name.lower().endswith(EXTENSIONS))
    if not paths:
        raise UserError(f"{cfg.folder}: no folder with videos in it ({' '.join(EXTENSIONS)})")
    listed = json.loads(before[1]["table"]) if (before := store.get(["all", weights])) else []
    if gone := [path for path, *_ in listed if os.path.commonpath([path, root]) != root]:
        cli.say(f"{cfg.index}: no longer lists {len(gone)} videos outside {cfg.folder}, as {gone[0]}; "
                "another --index would keep both")
    keys, broken, rows, table = {}, [], [], []
    for path in paths:
        try:
            keys[path] = [content_of(path), weights, cfg.window]
        except data.VideoError as e:
            broken.append(e)
    todo = [path for path, key in keys.items() if not os.path.exists(store.path(key))]
    windows = Windows(todo, cfg.window, cfg.batch_size, encoder.clip.config.image_size)
    parts = collections.defaultdict(list)   # of each video, what is encoded: its rows (n, P), normalised
    loader = DataLoader(windows, batch_size=None, num_workers=cfg.workers,
                        worker_init_fn=training.leave_signals_to_the_parent)
    bar = tqdm(desc="index", total=len(todo), unit=" videos", leave=False)
    for path, duration, pixels, last in loader:
        bar.update(last)
        if isinstance(pixels, data.VideoError):
            broken.append(pixels)
            del keys[path]
            continue
        with torch.autocast(device.type, torch.float16, enabled=cfg.amp and device.type == "cuda"):
            parts[path].append(F.normalize(encoder.encode_video(pixels.to(device)).float(), dim=-1).cpu())
        if last:
            store.put(keys[path], {"rows": torch.cat(parts.pop(path))}, {"duration": json.dumps(duration)})
    bar.close()
    for path, key in keys.items():   # one file for search: to open ten thousand takes seconds
        tensors, about = store.get(key)
        rows.append(tensors["rows"].clone())   # thousands of mapped files would be too many
        table.append([path, json.loads(about["duration"]), len(rows[-1])])
    rows = torch.cat([torch.empty(0, encoder.clip.config.projection_dim), *rows])
    store.put(["all", weights], {"rows": rows}, {"table": json.dumps(table)})
    for error in broken:
        cli.say(f"broken: {error}")
    print(f"{cfg.index}: {len(rows)} windows of {len(table)} videos; {len(broken)} broken")


# ----------------------------------------------------------------------------------------------------- search
def search(cfg, store, weights, query):
    """Prints score, span and file of the windows that are nearest to a text's feature (P,), best first."""
    entry = store.get(["all", weights])
    if not entry:
        raise UserError(f"{cfg.index}: no index of these weights; `python search.py index FOLDER` makes it")
    moments = [(path, i * duration / windows, (i + 1) * duration / windows)   # a row each
               for path, duration, windows in json.loads(entry[1]["table"]) for i in range(windows)]
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
