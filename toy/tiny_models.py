"""A tiny CLIP that knows the toy world from stills, and a tiny LLaMA that knows its language."""
import io
import math
import os

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from clip import CLIP, CLIPConfig, Tokenizer, save_clip
from llm import LLaMA, LLaMAConfig, SentencePieceTokenizer, save_llama
from model import IGNORE_INDEX, TEMPLATES, VIDEO_INDEX, prompt_ids
from plumbing import cli, training
from toy.language import still_caption, talk
from toy.world import ASSETS, FPS, FRAMES, SIZE, make_clips

BATCH = 128   # pictures a step


def fit(name, parameters, loss_of, steps, warmup, seed, lr=1e-3, weight_decay=0.05, clip_norm=math.inf,
        betas=(0.9, 0.98)):
    """The loop of all: AdamW, warm-up and cosine. loss_of(step) -> (loss, a note for the progress bar).
    parameters: or {"params": [parameter], "factor": of the learning rate} each."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    bar = tqdm(range(steps), name)
    for step in bar:
        training.seed_step(seed, step)
        for group in optimizer.param_groups:
            group["lr"] = lr * training.warmup_cosine(step, steps, warmup) * group.get("factor", 1)
        loss, note = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f} {note}")


def init_clip(model):
    """Normal, with the deviations that OpenAI's code gives its text tower, here for both; biases 0. With
    torch's own a tiny CLIP learns half as fast."""
    c, image, text = model.config, model.vision_model.embeddings, model.text_model.embeddings
    nn.init.normal_(image.class_embedding, std=c.vision_width ** -0.5)
    nn.init.normal_(text.token_embedding.weight, std=0.02)
    nn.init.normal_(text.position_embedding.weight, std=0.01)
    for tower, projection, width, depth in (
            (model.vision_model, model.visual_projection, c.vision_width, c.vision_layers),
            (model.text_model, model.text_projection, c.text_width, c.text_layers)):
        nn.init.normal_(projection.weight, std=width ** -0.5)
        for name, parameter in tower.encoder.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif "layer_norm" not in name:
                std = (2 * width if "fc1" in name else width) ** -0.5
                if "out_proj" in name or "fc2" in name:   # 2 * depth of them add up
                    std *= (2 * depth) ** -0.5
                nn.init.normal_(parameter, std=std)


def train_clip(cfg):
    """Contrastive training on single frames and what they show. Nothing here says anything about time."""
    folder = os.path.join(cfg.out, "clip")
    training.take_folder(folder)
    full = Tokenizer.from_file(os.path.join(ASSETS, "bpe_simple_vocab_16e6.txt.gz"))
    merges = [(full.symbols[a], full.symbols[b]) for a, b in full.merges]
    tokenizer = Tokenizer(merges[:800])   # enough for this world's words
    torch.manual_seed(cfg.seed)
    model = CLIP(CLIPConfig(
        image_size=SIZE, patch_size=16, vision_width=128, vision_layers=6, vision_heads=4, vision_mlp=512,
        text_width=128, text_layers=4, text_heads=4, text_mlp=512, vocab_size=tokenizer.vocab_size,
        projection_dim=128))
    init_clip(model)
    clips, per_clip = make_clips(cfg.pairs, cfg.seed, False)[::2], 6
    shares = [(2 * i + 1) / (2 * per_clip) for i in range(per_clip)]
    paths = [os.path.join(cfg.data, "train", f"{i:05d}a.mp4") for i in range(len(clips))]
    times = [share * FRAMES / FPS for share in shares]
    pictures = [picture for path in tqdm(paths, "read frames") for _, picture in data.frames(path, times)]
    frames = torch.stack(pictures).view(len(clips), per_clip, 3, SIZE, SIZE)   # uint8
    captions = [still_caption(clip, share)[0] for clip in clips for share in shares]
    ids = tokenizer(captions, 32).view(len(clips), per_clip, 32)

    def loss_of(step):
        clip, frame = torch.randint(len(clips), (BATCH,)), torch.randint(per_clip, (BATCH,))
        image = F.normalize(model.encode_image(frames[clip, frame]), dim=-1)   # (B, P)
        text = F.normalize(model.encode_text(ids[clip, frame]), dim=-1)        # (B, P)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        same = (ids[clip, frame][:, None] == ids[clip, frame]).all(-1).float()   # (B, B): no negatives
        target = same / same.sum(1, keepdim=True)
        right = same.gather(1, logits.argmax(1, keepdim=True)).mean()
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, f"right {right:.3f}"
    fit("clip", model.parameters(), loss_of, 1000, 100, cfg.seed)
    save_clip(folder, model, tokenizer)


def train_tokenizer(corpus, vocab_size):
    """Texts -> the bytes of a sentencepiece model with LLaMA's settings: <unk> <s> </s> come first."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=written, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, minloglevel=2)
    return written.getvalue()


def train_llama(cfg):
    """With words in the place of the video, answer questions about them: see toy.language.talk."""
    clips = make_clips(cfg.pairs, cfg.seed, False)
    corpus, rng = [TEMPLATES["vicuna_v1"].system] * 100, np.random.default_rng([cfg.seed, 11])
    for text, turns, _ in (talk(clips, rng) for _ in range(8000)):
        corpus += [text] + [said for q, answer in turns for said in (f"USER: {q}", f"ASSISTANT: {answer}")]
    folder = os.path.join(cfg.out, "llama")
    model_file = os.path.join(folder, "tokenizer.model")
    training.take_folder(folder)
    cli.write_atomic(model_file, lambda f: f.write(train_tokenizer(corpus, 720)))
    tokenizer = SentencePieceTokenizer(model_file)
    torch.manual_seed(cfg.seed)
    model = LLaMA(LLaMAConfig(vocab_size=tokenizer.vocab_size, width=128, layers=4, heads=4, mlp=352,
                              context_length=512))

    def loss_of(step):
        rng, rows, targets = np.random.default_rng([cfg.seed, 12, step]), [], []
        for text, turns, learned in (talk(clips, rng) for _ in range(24)):
            ids, labels = prompt_ids(tokenizer, turns, learned=learned)
            at, words = ids.index(VIDEO_INDEX), tokenizer.encode(text)
            rows.append(torch.tensor(ids[:at] + words + ids[at + 1:]))
            targets.append(torch.tensor(labels[:at] + [IGNORE_INDEX] * len(words) + labels[at + 1:]))
        ids = pad_sequence(rows, batch_first=True)   # (B, S)
        target = pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)   # (B, S)
        logits = model(ids)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=IGNORE_INDEX), ""
    fit("llama", model.parameters(), loss_of, 2500, 50, cfg.seed)
    save_llama(folder, model, model_file)
