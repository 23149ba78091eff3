"""Zero-shot text-to-video retrieval: does a caption find its video? The branch, beside mean-pooled CLIP, always.

    python eval_retrieval.py --annotations out/shapes/test_captions.jsonl --root out/shapes    # toy world, 1 minute
    python eval_retrieval.py --weights weights/released --dataset msrvtt --annotations test_JSFUSION.json --root MSRVTT/videos

--weights is a folder with `clip` (a Hugging Face folder, or OpenAI's ViT-L-14.pt) and `branch.pth`. The result is a table on
stdout; progress is on stderr.
"""
import dataclasses
import os
import sys

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
import data
from clip import load_clip
from model import VideoEncoder, load_branch


@dataclasses.dataclass
class Config:
    annotations: str                 # captions of videos: a JSONL {"video", "caption"}, or the data set's own JSON
    root: str                        # folder that the names in it are relative to
    weights: str = "weights/tiny"    # folder with clip and branch.pth
    branch: str = ""                 # another branch file than the one in --weights
    dataset: str = "own"             # whose settings: own, msrvtt, didemo, lsmdc
    batch_size: int = 16             # videos at a time
    workers: int = 1                 # processes that decode
    skip_broken: bool = False        # leave out videos that cannot be read, and say how many; else the first one is an error
    device: str = "auto"             # cpu, cuda or auto
    amp: bool = True                 # half precision on a GPU


@dataclasses.dataclass
class Setting:
    """How a data set is read in the released evaluation."""
    num_frames: int
    text_length: int          # tokens of a caption that are read
    short: int                # short side before the centre crop, for 224-pixel models
    mode: str                 # which frames: "uniform" or a key of data.INDEX_RULES
    joined: bool = False      # a video's captions are one text


SETTINGS = {"own": Setting(8, 77, 224, "uniform"), "msrvtt": Setting(12, 32, 224, "test"),
            "didemo": Setting(64, 77, 256, "test", joined=True), "lsmdc": Setting(64, 77, 256, "test")}


# ---------------------------------------------------------------------------------------------------- metrics
def ranks(similarity):
    """similarity (Q, G), query i's match is column i -> (better (Q,), tied (Q,)) float: how many score higher than the match,
    and how many score exactly as high, the match among them."""
    match = similarity.diag()[:, None]
    return (similarity > match).sum(1).double(), (similarity == match).sum(1).double()


def recall_at_k(similarity, k):
    """Share of queries whose match is among the first k, in percent. Ties are broken by a fair coin, in expectation."""
    better, tied = ranks(similarity)
    return 100 * ((k - better) / tied).clamp(0, 1).mean().item()


def retrieval_metrics(similarity):
    """similarity (Q, G) -> {"R@1", "R@5", "R@10" in percent, "MdR", "MnR": median and mean rank, from 1; ties count half}."""
    better, tied = ranks(similarity)
    rank = better + (tied - 1) / 2 + 1
    return {**{f"R@{k}": recall_at_k(similarity, k) for k in (1, 5, 10)}, "MdR": rank.quantile(0.5).item(), "MnR": rank.mean().item()}


# ---------------------------------------------------------------------------------------------------- encode
@torch.no_grad()
def encode(encoder, tokenizer, dataset, setting, device, batch_size=16, workers=0, amp=False):
    """-> normalised features, on the CPU in fp32: of the branch (Q, P), of mean-pooled CLIP (Q, P), of the captions (Q, P); and
    what went wrong with the videos that the data set skips, whose captions are left out too."""
    branch, mean, text, index, broken = [], [], [], [], []
    was_training = encoder.training
    encoder.eval()
    with torch.autocast(device.type, torch.float16, enabled=amp and device.type == "cuda"):
        loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=data.collate_skip)
        for batch in tqdm(loader, desc="encode", leave=False, file=sys.stderr):
            broken += batch["skipped"]
            index += batch["index"].tolist()
            if len(batch["index"]):
                feature, state = encoder(batch["video"].to(device))   # (B, P), (B, T, 1+N, D): one walk through CLIP serves both
                branch.append(feature.float().cpu())
                mean.append(encoder.mean_feature(state).float().cpu())
        if not index:
            raise common.UserError(f"none of {len(dataset)} videos can be read; the first: {broken[0]}")
        captions, length = [dataset.captions[i] for i in index], min(setting.text_length, encoder.clip.config.context_length)
        for i in range(0, len(captions), 256):
            text.append(encoder.clip.encode_text(tokenizer(captions[i:i + 256], length).to(device)).float().cpu())
    encoder.train(was_training)
    return *(F.normalize(torch.cat(rows), dim=-1) for rows in (branch, mean, text)), broken


def load_encoder(folder, branch_file, device):
    """-> (VideoEncoder for retrieval in fp32, tokenizer)."""
    clip, tokenizer = load_clip(os.path.join(folder, "clip"))
    branch = load_branch(branch_file or os.path.join(folder, "branch.pth"), clip)
    return VideoEncoder(clip.float(), branch).to(device).eval(), tokenizer


def main(cfg):
    if cfg.dataset not in SETTINGS:
        raise common.UserError(f"--dataset {cfg.dataset}: choose one of {', '.join(SETTINGS)}")
    setting, device = SETTINGS[cfg.dataset], common.start_distributed(cfg.device).device
    encoder, tokenizer = load_encoder(cfg.weights, cfg.branch, device)
    size = encoder.clip.config.image_size
    dataset = data.RetrievalDataset(cfg.annotations, cfg.root, setting.num_frames, size, setting.short * size // 224,
                                    setting.mode, setting.joined, cfg.skip_broken)
    branch, mean, text, broken = encode(encoder, tokenizer, dataset, setting, device, cfg.batch_size, cfg.workers, cfg.amp)
    for message in broken:
        print(f"skipped: {message}", file=sys.stderr)
    print(f"evaluated {len(text)} of {len(dataset)} captions, {setting.num_frames} frames, {cfg.annotations}")
    print(f"{'':28}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'MdR':>7}{'MnR':>8}")
    for name, video in (("mean-pooled CLIP", mean), ("branch", branch)):
        for direction, similarity in (("text to video", text @ video.T), ("video to text", video @ text.T)):
            m = retrieval_metrics(similarity)
            print(f"{name}, {direction}".ljust(33)[:33] + f"{m['R@1']:>6.1f}{m['R@5']:>7.1f}{m['R@10']:>7.1f}{m['MdR']:>7.1f}{m['MnR']:>8.1f}")


if __name__ == "__main__":
    common.run(main, Config)
