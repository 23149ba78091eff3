"""Stage 2: instruction tuning. One loop, and a table of what each stage teaches:

    projector   still pictures: the projector learns the language of a frozen LLaMA      -> a LLaVA
    language    still pictures: projector and LLaMA                                      -> a better LLaVA
    video       videos: projector and branch; the LLaMA is frozen, as in the paper       -> chat.bin
    video_paper the same with the optimizer of the paper's Table 8                       -> chat.bin
    video_lora  the same with LoRA, for answers that the LLaMA could not give before     -> chat.bin, stage2
    align       VTimeLLM's first, still pictures: a projector of one vector a frame      -> mm_projector.bin
    boundaries  its second, events in videos: LoRA learns when they begin and end        -> stage2
    moments     its third, dialogues about them: a new LoRA on the merged one            -> stage3
    linvt       LinVT, questions about long videos: a LinVT, all else is frozen          -> linvt.bin
    linvt_lora  the same with LoRA, which learns to read its rows                        -> stage2

    python chat_tune.py --stage video   # the toy world of `python -m toy render`: ten minutes on two cores
    torchrun --nproc_per_node 8 chat_tune.py --stage video --clip weights/released/clip \\
        --llm weights/released/llava --branch out/branch/branch.pth \\
        --annotations video_chatgpt_training.json --root videos
    python chat_tune.py --stage video_lora --weights weights/released --annotations mine.jsonl --root videos
    python chat_tune.py --stage boundaries --weights out/align --annotations stage2.json --features features
    python chat_tune.py --stage linvt --weights weights/tiny --num_frames 8 --features out/features \\
        --annotations out/shapes/train_scenes.jsonl --root out/shapes

In --out: last.pth (what is trained, and the optimizer; the same command goes on from it, also after
SIGTERM), log.jsonl, curve.png, and the result: chat.bin, or a Hugging Face LLaVA folder `llava`. Each of
VTimeLLM's and LinVT's stages makes --out a folder for --weights, of the next one and of chat.py. With
--eval_annotations the share of exactly right answers is printed, for each kind of question.
"""
import dataclasses
from typing import Annotated

from plumbing import cli
from plumbing.cli import Amount, Count, Whole


@dataclasses.dataclass
class Config:
    stage: Annotated[str, "projector", "language", "video", "video_paper", "video_lora", "align",
                     "boundaries", "moments", "linvt", "linvt_lora"]   # see --help
    clip: str | None = None          # CLIP: a Hugging Face folder or OpenAI's ViT-L-14.pt
    llm: str | None = None           # LLaVA folder (LLaMA is enough for the stage projector)
    weights: str | None = None       # for LoRA and LinVT, in the place of these two: chat.py opens it
    annotations: str | None = None   # conversations or events, JSON(L), see data.talk_of; else the toy world
    root: str | None = None          # folder that the names in it are relative to
    out: str = "out/chat"            # folder for checkpoint, log, curve and result
    branch: str | None = None        # branch file, for --tokens branch
    drop_path: cli.Rate = 0.1        # stochastic depth of the branch, as in pretraining
    tokens: str | None = None        # what the LLaMA sees of a video: a key of model.VIDEO_TOKENS
    template: str | None = None      # how prompts are put together: a key of model.TEMPLATES
    num_frames: Count | None = None  # frames of a video
    features: str = ""               # folder for what training sees of videos; made where it lacks
    rank: Count | None = None        # of LoRA
    alpha: Count | None = None       # of LoRA, which counts alpha / rank
    lora_dropout: cli.Rate = 0.05    # of what LoRA reads
    reuse: bool = False              # go on with the last LoRA in --weights; else merge it, and add a new one
    tune_projector: bool = False     # along with LoRA
    top_k: Whole = 0                 # of a new LinVT: tokens that its scorer keeps; 0: it has none, all count
    content: bool = False            # of a new LinVT: it chooses patches, too
    in_order: bool | None = None     # rows come as in the file: its first videos may be the short ones
    batch_size: Count | None = None  # conversations a step, over all processes
    micro_batch: Whole = 0           # of these a process computes so many at once; 0: all of its share
    checkpointed: bool | None = None   # keep less of the LLaMA for the gradient, and compute it twice
    lr: Amount | None = None         # peak; linear up over 3 % of the run, then half a cosine
    clip_norm: Amount = 1.0          # of the gradient
    epochs: Count | None = None      # passes over the data
    steps: Count | None = None       # steps in all, instead of epochs
    eval_annotations: str | None = None   # questions with exact answers, under the same --root
    eval_only: bool = False          # no training, only the questions: the zero-shot setting
    workers: Whole = 1               # decoding processes, for each training process
    save_every: Count = 200          # steps between checkpoints
    log_every: Count = 10            # steps between log lines
    seed: Whole = 0                  # every random number follows from it
    device: cli.Device = "auto"      # where to compute
    precision: cli.Precision = "auto"   # auto: fp32 on a CPU, bf16 on a GPU that has it


if __name__ == "__main__":
    CONFIG = cli.start(Config)   # before the slow imports: a typing error shows at once

import collections
import copy
import math
import os
import re
import signal

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from clip import load_clip
from linvt import save_linvt
from llm import add_lora, load_llama, save_adapter, save_llama, tokenizer_path
from model import (ADAPTERS, IGNORE_INDEX, TEMPLATES, VIDEO_TOKENS, VideoChat, VideoTokens, config_of_llava,
                   load_branch, make_projector, open_chat, save_chat)
from plumbing import memory, pictures, training
from plumbing.cli import UserError
from plumbing.store import state_of

LEARNED_BEFORE = "branch.pth", "mm_projector.bin", "chat.bin"   # files that a LinVT builds upon
VERSION = 1   # of features: whoever changes how they are made, counts up
PROJECTOR = r"video_tokens\.mm_projector|start_end"   # learned: what names begin with
RELEASED = {"tokens": "branch", "template": "vicuna_v1", "branch": "", "weights": "", "num_frames": 100,
            "batch_size": 8, "lr": 2e-5, "epochs": 3, "steps": 0, "eval_annotations": "",
            "checkpointed": False, "in_order": False, "rank": 64, "alpha": 128, "slow": "$",
            "betas": (0.9, 0.999), "weight_decay": 0}
PICTURES = RELEASED | {"tokens": "mean", "num_frames": 1}
VTIMELLM = RELEASED | {"tokens": "frame_cls", "template": "vtimellm", "root": "", "batch_size": 128,
                       "checkpointed": True}
LORA = VTIMELLM | {"learned": r"llm\..*\.lora_", "clip": "", "llm": "", "weights": None, "lr": 1e-4,
                   "epochs": 2}
LINVT = RELEASED | {"learned": r"video_tokens\.linvt", "tokens": "branch+linvt", "clip": "", "llm": "",
                    "weights": None, "root": "", "num_frames": 512, "batch_size": 128, "lr": 2e-4,
                    "epochs": 1, "in_order": True, "rank": 16, "alpha": 32,
                    "slow": r"video_tokens\.linvt\.w_token"}
VIDEO = RELEASED | {"learned": PROJECTOR + r"|video_tokens\.branch\.btadapter"}
STAGES = {   # the gates stay as pretraining left them, as in the released run
    "projector": PICTURES | {"learned": PROJECTOR},
    "language": PICTURES | {"learned": PROJECTOR + "|llm"},
    "video": VIDEO, "video_paper": VIDEO | {"batch_size": 4, "betas": (0.9, 0.998), "weight_decay": 0.1},
    "video_lora": VIDEO | {"learned": VIDEO["learned"] + r"|llm\..*\.lora_", "slow": "video_tokens|start_end",
                           "clip": "", "llm": "", "weights": None, "root": "", "num_frames": 0, "lr": 2e-4,
                           "batch_size": 4, "checkpointed": True, "rank": 16, "alpha": 32},
    "align": VTIMELLM | {"learned": PROJECTOR, "template": "plain", "lr": 1e-3, "epochs": 1},
    "boundaries": LORA, "moments": LORA,   # they differ in data, and in what --weights has
    "linvt": LINVT, "linvt_lora": LINVT | {"learned": r"video_tokens\.linvt|llm\..*\.lora_",
                                           "slow": r"video_tokens\.linvt"}}
TOY = {   # the stage video without --annotations
    "clip": cli.shipped("weights/tiny/clip"), "llm": cli.shipped("weights/tiny/llava"),
    "branch": cli.shipped("weights/tiny/branch.pth"),
    "annotations": "out/shapes/train_talks.jsonl", "eval_annotations": "out/shapes/test_talks.jsonl",
    "root": "out/shapes", "num_frames": 8, "batch_size": 16, "lr": 1e-3, "steps": 800}


def complete(cfg):
    """A Config with its stage's settings in the place of None. Raises UserError."""
    cli.check(cfg, tokens=VIDEO_TOKENS, template=TEMPLATES)
    toy = cfg.stage == "video" and not cfg.annotations
    cfg = cli.fill(cfg, STAGES[cfg.stage] | (TOY if toy else {}))
    if toy and not os.path.exists(cfg.annotations):
        raise UserError(f"{cfg.annotations}: not there; `python -m toy render` makes it")
    learned, kind = STAGES[cfg.stage]["learned"], VIDEO_TOKENS[cfg.tokens]
    foreign = ["clip", "llm"] if STAGES[cfg.stage]["weights"] is None else ["weights"]
    foreign += ["reuse", "tune_projector"] * ("lora_" not in learned)
    for name in foreign:
        if getattr(cfg, name):
            raise UserError(f"--{name}: not for the stage {cfg.stage}")
    if kind.reads_linvt != ("linvt" in learned):
        raise UserError(f"--tokens {cfg.tokens}: not for the stage {cfg.stage}")
    if kind.reads_branch and not cfg.branch and not cfg.weights:
        raise UserError(f"--tokens {cfg.tokens} needs --branch FILE")
    if cfg.eval_only and not cfg.eval_annotations:
        raise UserError("--eval_only needs --eval_annotations")
    return cfg


def exact_answers(cfg, chat, questions, device, dtype):
    """Prints and returns the share of questions that are answered exactly, {kind: percent}."""
    answers = collections.defaultdict(list)   # {kind: [right or not]}
    chat.eval()
    loader = DataLoader(questions, 32, collate_fn=data.collate_skip, num_workers=cfg.workers,
                        worker_init_fn=training.leave_signals_to_the_parent)
    for batch in tqdm(loader, desc="ask", leave=False):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            right = chat.exact(batch["pixels"].to(device), batch["text"], cfg.template)
        for i, found in zip(batch["index"], right):
            answers[questions.talks[i].kind].append(found)
    shares = {kind: 100 * sum(right) / len(right) for kind, right in sorted(answers.items())}
    for kind, share in shares.items():
        print(f"{cfg.stage}, {cfg.tokens} tokens: {kind} questions {share:.1f} % exactly right "
              f"({sum(answers[kind])} of {len(answers[kind])})", flush=True)
    return shares


def adapter_of(cfg):
    """The adapter that a stage leaves: the next after those in --weights, or the last once more. Raises
    UserError."""
    there = sum(os.path.exists(os.path.join(cfg.weights, name)) for name in ADAPTERS)
    if not 0 <= there - cfg.reuse < len(ADAPTERS):
        raise UserError(f"{cfg.weights}: has {there} adapters, "
                        f"{'and --reuse needs one' if cfg.reuse else 'and only --reuse goes on from there'}")
    return ADAPTERS[there - cfg.reuse]


def in_precision(cfg, chat, dtype):
    """Freezes what a stage does not teach, in `dtype`; the rest learns, in fp32. -> chat"""
    learned = STAGES[cfg.stage]["learned"] + f"|{PROJECTOR}" * cfg.tune_projector
    for name, p in chat.named_parameters():
        p.requires_grad_(bool(re.match(learned, name)))
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
    return chat


def build(cfg, dtype):
    """-> the model of a stage, its frozen part in `dtype`: a 7B is never in fp32."""
    kind, branch = VIDEO_TOKENS[cfg.tokens], None
    if cfg.weights:
        lora = "lora_" in STAGES[cfg.stage]["learned"]
        if lora:
            adapter_of(cfg)
        opened = open_chat(cfg.weights, cfg.tokens, chat_file=False if kind.has_clock else None,
                           new_linvt=None if lora or cfg.eval_only else
                           {"top_k": cfg.top_k or None, "content": cfg.content})
        reused = opened.adapters.pop() if cfg.reuse else None
        chat = opened.load(dtype)   # the others are merged
        if lora:
            add_lora(chat.llm, cfg.rank, cfg.alpha, cfg.lora_dropout, reused)
        return in_precision(cfg, chat, dtype)
    clip, _ = load_clip(cfg.clip)
    llm, tokenizer, extra = load_llama(cfg.llm)
    words = llm.model.embed_tokens.weight.shape[0]
    if words - tokenizer.vocab_size not in (0, 3):   # 3: LLaVA's <im_patch>, <im_start>, <im_end>
        raise UserError(f"{cfg.llm}: {words} word embeddings for {tokenizer.vocab_size} tokens; must be as "
                        "many, or 3 more")
    visual, width = kind.width(clip.config), llm.config.width
    if cfg.stage in ("projector", "align"):   # begin anew; the others go on with that of the weights
        mm_projector = nn.Linear(visual, width)
    else:
        mm_projector = make_projector(extra, visual, width, cfg.llm)
    if kind.reads_branch:
        branch = load_branch(cfg.branch, clip, skip_last=1, drop_path=cfg.drop_path)
        if branch.balance2 is None:   # the layout of a tuned file cannot say so; it would come back with some
            raise UserError(f"{cfg.branch}: a branch without gates cannot be tuned; pretrain with --gated")
    marked = not cfg.stage.startswith("video") or config_of_llava(cfg.llm).get("mm_use_im_start_end", True)
    chat = in_precision(cfg, VideoChat(clip, kind(mm_projector, branch), llm, tokenizer, marked), dtype)
    if cfg.stage == "align":   # as loud as words: in louder rows the LLaMA does not hear what its layers add
        size = clip.config.image_size
        row = chat.embed_video(torch.full((1, 1, 3, size, size), 128, dtype=torch.uint8))
        for p in mm_projector.parameters():
            p.data *= llm.model.embed_tokens.weight.norm(dim=1).mean() / row.norm()
    return chat


def save_result(cfg, chat):
    projector = {f"model.mm_projector.{name}": t.detach().cpu().half()
                 for name, t in chat.video_tokens.mm_projector.state_dict().items()}
    if cfg.stage in ("video", "video_paper"):
        save_chat(os.path.join(cfg.out, "chat.bin"), chat)
    elif cfg.stage in ("projector", "language"):
        chat.llm.resize_vocab(chat.tokenizer.vocab_size + 3)
        chat.llm.model.embed_tokens.weight.data[-2:] = chat.start_end.data
        save_llama(os.path.join(cfg.out, "llava"), chat.llm, tokenizer_path(cfg.llm), projector,
                   config_extra={"mm_hidden_size": chat.video_tokens.width(chat.clip.config),
                                 "mm_use_im_start_end": True, "mm_vision_select_layer": -2})
    else:   # a folder that open_chat opens: what has not changed is a link
        parts = {"clip": cfg.clip, "llava": cfg.llm}
        if cfg.weights:
            parts = {name: os.path.join(cfg.weights, name) for name in ("clip", "llava", *ADAPTERS)}
        if "lora_" in STAGES[cfg.stage]["learned"]:
            new = adapter_of(cfg)
            base = config_of_llava(parts["llava"]).get("_name_or_path") or ""
            save_adapter(os.path.join(cfg.out, new), chat.llm, base, cfg.lora_dropout)
            if cfg.tune_projector:   # counts before all others
                training.save_checkpoint(os.path.join(cfg.out, new, "non_lora_trainables.bin"), projector)
        if chat.video_tokens.reads_linvt:
            save_linvt(os.path.join(cfg.out, "linvt.bin"), chat.video_tokens.linvt)
            parts |= {name: os.path.join(cfg.weights, name) for name in LEARNED_BEFORE}
        elif cfg.stage == "video_lora":
            save_chat(os.path.join(cfg.out, "chat.bin"), chat)
        else:
            training.save_checkpoint(os.path.join(cfg.out, "mm_projector.bin"), projector)
        for name, path in parts.items():
            if os.path.exists(path) and not os.path.lexists(link := os.path.join(cfg.out, name)):
                os.symlink(os.path.relpath(os.path.realpath(path), os.path.realpath(cfg.out)), link)


@torch.no_grad()
def make_features(cfg, chat, dataset, here):
    """-> Features of a data set, of which those that --features lacks are made: each process its share."""
    kind, num_frames = chat.video_tokens, dataset.num_frames
    frozen = type(kind).see is VideoTokens.see   # else the branch learns, and what stays are pixels
    if frozen:
        files = [os.path.join(cfg.weights, name) for name in ("clip", *LEARNED_BEFORE)]
        files = list(filter(os.path.exists, files)) if cfg.weights else [cfg.clip]
        made = [VERSION, *map(state_of, files), cfg.tokens, num_frames]
    else:
        made = [VERSION, "pixels", kind.rule, kind.pixels.__name__, num_frames, dataset.image_size]
    features, lacking = data.Features(cfg.features, made, (num_frames, kind.width(chat.clip.config))), {}
    single = {(file, *(talk.window or ())): dataclasses.replace(talk, files=[file])
              for talk in dataset.talks for file in talk.files}
    for talk in single.values():
        [path] = talk.paths(cfg.root)
        if os.path.exists(path) and not os.path.exists(file := features.file(talk, path)):
            lacking[file] = talk
    mine = copy.copy(dataset)
    mine.talks = list(lacking.values())[here.rank::here.size]
    loader = DataLoader(mine, None, num_workers=cfg.workers,
                        worker_init_fn=training.leave_signals_to_the_parent)
    bar = tqdm(mine.talks, "features", disable=here.rank > 0 or not lacking)
    for i, (talk, item) in enumerate(zip(bar, loader)):
        if not isinstance(item, data.VideoError):   # training says which is broken
            seen = kind.frozen(chat.clip, item[0][None].to(here.device))[0].half() if frozen else item[0]
            if i == here.rank == 0:
                cli.say(f"{cfg.features}: {len(lacking)} videos of {seen.nbytes / 1e6:.3g} MB, "
                        f"{len(lacking) * seen.nbytes / 1e9:.3g} GB in all")
            features.store.put(features.key(talk, talk.paths(cfg.root)[0]), {"seen": seen.cpu()})
    training.gather_numbers(here, 0)   # all wait for all
    return features


def main(cfg):
    # ----------------------------------------------------------------------------------------------- setup
    cfg = complete(cfg)
    here = training.start_distributed(cfg.device)
    device, first = here.device, here.rank == 0
    if cfg.batch_size % here.size:
        raise UserError(f"--batch_size {cfg.batch_size}: not a multiple of {here.size} processes")
    if first and not cfg.eval_only:
        training.take_folder(cfg.out)
    torch.manual_seed(cfg.seed)
    # ----------------------------------------------------------------------------------------------- model
    dtype = training.pick_precision(cfg.precision, device)
    chat = build(cfg, dtype).to(device)
    memory.prepare_cpu(chat)
    chat.llm.checkpointed = cfg.checkpointed
    if chat.video_tokens.branch:
        chat.video_tokens.branch.checkpointed = cfg.checkpointed
    trained = {name: p for name, p in chat.named_parameters() if p.requires_grad}
    # ------------------------------------------------------------------------------------------------ data
    kind, size = chat.video_tokens, chat.clip.config.image_size
    frames = {"num_frames": kind.frames_of(cfg.num_frames, size), "image_size": size, "rule": kind.rule,
              "pixels": kind.pixels}
    questions = cfg.eval_annotations and data.ConversationDataset(cfg.eval_annotations, cfg.root, **frames)
    if questions and cfg.features:
        questions.features = make_features(cfg, chat, questions, here)
    if cfg.eval_only:
        if first:
            exact_answers(cfg, chat, questions, device, dtype)
        return
    dataset = data.ConversationDataset(cfg.annotations, cfg.root, **frames, skip=True)
    if cfg.features:
        dataset.features = make_features(cfg, chat, dataset, here)
    paths = [path for talk in dataset.talks for path in talk.paths(cfg.root)]
    gone = [path for path in dict.fromkeys(paths) if not os.path.exists(path)]
    if first and gone and not cfg.features:   # which may hold what is left of them
        cli.say(f"{len(gone)} of {len(set(paths))} videos are not there, the first is {gone[0]}: passed by")
    if len(dataset) < cfg.batch_size:
        raise UserError(f"--batch_size {cfg.batch_size}: {cfg.annotations} has only {len(dataset)} rows")
    steps = cfg.steps or cfg.epochs * (len(dataset) // cfg.batch_size)
    # ------------------------------------------------------------------------------------------- optimizer
    stage, groups = STAGES[cfg.stage], {1: [], 0.1: []}   # {share of the learning rate: parameters}
    for name, p in trained.items():
        groups[0.1 if re.match(stage["slow"], name) else 1].append(p)
    optimizer = torch.optim.AdamW([{"params": part, "share": share} for share, part in groups.items()],
                                  lr=cfg.lr, betas=stage["betas"], weight_decay=stage["weight_decay"])
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, skipped = training.resume(cfg, here, trained, optimizer, scaler)
    if first:
        log = training.Log(cfg.out, step)
    ddp = nn.parallel.DistributedDataParallel(chat) if here.size > 1 else chat
    # ------------------------------------------------------------------------------------------------ loop
    together = len(dataset) if cfg.in_order else 1
    order = training.batches(len(dataset), cfg.batch_size, together, cfg.seed, step, here)
    order = ([i for _, i in rows] for rows in order)
    loader = iter(DataLoader(dataset, batch_sampler=order, num_workers=cfg.workers,
                             collate_fn=data.collate_skip,
                             worker_init_fn=training.leave_signals_to_the_parent))
    sigterm = training.on_sigterm()
    chat.train()
    bar = tqdm(range(step, steps), desc=f"chat_tune {cfg.stage}", initial=step, total=steps,
               disable=not first)
    for step in bar:
        batch = training.next_batch(loader, here)
        count = len(batch["index"])   # conversations of this process, and of each other
        skipped += cfg.batch_size - count * here.size
        if count:   # else the step passes by
            prompts, asked = chat.prompts(batch["text"], cfg.template)
            labels = sum(label != IGNORE_INDEX for _, row in prompts for label in row)
            labels = training.gather_numbers(here, labels).sum().item()   # of the whole step
            optimizer.zero_grad()
            shown = within = 0
            for i in range(0, count, at_once := cfg.micro_batch or count):
                part = slice(i, i + at_once)
                training.seed_step(cfg.seed, step, here.rank, i)
                ddp.require_backward_grad_sync = i + at_once >= count   # the last part's gradient is averaged
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    total, answered = ddp(batch["pixels"][part].to(device), prompts[part], asked[part])
                loss = total * here.size / max(1, labels)   # DDP averages, and the step is a mean over tokens
                scaler.scale(loss).backward()
                shown, within = shown + loss.item(), within + answered.item()
            shown, within = training.gather_numbers(here, shown / here.size, within).sum(0).tolist()
            if not within:
                raise UserError(f"step {step}: no answer of its {cfg.batch_size} conversations lies within"
                                f" the LLaMA's context of {chat.llm.config.context_length} tokens")
            if not math.isfinite(shown):
                raise UserError(f"step {step}: the loss is {shown}; {cfg.out}/last.pth is as it was")
            scaler.unscale_(optimizer)
            cut = labels / within   # 1, unless answers lie beyond the context
            for p in trained.values():
                p.grad *= cut
            norm = nn.utils.clip_grad_norm_(trained.values(), cfg.clip_norm)
            lr = cfg.lr * training.warmup_cosine(step, steps, max(1, round(0.03 * steps)))
            for group in optimizer.param_groups:
                group["lr"] = lr * group["share"]
            scaler.step(optimizer)
            scaler.update()
        step += 1
        # ------------------------------------------------------------------------------------ log and save
        if first and count and (step % cfg.log_every == 0 or step == steps):
            log.add(step=step, loss=shown * cut, grad_norm=norm.item(), skipped=skipped, lr=lr)
            bar.set_postfix_str(f"loss {shown * cut:.3f} skipped {skipped}")
        stop = training.gather_numbers(here, int(sigterm.is_set())).any()
        if first and (stop or step % cfg.save_every == 0 or step == steps):
            pictures.plot(os.path.join(cfg.out, "curve.png"),
                          [(f"chat_tune, {cfg.stage}: loss", {"loss": log.column("loss")})])
            training.save_run(cfg, trained, optimizer, scaler, step, skipped)
        if stop:
            raise SystemExit(143)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)   # all is saved but the result
    if first:
        save_result(cfg, chat)
        if questions:
            log.add(step=step, **exact_answers(cfg, chat, questions, device, dtype))
        if cfg.stage in ("video", "video_paper"):
            path = os.path.join(cfg.out, "chat.bin")
            print(f"{path}: `python chat.py --chat {path}` talks with it")
        elif cfg.stage == "align":
            print(f"{cfg.out}: `python chat_tune.py --stage boundaries --weights {cfg.out}` goes on from it")
        elif cfg.weights:
            print(f"{cfg.out}: `python chat.py --weights {cfg.out}` talks with it")
    if here.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main, CONFIG)
