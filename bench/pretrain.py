"""A step of pretraining at the size of ViT-L/14: two clips of 8 frames and random weights, nothing decoded.

The physical limit is the machine's own product of matrices, in the size of CLIP's first MLP layer, measured
in the same process.
"""
import statistics
import time

import torch

from bench.measure import call, heading, multiplying, table
from clip import CLIP, CLIPConfig
from model import Branch, Pretraining, VideoEncoder, mbca_loss, tube_mask, vtc_loss
from plumbing import cli


def training_steps(mask_ratio, c=CLIPConfig(), count=3):
    """-> [[s in CLIP, s in the branch] of a step], multiplications and additions/s of the machine."""
    torch.manual_seed(0)
    clip = CLIP(c)
    model = Pretraining(VideoEncoder(clip, Branch.beside(clip, drop_path=0.1)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    video = torch.randint(256, (2, 8, 3, c.image_size, c.image_size), dtype=torch.uint8)
    ids, rows = torch.randint(c.vocab_size, (2, min(64, c.context_length))), []
    for _ in range(count):
        kept = tube_mask(2, c.patch_tokens, mask_ratio)
        began = time.perf_counter()
        states, text = model.see(video, ids, kept)
        seen = time.perf_counter()
        feature, patches, mbta = model(states, kept)
        loss = vtc_loss(feature, text) + 0.1 * mbca_loss(patches, text) + 0.8 * mbta
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rows.append([seen - began, time.perf_counter() - seen])   # the first warms up
    return rows[1:], multiplying(16 * (1 + c.patch_tokens), c.vision_width, c.vision_mlp)


def trunk_work(frames=16, layers=24, tokens=257, width=1024):
    """Multiplications and additions of CLIP's image tower: projections, MLP and attention."""
    return frames * layers * (24 * tokens * width ** 2 + 4 * tokens ** 2 * width)


def pretrain(cfg):
    """A step with the tube mask and without."""
    heading(cfg)
    found = {0.7: [], 0.0: []}
    for run in range(cfg.runs):
        for ratio, rows in found.items():
            cli.say(f"{ratio:.0%} hidden, {run + 1} of {cfg.runs}")
            (steps, limit), _, peak = call(training_steps, ratio)
            rows += [[see + learn, see, learn, trunk_work() / see / limit, peak] for see, learn in steps]
    table(["patches hidden", "s a step", "s in frozen CLIP", "s in the branch",
           "CLIP's share of the machine's product", "MB without imports"],
          [[f"{ratio:.0%}", *map(statistics.median, zip(*rows))] for ratio, rows in found.items()])
