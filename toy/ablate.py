"""The paper's studies in miniature: the branch with one thing changed at a time, in the toy world.

    python -m toy.ablate structure      # every variant with three seeds -> a table, docs/ablate_structure.png
    python -m toy.ablate losses         # also depth, mask, projection, kept, related

`runs/ablate.sh` has all of them in order. The first one shows every clip to the frozen CLIP, once, and keeps
what it said (2 GB). So a step is the branch alone: two or three minutes a run, and a run on each core. That
is also the difference to `pretrain.py`, where each epoch shows other frames and another crop. Each run is
kept: a study that was interrupted goes on, and what two studies share is run once. After a change to the
code, remove out/ablate/runs.
"""
import dataclasses

from plumbing import cli


@dataclasses.dataclass
class Config:
    stage: str                       # the study: structure, losses, depth, mask, projection, kept or related
    clip: str = cli.shipped("weights/tiny/clip")   # the frozen CLIP
    data: str = "out/shapes"         # where the clips and captions are
    out: str = "out/ablate"          # what CLIP saw, and finished runs
    pictures: str = "docs"           # folder for the pictures
    seeds: cli.Count = 3             # runs of each variant
    steps: cli.Count = 200           # of training
    processes: cli.Count = 2         # that train side by side, each with one thread


if __name__ == "__main__":
    CONFIG = cli.start(Config, positional=["stage"])   # before the slow imports: a typing error shows at once

import json
import os
from typing import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from clip import load_clip
from metrics import retrieval_metrics, twin_accuracy
from model import (Branch, Pretraining, VideoEncoder, backbone_states, encode_texts, mbca_loss, pick,
                   place_embedding, to_branch, tube_mask, vtc_loss)
from plumbing import pictures
from plumbing.store import Store, state_of
from toy.score import spread, static_accuracy, static_features
from toy.tiny_models import fit
from toy.world import COLOURS, QUIET, SHAPES, read_clips


# -------------------------------------------------------------------------------- variants
@dataclasses.dataclass(frozen=True)
class Variant:
    """One thing may differ from the branch as it is pretrained."""
    depth: int = 4
    gated: bool = True
    mask_ratio: float = 0.7
    losses: tuple = (1, 0.1, 0.8)        # weights of VTC, MBCA and MBTA
    share: float = 1                     # of the steps
    few: bool = False                    # whether it learns from clips of few looks alone
    copied: float = 10                   # factor of the learning rate of the layers copied from CLIP
    sums_after: bool = False             # trained with gates, tested with sums: the released configurations
    encoder: type = VideoEncoder         # how branch and CLIP make a feature
    change: Callable = lambda _: None    # what is done to a new branch


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


def few_looks(clip):
    """Whether a clip has one of four colours and one of four shapes."""
    return clip.colour in list(COLOURS)[::2] and clip.shape in SHAPES[::2]


class Concatenated(VideoEncoder):
    """A linear layer reads both features side by side. It begins as their mean, as the gates do."""
    def __init__(self, clip, branch):
        super().__init__(clip, branch)
        D = clip.config.vision_width
        self.btadapter_join = nn.Linear(2 * D, D)
        self.btadapter_join.load_state_dict({"weight": torch.eye(D).repeat(1, 2) / 2, "bias": torch.zeros(D)})

    def feature(self, states, kept=None):
        tokens = self.branch(states, place_embedding(self.clip), kept)[-1]
        backbone = states[-1][:, :, 0]                                                       # (B, T, D)
        joined = self.btadapter_join(torch.cat([tokens[:, :1].expand_as(backbone), backbone], dim=-1))
        return self.clip.project_image(joined).mean(1), tokens


class InsideCLIP(VideoEncoder):
    """No branch: its layers along time stand before CLIP's last layers, which stay as they are. The first of
    the states is what enters them. Under a mask they see the visible patches alone."""
    def feature(self, states, kept=None):
        T, x = states[0].shape[1], states[0]                                             # (B, T, 1+n, D)
        x = torch.cat([x[:, :, :1], x[:, :, 1:] + self.branch.btadapter_time_embed.weight[:T, None]], dim=2)
        layers = self.clip.vision_model.encoder.layers[1 - len(states):]
        for temporal, layer in zip(self.branch.btadapter_T_layers[1:], layers, strict=True):
            patches = temporal(to_branch(x[:, :, 0].mean(1), x[:, :, 1:]), T)[:, 1:]        # (B, n*T, D)
            x = torch.cat([x[:, :, :1], patches.unflatten(1, (-1, T)).transpose(1, 2)], dim=2)
            x = layer(x.flatten(0, 1)).view(x.shape)
        return self.clip.project_image(x[:, :, 0]).mean(1), to_branch(x[:, :, 0].mean(1), x[:, :, 1:])


def no_marks(branch):
    """CLIP's own layers would be lost among marks of time that are random at first."""
    branch.btadapter_time_embed.weight.data.zero_()


class Bottleneck(nn.Module):
    """A layer of ST-Adapter's shape, with its released kernel of 3 x 1 x 1: in half the width a patch reads
    its own place one frame earlier and one later. CLS passes by. It begins as the identity."""
    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Linear(width, width // 2), nn.Linear(width // 2, width)
        self.conv = nn.Conv1d(width // 2, width // 2, 3, padding=1, groups=width // 2)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x, T):
        """x (B, 1 + n*T, D) -> same shape."""
        cls, patches = x[:, :1], x[:, 1:]
        y = self.down(patches).unflatten(1, (-1, T)).flatten(0, 1).transpose(1, 2)   # (B*n, D/2, T)
        y = self.up(F.gelu(self.conv(y)).transpose(1, 2))                            # (B*n, T, D)
        return torch.cat([cls, patches + y.reshape(patches.shape)], dim=1)


def bottlenecks(branch):
    """ST-Adapter's layers in the place of attention along time. They need no marks of time."""
    no_marks(branch)
    branch.btadapter_time_embed.requires_grad_(False)
    width = branch.btadapter_cls_token.shape[-1]
    branch.btadapter_T_layers = nn.ModuleList(Bottleneck(width) for _ in branch.btadapter_T_layers)


VTC = (1, 0, 0)
STUDIES = {   # study: (where the paper has it, {variant: what it is}); the branch as it is stands in each
    "structure": ("Table 6", {
        "branch": Variant(), "without attention along time": Variant(change=no_time),
        "time alone: CLS stays out of it": Variant(change=no_space),
        "reads CLIP once": Variant(change=one_entrance),
        "VTC alone: layers inside CLIP": Variant(5, losses=VTC, encoder=InsideCLIP, change=no_marks),
        "VTC alone: reads CLIP once": Variant(losses=VTC, change=one_entrance),
        "VTC alone: branch": Variant(losses=VTC)}),
    "losses": ("Table 7", {
        "VTC": Variant(losses=VTC), "VTC + MBTA": Variant(losses=(1, 0, 0.8)),
        "VTC + MBCA": Variant(losses=(1, 0.1, 0)), "all three, as released": Variant(),
        "all three, 1 : 1 : 1": Variant(losses=(1, 1, 1))}),
    "depth": ("Fig. 3", {str(depth): Variant(depth=depth) for depth in (1, 2, 3, 4, 6)}),
    "mask": ("Fig. 4", {
        **{str(ratio): Variant(mask_ratio=ratio) for ratio in (0.0, 0.3, 0.5, 0.7, 0.9)},
        **{f"{ratio}, in the time of 0.7": Variant(mask_ratio=ratio, share=share)   # 200 steps: 69, 130, 440
           for ratio, share in ((0.0, 0.345), (0.5, 0.65), (0.9, 2.2))}}),
    "projection": ("Table 11", {
        "from zero, gates": Variant(), "random": Variant(change=random_projection),
        "none": Variant(change=no_projection), "from zero, sums": Variant(gated=False),
        "from zero, branch alone": Variant(change=branch_alone),
        "from zero, concatenation": Variant(encoder=Concatenated)}),
    "kept": ("Tables 7 and 11, what CLIP knew", {
        "as released": Variant(few=True), "the same, tested with sums": Variant(few=True, sums_after=True),
        "sums": Variant(few=True, gated=False), "branch alone": Variant(few=True, change=branch_alone),
        "VTC": Variant(few=True, losses=VTC), "1 : 1 : 1": Variant(few=True, losses=(1, 1, 1)),
        "random projection": Variant(few=True, change=random_projection),
        "as released, copied layers slower": Variant(few=True, copied=2),
        "random projection, copied layers slower": Variant(few=True, copied=2, change=random_projection)}),
    "related": ("Table 10", {   # the others know no mask, and no loss but VTC
        "branch": Variant(), "branch, VTC, nothing hidden": Variant(mask_ratio=0.0, losses=VTC),
        "STAN's shape: sums": Variant(mask_ratio=0.0, losses=VTC, gated=False),
        "ST-Adapter's shape": Variant(5, mask_ratio=0.0, losses=VTC, encoder=InsideCLIP,
                                      change=bottlenecks)})}


# -------------------------------------------------------------------------------- what CLIP saw
LAYERS, FRAMES = 6, 8   # that are kept


def captions(cfg, split):
    return os.path.join(cfg.data, f"{split}_captions.jsonl")


def saw(cfg, split):
    """What the frozen CLIP says about every clip of a split, computed once -> {"states": (clips, LAYERS,
    FRAMES, 1+N, D) float16, "text": (clips, P)}; of the test world also "static": see static_features, and
    "looks": (64, P) of every colour with every shape."""
    annotations, store = captions(cfg, split), Store(cfg.out, prefix=f"{split}_")
    key = [state_of(cfg.clip), state_of(annotations), LAYERS, FRAMES, "looks"]
    if not store.get(key):
        clip, tokenizer = load_clip(cfg.clip)
        encoder, clips = VideoEncoder(clip.float(), None), read_clips(annotations)
        size, rows = clip.config.image_size, data.read_captions(annotations)
        dataset = data.RetrievalDataset(rows, cfg.data, FRAMES, size)
        batches = tqdm(DataLoader(dataset, 64, num_workers=1), desc=f"see {split}")
        states = [torch.stack(backbone_states(clip, pixels, LAYERS), dim=1).half() for pixels, _ in batches]

        def encode_text(texts):
            return encode_texts(encoder, tokenizer, texts, 32, torch.device("cpu"))
        tensors = {"states": torch.cat(states), "text": encode_text([clip.caption for clip in clips])}
        if split == "test":
            tensors["static"] = static_features(clips, encode_text)
            tensors["looks"] = encode_text([f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES])
        store.put(key, tensors)
    return store.get(key)[0]


def last_states(seen, index, depth, kept=None):
    """The last `depth` layers of some clips -> [(B, FRAMES, 1+n, D)]; of the patches `kept` (B, n) only."""
    layers = seen["states"][index][:, -depth:].float().unbind(1)   # (B, FRAMES, 1+N, D) each
    if kept is None:
        return list(layers)
    visible = F.pad(kept + 1, (1, 0)).repeat_interleave(FRAMES, dim=0)   # (B * FRAMES, 1+n): CLS is token 0
    return [pick(layer.flatten(0, 1), visible).unflatten(0, (-1, FRAMES)) for layer in layers]


# -------------------------------------------------------------------------------- a run
BATCH, LR = 64, 1e-5   # clips a step, twins side by side; base learning rate, as in runs/tiny.sh


def teach(cfg, variant, seed):
    """The recipe of pretrain.py, annealed -> the encoder after its share of cfg.steps."""
    clip, seen = load_clip(cfg.clip)[0].float(), saw(cfg, "train")
    torch.manual_seed(seed)
    branch = Branch.beside(clip, variant.depth, gated=variant.gated, drop_path=0.1)
    model = Pretraining(variant.encoder(clip, branch))
    variant.change(branch)   # last: what it draws must not change what the others begin with
    learned = {"btadapter_T_layers": 100, "balance": 100, "btadapter_S_layers": variant.copied,
               "btadapter": 10, "extra_proj": 10}   # factors of LR: the first that fits counts
    factors = [{"params": [p], "factor": next(f for part, f in learned.items() if part in name)}
               for name, p in model.named_parameters() if p.requires_grad]
    clips, steps = read_clips(captions(cfg, "train")), round(variant.share * cfg.steps)
    rows = torch.tensor([i for i, clip in enumerate(clips) if not variant.few or few_looks(clip)])
    batch_size = min(BATCH, len(rows))   # of a small world all clips
    epoch_steps = len(rows) // batch_size

    def loss_of(step):
        epoch, at = divmod(step, epoch_steps)
        pairs = np.random.default_rng([seed, epoch]).permutation(len(rows) // 2)   # of twins
        order = (torch.from_numpy(pairs)[:, None] * 2 + torch.arange(2)).flatten()
        index = rows[order[at * batch_size:][:batch_size]]
        kept = tube_mask(len(index), clip.config.patch_tokens, variant.mask_ratio)
        video, patches, mbta = model(last_states(seen, index, variant.depth, kept), kept)
        parts = vtc_loss(video, seen["text"][index]), mbca_loss(patches, seen["text"][index]), mbta
        return sum(weight * part for weight, part in zip(variant.losses, parts)), ""
    fit(f"{cfg.stage}, seed {seed}", factors, loss_of, steps, max(1, steps // 10), seed, LR, clip_norm=5.0)
    if variant.sums_after:
        branch.balance1 = branch.balance2 = None
    return model.encoder.eval()


@torch.no_grad()
def evaluate(cfg, depth, feature):
    """feature(last states) -> (B, P). -> {"twins", "static", "R@1", "kept"} of the test world, in percent.
    kept: of clips without `few_looks`, how many are nearest to their own of the 64 looks."""
    seen, clips = saw(cfg, "test"), read_clips(captions(cfg, "test"))
    index = torch.arange(len(clips)).split(128)
    video = torch.cat([feature(last_states(seen, part, depth)) for part in index])
    video = F.normalize(video, dim=-1)   # (clips, P)
    look = torch.tensor([8 * list(COLOURS).index(clip.colour) + SHAPES.index(clip.shape) for clip in clips])
    nearest = (video @ seen["looks"].T).argmax(1)
    return {"twins": 100 * twin_accuracy(video, seen["text"]).mean().item(),
            "static": 100 * static_accuracy(video, clips, seen["static"]),
            "R@1": retrieval_metrics(seen["text"] @ video.T)["R@1"],
            "kept": 100 * (nearest == look)[[not few_looks(clip) for clip in clips]].float().mean().item()}


def run(cfg, name, seed):
    """Teaches and tests a variant, unless that is done already -> evaluate's. One thread: a branch is too
    small for two, and two processes do 1.8 times as much."""
    torch.set_num_threads(1)
    variant, store = STUDIES[cfg.stage][1][name], Store(os.path.join(cfg.out, "runs"))
    key = [*dataclasses.astuple(variant)[:-2], variant.encoder.__name__, variant.change.__name__, seed,
           cfg.steps, state_of(cfg.clip), state_of(captions(cfg, "train"))]   # all but the code
    if not store.get(key):
        encoder = teach(cfg, variant, seed)
        found = evaluate(cfg, variant.depth, lambda states: encoder.feature(states)[0])
        store.put(key, {}, {"found": json.dumps(found)})
    return json.loads(store.get(key)[1]["found"])


# -------------------------------------------------------------------------------- a study
def main(cfg):
    """Every variant of a study with every seed; then the table, and a picture of its main column."""
    if cfg.stage not in STUDIES:
        raise cli.UserError(f"{cfg.stage}: no such study; choose one of {', '.join(STUDIES)}")
    saw(cfg, "train")   # now, since every process will want it
    project, (where, variants) = load_clip(cfg.clip)[0].float().project_image, STUDIES[cfg.stage]
    mean = evaluate(cfg, 1, lambda states: project(states[0][:, :, 0]).mean(1))
    jobs = [(cfg, name, seed) for seed in range(cfg.seeds) for name in variants]
    if cfg.processes > 1:
        with torch.multiprocessing.get_context("spawn").Pool(cfg.processes, *QUIET) as pool:
            found = pool.starmap(run, jobs, chunksize=1)
    else:
        found = [run(*job) for job in jobs]
    print(f"\n{cfg.stage} (the paper's {where}), {cfg.steps} steps, held-out clips, {cfg.seeds} seeds: "
          "mean (lowest to highest), in percent\n")
    runs = {"mean-pooled CLIP": [mean], **{name: found[i::len(variants)] for i, name in enumerate(variants)}}
    cli.table(["", *mean], [[name, *(spread([row[column] for row in rows]) for column in mean)]
                            for name, rows in runs.items()])
    column = "kept" if cfg.stage == "kept" else "R@1"
    drawn = {name: [row[column] for row in rows] for name, rows in runs.items()}
    bars = [(name, sum(found) / len(found), min(found), max(found)) for name, found in drawn.items()]
    cli.make_folder(cfg.pictures)
    pictures.bars(os.path.join(cfg.pictures, f"ablate_{cfg.stage}.png"),
                  f"{cfg.stage}: {column} in %, held-out clips ({cfg.seeds} seeds)", bars)


if __name__ == "__main__":
    cli.run(main, CONFIG)
