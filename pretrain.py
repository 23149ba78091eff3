"""Stage 1: teach the branch from video-text pairs, beside a frozen CLIP, with 70 % of its tokens hidden.

    python pretrain.py              # the toy world of `python -m toy render`: ten minutes on two cores
    torchrun --nproc_per_node 8 pretrain.py --clip weights/released/clip --annotations results_2M_train.csv \\
        --root WebVid --workers 8   # the released run

In --out: branch.pth (the branch in half precision, under the released names), branch_best.pth (the same, of
the best evaluation on --eval_annotations), last.pth (with the optimizer), log.jsonl and curve.png. Each
evaluation is printed, mean-pooled CLIP beside the branch.

Whatever stops a run, the same command goes on from last.pth. Every random number follows from the seed and
the step, so the run then equals an undisturbed one, bit for bit on a CPU. SIGTERM saves after the step or
evaluation that is under way (torchrun waits 30 s for it) and ends with exit code 143.
"""
import dataclasses
from typing import Annotated

from plumbing import cli
from plumbing.cli import Amount, Count, Rate, Share, Whole

Recipe = Annotated[str, "released", "paper", "toy"]
Pairs = Annotated[int, 2, 10 ** 9]   # of clip and caption: one alone has nothing to be contrasted with


@dataclasses.dataclass
class Config:
    recipe: Recipe | None = None     # whose settings, for flags that are not given
    clip: str | None = None          # CLIP: a Hugging Face folder or OpenAI's ViT-L-14.pt
    annotations: str | None = None   # WebVid's CSV, or a JSONL of {"video", "caption"}; else the toy world
    root: str | None = None          # folder that the videos' names are relative to
    out: str = "out/branch"          # folder for checkpoints, log and curve
    # model
    depth: Annotated[int, 2, 99] = 4   # layers of the branch
    gated: bool = True               # learnable gates between branch and CLIP (else sums)
    drop_path: Rate = 0.1            # stochastic depth of the branch's last layer; earlier ones less
    mask_ratio: Rate = 0.7           # patches hidden from the branch, the same ones in every frame
    mbca_weight: Amount | None = None   # of the loss MBCA (Eq. 8); VTC (Eq. 6) has 1
    mbta_weight: Amount | None = None   # of the loss MBTA (Eq. 7)
    # data
    num_frames: Count = 8            # frames of a clip
    min_area: Share | None = None    # least share of the picture that a training crop keeps
    text_length: Count | None = None   # tokens of a caption that are read
    together: Count | None = None    # neighbouring lines that always share a batch (2: twins)
    workers: Whole = 1               # decoding processes, for each training process
    # optimizer
    batch_size: Pairs | None = None  # clips a step, over all processes; each is contrasted with all others
    lr: Amount | None = None         # base, for what the recipe gives no factor
    weight_decay: Amount = 0.05      # on everything, as in the released run
    clip_norm: Amount = 5.0          # of the gradient of all parameters together
    epochs: Count | None = None      # passes over the data
    steps: Count | None = None       # steps in all, instead of epochs
    anneal: bool | None = None       # lower the learning rate to zero (as released: to 97 % of its peak)
    # run
    eval_annotations: str | None = None   # a retrieval set to watch, under the same --root
    eval_every: Whole | None = None  # steps between evaluations on it; 0: an epoch
    save_every: Count = 200          # steps between checkpoints
    log_every: Count = 10            # steps between log lines
    seed: Whole = 0                  # every random number follows from it
    device: cli.Device = "auto"      # where to compute
    precision: cli.Precision = "auto"   # auto: fp32 on a CPU, bf16 on a GPU that has it
    checkpointed: bool = False       # keep less of the branch for the gradient, and compute it twice


if __name__ == "__main__":
    CONFIG = cli.start(Config)   # before the slow imports: a typing error shows at once

import math
import os
import time

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from clip import load_clip
from metrics import retrieval_metrics, twin_accuracy
from model import (Branch, Pretraining, VideoEncoder, branch_tensors, encode_pairs, mbca_loss, tube_mask,
                   vtc_loss)
from plumbing import memory, pictures, training
from plumbing.cli import UserError

# docs/paper-vs-code.md says why paper and code differ. factors: of the learning rate, by a part of a name
RELEASED = {"mbca_weight": 0.1, "mbta_weight": 0.8, "min_area": 0.08, "text_length": 64, "together": 1,
            "batch_size": 416, "lr": 2e-6, "epochs": 1, "steps": 0, "anneal": False, "eval_annotations": "",
            "eval_every": 0,
            "factors": {"btadapter_T_layers": 100, "balance": 100, "btadapter": 10, "extra_proj": 10}}
RECIPES = {
    "released": RELEASED,
    "paper": RELEASED | {"mbca_weight": 1.0, "mbta_weight": 1.0, "text_length": 32, "batch_size": 640,
                         "factors": {}},
    "toy": RELEASED | {"clip": cli.shipped("weights/tiny/clip"), "root": "out/shapes",
                       "annotations": "out/shapes/train_captions.jsonl", "min_area": 0.8, "together": 2,
                       "batch_size": 64, "lr": 1e-5, "steps": 400, "anneal": True, "eval_every": 400,
                       "eval_annotations": "out/shapes/test_captions.jsonl"}}
NAMES = ("mean-pooled CLIP", "branch")   # what is compared


def complete(cfg):
    """A Config with its recipe's settings in the place of None. Raises UserError."""
    cfg = dataclasses.replace(cfg, recipe=cfg.recipe or ("released" if cfg.annotations else "toy"))
    cfg = cli.fill(cfg, RECIPES[cfg.recipe])
    if cfg.recipe == "toy" and not os.path.exists(cfg.annotations):
        raise UserError(f"{cfg.annotations}: not there; `python -m toy render` makes it")
    return cfg


def lr_share(step, epoch_steps, steps, anneal):
    """Share of the peak at a step. Released: up from 5 % over half an epoch, then a cosine 4.5 epochs long,
    which one epoch barely enters. Annealed: up over a tenth of the run, then a cosine to zero."""
    if anneal:
        return training.warmup_cosine(step, steps, max(1, steps // 10))
    half = max(2, epoch_steps // 2)
    if step < half:
        return 0.05 + 0.95 * step / (half - 1)
    return 0.5 * (1 + math.cos(math.pi * min(1, (step - half) / (4.5 * epoch_steps))))


def weighted(cfg, vtc, mbca, mbta):
    return vtc + cfg.mbca_weight * mbca + cfg.mbta_weight * mbta


def evaluate(cfg, model, tokenizer, watched, here, dtype):
    """-> {"R@1 branch", "R@1 mean-pooled CLIP": percent}; in the toy world also twin accuracy."""
    branch, mean, text = encode_pairs(model.encoder, tokenizer, watched, here.device, workers=cfg.workers,
                                      amp=dtype == torch.float16)
    found = {}
    for name, video in zip(NAMES, (mean, branch)):
        found[f"R@1 {name}"] = round(retrieval_metrics(text @ video.T)["R@1"], 2)
        if cfg.recipe == "toy":
            found[f"twins {name}"] = round(100 * twin_accuracy(video, text).mean().item(), 2)
    return found


def save_branch(path, branch):
    training.save_checkpoint(path, {"state_dict": branch_tensors(branch, "backbone.", torch.float16)})


def main(cfg):
    # ----------------------------------------------------------------------------------------------- setup
    cfg = complete(cfg)
    here = training.start_distributed(cfg.device)
    device, first = here.device, here.rank == 0
    dtype = training.pick_precision(cfg.precision, device)
    multiple = math.lcm(here.size, cfg.together)
    if cfg.batch_size % multiple:
        raise UserError(f"--batch_size {cfg.batch_size}: not a multiple of {here.size} processes and of "
                        f"{cfg.together} together")
    if first:
        training.take_folder(cfg.out)
    torch.manual_seed(cfg.seed)
    # ------------------------------------------------------------------------------------------------ data
    clip, tokenizer = load_clip(cfg.clip)
    size, length = clip.config.image_size, min(cfg.text_length, clip.config.context_length)
    dataset = data.CaptionDataset(cfg.annotations, cfg.root, cfg.num_frames, size, tokenizer, length,
                                  cfg.seed, cfg.min_area)
    epoch_steps = len(dataset) // cfg.batch_size
    if epoch_steps == 0:
        raise UserError(f"--batch_size {cfg.batch_size}: {cfg.annotations} has only {len(dataset)} clips")
    steps = cfg.steps or cfg.epochs * epoch_steps
    if steps > 5 * epoch_steps and not cfg.anneal:
        raise UserError(f"{steps} steps are {steps / epoch_steps:.1f} epochs, but the released schedule ends "
                        "at zero after 5; use --anneal")
    watched = cfg.eval_annotations and data.RetrievalDataset(data.read_captions(cfg.eval_annotations),
                                                             cfg.root, cfg.num_frames, size)
    # ----------------------------------------------------------------------------------------------- model
    if cfg.depth > clip.config.vision_layers:
        raise UserError(f"--depth {cfg.depth}: this CLIP has {clip.config.vision_layers} layers")
    branch = Branch.beside(clip, cfg.depth, gated=cfg.gated, drop_path=cfg.drop_path,
                           checkpointed=cfg.checkpointed)
    positions = len(branch.btadapter_time_embed.weight)
    if cfg.num_frames > positions:
        raise UserError(f"--num_frames {cfg.num_frames}: the branch has {positions} time positions")
    clip.to(dtype)
    clip.vision_model.post_layernorm.float()   # the gradient passes the image tower's last two steps
    clip.visual_projection.float()
    model = Pretraining(VideoEncoder(clip, branch)).to(device)
    memory.prepare_cpu(model)
    ddp = nn.parallel.DistributedDataParallel(model) if here.size > 1 else model
    # ------------------------------------------------------------------------------------------- optimizer
    trained = {f"backbone.{name}": p for name, p in branch.named_parameters()}
    trained |= {f"extra_proj.{name}": p for name, p in model.extra_proj.named_parameters()}
    groups = {}   # by their factor of the learning rate
    for name, p in trained.items():
        factor = next((f for part, f in RECIPES[cfg.recipe]["factors"].items() if part in name), 1)
        groups.setdefault(factor, {"params": [], "factor": factor})["params"].append(p)
    optimizer = torch.optim.AdamW([groups[factor] for factor in sorted(groups)], lr=cfg.lr, betas=(0.9, 0.98),
                                  eps=1e-8, weight_decay=cfg.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, skipped = training.resume(cfg, here, trained, optimizer, scaler)
    if first:
        log = training.Log(cfg.out, step)
        cli.say(f"pretrain: steps {step} to {steps}, {epoch_steps} an epoch; {cfg.batch_size} clips a step, "
                f"{here.size} processes; {str(dtype).removeprefix('torch.')} on {device.type}")
    # ------------------------------------------------------------------------------------------------ loop
    order = training.batches(len(dataset), cfg.batch_size, cfg.together, cfg.seed, step, here)
    loader = iter(DataLoader(dataset, batch_sampler=order, num_workers=cfg.workers,
                             collate_fn=data.collate_skip, pin_memory=device.type == "cuda",
                             worker_init_fn=training.leave_signals_to_the_parent))
    sigterm = training.on_sigterm()
    bar = tqdm(range(step, steps), desc="pretrain", initial=step, total=steps, disable=not first)
    waited, began = 0.0, time.time()
    for step in bar:
        ready = time.time()
        batch = training.next_batch(loader, here)
        waited += time.time() - ready
        count = len(batch["index"])   # clips of this process, and of each other
        skipped += cfg.batch_size - count * here.size
        enough = count * here.size > 1   # else there is nothing to contrast with, and the step passes by
        if enough:
            training.seed_step(cfg.seed, step)   # the whole batch draws its masks, in every process
            kept = tube_mask(cfg.batch_size, clip.config.patch_tokens, cfg.mask_ratio)
            kept = kept[here.rank::here.size][:count].to(device)
            pixels, ids = batch["pixels"].to(device, non_blocking=True), batch["text"].to(device)
            training.seed_step(cfg.seed, step, here.rank, 1)   # for stochastic depth
            try:
                states, text = model.see(pixels, ids, kept)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):   # losses: fp32
                    video, patches, mbta = ddp(states, kept)
                vtc, mbca = vtc_loss(video, text), mbca_loss(patches, text)
                optimizer.zero_grad()
                scaler.scale(weighted(cfg, vtc, mbca, mbta)).backward()
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(trained.values(), cfg.clip_norm).item()
                shares = training.gather_numbers(here, vtc.item(), mbca.item(), mbta.item())
                vtc, mbca, mbta = shares.mean(0).tolist()
                loss = weighted(cfg, vtc, mbca, mbta)
                if not math.isfinite(loss) or not math.isfinite(norm) and not scaler.is_enabled():
                    videos = ", ".join(dataset.row(i)[0] for i in batch["index"])
                    raise UserError(f"step {step}: the loss is {loss}, the gradient {norm}; videos: {videos}"
                                    f"; {cfg.out}/last.pth is as it was")
                lr = cfg.lr * lr_share(step, epoch_steps, steps, cfg.anneal)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["factor"]
                scaler.step(optimizer)   # passes a step by whose gradient is beyond fp16
                scaler.update()
            except torch.OutOfMemoryError as e:
                half = cfg.batch_size // 2 // multiple * multiple
                fewer = f", or --batch_size {half}: fewer negatives, so another recipe" if half > 1 else ""
                raise UserError(f"out of memory with {count} clips a GPU: take --checkpointed or more GPUs"
                                f"{fewer}") from e
        step += 1
        # ------------------------------------------------------------------------------------ log and save
        if first and enough and (step % cfg.log_every == 0 or step == steps):
            log.add(step=step, loss=loss, vtc=vtc, mbca=mbca, mbta=mbta, grad_norm=norm, skipped=skipped,
                    lr=lr)
            bar.set_postfix_str(f"loss {loss:.3f} vtc {vtc:.3f} mbca {mbca:.3f} mbta {mbta:.3f} lr {lr:.1e} "
                                f"wait {waited / (time.time() - began):.0%} skipped {skipped}")
        if watched and (step % (cfg.eval_every or epoch_steps) == 0 or step == steps):
            found = evaluate(cfg, model, tokenizer, watched, here, dtype)
            if first:
                best = max((recall for _, recall in log.column("R@1 branch")), default=-1)
                log.add(step=step, **found)
                bar.write(", ".join(f"{what} {value:.1f} %" for what, value in sorted(found.items())))
                if found["R@1 branch"] > best:
                    save_branch(os.path.join(cfg.out, "branch_best.pth"), branch)
        stop = training.gather_numbers(here, int(sigterm.is_set())).any()
        if first and (stop or step % cfg.save_every == 0 or step == steps):
            save_branch(os.path.join(cfg.out, "branch.pth"), branch)
            pictures.plot(os.path.join(cfg.out, "curve.png"), [
                ("pretraining: loss", {name: log.column(name) for name in ("loss", "vtc", "mbca", "mbta")}),
                ("text to video R@1, %", {name: log.column(f"R@1 {name}") for name in NAMES})])
            # last: a run that is killed before goes on from the one before, and writes all again
            training.save_run(cfg, trained, optimizer, scaler, step, skipped)
        if stop:
            raise SystemExit(143)
    if not optimizer.state:
        raise UserError(f"{cfg.out}: nothing was learned; {skipped} clips were left out")
    if first:
        path = os.path.join(cfg.out, "branch.pth")
        print(f"{path}: `python chat_tune.py --stage video --branch {path}` teaches it to answer; "
              f"`python chat.py --branch {path}` talks with it as it is")
    if here.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main, CONFIG)
