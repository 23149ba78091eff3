"""Stage 1: teach the branch from video-text pairs, beside a frozen CLIP, with 70 % of its tokens hidden.

    python pretrain.py --clip weights/tiny/clip --annotations out/shapes/train_captions.jsonl --root out/shapes \\
        --out out/branch --lr 1e-5 --anneal --batch_size 64 --together 2 --steps 800 --min_area 0.8      # a laptop, 15 minutes
    torchrun --nproc_per_node 8 pretrain.py --clip weights/clip --annotations results_2M_train.csv --root WebVid \\
        --out out/branch --workers 8                                                 # the released run

In --out: branch.pth (the branch in half precision, under the released names), branch_best.pth (the same at the best look at
--eval_annotations), last.pth (with the optimizer), log.jsonl, curve.png.

Whatever stops it, the same command goes on from last.pth. Every random number follows from the seed and the step, so the
run then equals an undisturbed one, bit for bit on a CPU. SIGTERM saves after the step or the look that is under way (torchrun
waits 30 s for it) and ends with exit code 143.
"""
import contextlib
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

import data
from clip import load_clip
from metrics import retrieval_metrics
from model import Branch, Pretraining, VideoEncoder, branch_tensors, encode, mbca_loss, tube_mask, vtc_loss
from plumbing import cli, pictures, training


@dataclasses.dataclass
class Config:
    clip: str                        # CLIP: a Hugging Face folder or OpenAI's ViT-L-14.pt
    annotations: str                 # WebVid's CSV, or a JSONL of {"video", "caption"}
    root: str                        # folder that the videos' names are relative to
    out: str                         # folder for checkpoints, log and curve
    recipe: str = "released"         # where the paper and its released code differ: released or paper
    # model
    depth: int = 4                   # layers of the branch
    gated: bool = True               # learnable gates between branch and CLIP (else sums)
    drop_path: float = 0.1           # stochastic depth of the branch's last layer; earlier ones less
    mask_ratio: float = 0.7          # patches hidden from the branch, the same ones in every frame
    losses: str | None = None        # weights of VTC, MBCA and MBTA, as 1,0.1,0.8; else the recipe's
    # data
    num_frames: int = 8              # frames of a clip
    min_area: float = 0.08           # least share of the picture that a training crop keeps
    text_length: int | None = None   # tokens of a caption that are read; else the recipe's
    together: int = 1                # neighbouring lines of the annotations that always share a batch (2: twins)
    workers: int = 1                 # decoding processes, for each training process
    # optimizer
    batch_size: int | None = None    # clips a step, over all processes; else the recipe's
    micro_batch: int = 0             # of these, how many go through a process at once; 0: all of its share
    lr: float = 2e-6                 # base, for what the recipe gives no factor
    weight_decay: float = 0.05       # on everything, as in the released run
    clip_norm: float = 5.0           # of the gradient of all parameters together
    epochs: int = 1                  # passes over the data
    steps: int = 0                   # steps in all, instead of epochs
    anneal: bool = False             # lower the learning rate to zero (the released run ends at 97 % of its peak)
    # run
    eval_annotations: str = ""       # a retrieval set to watch, under the same --root
    eval_every: int = 0              # steps between looks at it; 0: every epoch
    save_every: int = 200            # steps between checkpoints
    log_every: int = 10              # steps between log lines
    seed: int = 0                    # every random number follows from it
    device: str = "auto"             # cpu, cuda or auto
    precision: str = "auto"          # fp32, bf16 or fp16; auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16
    checkpointed: bool = False       # keep less of the branch for the gradient, and compute it twice


@dataclasses.dataclass
class Recipe:
    """What differs between the paper and its released code; docs/paper-vs-code.md has the reasons."""
    losses: str         # weights of VTC, MBCA, MBTA
    text_length: int
    batch_size: int
    factors: dict       # of the learning rate: the first that fits a parameter's name counts


RECIPES = {"released": Recipe("1,0.1,0.8", 64, 416, {"btadapter_T_layers": 100, "balance": 100, "btadapter": 10, "extra_proj": 10}),
           "paper": Recipe("1,1,1", 32, 640, {})}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def complete(cfg):
    """A Config with what its recipe says in the place of None. Raises UserError."""
    if cfg.recipe not in RECIPES:
        raise cli.UserError(f"--recipe {cfg.recipe}: choose one of {', '.join(RECIPES)}")
    recipe = dataclasses.asdict(RECIPES[cfg.recipe])
    return dataclasses.replace(cfg, **{key: value for key, value in recipe.items() if getattr(cfg, key, 0) is None})


def loss_weights(text):
    """"1,0.1,0.8" -> [1.0, 0.1, 0.8]. Raises UserError."""
    try:
        weights = [float(number) for number in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != 3 or not all(0 <= w < math.inf for w in weights) or weights[:2] == [0, 0]:
        raise cli.UserError(f"--losses {text}: needs three numbers, for VTC, MBCA and MBTA, such as 1,0.1,0.8; not both of the first zero")
    return weights


def precision(name, device):
    """-> dtype of the frozen towers, and of what autocast computes in the branch. Raises UserError."""
    if name == "auto":
        name = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name not in PRECISIONS:
        raise cli.UserError(f"--precision {name}: choose one of auto, {', '.join(PRECISIONS)}")
    if name == "fp16" and device.type == "cpu":
        raise cli.UserError("--precision fp16: needs a GPU; a CPU can do bf16")
    return PRECISIONS[name]


def lighten(clip, dtype):
    """The frozen towers in `dtype`, but for the last two steps of the image tower, through which the branch's gradient goes."""
    clip.to(dtype)
    clip.vision_model.post_layernorm.float()
    clip.visual_projection.float()
    return clip


def make_optimizer(model, recipe, lr, weight_decay):
    """AdamW for all that learns, in groups that know their factor of the learning rate."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    factors = {name: next((f for key, f in recipe.factors.items() if key in name), 1) for name in trained}
    groups = [{"params": [p for name, p in trained.items() if factors[name] == f], "factor": f} for f in sorted(set(factors.values()))]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=weight_decay)


def lr_share(step, epoch_steps, steps, anneal):
    """Share of the peak at a step. Released: up from 5 % over half an epoch, then a cosine 4.5 epochs long that one epoch
    barely enters. Annealed: up over a tenth of the run, then a cosine to zero."""
    if anneal:
        return training.warmup_cosine(step, steps, max(1, steps // 10))
    half = max(2, epoch_steps // 2)
    if step < half:
        return 0.05 + 0.95 * step / (half - 1)
    return 0.5 * (1 + math.cos(math.pi * min(1, (step - half) / (4.5 * epoch_steps))))


def batches(n, batch_size, together, seed, start, rank, size):
    """Endless lists of this rank's indices, from step `start` on: a fresh order every epoch, incomplete batches left out.

    A step's clips are the same for any number of processes, which take turns in picking theirs."""
    groups = np.arange(n - n % together).reshape(-1, together)
    per_epoch, drawn = n // batch_size, None
    for step in itertools.count(start):
        epoch, k = divmod(step, per_epoch)
        if epoch != drawn:
            order, drawn = groups[np.random.default_rng([seed, epoch]).permutation(len(groups))].ravel(), epoch
        yield [(epoch, int(i)) for i in order[k * batch_size + rank:(k + 1) * batch_size:size]]


def backward(ddp, views, text, weights, scaler, reseed, dtype):
    """The gradient of a whole batch, however many micro-batches it takes -> (vtc, mbca, mbta), without a graph.

    views: [(states, kept)], the micro-batches of this process. text (B, P). dtype: of autocast, for the branch alone: the losses
    and their gradient are fp32, and what one pass has cast the next must not find, since it may have no graph. Contrast needs the features of all clips at once,
    but the graph of a micro-batch is all that there may be room for. So first the features of all are computed without a
    graph. From them follow the losses, and what gradient each feature gets. Then every micro-batch runs again, with a graph
    and the same random numbers, and that gradient goes into it: exactly the gradient of the whole (Gao et al. 2021,
    https://arxiv.org/abs/2101.06983). A single micro-batch keeps its graph and runs once. CLIP has run before, once."""
    several = len(views) > 1
    model = ddp.module if several and dist.is_initialized() else ddp

    def run(model, part):
        reseed(part)
        with torch.autocast(text.device.type, dtype, enabled=dtype != torch.float32):
            return model(*views[part])   # (b, P), (b, P), ()
    with torch.set_grad_enabled(not several):
        outputs = [run(model, part) for part in range(len(views))]
    video, patches = (torch.cat([output[i] for output in outputs]).detach().requires_grad_() for i in range(2))   # (B, P)
    shares = [len(kept) / len(text) for _, kept in views]
    vtc, mbca, mbta = vtc_loss(video, text), mbca_loss(patches, text), sum(s * output[2] for s, output in zip(shares, outputs))
    wanted = torch.autograd.grad(scaler.scale(weights[0] * vtc + weights[1] * mbca), (video, patches))
    rows = zip(*(w.split([len(kept) for _, kept in views]) for w in wanted))
    for part, (share, row) in enumerate(zip(shares, rows)):
        alone = ddp is not model and part < len(views) - 1   # the last one carries the sum to the other processes
        with ddp.no_sync() if alone else contextlib.nullcontext():
            if several:
                outputs[part] = run(ddp, part)
            torch.autograd.backward(outputs[part], (*row, scaler.scale(torch.tensor(weights[2] * share, device=text.device))))
    return vtc.detach(), mbca.detach(), mbta.detach()


def curve(path, log):
    pictures.plot(path, [("pretraining: loss", {name: log.column(name) for name in ("loss", "vtc", "mbca", "mbta")}),
                       ("text to video R@1, %", {name: log.column(f"R@1 {name}") for name in ("branch", "mean-pooled CLIP")})])


def main(cfg):
    # ------------------------------------------------------------------------------------------------ setup
    cfg = complete(cfg)
    here = training.start_distributed(cfg.device)
    device, dtype, weights = here.device, precision(cfg.precision, here.device), loss_weights(cfg.losses)
    cli.at_least(cfg, batch_size=2, micro_batch=0, together=1, depth=2, num_frames=1, text_length=2, seed=0, steps=0, epochs=1, save_every=1,
                    log_every=1, eval_every=0, workers=0, mask_ratio=0, drop_path=0, lr=0, weight_decay=0, clip_norm=0)
    if cfg.mask_ratio >= 1 or cfg.drop_path >= 1:
        raise cli.UserError(f"--mask_ratio {cfg.mask_ratio}, --drop_path {cfg.drop_path}: must be less than 1, or nothing is left to learn from")
    share = cfg.batch_size // here.size   # of this process
    if cfg.batch_size % here.size or cfg.batch_size % cfg.together:
        raise cli.UserError(f"--batch_size {cfg.batch_size}: not a multiple of {here.size} processes and of {cfg.together} together")
    if cfg.micro_batch > share:
        raise cli.UserError(f"--micro_batch {cfg.micro_batch}: more than the {share} clips of a process")
    cli.make_folder(cfg.out)
    last, final, best = (os.path.join(cfg.out, name) for name in ("last.pth", "branch.pth", "branch_best.pth"))
    torch.manual_seed(cfg.seed)
    # ------------------------------------------------------------------------------------------------ data
    clip, tokenizer = load_clip(cfg.clip)
    size = clip.config.image_size
    dataset = data.CaptionDataset(cfg.annotations, cfg.root, cfg.num_frames, size, tokenizer,
                                  min(cfg.text_length, clip.config.context_length), cfg.seed, cfg.min_area)
    epoch_steps = len(dataset) // cfg.batch_size
    if epoch_steps == 0:
        raise cli.UserError(f"--batch_size {cfg.batch_size}: more than the {len(dataset)} clips of {cfg.annotations}")
    steps = cfg.steps or cfg.epochs * epoch_steps
    if steps > 5 * epoch_steps and not cfg.anneal:
        raise cli.UserError(f"{steps} steps are {steps / epoch_steps:.1f} epochs, but the released schedule is at zero after 5; use --anneal")
    eval_every = cfg.eval_every or epoch_steps
    # ------------------------------------------------------------------------------------------------ model
    if cfg.depth > clip.config.vision_layers:
        raise cli.UserError(f"--depth {cfg.depth}: this CLIP has {clip.config.vision_layers} layers")
    branch = Branch.beside(clip, cfg.depth, gated=cfg.gated, drop_path=cfg.drop_path, checkpointed=cfg.checkpointed)
    if cfg.num_frames > len(branch.btadapter_time_embed.weight):
        raise cli.UserError(f"--num_frames {cfg.num_frames}: the branch has {len(branch.btadapter_time_embed.weight)} time positions")
    model = Pretraining(VideoEncoder(lighten(clip, dtype), branch)).to(device)
    # ------------------------------------------------------------------------------------------------ optimizer
    optimizer = make_optimizer(model, RECIPES[cfg.recipe], cfg.lr, cfg.weight_decay)
    trained = [p for p in model.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, skipped = 0, 0
    if os.path.exists(last):
        step, skipped = restore(last, model, optimizer, scaler, cfg)
    if len(set(training.told_by_all(here, step)[0])) > 1:
        raise cli.UserError(f"{last}: not the same for all processes; --out must be a folder that all machines share")
    if here.first:
        log = training.Log(os.path.join(cfg.out, "log.jsonl"), step)
        training.remove_leftovers(cfg.out)
        print(f"pretrain: steps {step} to {steps}, {epoch_steps} an epoch; {cfg.batch_size} clips a step: {here.size} processes x {share}"
              f"{f', {cfg.micro_batch} at once' if cfg.micro_batch else ''}; {str(dtype).removeprefix('torch.')} on {device.type}", file=sys.stderr)
    ddp = nn.parallel.DistributedDataParallel(model) if here.size > 1 else model
    loader = iter(DataLoader(dataset, batch_sampler=batches(len(dataset), cfg.batch_size, cfg.together, cfg.seed, step, here.rank, here.size),
                             num_workers=cfg.workers, collate_fn=data.collate_skip, pin_memory=device.type == "cuda",
                             worker_init_fn=training.leave_signals_to_the_parent))
    # ------------------------------------------------------------------------------------------------ evaluation and checkpoints
    watched = cfg.eval_annotations and data.RetrievalDataset(cfg.eval_annotations, cfg.root, cfg.num_frames, size)
    if watched and (missing := watched.missing()):   # said now, not after an epoch
        raise cli.UserError(f"{cfg.eval_annotations}: {len(missing)} of its videos are not under {cfg.root}, the first is {missing[0]}")

    def evaluate():
        branch_features, mean, text, _ = encode(model.encoder, tokenizer, watched, device, workers=cfg.workers, amp=dtype == torch.float16)
        if here.first:
            log.add(step=step, **{f"R@1 {name}": round(retrieval_metrics(text @ video.T)["R@1"], 2)
                                  for name, video in (("branch", branch_features), ("mean-pooled CLIP", mean))})
            recalls = [recall for _, recall in log.column("R@1 branch")]
            if recalls[-1] > max(recalls[:-1], default=-1):
                training.save_checkpoint(best, {"state_dict": branch_tensors(branch, "backbone.", torch.float16)})

    def save():   # last.pth comes last: a run that is killed before goes on from the one before, and writes all of them again
        if here.first:
            training.save_checkpoint(final, {"state_dict": branch_tensors(branch, "backbone.", torch.float16)})
            curve(os.path.join(cfg.out, "curve.png"), log)
            training.save_checkpoint(last, {
                "state_dict": {**branch_tensors(branch, "backbone."), **branch_tensors(model.extra_proj, "extra_proj.")},
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step, "skipped": skipped,
                "config": dataclasses.asdict(cfg)})

    def after_step():
        if watched and (step % eval_every == 0 or step == steps):
            evaluate()
        if step % cfg.save_every == 0 or step == steps:
            save()
        bar.update()

    def named(batch):
        return f"videos: {', '.join(dataset.videos[i] for i in batch['index'].tolist())}"
    # ------------------------------------------------------------------------------------------------ loop
    asked_to_stop = training.on_sigterm()
    bar = tqdm(total=steps, initial=step, desc="pretrain", disable=not here.first)
    waited, began, clips = 0.0, time.time(), 0
    while step < steps:
        ready = time.time()
        batch = next(loader)
        waited += time.time() - ready
        for message in batch["skipped"]:
            bar.write(f"skipped: {message}", file=sys.stderr)
        # every process must bring as many clips as the others, and stop when they stop
        counts, stops = training.told_by_all(here, len(batch["index"]), int(asked_to_stop.is_set()))
        if any(stops):
            save()
            raise SystemExit(143)
        count, skipped = min(counts), skipped + cfg.batch_size - min(counts) * here.size   # broken, or left over for a broken one
        if not any(counts):
            raise cli.UserError(f"{cfg.annotations}: a batch without one readable video under {cfg.root}")
        if count * here.size < 2:   # a process has nothing, or there is nothing to contrast with
            bar.write(f"step {step}: passed by, a process has too few readable videos", file=sys.stderr)
            step += 1
            after_step()
            continue
        pixels, ids = (batch[key][:count].to(device, non_blocking=True) for key in ("pixels", "ids"))
        training.seed_step(cfg.seed, step)   # one draw of masks for the whole batch: the same for any number of processes
        kept = tube_mask(cfg.batch_size, clip.config.patch_tokens, cfg.mask_ratio)[here.rank::here.size][:count].to(device)
        parts = [model.see(p, i, k) for p, i, k in zip(*(x.split(cfg.micro_batch or count) for x in (pixels, ids, kept)))]
        views, text = list(zip([states for states, _ in parts], kept.split(cfg.micro_batch or count))), torch.cat([t for _, t in parts])
        lr = cfg.lr * lr_share(step, epoch_steps, steps, cfg.anneal)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        optimizer.zero_grad()
        losses = backward(ddp, views, text, weights, scaler, lambda part: training.seed_step(cfg.seed, step, here.rank, part + 1), dtype)
        vtc, mbca, mbta = (sum(said) / here.size for said in training.told_by_all(here, *(part.item() for part in losses)))
        loss = sum(weight * part for weight, part in zip(weights, (vtc, mbca, mbta)))
        if not math.isfinite(loss):
            raise cli.UserError(f"step {step}: the loss is {loss}; {named(batch)}; {last} is as it was")
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained, cfg.clip_norm)
        if not scaler.is_enabled() and not norm.isfinite():   # with a scaler, it is the scaler that passes such a step by
            raise cli.UserError(f"step {step}: the gradient is {norm.item()}; {named(batch)}; {last} is as it was")
        scaler.step(optimizer)
        scaler.update()
        step, clips = step + 1, clips + count * here.size
        # -------------------------------------------------------------------------------------------- log and save
        if here.first and (step % cfg.log_every == 0 or step == steps):
            log.add(step=step, loss=loss, vtc=vtc, mbca=mbca, mbta=mbta, grad_norm=norm.item(), skipped=skipped, lr=lr)
            seconds = time.time() - began
            bar.set_postfix_str(f"loss {loss:.3f} vtc {vtc:.3f} mbca {mbca:.3f} mbta {mbta:.3f} lr {lr:.1e} "
                                f"{clips / seconds:.1f} videos/s wait {waited / seconds:.0%} skipped {skipped}")
        after_step()
    bar.close()
    if here.size > 1:
        dist.destroy_process_group()


def restore(path, model, optimizer, scaler, cfg):
    """Puts a checkpoint of this script back -> its step, videos skipped so far. Raises UserError if it is of another run."""
    saved = training.load_checkpoint(path)
    training.check_same_run(saved, path, cfg)
    weights_now = {f"backbone.{n}": p for n, p in model.encoder.branch.state_dict().items()}
    weights_now |= {f"extra_proj.{n}": p for n, p in model.extra_proj.state_dict().items()}
    training.put_back(weights_now, saved["state_dict"], path)
    optimizer.load_state_dict(saved["optimizer"])
    if saved["scaler"]:   # empty after a run in another precision
        scaler.load_state_dict(saved["scaler"])
    return saved["step"], saved["skipped"]


if __name__ == "__main__":
    cli.run(main, Config)
