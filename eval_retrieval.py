"""Does a text find its video? Zero-shot retrieval and recognition, the branch beside mean-pooled CLIP, always; and search in your own.

    python eval_retrieval.py --annotations out/shapes/test_captions.jsonl --root out/shapes    # toy world, 1 minute
    python eval_retrieval.py --weights weights/released --dataset msrvtt --annotations test_JSFUSION.json --root MSRVTT/videos
    python eval_retrieval.py --weights weights/released --dataset hmdb51 --annotations test.txt --classes classes.txt --root HMDB51
    python eval_retrieval.py index FOLDER                                  # your videos, window by window -> out/index.safetensors
    python eval_retrieval.py search "a dog jumps over a fence" --sheet hits.png

--weights is a folder with `clip` (a Hugging Face folder, or OpenAI's ViT-L-14.pt) and `branch.pth`. Results are on stdout,
progress on stderr. Scoring runs under torchrun too. The same `index` command goes on after an interruption, and brings the index up
to date later: what is known is not encoded again.
"""
import bisect
import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

import common
import data
import weightfile
from clip import load_clip
from model import VideoEncoder, load_branch


@dataclasses.dataclass
class Config:
    stage: str = "score"             # what to do: score, index or search
    what: str = ""                   # the folder to index, or the text to search for
    weights: str = "weights/tiny"    # folder with clip and branch.pth
    branch: str = ""                 # another branch file than the one in --weights
    batch_size: int = 16             # videos, or windows of one, at a time
    workers: int = 1                 # processes that decode
    device: str = "auto"             # cpu, cuda or auto
    amp: bool = True                 # half precision on a GPU
    # score
    annotations: str = ""            # captions of videos: a JSONL {"video", "caption"}, or the data set's own file; lines "path label"
    root: str = ""                   # folder that the names in it are relative to
    dataset: str = "own"             # whose settings: own, msrvtt, didemo, lsmdc, activitynet; to recognise: k400, hmdb51, ucf101
    classes: str = ""                # to recognise actions: the names of the classes, one a line
    num_file: str = ""               # activitynet, kept as folders of JPEG frames: a JSON {name: number of frames}
    skip_broken: bool = False        # leave out videos that cannot be read, and say how many; else the first one is an error
    save: str = ""                   # write features and similarities there (safetensors)
    from_: str = ""                  # score what --save wrote, without model and videos
    # index and search
    index: str = "out/index.safetensors"   # the index
    window: float = 4.0              # seconds of video, about, that one entry of the index stands for
    save_every: float = 60           # seconds between saves of the index
    top: int = 5                     # hits to show
    sheet: str = ""                  # a PNG with a picture of each hit


FLAGS = {"positional": ["stage", "what"]}


@dataclasses.dataclass
class Setting:
    """How a data set is read in the released evaluation, and what the paper found on it."""
    num_frames: int
    text_length: int          # tokens of a text that are read
    short: int                # short side before the centre crop, for 224-pixel models
    mode: str                 # which frames: "uniform" or a key of data.INDEX_RULES
    joined: bool = False      # a video's captions are one text
    size: tuple = ()          # pairs, or videos to recognise; several numbers where several lists are in use, none where links die
    classes: int = 0          # to recognise
    offset: int = 0           # what to add to a label to count from 0
    clip: tuple = ()          # the paper's mean-pooled CLIP ViT-L/14: R@1, R@5, R@10 from text to video, or top-1, top-5
    adapter: tuple = ()       # the paper's BT-Adapter


SETTINGS = {
    "own": Setting(8, 77, 224, "uniform"),
    "msrvtt": Setting(12, 32, 224, "test", size=(1000,), clip=(35.4, 58.8, 68.1), adapter=(40.9, 64.7, 73.5)),   # 1k-A
    "didemo": Setting(64, 77, 256, "test", joined=True, size=(1003, 1004), clip=(30.3, 54.9, 65.4), adapter=(35.6, 61.9, 72.6)),
    "lsmdc": Setting(64, 77, 256, "test", size=(1000,), clip=(17.0, 31.8, 40.3), adapter=(19.5, 35.9, 45.0)),
    "activitynet": Setting(64, 77, 256, "test", joined=True, size=(4917,), clip=(28.8, 57.6, 71.8), adapter=(37.0, 66.7, 78.9)),
    "k400": Setting(16, 32, 224, "test", classes=400, clip=(59.1, 82.8), adapter=(64.3, 86.7)),
    "hmdb51": Setting(16, 32, 224, "test", size=(1530,), classes=51, offset=-1, clip=(45.0, 74.4), adapter=(54.6, 79.7)),
    "ucf101": Setting(16, 32, 224, "test", size=(3783, 3734, 3696), classes=101, offset=-1, clip=(73.5, 92.7), adapter=(79.1, 96.2))}


# ---------------------------------------------------------------------------------------------------- metrics
def ranks(similarity, right=None):
    """similarity (Q, G), right (Q, G) bool: the right answers to a query, at least one (default: column i for query i)
    -> (better (Q,), tied (Q,)) float: how many wrong ones score higher than the best right one, and how many things score
    exactly as high: that one, and wrong ones."""
    if not similarity.isfinite().all():
        raise common.UserError("similarities that are not numbers; are the weights damaged, or is half precision too coarse (--no-amp)?")
    right = torch.eye(len(similarity), dtype=torch.bool) if right is None else right
    best = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)   # (Q, 1)
    better, tied = ((similarity > best) & ~right).sum(1), ((similarity == best) & ~right).sum(1)
    return better.double(), tied.double() + 1


def recall_at_k(similarity, k, right=None):
    """Share of queries with a right answer among the first k, in percent. Ties are broken by a fair coin, in expectation."""
    better, tied = ranks(similarity, right)
    return 100 * ((k - better) / tied).clamp(0, 1).mean().item()


def retrieval_metrics(similarity, right=None):
    """similarity (Q, G) -> {"R@1", "R@5", "R@10" in percent, "MdR", "MnR": median and mean rank, from 1; ties count half}."""
    better, tied = ranks(similarity, right)
    rank = better + (tied - 1) / 2 + 1
    return {**{f"R@{k}": recall_at_k(similarity, k, right) for k in (1, 5, 10)}, "MdR": rank.quantile(0.5).item(), "MnR": rank.mean().item()}


# ---------------------------------------------------------------------------------------------------- encode
@torch.no_grad()
def encode_videos(encoder, dataset, device, batch_size=16, workers=0, amp=False):
    """Each video of a data set once -> names, in its order; normalised features, on the CPU in fp32, of the branch (V, P) and of
    mean-pooled CLIP (V, P); what went wrong with the videos that the data set skips. Under torchrun every process takes its
    share, and all have the whole result. Raises UserError if no video can be read."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first = {}   # name: the first item with that video
    for i, video in enumerate(dataset.videos):
        first.setdefault(video, i)
    loader = DataLoader(dataset, batch_size, sampler=list(first.values())[rank::size], num_workers=workers, collate_fn=data.collate_skip,
                        worker_init_fn=common.leave_signals_to_the_parent)
    rows, broken, was_training = [], [], encoder.training
    encoder.eval()
    with torch.autocast(device.type, torch.float16, enabled=amp and device.type == "cuda"):
        for batch in tqdm(loader, desc="encode", leave=False, file=sys.stderr, disable=rank > 0):
            broken += batch["skipped"]
            if len(batch["index"]):
                feature, state = encoder(data.normalise(batch["pixels"].to(device)))   # (B, P), (B, T, 1+N, D): one walk through CLIP serves both
                rows.append((batch["index"], feature.float().cpu(), encoder.mean_feature(state).float().cpu()))
    encoder.train(was_training)
    if size > 1:
        shares = [None] * size
        try:
            dist.all_gather_object(shares, (rows, broken))
        except RuntimeError as e:   # most likely a video that stopped one of the others
            raise common.UserError(f"a process has stopped and says why, or cannot be reached ({str(e).splitlines()[0]})") from e
        rows, broken = ([item for share in shares for item in share[k]] for k in (0, 1))
    if not rows:
        raise common.UserError(f"none of {len(first)} videos can be read; the first: {broken[0]}")
    index, branch, mean = (torch.cat(column) for column in zip(*rows))
    index, order = index.sort()
    return [dataset.videos[i] for i in index], F.normalize(branch[order], dim=-1), F.normalize(mean[order], dim=-1), broken


@torch.no_grad()
def encode_texts(encoder, tokenizer, texts, length, device, amp=False):
    """-> normalised features (Q, P), on the CPU in fp32; length: tokens of a text that are read, if CLIP has as many."""
    length = min(length, encoder.clip.config.context_length)
    with torch.autocast(device.type, torch.float16, enabled=amp and device.type == "cuda"):
        rows = [encoder.clip.encode_text(tokenizer(texts[i:i + 256], length).to(device)).float().cpu() for i in range(0, len(texts), 256)]
    return F.normalize(torch.cat(rows), dim=-1)


def owners(dataset, videos):
    """-> the items of a data set whose video is among `videos`, and the place there of each one's video."""
    place = {video: i for i, video in enumerate(videos)}
    return zip(*((i, place[video]) for i, video in enumerate(dataset.videos) if video in place))


def encode(encoder, tokenizer, dataset, setting, device, batch_size=16, workers=0, amp=False):
    """-> normalised features, on the CPU in fp32, a row for each pair: of the branch (Q, P), of mean-pooled CLIP (Q, P), of the
    captions (Q, P); and what went wrong with the videos that the data set skips, whose pairs are left out. See encode_videos."""
    videos, branch, mean, broken = encode_videos(encoder, dataset, device, batch_size, workers, amp)
    items, owner = map(list, owners(dataset, videos))
    text = encode_texts(encoder, tokenizer, [dataset.captions[i] for i in items], setting.text_length, device, amp)
    return branch[owner], mean[owner], text, broken


def load_encoder(folder, branch_file, device):
    """-> (VideoEncoder for retrieval in fp32, tokenizer)."""
    clip, tokenizer = load_clip(os.path.join(folder, "clip"))
    branch = load_branch(branch_file or os.path.join(folder, "branch.pth"), clip)
    return VideoEncoder(clip.float(), branch).to(device).eval(), tokenizer


# ---------------------------------------------------------------------------------------------------- score
def score(cfg):
    """Retrieval, or recognition where there are --classes, of a data set's videos or from the file of an earlier run."""
    common.at_least(cfg, batch_size=1, workers=0)
    if cfg.dataset not in SETTINGS:
        raise common.UserError(f"--dataset {cfg.dataset}: choose one of {', '.join(SETTINGS)}")
    if cfg.from_:
        return report(*read_scores(cfg.from_))
    setting, here = SETTINGS[cfg.dataset], common.start_distributed(cfg.device)
    if cfg.save:
        common.make_folder(os.path.dirname(os.path.abspath(cfg.save)))   # now: not to fail after hours of encoding
    encoder, tokenizer = load_encoder(cfg.weights, cfg.branch, here.device)
    dataset = open_dataset(cfg, setting, encoder.clip.config.image_size)
    videos, branch, mean, broken = encode_videos(encoder, dataset, here.device, cfg.batch_size, cfg.workers, cfg.amp)
    items, owner = map(list, owners(dataset, videos))
    texts = dataset.classes if cfg.classes else [dataset.captions[i] for i in items]
    text = encode_texts(encoder, tokenizer, texts, setting.text_length, here.device, cfg.amp)
    if cfg.classes:   # videos ask, classes answer: (Q, C)
        right, similarity = [dataset.labels[i] for i in items], {"mean": mean[owner] @ text.T, "branch": branch[owner] @ text.T}
    else:             # captions ask, videos answer: (Q, V), each video once however many captions it has
        right, similarity = owner, {"mean": text @ mean.T, "branch": text @ branch.T}
    right = torch.tensor(right)
    about = {"task": "recognition" if cfg.classes else "retrieval", "dataset": cfg.dataset, "annotations": cfg.annotations,
             "total": str(len(dataset))}
    if here.first:
        for message in broken:
            print(f"skipped: {message}", file=sys.stderr)
        if cfg.save:
            tensors = {"mean": mean, "branch": branch, "text": text, "right": right, **{f"similarity.{k}": s for k, s in similarity.items()}}
            weightfile.write_safetensors(cfg.save, tensors, about)
        report(similarity, right, about)
    if here.size > 1:
        dist.destroy_process_group()


def open_dataset(cfg, setting, image_size):
    """-> the data set of the flags, of the size that it should have, with all its files there. Raises UserError."""
    if not cfg.annotations or cfg.what:
        raise common.UserError("score needs --annotations, mostly with --root; index needs a folder, search a text (see --help)")
    if bool(cfg.classes) != bool(setting.classes) and cfg.dataset != "own":
        raise common.UserError(f"--dataset {cfg.dataset}: {'needs --classes, a file with' if setting.classes else 'has no'} names of classes")
    if cfg.num_file and cfg.dataset != "activitynet":
        raise common.UserError(f"--num_file: --dataset {cfg.dataset} has no folders of frames")
    pixels = (setting.num_frames, image_size, setting.short * image_size // 224, setting.mode)
    if cfg.classes:
        dataset = data.RecognitionDataset(cfg.annotations, cfg.classes, setting.offset, cfg.root, *pixels, cfg.skip_broken)
        if setting.classes and len(dataset.classes) != setting.classes:
            raise common.UserError(f"{cfg.classes}: {cfg.dataset} has {setting.classes} classes, found {len(dataset.classes)}")
    else:
        counts = data.read_counts(cfg.num_file) if cfg.num_file else {}
        dataset = data.RetrievalDataset(cfg.annotations, cfg.root, *pixels, setting.joined, cfg.skip_broken, counts)
    if setting.size and len(dataset) not in setting.size:
        raise common.UserError(f"{cfg.annotations}: the test set of {cfg.dataset} has {' or '.join(map(str, setting.size))} "
                               f"{'videos' if cfg.classes else 'pairs'}, found {len(dataset)}")
    missing = dataset.missing()
    if missing and not cfg.skip_broken:   # said now, not after an hour
        raise common.UserError(f"--root {cfg.root}: lacks {len(missing)} of {len(set(dataset.videos))} videos, the first is {missing[0]}; "
                               "--skip_broken goes on without them")
    return dataset


def report(similarity, right, about):
    """The table. similarity: {"mean", "branch": (Q, G)}; right (Q,): the column of each row's right answer; about: what it is of."""
    setting, recognition = SETTINGS[about["dataset"]], about["task"] == "recognition"
    print(f"evaluated {len(right)} of {about['total']} {'videos' if recognition else 'captions'}, {setting.num_frames} frames, {about['annotations']}")
    lines = []   # what, numbers
    for key, name in (("mean", "mean-pooled CLIP"), ("branch", "branch")):
        match = right[:, None] == torch.arange(similarity[key].shape[1])   # (Q, G)
        if recognition:
            lines.append((name, [recall_at_k(similarity[key], k, match) for k in (1, 5)]))
        else:
            lines += [(f"{name}, text to video", retrieval_metrics(similarity[key], match).values()),
                      (f"{name}, video to text", retrieval_metrics(similarity[key].T, match.T).values())]
    if str(len(right)) == about["total"]:   # else it is another set than the paper's
        lines += [(f"{name} (paper)" + (", text to video" if not recognition else ""), numbers)
                  for name, numbers in (("CLIP", setting.clip), ("BT-Adapter", setting.adapter)) if numbers]
    print(" " * 36 + "".join(f"{name:>8}" for name in (("top-1", "top-5") if recognition else ("R@1", "R@5", "R@10", "MdR", "MnR"))))
    for name, numbers in lines:
        print(f"{name:36}" + "".join(f"{number:8.1f}" for number in numbers))


def read_scores(path):
    """What --save wrote -> similarity, right, about, as report takes them. Raises UserError."""
    tensors, about = weightfile.read_file(path), weightfile.read_metadata(path)
    right, similarity = tensors.get("right", torch.empty(0)), {key: tensors.get(f"similarity.{key}", torch.empty(0)) for key in ("mean", "branch")}
    if not {"task", "total", "annotations"} <= about.keys() or about.get("dataset") not in SETTINGS or right.dtype != torch.int64 or not all(
            s.dim() == 2 and len(s) == right.numel() > 0 and 0 <= right.min() and right.max() < s.shape[1] for s in similarity.values()):
        raise common.UserError(f"{path}: not a file that --save wrote")
    return similarity, right, about


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


def fingerprint(encoder):
    """A word for the weights, the same for the same numbers. 64 numbers of each tensor will do: training moves all of them."""
    digest = hashlib.sha256()
    for name, t in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(t.shape)}".encode() + t.flatten()[::max(1, t.numel() // 64)].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_index(path, made, files):
    """made: {setting: value}; files: {name: Entry} -> one safetensors file; see read_index."""
    table = [[name, e.size, e.mtime, e.digest, e.duration, e.error, e.done] for name, e in sorted(files.items())]
    features = [f for _, e in sorted(files.items()) for f in e.features] or [torch.empty(0, 1)]
    weightfile.write_safetensors(path, {"features": torch.cat(features)}, {"made": json.dumps(made), "files": json.dumps(table)})


def read_index(path):
    """-> made, files, as write_index took them, and all features (windows, P), in the order of files. Raises UserError."""
    if not os.path.exists(path):
        raise common.UserError(f"{path}: no such index; `python eval_retrieval.py index FOLDER` makes it")
    tensors, metadata = weightfile.read_file(path), weightfile.read_metadata(path)
    try:
        made, table, features = json.loads(metadata["made"]), json.loads(metadata["files"]), tensors["features"]
        parts = features.split([row[-1] for row in table]) if table else []
        files = {row[0]: Entry(*row[1:6], [part] if len(part) else []) for row, part in zip(table, parts)}
        return {"folder": made["folder"], "weights": made["weights"], "window": float(made["window"])}, files, features
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
        raise common.UserError(f"{path}: not an index of this program, or damaged ({type(e).__name__}); delete it or choose another --index")


def reason(error, path):
    """What an error says, without the path in front."""
    return error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")


def look(folder, files):
    """A folder now, beside the `files` of its index -> {name: Entry}: known ones as they were, also under another name; new and
    changed ones empty. Raises UserError for a folder that cannot be read: its files would seem to be gone."""
    def refuse(e):
        raise common.UserError(f"{e.filename}: {e.strerror}")
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
        def pixels(picture):
            return data.eval_pixels(picture[None], self.image_size)[0]   # (3, size, size)
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
                    frames, _ = data.frames_at(path, times, keep=pixels)
                    yield name, duration, torch.stack(frames).unflatten(0, (len(group), -1)), ""   # (B * T, ...) -> (B, T, 3, H, W)
            except data.VideoError as e:
                yield name, 0.0, None, reason(e, path)


@torch.no_grad()
def make_index(cfg):
    """Brings the index up to date with the folder: encodes what is new or changed, forgets what is gone."""
    common.at_least(cfg, batch_size=1, workers=0, save_every=0)
    if not cfg.window >= 0.1:
        raise common.UserError(f"--window {cfg.window}: must be at least 0.1 seconds")
    if not os.path.isdir(cfg.what):
        raise common.UserError(f"index {cfg.what}: no such folder; give the folder of your videos")
    here, folder = common.start_distributed(cfg.device), os.path.abspath(cfg.what)
    if here.size > 1:
        raise common.UserError("index runs in one process, without torchrun")
    encoder, _ = load_encoder(cfg.weights, cfg.branch, here.device)
    made, known = {"folder": folder, "weights": fingerprint(encoder), "window": cfg.window}, {}
    if os.path.exists(cfg.index):
        before, known, _ = read_index(cfg.index)
        for key, value in made.items():
            if before[key] != value:
                raise common.UserError(f"{cfg.index}: was made with the {key} {before[key]}, not {value}; choose another --index")
    files = look(folder, known)
    if not files and not known:
        raise common.UserError(f"{cfg.what}: no videos in it ({' '.join(VIDEOS)})")
    common.make_folder(os.path.dirname(os.path.abspath(cfg.index)))
    todo = [(name, e.done) for name, e in sorted(files.items()) if not e.complete(cfg.window)]
    loader = DataLoader(Windows(folder, todo, cfg.window, cfg.batch_size, SETTINGS["own"].num_frames, encoder.clip.config.image_size),
                        batch_size=None, num_workers=cfg.workers)
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
                        feature = encoder.encode_video(data.normalise(pixels.to(here.device))).float().cpu()   # (B, P)
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
    common.at_least(cfg, top=1)
    if not cfg.what.strip():
        raise common.UserError('search: needs a text, as in search "a dog jumps over a fence"')
    if cfg.sheet and not cfg.sheet.lower().endswith(".png"):
        raise common.UserError(f"--sheet {cfg.sheet}: must end in .png")
    made, files, features = read_index(cfg.index)
    if not len(features):
        raise common.UserError(f"{cfg.index}: holds no windows yet; run index again")
    if unfinished := sum(not e.complete(made["window"]) for e in files.values()):
        print(f"{cfg.index}: {unfinished} of {len(files)} files are not indexed yet; the same index command goes on", file=sys.stderr)
    device = common.start_distributed(cfg.device).device
    encoder, tokenizer = load_encoder(cfg.weights, cfg.branch, device)
    if fingerprint(encoder) != made["weights"]:
        raise common.UserError(f"{cfg.index}: was made with other weights than these; give those to --weights, or choose another --index")
    query = encode_texts(encoder, tokenizer, [cfg.what], SETTINGS["own"].text_length, device, cfg.amp)[0]   # (P,)
    scores, order = (features @ query).sort(descending=True, stable=True)
    names, ends, hits = list(files), list(itertools.accumulate(e.done for e in files.values())), []
    for row, points in zip(order[:cfg.top].tolist(), scores.tolist()):
        k = bisect.bisect(ends, row)   # the file whose windows row is among
        entry, path = files[names[k]], os.path.join(made["folder"], names[k])
        start, end = stretches(entry.duration, made["window"])[row - ends[k] + entry.done]
        hits.append((path, (start + end) / 2))
        print(f"{points:.3f}  {start:.1f}-{end:.1f} s  {printable(path)}")
    if cfg.sheet:
        pictures = [data.frames_at(path, [middle], keep=data.boxed)[0][0] for path, middle in hits]
        names = [printable(os.path.basename(path)) for path, _ in hits]
        data.contact_sheet(torch.stack(pictures), [middle for _, middle in hits], cfg.sheet, names=names)


STAGES = {"score": score, "index": make_index, "search": search}


def main(cfg):
    if cfg.stage not in STAGES:
        raise common.UserError(f"{cfg.stage}: no such stage; choose one of {', '.join(STAGES)}")
    STAGES[cfg.stage](cfg)


if __name__ == "__main__":
    common.run(main, Config, **FLAGS)
