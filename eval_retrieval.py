"""Does a text find its video? Zero-shot retrieval and recognition, the branch beside mean-pooled CLIP, always.

    python eval_retrieval.py --annotations out/shapes/test_captions.jsonl --root out/shapes    # toy world, 1 minute
    python eval_retrieval.py --weights weights/released --dataset msrvtt --annotations test_JSFUSION.json --root MSRVTT/videos
    python eval_retrieval.py --weights weights/released --dataset hmdb51 --annotations test.txt --classes classes.txt --root HMDB51

--weights is a folder with `clip` (a Hugging Face folder, or OpenAI's ViT-L-14.pt) and `branch.pth`. Results are on stdout,
progress on stderr. Scoring runs under torchrun too.
"""
import dataclasses
import os
import sys

import torch
import torch.distributed as dist

import data
from metrics import recall_at_k, retrieval_metrics
from model import encode_texts, encode_videos, load_encoder, owners
from plumbing import cli, training, weightfile


@dataclasses.dataclass
class Config:
    weights: str = "weights/tiny"    # folder with clip and branch.pth
    branch: str = ""                 # another branch file than the one in --weights
    batch_size: int = 16             # videos, or windows of one, at a time
    workers: int = 1                 # processes that decode
    device: str = "auto"             # cpu, cuda or auto
    amp: bool = True                 # half precision on a GPU
    annotations: str = ""            # captions of videos: a JSONL {"video", "caption"}, or the data set's own file; lines "path label"
    root: str = ""                   # folder that the names in it are relative to
    dataset: str = "own"             # whose settings: own, msrvtt, didemo, lsmdc, activitynet; to recognise: k400, hmdb51, ucf101
    classes: str = ""                # to recognise actions: the names of the classes, one a line
    num_file: str = ""               # activitynet, kept as folders of JPEG frames: a JSON {name: number of frames}
    skip_broken: bool = False        # leave out videos that cannot be read, and say how many; else the first one is an error
    save: str = ""                   # write features and similarities there (safetensors)
    from_: str = ""                  # score what --save wrote, without model and videos


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


# ---------------------------------------------------------------------------------------------------- score
def main(cfg):
    """Retrieval, or recognition where there are --classes, of a data set's videos or from the file of an earlier run."""
    cli.at_least(cfg, batch_size=1, workers=0)
    if cfg.dataset not in SETTINGS:
        raise cli.UserError(f"--dataset {cfg.dataset}: choose one of {', '.join(SETTINGS)}")
    if cfg.from_:
        return report(*read_scores(cfg.from_))
    setting, here = SETTINGS[cfg.dataset], training.start_distributed(cfg.device)
    if cfg.save:
        cli.make_folder(os.path.dirname(os.path.abspath(cfg.save)))   # now: not to fail after hours of encoding
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
    if not cfg.annotations :
        raise cli.UserError("--annotations is needed, mostly with --root")
    if bool(cfg.classes) != bool(setting.classes) and cfg.dataset != "own":
        raise cli.UserError(f"--dataset {cfg.dataset}: {'needs --classes, a file with' if setting.classes else 'has no'} names of classes")
    if cfg.num_file and cfg.dataset != "activitynet":
        raise cli.UserError(f"--num_file: --dataset {cfg.dataset} has no folders of frames")
    pixels = (setting.num_frames, image_size, setting.short * image_size // 224, setting.mode)
    if cfg.classes:
        dataset = data.RecognitionDataset(cfg.annotations, cfg.classes, setting.offset, cfg.root, *pixels, cfg.skip_broken)
        if setting.classes and len(dataset.classes) != setting.classes:
            raise cli.UserError(f"{cfg.classes}: {cfg.dataset} has {setting.classes} classes, found {len(dataset.classes)}")
    else:
        counts = data.read_counts(cfg.num_file) if cfg.num_file else {}
        dataset = data.RetrievalDataset(cfg.annotations, cfg.root, *pixels, setting.joined, cfg.skip_broken, counts)
    if setting.size and len(dataset) not in setting.size:
        raise cli.UserError(f"{cfg.annotations}: the test set of {cfg.dataset} has {' or '.join(map(str, setting.size))} "
                               f"{'videos' if cfg.classes else 'pairs'}, found {len(dataset)}")
    missing = dataset.missing()
    if missing and not cfg.skip_broken:   # said now, not after an hour
        raise cli.UserError(f"--root {cfg.root}: lacks {len(missing)} of {len(set(dataset.videos))} videos, the first is {missing[0]}; "
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
        raise cli.UserError(f"{path}: not a file that --save wrote")
    return similarity, right, about


if __name__ == "__main__":
    cli.run(main, Config)
