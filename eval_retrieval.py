"""Does a text find its video? Zero-shot retrieval and recognition, the branch always beside mean-pooled CLIP.

    python eval_retrieval.py                              # toy world, 1 minute: R@1 22, with the branch 63
    python eval_retrieval.py --annotations pairs.jsonl --root VIDEOS    # your own {"video", "caption"} lines
    python eval_retrieval.py --weights weights/released --dataset msrvtt --annotations test_JSFUSION.json
    python eval_retrieval.py --weights weights/released --dataset hmdb51 --annotations test --classes classes

--weights is a folder with `clip` (a Hugging Face folder, or OpenAI's ViT-L-14.pt) and `branch.pth`. The table
goes to stdout; where the paper has numbers, they stand below ours. Runs under torchrun too.
"""
import dataclasses
from typing import Annotated

from plumbing import cli

Sets = Annotated[str, "own", "msrvtt", "didemo", "lsmdc", "activitynet", "k400", "hmdb51", "ucf101"]


@dataclasses.dataclass
class Config:
    weights: str = cli.shipped("weights/tiny")   # folder with clip and branch.pth
    branch: str = ""                 # another branch file than the one in --weights
    batch_size: cli.Count = 16       # videos at a time
    workers: cli.Whole = 1           # processes that decode
    device: cli.Device = "auto"      # where to compute
    amp: bool = True                 # half precision on a GPU
    annotations: str = ""            # JSONL {"video", "caption"}, the set's own file, or lines "path label"
    root: str = ""                   # folder that the names in it are relative to
    dataset: Sets = "own"            # how a set is read; the last three are of actions
    classes: str = ""                # to recognise actions: the names of the classes, one a line
    skip_broken: bool = False        # leave out videos that cannot be read; else the first is an error


if __name__ == "__main__":
    CONFIG = cli.start(Config)   # before the slow imports: a typing error shows at once

import os
import sys

import torch
import torch.distributed as dist

import data
from metrics import recall_at_k, retrieval_metrics
from model import encode_texts, encode_videos, load_encoder
from plumbing import memory, training
from plumbing.cli import UserError


@dataclasses.dataclass
class Setting:
    """How a data set is read in the released evaluation, and what the paper found on it."""
    num_frames: int
    text_length: int      # tokens of a text that are read
    short: int            # short side before the centre crop, for 224-pixel models
    rule: str             # which frames: "uniform" or a key of data.INDEX_RULES
    joined: bool = False  # a video's captions are one text
    size: tuple = ()      # pairs or videos; several where several lists are in use, none where links die
    clip: tuple = ()      # the paper's mean-pooled CLIP: R@1, R@5, R@10 from text to video, or top-1, top-5
    adapter: tuple = ()   # the paper's BT-Adapter
    classes: int = 0      # to recognise
    offset: int = 0       # what to add to a label to count from 0


SETTINGS = {   # all numbers of the paper are of ViT-L/14; msrvtt is its 1k-A split
    "own": Setting(8, 77, 224, "uniform"),
    "msrvtt": Setting(12, 32, 224, "test", False, (1000,), (35.4, 58.8, 68.1), (40.9, 64.7, 73.5)),
    "didemo": Setting(64, 77, 256, "test", True, (1003, 1004), (30.3, 54.9, 65.4), (35.6, 61.9, 72.6)),
    "lsmdc": Setting(64, 77, 256, "test", False, (1000,), (17.0, 31.8, 40.3), (19.5, 35.9, 45.0)),
    "activitynet": Setting(64, 77, 256, "test", True, (4917,), (28.8, 57.6, 71.8), (37.0, 66.7, 78.9)),
    "k400": Setting(16, 32, 224, "test", False, (), (59.1, 82.8), (64.3, 86.7), 400),
    "hmdb51": Setting(16, 32, 224, "test", False, (1530,), (45.0, 74.4), (54.6, 79.7), 51, -1),
    "ucf101": Setting(16, 32, 224, "test", False, (3783, 3734, 3696), (73.5, 92.7), (79.1, 96.2), 101, -1)}


def main(cfg):
    # ----------------------------------------------------------------------------------------------- setup
    if not cfg.annotations:
        root = cfg.root or "out/shapes"
        cfg = dataclasses.replace(cfg, root=root, annotations=os.path.join(root, "test_captions.jsonl"))
        if cfg.dataset != "own" or not os.path.exists(cfg.annotations):
            raise UserError(f"give --annotations; or `python -m toy render` makes the toy world in {root}")
    setting, here = SETTINGS[cfg.dataset], training.start_distributed(cfg.device)
    # -------------------------------------------------------------------------------------- model and data
    encoder, tokenizer = load_encoder(cfg.weights, cfg.branch, here.device)
    memory.prepare_cpu(encoder)
    if bool(cfg.classes) != bool(setting.classes) and cfg.dataset != "own":
        raise UserError(f"--dataset {cfg.dataset}: {'needs' if setting.classes else 'has no'} --classes")
    classes = read_classes(cfg.classes, setting.classes) if cfg.classes else []
    rows = (read_labels(cfg.annotations, len(classes), setting.offset) if classes else
            read_pairs(cfg.annotations, setting.joined))
    if setting.size and len(rows) not in setting.size:
        sizes = " or ".join(map(str, setting.size))
        raise UserError(f"{cfg.annotations}: {cfg.dataset} has {sizes} items, found {len(rows)}")
    size = encoder.clip.config.image_size
    dataset = data.RetrievalDataset(rows, cfg.root, setting.num_frames, size, setting.short * size // 224,
                                    setting.rule, cfg.skip_broken)
    # ------------------------------------------------------------------------------------------ evaluation
    row, branch, mean, broken = encode_videos(encoder, dataset, here.device, cfg.batch_size, cfg.workers,
                                              cfg.amp)
    items = [i for i, video in enumerate(dataset.videos) if video in row]
    owner = [row[dataset.videos[i]] for i in items]
    if classes:   # videos ask, classes answer
        texts, right = classes, [dataset.captions[i] for i in items]
        branch, mean = branch[owner], mean[owner]
    else:         # captions ask, videos answer: each video once, however many captions it has
        texts, right = [dataset.captions[i] for i in items], owner
    text = encode_texts(encoder, tokenizer, texts, setting.text_length, here.device, cfg.amp)
    if here.rank == 0:
        for message in broken:
            print(f"skipped: {message}", file=sys.stderr)
        report(cfg, len(dataset), {"mean-pooled CLIP": mean, "branch": branch}, text, torch.tensor(right))
    if here.size > 1:
        dist.destroy_process_group()


def report(cfg, total, videos, text, right):
    """Prints the table. total: items of the whole set. videos: {name: features (V, P)}; text (Q, P); right:
    which video is a text's (Q,) or, to recognise, which text is a video's (V,)."""
    setting, rows, way = SETTINGS[cfg.dataset], {}, "" if cfg.classes else ", text to video"
    for name, video in videos.items():
        similarity = video @ text.T if cfg.classes else text @ video.T   # a row for whoever asks
        match = right[:, None] == torch.arange(similarity.shape[1])   # which answers are right
        if cfg.classes:
            rows[name] = [recall_at_k(similarity, k, match) for k in (1, 5)]
        else:
            rows[name + way] = retrieval_metrics(similarity, match).values()
            rows[f"{name}, video to text"] = retrieval_metrics(similarity.T, match.T).values()
    if len(right) == total and setting.clip:   # else it is another set than the paper's
        rows |= {f"CLIP (paper){way}": setting.clip, f"BT-Adapter (paper){way}": setting.adapter}
    print(f"evaluated {len(right)} of {total} {'videos' if cfg.classes else 'captions'}, "
          f"{setting.num_frames} frames, {cfg.annotations}")
    columns = ("top-1", "top-5") if cfg.classes else ("R@1", "R@5", "R@10", "MdR", "MnR")
    print(" " * 36 + "".join(f"{column:>8}" for column in columns))
    for name, numbers in rows.items():
        print(f"{name:36}" + "".join(f"{number:8.1f}" for number in numbers))


# ------------------------------------------------------------------------------------- test sets, as released
def read_pairs(path, joined=False):
    """JSON lines or a list of {"video", "caption"}, or a dict {video: caption or captions} -> [(video, text)]

    Each caption makes a pair (MSR-VTT), or all of a video make one text (joined: DiDeMo, ActivityNet)."""
    rows, pairs = data.read_rows(path), []
    where, whole = rows[0]
    if where == path and "video" not in whole:
        rows = [(f"{path}, {v!r}", {"video": v, "caption": texts}) for v, texts in whole.items()]
    for where, row in rows:
        video, texts = data.field(row, where, "video"), row.get("caption")
        texts = texts if isinstance(texts, list) else [texts]
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"{where}: needs a caption or a list of captions, none of them empty")
        pairs += [(video, text) for text in ([" ".join(texts)] if joined else texts)]
    if not pairs:
        raise UserError(f"{path}: no videos in it")
    return pairs


def read_classes(path, count):
    """Names of classes, one a line -> [name]; its place in the list is a class's label. count: 0 is any."""
    names = [line.strip() for line in data.read_text(path).rstrip().split("\n")]
    if "" in names or count not in (0, len(names)):
        raise UserError(f"{path}: needs a name in each line, {count or 'some'} in all, not {len(names)}")
    return names


def read_labels(path, classes, offset):
    """Lines `path label` -> [(video, label + offset)], from 0 to classes - 1. The label is the last word."""
    rows, last = [], classes - 1 - offset
    for number, line in enumerate(data.read_text(path).rstrip().split("\n"), 1):
        video, label = (line.rsplit(None, 1) + ["", ""])[:2]
        if not label.isdecimal() or not -offset <= int(label) <= last:
            raise UserError(f"{path}, line {number}: needs a path and a label from {-offset} to {last}")
        rows.append((video, int(label) + offset))
    return rows


if __name__ == "__main__":
    cli.run(main, CONFIG)
