"""When does it happen? Events found in time, and dense captions, beside answers that need no model.

    python eval_grounding.py --annotations test.jsonl --root videos --save out/answers.jsonl
    python eval_grounding.py --annotations test.jsonl --from out/answers.jsonl
    python eval_grounding.py --annotations val_2.json --root videos --captions --save out/activitynet.jsonl
    python eval_grounding.py --annotations charades_sta_test.txt --root videos --save out/charades.jsonl

--save asks a chat model when each event happens, and adds its answers to a file; what stands there is not
asked again. --from scores such a file, without model and videos. An answer names a time in hundredths of
the clip, "from 23 to 45"; one without counts 0. Annotations are those of ActivityNet Captions or Charades-STA
as released, or JSON lines of your own: {"video", "events": [{"start", "end", "text"}]}, in seconds of the
video, with "window": [start, end] where only that part is shown.

In every table stand the whole video, the middle third, the best constant span and a true event picked
blindly. Weights that were not taught the clock name no time, and get 0.
"""
import dataclasses
from typing import Annotated

from plumbing import cli


@dataclasses.dataclass
class Config:
    annotations: str                 # ActivityNet Captions, Charades-STA, or JSON lines of your own
    root: str = ""                   # folder that the names of videos are relative to
    save: str = ""                   # ask, and add the answers to this JSONL
    from_: str = ""                  # score the answers in this JSONL
    protocol: Annotated[str, "nanobt", "vtimellm"] = "nanobt"   # VTimeLLM rounds IoU, and has its own clock
    skip_broken: bool = False        # leave out videos that cannot be read, and events without an answer
    captions: bool = False           # ask for all events of a video, too
    ask: str | None = None           # about an event {}; None: as /when in chat.py
    ask_all: str | None = None       # with --captions, about all; None: as there
    weights: str = cli.shipped("weights/tiny")   # a folder that chat.py opens
    tokens: str | None = None        # kind of video tokens; None: what the weights are for
    num_frames: cli.Count | None = None   # frames that the model sees; None: 100, or 8 for the toy world
    max_new_tokens: cli.Count = 256  # of an answer
    device: cli.Device = "auto"      # where to compute
    dtype: cli.Precision = "auto"   # fp32, bf16, fp16 for what is not rounded; auto: what is quick
    quantize: cli.Scheme = "auto"   # the LLaMA: int8, int4 or none; auto: int8 on a CPU if it is large


if __name__ == "__main__":
    CONFIG = cli.start(Config)   # before the slow imports: a typing error shows at once

import collections
import json
import math
import os
import re

import torch
from tqdm import tqdm

import data
from llm import generate, stream_text
from metrics import (CAPTIONS, GROUNDING, caption_scores, grounding_scores, interval, numbered, rarity,
                     read_events, read_spans, temporal_iou, words)
from model import ALL_EVENTS, VIDEO_TOKENS, WHEN, open_chat
from plumbing import memory, training
from plumbing.cli import UserError, say
from plumbing.store import state_of


def main(cfg):
    # ----------------------------------------------------------------------------------------------- setup
    cli.check(cfg, tokens=VIDEO_TOKENS)
    if bool(cfg.save) == bool(cfg.from_):
        raise UserError("give --save FILE to ask a model, or --from FILE to score answers again")
    cfg = dataclasses.replace(cfg, ask=cfg.ask or WHEN, ask_all=cfg.ask_all or ALL_EVENTS)
    if cfg.ask.count("{}") != 1:
        raise UserError(f"--ask {cfg.ask}: needs {{}} once, where the event goes")
    # ------------------------------------------------------------------------------ data, model, evaluation
    clips, turned = read_annotations(cfg.annotations)
    answers = ask(cfg, clips) if cfg.save else read_answers(cfg.from_)
    report(cfg, clips, answers, turned)


# ----------------------------------------------------------------------------------------------------- data
def key(row, event=None):
    """What finds the answer to a question about a clip: about the event with this text, or about all."""
    return json.dumps([row["video"], row["window"], event])


def read_annotations(path):
    """-> clips, one each, as data.timed gives them; how many events ended before they started. Those of
    released files are turned round; in your own that is an error. Raises UserError with the line."""
    clips, turned = {}, 0
    for where, row, released in annotation_rows(path):
        for event in row["events"] if released else ():
            turned += event["start"] > event["end"]
            event["start"], event["end"] = sorted((event["start"], event["end"]))
        clip = data.timed(row, where)
        clips.setdefault(key(clip), {**clip, "events": []})["events"] += clip["events"]
    return list(clips.values()), turned


def annotation_rows(path):
    """Yields (where, row like our own, whether it is of a released file), from any of the three formats."""
    text = data.read_text(path)
    if "##" in text.partition("\n")[0]:   # Charades-STA: `id start end##sentence`
        for number, line in enumerate(text.rstrip().split("\n"), 1):
            found = re.fullmatch(r"(\S+) (\d+\.?\d*) (\d+\.?\d*) ?##(.*)", line.strip())
            if not found:
                raise UserError(f"{path}, line {number}: not `id start end##sentence`")
            event = {"start": float(found[2]), "end": float(found[3]), "text": found[4]}
            yield f"{path}, line {number}", {"video": found[1], "events": [event]}, True
        return
    rows = data.read_rows(path)
    if len(rows) > 1 or "video" in rows[0][1]:
        yield from ((where, row, False) for where, row in rows)
        return
    for name, about in rows[0][1].items():   # ActivityNet Captions: {id: {duration, timestamps, sentences}}
        where = f"{path}, {name}"
        spans, texts = (data.field(about, where, what, list) for what in ("timestamps", "sentences"))
        if len(spans) != len(texts) or not all(map(data.two_numbers, spans)):
            raise UserError(f"{where}: needs as many timestamps, [start, end], as sentences")
        events = [{"start": start, "end": end, "text": text} for (start, end), text in zip(spans, texts)]
        yield where, {"video": name, "duration": about.get("duration"), "events": events}, True


def read_answers(path):
    """What --save wrote -> {key: {"video", "window", "duration": seconds, "event", "answer", ...}}."""
    answers = {}
    for where, row in data.read_rows(path):
        if "settings" in row:   # the first one: what the others were made with
            continue
        row = {"window": None, "event": None, "video": data.field(row, where, "video"), **row}
        timed = data.two_numbers([0, row.get("duration")]) and row["duration"] > 0
        if not timed or not isinstance(row.get("answer"), str):
            raise UserError(f"{where}: needs a duration above 0 and an answer")
        answers[key(row, row["event"])] = row
    return answers


# ---------------------------------------------------------------------------------------------------- model
def ask(cfg, clips):
    """Asks the model what the file of --save does not answer yet -> all answers in it, as read_answers gives
    them. Raises UserError."""
    missing = [c["video"] for c in clips if not os.path.exists(data.locate(cfg.root, c["video"]))]
    if missing and not cfg.skip_broken:   # said now, not after an hour
        raise UserError(f"--root {cfg.root}: {len(missing)} of its clips are not there, the first is "
                        f"{missing[0]}; --skip_broken goes on without them")
    opened, device = open_chat(cfg.weights, cfg.tokens), training.pick_device(cfg.device)
    settings = {name: getattr(cfg, name) for name in ("num_frames", "max_new_tokens", "ask", "ask_all")}
    settings |= {"tokens": opened.tokens, "weights": state_of(cfg.weights)}
    first = json.dumps({"settings": settings}) + "\n"
    old = data.read_text(cfg.save) if os.path.exists(cfg.save) else first
    if not old.startswith(first):
        raise UserError(f"{cfg.save}: not answers of these weights to these questions; choose another name")
    cli.make_folder(os.path.dirname(os.path.abspath(cfg.save)))
    whole = old[:old.rfind("\n") + 1]   # a line that was cut short is asked again
    cli.write_atomic(cfg.save, lambda f: f.write(whole.encode()))
    answers = read_answers(cfg.save)
    dtype, scheme, _ = memory.choose(cfg.dtype, cfg.quantize, device, opened.chat.llm)
    memory.prepare_cpu(opened.chat.llm)
    for row in new_answers(cfg, opened.load(dtype, scheme, device), device, clips, answers):
        answers[key(row, row["event"])] = row
        cli.append_lines(cfg.save, [json.dumps(row)])
    return answers


@torch.inference_mode()
def new_answers(cfg, chat, device, clips, answers):
    """Yields a row of read_answers for each question that has none. A clip is looked at once."""
    kind, size = chat.video_tokens, chat.clip.config.image_size
    for clip in tqdm(clips, "ask", disable=None):
        questions = {text: cfg.ask.replace("{}", text.lower().rstrip(".")) for *_, text in clip["events"]}
        questions |= {None: cfg.ask_all} if cfg.captions else {}
        questions = {event: q for event, q in questions.items() if key(clip, event) not in answers}
        if not questions:
            continue
        path = data.locate(cfg.root, clip["video"])
        try:
            pixels, duration = kind.watch(path, size, cfg.num_frames, clip["window"], clip["duration"])
        except data.VideoError as e:
            if not cfg.skip_broken:
                raise
            say(f"skipped: {e}")
            continue
        seen = kind.see(chat.clip, pixels[None].to(device))
        for event, question in questions.items():
            new = generate(chat.llm, embeds=chat.prompt(seen, [(question, None)]),
                           max_new_tokens=cfg.max_new_tokens, stop_ids=chat.tokenizer.stop_ids)
            yield {"video": clip["video"], "window": clip["window"], "duration": duration, "event": event,
                   "question": question, "answer": "".join(stream_text(chat.tokenizer, new)).strip()}


# --------------------------------------------------------------------------------------------------- scores
def collect(clips, answers, released):
    """Answers beside what is true -> events: (video, true spans (E, 2), which is meant, the answer's span
    (1, 2)), in shares of the clip; lists: (video, true spans, seconds of the clip, events that are true, and
    found, as caption_scores takes them); Counter of what is odd."""
    events, lists, odd = [], [], collections.Counter()
    for clip in clips:
        *_, texts = zip(*clip["events"])
        rows, all_of_it = [answers.get(key(clip, text)) for text in texts], answers.get(key(clip))
        odd["unanswered"] += rows.count(None)
        duration = next((row["duration"] for row in (all_of_it, *rows) if row), math.nan)
        true = torch.tensor([event[:2] for event in clip["events"]], dtype=torch.float64) / duration
        odd["beyond"] += ((true < 0) | (true > 1)).any(1).sum().item()
        true = true if released else true.clamp(0, 1)
        for i, row in enumerate(rows):
            if row:
                start, end = next(iter(read_spans(row["answer"], duration, released)), (math.nan, math.nan))
                odd["timeless"] += math.isnan(start)
                odd["backwards"] += start > end
                events.append((clip["video"], true, i, true.new_tensor([[start, end]])))
        if all_of_it:
            gold = [(*span, words(text)) for span, text in zip((true * duration).tolist(), texts)]
            found = [(start * duration, end * duration, words(text))
                     for start, end, text in read_events(all_of_it["answer"], released)]
            lists.append((clip["video"], true, duration, gold, found))
    return events, lists, odd


def report(cfg, clips, answers, turned):
    """Prints the tables. Raises UserError where answers are missing, unless they may be."""
    released = cfg.protocol == "vtimellm"
    events, lists, odd = collect(clips, answers, released)
    if odd["unanswered"] and not cfg.skip_broken or not events:
        raise UserError(f"{cfg.save or cfg.from_}: lacks answers about {odd['unanswered']} of "
                        f"{odd['unanswered'] + len(events)} events" +
                        "; --skip_broken leaves them out" * (not cfg.skip_broken))
    print(f"{cfg.annotations}, protocol {cfg.protocol}: {len(events)} events, {odd['unanswered']} left out")
    print(f"true spans: {odd['beyond']} beyond the clip{'' if released else ' (cut)'}, {turned} ended before "
          "they began (turned round)")
    print(f"answers: {odd['timeless']} without a time, {odd['backwards']} backwards (both count 0)")
    asked = torch.stack([true[i] for _, true, i, _ in events])                  # (Q, 2)
    grid = torch.combinations(torch.arange(101, dtype=torch.float64) / 100)     # (5050, 2)
    best = max(grid, key=lambda span: temporal_iou(span, asked).mean())
    guesses = {"whole video": asked.new_tensor([[0, 1]]), "middle third": asked.new_tensor([[1 / 3, 2 / 3]]),
               "best constant span, {:.2f} to {:.2f}, found here".format(*best): best[None],
               "a true event picked blindly": None}   # spans (K, 2), each as likely; None: the true ones
    digits = 2 if released else None
    table(GROUNDING, [video for video, *_ in events], {
        "answers": [grounding_scores(span, true, i, digits) for _, true, i, span in events],
        **{name: [grounding_scores(true if spans is None else spans, true, i, digits)
                  for _, true, i, _ in events] for name, spans in guesses.items()}})
    if not lists:
        return
    captions = [caption for *_, gold, _ in lists for *_, caption in gold]
    rare, (common, _) = rarity(captions), collections.Counter(captions).most_common(1)[0]
    print(f"\nall events of {len(lists)} clips: {sum(not found for *_, found in lists)} answers without any; "
          f"those below say {' '.join(common)!r}\n"
          "* of exact and stem matches; METEOR in full knows synonyms, and is higher")
    table(CAPTIONS, [video for video, *_ in lists], {
        "answers": [caption_scores(gold, found, rare, exchanged=released) for *_, gold, found in lists],
        **{name: [torch.stack([caption_scores(gold, [(*span, common)], rare, exchanged=released)
                               for span in ((true if spans is None else spans) * seconds).tolist()]).mean(0)
                  for _, true, seconds, gold, _ in lists] for name, spans in guesses.items()}})


def table(columns, videos, rows):
    """Prints rows {name: scores (C,) of each question}, in percent with 95 % intervals; videos: of each."""
    print(" " * 50 + "".join(f"{column:>14}" for column in columns))
    for name, scores in rows.items():
        values = 100 * torch.stack(scores)
        cells = zip(values.mean(0), interval(values, numbered(videos)))
        print(f"{name:50}" + "".join(f"{f'{mean:.1f} ± {half:.1f}':>14}" for mean, half in cells))


if __name__ == "__main__":
    cli.run(main, CONFIG)
