"""The paper's studies in miniature: the branch with one thing changed at a time, taught and tested in the toy world.

    python ablate.py see            # once: what the frozen CLIP says about every clip   -> out/ablate, 3 GB
    python ablate.py structure      # a study: every variant with three seeds            -> a table, docs/ablate_structure.png
    python ablate.py losses         # also depth, mask, projection

`runs/ablate.sh` has all of them in order. CLIP is frozen and sees the same frames every time, so it looks once, and a step is the
branch alone: a few minutes a variant on two cores. That is also the difference to `pretrain.py`, where each epoch shows other
frames and another crop. Results are kept, so a study that was interrupted goes on.
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

import common
import data
import pretrain
import shapes
import weightfile
from clip import load_clip
from eval_retrieval import fingerprint, retrieval_metrics
from model import Branch, Pretraining, VideoEncoder, pick, tube_mask


@dataclasses.dataclass
class Config:
    stage: str                       # see, or a study: structure, losses, depth, mask or projection
    clip: str = "out/tiny/clip"      # the frozen CLIP
    data: str = "out/shapes"         # where the clips and captions are
    out: str = "out/ablate"          # what CLIP saw, and results
    pictures: str = "docs"           # folder for the pictures
    seeds: int = 3                   # runs of each variant
    steps: int = 400                 # of training
    batch_size: int = 64             # clips a step, twins side by side
    lr: float = 1e-5                 # base, as in runs/tiny.sh
    threads: int = 2                 # that train


# ---------------------------------------------------------------------------------------------------- variants
@dataclasses.dataclass(frozen=True)
class Variant:
    """One thing may differ from the branch as it is pretrained."""
    depth: int = 4
    gated: bool = True
    mask_ratio: float = 0.7
    losses: str = pretrain.RECIPES["released"].losses
    change: Callable = lambda branch: None   # what is done to a new branch


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
    encoder = VideoEncoder(clip.float(), None)
    about = {"clip": fingerprint(clip)}
    common.make_folder(cfg.out)
    for split in SPLITS:
        dataset = data.RetrievalDataset(os.path.join(cfg.data, f"{split}_captions.jsonl"), cfg.data, FRAMES, clip.config.image_size, mode="uniform")
        states = [torch.stack(encoder.backbone_states(video, LAYERS), dim=1).half()   # (B, LAYERS, FRAMES, 1+N, D)
                  for video, _ in tqdm(DataLoader(dataset, 64, num_workers=1), desc=f"see {split}")]
        weightfile.write_safetensors(os.path.join(cfg.out, f"states_{split}.safetensors"), {"states": torch.cat(states)}, about)


class Seen:
    """Clips of a split: what CLIP saw of them (clips, LAYERS, FRAMES, 1+N, D) float16, and their captions' features (clips, P)."""
    def __init__(self, cfg, split, clip, encode_text):
        path = os.path.join(cfg.out, f"states_{split}.safetensors")
        if not os.path.exists(path):
            raise common.UserError(f"{path}: not there; `python ablate.py see` makes it")
        self.states = weightfile.read_file(path)["states"]
        if weightfile.read_metadata(path).get("clip") != fingerprint(clip):
            raise common.UserError(f"{path}: what another CLIP saw than {cfg.clip}; run `python ablate.py see` again")
        fields = [f.name for f in dataclasses.fields(shapes.Clip)]
        with open(os.path.join(cfg.data, f"{split}_captions.jsonl")) as f:
            self.clips = [shapes.Clip(**{name: row[name] for name in fields}) for row in map(json.loads, f)]
        if len(self.clips) != len(self.states):
            raise common.UserError(f"{path}: {len(self.states)} clips, but {cfg.data} has {len(self.clips)}; run `python ablate.py see` again")
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
    """-> (the encoder after cfg.steps, seconds a step)."""
    torch.manual_seed(seed)
    branch = Branch.beside(clip, variant.depth, gated=variant.gated, drop_path=pretrain.Config.drop_path)
    variant.change(branch)
    model = Pretraining(VideoEncoder(clip, branch))
    optimizer = pretrain.make_optimizer(model, pretrain.RECIPES["released"], cfg.lr, pretrain.Config.weight_decay)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    shares, scaler = pretrain.loss_weights(variant.losses), torch.amp.GradScaler("cpu", enabled=False)
    began, order = time.perf_counter(), pretrain.batches(len(seen.clips), cfg.batch_size, 2, seed, 0, 0, 1)
    for step in tqdm(range(cfg.steps), desc=f"{label}, seed {seed}", leave=False):
        common.seed_step(seed, step)
        index = torch.tensor([i for _, i in next(order)])
        kept = tube_mask(len(index), clip.config.patch_tokens, variant.mask_ratio)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * group["factor"] * pretrain.lr_share(step, cfg.steps, cfg.steps, anneal=True)
        optimizer.zero_grad()
        pretrain.backward(model, [(seen.look(index, variant.depth, kept), kept)], seen.text[index], shares, scaler,
                          lambda part, step=step: common.seed_step(seed, step, 0, part + 1))
        nn.utils.clip_grad_norm_(trained, pretrain.Config.clip_norm)
        optimizer.step()
    return model.encoder.eval(), (time.perf_counter() - began) / cfg.steps


@torch.no_grad()
def test(feature, seen, encode_text):
    """feature(indices of a few clips) -> (B, P); -> {"twins", "static", "R@1"} over all of them, in percent."""
    video = torch.cat([feature(index) for index in torch.arange(len(seen.clips)).split(128)])
    video = F.normalize(video, dim=-1)   # (clips, P)
    return {"twins": 100 * shapes.twin_accuracy(video, seen.text).mean().item(),
            "static": 100 * shapes.static_accuracy(video, seen.clips, encode_text), "R@1": retrieval_metrics(seen.text @ video.T)["R@1"]}


def study(cfg):
    """Every variant of a study with every seed, a line each in out/{study}.jsonl; then the table and the picture."""
    common.at_least(cfg, seeds=1, steps=1, batch_size=2, threads=1)
    where, variants = STUDIES[cfg.stage]
    clip, tokenizer = load_clip(cfg.clip)
    encode_text = text_encoder(clip.float().requires_grad_(False), tokenizer)
    train, held_out = (Seen(cfg, split, clip, encode_text) for split in SPLITS)
    if cfg.batch_size > len(train.clips):
        raise common.UserError(f"--batch_size {cfg.batch_size}: more than the {len(train.clips)} clips of {cfg.data}")
    path, settings = os.path.join(cfg.out, f"{cfg.stage}.jsonl"), [cfg.steps, cfg.batch_size, cfg.lr, fingerprint(clip)]
    rows = []
    if os.path.exists(path):
        rows = [row for _, row in data.read_rows(path)]
        if any(row["settings"] != settings for row in rows):
            raise common.UserError(f"{path}: made with another CLIP, or other --steps, --batch_size or --lr; remove it, or choose another --out")
    encoder = VideoEncoder(clip, None)
    baseline = test(lambda index: encoder.mean_feature(held_out.look(index, 1)[-1]), held_out, encode_text)
    for seed in range(cfg.seeds):
        for name, variant in variants.items():
            if any((row["variant"], row["seed"]) == (name, seed) for row in rows):
                continue
            encoder, seconds = teach(cfg, variant, seed, clip, train, f"{cfg.stage}: {name}")
            found = test(lambda index: encoder.feature(held_out.look(index, variant.depth))[0], held_out, encode_text)
            rows.append({"variant": name, "seed": seed, **found, "seconds": seconds, "settings": settings})
            text = "".join(json.dumps(row) + "\n" for row in rows)
            common.write_atomic(path, lambda f: f.write(text.encode()))
    report(cfg, where, {name: [row for row in rows if row["variant"] == name and row["seed"] < cfg.seeds] for name in variants}, baseline)


def report(cfg, where, found, baseline):
    """The table, on stdout, and a picture: R@1 of each variant, from the lowest to the highest seed."""
    columns = ["twins", "static", "R@1", "seconds"]
    print(f"\n{cfg.stage} (the paper's {where}), held-out clips, {cfg.seeds} seeds, {cfg.steps} steps: mean (lowest to highest)\n")
    print("| | twins, % | static, % | R@1, % | s a step of the branch |\n|---|---|---|---|---|")
    print("| mean-pooled CLIP | " + " | ".join(f"{baseline[c]:.1f}" for c in columns[:3]) + " | |")
    for name, rows in found.items():
        cells = [[row[c] for row in rows] for c in columns]
        print(f"| {name} | " + " | ".join(f"{sum(c) / len(c):.1f} ({min(c):.1f} to {max(c):.1f})" for c in cells[:3]) + f" | {np.median(cells[3]):.2f} |")
    bars = [("mean-pooled CLIP", baseline["R@1"], baseline["R@1"], baseline["R@1"])]
    bars += [(name, sum(r["R@1"] for r in rows) / len(rows), min(r["R@1"] for r in rows), max(r["R@1"] for r in rows)) for name, rows in found.items()]
    common.make_folder(cfg.pictures)
    common.bars(os.path.join(cfg.pictures, f"ablate_{cfg.stage}.png"), f"{cfg.stage}: a caption finds its clip, R@1 in % ({cfg.seeds} seeds)", bars)


def main(cfg):
    if cfg.stage != "see" and cfg.stage not in STUDIES:
        raise common.UserError(f"{cfg.stage}: no such stage; choose see, {', '.join(STUDIES)}")
    torch.set_num_threads(cfg.threads)
    see(cfg) if cfg.stage == "see" else study(cfg)


if __name__ == "__main__":
    common.run(main, Config, positional=["stage"])
