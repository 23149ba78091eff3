"""A step of pretraining at the size of ViT-L/14: two clips of 8 frames and random weights, as tensors, so that nothing is decoded.

The physical limit is the machine's own product of matrices, in the size and precision of CLIP's first MLP layer, measured in the same process.
"""
import statistics
import sys

from bench.measure import call, present, say


def training_steps(precision, mask_ratio, checkpointed, count, sizes):   # sent to a process of its own, too
    import time

    import torch

    import clip
    import model
    import pretrain
    dtype = pretrain.PRECISIONS[precision]
    torch.manual_seed(0)
    with torch.device("meta"):
        towers = clip.CLIP(clip.CLIPConfig(**sizes))
    towers.load_state_dict({name: torch.randn(t.shape, dtype=dtype) * 0.02 for name, t in towers.state_dict().items()}, assign=True)
    branch = model.Branch.beside(towers, drop_path=0.1, checkpointed=checkpointed)
    learner = model.Pretraining(model.VideoEncoder(pretrain.lighten(towers, dtype), branch))
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=1e-6)
    c = towers.config
    video = torch.randint(256, (2, 8, 3, c.image_size, c.image_size), dtype=torch.uint8)
    ids = torch.randint(c.vocab_size, (2, min(64, c.context_length)))

    def clock():
        return time.perf_counter(), time.process_time()
    rows = []
    for _ in range(count):
        kept = model.tube_mask(2, c.patch_tokens, mask_ratio)
        moments = [clock()]
        states, text = learner.see(video, ids, kept)
        moments.append(clock())
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features, patches, mbta = learner(states, kept)
        (model.vtc_loss(features, text) + 0.1 * model.mbca_loss(patches, text) + 0.8 * mbta).backward()
        moments.append(clock())
        optimizer.step()
        moments.append(clock())
        rows.append([[after - before for before, after in zip(a, b)] for a, b in zip(moments, moments[1:])])   # [part][wall, CPU]
    # the limit: the same number of rows and columns as the first MLP layer has for these 16 frames
    x, w = torch.randn(16 * (1 + c.patch_tokens), c.vision_width, dtype=dtype), torch.randn(c.vision_mlp, c.vision_width, dtype=dtype)
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < 2:
        torch.nn.functional.linear(x, w)
        products += 1
    return rows[1:], products * 2 * x.numel() * c.vision_mlp / (time.perf_counter() - began)   # the first step warms up


def trunk_flops(frames=16, layers=24, tokens=257, width=1024):
    """Multiplications and additions of CLIP's image tower: projections and MLP, then attention. Patches and norms are left out."""
    return frames * layers * (24 * tokens * width ** 2 + 4 * tokens ** 2 * width)


def pretrain(cfg):
    """A step with the tube mask and without, for each precision."""
    present(cfg, [])
    cases = {(precision, ratio, checkpointed): [] for precision in ("fp32", "bf16") for ratio, checkpointed in ((0.7, False), (0.0, False), (0.7, True))}
    for run in range(cfg.runs):
        for case in cases:
            say(f"{case}, {run + 1} of {cfg.runs}")
            (steps, limit), peak = call(sys.executable, f"a step of {case}", training_steps, arguments=[*case, 3, {}])
            for parts in steps:
                wall, cpu = zip(*parts)
                cases[case].append([sum(wall), sum(cpu), *wall, trunk_flops() / wall[0] / 1e9, limit / 1e9, peak])
    medians = {case: [statistics.median(column) for column in zip(*rows)] for case, rows in cases.items()}
    print("| precision | mask | branch checkpointed | s a step | CPU s | s in frozen CLIP | s in the branch | s in AdamW | to no mask | CLIP, GFLOP/s "
          "| matrix product, GFLOP/s | CLIP / product | peak MB |\n|" + "---|" * 13)
    for (precision, ratio, checkpointed), (wall, cpu, look, learn, adam, speed, limit, peak) in medians.items():
        print(f"| {precision} | {ratio} | {'yes' if checkpointed else 'no'} | {wall:.2f} | {cpu:.2f} | {look:.2f} | {learn:.2f} | {adam:.2f} | "
              f"{wall / medians[precision, 0.0, False][0]:.2f} | {speed:.0f} | {limit:.0f} | {speed / limit:.2f} | {peak:.0f} |")
