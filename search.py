"""Find a moment in a folder of your own videos.

    python search.py index FOLDER                                          # window by window -> out/index.safetensors
    python search.py search "a dog jumps over a fence" --sheet hits.png

--weights is a folder with `clip` and `branch.pth`. Results are on stdout, progress on stderr. The same `index` command goes on after an
interruption, and brings the index up to date later: what is known is not encoded again.
"""
import bisect
import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

import data
from model import encode_texts, fingerprint, load_encoder
from plumbing import cli, training, weightfile

NUM_FRAMES, TEXT_LENGTH = 8, 77   # of a window, and tokens of a query


@dataclasses.dataclass
class Config:
    stage: str = ""                  # what to do: index or search
    what: str = ""                   # the folder to index, or the text to search for
    weights: str = "weights/tiny"    # folder with clip and branch.pth
    branch: str = ""                 # another branch file than the one in --weights
    batch_size: int = 16             # windows of a video at a time
    workers: int = 1                 # processes that decode
    device: str = "auto"             # cpu, cuda or auto
    amp: bool = True                 # half precision on a GPU
    index: str = "out/index.safetensors"   # the index
    window: float = 4.0              # seconds of video, about, that one entry of the index stands for
    save_every: float = 60           # seconds between saves of the index
    top: int = 5                     # hits to show
    sheet: str = ""                  # a PNG with a picture of each hit


FLAGS = {"positional": ["stage", "what"]}


# ---------------------------------------------------------------------------------------------------- index your own videos
VIDEOS = tuple(".mp4 .m4v .mov .3gp .mkv .webm .avi .ts .mts .m2ts .mpg .mpeg .vob .flv .gif .ogv .wmv .asf".split())
LONGEST = 100 * 3600   # seconds of a video; a damaged file can claim a century


@dataclasses.dataclass(eq=False)
class Entry:
    """A file in the index. Size, time and digest tell it from others, whatever its name is."""
    size: int                # bytes
    mtime: int               # nanoseconds
    digest: str              # of its first and last bytes
    duration: float = 0.0    # seconds; 0: not known yet
    error: str = ""          # why it cannot be read
    features: list = dataclasses.field(default_factory=list)   # tensors (n, P), normalised: of its windows, as far as they are done

    @property
    def done(self):
        """Windows that are in the index."""
        return sum(map(len, self.features))

    def complete(self, window):
        """Is there nothing left to do?"""
        return bool(self.error) or self.duration > 0 and self.done == len(stretches(self.duration, window))


def stretches(duration, window):
    """-> [(start, end)] in seconds: equal parts of a video, about as long as a window."""
    count = max(1, round(duration / window))
    return [(i * duration / count, (i + 1) * duration / count) for i in range(count)]


def write_index(path, made, files):
    """made: {setting: value}; files: {name: Entry} -> one safetensors file; see read_index."""
    table = [[name, e.size, e.mtime, e.digest, e.duration, e.error, e.done] for name, e in sorted(files.items())]
    features = [f for _, e in sorted(files.items()) for f in e.features] or [torch.empty(0, 1)]
    weightfile.write_safetensors(path, {"features": torch.cat(features)}, {"made": json.dumps(made), "files": json.dumps(table)})


def read_index(path):
    """-> made, files, as write_index took them, and all features (windows, P), in the order of files. Raises UserError."""
    if not os.path.exists(path):
        raise cli.UserError(f"{path}: no such index; `python search.py index FOLDER` makes it")
    tensors, metadata = weightfile.read_file(path), weightfile.read_metadata(path)
    try:
        made, table, features = json.loads(metadata["made"]), json.loads(metadata["files"]), tensors["features"]
        parts = features.split([row[-1] for row in table]) if table else []
        files = {row[0]: Entry(*row[1:6], [part] if len(part) else []) for row, part in zip(table, parts)}
        return {"folder": made["folder"], "weights": made["weights"], "window": float(made["window"])}, files, features
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
        raise cli.UserError(f"{path}: not an index of this program, or damaged ({type(e).__name__}); delete it or choose another --index")


def reason(error, path):
    """What an error says, without the path in front."""
    return error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")


def look(folder, files):
    """A folder now, beside the `files` of its index -> {name: Entry}: known ones as they were, also under another name; new and
    changed ones empty. Raises UserError for a folder that cannot be read: its files would seem to be gone."""
    def refuse(e):
        raise cli.UserError(f"{e.filename}: {e.strerror}")
    now, fresh = {}, {}
    for parent, _, names in os.walk(folder, onerror=refuse):
        for path in (os.path.join(parent, name) for name in names if name.lower().endswith(VIDEOS)):
            name = os.path.relpath(path, folder)
            try:
                status, known = os.stat(path), files.get(name)
                if known and (known.size, known.mtime) == (status.st_size, status.st_mtime_ns):
                    now[name] = known
                    continue
                with data.open_regular(path) as f:
                    ends = f.read(1 << 16)
                    f.seek(max(0, status.st_size - (1 << 16)))
                    ends += f.read(1 << 16)
                fresh[name] = Entry(status.st_size, status.st_mtime_ns, hashlib.sha256(ends).hexdigest()[:16])
            except (OSError, data.VideoError) as e:   # not even bytes: looked at again the next time
                now[name] = Entry(0, 0, "", error=reason(e, path))
    gone = {(e.size, e.mtime, e.digest): e for name, e in files.items() if now.get(name) is not e}
    return now | {name: gone.pop((e.size, e.mtime, e.digest), e) for name, e in fresh.items()}


class Windows(IterableDataset):
    """Yields (name, duration, pixels (B, T, 3, H, W) uint8, ""): groups of at most `group` windows, so that an hour takes no more memory than
    a minute; or (name, 0, None, reason) for a file that cannot be read. todo: [(name, windows that are done)]."""
    def __init__(self, folder, todo, window, group, num_frames, image_size):
        self.folder, self.todo, self.window, self.group, self.num_frames, self.image_size = folder, todo, window, group, num_frames, image_size

    def __iter__(self):
        worker = get_worker_info()
        for name, done in self.todo[worker.id::worker.num_workers] if worker else self.todo:
            path = os.path.join(self.folder, name)
            try:
                duration = data.probe(path).duration
                if duration > LONGEST:
                    raise data.VideoError(path, f"claims to last {duration / 3600:.0f} hours")
                spans = stretches(duration, self.window)
                for k in range(done, len(spans), self.group):
                    group = spans[k:k + self.group]
                    times = [start + (i + 0.5) / self.num_frames * (end - start) for start, end in group for i in range(self.num_frames)]
                    pixels = torch.cat([data.eval_pixels(picture[None], self.image_size) for _, picture in data.frames(path, times)])
                    yield name, duration, pixels.unflatten(0, (len(group), -1)), ""   # (B * T, ...) -> (B, T, 3, H, W)
            except data.VideoError as e:
                yield name, 0.0, None, reason(e, path)


@torch.no_grad()
def make_index(cfg):
    """Brings the index up to date with the folder: encodes what is new or changed, forgets what is gone."""
    cli.at_least(cfg, batch_size=1, workers=0, save_every=0)
    if not cfg.window >= 0.1:
        raise cli.UserError(f"--window {cfg.window}: must be at least 0.1 seconds")
    if not os.path.isdir(cfg.what):
        raise cli.UserError(f"index {cfg.what}: no such folder; give the folder of your videos")
    here, folder = training.start_distributed(cfg.device), os.path.abspath(cfg.what)
    if here.size > 1:
        raise cli.UserError("index runs in one process, without torchrun")
    encoder, _ = load_encoder(cfg.weights, cfg.branch, here.device)
    made, known = {"folder": folder, "weights": fingerprint(encoder), "window": cfg.window}, {}
    if os.path.exists(cfg.index):
        before, known, _ = read_index(cfg.index)
        for key, value in made.items():
            if before[key] != value:
                raise cli.UserError(f"{cfg.index}: was made with the {key} {before[key]}, not {value}; choose another --index")
    files = look(folder, known)
    if not files and not known:
        raise cli.UserError(f"{cfg.what}: no videos in it ({' '.join(VIDEOS)})")
    cli.make_folder(os.path.dirname(os.path.abspath(cfg.index)))
    todo = [(name, e.done) for name, e in sorted(files.items()) if not e.complete(cfg.window)]
    loader = DataLoader(Windows(folder, todo, cfg.window, cfg.batch_size, NUM_FRAMES, encoder.clip.config.image_size),
                        batch_size=None, num_workers=cfg.workers, worker_init_fn=training.leave_signals_to_the_parent)
    saved = time.monotonic()
    try:
        with tqdm(total=len(todo), desc="index", unit=" files", leave=False, file=sys.stderr) as bar:
            for name, duration, pixels, error in loader:
                entry = files[name]
                entry.duration, entry.error = duration, error
                if error:
                    entry.features = []
                else:
                    with torch.autocast(here.device.type, torch.float16, enabled=cfg.amp and here.device.type == "cuda"):
                        feature = encoder.encode_video(pixels.to(here.device)).float().cpu()   # (B, P)
                    entry.features.append(F.normalize(feature, dim=-1))
                bar.set_postfix_str(f"{entry.done} windows of {name}")
                bar.update(entry.complete(cfg.window))
                if time.monotonic() - saved > cfg.save_every:
                    write_index(cfg.index, made, files)
                    saved = time.monotonic()
    finally:   # also after Ctrl-C
        if todo or files != known:
            write_index(cfg.index, made, files)
    broken = {name: e.error for name, e in sorted(files.items()) if e.error}
    for name, error in broken.items():
        print(f"broken: {os.path.join(folder, name)}: {error}", file=sys.stderr)
    print(f"{cfg.index}: {sum(e.done for e in files.values())} windows of {len(files) - len(broken)} videos ({len(todo)} files were to do); "
          f"{len(broken)} broken")


# ---------------------------------------------------------------------------------------------------- search
def printable(path):
    """File names are bytes, and not always text."""
    return path.encode(errors="backslashreplace").decode()


def search(cfg):
    """The windows that are nearest to a text: score, span and file, best first."""
    cli.at_least(cfg, top=1)
    if not cfg.what.strip():
        raise cli.UserError('search: needs a text, as in search "a dog jumps over a fence"')
    if cfg.sheet and not cfg.sheet.lower().endswith(".png"):
        raise cli.UserError(f"--sheet {cfg.sheet}: must end in .png")
    made, files, features = read_index(cfg.index)
    if not len(features):
        raise cli.UserError(f"{cfg.index}: holds no windows yet; run index again")
    if unfinished := sum(not e.complete(made["window"]) for e in files.values()):
        print(f"{cfg.index}: {unfinished} of {len(files)} files are not indexed yet; the same index command goes on", file=sys.stderr)
    device = training.start_distributed(cfg.device).device
    encoder, tokenizer = load_encoder(cfg.weights, cfg.branch, device)
    if fingerprint(encoder) != made["weights"]:
        raise cli.UserError(f"{cfg.index}: was made with other weights than these; give those to --weights, or choose another --index")
    query = encode_texts(encoder, tokenizer, [cfg.what], TEXT_LENGTH, device, cfg.amp)[0]   # (P,)
    scores, order = (features @ query).sort(descending=True, stable=True)
    names, ends, hits = list(files), list(itertools.accumulate(e.done for e in files.values())), []
    for row, points in zip(order[:cfg.top].tolist(), scores.tolist()):
        k = bisect.bisect(ends, row)   # the file whose windows row is among
        entry, path = files[names[k]], os.path.join(made["folder"], names[k])
        start, end = stretches(entry.duration, made["window"])[row - ends[k] + entry.done]
        hits.append((path, (start + end) / 2))
        print(f"{points:.3f}  {start:.1f}-{end:.1f} s  {printable(path)}")
    if cfg.sheet:
        pictures = [data.boxed(picture) for path, middle in hits for _, picture in data.frames(path, [middle])]
        names = [printable(os.path.basename(path)) for path, _ in hits]
        data.contact_sheet(torch.stack(pictures), [middle for _, middle in hits], cfg.sheet, names=names)


STAGES = {"index": make_index, "search": search}


def main(cfg):
    if cfg.stage not in STAGES:
        raise cli.UserError(f"{cfg.stage}: no such stage; choose one of {', '.join(STAGES)}")
    STAGES[cfg.stage](cfg)


if __name__ == "__main__":
    cli.run(main, Config, **FLAGS)
