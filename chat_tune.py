"""Stage 2: instruction tuning. One loop, and a table of what each stage teaches:

    projector   still pictures: the projector learns to speak the language of a frozen LLaMA     -> a LLaVA
    language    still pictures: projector and LLaMA                                              -> a better LLaVA
    video       videos: projector and branch; the LLaMA is frozen, as in the paper               -> chat.bin

    python chat_tune.py --stage video --clip weights/tiny/clip --llm weights/tiny/llava --branch weights/tiny/branch.pth \\
        --annotations out/shapes/train_talks.jsonl --root out/shapes --out out/chat \\
        --num_frames 8 --lr 1e-3 --batch_size 16 --steps 1000                            # a laptop, 6 minutes
    torchrun --nproc_per_node 8 chat_tune.py --stage video --clip weights/clip --llm weights/llava \\
        --branch weights/branch.pth --annotations video_chatgpt_training.json --root videos --out out/chat

In --out: last.pth (what is trained, and the optimizer; the same command goes on from it), log.jsonl, curve.png, and the
result: chat.bin, or a Hugging Face LLaVA folder `llava`. With --eval_annotations the share of exactly right answers is
printed, for each kind of question.
"""
import collections
import dataclasses
import itertools
import math
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from clip import load_clip
from llm import load_llama, save_llama, tokenizer_path
from model import (IGNORE_INDEX, VIDEO_TOKENS, VideoChat, is_marked, load_branch, make_projector,
                   projector_part, prompt_ids, save_chat)
from plumbing import cli, pictures, training


@dataclasses.dataclass
class Config:
    stage: str                       # a row of the table: projector, language or video
    clip: str                        # CLIP: a Hugging Face folder or OpenAI's ViT-L-14.pt
    llm: str                         # LLaVA folder (LLaMA is enough for the stage projector)
    annotations: str                 # conversations: JSON or JSONL in Video-ChatGPT's format
    root: str                        # folder that the names in it are relative to
    out: str                         # folder for checkpoint, log, curve and result
    branch: str = ""                 # branch file, for --tokens branch
    drop_path: float = 0.1           # stochastic depth of the branch, as in pretraining
    tokens: str = "branch"           # what the LLaMA sees of a video: branch, mean or st_pool (pictures: mean)
    template: str = "vicuna_v1"      # how prompts are put together: a key of model.TEMPLATES
    num_frames: int = 100            # frames of a video
    batch_size: int = 8              # conversations a step, over all processes
    lr: float = 2e-5                 # peak; linear up over 3 % of the run, then half a cosine
    clip_norm: float = 1.0           # of the gradient
    epochs: int = 3                  # passes over the data
    steps: int = 0                   # steps in all, instead of epochs
    eval_annotations: str = ""       # questions with exact answers, under the same --root
    eval_only: bool = False          # no training, only the questions: the zero-shot setting
    workers: int = 1                 # decoding processes, for each training process
    save_every: int = 200            # steps between checkpoints
    log_every: int = 10              # steps between log lines
    seed: int = 0                    # every random number follows from it
    device: str = "auto"             # cpu, cuda or auto
    amp: bool = True                 # half precision on a GPU


STAGES = {   # stage: beginnings of the names that are trained. The gates stay as pretraining left them, as in the released run
    "projector": ("video_tokens.mm_projector", "start_end"),
    "language": ("video_tokens.mm_projector", "start_end", "llm"),
    "video": ("video_tokens.mm_projector", "start_end", "video_tokens.branch.btadapter")}


def collate(items):
    """-> (pixels (B, T, 3, H, W) uint8, B conversations, B indices, messages of broken videos, which are left out)."""
    good = [item for item in items if not isinstance(item, data.Skipped)]
    clips, conversations, indices = zip(*good) if good else ((), (), ())
    if len({pixels.shape for pixels in clips}) > 1:
        raise cli.UserError("pictures and videos in one batch; put them into annotation files of their own")
    pixels = torch.stack(clips) if clips else torch.empty(0)
    return pixels, conversations, indices, [item.message for item in items if isinstance(item, data.Skipped)]


def batches(n, batch_size, seed, start, rank, size):
    """Endless lists of this rank's indices, from step `start` on: a fresh order every epoch, incomplete batches left out."""
    for step in itertools.count(start):
        epoch, k = divmod(step, n // batch_size)
        order = np.random.default_rng([seed, epoch]).permutation(n)
        yield order[k * batch_size + rank:(k + 1) * batch_size:size].tolist()


@torch.no_grad()
def exact_answers(chat, dataset, template, device, batch_size=32, workers=0):
    """Questions -> {kind: (right, asked)}. An answer is right if greedy decoding would give it word for word: that is so
    exactly when, with the right answer fed in, every next token has the highest logit. An answer beyond the context is wrong."""
    counts = collections.defaultdict(lambda: [0, 0])
    chat.eval()
    loader = DataLoader(dataset, batch_size, collate_fn=collate, num_workers=workers,
                        worker_init_fn=training.leave_signals_to_the_parent)
    for pixels, conversations, indices, _ in tqdm(loader, desc="ask", leave=False):
        prompts = [prompt_ids(chat.tokenizer, turns, template) for turns in conversations]
        logits, target = chat.logits(pixels.to(device), prompts)
        learned = torch.tensor([sum(label != IGNORE_INDEX for label in labels) for _, labels in prompts], device=target.device)
        right = ((logits.argmax(-1) == target) & (target != IGNORE_INDEX)).sum(1) == learned   # (B,)
        for i, ok in zip(indices, right.tolist()):
            count = counts[dataset.rows[i].get("kind", "all")]
            count[0] += ok
            count[1] += 1
    return {kind: tuple(count) for kind, count in sorted(counts.items())}


def build(cfg):
    """-> the model of a stage, in fp32."""
    clip, _ = load_clip(cfg.clip)
    llm, tokenizer, extra = load_llama(cfg.llm)
    words = llm.model.embed_tokens.weight.shape[0]
    if words - tokenizer.vocab_size not in (0, 3):
        raise cli.UserError(f"{cfg.llm}: {words} word embeddings for {tokenizer.vocab_size} tokens; needed are as many, or LLaVA's 3 more")
    visual, width, projector = clip.config.vision_width, llm.config.width, projector_part(extra)
    # the first stage starts the projector anew; the others go on with the one that the weights hold
    mm_projector = nn.Linear(visual, width) if cfg.stage == "projector" else make_projector(projector, visual, width, cfg.llm)
    kind = VIDEO_TOKENS[cfg.tokens]
    branch = load_branch(cfg.branch, clip, skip_last=1, drop_path=cfg.drop_path) if kind.reads_branch else None
    if branch and branch.balance2 is None:   # the layout of a tuned file cannot say "no gates"; it would come back with some
        raise cli.UserError(f"{cfg.branch}: a branch without gates cannot be tuned for chat; pretrain one with --gated")
    marked = cfg.stage != "video" or is_marked(cfg.llm)   # the stages before it make a LLaVA, and ours has the two rows
    return VideoChat(clip, kind(mm_projector, branch), llm, tokenizer, marked).float()


def save_result(cfg, chat):
    if cfg.stage == "video":
        return save_chat(os.path.join(cfg.out, "chat.bin"), chat)
    chat.llm.resize_vocab(chat.tokenizer.vocab_size + 3)   # LLaVA's <im_patch>, <im_start>, <im_end>, if they are not there yet
    chat.llm.model.embed_tokens.weight.data[-2:] = chat.start_end.data
    save_llama(os.path.join(cfg.out, "llava"), chat.llm, tokenizer_path(cfg.llm),
               {f"model.mm_projector.{name}": t for name, t in chat.video_tokens.mm_projector.state_dict().items()},
               config_extra={"mm_hidden_size": chat.clip.config.vision_width, "mm_use_im_start_end": True,
                             "mm_vision_select_layer": -2})


def main(cfg):
    # ------------------------------------------------------------------------------------------------ setup
    here = training.start_distributed(cfg.device)
    device = here.device
    for flag, value, known in (("stage", cfg.stage, STAGES), ("tokens", cfg.tokens, VIDEO_TOKENS)):
        if value not in known:
            raise cli.UserError(f"--{flag} {value}: choose one of {', '.join(known)}")
    if VIDEO_TOKENS[cfg.tokens].reads_branch and not cfg.branch:
        raise cli.UserError(f"--tokens {cfg.tokens} needs --branch FILE")
    if cfg.batch_size % here.size:
        raise cli.UserError(f"--batch_size {cfg.batch_size}: not a multiple of {here.size} processes")
    cli.at_least(cfg, batch_size=1, num_frames=1, seed=0, steps=0, epochs=1, save_every=1, log_every=1)
    torch.manual_seed(cfg.seed)
    # ------------------------------------------------------------------------------------------------ model
    chat = build(cfg).to(device)
    for name, p in chat.named_parameters():
        p.requires_grad_(name.startswith(STAGES[cfg.stage]))
    trained = {name: p for name, p in chat.named_parameters() if p.requires_grad}
    # ------------------------------------------------------------------------------------------------ data
    size = chat.clip.config.image_size
    questions = cfg.eval_annotations and data.ConversationDataset(cfg.eval_annotations, cfg.root, cfg.num_frames, size)

    def report(step, log=None):
        for kind, (right, asked) in exact_answers(chat, questions, cfg.template, device, workers=cfg.workers).items():
            print(f"{cfg.stage}, {cfg.tokens} tokens: {kind} questions {100 * right / asked:.1f} % exactly right ({right} of {asked})", flush=True)
            if log:
                log.add(step=step, **{kind: 100 * right / asked})
    if cfg.eval_only:
        if not questions:
            raise cli.UserError("--eval_only needs --eval_annotations")
        return report(0) if here.first else None
    cli.make_folder(cfg.out)
    dataset = data.ConversationDataset(cfg.annotations, cfg.root, cfg.num_frames, size, skip=True)
    if len(dataset) < cfg.batch_size:
        raise cli.UserError(f"--batch_size {cfg.batch_size}: more than the {len(dataset)} conversations of {cfg.annotations}")
    steps = cfg.steps or cfg.epochs * (len(dataset) // cfg.batch_size)
    # ------------------------------------------------------------------------------------------------ optimizer
    optimizer = torch.optim.AdamW(trained.values(), lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0)
    half = cfg.amp and device.type == "cuda"
    scaler = torch.amp.GradScaler(enabled=half)
    step, skipped, last = 0, 0, os.path.join(cfg.out, "last.pth")
    if os.path.exists(last):
        saved = training.load_checkpoint(last)
        training.check_same_run(saved, last, cfg)
        training.put_back(trained, saved["trained"], last)
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:   # empty after a run in another precision
            scaler.load_state_dict(saved["scaler"])
        step, skipped = saved["step"], saved["skipped"]
    if here.first:
        log = training.Log(os.path.join(cfg.out, "log.jsonl"), step)
        training.remove_leftovers(cfg.out)
    ddp = nn.parallel.DistributedDataParallel(chat) if here.size > 1 else chat
    loader = iter(DataLoader(dataset, batch_sampler=batches(len(dataset), cfg.batch_size, cfg.seed, step, here.rank, here.size),
                             num_workers=cfg.workers, collate_fn=collate, worker_init_fn=training.leave_signals_to_the_parent))

    def after_step():
        if here.first and (step % cfg.save_every == 0 or step == steps):
            training.save_checkpoint(last, {"trained": {name: p.detach().cpu() for name, p in trained.items()},
                                          "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                                          "step": step, "skipped": skipped, "config": dataclasses.asdict(cfg)})
            pictures.plot(os.path.join(cfg.out, "curve.png"), [(f"chat_tune, {cfg.stage}: loss", {"loss": log.column("loss")})])
        bar.update()
    # ------------------------------------------------------------------------------------------------ loop
    chat.train()
    bar = tqdm(total=steps, initial=step, desc=f"chat_tune {cfg.stage}", disable=not here.first)
    while step < steps:
        pixels, conversations, _, broken = next(loader)
        for message in broken:
            bar.write(f"skipped: {message}", file=sys.stderr)
        counts, lost = training.told_by_all(here, len(conversations), len(broken))
        skipped += sum(lost)
        if not any(counts):
            raise cli.UserError(f"{cfg.annotations}: a batch without one readable video under {cfg.root}")
        if not all(counts):
            bar.write(f"step {step}: passed by, a process has no readable video", file=sys.stderr)
            step += 1
            after_step()
            continue
        prompts = [prompt_ids(chat.tokenizer, turns, cfg.template) for turns in conversations]
        training.seed_step(cfg.seed, step, here.rank)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * training.warmup_cosine(step, steps, max(1, round(0.03 * steps)))
        with torch.autocast(device.type, torch.float16, enabled=half):
            loss = ddp(pixels.to(device), prompts)
        shown = sum(training.told_by_all(here, loss.item())[0]) / here.size   # of the joined batch: all processes stop where one must
        if not math.isfinite(shown):
            raise cli.UserError(f"step {step}: the loss is {shown}; {last} is kept")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained.values(), cfg.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        step += 1
        # -------------------------------------------------------------------------------------------- log and save
        if here.first and (step % cfg.log_every == 0 or step == steps):
            log.add(step=step, loss=shown, grad_norm=norm.item(), skipped=skipped, lr=optimizer.param_groups[0]["lr"])
            bar.set_postfix_str(f"loss {shown:.3f} skipped {skipped}")
        after_step()
    bar.close()
    if here.first:
        save_result(cfg, chat)
        if questions:
            report(step, log)
    if here.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main, Config)
