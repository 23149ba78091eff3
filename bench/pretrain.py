"""A step of pretraining at the size of ViT-L/14: two clips of 8 frames and random weights, nothing decoded.

The physical limit is the machine's own product of matrices, in the size of CLIP's first MLP layer, measured
in the same process.
"""
import statistics

from bench.measure import call, present, say, table


def training_steps(mask_ratio, count, sizes):
    """-> ([[s in CLIP, s in the branch] of a step], multiplications and additions/s)."""
    import time

    import torch

    import clip
    import model
    torch.manual_seed(0)
    towers = clip.CLIP(clip.CLIPConfig(**sizes))
    learner = model.Pretraining(model.VideoEncoder(towers, model.Branch.beside(towers, drop_path=0.1)))
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=1e-6)
    c = towers.config
    video = torch.randint(256, (2, 8, 3, c.image_size, c.image_size), dtype=torch.uint8)
    ids, rows = torch.randint(c.vocab_size, (2, min(64, c.context_length))), []
    for _ in range(count):
        kept = model.tube_mask(2, c.patch_tokens, mask_ratio)
        began = time.perf_counter()
        states, text = learner.see(video, ids, kept)
        seen = time.perf_counter()
        feature, patches, mbta = learner(states, kept)
        loss = model.vtc_loss(feature, text) + 0.1 * model.mbca_loss(patches, text) + 0.8 * mbta
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rows.append([seen - began, time.perf_counter() - seen])
    x, w = torch.randn(16 * (1 + c.patch_tokens), c.vision_width), torch.randn(c.vision_mlp, c.vision_width)
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < 2:
        torch.nn.functional.linear(x, w)
        products += 1
    speed = products * 2 * x.numel() * c.vision_mlp / (time.perf_counter() - began)
    return rows[1:], speed   # the first step warms up


def trunk_flops(frames=16, layers=24, tokens=257, width=1024):
    """Multiplications and additions of CLIP's image tower: projections, MLP and attention."""
    return frames * layers * (24 * tokens * width ** 2 + 4 * tokens ** 2 * width)


def pretrain(cfg):
    """A step with the tube mask and without."""
    present(cfg)
    found = {0.7: [], 0.0: []}
    for run in range(cfg.runs):
        for ratio, rows in found.items():
            say(f"{ratio:.0%} hidden, {run + 1} of {cfg.runs}")
            (steps, limit), _, peak = call("a step", training_steps, arguments=[ratio, 3, {}])
            rows += [[see + learn, see, learn, trunk_flops() / see / limit, peak] for see, learn in steps]
    medians = {f"{ratio:.0%}": [*map(statistics.median, zip(*rows))] for ratio, rows in found.items()}
    table(["patches hidden", "s a step", "s in frozen CLIP", "s in the branch",
           "CLIP's share of the machine's product", "peak MB"],
          [[ratio, *cells] for ratio, cells in medians.items()])
