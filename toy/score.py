"""The methods' claims in the toy world, in numbers: a clip and its twin, and when something happens."""
import dataclasses
import glob
import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
from llm import generate, stream_text
from metrics import GROUNDING, grounding_scores, read_spans, retrieval_metrics, twin_accuracy
from model import encode_pairs, encode_texts, load_encoder, open_chat
from plumbing import cli, memory
from toy.world import COLOURS, MOTIONS, SAMPLE, SHAPES, SIZE, TURNS, draw, read_clips

STATIC, CPU = {"colour": list(COLOURS), "shape": SHAPES}, torch.device("cpu")


def static_features(clips, encode_text):
    """Each clip's caption with every colour, and with every shape -> (Q, 2, 8, P) of encode_text(texts)."""
    texts = [dataclasses.replace(clip, **{field: value}).caption
             for clip in clips for field, values in STATIC.items() for value in values]
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}   # each text once
    return encode_text(list(place))[[place[text] for text in texts]].view(len(clips), 2, 8, -1)


def static_accuracy(video, clips, features):
    """video (Q, P), features (Q, 2, 8, P) -> how often the right colour or shape is the nearest."""
    nearest = (features @ video[:, None, :, None])[..., 0].argmax(2)   # (Q, 2)
    truth = [[values.index(getattr(clip, field)) for field, values in STATIC.items()] for clip in clips]
    return (nearest == torch.tensor(truth)).float().mean().item()


def spread(values):
    """One number, or the mean of several with the lowest and the highest; NaN: not measured."""
    mean = sum(values) / len(values)
    if math.isnan(mean):
        return "–"
    return f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else f"{mean:.1f}"


def score(cfg):
    """Twins, statics and retrieval on held-out combinations: mean-pooled CLIP beside branches."""
    annotations = os.path.join(cfg.data, "test_captions.jsonl")
    dataset = data.RetrievalDataset(data.read_captions(annotations), cfg.data, 8, SIZE)
    clips = read_clips(annotations)
    rows, by_motion = {}, {}   # {model, or motions of twins and how many: a list over seeds}
    for file in cfg.branches.split(","):
        encoder, tokenizer = load_encoder(cfg.out, file)
        memory.prepare_cpu(encoder)
        features = static_features(clips, lambda texts: encode_texts(encoder, tokenizer, texts, 32, CPU))
        branch, mean, text = encode_pairs(encoder, tokenizer, dataset, CPU, 64)
        for name, video in (("mean-pooled CLIP", mean), ("branch", branch)):
            metrics = {"twins": 100 * twin_accuracy(video, text).mean().item(),
                       "static": 100 * static_accuracy(video, clips, features),
                       **retrieval_metrics(text @ video.T),
                       "twin distance": (video[::2] - video[1::2]).norm(dim=1).max().item()}
            rows.setdefault(name, []).append(metrics)
            rounded = {key: round(value, 7) for key, value in metrics.items()}
            print(json.dumps({"branch file": file, "what": name, **rounded}), flush=True)
        right = twin_accuracy(branch, text)
        for pair, (forwards, backwards, _) in enumerate(MOTIONS):
            which = torch.tensor([TURNS[clip.motion][0] == pair for clip in clips])
            kind = f"{forwards} / {backwards}", which.sum().item() // 2
            by_motion.setdefault(kind, []).append(100 * right[which].mean().item())

    columns = ["twins", "static", "R@1", "R@5", "R@10"]
    print(f"\n{len(clips) // 2} pairs of held-out twins, {len(rows['branch'])} seeds: "
          "mean (lowest to highest), in percent\n")
    cli.table(["", *columns], ([name, *(spread([metrics[column] for metrics in found]) for column in columns)]
                               for name, found in rows.items()))
    cli.table(["branch, twins of", "pairs", "told apart"],
              ([kind, str(pairs), spread(values)] for (kind, pairs), values in by_motion.items()))


# -------------------------------------------------------------------------------- a picture
@torch.no_grad()
def picture(cfg):
    """A held-out clip, its twin, and which of the two captions each model finds nearer -> docs/twins.png."""
    encoder, tokenizer = load_encoder(cfg.out, cfg.branches.split(",")[0])
    clips, shares = (SAMPLE, SAMPLE.twin), [(2 * i + 1) / 16 for i in range(8)]
    pixels = torch.tensor(np.stack([[draw(clip, share) for share in shares] for clip in clips]))
    branch, mean = (F.normalize(feature, dim=-1) for feature in encoder(pixels.permute(0, 1, 4, 2, 3)))
    text = encode_texts(encoder, tokenizer, [clip.caption for clip in clips], 32, CPU)
    small, large = ImageFont.load_default(14), ImageFont.load_default(16)
    sheet = Image.new("RGB", (900, 2 * 176), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((556, 8), "similarity to two captions, the nearer one in colour", "#666666", small)
    for row, clip in enumerate(clips):
        top = 176 * row
        pen.text((8, top + 8), ("A clip", "Its twin, the same frames backwards")[row], "black", large)
        for i, share in enumerate(shares[row::2]):   # every second frame, of both the same ones
            sheet.paste(Image.fromarray(draw(clip, share, 128)), (8 + 134 * i, top + 36))
        for k, (name, video) in enumerate((("mean-pooled CLIP", mean), ("+ branch", branch))):
            y, near = top + 32 + 68 * k, (text @ video[row]).tolist()
            pen.text((556, y), name, "black", large)
            for j, caption in enumerate(clip.caption for clip in clips):
                colour = "#666666" if near[j] < max(near) else "#1a7f37" if j == row else "#d62728"
                pen.text((556, y + 22 + 18 * j), f"{near[j]:.3f}  {caption}", colour, small)
    cli.write_atomic(os.path.join("docs", "twins.png"), lambda f: sheet.save(f, "PNG"))


# -------------------------------------------------------------------------------- answers, side by side
@torch.no_grad()
def answers(cfg):
    """What chats say that runs/tiny.sh has tuned for three kinds of tokens, of every 29th held-out question
    about time: the first six that the branch answers rightly, and the first two that it does not."""
    dataset = data.ConversationDataset(os.path.join(cfg.data, "test_talks.jsonl"), cfg.data, 8, SIZE)
    chats = {}
    for kind in ("branch", "mean", "st_pool"):
        file = os.path.join(cfg.chats, f"chat_{kind}", "chat.bin")
        chats[kind] = open_chat(cfg.out, kind, chat_file=file).load()
    places, left = [i for i, talk in enumerate(dataset.talks) if talk.kind == "temporal"], {True: 6, False: 2}
    rows = []
    for i in places[::29]:
        pixels, [(question, right), *_], _ = dataset[i]
        said = [reply(chat, pixels, question) for chat in chats.values()]
        left[said[0] == right] -= 1
        if left[said[0] == right] >= 0:
            shown = (answer if answer == right else f"*{answer}*" for answer in said)   # wrong: in italics
            rows.append([dataset.talks[i].files[0], question, *shown, right])
    cli.table(["clip", "question", *chats, "right"], rows)


def reply(chat, pixels, question):
    """pixels (T, 3, H, W) uint8 -> what a chat says of them."""
    prompt = chat.prompt(chat.video_tokens.see(chat.clip, pixels[None]), [(question, None)])
    new = generate(chat.llm, embeds=prompt, max_new_tokens=40, stop_ids=chat.tokenizer.stop_ids)
    return "".join(stream_text(chat.tokenizer, new)).strip()


# -------------------------------------------------------------------------------- when does it happen?
def times(cfg):
    """VTimeLLM's Table 2 in miniature: rows from cfg.out/seed*/ROW.jsonl, which eval_grounding.py wrote, and,
    for questions that take no clock, from the last line of cfg.out/seed*/ROW/log.jsonl."""
    stories = {}   # {video: (spans (E, 2), what happens in each)}
    for where, row in data.read_rows(os.path.join(cfg.stories, "test_events.jsonl")):
        story = data.timed(row, where)
        *_, said = zip(*story["events"])
        spans = torch.tensor([event[:2] for event in story["events"]], dtype=torch.float64)
        stories[story["video"]] = spans / story["duration"], said
    asked = [(true, event) for true, said in stories.values() for event in range(len(said))]
    rows = {}
    for name, spans in (("whole video", [[0.0, 1.0]]), ("middle third", [[1 / 3, 2 / 3]]),
                        ("a true event picked blindly", None)):
        guesses = [(spans or true.tolist(), true, event) for true, event in asked]
        rows[name] = [scores_of(guesses) + [math.nan] * 2]
    for file in sorted(glob.glob(os.path.join(cfg.out, "seed*", "*.jsonl"))):
        found = []
        for row in map(json.loads, open(file)):
            if row.get("event"):
                true, said = stories[row["video"]]
                found.append((read_spans(row["answer"], row["duration"])[:1], true, said.index(row["event"])))
        scores, log = scores_of(found), os.path.join(file.removesuffix(".jsonl"), "log.jsonl")
        last = json.loads(open(log).readlines()[-1]) if os.path.exists(log) else {}
        scores = scores + [last.get(kind, math.nan) for kind in ("order", "static")]
        rows.setdefault(os.path.basename(file).removesuffix(".jsonl"), []).append(scores)
    columns = [*GROUNDING, "order", "static"]
    print(f"{len(asked)} events of {len(stories)} held-out stories, in percent: mean (lowest to highest)\n")
    cli.table(["", "seeds", *columns], ([name, str(len(seeds)), *map(spread, zip(*seeds))]
                                        for name, seeds in rows.items()))


def scores_of(answers):
    """[(spans [(start, end)] as of grounding_scores, none where an answer has none, events (E, 2), which is
    asked)] -> means of GROUNDING, in percent."""
    scores = [grounding_scores(events.new_tensor(spans or [[math.nan] * 2]), events, asked)
              for spans, events, asked in answers]
    return (100 * torch.stack(scores).mean(0)).tolist()
