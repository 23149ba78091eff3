"""VTimeLLM's second stage for a tiny LLaMA: LoRA learns when events begin and end, with aids for a beginner.

    python -m toy.clock --weights out/time/align --out out/time/boundaries \\
        --clock 0.4 --look 0.5 --point 1 --end 0.5

A LLaMA that has read the world needs no aids, and `chat_tune.py --stage boundaries` has none. This one has only
read about shapes. The loss of a few digits does not tell it that rotary positions are a clock, nor that what is
asked and what is shown have to meet; alone, it names the first event whatever is asked. Each aid is a weight in
the loss, 0 by default. What they add is thrown away; they follow from the spans and words of the training data:

    --clock   after layer 2, linear heads read from each frame its place, 00 to 99; after layer 3, where the
              event or gap began in which it lies
    --look    after layer 2, linear heads read colour, shape and motion: where a start is to be written, of the
              event that is asked about; from each frame, of what it shows. After layer 3 its motion once more
    --point   no head: where a start is to be written, half of the attention heads of the last two layers look
              at the frames of the event that is asked about
    --end     where an end is to be written, the other half, in the last layer, look at the gap behind the event

Two more things are of this world. Each step shows stories that never were: the events of a rendered story, in
another order and at other times, from what CLIP said of its frames. And all questions about a story stand in
one row, but each sees the video alone and stands right behind it.
"""
import dataclasses

from plumbing import cli


@dataclasses.dataclass
class Config:
    weights: str = "out/time/align"   # a folder of the stage align
    fresh: bool = False              # begin with a new projector, and tune it along: without a first stage
    stories: str = "out/stories"     # where the long clips are
    features: str = "out/stories/features"   # what CLIP says of their frames; made where it lacks
    out: str = "out/time/boundaries"   # folder for the result, which chat.py opens
    clock: cli.Amount = 0            # weight of an aid in the loss; see above
    look: cli.Amount = 0             # likewise
    point: cli.Amount = 0            # likewise
    end: cli.Amount = 0              # likewise
    steps: cli.Count = 1300          # of training
    batch_size: cli.Count = 16       # stories a step
    lr: cli.Amount = 2.5e-3          # peak; linear up over 3 % of the run, then half a cosine
    rank: cli.Count = 32             # of LoRA
    alpha: cli.Count = 64            # of LoRA, which counts alpha / rank
    watch: cli.Whole = 200           # steps between looks at 100 questions; 0: none
    seed: cli.Whole = 0              # everything random follows from it


if __name__ == "__main__":
    CONFIG = cli.start(Config)   # before the slow imports: an error shows at once

import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from llm import add_lora, generate, rope_tables, rotate, save_adapter, stream_text
from metrics import GROUNDING, grounding_scores, read_spans
from model import IGNORE_INDEX, VIDEO_INDEX, WHEN, open_chat, prompt_ids
from plumbing import training
from toy.language import choice, sentence
from toy.stories import FRAMES, KINDS, spread_out
from toy.tiny_models import fit
from toy.world import COLOURS, MOTIONS, SHAPES

T = 100   # frames that a model sees of a story, and steps of its clock
SHARE = torch.arange(T) * (FRAMES - 1) // (T - 1) / FRAMES   # (T,): where they are in it
WORDS = {"colour": list(COLOURS), "shape": SHAPES, "motion": [way for m in KINDS for way in MOTIONS[m][:2]]}
BEHIND_ALL = 10 ** 6   # the question to which padding belongs


# -------------------------------------------------------------------------------- stories from features
@torch.inference_mode()
def read_stories(cfg, chat, split):
    """-> [(what happens, a text for each event; spans (start, end), shares of the story; features (T, P))].

    What CLIP says of a story becomes a file NAME.npy, as VTimeLLM has them."""
    cli.make_folder(cfg.features)
    stories, kind = [], chat.video_tokens
    rows = data.read_rows(os.path.join(cfg.stories, f"{split}_events.jsonl"))
    for where, row in tqdm(rows, f"features {split}"):
        clip = data.timed(row, where)
        path = os.path.join(cfg.features, f"{os.path.splitext(clip['video'])[0]}.npy")
        if not os.path.exists(path):
            found = data.sample_frames(os.path.join(cfg.stories, clip["video"]), T, kind.rule)
            pixels = torch.cat([kind.pixels(picture[None], chat.clip.config.image_size) for _, picture in found])
            seen = kind.frozen(chat.clip, pixels[None])[0].half().numpy()
            cli.write_atomic(path, lambda f: np.save(f, seen))
        spans = [(start / clip["duration"], end / clip["duration"]) for start, end, _ in clip["events"]]
        stories.append(([text for *_, text in clip["events"]], spans, torch.from_numpy(np.load(path)).float()))
    return stories


def within(span):
    """-> (T,) bool: the frames in a span (start, end), shares of the story."""
    return (SHARE >= span[0]) & (SHARE < span[1])


def told_anew(said, spans, seen, rng):
    """A story -> one with its events in another order, at other times."""
    order, new_spans = rng.permutation(len(said)), spread_out(len(said), rng)
    new = seen[:1].repeat(T, 1)   # each story begins with a gap
    for i, (start, end) in zip(order, new_spans):
        old, here = seen[within(spans[i])], within((start, end))
        new[here] = old[((SHARE[here] - start) / (end - start) * len(old)).long()]
    return [said[i] for i in order], new_spans, new


def questions(said, spans, rng):
    """-> [(question, answer, number of the event if its span is asked, else None)]."""
    times = [[f"{min(round(100 * t), 99):02d}" for t in span] for span in spans]
    if rng.random() < 0.2:
        listed = [f"From {a} to {b}, {text}." for text, (a, b) in zip(said, times)]
        return [(choice(rng, data.ASK_ALL), " ".join(listed), None)]
    found = []
    for i, (text, (a, b)) in enumerate(zip(said, times)):
        if rng.random() < 0.2:
            found.append((choice(rng, data.ASK_WHAT).format(a, b), sentence(text), None))
        else:
            found.append((choice(rng, data.ASK_WHEN).format(text), f"From {a} to {b}.", i))
    return found


# -------------------------------------------------------------------------------- a step
@dataclasses.dataclass
class Batch:
    """Rows of a step: V frames stand from `first` on. Lists say which tokens an aid is about."""
    embeds: torch.Tensor      # (B, S, D)
    target: torch.Tensor      # (B, S - 1): what comes next, IGNORE_INDEX where that is not learned
    mask: torch.Tensor        # (B, 1, S, S) bool
    positions: torch.Tensor   # (B, S)
    first: int
    starts: list              # (row, place of the token that writes the tens of a start, event)
    ends: list                # likewise of an end


def assemble(chat, stories, rng):
    """Stories (said, spans, features) -> Batch."""
    tokenizer, rows, targets, turns, starts, ends = chat.tokenizer, [], [], [], [], []
    digits = {tokenizer.encode(str(digit))[-1] for digit in range(10)}
    tokens = chat.video_tokens(torch.stack([seen for *_, seen in stories]))   # (B, T, D)
    for row, (said, spans, _) in enumerate(stories):
        ids, labels, turn = [], [], []
        for i, (question, answer, event) in enumerate(questions(said, spans, rng)):
            new, learned = prompt_ids(tokenizer, [(question, answer)], chat.video_tokens.template)
            at = new.index(VIDEO_INDEX)
            before = new[:at + 1]
            if event is not None:   # the digits of its answer: two of the start, two of the end
                written = [len(ids) + at + T + j for j in range(len(new) - at - 1)
                           if learned[at + 1 + j] in digits]
                starts.append((row, written[0] - 1, event))
                ends.append((row, written[2] - 1, event))
            ids, labels = ids + new[at + 1:], labels + learned[at + 1:]
            turn += [i] * (len(ids) - len(turn))
        rows.append(chat.splice(before + ids, tokens[row]))
        targets.append(torch.tensor([IGNORE_INDEX] * (at + T) + labels))
        turns.append(torch.tensor([-1] * (at + T) + turn))
    embeds = pad_sequence(rows, batch_first=True)
    turn = pad_sequence(turns, batch_first=True, padding_value=BEHIND_ALL)                      # (B, S)
    sees = (turn[:, None] == -1) | (turn[:, :, None] == turn[:, None])                         # (B, S, S)
    mask = (sees & torch.ones(sees.shape[1:], dtype=torch.bool).tril())[:, None]
    target = pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)[:, 1:]
    return Batch(embeds, target, mask, mask[:, 0].sum(2) - 1, at, starts, ends)


def states_of(llm, batch):
    """-> what each layer reads, and what the last one leaves (B, S, D); cos, sin (B, 1, S, d/2)."""
    tables = rope_tables(llm.config, 0, batch.embeds.shape[1], batch.embeds.device)
    cos, sin = (table[batch.positions][:, None] for table in tables)
    states = [batch.embeds]
    for block in llm.model.layers:
        states.append(block(states[-1], cos, sin, batch.mask, None))
    return states, cos, sin


class Aids(nn.Module):
    """The heads, and what all aids add to the loss."""
    def __init__(self, cfg, width):
        super().__init__()
        self.cfg, words = cfg, sum(map(len, WORDS.values()))
        self.place, self.began = nn.Linear(width, 20), nn.Linear(width, 20)   # tens and units
        self.asked, self.shown = nn.Linear(width, words), nn.Linear(width, words)
        self.motion = nn.Linear(width, len(WORDS["motion"]))

    def forward(self, llm, batch, stories, states, cos, sin):
        cfg, video, notes = self.cfg, slice(batch.first, batch.first + T), {}
        h2, h3 = (F.layer_norm(states[n], states[n].shape[-1:]) for n in (2, 3))   # states after layers 2, 3
        on = torch.stack([F.pad(torch.stack([within(span) for span in spans]), (0, 0, 0, 4 - len(spans)))
                          for _, spans, _ in stories])                               # (B, 4, T)
        shown = torch.full((len(stories), T, len(WORDS)), IGNORE_INDEX)               # (B, T, 3)
        for row, (said, *_) in enumerate(stories):
            for i, text in enumerate(said):
                shown[row, on[row, i]] = classes(text)
        loss = 0
        if cfg.clock:
            edges = [torch.tensor([0, *np.ravel(spans)]) for _, spans, _ in stories]
            began = torch.stack([e[torch.searchsorted(e, SHARE.to(e), right=True) - 1] for e in edges])
            loss = loss + cfg.clock * (number_loss(self.place(h2[:, video]), torch.arange(T).expand_as(began))
                                       + number_loss(self.began(h3[:, video]), (100 * began).round().long()))
        if not batch.starts:
            return loss, notes
        (rows, places, events), (_, last, _) = (torch.tensor(part).T for part in (batch.starts, batch.ends))
        if cfg.look:
            wanted = torch.stack([classes(stories[row][0][event]) for row, _, event in batch.starts])
            asked, seen = self.asked(h2[rows, places]), self.shown(h2[:, video])
            loss = loss + cfg.look * (words_loss(asked, wanted) + words_loss(seen, shown))
            loss = loss + F.cross_entropy(self.motion(h3[:, video]).flatten(0, 1), shown[..., 2].flatten(),
                                          ignore_index=IGNORE_INDEX)
        half = llm.config.heads // 2
        if cfg.point:
            for n in (-2, -1):
                share = attention_on(llm.model.layers[n], states[n - 1], cos, sin, batch, slice(half), rows, places,
                                     on[rows, events])
                loss = loss - cfg.point * share.mean()
            notes["pointing"] = share.exp().mean().item()
        if cfg.end:
            gaps = torch.stack([within((stories[row][1][event][1], next_start(stories[row][1], event)))
                                for row, _, event in batch.ends])                        # (Q, T)
            some = gaps.any(1)
            share = attention_on(llm.model.layers[-1], states[-2], cos, sin, batch, slice(half, None), rows[some],
                                 last[some], gaps[some])
            loss = loss - cfg.end * share.mean()
        return loss, notes


def next_start(spans, event):
    return spans[event + 1][0] if event + 1 < len(spans) else 1.0


def classes(text):
    """"a red star moves left" -> (3,): which colour, shape and motion of WORDS."""
    return torch.tensor([words.index(said) for said, words in zip(text.split(maxsplit=3)[1:], WORDS.values())])


def number_loss(logits, number):
    """logits (..., 20) of tens and units, number (...) from 0 to 99."""
    tens, units = logits.flatten(0, -2).split(10, dim=1)
    number = number.clamp(max=99).flatten()
    return F.cross_entropy(tens, number // 10) + F.cross_entropy(units, number % 10)


def words_loss(logits, wanted):
    """logits (..., words) of colour, shape and motion, wanted (..., 3)."""
    parts = logits.flatten(0, -2).split([len(words) for words in WORDS.values()], dim=1)
    return sum(F.cross_entropy(part, column, ignore_index=IGNORE_INDEX)
               for part, column in zip(parts, wanted.flatten(0, -2).T))


def attention_on(block, x, cos, sin, batch, heads, rows, places, frames):
    """Some heads of a layer that reads x (B, S, D): how much of their attention at `places` of `rows` (Q,) each
    lies on frames (Q, T) bool -> its log (Q, heads). Computed once more beside the model."""
    attn, z = block.self_attn, block.input_layernorm(x)
    q, k = (rotate(proj(z).unflatten(2, (-1, attn.head_dim)).transpose(1, 2), cos, sin)[:, heads]
            for proj in (attn.q_proj, attn.k_proj))                                     # (B, heads, S, d)
    logits = torch.einsum("qhd,qhsd->qhs", q[rows, :, places], k[rows]) / math.sqrt(attn.head_dim)
    logits = logits.masked_fill(~batch.mask[rows, 0, places][:, None], -math.inf)
    video = logits.log_softmax(-1)[..., batch.first:batch.first + T]
    return video.masked_fill(~frames[:, None], -math.inf).logsumexp(-1)


# -------------------------------------------------------------------------------- does it listen?
@torch.inference_mode()
def listens(chat, stories, number=100):
    """Asks when events of stories happen, `number` of all, drawn -> percent of GROUNDING (5,), and chance."""
    asked = [(*story, event) for story in stories for event in range(len(story[0]))]
    asked = [asked[k] for k in np.random.default_rng(0).permutation(len(asked))[:number]]
    scores, chance = [], []
    for said, spans, seen, event in asked:
        ids, _ = prompt_ids(chat.tokenizer, [(WHEN.format(said[event]), None)], chat.video_tokens.template)
        prompt = chat.splice(ids, chat.video_tokens(seen))[None]
        new = generate(chat.llm, embeds=prompt, max_new_tokens=16, stop_ids=chat.tokenizer.stop_ids)
        found = read_spans("".join(stream_text(chat.tokenizer, new)), 1.0)[:1] or [[math.nan] * 2]
        true = torch.tensor(spans, dtype=torch.float64)
        scores.append(grounding_scores(true.new_tensor(found), true, event))
        chance.append(1 / len(true))
    return 100 * torch.stack(scores).mean(0), 100 * np.mean(chance)


def main(cfg):
    torch.set_num_threads(1)   # the models are too small for two
    torch.manual_seed(cfg.seed)
    chat = open_chat(cfg.weights, "frame_cls", chat_file=False).load()
    stories, watched = (read_stories(cfg, chat, split) for split in ("train", "watch"))
    add_lora(chat.llm, cfg.rank, cfg.alpha)
    projector = chat.video_tokens.mm_projector
    if cfg.fresh:
        loudness = projector.weight.norm()
        projector.reset_parameters()
        for p in projector.parameters():
            p.data *= loudness / projector.weight.norm()
            p.requires_grad_(True)
    aids = Aids(cfg, chat.llm.config.width)
    trained = [p for p in (*chat.parameters(), *aids.parameters()) if p.requires_grad]
    chat.train()

    def loss_of(step):
        rng = np.random.default_rng([cfg.seed, 13, step])
        told = [told_anew(*stories[i], rng) for i in rng.integers(len(stories), size=cfg.batch_size)]
        batch = assemble(chat, told, rng)
        states, cos, sin = states_of(chat.llm, batch)
        answers = batch.target != IGNORE_INDEX
        logits = chat.llm.lm_head(chat.llm.model.norm(states[-1][:, :-1][answers]))
        loss = F.cross_entropy(logits, batch.target[answers])
        more, notes = aids(chat.llm, batch, told, states, cos, sin)
        if cfg.watch and step and step % cfg.watch == 0:
            found, chance = listens(chat, watched)
            print(f"step {step}, loss {loss.item():.3f}: " + ", ".join(
                f"{name} {value:.1f}" for name, value in zip(GROUNDING, found.tolist())) +
                f" (chance {chance:.1f})", flush=True)
        return loss + more, f"answers {loss.item():.3f} " + " ".join(f"{k} {v:.2f}" for k, v in notes.items())
    fit("clock", trained, loss_of, cfg.steps, round(0.03 * cfg.steps), cfg.seed, cfg.lr, 0, 1)
    cli.make_folder(cfg.out)
    save_adapter(os.path.join(cfg.out, "stage2"), chat.llm)
    tensors = {f"model.mm_projector.{name}": t.half() for name, t in projector.state_dict().items()}
    training.save_checkpoint(os.path.join(cfg.out, "mm_projector.bin"), tensors)
    for name in ("clip", "llava"):
        if not os.path.lexists(link := os.path.join(cfg.out, name)):
            target = os.path.realpath(os.path.join(cfg.weights, name))
            os.symlink(os.path.relpath(target, os.path.realpath(cfg.out)), link)


if __name__ == "__main__":
    cli.run(main, CONFIG)
