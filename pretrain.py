"""Stage 1: teach the branch from video-text pairs, beside a frozen CLIP, with 70 % of its tokens hidden.

    python pretrain.py --clip weights/tiny/clip --annotations out/shapes/train_captions.jsonl --root out/shapes \\
        --out out/branch --lr 1e-5 --anneal --batch_size 64 --together 2 --steps 800 --min_area 0.8      # a laptop, 10 minutes
    torchrun --nproc_per_node 8 pretrain.py --clip weights/clip --annotations results_2M_train.csv --root WebVid \\
        --out out/branch --workers 8                                                 # the released run

In --out: branch.pth (the branch in half precision, under the released names), last.pth (with the optimizer; the same
command goes on from it), log.jsonl, curve.png.
Every random number follows from the seed and the step, so a resumed run equals an undisturbed one, bit for bit on a CPU.
"""
import dataclasses
import itertools
import math
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
import data
from clip import load_clip
from eval_retrieval import SETTINGS, encode, retrieval_metrics
from model import LOSS_WEIGHTS, Branch, Pretraining, VideoEncoder, branch_tensors, tube_mask


@dataclasses.dataclass
class Config:
    clip: str                        # CLIP: a Hugging Face folder or OpenAI's ViT-L-14.pt
    annotations: str                 # WebVid's CSV, or a JSONL of {"video", "caption"}
    root: str                        # folder that the videos' names are relative to
    out: str                         # folder for checkpoint, log and curve
    # model
    depth: int = 4                   # layers of the branch
    gated: bool = True               # learnable gates between branch and CLIP (else sums)
    drop_path: float = 0.1           # stochastic depth of the branch's last layer; earlier ones less
    mask_ratio: float = 0.7          # patches hidden from the branch, the same ones in every frame
    losses: str = "released"         # weights of VTC, MBCA, MBTA: released (1, 0.1, 0.8) or paper (1, 1, 1)
    # data
    num_frames: int = 8              # frames of a clip
    min_area: float = 0.08           # least share of the picture that a training crop keeps
    text_length: int = 64            # tokens of a caption that are read
    together: int = 1                # neighbouring lines of the annotations that always share a batch (2: twins)
    workers: int = 1                 # decoding processes, for each training process
    # optimizer
    batch_size: int = 416            # clips a step, over all processes
    lr: float = 2e-6                 # base; x10 for the spatial layers, x100 for the temporal layers and gates
    weight_decay: float = 0.05       # on everything, as in the released run
    clip_norm: float = 5.0           # of the gradient of all parameters together
    epochs: int = 1                  # passes over the data
    steps: int = 0                   # steps in all, instead of epochs
    anneal: bool = False             # lower the learning rate to zero (the released run ends at 97 % of its peak)
    # run
    eval_annotations: str = ""       # a retrieval set to watch, under the same --root
    eval_every: int = 500            # steps between looks at it
    save_every: int = 200            # steps between checkpoints
    log_every: int = 10              # steps between log lines
    seed: int = 0                    # every random number follows from it
    device: str = "auto"             # cpu, cuda or auto
    amp: bool = True                 # half precision on a GPU


LR_FACTORS = {"btadapter_T_layers": 100, "balance": 100, "btadapter": 10, "extra_proj": 10}   # the first that fits a name


def lr_share(step, epoch_steps, steps, anneal):
    """Share of the peak at a step. Released: up from 5 % over half an epoch, then a cosine 4.5 epochs long that one epoch
    barely enters. Annealed: up over a tenth of the run, then a cosine to zero."""
    if anneal:
        return common.warmup_cosine(step, steps, max(1, steps // 10))
    half = max(2, epoch_steps // 2)
    if step < half:
        return 0.05 + 0.95 * step / (half - 1)
    return 0.5 * (1 + math.cos(math.pi * min(1, (step - half) / (4.5 * epoch_steps))))


def batches(n, batch_size, together, seed, start, rank, size):
    """Endless lists of this rank's indices, from step `start` on: a fresh order every epoch, incomplete batches left out."""
    groups = np.arange(n - n % together).reshape(-1, together)
    per_epoch = n // batch_size
    for step in itertools.count(start):
        epoch, k = divmod(step, per_epoch)
        order = groups[np.random.default_rng([seed, epoch]).permutation(len(groups))].ravel()
        yield [(epoch, int(i)) for i in order[k * batch_size + rank:(k + 1) * batch_size:size]]


def curve(path, log):
    common.plot(path, [("pretraining: loss", {name: log.column(name) for name in ("loss", "vtc", "mbca", "mbta")}),
                       ("text to video R@1, %", {name: log.column(f"R@1 {name}") for name in ("branch", "mean-pooled CLIP")})])


def main(cfg):
    # ------------------------------------------------------------------------------------------------ setup
    here = common.start_distributed(cfg.device)
    device = here.device
    common.at_least(cfg, batch_size=2, together=1, depth=2, num_frames=1, seed=0, steps=0, epochs=1, save_every=1, log_every=1,
                    eval_every=1, mask_ratio=0)
    if cfg.mask_ratio >= 1:
        raise common.UserError(f"--mask_ratio {cfg.mask_ratio}: must be less than 1, or the branch sees nothing")
    if cfg.losses not in LOSS_WEIGHTS:
        raise common.UserError(f"--losses {cfg.losses}: choose one of {', '.join(LOSS_WEIGHTS)}")
    if cfg.batch_size % (here.size * cfg.together):
        raise common.UserError(f"--batch_size {cfg.batch_size}: not a multiple of {here.size} processes x {cfg.together} together")
    common.make_folder(cfg.out)
    torch.manual_seed(cfg.seed)
    # ------------------------------------------------------------------------------------------------ data
    clip, tokenizer = load_clip(cfg.clip)
    size = clip.config.image_size
    dataset = data.CaptionDataset(cfg.annotations, cfg.root, cfg.num_frames, size, tokenizer,
                                  min(cfg.text_length, clip.config.context_length), cfg.seed, cfg.min_area)
    epoch_steps = len(dataset) // cfg.batch_size
    if epoch_steps == 0:
        raise common.UserError(f"--batch_size {cfg.batch_size}: more than the {len(dataset)} clips of {cfg.annotations}")
    steps = cfg.steps or cfg.epochs * epoch_steps
    # ------------------------------------------------------------------------------------------------ model
    if cfg.depth > clip.config.vision_layers:
        raise common.UserError(f"--depth {cfg.depth}: this CLIP has {clip.config.vision_layers} layers")
    branch = Branch.beside(clip, cfg.depth, gated=cfg.gated, drop_path=cfg.drop_path)
    if cfg.num_frames > len(branch.btadapter_time_embed.weight):
        raise common.UserError(f"--num_frames {cfg.num_frames}: the branch has {len(branch.btadapter_time_embed.weight)} time positions")
    model = Pretraining(VideoEncoder(clip.float(), branch)).to(device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # ------------------------------------------------------------------------------------------------ optimizer
    factors = {name: next(f for key, f in LR_FACTORS.items() if key in name) for name in trained}
    optimizer = torch.optim.AdamW([{"params": [p for n, p in trained.items() if factors[n] == f], "factor": f}
                                   for f in sorted(set(factors.values()))],
                                  lr=cfg.lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=cfg.weight_decay)
    half = cfg.amp and device.type == "cuda"
    scaler = torch.amp.GradScaler(enabled=half)
    step, skipped, last = 0, 0, os.path.join(cfg.out, "last.pth")
    if os.path.exists(last):
        step, skipped = restore(last, model, optimizer, scaler, cfg)
    log = common.Log(os.path.join(cfg.out, "log.jsonl"), step) if here.first else None
    ddp = nn.parallel.DistributedDataParallel(model) if here.size > 1 else model
    loader = iter(DataLoader(dataset, batch_sampler=batches(len(dataset), cfg.batch_size, cfg.together, cfg.seed, step,
                             here.rank, here.size), num_workers=cfg.workers, collate_fn=data.collate_skip))
    # ------------------------------------------------------------------------------------------------ evaluation
    watched = cfg.eval_annotations and data.RetrievalDataset(cfg.eval_annotations, cfg.root, cfg.num_frames, size, mode="uniform")

    def evaluate():
        branch_features, mean, text, _ = encode(model.encoder, tokenizer, watched, SETTINGS["own"], device, amp=half)
        log.add(step=step, **{f"R@1 {name}": round(retrieval_metrics(text @ video.T)["R@1"], 2)
                              for name, video in (("branch", branch_features), ("mean-pooled CLIP", mean))})
    # ------------------------------------------------------------------------------------------------ loop
    bar = tqdm(total=steps, initial=step, desc="pretrain", disable=not here.first)
    waited, began = 0.0, time.time()
    while step < steps:
        ready = time.time()
        batch = next(loader)
        waited += time.time() - ready
        skipped += len(batch["skipped"])
        for message in batch["skipped"]:
            bar.write(f"skipped: {message}", file=sys.stderr)
        count = torch.tensor(len(batch["index"]), device=device)
        if here.size > 1:   # every process must bring as many clips as the others
            dist.all_reduce(count, dist.ReduceOp.MIN)
        if count < 2:
            raise common.UserError(f"{cfg.annotations}: a batch with fewer than 2 readable videos under {cfg.root}")
        video, ids = (batch[key][:count].to(device, non_blocking=True) for key in ("video", "ids"))
        common.seed_step(cfg.seed, step, here.rank)
        kept = tube_mask(len(video), clip.config.patch_tokens, cfg.mask_ratio).to(device) if cfg.mask_ratio else None
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * group["factor"] * lr_share(step, epoch_steps, steps, cfg.anneal)
        with torch.autocast(device.type, torch.float16, enabled=half):
            parts = ddp(video, ids, kept)
            loss = sum(weight * part for weight, part in zip(LOSS_WEIGHTS[cfg.losses], parts))
        if not torch.isfinite(loss):
            raise common.UserError(f"step {step}: the loss is {loss.item()}; videos: "
                                   f"{', '.join(dataset.videos[i] for i in batch['index'][:count].tolist())}; {last} is kept")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained.values(), cfg.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        step += 1
        # -------------------------------------------------------------------------------------------- log and save
        if here.first:
            if step % cfg.log_every == 0 or step == steps:
                vtc, mbca, mbta = (part.item() for part in parts)
                log.add(step=step, loss=loss.item(), vtc=vtc, mbca=mbca, mbta=mbta, grad_norm=norm.item(), skipped=skipped,
                        lr=cfg.lr * lr_share(step - 1, epoch_steps, steps, cfg.anneal))
                bar.set_postfix_str(f"loss {loss.item():.3f} vtc {vtc:.3f} mbca {mbca:.3f} mbta {mbta:.3f} "
                                    f"wait {waited / (time.time() - began):.0%} skipped {skipped}")
            if watched and (step % cfg.eval_every == 0 or step == steps):
                evaluate()
            if step % cfg.save_every == 0 or step == steps:
                common.save_checkpoint(last, {
                    "state_dict": {**branch_tensors(branch, "backbone."), **branch_tensors(model.extra_proj, "extra_proj.")},
                    "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step, "skipped": skipped,
                    "config": dataclasses.asdict(cfg)})
                common.save_checkpoint(os.path.join(cfg.out, "branch.pth"), {
                    "state_dict": branch_tensors(branch, "backbone.", torch.float16)})
                curve(os.path.join(cfg.out, "curve.png"), log)
        bar.update()
    bar.close()
    if here.size > 1:
        dist.destroy_process_group()


def restore(path, model, optimizer, scaler, cfg):
    """Puts a checkpoint of this script back -> its step, videos skipped so far. Raises UserError if it is of another run."""
    saved = common.load_checkpoint(path)
    common.check_same_run(saved, path, cfg)
    weights_now = {f"backbone.{n}": p for n, p in model.encoder.branch.state_dict().items()}
    weights_now |= {f"extra_proj.{n}": p for n, p in model.extra_proj.state_dict().items()}
    common.put_back(weights_now, saved["state_dict"], path)
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    return saved["step"], saved["skipped"]


if __name__ == "__main__":
    common.run(main, Config)
