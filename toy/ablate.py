"""The paper's studies in miniature: the branch with one thing changed at a time, in the toy world.

    python -m toy.ablate structure      # every variant with three seeds -> a table, docs/ablate_structure.png
    python -m toy.ablate losses         # also depth, mask, projection
    python -m toy.ablate chat           # a table of the chats that `runs/ablate.sh chat` has tuned

`runs/ablate.sh` has all of them in order. The first one shows every clip to the frozen CLIP, once, and keeps
what it said (2 GB). So a step is the branch alone: two or three minutes a run, and a run on each core. That
is also the difference to `pretrain.py`, where each epoch shows other frames and another crop. Each run is
kept: a study that was interrupted goes on, and what two studies share is run once. After a change to the
code, remove out/ablate/runs.
"""
import dataclasses
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
from clip import load_clip
from metrics import retrieval_metrics
from model import (Branch, Pretraining, VideoEncoder, backbone_states, encode_texts, mbca_loss, pick,
                   tube_mask, vtc_loss)
from plumbing import cli, pictures, training
from plumbing.store import Store, state_of
from toy.score import static_accuracy, static_features, twin_accuracy
from toy.world import read_clips


@dataclasses.dataclass
class Config:
    stage: str                       # the study: structure, losses, depth, mask, projection or chat
    clip: str = "out/tiny/clip"      # the frozen CLIP
    data: str = "out/shapes"         # where the clips and captions are
    out: str = "out/ablate"          # what CLIP saw, and results
    pictures: str = "docs"           # folder for the pictures
    seeds: int = 3                   # runs of each variant
    steps: int = 200                 # of training
    batch_size: int = 64             # clips a step, twins side by side
    lr: float = 1e-5                 # base, as in runs/tiny.sh
    processes: int = 2               # that train side by side, each with one thread


# -------------------------------------------------------------------------------- variants
def as_it_is(branch):
    """Nothing is changed."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One thing may differ from the branch as it is pretrained."""
    depth: int = 4
    gated: bool = True
    mask_ratio: float = 0.7
    losses: tuple = (1, 0.1, 0.8)        # weights of VTC, MBCA and MBTA
    change: Callable = as_it_is          # what is done to a new branch


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
    "structure": ("Table 6", {
        "branch": Variant(), "without attention along time": Variant(change=no_time),
        "time alone: CLS stays out of it": Variant(change=no_space),
        "reads CLIP once": Variant(change=one_entrance)}),
    "losses": ("Table 7", {
        "VTC": Variant(losses=(1, 0, 0)), "VTC + MBTA": Variant(losses=(1, 0, 0.8)),
        "VTC + MBCA": Variant(losses=(1, 0.1, 0)), "all three, as released": Variant(),
        "all three, 1 : 1 : 1": Variant(losses=(1, 1, 1))}),
    "depth": ("Fig. 3", {str(depth): Variant(depth=depth) for depth in (1, 2, 3, 4, 6)}),
    "mask": ("Fig. 4", {str(ratio): Variant(mask_ratio=ratio) for ratio in (0.0, 0.3, 0.5, 0.7, 0.9)}),
    "projection": ("Table 11", {
        "from zero, gates": Variant(), "random": Variant(change=random_projection),
        "none": Variant(change=no_projection), "from zero, sums": Variant(gated=False),
        "from zero, branch alone": Variant(change=branch_alone)})}


# -------------------------------------------------------------------------------- what CLIP saw
LAYERS, FRAMES = 6, 8


def captions(cfg, split):
    return os.path.join(cfg.data, f"{split}_captions.jsonl")


def saw(cfg, split):
    """What the frozen CLIP says about every clip of a split, computed once -> {"states": (clips, LAYERS,
    FRAMES, 1+N, D) float16, "text": (clips, P)}, and of the test world "static": see static_features."""
    annotations, store = captions(cfg, split), Store(cfg.out, prefix=f"{split}_")
    key = [state_of(cfg.clip), state_of(annotations), LAYERS, FRAMES]
    if (kept := store.get(key)) is None:
        clip, tokenizer = load_clip(cfg.clip)
        encoder, clips = VideoEncoder(clip.float(), None), read_clips(annotations)
        dataset = data.RetrievalDataset(annotations, cfg.data, FRAMES, clip.config.image_size)
        batches = tqdm(DataLoader(dataset, 64, num_workers=1), desc=f"see {split}")
        states = [torch.stack(backbone_states(clip, pixels, LAYERS), dim=1).half() for pixels, _ in batches]

        def encode_text(texts):
            return encode_texts(encoder, tokenizer, texts, 32, torch.device("cpu"))
        tensors = {"states": torch.cat(states), "text": encode_text([clip.caption for clip in clips])}
        if split == "test":
            tensors["static"] = static_features(clips, encode_text)
        store.put(key, tensors)
        kept = store.get(key)
    return kept[0]


def last_states(seen, index, depth, kept=None):
    """The last `depth` layers of some clips -> [(B, FRAMES, 1+n, D)]; of the patches `kept` (B, n) only."""
    layers = seen["states"][index][:, -depth:].float().unbind(1)   # (B, FRAMES, 1+N, D) each
    if kept is None:
        return list(layers)
    visible = F.pad(kept + 1, (1, 0)).repeat_interleave(FRAMES, dim=0)   # (B * FRAMES, 1+n): CLS is token 0
    return [pick(layer.flatten(0, 1), visible).unflatten(0, (-1, FRAMES)) for layer in layers]


# -------------------------------------------------------------------------------- a run
# of the learning rate, as released: the first that fits counts
FACTORS = {"btadapter_T_layers": 100, "balance": 100, "btadapter": 10, "extra_proj": 10}


def teach(cfg, variant, seed, clip, seen, label):
    """The recipe of pretrain.py, annealed -> (the encoder after cfg.steps, seconds of a step: the median)."""
    torch.manual_seed(seed)
    branch = Branch.beside(clip, variant.depth, gated=variant.gated, drop_path=0.1)
    model = Pretraining(VideoEncoder(clip, branch))
    variant.change(branch)   # last: what it draws must not change what the others begin with
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    factors = {name: next(factor for part, factor in FACTORS.items() if part in name) for name in trained}
    optimizer = torch.optim.AdamW([{"params": [p], "factor": factors[name]} for name, p in trained.items()],
                                  betas=(0.9, 0.98), eps=1e-8, weight_decay=0.05)
    epoch_steps, seconds = len(seen["text"]) // cfg.batch_size, []
    for step in tqdm(range(cfg.steps), desc=f"{label}, seed {seed}", leave=False):
        if step % epoch_steps == 0:   # twins share a batch
            pairs = np.random.default_rng([seed, step // epoch_steps]).permutation(len(seen["text"]) // 2)
            order = torch.from_numpy(pairs)[:, None] * 2 + torch.arange(2)
        index = order.flatten()[step % epoch_steps * cfg.batch_size:][:cfg.batch_size]
        training.seed_step(seed, step)
        kept = tube_mask(len(index), clip.config.patch_tokens, variant.mask_ratio)
        states, text = last_states(seen, index, variant.depth, kept), seen["text"][index]
        lr = cfg.lr * training.warmup_cosine(step, cfg.steps, max(1, cfg.steps // 10))
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        began = time.perf_counter()
        video, patches, mbta = model(states, kept)
        parts = vtc_loss(video, text), mbca_loss(patches, text), mbta
        loss = sum(weight * part for weight, part in zip(variant.losses, parts))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 5.0)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return model.encoder.eval(), float(np.median(seconds))


@torch.no_grad()
def evaluate(feature, seen, clips):
    """feature(indices of clips) -> (B, P). -> {"twins", "static", "R@1"} over all of them, in percent."""
    video = torch.cat([feature(index) for index in torch.arange(len(clips)).split(128)])
    video = F.normalize(video, dim=-1)   # (clips, P)
    return {"twins": 100 * twin_accuracy(video, seen["text"]).mean().item(),
            "static": 100 * static_accuracy(video, clips, seen["static"]),
            "R@1": retrieval_metrics(seen["text"] @ video.T)["R@1"]}


def kept_run(cfg, variant, seed):
    """-> the store of finished runs, and the key of this one: all that it follows from, but the code."""
    what = [*dataclasses.astuple(variant)[:-1], variant.change.__name__]
    given = [state_of(cfg.clip), state_of(captions(cfg, "train"))]
    return Store(os.path.join(cfg.out, "runs")), [what, seed, cfg.steps, cfg.batch_size, cfg.lr, given]


def runs_of_a_process(rank, cfg, jobs):
    """Teaches and tests every cfg.processes-th of the jobs, (name, seed). A branch is too small for two
    threads: two processes do 1.8 times as much."""
    torch.set_num_threads(1)
    clip, clips = load_clip(cfg.clip)[0].float(), read_clips(captions(cfg, "test"))
    seen, held_out = saw(cfg, "train"), saw(cfg, "test")
    for name, seed in jobs[rank::cfg.processes]:
        variant = STUDIES[cfg.stage][1][name]
        encoder, seconds = teach(cfg, variant, seed, clip, seen, f"{cfg.stage}: {name}")

        def feature(index):
            return encoder.feature(last_states(held_out, index, variant.depth))[0]
        found = evaluate(feature, held_out, clips)
        store, key = kept_run(cfg, variant, seed)
        store.put(key, {}, {"found": json.dumps({**found, "s a step": seconds})})


def study(cfg):
    """Every variant of a study with every seed; then the table and the picture."""
    cli.at_least(cfg, seeds=1, steps=1, batch_size=2, processes=1)
    where, variants = STUDIES[cfg.stage]
    count, held_out = len(saw(cfg, "train")["text"]), saw(cfg, "test")
    if cfg.batch_size > count:
        raise cli.UserError(f"--batch_size {cfg.batch_size}: more than the {count} clips of {cfg.data}")
    wanted = {(name, seed): kept_run(cfg, variant, seed)
              for seed in range(cfg.seeds) for name, variant in variants.items()}
    jobs = [job for job, (store, key) in wanted.items() if store.get(key) is None]
    if cfg.processes > 1 and len(jobs) > 1:
        torch.multiprocessing.spawn(runs_of_a_process, (cfg, jobs), cfg.processes)
    else:
        runs_of_a_process(0, dataclasses.replace(cfg, processes=1), jobs)
    clip = load_clip(cfg.clip)[0].float()

    def feature(index):
        return clip.project_image(last_states(held_out, index, 1)[0][:, :, 0]).mean(1)
    runs = {"mean-pooled CLIP": [evaluate(feature, held_out, read_clips(captions(cfg, "test")))]}
    for (name, _), (store, key) in wanted.items():
        runs.setdefault(name, []).append(json.loads(store.get(key)[1]["found"]))
    report(cfg, f"{cfg.stage} (the paper's {where}), {cfg.steps} steps", runs, "R@1")


VIDEO_TOKENS = {"branch": "the branch's", "mean": "CLIP's, mean over time",
                "st_pool": "CLIP's, mean over time and mean over space"}


def chat_study(cfg):
    """The last evaluation of every run that is in out/chat_{tokens}_{seed}."""
    runs = {name: [] for name in VIDEO_TOKENS.values()}
    for tokens, name in VIDEO_TOKENS.items():
        for seed in range(cfg.seeds):
            path = os.path.join(cfg.out, f"chat_{tokens}_{seed}", "log.jsonl")
            rows = [row for _, row in data.read_rows(path)] if os.path.exists(path) else []
            answers = [row for row in rows if "temporal" in row]
            if not answers:
                raise cli.UserError(f"{path}: no evaluation; `bash runs/ablate.sh chat` trains all of these")
            runs[name].append({f"{kind} questions": answers[-1][kind] for kind in ("temporal", "static")})
    title = "chat (the paper's Table 1): tokens of a video for a frozen LLaMA, the branch of one pretraining"
    report(cfg, title, runs, "temporal questions")


def report(cfg, title, runs, main):
    """The table, on stdout: mean (lowest to highest) of every variant; and a picture of the column `main`.

    runs: {variant: [{column: share in percent, "s a step": seconds, if it was trained here}]}, a row for each
    seed. The seconds are shown where they are what a study is about."""
    known = ("twins", "static", "R@1", "temporal questions", "static questions")
    columns = [column for column in known if column in next(iter(runs.values()))[0]]
    timed, bars = cfg.stage in ("depth", "mask"), []
    print(f"\n{title}, held-out clips, {cfg.seeds} seeds: mean (lowest to highest)\n")
    heads = ["", *(f"{column}, %" for column in columns), *["s a step of the branch"] * timed]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for name, rows in runs.items():
        cells = {column: [row[column] for row in rows] for column in columns}
        spread = [f"{np.mean(c):.1f}" + (f" ({min(c):.1f} to {max(c):.1f})" if len(c) > 1 else "")
                  for c in cells.values()]
        seconds = [row["s a step"] for row in rows if timed and "s a step" in row]
        speed = f"{np.median(seconds):.2f}" if seconds else ""
        print("| " + " | ".join([name, *spread, *[speed] * timed]) + " |")
        label = name + (f" ({speed} s a step)" if speed else "")
        bars.append((label, float(np.mean(cells[main])), min(cells[main]), max(cells[main])))
    cli.make_folder(cfg.pictures)
    path = os.path.join(cfg.pictures, f"ablate_{cfg.stage}.png")
    pictures.bars(path, f"{cfg.stage}: {main} in %, held-out clips ({cfg.seeds} seeds)", bars)


def main(cfg):
    if cfg.stage not in ("chat", *STUDIES):
        raise cli.UserError(f"{cfg.stage}: no such study; choose {', '.join(STUDIES)} or chat")
    chat_study(cfg) if cfg.stage == "chat" else study(cfg)


if __name__ == "__main__":
    cli.run(main, Config, positional=["stage"])
