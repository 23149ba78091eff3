"""Is the answer right? A file of predictions, and judges that never drift: the same digits for ever.

    python eval_qa.py ask --annotations out/shapes/test_talks.jsonl --root out/shapes --out out/qa.jsonl
    python eval_qa.py ask --annotations out/shapes/test_talks.jsonl --root out/shapes --out out/blind.jsonl \\
        --blind black
    python eval_qa.py score out/qa.jsonl --control out/blind.jsonl --train out/shapes/train_talks.jsonl
    python eval_qa.py compare out/qa.jsonl out/mean.jsonl
    torchrun --nproc_per_node 8 eval_qa.py ask --weights weights/released --dataset activitynet_qa \\
        --annotations test_q.json --answers test_a.json --root videos --out anet.jsonl

`ask` needs weights and videos, and goes on where it was stopped; what a judge needs of the model, it writes
down. The other commands read predictions alone. Questions are JSON lines of your own, {"video", "question",
"answer"} and maybe "options", or a data set in SETS, the table at the end of this file. docs/qa.md has all.

A number says little alone. Beside each stand the run without a picture (--blind, then --control), answers
that take no look, and 95 % intervals, clustered by video. What was not run says so. No model is a judge here:
`export` writes what the official scripts read, and `score --verdicts` counts what they leave.
"""
import dataclasses
from typing import Annotated

from plumbing import cli


@dataclasses.dataclass
class Config:
    command: Annotated[str, "ask", "score", "compare", "export"]   # what to do, see above
    file: str = ""                   # predictions, for all but ask
    other: str = ""                  # those to compare with; the file that export writes
    out: str = ""                    # of ask: predictions, JSON lines; FILE.run.json says how they were made
    annotations: str = ""            # questions
    answers: str = ""                # a file of its own for the answers, where a data set has one
    root: str = ""                   # folder that the names of videos are relative to
    dataset: str = "own"             # how the questions are read: a key of SETS
    names: str = ""                  # what videos are called: a JSON object, or lines `name file`
    limit: cli.Whole = 0             # ask about the first videos alone, a trial; 0: about all
    how: str = ""                    # of generate,rank,likelihood,text,letters; "": one that suits
    vocabulary: str = ""             # for rank: an answer a line, or a training file
    top: cli.Count = 1000            # of a training file: so many of its most frequent answers
    suffix: str = ""                 # goes after every question, as a request for a short answer
    blind: Annotated[str, "no", "black", "none"] = "no"   # the control: black frames, or no video tokens
    skip_broken: bool = False        # leave out videos that cannot be read; else the first is an error
    weights: str = cli.shipped("weights/tiny")   # a folder that chat.py opens
    branch: str | None = None        # branch file in the place of branch.pth
    chat: str | None = None          # what chat tuning learned, in the place of chat.bin
    tuned: bool = True               # use chat.bin, or --chat; without, the zero-shot setting
    tokens: str | None = None        # kind of video tokens; None: what the weights are for
    num_frames: cli.Count | None = None   # frames that the model sees; None: 100, or 8 for the toy world
    max_new_tokens: cli.Whole = 0    # of an answer; 0: 64, or 256 for Video-ChatGPT's questions
    batch_size: cli.Whole = 0        # answers at a time, and videos in hand; 0: 16 on a GPU, else 1
    device: cli.Device = "auto"      # where to compute
    dtype: str = "auto"              # fp32, bf16, fp16 for what is not rounded; auto: what is quick
    quantize: str = "auto"           # the LLaMA: int8, int4 or none; auto: int8 on a CPU if it is large
    judge: str = ""                  # of score and compare: one of JUDGES; default: all
    control: str = ""                # of score: predictions of a blind run
    train: str = ""                  # of score: where frequent answers are from; default: the file itself
    verdicts: str = ""               # of score: what another judge said, see docs/qa.md
    judge_name: str = ""             # which judge, and when: "gpt-3.5-turbo-0125, 2026-11-27"


FLAGS = dict(positional=["command", "file", "other"])
if __name__ == "__main__":
    CONFIG = cli.start(Config, **FLAGS)   # before the slow imports: a typing error shows at once

import collections
import csv
import glob
import hashlib
import json
import os
import re
import warnings

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import metrics
from metrics import answer_words, chosen, exact, interval, share_interval, token_f1, within
from plumbing import memory, training
from plumbing.cli import UserError, say
from plumbing.store import state_of

HOW = "generate", "rank", "likelihood", "text", "letters"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LIST = "{}\n{}\nAnswer with the letter of the right option."   # a question and its options


def main(cfg):
    cli.check(cfg, dataset=SETS, judge=["", *JUDGES], dtype=memory.DTYPES, quantize=memory.SCHEMES)
    needed = {"ask": ["annotations", "out"], "score": ["file"]}.get(cfg.command, ["file", "other"])
    for name in needed:
        if not getattr(cfg, name):
            raise UserError(f"{cfg.command} needs {name if name in FLAGS['positional'] else f'--{name}'}")
    {"ask": ask, "score": score, "compare": compare, "export": export}[cfg.command](cfg)


# ------------------------------------------------------------------------------------------------- questions
def read_questions(cfg):
    """-> [question], each {"id", "video", "window": [start, end] or None, "frames_fps", "group", "kind",
    "turns": [(question, answer)] before it, "question", "answer": [right ones] or None, "options": [text] or
    None}. Raises UserError with the row."""
    table, there, questions, odd = SETS[cfg.dataset], {}, {}, collections.Counter()
    for _, row in table_rows(cfg.answers) if cfg.answers else ():
        alone = pick(row, *IDS) is None   # {id: answer} in one object
        there |= {name: {"answer": x} for name, x in row.items()} if alone else {str(pick(row, *IDS)): row}
    for where, raw in table.rows(cfg.annotations):
        try:
            name = str(pick(raw, *IDS))
            known = name in there or not there
            found = table.convert({**there.get(name, {}), **raw}, cfg.root) if known else []
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            raise UserError(f"{where}: not a question of {cfg.dataset} ({type(e).__name__}: {e})")
        odd["no answer, or other tasks: left out"] += not found
        for row in found:
            row |= {"kind": table.kinds.get(str(row.get("kind")), row.get("kind"))}
            question = question_of(where, row, len(questions), odd)
            if questions.setdefault(question["id"], question) is not question:
                raise UserError(f"{where}: a second row of the id {question['id']}")
    for what, number in (+odd).items():
        warnings.warn(f"{cfg.annotations}: {number} with {what}")
    if table.sizes and len(questions) not in table.sizes:
        sizes = " or ".join(map(str, table.sizes))
        message = f"{cfg.annotations}: {cfg.dataset} has {sizes} questions, found {len(questions)}"
        if table.counted:
            raise UserError(f"{message}; --dataset own reads any number")
        warnings.warn(message)
    if not questions:
        raise UserError(f"{cfg.annotations}: no questions in it")
    return list(questions.values())


def question_of(where, row, number, odd):
    """A row of a file of questions, see docs/qa.md, checked. odd: counts what is strange but may be."""
    turns = [(row.get("question"), row.get("answer"))]
    if "conversations" in row or "messages" in row:
        turns = data.turns(row, where)
    *turns, (question, answer) = turns
    options, right = row.get("options"), answer if isinstance(answer, list) else [answer]
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: needs 'question', a str that is not empty")
    if options is not None:
        if (not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS)
                or not all(isinstance(option, str) for option in options)):
            raise UserError(f"{where}: options must be 2 to {len(LETTERS)} texts")
        texts = [tuple(answer_words(option)) for option in options]
        odd["options of equal words"] += len(set(texts)) < len(texts)
        odd["an empty option"] += () in texts
        if answer is not None:
            places = [place_of(a, options, where) for a in right]
            odd["an answer that is no option"] += None in places
            right = [a if place is None else options[place] for a, place in zip(right, places)]
    if answer is not None and not (right and all(isinstance(a, str) and a.strip() for a in right)):
        raise UserError(f"{where}: an answer is a text, or several, that are not empty")
    window = row.get("window")
    if row.get("start") is not None or row.get("end") is not None:
        window = [row.get("start", 0), row.get("end")]
    window, _ = data.shown({"window": window}, where, "window")
    return {"id": str(row.get("id", number)), "video": data.field(row, where, "video"), "window": window,
            "frames_fps": row.get("frames_fps"), "group": row.get("group"),
            "kind": None if row.get("kind") is None else str(row["kind"]),
            "turns": turns, "question": question.strip(), "answer": None if answer is None else right,
            "options": options}


def place_of(answer, options, where):
    """The place of a right answer: a number is that place, from 0; a text is an option's, else its letter.
    None for a text that is neither."""
    if type(answer) is int:
        if not 0 <= answer < len(options):
            raise UserError(f"{where}: answer {answer}, but there are {len(options)} options, from 0")
        return answer
    texts, said = [answer_words(option) for option in options], answer_words(str(answer))
    if answer in options or said in texts:
        return options.index(answer) if answer in options else texts.index(said)
    letter = re.fullmatch(r"\(?([A-Z])(?:[).:]\s*.*)?", str(answer).strip(), re.S)
    place = LETTERS.index(letter[1]) if letter else len(options)
    return place if place < len(options) else None


def find_video(cfg, question, names):
    """-> the path of its file, or of its folder of pictures. names: see read_names."""
    called = question["video"], SETS[cfg.dataset].name.format(question["video"])
    paths = [data.locate(cfg.root, name) for name in (*(names[x] for x in called if x in names), *called)]
    return next(filter(os.path.exists, paths), paths[0])


def read_names(path):
    """--names -> {what the questions call a video: its file}; lines say it in either order."""
    text = data.read_text(path)
    if text.lstrip().startswith("{"):
        return data.read_rows(path)[0][1]
    pairs = [line.split(None, 1) for line in map(str.strip, text.splitlines()) if line]
    return {name: file for pair in pairs for name, file in (pair, pair[::-1])}


# -------------------------------------------------------------------------------------------------- asking
def ask(cfg):
    """Writes a prediction for each question that has none in --out. Raises UserError."""
    from model import VIDEO_TOKENS, open_chat  # here and below: a judge needs no model

    cli.check(cfg, tokens=VIDEO_TOKENS)
    here, questions = training.start_distributed(cfg.device), read_questions(cfg)
    names = read_names(cfg.names) if cfg.names else {}
    units = collections.defaultdict(list)   # {(path, window, frames_fps): questions}: seen once
    for question in questions:
        path, window = find_video(cfg, question, names), question["window"]
        units[path, window and tuple(window), question["frames_fps"]].append(question)
    units = dict(list(units.items())[:cfg.limit or None])
    missing = sorted({path for path, *_ in units if not os.path.exists(path)})
    if missing and not cfg.skip_broken:
        raise UserError(f"--root {cfg.root}: {len(missing)} of {len(units)} videos are not there, the first "
                        f"is {missing[0]}; --skip_broken goes on without them")
    options = all(question["options"] for question in questions)
    how = (cfg.how or ("text" if options else "generate")).split(",")
    if not set(HOW).issuperset(how) or ("rank" in how) != bool(cfg.vocabulary):
        raise UserError(f"--how {','.join(how)}: some of {', '.join(HOW)}; rank goes with --vocabulary")
    cfg = dataclasses.replace(
        cfg, max_new_tokens=cfg.max_new_tokens or (256 if "videochatgpt" in cfg.dataset else 64),
        batch_size=cfg.batch_size or (16 if here.device.type == "cuda" else 1))
    state = [state_of(file) for file in (cfg.weights, cfg.branch, cfg.chat) if file]
    opened = open_chat(cfg.weights, cfg.tokens, cfg.branch, cfg.chat if cfg.tuned else False)
    dtype, scheme, precision = memory.choose(
        cfg.dtype, cfg.quantize, here.device, sum(p.numel() for p in opened.chat.llm.parameters()))
    num_frames = opened.chat.video_tokens.frames_of(cfg.num_frames, opened.chat.clip.config.image_size)
    memory.check(opened.need, dtype, scheme, here.device, num_frames)
    memory.choose_threads(opened.chat)
    digests = {name: hashlib.sha256(data.read_text(getattr(cfg, name)).encode()).hexdigest()
               for name in ("annotations", "answers", "vocabulary") if os.path.isfile(getattr(cfg, name))}
    record = {name: getattr(cfg, name)
              for name in ("num_frames", "tuned", "suffix", "max_new_tokens", "blind", "dataset", "top")}
    record |= {"weights": state, "tokens": opened.tokens, "precision": precision, "how": how,
               "torch": torch.__version__, **digests}
    done = start_run(cfg, record, here)
    left = [(unit, asked) for unit, found in units.items()
            if (asked := [question for question in found if question["id"] not in done])]
    mine = left[here.rank::here.size]
    chat = opened.load(dtype, scheme, here.device) if mine else None
    closed = frequent(cfg.vocabulary, cfg.top) if mine and cfg.vocabulary else ()
    vocabulary = {text: answer_ids(chat, text) for text in closed}
    run, bar = run_of(record), tqdm(total=sum(len(asked) for _, asked in mine), desc="ask", disable=None)
    for i in range(0, len(mine), cfg.batch_size):
        rows = predict(cfg, chat, how, vocabulary, mine[i:i + cfg.batch_size], here.device)
        cli.append_lines(f"{cfg.out}.part{here.rank}", [json.dumps(row | {"run": run}) for row in rows])
        bar.update(len(rows))
    training.gather_numbers(here, 0)   # all wait for all
    if here.rank == 0:
        done = read_parts(cfg.out)
        order = {question["id"]: i for i, question in enumerate(questions)}
        rows = sorted(done.values(), key=lambda row: order[row["id"]])
        text = "".join(json.dumps(row) + "\n" for row in rows)
        cli.write_atomic(cfg.out, lambda f: f.write(text.encode()))
        for path in part_files(cfg.out):
            os.remove(path)
        skipped = sum("skipped" in row for row in rows)
        print(f"{cfg.out}: {len(rows) - skipped} of {len(rows)} questions answered; "
              f"`python eval_qa.py score {cfg.out}` counts")
    if here.size > 1:
        dist.destroy_process_group()


def run_of(record):
    """A run record -> what predictions say about how they were made, 8 hexadecimal digits."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]


def part_files(out):
    """What processes have written and no process has put in order yet."""
    return [path for path in sorted(glob.glob(f"{glob.escape(out)}.part*"))
            if re.fullmatch(r"\d+", path.rpartition(".part")[2])]


def read_parts(out):
    """-> {id: prediction} of `out` and its parts, whose last lines a kill may have cut short."""
    done = {}
    for path in [out] * os.path.exists(out) + part_files(out):
        text = data.read_text(path)
        if not text.endswith("\n"):
            cli.write_atomic(path, lambda f: f.write(text[:text.rfind("\n") + 1].encode()))
        if "\n" in text:
            done |= {row["id"]: row for row in read_predictions(path)}
    return done


def start_run(cfg, record, here):
    """Checks that what stands in --out was made with the same record -> {id: prediction} of what is done. All
    processes start from the same."""
    path = f"{cfg.out}.run.json"
    if here.rank == 0:
        cli.make_folder(os.path.dirname(os.path.abspath(cfg.out)))
        made = json.loads(json.dumps(record))   # as a file has it
        before = data.read_rows(path)[0][1] if os.path.exists(path) else made
        for name in sorted({*before, *made}):
            if before.get(name) != made.get(name):
                raise UserError(f"{path}: was made with {name} {before.get(name)}, not {made.get(name)}; "
                                "choose another --out")
        done = read_parts(cfg.out)
        if any(row.get("run") != run_of(record) for row in done.values()):
            raise UserError(f"{cfg.out}: holds predictions of another run; choose another --out")
        cli.write_atomic(path, lambda f: f.write(json.dumps(made, indent=1).encode()))
    training.gather_numbers(here, 0)   # the first has cut what a kill left
    done = {name: row for name, row in read_parts(cfg.out).items() if "skipped" not in row}
    training.gather_numbers(here, 0)   # all have read, before the first writes
    return done


def written(question):
    """The part of a prediction that makes a file complete by itself: no judge needs the questions again."""
    return {name: question[name] for name in ("id", "video", "group", "kind", "question", "answer", "options")
            if question[name] is not None}


def answer_ids(chat, text):
    """The tokens of an answer, as chat tuning teaches it, with its end -> tuple of int."""
    from model import prompt_ids

    template = chat.video_tokens.template
    asked, said = (prompt_ids(chat.tokenizer, [("?", answer)], template)[0] for answer in (None, text))
    return tuple(said[len(asked):])


def picture_numbers(count, fps, window, num_frames):
    """Which of `count` pictures, from 0, are shown at the middles of equal stretches of `window` seconds."""
    start, end = window
    times = (start + (i + 0.5) / num_frames * (end - start) for i in range(num_frames))
    return [min(count - 1, int(t * fps)) for t in times]


def look(cfg, chat, path, window, fps, device):
    """-> what the model sees of a video, whatever the question; None where it is to see nothing. fps: of a
    folder of pictures. Raises VideoError."""
    kind, size = chat.video_tokens, chat.clip.config.image_size
    if cfg.blind == "none":
        return None
    if fps:
        count = len(os.listdir(path))
        window = window or (0, count / fps)
        T = kind.frames_of(cfg.num_frames, size, window[1] - window[0])
        files = [sorted(os.listdir(path))[i] for i in picture_numbers(count, fps, window, T)]
        found = (data.read_picture(os.path.join(path, file)) for file in files)
        pixels = torch.cat([kind.pixels(picture[None], size) for picture in found])
    else:
        pixels, _ = kind.watch(path, size, cfg.num_frames, window)
    pixels = torch.zeros_like(pixels) if cfg.blind == "black" else pixels
    return kind.see(chat.clip, pixels[None].to(device))


@torch.inference_mode()
def predict(cfg, chat, how, vocabulary, units, device):
    """A prediction for each question of some units: [((path, window, frames_fps), questions)]. Prompts of one
    length are answered together; how likely an answer is, is computed alone, so that no digit depends on
    what else is in hand. vocabulary: {answer: its tokens}."""
    from llm import closed_answer, generate_batch, log_likelihoods, stream_text

    rows, waiting = [], collections.defaultdict(list)   # {tokens of a prompt: [(row, prompt)]}
    for unit, questions in units:
        try:
            seen = look(cfg, chat, *unit, device)
        except data.VideoError as e:
            if not cfg.skip_broken:
                raise
            say(f"skipped: {e}")
            rows += [written(question) | {"skipped": str(e)} for question in questions]
            continue
        for question in questions:
            rows.append(row := written(question))
            options = question["options"] or []
            asked = f"{question['question']} {cfg.suffix}".strip()
            listed = "\n".join(f"({x}) {text}" for x, text in zip(LETTERS, options))
            listed = LIST.format(asked, listed) if options else asked
            bare, listed = (chat.prompt(seen, [*question["turns"], (x, None)]) for x in (asked, listed))
            if "generate" in how:
                waiting[listed.shape[1]].append((row, listed))
            answers, letters = question["answer"] or [], LETTERS[:len(options)]
            for name, prompt, said in (("loglik", bare, options * ("text" in how)),
                                       ("letters", listed, letters * ("letters" in how)),
                                       ("answer_loglik", bare, answers[:1] * ("likelihood" in how))):
                if ids := [answer_ids(chat, text) for text in said]:
                    ids = [x[:-1] for x in ids] if name == "letters" else ids   # without the end token
                    row[name] = [round(x, 6) for x in log_likelihoods(chat.llm, prompt, ids)]
                    row[f"{name}_tokens"] = list(map(len, ids))
            if "rank" in how and not options:
                place, found = closed_answer(chat.llm, bare, list(vocabulary.values()))
                row |= {"ranked": list(vocabulary)[place], "ranked_loglik": round(found, 6)}
    for _, same in sorted(waiting.items()):
        for i in range(0, len(same), cfg.batch_size):
            found, embeds = zip(*same[i:i + cfg.batch_size])
            said = generate_batch(chat.llm, torch.cat(embeds), max_new_tokens=cfg.max_new_tokens,
                                  stop_ids=chat.tokenizer.stop_ids)
            for row, (ids, cut) in zip(found, said):
                row["prediction"] = "".join(stream_text(chat.tokenizer, ids)).strip()
                row |= {"tokens": len(ids), "cut": cut}
    return rows


# -------------------------------------------------------------------------------------------------- judging
def most_likely(row, name, mean=False):
    """Which option had the highest log-likelihood, a sum over its tokens or their mean; of equal ones the
    first."""
    sums, tokens = row[name], row[f"{name}_tokens"]
    scores = [x / n for x, n in zip(sums, tokens)] if mean else sums
    return row["options"][scores.index(max(scores))]


def named(row):
    """The option that an answer names; one that names none is wrong, never a draw by lot."""
    place = chosen(row["prediction"], row["options"])
    return "" if place is None else row["options"][place]


# Judges: what they need of a prediction, and what they make of it: of open answers a score, 0 to 1; of
# options the text that was chosen, so that options of equal words are one. The first that was run is the
# headline
OPEN = {"exact": ("prediction", lambda row: exact(row["prediction"], row["answer"])),
        "within": ("prediction", lambda row: within(row["prediction"], row["answer"])),
        "f1": ("prediction", lambda row: token_f1(row["prediction"], row["answer"])),
        "rank": ("ranked", lambda row: exact(row["ranked"], row["answer"]))}
CHOICE = {"mean": ("loglik", lambda row: most_likely(row, "loglik", mean=True)),
          "sum": ("loglik", lambda row: most_likely(row, "loglik")),
          "letters": ("letters", lambda row: most_likely(row, "letters")),
          "generated": ("prediction", named)}
JUDGES = OPEN | CHOICE
HINTS = {"exact": "generate", "rank": "rank", "mean": "text", "letters": "letters", "generated": "generate"}


def same(text, answers):
    """Whether an option is a right one."""
    return answer_words(text) in [words for words in map(answer_words, answers) if words]


def read_predictions(path):
    """What ask wrote -> [prediction]. Raises UserError with the line."""
    rows = {}
    for where, row in data.read_rows(path):
        for name in ("id", "video", "question"):
            data.field(row, where, name)
        if rows.setdefault(row["id"], row) is not row:
            raise UserError(f"{where}: a second prediction for the id {row['id']}")
    return list(rows.values())


def scores_of(rows, judge):
    """-> (Q,) float64 by a judge, or None where what it needs was not asked for. Predictions without one are
    wrong."""
    needs, judged = JUDGES[judge]
    if not any(needs in row for row in rows):
        return None
    found = [judged(row) if needs in row else "" for row in rows]
    right = [same(text, row["answer"]) for text, row in zip(found, rows)] if judge in CHOICE else found
    return torch.tensor([float(x or 0) for x in right], dtype=torch.float64)


def groups_of(rows):
    """-> (Q,) int64, which of them fall together: those about a video, unless a row names its group."""
    names = [row.get("group", row["video"]) for row in rows]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])


def cell(values, groups, where=None):
    """Scores (Q,), or None -> "96.3 (94.9 to 97.7)", of those `where` (Q,) is true."""
    if values is None:
        return "not run"
    if where is not None:
        values, groups = values[where], groups[where]
    low, high = share_interval(values, groups)
    return f"{100 * values.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"


def answered(path):
    """-> predictions that can be judged. Raises UserError where answers are missing."""
    rows = read_predictions(path)
    if any(not row.get("answer") for row in rows):
        raise UserError(f"{path}: has no answers; `export --dataset SET` writes a submission")
    return rows


def score(cfg):
    """Prints tables of a file of predictions."""
    rows = answered(cfg.file)
    if cfg.verdicts:
        return imported(cfg, rows)
    control = {row["id"]: row for row in answered(cfg.control)} if cfg.control else {}
    if control and set(control) != {row["id"] for row in rows}:
        raise UserError(f"{cfg.control}: not predictions for the questions of {cfg.file}")
    known = known_answers(cfg.train) if cfg.train else [
        (row["question"], row["answer"][0], row.get("kind")) for row in rows]
    for judges in (OPEN, CHOICE):
        part = [row for row in rows if ("options" in row) == (judges is CHOICE)]
        if part and (not cfg.judge or cfg.judge in judges):
            report(cfg, part, judges, [control[row["id"]] for row in part] if control else None, known)


def report(cfg, rows, judges, control, known):
    """Prints the tables of questions of one sort, open or with options. control: the same, asked blindly;
    known: [(question, answer, kind)], for guesses."""
    groups, seen = groups_of(rows), torch.tensor(["skipped" not in row for row in rows])
    lines = {name: scores_of(rows, name) for name in judges if cfg.judge in ("", name)}
    headline = next((name for name, values in lines.items() if values is not None), next(iter(lines)))
    first = lines[headline]
    lines |= {f"blind: {headline}": control and scores_of(control, headline)}
    lines |= guesses(cfg, rows, known) if judges is OPEN else blind_options(rows)
    if cfg.vocabulary:
        closed = {tuple(answer_words(text)) for text in frequent(cfg.vocabulary, cfg.top)}
        there = [any(tuple(answer_words(text)) in closed for text in row["answer"]) for row in rows]
        lines["in the vocabulary, the most that rank can"] = torch.tensor(there, dtype=torch.float64)
    videos = len({row["video"] for row in rows})
    print(f"{cfg.file}: {len(rows)} questions about {videos} videos, in percent; 95 % intervals over "
          f"{groups.max() + 1} groups")
    if not seen.all():
        print(f"answered {seen.sum()} of {len(rows)}; the others count as wrong below, and without them "
              f"{headline} is {cell(first, groups, seen)}")
    width = max(map(len, lines)) + 2
    for name, values in lines.items():
        hint = f"ask --how {HINTS[name]}" if name in HINTS else "--control FILE"
        print(f"{name:{width}}{cell(values, groups):>22}" + f"  {hint}" * (values is None))
    if headline == "exact" and "within" in lines and lines["within"].mean() - first.mean() > 0.1:
        print("exact is far below within: answers are sentences; ask with --suffix for short ones")
    if judges is CHOICE and any("prediction" in row for row in rows):
        nameless = sum(not named(row) for row in rows if "prediction" in row)
        print(f"{nameless} answers name no option, which is wrong")
    kinds = collections.defaultdict(list)   # "free: colour" counts as "free", too
    for i, row in enumerate(rows):
        for kind in dict.fromkeys([row["kind"].split(": ")[0], row["kind"]] if "kind" in row else []):
            kinds[kind].append(i)
    if kinds:
        columns = {name: values for name, values in lines.items()
                   if values is not None and (name == headline or name not in judges)}
        print("\n" + " " * 26 + "".join(f"{re.split('[:,;]', name)[0]:>22}" for name in columns))
        for kind, where in sorted(kinds.items()):
            cells = "".join(f"{cell(values, groups, where):>22}" for values in columns.values())
            print(f"{kind} ({len(where)})".ljust(26) + cells)
        whole = [kinds[kind] for kind in {row["kind"]: 0 for row in rows if "kind" in row}]
        means = (sum(values[where].mean() for where in whole) / len(whole) for values in columns.values())
        print(f"mean over {len(whole)} kinds".ljust(26) + "".join(f"{100 * mean:>22.1f}" for mean in means))
    likelihoods(rows, control, groups)
    if judges is OPEN:
        two_and_numbers(rows)


def guesses(cfg, rows, known):
    """What takes no look: the commonest answer, of all, of a kind, to a beginning of the question."""
    everything = metrics.commonest([answer for _, answer, _ in known])
    here, kinds = "" if cfg.train else ", found here", collections.defaultdict(list)
    for _, answer, kind in known:
        kinds[kind].append(answer)
    said = {f"most frequent{here}: {everything}": [everything] * len(rows)}
    if len(kinds) > 1:
        of_kind = {kind: metrics.commonest(answers) for kind, answers in kinds.items()}
        said[f"by kind{here}"] = [of_kind.get(row.get("kind"), everything) for row in rows]
    if all(question for question, *_ in known):
        beginnings = metrics.Beginnings([(question, answer) for question, answer, _ in known])
        said[f"by question{here}"] = [beginnings.guess(row["question"]) for row in rows]
    return {name: torch.tensor([float(exact(guess, row["answer"])) for guess, row in zip(answers, rows)],
                               dtype=torch.float64) for name, answers in said.items()}


def blind_options(rows):
    """The same for options: the place that is most often right, the longest text; chance in its name."""
    places = [[float(same(text, row["answer"])) for text in row["options"]] for row in rows]
    longest = [max(range(len(row["options"])), key=lambda i: len(row["options"][i])) for row in rows]
    places = [right + [0.0] * (len(LETTERS) - len(right)) for right in places]
    best = max(range(len(LETTERS)), key=lambda i: sum(right[i] for right in places))
    chance = 100 * sum(1 / len(row["options"]) for row in rows) / len(rows)
    found = {f"best place, found here: {LETTERS[best]}": [right[best] for right in places],
             f"longest option; chance is {chance:.1f}": [right[i] for right, i in zip(places, longest)]}
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def likelihoods(rows, control, groups):
    """Prints how likely the right answers were, in nats a token, and how much of that the picture tells."""
    told = [i for i, sides in enumerate(zip(rows, control or rows))
            if all("answer_loglik" in row for row in sides)]
    if not told:
        return
    mine, theirs = (torch.tensor([part[i]["answer_loglik"][0] / part[i]["answer_loglik_tokens"][0]
                                  for i in told], dtype=torch.float64) for part in (rows, control or rows))
    said = f"log-likelihood of right answers, nats a token: {mine.mean():.3f}; blind: "
    if control is None:
        print(said + "not run")
        return
    gain = mine - theirs
    half = interval(gain[:, None], groups[told]).item()
    print(f"{said}{theirs.mean():.3f}; the picture tells {gain.mean():.3f} "
          f"({gain.mean() - half:.3f} to {gain.mean() + half:.3f})")


def two_and_numbers(rows):
    """Prints how far two predictions with one answer agree, and how far predicted numbers are off."""
    pairs = [[row.get("prediction", "") for row in pair] for pair in pairs_of(rows) if len(pair) == 2]
    if pairs:
        values = torch.tensor([token_f1(one, [other]) for one, other in pairs], dtype=torch.float64)
        print(f"f1 of two predictions with each other: {cell(values, torch.arange(len(pairs)))}")
    if all(row["answer"][0].isdecimal() for row in rows):
        said = [("".join(answer_words(row.get("prediction", ""))), int(row["answer"][0])) for row in rows]
        off = [(int(number) - right) ** 2 for number, right in said if number.isdecimal()]
        error = f"; mean squared error {sum(off) / len(off):.2f}" if off else ""
        print(f"{len(off)} of {len(rows)} predictions are a number{error}")


def known_answers(path):
    """A training file -> [(question or "", answer, kind or None)]: rows with answers, maybe beside
    questions, or conversations. Raises UserError."""
    known = []
    for where, row in table_rows(path):
        pairs = (data.turns(row, where) if "conversations" in row or "messages" in row else
                 [(pick(row, "question", "Q", "q") or "", pick(row, "answer", "A", "a"))])
        known += [(question, str(answer).strip(), pick(row, "kind", "type"))
                  for question, answer in pairs if answer is not None]
    if not known:
        raise UserError(f"{path}: no answers in it")
    return known


def frequent(path, top):
    """--vocabulary -> the answers that a closed set consists of: lines of text, or the most frequent `top` of
    a training file, those of equal number in alphabetical order."""
    if not path.endswith((".json", ".jsonl", ".csv", ".tsv")):
        return list(dict.fromkeys(filter(None, map(str.strip, data.read_text(path).splitlines()))))
    counts = collections.Counter(answer for _, answer, _ in known_answers(path))
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:top]


def compare(cfg):
    """Prints how two runs differ on the same questions, paired."""
    sides = [{row["id"]: row for row in answered(path)} for path in (cfg.file, cfg.other)]
    lacking = [len(sides[1 - i].keys() - sides[i].keys()) for i in (0, 1)]
    if any(lacking):
        raise UserError(f"not the same questions: {lacking[0]} are not in {cfg.file}, "
                        f"{lacking[1]} not in {cfg.other}")
    rows = list(sides[0].values())
    others = [sides[1][row["id"]] for row in rows]
    for judge in [cfg.judge] if cfg.judge else JUDGES:
        part = [i for i, row in enumerate(rows) if ("options" in row) == (judge in CHOICE)]
        a, b = (scores_of([side[i] for i in part], judge) if part else None for side in (rows, others))
        if a is None or b is None:
            continue
        gain = a - b
        half = interval(gain[:, None], groups_of([rows[i] for i in part])).item()
        mean = gain.mean().item()
        counts = [int(((a == x) & (b == y)).sum()) for x, y in ((1, 1), (1, 0), (0, 1), (0, 0))]
        print(f"{judge:10} {100 * a.mean():.1f} and {100 * b.mean():.1f}: {100 * mean:+.1f} "
              f"({100 * (mean - half):.1f} to {100 * (mean + half):.1f})" + (judge != "f1") *
              "; both right {}, the first alone {}, the second alone {}, none {}".format(*counts))


# --------------------------------------------------------------------------------------- judges elsewhere
def pairs_of(rows):
    """Predictions as the official scripts want them: one each, or two about one group "pair ..." together."""
    found = collections.defaultdict(list)
    for row in rows:
        found[row["group"] if row.get("group", "").startswith("pair ") else row["id"]].append(row)
    return list(found.values())


def export(cfg):
    """Writes the file that Video-ChatGPT's and BT-Adapter's judging scripts take, each by keys of its own; of
    a set with hidden answers, what its server takes. Raises UserError."""
    if cfg.dataset in SUBMISSIONS:
        rows = read_predictions(cfg.file)
        judge = next((name for name in CHOICE if all(CHOICE[name][0] in row for row in rows)), None)
        if not judge:
            raise UserError(f"{cfg.file}: not all questions have options and an answer")
        chose = [row["options"].index(text) if (text := CHOICE[judge][1](row)) else 0 for row in rows]
        out = SUBMISSIONS[cfg.dataset](rows, chose)
    else:
        out = []
        for pair in pairs_of(answered(cfg.file)):
            row, answer, said = pair[0], pair[0]["answer"][0], [x.get("prediction", "") for x in pair]
            asked = {"question": row["question"], "Q": row["question"], "pred": said[0]}
            if len(pair) == 2:
                asked = {"Q1": row["question"], "Q2": pair[1]["question"], "pred1": said[0],
                         "pred2": said[1]}
            out.append({"id": row["id"], "video_name": row["video"], "answer": answer, "A": answer} | asked)
    if os.path.exists(cfg.other):
        raise UserError(f"{cfg.other}: is there already; choose another name")
    cli.write_atomic(cfg.other, lambda f: f.write(json.dumps(out, indent=1).encode()))
    print(f"{cfg.other}: {len(out)} entries")


def imported(cfg, rows):
    """Prints what another judge said, {key: [verdict, {"q", "a", "pred"}]} of the official scripts, or JSON
    lines {"id", "verdict", "score"}. The official keys depend on an order, so words are compared."""
    if not cfg.judge_name:
        raise UserError("--verdicts needs --judge_name: which model judged, and when")
    said, there = collections.defaultdict(list), data.read_rows(cfg.verdicts)
    by_id = len(there) > 1 or "verdict" in there[0][1]
    try:
        for where, row in there:
            for key, (verdict, about) in {row["id"]: (row, {})}.items() if by_id else row.items():
                words = [about.get(name) for name in ("q", "q1", "q2", "a", "pred", "pred1", "pred2")]
                text = str(verdict["verdict"] if by_id else verdict.get("pred", ""))
                said[key if by_id else json.dumps(words)].append((text, float(verdict.get("score", 0))))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{where}: no verdicts of an official script, nor our own rows ({type(e).__name__})")
    keys = [row["id"] for row in rows] if by_id else list(map(words_of, pairs_of(rows)))
    found = [said[key].pop(0) for key in keys if said[key]]
    foreign = sum(map(len, said.values()))
    print(f"{cfg.judge_name}: {len(found)} of {len(keys)} questions have a verdict, {foreign} belong to none")
    for name, value in metrics.verdict_scores(found, len(keys)).items():
        print(f"{cfg.judge_name}: {name} {value:.2f}")


def words_of(pair):
    """What finds the verdict about one prediction, or about two with one answer."""
    q, pred = [row["question"] for row in pair], [row.get("prediction", "") for row in pair]
    q, pred = ([x[0], None, None] if len(pair) == 1 else [None, *x] for x in (q, pred))
    return json.dumps([*q, pair[0]["answer"][0], *pred])


# ------------------------------------------------------------------------------------------------ data sets
IDS = "question_id", "id", "key", "q_uid"   # what sets call the id of a question


def table_rows(path):
    """Rows of a file of JSON, JSON lines or CSV, whose columns commas or tabs part -> [(where, row)]. Raises
    UserError."""
    if path.endswith(".parquet"):
        raise UserError(
            f"{path}: parquet is not read here; turn it into JSON lines first: python -c \"import pandas, "
            "sys; pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)\" "
            f"{path} {path.removesuffix('parquet')}jsonl")
    if not path.endswith((".csv", ".tsv")):
        return data.read_rows(path)
    lines = data.read_text(path).splitlines()
    tabs = "\t" in lines[0]
    rows = csv.DictReader(lines, delimiter="\t" if tabs else ",",
                          quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
    return [(f"{path}, line {rows.line_num}", row) for row in rows]


def folder_rows(path):
    """Rows of all JSON files in a folder, which are tasks."""
    return [(where, row | {"task": os.path.basename(file)[:-5]})
            for file in sorted(glob.glob(os.path.join(glob.escape(path), "*.json")))
            for where, row in data.read_rows(file)]


def nested_rows(path):
    """Rows of {video: {kind: [question]}}."""
    [(where, whole)] = data.read_rows(path)
    return [(f"{where}, {video}", row | {"video": video, "kind": kind}) for video, kinds in whole.items()
            for kind, rows in kinds.items() if isinstance(rows, list) for row in rows if "question" in row]


def pick(row, *names):
    """The first of some keys that a row has, or None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def own(row, root):
    return [dict(row)]


def open_ended(row, root):
    """Video, question and answer by the names that these sets have for them."""
    name, answer = pick(row, *IDS), pick(row, "answer", "A")
    found = {"video": str(pick(row, "video_name", "video", "video_id", "gif_name")),
             "answer": None if answer is None else str(answer), "kind": pick(row, "type", "kind")}
    found |= {"id": name} if name is not None else {}
    if "Q1" not in row:
        return [found | {"question": pick(row, "question", "Q")}]
    both = {"group": f"pair {name if name is not None else row['Q1']}"}   # two questions with one answer
    return [found | both | {"id": f"{both['group'][5:]}.{i}", "question": row[f"Q{i}"]} for i in (1, 2)]


def nextqa(row, root):
    return [row | {"id": f"{row['video']}_{row['qid']}", "kind": row["type"], "answer": int(row["answer"]),
                   "options": [row[f"a{i}"] for i in range(5)]}]


def egoschema(row, root):
    options = [row[f"option {i}"] for i in range(5)]
    return [row | {"id": row["q_uid"], "video": row["q_uid"], "options": options}]


def mvbench(row, root):
    """The first revision shows parts of videos, a later one has cut them out: in folders of other names."""
    folder = next(folder for folder, tasks in MVBENCH.items() if row["task"] in tasks)
    row = row | {"kind": row["task"], "options": row["candidates"]}
    if folder in SEGMENTS and not os.path.isdir(os.path.join(root, folder)):
        folder = SEGMENTS[folder]
        row |= {"start": None, "end": None}
    return [row | {"video": f"{folder}/{row['video']}", "frames_fps": 3 if "frames_fps3" in folder else None}]


MVBENCH = {"star/Charades_v1_480": ("action_sequence", "action_prediction", "object_interaction"),
           "sta/sta_video": ("action_localization",), "tvqa/frames_fps3_hq": ("episodic_reasoning",),
           "ssv2_video": ("action_antonym",), "Moments_in_Time_Raw/videos": ("fine_grained_action",),
           "FunQA_test/test": ("unexpected_action",), "scene_qa/video": ("scene_transition",),
           "clevrer/video_validation": ("object_existence", "moving_direction", "moving_count",
                                        "moving_attribute", "counterfactual_inference"),
           "perception/videos": ("object_shuffle", "action_count", "state_change", "character_order"),
           "nturgbd": ("fine_grained_pose",), "vlnqa": ("egocentric_navigation",)}
SEGMENTS = {"star/Charades_v1_480": "star/Charades_segment", "sta/sta_video": "sta/sta_video_segment",
            "tvqa/frames_fps3_hq": "tvqa/video_fps3_hq_segment"}


def videomme(row, root):
    return [row | {"id": row["question_id"], "video": row["videoID"], "kind": row["duration"],
                   "options": [re.sub(r"^[A-Z]\. ?", "", text) for text in row["options"]]}]


def mlvu(row, root):
    """Tasks without candidates ask for descriptions, which takes a judge."""
    return [row | {"video": f"{row['task']}/{row['video']}", "kind": row["question_type"],
                   "options": row["candidates"]}] if "candidates" in row else []


def tempcompass(row, root):
    """Options stand in the question, a line each, and the answer is such a line."""
    mark = re.compile(r"(?:[A-Z]\.|(?:Option|Caption|Sentence) \w+:) *")
    lines = row["question"].split("\n")
    options = [mark.sub("", line, 1) for line in lines[1:] if mark.match(line)]
    question = "\n".join(line for i, line in enumerate(lines) if i == 0 or not mark.match(line))
    found = row | {"question": question, "answer": mark.sub("", row["answer"], 1)}
    return [found | {"options": options} if options else found]


def perceptiontest(row, root):
    return [row | {"id": f"{row['video']}_{row['id']}", "answer": row.get("answer_id"),
                   "kind": row.get("area")}]


def videovista(row, root):
    if row["Type"] == "Relation Reasoning-Image":   # shows a picture besides
        return []
    return [{"id": row["question_id"], "video": row["video_name"], "question": row["Question"],
             "options": row["Answer_Choices"], "answer": row["Answer"], "kind": row["Type"]}]


def longvideobench(row, root):
    return [row | {"video": f"videos/{row['video_path']}", "kind": str(row["duration_group"]),
                   "answer": row.get("correct_choice"),
                   "options": [text for text in row["candidates"] if text != "N/A"]}]


def submit_perceptiontest(rows, chose):
    videos = collections.defaultdict(list)
    for row, place in zip(rows, chose):
        number = int(row["id"].rpartition("_")[2])
        videos[row["video"]].append({"id": number, "answer_id": place, "answer": row["options"][place]})
    return videos


SUBMISSIONS = {   # of sets with hidden answers: predictions and the places that they chose -> JSON
    "egoschema": lambda rows, chose: {row["id"]: place for row, place in zip(rows, chose)},
    "perceptiontest": submit_perceptiontest}


@dataclasses.dataclass
class Set:
    """How a data set is read."""
    convert: object         # (row, root) -> rows with keys as our own questions have them
    sizes: tuple = ()       # of its files
    counted: bool = False   # on the file itself; else another size only warns
    rows: object = table_rows   # path -> [(where, row)]
    name: str = "{}"        # of a video's file, where it is not as in the questions
    kinds: dict = dataclasses.field(default_factory=dict)   # its types -> kinds; "a: b" counts as "a", too


def numbered(*kinds):
    return {str(i): kind for i, kind in enumerate(kinds)}


SETS = {
    "own": Set(own),
    "activitynet_qa": Set(open_ended, (8000, 18000, 32000), True, name="v_{}", kinds=numbered(
        "motion", "spatial", "temporal", "free: yes/no", "free: colour", "free: object", "free: location",
        "free: number", "free: other")),
    "msvd_qa": Set(open_ended, (13157,), name="vid{}"),
    "msrvtt_qa": Set(open_ended, (72821,), name="video{}"),
    "tgif_frameqa": Set(open_ended, (13691,), True, kinds=numbered("object", "number", "colour", "location")),
    "tgif_count": Set(open_ended, (3554,), True), "videochatgpt_generic": Set(open_ended, (1996,)),
    "videochatgpt_temporal": Set(open_ended, (499,)), "videochatgpt_consistency": Set(open_ended, (998,)),
    "nextqa": Set(nextqa, (4996, 8564), True, kinds={
        **{x: f"{x[0]}: {x}" for x in ("CW", "CH", "TN", "TC", "DC", "DL", "DO")}, "TP": "T: TN"}),
    "egoschema": Set(egoschema, (500, 5031), True), "mvbench": Set(mvbench, (4000,), rows=folder_rows),
    "videomme": Set(videomme, (2700,)), "mlvu": Set(mlvu, (2175,), True, rows=folder_rows),
    "tempcompass": Set(tempcompass, (1580, 2453, 1503), True, rows=nested_rows),
    "perceptiontest": Set(perceptiontest, (19140,), rows=nested_rows),
    "videovista": Set(videovista), "longvideobench": Set(longvideobench, (1337, 5341))}


if __name__ == "__main__":
    cli.run(main, CONFIG)
