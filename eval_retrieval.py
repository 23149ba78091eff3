"""Does a text find its video? Zero-shot retrieval and recognition, the branch beside mean-pooled CLIP, always.

    python eval_retrieval.py    # the toy world, 1 minute on a laptop: R@1 from text to video 22 without the branch, 63 with it
    python eval_retrieval.py --annotations captions.jsonl --root VIDEOS          # your own: lines {"video", "caption"}
    python eval_retrieval.py --weights weights/released --dataset msrvtt --annotations test_JSFUSION.json --root MSRVTT/videos
    python eval_retrieval.py --weights weights/released --dataset hmdb51 --annotations test.txt --classes classes.txt --root HMDB51

--weights is a folder with `clip` (a Hugging Face folder, or OpenAI's ViT-L-14.pt) and `branch.pth`. Runs under torchrun too.
The table goes to stdout, progress to stderr. Where the paper has numbers, they stand below ours.
"""
import dataclasses
import os
import sys

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

import data
from metrics import recall_at_k, retrieval_metrics
from model import encode_texts, encode_videos, load_encoder, owners
from plumbing import cli, training, weightfile
from plumbing.cli import UserError


@dataclasses.dataclass
class Config:
    weights: str = "weights/tiny"    # folder with clip and branch.pth
    branch: str = ""                 # another branch file than the one in --weights
    batch_size: int = 16             # videos at a time
    workers: int = 1                 # processes that decode
    device: str = "auto"             # cpu, cuda or auto
    amp: bool = True                 # half precision on a GPU
    annotations: str = ""            # JSONL {"video", "caption"}, the data set's own file, or lines "path label"; "": the toy world
    root: str = ""                   # folder that the names in it are relative to
    dataset: str = "own"             # own, msrvtt, didemo, lsmdc, activitynet; to recognise: k400, hmdb51, ucf101
    classes: str = ""                # to recognise actions: the names of the classes, one a line
    num_file: str = ""               # videos kept as folders of JPEG frames: a JSON {name: number of frames}
    skip_broken: bool = False        # leave out videos that cannot be read, and say how many; else the first one is an error
    save: str = ""                   # write features and similarities there (safetensors)
    from_: str = ""                  # score what --save wrote, without model and videos


@dataclasses.dataclass
class Setting:
    """How a data set is read in the released evaluation, and what the paper found on it."""
    num_frames: int
    text_length: int          # tokens of a text that are read
    short: int                # short side before the centre crop, for 224-pixel models
    rule: str                 # which frames: "uniform" or a key of data.INDEX_RULES
    joined: bool = False      # a video's captions are one text
    size: tuple = ()          # pairs, or videos to recognise; several where several lists are in use, none where links die
    classes: int = 0          # to recognise
    offset: int = 0           # what to add to a label to count from 0
    clip: tuple = ()          # the paper's mean-pooled CLIP ViT-L/14: R@1, R@5, R@10 from text to video, or top-1, top-5
    adapter: tuple = ()       # the paper's BT-Adapter


SETTINGS = {
    "own": Setting(8, 77, 224, "uniform"),
    "msrvtt": Setting(12, 32, 224, "test", size=(1000,), clip=(35.4, 58.8, 68.1), adapter=(40.9, 64.7, 73.5)),   # 1k-A
    "didemo": Setting(64, 77, 256, "test", True, (1003, 1004), clip=(30.3, 54.9, 65.4), adapter=(35.6, 61.9, 72.6)),
    "lsmdc": Setting(64, 77, 256, "test", size=(1000,), clip=(17.0, 31.8, 40.3), adapter=(19.5, 35.9, 45.0)),
    "activitynet": Setting(64, 77, 256, "test", True, (4917,), clip=(28.8, 57.6, 71.8), adapter=(37.0, 66.7, 78.9)),
    "k400": Setting(16, 32, 224, "test", classes=400, clip=(59.1, 82.8), adapter=(64.3, 86.7)),
    "hmdb51": Setting(16, 32, 224, "test", size=(1530,), classes=51, offset=-1, clip=(45.0, 74.4), adapter=(54.6, 79.7)),
    "ucf101": Setting(16, 32, 224, "test", size=(3783, 3734, 3696), classes=101, offset=-1,
                      clip=(73.5, 92.7), adapter=(79.1, 96.2))}


def main(cfg):
    # ------------------------------------------------------------------------------------------------ setup
    cli.at_least(cfg, batch_size=1, workers=0)
    if cfg.dataset not in SETTINGS:
        raise UserError(f"--dataset {cfg.dataset}: choose one of {', '.join(SETTINGS)}")
    if cfg.from_:
        return report(*read_scores(cfg.from_))
    if not cfg.annotations:
        cfg = toy_world(cfg)
    setting, here = SETTINGS[cfg.dataset], training.start_distributed(cfg.device)
    if cfg.save:
        cli.replaceable(cfg.save, "file that --save wrote", lambda start: b'"similarity.branch"' in start)
        cli.make_folder(os.path.dirname(os.path.abspath(cfg.save)))   # now: not to fail after hours of encoding
    # ------------------------------------------------------------------------------------------------ model and data
    encoder, tokenizer = load_encoder(cfg.weights, cfg.branch, here.device)
    dataset = EvaluationSet(cfg, setting, encoder.clip.config.image_size)
    about = {"task": "recognition" if dataset.labels else "retrieval", "dataset": cfg.dataset,
             "annotations": cfg.annotations, "total": str(len(dataset))}
    # ------------------------------------------------------------------------------------------------ evaluation
    videos, branch, mean, broken = encode_videos(encoder, dataset, here.device, cfg.batch_size, cfg.workers, cfg.amp)
    items, owner = map(list, owners(dataset, videos))
    texts = dataset.texts if dataset.labels else [dataset.texts[i] for i in items]
    text = encode_texts(encoder, tokenizer, texts, setting.text_length, here.device, cfg.amp)
    if dataset.labels:   # videos ask, classes answer: (Q, C)
        right = torch.tensor([dataset.labels[i] for i in items])
        similarity = {"mean": mean[owner] @ text.T, "branch": branch[owner] @ text.T}
    else:                # captions ask, videos answer: (Q, V), each video once however many captions it has
        right, similarity = torch.tensor(owner), {"mean": text @ mean.T, "branch": text @ branch.T}
    if here.first:
        for message in broken:
            print(f"skipped: {message}", file=sys.stderr)
        if cfg.save:
            tensors = {"mean": mean, "branch": branch, "text": text, "right": right}
            tensors |= {f"similarity.{name}": s for name, s in similarity.items()}
            weightfile.write_safetensors(cfg.save, tensors, about)
        report(similarity, right, about)
    if here.size > 1:
        dist.destroy_process_group()


def toy_world(cfg):
    """-> cfg with the annotations and the root of the toy world's test clips. Raises UserError where they are missing."""
    if cfg.dataset != "own" or cfg.classes:
        raise UserError("--annotations is needed, mostly with --root")
    root = cfg.root or "out/shapes"
    annotations = os.path.join(root, "test_captions.jsonl")
    if not os.path.exists(annotations):
        raise UserError(f"{annotations}: no such file; `python -m toy render` makes it, or give --annotations of your own")
    return dataclasses.replace(cfg, annotations=annotations, root=root)


def report(similarity, right, about):
    """Prints the table. similarity: {"mean", "branch": (Q, G)}; right (Q,): the column of each row's right answer; about: of what."""
    setting, recognition = SETTINGS[about["dataset"]], about["task"] == "recognition"
    print(f"evaluated {len(right)} of {about['total']} {'videos' if recognition else 'captions'}, {setting.num_frames} frames, "
          f"{about['annotations']}")
    columns = ("top-1", "top-5") if recognition else ("R@1", "R@5", "R@10", "MdR", "MnR")
    print(" " * 36 + "".join(f"{column:>8}" for column in columns))
    rows = {}   # what: numbers
    for key, name in (("mean", "mean-pooled CLIP"), ("branch", "branch")):
        match = right[:, None] == torch.arange(similarity[key].shape[1])   # (Q, G)
        if recognition:
            rows[name] = [recall_at_k(similarity[key], k, match) for k in (1, 5)]
        else:
            rows[f"{name}, text to video"] = retrieval_metrics(similarity[key], match).values()
            rows[f"{name}, video to text"] = retrieval_metrics(similarity[key].T, match.T).values()
    if str(len(right)) == about["total"]:   # else it is another set than the paper's
        way = "" if recognition else ", text to video"
        rows |= {f"CLIP (paper){way}": setting.clip, f"BT-Adapter (paper){way}": setting.adapter}
    for name, numbers in rows.items():
        if numbers:
            print(f"{name:36}" + "".join(f"{number:8.1f}" for number in numbers))


def read_scores(path):
    """What --save wrote -> similarity, right, about, as report takes them. Raises UserError."""
    tensors, about = weightfile.read_file(path), weightfile.read_metadata(path)
    try:
        right, similarity = tensors["right"], {key: tensors[f"similarity.{key}"] for key in ("mean", "branch")}
        good = {"task", "total", "annotations"} <= about.keys() and about["dataset"] in SETTINGS and all(
            s.dim() == 2 and len(s) == len(right) > 0 <= right.min() and right.max() < s.shape[1] for s in similarity.values())
    except (KeyError, TypeError):
        good = False
    if not good:
        raise UserError(f"{path}: not a file that --save wrote")
    return similarity, right, about


# ---------------------------------------------------------------------------------------------------- test sets, as released
class EvaluationSet(Dataset):
    """A data set as its released evaluation sees it. Item i -> (pixels (T, 3, H, W) uint8, i). A broken video raises VideoError,
    or gives data.Skipped with --skip_broken.

    videos: the name of each item's video. texts: the caption of each item or, to recognise, the names of the classes; then
    `labels` has the right class of each item. Raises UserError for files that do not fit, a set of another size and, unless
    they may be skipped, videos that are missing."""
    def __init__(self, cfg, setting, image_size):
        if bool(cfg.classes) != bool(setting.classes) and cfg.dataset != "own":
            wants = "needs --classes, a file with" if setting.classes else "has no"
            raise UserError(f"--dataset {cfg.dataset}: {wants} names of classes")
        self.root, self.setting, self.image_size, self.skip = cfg.root, setting, image_size, cfg.skip_broken
        self.counts = read_counts(cfg.num_file) if cfg.num_file else {}
        if cfg.classes:
            self.texts = read_classes(cfg.classes)
            if setting.classes and len(self.texts) != setting.classes:
                raise UserError(f"{cfg.classes}: {cfg.dataset} has {setting.classes} classes, found {len(self.texts)}")
            self.videos, self.labels = read_labels(cfg.annotations, len(self.texts), setting.offset)
        else:
            (self.videos, self.texts), self.labels = read_pairs(cfg.annotations, setting.joined), []
        if setting.size and len(self) not in setting.size:
            raise UserError(f"{cfg.annotations}: the test set of {cfg.dataset} has {' or '.join(map(str, setting.size))} "
                            f"{'videos' if cfg.classes else 'pairs'}, found {len(self)}")
        missing = [v for v in dict.fromkeys(self.videos) if not self.folder(v) and not os.path.isfile(data.locate(self.root, v))]
        if missing and not self.skip:   # said now, not after an hour
            raise UserError(f"--root {cfg.root}: lacks {len(missing)} of {len(set(self.videos))} videos, the first is {missing[0]}; "
                            "--skip_broken goes on without them")

    def folder(self, video):
        """-> (where the pictures of a video are, how many), or None if it is a file."""
        name = os.path.splitext(video)[0]
        path = os.path.join(self.root, name)
        return (path, self.counts[name]) if name in self.counts and os.path.isdir(path) else None

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, i):
        num_frames, rule, short = self.setting.num_frames, self.setting.rule, self.setting.short * self.image_size // 224
        try:
            if folder := self.folder(self.videos[i]):
                found = sample_folder(*folder, num_frames, rule)
            else:
                found = data.sample_frames(data.locate(self.root, self.videos[i]), num_frames, rule)
            # one by one: sixty-four pictures as filmed take hundreds of megabytes
            pixels = torch.cat([data.eval_pixels(picture[None], self.image_size, short) for _, picture in found])
        except data.VideoError as e:
            if self.skip:
                return data.Skipped(str(e))
            raise
        return pixels, i


def sample_folder(folder, count, num_frames, rule):
    """A video that is kept as pictures 000001.jpg, 000002.jpg, ...: `num_frames` of its `count` frames by the `rule` of
    data.INDEX_RULES. Yields (its number, picture). For a picture that is missing, the next one. Raises VideoError."""
    for i in data.INDEX_RULES[rule](count, num_frames):
        pair = [os.path.join(folder, f"{i + k:06d}.jpg") for k in (1, 2)]
        yield i, data.read_picture(next(filter(os.path.isfile, pair), pair[0]))


def read_pairs(path, joined=False):
    """Rows {"video", "caption"}, in JSON lines or a JSON list, or a JSON dict {video: caption or captions} -> videos, captions.

    Each caption makes a pair of its own (MSR-VTT), or all captions of a row make one text (joined: DiDeMo, ActivityNet)."""
    rows, videos, captions = data.read_rows(path), [], []
    if len(rows) == 1 and isinstance(rows[0][1], dict) and "video" not in rows[0][1]:
        rows = [(f"{path}, {video!r}", {"video": video, "caption": value}) for video, value in rows[0][1].items()]
    for where, row in rows:
        video, value = data.field(row, where, "video"), row.get("caption")
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t for t in texts):
            raise UserError(f"{where}: needs a caption or a list of captions, none of them empty")
        texts = [" ".join(texts)] if joined else texts
        videos += [video] * len(texts)
        captions += texts
    return videos, captions


def read_counts(path):
    """ActivityNet's num_file: a JSON dict {name: number of frames} -> the same dict. Raises UserError."""
    (_, counts), *more = data.read_rows(path)
    if more or not isinstance(counts, dict) or not all(type(n) is int and n > 0 for n in counts.values()):
        raise UserError(f"{path}: needs one JSON dict of names and whole numbers of frames above 0")
    return counts


def read_classes(path):
    """Names of classes, one a line -> [name]; its place in the list is a class's label. Raises UserError."""
    names = [line.strip() for line in data.read_text(path).rstrip().split("\n")]
    if "" in names:
        raise UserError(f"{path}, line {names.index('') + 1}: needs the name of a class")
    return names


def read_labels(path, classes, offset):
    """Lines `path label`, the label being the last word -> videos, labels + offset, which go from 0 to classes - 1.

    Raises UserError with the line."""
    videos, labels = [], []
    for number, line in enumerate(data.read_text(path).rstrip().split("\n"), 1):
        video, label = (line.rsplit(None, 1) + ["", ""])[:2]
        if not label.isdecimal() or not 0 <= int(label) + offset < classes:
            raise UserError(f"{path}, line {number}: needs a path and a label from {-offset} to {classes - 1 - offset}")
        videos.append(video)
        labels.append(int(label) + offset)
    return videos, labels


if __name__ == "__main__":
    cli.run(main, Config)
