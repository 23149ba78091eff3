"""The paper's studies in miniature: the branch with one thing changed at a time, taught and tested in the toy world.

    python -m toy.ablate see            # once: what the frozen CLIP says about every clip   -> out/ablate, 2 GB
    python -m toy.ablate structure      # a study: every variant with three seeds            -> a table, docs/ablate_structure.png
    python -m toy.ablate losses         # also depth, mask, projection
    python -m toy.ablate chat           # the table of chat_tune.py's runs in out/ablate, which `runs/ablate.sh chat` trains

`runs/ablate.sh` has all of them in order. CLIP is frozen and sees the same frames every time, so it looks once, and a step is the
branch alone: two or three minutes a run, and a run on each core. That is also the difference to `pretrain.py`, where each epoch shows other
frames and another crop. Each run is kept: a study that was interrupted goes on, and what two studies share is run once. After a
change to the code, remove out/ablate/runs.
"""
import dataclasses
import hashlib
import json
import os
import time
from typing import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import pretrain
from clip import load_clip
from metrics import retrieval_metrics
from model import Branch, Pretraining, VideoEncoder, backbone_states, fingerprint, pick, tube_mask
from plumbing import cli, pictures, training, weightfile
from toy.score import static_accuracy, twin_accuracy
from toy.world import Clip


@dataclasses.dataclass
class Config:
    stage: str                       # see, or a study: structure, losses, depth, mask, projection or chat
    clip: str = "out/tiny/clip"      # the frozen CLIP
    data: str = "out/shapes"         # where the clips and captions are
    out: str = "out/ablate"          # what CLIP saw, and results
    pictures: str = "docs"           # folder for the pictures
    seeds: int = 3                   # runs of each variant
    steps: int = 200                 # of training
    batch_size: int = 64             # clips a step, twins side by side
    lr: float = 1e-5                 # base, as in runs/tiny.sh
    processes: int = 2               # that train side by side, each with one thread


# ---------------------------------------------------------------------------------------------------- variants
def as_it_is(branch):
    """Nothing is changed."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One thing may differ from the branch as it is pretrained."""
    depth: int = 4
    gated: bool = True
    mask_ratio: float = 0.7
    losses: str = pretrain.RECIPES["released"].losses
    change: Callable = as_it_is              # what is done to a new branch


class Pass(nn.Module):
    """In the place of a layer: nothing happens."""
    def forward(self, x, T):
        return x


def no_time(branch):
    """Attention along time is the identity at first, and stays it."""
    branch.btadapter_T_layers.requires_grad_(False)


def no_space(branch):
    branch.btadapter_S_layers = nn.ModuleList(Pass() for _ in branch.btadapter_S_layers)


def one_entrance(branch):
    """Later layers read the branch alone: of CLIP they get the sigmoid of -100, nothing."""
    branch.balance2.data.fill_(-1)
    branch.balance2.requires_grad_(False)


def random_projection(branch):
    for layer in branch.btadapter_T_layers:
        layer.temporal_fc.reset_parameters()


def no_projection(branch):
    for layer in branch.btadapter_T_layers:
        layer.temporal_fc = nn.Identity()


def branch_alone(branch):
    """The video feature is the branch's CLS token, without CLIP's."""
    branch.balance1.data.fill_(-1)
    branch.balance1.requires_grad_(False)


STUDIES = {   # study: (where the paper has it, {variant: what it is}); the branch as it is stands in each
    "structure": ("Table 6", {"branch": Variant(), "without attention along time": Variant(change=no_time),
                              "time alone: CLS stays out of it": Variant(change=no_space), "reads CLIP once": Variant(change=one_entrance)}),
    "losses": ("Table 7", {"VTC": Variant(losses="1,0,0"), "VTC + MBTA": Variant(losses="1,0,0.8"), "VTC + MBCA": Variant(losses="1,0.1,0"),
                           "all three, as released": Variant(), "all three, 1 : 1 : 1": Variant(losses="1,1,1")}),
    "depth": ("Fig. 3", {str(depth): Variant(depth=depth) for depth in (1, 2, 3, 4, 6)}),
    "mask": ("Fig. 4", {str(ratio): Variant(mask_ratio=ratio) for ratio in (0.0, 0.3, 0.5, 0.7, 0.9)}),
    "projection": ("Table 11", {"from zero, gates": Variant(), "random": Variant(change=random_projection), "none": Variant(change=no_projection),
                                "from zero, sums": Variant(gated=False), "from zero, branch alone": Variant(change=branch_alone)})}


# ---------------------------------------------------------------------------------------------------- what CLIP saw
SPLITS, LAYERS, FRAMES = ("train", "test"), 6, 8


def see(cfg):
    """The states of the frozen CLIP for every clip -> out/states_{split}.safetensors, (clips, LAYERS, FRAMES, 1+N, D) float16."""
    clip, _ = load_clip(cfg.clip)
    clip = clip.float().requires_grad_(False)
    cli.make_folder(cfg.out)
    for split in SPLITS:
        about = {"clip": fingerprint(clip), "captions": captions_digest(cfg, split)}
        dataset = data.RetrievalDataset(os.path.join(cfg.data, f"{split}_captions.jsonl"), cfg.data, FRAMES, clip.config.image_size)
        states = [torch.stack(backbone_states(clip, pixels, LAYERS), dim=1).half()   # (B, LAYERS, FRAMES, 1+N, D)
                  for pixels, _ in tqdm(DataLoader(dataset, 64, num_workers=1), desc=f"see {split}")]
        weightfile.write_safetensors(os.path.join(cfg.out, f"states_{split}.safetensors"), {"states": torch.cat(states)}, about)


def captions_digest(cfg, split):
    """Tells a world from another: its clips are drawn from what its captions say."""
    return hashlib.sha256(data.read_text(os.path.join(cfg.data, f"{split}_captions.jsonl")).encode()).hexdigest()


class Seen:
    """Clips of a split: what CLIP saw of them (clips, LAYERS, FRAMES, 1+N, D) float16, and their captions' features (clips, P)."""
    def __init__(self, cfg, split, clip, encode_text):
        path = os.path.join(cfg.out, f"states_{split}.safetensors")
        if not os.path.exists(path):
            raise cli.UserError(f"{path}: not there; `python -m toy.ablate see` makes it")
        self.states = weightfile.read_file(path)["states"]
        about = weightfile.read_metadata(path)
        if about.get("clip") != fingerprint(clip) or about.get("captions") != captions_digest(cfg, split):
            raise cli.UserError(f"{path}: what another CLIP saw than {cfg.clip}, or of another world than {cfg.data}; run `python -m toy.ablate see` again")
        fields = [f.name for f in dataclasses.fields(Clip)]
        with open(os.path.join(cfg.data, f"{split}_captions.jsonl")) as f:
            self.clips = [Clip(**{name: row[name] for name in fields}) for row in map(json.loads, f)]
        self.text = encode_text([clip.caption for clip in self.clips])

    def look(self, index, depth, kept=None):
        """What the last `depth` layers said about some clips -> [(B, FRAMES, 1+n, D)], for Branch."""
        layers = self.states[index][:, -depth:].float().unbind(1)   # (B, FRAMES, 1+N, D) each
        if kept is None:
            return list(layers)
        visible = F.pad(kept + 1, (1, 0)).repeat_interleave(FRAMES, dim=0)                                   # (B * FRAMES, 1+n)
        return [pick(layer.flatten(0, 1), visible).unflatten(0, (-1, FRAMES)) for layer in layers]


def text_encoder(clip, tokenizer):
    """-> encode_text(texts) -> (texts, P) normalised; each text goes through the tower but once."""
    known = {}

    @torch.no_grad()
    def encode_text(texts):
        new = [text for text in dict.fromkeys(texts) if text not in known]
        for i in range(0, len(new), 512):
            known.update(zip(new[i:i + 512], F.normalize(clip.encode_text(tokenizer(new[i:i + 512], 32)), dim=-1)))
        return torch.stack([known[text] for text in texts])
    return encode_text


# ---------------------------------------------------------------------------------------------------- a run
def teach(cfg, variant, seed, clip, seen, label):
    """-> (the encoder after cfg.steps, seconds of a step: the median)."""
    torch.manual_seed(seed)
    branch = Branch.beside(clip, variant.depth, gated=variant.gated, drop_path=pretrain.Config.drop_path)
    model = Pretraining(VideoEncoder(clip, branch))
    variant.change(branch)   # last: what it draws must not change what the others begin with
    optimizer = pretrain.make_optimizer(model, pretrain.RECIPES["released"], cfg.lr, pretrain.Config.weight_decay)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    shares, scaler = pretrain.loss_weights(variant.losses), torch.amp.GradScaler("cpu", enabled=False)
    order, seconds = pretrain.batches(len(seen.clips), cfg.batch_size, 2, seed, 0, 0, 1), []
    for step in tqdm(range(cfg.steps), desc=f"{label}, seed {seed}", leave=False):
        training.seed_step(seed, step)
        index = torch.tensor([i for _, i in next(order)])
        kept = tube_mask(len(index), clip.config.patch_tokens, variant.mask_ratio)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * group["factor"] * pretrain.lr_share(step, cfg.steps, cfg.steps, anneal=True)
        optimizer.zero_grad()
        views, began = [(seen.look(index, variant.depth, kept), kept)], time.perf_counter()
        pretrain.backward(model, views, seen.text[index], shares, scaler, lambda part, step=step: training.seed_step(seed, step, 0, part + 1),
                          torch.float32)
        nn.utils.clip_grad_norm_(trained, pretrain.Config.clip_norm)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return model.encoder.eval(), float(np.median(seconds))


@torch.no_grad()
def test(feature, seen, encode_text):
    """feature(indices of a few clips) -> (B, P); -> {"twins", "static", "R@1"} over all of them, in percent."""
    video = torch.cat([feature(index) for index in torch.arange(len(seen.clips)).split(128)])
    video = F.normalize(video, dim=-1)   # (clips, P)
    return {"twins": 100 * twin_accuracy(video, seen.text).mean().item(),
            "static": 100 * static_accuracy(video, seen.clips, encode_text), "R@1": retrieval_metrics(seen.text @ video.T)["R@1"]}


class Setup:
    """All that a run needs, and the place where it is kept."""
    def __init__(self, cfg):
        self.cfg = cfg
        self.clip, tokenizer = load_clip(cfg.clip)
        self.encode_text = text_encoder(self.clip.float().requires_grad_(False), tokenizer)
        self.train, self.held_out = (Seen(cfg, split, self.clip, self.encode_text) for split in SPLITS)
        self.world = {"clip": fingerprint(self.clip), "captions": captions_digest(cfg, "train")}
        if cfg.batch_size > len(self.train.clips):
            raise cli.UserError(f"--batch_size {cfg.batch_size}: more than the {len(self.train.clips)} clips of {cfg.data}")

    def kept(self, variant, seed):
        """-> (what a run depends on, the file in out/runs that has its results, if it was ever finished)."""
        cfg = self.cfg
        about = {**dataclasses.asdict(variant), "change": variant.change.__name__, "seed": seed, "steps": cfg.steps,
                 "batch_size": cfg.batch_size, "lr": cfg.lr, **self.world}
        return about, os.path.join(cfg.out, "runs", hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16] + ".json")

    def run(self, name, seed):
        """Teaches and tests a variant, unless that has been done."""
        variant = STUDIES[self.cfg.stage][1][name]
        about, path = self.kept(variant, seed)
        if not os.path.exists(path):
            encoder, seconds = teach(self.cfg, variant, seed, self.clip, self.train, f"{self.cfg.stage}: {name}")
            found = test(lambda index: encoder.feature(self.held_out.look(index, variant.depth))[0], self.held_out, self.encode_text)
            cli.write_atomic(path, lambda f: f.write(json.dumps({**about, **found, "s a step": seconds}).encode()))


def runs_of_a_process(rank, cfg, jobs):
    """Every cfg.processes-th of the jobs, (name, seed). A branch is too small for two threads: two processes do 1.8 times as much."""
    torch.set_num_threads(1)
    setup = Setup(cfg)
    for job in jobs[rank::cfg.processes]:
        setup.run(*job)


def study(cfg):
    """Every variant of a study with every seed; then the table and the picture."""
    cli.at_least(cfg, seeds=1, steps=1, batch_size=2, processes=1)
    where, variants = STUDIES[cfg.stage]
    cli.make_folder(os.path.join(cfg.out, "runs"))
    setup, runs = Setup(cfg), {name: [] for name in variants}   # here too: what is wrong with the input is said once
    encoder = VideoEncoder(setup.clip, None)
    baseline = test(lambda index: encoder.clip.project_image(setup.held_out.look(index, 1)[-1][:, :, 0]).mean(1), setup.held_out, setup.encode_text)
    jobs = [(name, seed) for seed in range(cfg.seeds) for name, variant in variants.items() if not os.path.exists(setup.kept(variant, seed)[1])]
    if cfg.processes > 1 and len(jobs) > 1:
        torch.multiprocessing.spawn(runs_of_a_process, (cfg, jobs), cfg.processes)
    else:
        runs_of_a_process(0, dataclasses.replace(cfg, processes=1), jobs)
    for seed in range(cfg.seeds):
        for name, variant in variants.items():
            with open(setup.kept(variant, seed)[1]) as f:
                runs[name].append(json.load(f))
    report(cfg, f"{cfg.stage} (the paper's {where}), {cfg.steps} steps", {"mean-pooled CLIP": [baseline], **runs}, "R@1")


VIDEO_TOKENS = {"branch": "the branch's", "mean": "CLIP's, mean over time", "st_pool": "CLIP's, mean over time and mean over space"}


def chat_study(cfg):
    """The last evaluation of every run that is in out/chat_{tokens}_{seed}."""
    runs = {}
    for tokens, name in VIDEO_TOKENS.items():
        runs[name] = []
        for seed in range(cfg.seeds):
            path = os.path.join(cfg.out, f"chat_{tokens}_{seed}", "log.jsonl")
            if not os.path.exists(path):
                raise cli.UserError(f"{path}: not there; `bash runs/ablate.sh chat` trains all runs of this study")
            rows = [row for _, row in data.read_rows(path)]
            answers = {f"{kind} questions": [row[kind] for row in rows if kind in row] for kind in ("temporal", "static")}
            if not all(answers.values()):
                raise cli.UserError(f"{path}: this run was never evaluated; `bash runs/ablate.sh chat` goes on with it")
            runs[name].append({kind: shares[-1] for kind, shares in answers.items()})
    report(cfg, "chat (the paper's Table 1): tokens of a video for a frozen LLaMA, the branch of one pretraining", runs, "temporal questions")


def report(cfg, title, runs, main):
    """The table, on stdout: mean (lowest to highest) of every variant; and a picture of the column `main`.

    runs: {variant: [{column: share in percent, "s a step": seconds, if it was trained here}]}, a row for each seed. The seconds are shown
    where they are what a study is about."""
    columns = [column for column in ("twins", "static", "R@1", "temporal questions", "static questions") if column in next(iter(runs.values()))[0]]
    timed = cfg.stage in ("depth", "mask")
    print(f"\n{title}, held-out clips, {cfg.seeds} seeds: mean (lowest to highest)\n")
    print("| | " + " | ".join(f"{column}, %" for column in columns) + (" | s a step of the branch |" if timed else " |"))
    print("|---" * (1 + len(columns) + timed) + "|")
    bars = []
    for name, rows in runs.items():
        cells = {column: [row[column] for row in rows] for column in columns}
        seconds = [row["s a step"] for row in rows if timed and "s a step" in row]
        spread = [f"{sum(c) / len(c):.1f}" + (f" ({min(c):.1f} to {max(c):.1f})" if len(c) > 1 else "") for c in cells.values()]
        speed = f"{np.median(seconds):.2f}" if seconds else ""
        print(f"| {name} | " + " | ".join(spread) + (f" | {speed} |" if timed else " |"))
        bars.append((name + (f" ({speed} s a step)" if speed else ""), sum(cells[main]) / len(rows), min(cells[main]), max(cells[main])))
    cli.make_folder(cfg.pictures)
    pictures.bars(os.path.join(cfg.pictures, f"ablate_{cfg.stage}.png"), f"{cfg.stage}: {main} in %, held-out clips ({cfg.seeds} seeds)", bars)


def main(cfg):
    if cfg.stage not in ("see", "chat", *STUDIES):
        raise cli.UserError(f"{cfg.stage}: no such stage; choose see, {', '.join(STUDIES)} or chat")
    {"see": see, "chat": chat_study}.get(cfg.stage, study)(cfg)


if __name__ == "__main__":
    cli.run(main, Config, positional=["stage"])
