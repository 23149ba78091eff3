"""VTimeLLM's second stage for a tiny LLaMA: LoRA learns when events begin and end, with aids for a beginner.

    python -m toy.clock --weights out/time/align --out out/time/boundaries --aids

A LLaMA that has read the world needs no aids, and `chat_tune.py --stage boundaries` has none. This one has
only read about shapes. The loss of a few digits does not tell it that rotary positions are a clock, nor that
what is asked and what is shown have to meet; alone, it names the first event whatever is asked. With --aids
the loss has five more parts. They follow from the spans and words of the training data. Their heads are
thrown away:

    clock   after layer 2, linear heads read from each frame its place, 00 to 99; after layer 3, where the
            event or gap began in which it lies
    look    after layer 2, linear heads read colour, shape and motion: where a start is to be written, of the
            event that is asked about; from each frame, of what it shows. After layer 3 that motion once more
    point   no head: where a start is to be written, half of the attention heads of the last two layers look
            at the frames of the event that is asked about
    end     no head: where an end is to be written, the other half, in the last layer, look at the gap behind
            that event
    tell    no head: where an event is told in words, half of the attention heads of the last two layers look
            at its frames; in the second half of the run, as at first it is in the way of the others

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
    aids: bool = False               # help a beginner; see above
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
from metrics import GROUNDING, read_spans
from model import IGNORE_INDEX, VIDEO_INDEX, WHEN, open_chat, prompt_ids
from plumbing import training
from toy.language import choice, sentence
from toy.score import scores_of
from toy.stories import FRAMES, KINDS, spread_out
from toy.tiny_models import fit
from toy.world import COLOURS, MOTIONS, SHAPES

T = 100   # frames that a model sees of a story, and steps of its clock
SHARE = torch.arange(T) * (FRAMES - 1) // (T - 1) / FRAMES   # (T,): where they are in it
WORDS = {"colour": list(COLOURS), "shape": SHAPES, "motion": [way for m in KINDS for way in MOTIONS[m][:2]]}


# -------------------------------------------------------------------------------- stories from features
@torch.inference_mode()
def read_stories(cfg, chat, split):
    """-> [(what happens, a text for each event; spans (start, end), shares of the story; features (T, P))].

    What CLIP says of a story becomes a file NAME.npy, as VTimeLLM has them."""
    cli.make_folder(cfg.features)
    stories = []
    rows = data.read_rows(os.path.join(cfg.stories, f"{split}_events.jsonl"))
    for where, row in tqdm(rows, f"features {split}"):
        clip = data.timed(row, where)
        path = os.path.join(cfg.features, f"{os.path.splitext(clip['video'])[0]}.npy")
        if not os.path.exists(path):
            video = os.path.join(cfg.stories, clip["video"])
            pixels, _ = chat.video_tokens.watch(video, chat.clip.config.image_size)
            seen = chat.video_tokens.frozen(chat.clip, pixels[None])[0]
            cli.write_atomic(path, lambda f: np.save(f, seen.half().numpy()))
        spans = [(start / clip["duration"], end / clip["duration"]) for start, end, _ in clip["events"]]
        said = [text for *_, text in clip["events"]]
        stories.append((said, spans, torch.from_numpy(np.load(path)).float()))
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
    """-> [(question, answer, events whose spans it writes, events that it tells in words)]."""
    times = [[f"{min(round(100 * t), 99):02d}" for t in span] for span in spans]
    if rng.random() < 0.2:
        listed = [f"From {a} to {b}, {text}." for text, (a, b) in zip(said, times)]
        every = range(len(said))
        return [(choice(rng, data.ASK_ALL), " ".join(listed), every, every)]
    found = []
    for i, (text, (a, b)) in enumerate(zip(said, times)):
        if rng.random() < 0.2:
            found.append((choice(rng, data.ASK_WHAT).format(a, b), sentence(text), (), [i]))
        else:
            found.append((choice(rng, data.ASK_WHEN).format(text), f"From {a} to {b}.", [i], ()))
    return found


# -------------------------------------------------------------------------------- a step
@dataclasses.dataclass
class Batch:
    """The rows of a step. The T frames stand from `first` on. Each mark is (row, which event of its story,
    the token that writes what an aid is about, the frames (T,) bool that this token should look at)."""
    stories: list             # B of (said, spans, features)
    embeds: torch.Tensor      # (B, S, D)
    target: torch.Tensor      # (B, S - 1): what comes next, IGNORE_INDEX where that is not learned
    mask: torch.Tensor        # (B, 1, S, S) bool
    cos: torch.Tensor         # (B, 1, S, d): as sin, of the positions
    sin: torch.Tensor
    first: int
    starts: list              # marks: the first digit of a start
    ends: list                # the first digit of an end, and the gap behind its event
    words: list               # a word of an event
    asked: list               # those of `starts` whose event the question names

    @property
    def video(self):
        return slice(self.first, self.first + T)


def assemble(chat, stories, rng):
    """Stories (said, spans, features) -> Batch."""
    tokenizer, rows, targets, turns, starts, ends, words, asked = chat.tokenizer, [], [], [], [], [], [], []
    numerals = {tokenizer.encode(str(digit))[-1] for digit in range(10)}
    tokens = chat.video_tokens(torch.stack([seen for *_, seen in stories]))   # (B, T, D)
    for row, (said, spans, _) in enumerate(stories):
        ids, labels, turn, here = [], [], [], [within(span) for span in spans]
        behind = [within((end, after)) for (_, end), (after, _) in zip(spans, [*spans[1:], (1.0, 1.0)])]
        for i, (question, answer, dated, told) in enumerate(questions(said, spans, rng)):
            new, learned = prompt_ids(tokenizer, [(question, answer)], chat.video_tokens.template)
            at = new.index(VIDEO_INDEX)
            writes = at + T + len(ids) - 1   # the token before the first of the question
            answered = [writes + j for j, label in enumerate(learned[at + 1:]) if label != IGNORE_INDEX]
            digits = [writes + j for j, label in enumerate(learned[at + 1:]) if label in numerals]
            for event, k in zip(dated, range(0, len(digits), 4)):   # two of its start, two of its end
                starts.append((row, event, digits[k], here[event]))
                ends.append((row, event, digits[k + 2], behind[event]))
                asked += starts[-1:] * (not told)
            begins = [digit + 1 for digit in digits[3::4]] or answered[:1]
            ends_at = [digit - 2 for digit in digits[4::4]] + answered[-1:]   # before " From " and </s>
            for event, first, last in zip(told, begins, ends_at):
                words += [(row, event, place, here[event]) for place in range(first, last)]
            ids, labels = ids + new[at + 1:], labels + learned[at + 1:]
            turn += [i] * (len(ids) - len(turn))
        rows.append(chat.splice(new[:at + 1] + ids, tokens[row]))
        targets.append(torch.tensor([IGNORE_INDEX] * (at + T) + labels))
        turns.append(torch.tensor([-1] * (at + T) + turn))
    embeds = pad_sequence(rows, batch_first=True)
    turn = pad_sequence(turns, batch_first=True, padding_value=10 ** 6)   # (B, S): padding sees padding
    sees = (turn[:, None] == -1) | (turn[:, :, None] == turn[:, None])    # (B, S, S)
    mask = (sees & torch.ones(sees.shape[1:], dtype=torch.bool).tril())[:, None]
    target = pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)[:, 1:]
    cos, sin = rope_tables(chat.llm.config, mask[:, 0].sum(2) - 1)
    return Batch(stories, embeds, target, mask, cos[:, None], sin[:, None], at, starts, ends, words, asked)


def states_of(llm, batch):
    """-> what each layer reads, and what the last one leaves, each (B, S, D)."""
    states = [batch.embeds]
    for block in llm.model.layers:
        states.append(block(states[-1], batch.cos, batch.sin, batch.mask, None))
    return states


class Aids(nn.Module):
    """The heads, and what all aids add to the loss."""
    def __init__(self, llm):
        super().__init__()
        self.heads, width, words = llm.config.heads, llm.config.width, sum(map(len, WORDS.values()))
        self.place, self.began = nn.Linear(width, 20), nn.Linear(width, 20)   # tens and units
        self.asked, self.shown = nn.Linear(width, words), nn.Linear(width, words)
        self.motion = nn.Linear(width, len(WORDS["motion"]))

    def forward(self, layers, batch, states, late):
        """layers: of the LLaMA. late: whether the second half of the run has begun -> added to the loss."""
        h2, h3 = (F.layer_norm(states[n], states[n].shape[-1:]) for n in (2, 3))   # after layers 2 and 3
        edges = [torch.tensor([0, *np.ravel(spans)]) for _, spans, _ in batch.stories]
        began = [edge[torch.searchsorted(edge, SHARE.double(), right=True) - 1] for edge in edges]
        began = (100 * torch.stack(began)).round().long()                                      # (B, T)
        place = torch.arange(T).expand_as(began)
        clock = number_loss(self.place(h2[:, batch.video]), place)
        clock = clock + number_loss(self.began(h3[:, batch.video]), began)

        shown = torch.full((len(batch.stories), T, len(WORDS)), IGNORE_INDEX)
        for row, (said, spans, _) in enumerate(batch.stories):
            for text, span in zip(said, spans):
                shown[row, within(span)] = classes(text)
        look = words_loss(self.shown(h2[:, batch.video]), shown)
        if batch.asked:
            rows, events, places, _ = map(list, zip(*batch.asked))
            asked = [classes(batch.stories[row][0][event]) for row, event in zip(rows, events)]
            look = look + words_loss(self.asked(h2[rows, places]), torch.stack(asked))
        motion = F.cross_entropy(self.motion(h3[:, batch.video]).flatten(0, 1), shown[..., 2].flatten(),
                                 ignore_index=IGNORE_INDEX)

        half, loss = self.heads // 2, 0.4 * clock + 0.5 * look + motion
        for marks in filter(None, (batch.starts, late and batch.words)):   # point, tell
            for n in (-2, -1):
                share = attention_on(layers[n], states[n - 1], batch, marks)
                loss = loss - share[:, :half].mean()
        if marks := [mark for mark in batch.ends if mark[3].any()]:   # some gaps are shorter than a frame
            share = attention_on(layers[-1], states[-2], batch, marks)
            loss = loss - 0.5 * share[:, half:].mean()
        return loss


def classes(text):
    """"a red star moves left" -> (3,): which colour, shape and motion of WORDS."""
    said = text.split(maxsplit=3)[1:]
    return torch.tensor([words.index(word) for word, words in zip(said, WORDS.values())])


def number_loss(logits, number):
    """logits (..., 20) of tens and units, number (...) from 0 to 100."""
    tens, units = logits.flatten(0, -2).split(10, dim=1)
    number = number.clamp(max=99).flatten()
    return F.cross_entropy(tens, number // 10) + F.cross_entropy(units, number % 10)


def words_loss(logits, wanted):
    """logits (..., words) of colour, shape and motion, wanted (..., 3)."""
    parts = logits.flatten(0, -2).split([len(words) for words in WORDS.values()], dim=1)
    return sum(F.cross_entropy(part, column, ignore_index=IGNORE_INDEX)
               for part, column in zip(parts, wanted.flatten(0, -2).T))


def attention_on(block, x, batch, marks):
    """A layer that reads x (B, S, D): how much of its attention at Q marks lies on their frames -> the log,
    for each head (Q, H). Computed once more beside the model."""
    attn, z, (rows, _, places, frames) = block.self_attn, block.input_layernorm(x), map(list, zip(*marks))
    q, k = (rotate(proj(z).unflatten(2, (-1, attn.head_dim)).transpose(1, 2), batch.cos, batch.sin)
            for proj in (attn.q_proj, attn.k_proj))                                          # (B, H, S, d)
    logits = torch.einsum("qhd,qhsd->qhs", q[rows, :, places], k[rows]) / math.sqrt(attn.head_dim)
    logits = logits.masked_fill(~batch.mask[rows, 0, places][:, None], -math.inf)
    on_video = logits.log_softmax(-1)[..., batch.video]                                      # (Q, H, T)
    return on_video.masked_fill(~torch.stack(frames)[:, None], -math.inf).logsumexp(-1)


# -------------------------------------------------------------------------------- does it listen?
@torch.inference_mode()
def listens(chat, stories):
    """Asks when 100 events happen, drawn from all -> percent of each of GROUNDING; chance of the last."""
    asked = [(*story, event) for story in stories for event in range(len(story[0]))]
    answers = []
    for k in np.random.default_rng(0).permutation(len(asked))[:100]:
        said, spans, seen, event = asked[k]
        prompt = chat.prompt(seen[None], [(WHEN.format(said[event]), None)])
        new = generate(chat.llm, embeds=prompt, max_new_tokens=16, stop_ids=chat.tokenizer.stop_ids)
        found = read_spans("".join(stream_text(chat.tokenizer, new)), 1.0)[:1]
        answers.append((found, torch.tensor(spans, dtype=torch.float64), event))
    return scores_of(answers), 100 * np.mean([1 / len(spans) for _, spans, _ in answers])


def main(cfg):
    torch.set_num_threads(1)   # the models are too small for two
    torch.manual_seed(cfg.seed)
    training.take_folder(cfg.out)
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
    aids = Aids(chat.llm)
    trained = [p for p in (*chat.parameters(), *aids.parameters()) if p.requires_grad]

    def loss_of(step):
        if cfg.watch and step % cfg.watch == 0:
            found, chance = listens(chat, watched)
            found = ", ".join(f"{name} {value:.1f}" for name, value in zip(GROUNDING, found))
            print(f"step {step}: {found} (chance {chance:.1f})", flush=True)
        rng = np.random.default_rng([cfg.seed, 13, step])
        told = [told_anew(*stories[i], rng) for i in rng.integers(len(stories), size=cfg.batch_size)]
        batch = assemble(chat, told, rng)
        states = states_of(chat.llm, batch)
        learned = batch.target != IGNORE_INDEX
        logits = chat.llm.lm_head(chat.llm.model.norm(states[-1][:, :-1][learned]))
        loss = F.cross_entropy(logits, batch.target[learned])
        note = f"answers {loss.item():.3f}"
        if cfg.aids:
            loss = loss + aids(chat.llm.model.layers, batch, states, late=step >= cfg.steps // 2)
        return loss, note
    fit("clock", trained, loss_of, cfg.steps, round(0.03 * cfg.steps), cfg.seed, cfg.lr, 0, 1)
    save_adapter(os.path.join(cfg.out, "stage2"), chat.llm)
    tensors = {f"model.mm_projector.{name}": t.half() for name, t in projector.state_dict().items()}
    training.save_checkpoint(os.path.join(cfg.out, "mm_projector.bin"), tensors)
    for name in ("clip", "llava"):
        if not os.path.lexists(link := os.path.join(cfg.out, name)):
            target = os.path.realpath(os.path.join(cfg.weights, name))
            os.symlink(os.path.relpath(target, os.path.realpath(cfg.out)), link)


if __name__ == "__main__":
    cli.run(main, CONFIG)
