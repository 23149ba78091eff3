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
    dtype: cli.Precision = "auto"   # fp32, bf16, fp16 for what is not rounded; auto: what is quick
    quantize: cli.Scheme = "auto"   # the LLaMA: int8, int4 or none; auto: int8 on a CPU if it is large
    control: str = ""                # of score: predictions of a blind run
    train: str = ""                  # of score: where frequent answers are from, of --dataset; "": the file
    verdicts: str = ""               # of score: what another judge said, see docs/qa.md
    judge_name: str = ""             # which judge, and when: "gpt-3.5-turbo-0125, 2026-11-27"


FLAGS = dict(positional=["command", "file", "other"])
if __name__ == "__main__":
    CONFIG = cli.start(Config, **FLAGS)   # before the slow imports: a typing error shows at once

import collections
import csv
import glob
import hashlib
import itertools
import json
import os
import re
import statistics
import string
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
LETTERS = string.ascii_uppercase
LIST = "{}\n{}\nAnswer with the letter of the right option."   # a question and its options


def main(cfg):
    cli.check(cfg, dataset=SETS)
    needed = {"ask": ["--annotations", "--out"], "score": ["file"]}.get(cfg.command, ["file", "other"])
    if lacking := [name for name in needed if not getattr(cfg, name.strip("-"))]:
        raise UserError(f"{cfg.command} needs {lacking[0]}")
    {"ask": ask, "score": score, "compare": compare, "export": export}[cfg.command](cfg)


# ------------------------------------------------------------------------------------------------- questions
def read_questions(cfg):
    """-> [question], each {"id", "video", "window": [start, end] or None, "frames_fps", "group", "kind",
    "turns": [(question, answer)] before it, "question", "answer": [right ones] or None, "options": [text] or
    None}. Raises UserError with the row."""
    table, answers, questions, where, odd = SETS[cfg.dataset], {}, {}, cfg.annotations, collections.Counter()
    for _, row in table_rows(cfg.answers) if cfg.answers else ():
        alone = pick(row, "id") is None   # {id: answer} in one object
        answers |= {i: {"answer": x} for i, x in row.items()} if alone else {str(pick(row, "id")): row}
    try:
        for where, row in table.rows(cfg.annotations):
            name = str(pick(row, "id"))
            row = answers.get(name, {}) | row
            row |= {ours: pick(row, ours) for ours in table.columns if pick(row, ours) is not None}
            change = table.change(row, cfg.root)
            if change is None or answers and name not in answers:
                odd["no answer, or other tasks: left out"] += 1
                continue
            row |= change
            if isinstance(row.get("video"), int):   # of some sets
                row["video"] = str(row["video"])
            row["kind"] = table.kinds.get(str(row.get("kind")), row.get("kind"))
            question = question_of(where, row, len(questions), odd)
            if questions.setdefault(question["id"], question) is not question:
                raise UserError(f"{where}: a second row of the id {question['id']}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        raise UserError(f"{where}: not a question of {cfg.dataset} ({type(e).__name__}: {e})")
    for what, number in (+odd).items():
        warnings.warn(f"{cfg.annotations}: {number} with {what}")
    if table.sizes and len(questions) not in table.sizes:
        sizes = " or ".join(map(str, table.sizes))
        message = f"{cfg.annotations}: {cfg.dataset} has {sizes} questions, found {len(questions)}"
        if table.counted:
            raise UserError(message)
        warnings.warn(message)
    if not questions:
        raise UserError(f"{cfg.annotations}: no questions in it; are --answers those of these?")
    return list(questions.values())


def question_of(where, row, number, odd):
    """A row of a file of questions, see docs/qa.md, checked. number: its id, if it has none. odd: counts what
    is strange but may be."""
    if "conversations" in row or "messages" in row:
        *turns, (question, answer) = data.turns(row, where)
    else:
        turns, question, answer = [], data.field(row, where, "question").strip(), row.get("answer")
    options, right = row.get("options"), None
    if options is not None and not (isinstance(options, list) and 2 <= len(options) <= len(LETTERS)
                                    and all(isinstance(option, str) for option in options)):
        raise UserError(f"{where}: options must be 2 to {len(LETTERS)} texts")
    if answer is not None:
        right = answer if isinstance(answer, list) else [answer]
        if not right or not all(type(a) in (str, int, float) and str(a).strip() for a in right):
            raise UserError(f"{where}: an answer is a text, or several, that are not empty")
        right = [option_of(a, options) if options else str(a) for a in right]
        odd["an answer that is no option"] += bool(options) and not set(right).issubset(options)
    window = row.get("window")
    if row.get("start") is not None or row.get("end") is not None:
        window = [row.get("start", 0), row.get("end")]
    window = window and data.seconds(window, where)
    return {"id": str(row.get("id", number)), "video": data.field(row, where, "video"), "window": window,
            "frames_fps": row.get("frames_fps"), "group": row.get("group"),
            "kind": None if row.get("kind") is None else str(row["kind"]),
            "turns": turns, "question": question, "answer": right, "options": options}


def option_of(answer, options):
    """A right answer -> the option that it means: a number is its place, from 0; a text is an option's, or
    names one as a prediction may. A text that names none stays as it is. Raises ValueError."""
    if type(answer) is int and not 0 <= answer < len(options):
        raise ValueError(f"answer {answer}, but there are {len(options)} options, from 0")
    if answer in options:
        return answer
    place = answer if type(answer) is int else chosen(str(answer), options)
    return str(answer) if place is None else options[place]


def find_video(cfg, question, names):
    """-> the path of its file, or of its folder of pictures. names: see read_names."""
    called = question["video"], SETS[cfg.dataset].name.format(question["video"])
    paths = [data.locate(cfg.root, file) for name in called for file in (names.get(name, name), name)]
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
    dtype, scheme, precision = memory.choose(cfg.dtype, cfg.quantize, here.device, opened.chat.llm)
    num_frames = opened.chat.video_tokens.frames_of(cfg.num_frames, opened.chat.clip.config.image_size)
    memory.check(opened.need, dtype, scheme, here.device, num_frames)
    memory.prepare_cpu(opened.chat)
    closed = frequent(cfg.vocabulary, cfg.top) if cfg.vocabulary else []
    record = {"weights": state, "tokens": opened.tokens, "tuned": cfg.tuned, "precision": precision,
              "num_frames": cfg.num_frames, "blind": cfg.blind, "suffix": cfg.suffix, "how": how,
              "max_new_tokens": cfg.max_new_tokens, "questions": digest(questions),
              "vocabulary": digest(closed), "torch": torch.__version__}
    run = digest(record)
    if here.rank == 0:
        cli.make_folder(os.path.dirname(os.path.abspath(cfg.out)))
        check_record(f"{cfg.out}.run.json", record)
        join_parts(cfg.out, run, questions)
        cli.write_rows(f"{cfg.out}.run.json", [record])
    training.gather_numbers(here, 0)   # all wait for the first
    rows = data.json_lines(cfg.out, data.read_text(cfg.out))
    done = {row["id"] for _, row in rows if "skipped" not in row}
    left = [(unit, asked) for unit, found in units.items()
            if (asked := [question for question in found if question["id"] not in done])]
    mine = left[here.rank::here.size]
    chat = opened.load(dtype, scheme, here.device) if mine else None
    vocabulary = {text: answer_ids(chat, text) for text in closed if mine}
    bar = tqdm(total=sum(len(asked) for _, asked in mine), desc="ask", disable=None)
    for i in range(0, len(mine), cfg.batch_size):
        rows = predict(cfg, chat, how, vocabulary, mine[i:i + cfg.batch_size], here.device)
        cli.append_lines(f"{cfg.out}.part{here.rank}", [json.dumps(row | {"run": run}) for row in rows])
        bar.update(len(rows))
    training.gather_numbers(here, 0)   # all wait for all
    if here.rank == 0:
        join_parts(cfg.out, run, questions)
        rows = read_predictions(cfg.out, answered=False)
        skipped = sum("skipped" in row for row in rows)
        print(f"{cfg.out}: {len(rows) - skipped} of {len(rows)} questions answered; "
              f"`python eval_qa.py score {cfg.out}` counts")
    if here.size > 1:
        dist.destroy_process_group()


def digest(value):
    """What JSON can hold -> 8 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def check_record(path, record):
    """Raises UserError if predictions were made with another record than this one."""
    made = data.read_rows(path)[0][1] if os.path.exists(path) else {}
    for name, value in json.loads(json.dumps(record)).items():   # as a file has it
        if made.get(name, value) != value:
            raise UserError(f"{path}: was made with {name} {made[name]}, not {value}; choose another --out")


def join_parts(out, run, questions):
    """Puts the predictions in `out`, and in the parts that processes write, into `out`, in the order of the
    questions. Raises UserError for those of another run."""
    parts, done = [path for path in glob.glob(f"{glob.escape(out)}.part*")
                   if path.rpartition(".part")[2].isdecimal()], {}
    for path in filter(os.path.exists, [out, *parts]):
        text = data.read_text(path)
        whole = text[:text.rfind("\n") + 1]   # a kill may have cut the last line
        for where, row in data.json_lines(path, whole):
            if data.field(row, where, "id") and row.get("run") != run:
                raise UserError(f"{where}: not a prediction of this run; choose another --out")
            done[row["id"]] = row
    cli.write_rows(out, [done[question["id"]] for question in questions if question["id"] in done])
    for path in parts:
        os.remove(path)


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
        files = sorted(os.listdir(path))
        window = window or (0, len(files) / fps)
        T = kind.frames_of(cfg.num_frames, size, window[1] - window[0])
        places = picture_numbers(len(files), fps, window, T)
        found = (data.read_picture(os.path.join(path, files[i])) for i in places)
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
def column(scores):
    """Numbers or bools -> (Q,) float64."""
    return torch.tensor([float(x) for x in scores], dtype=torch.float64)


def most_likely(row, name, mean=False):
    """The option of the highest log-likelihood, a sum or mean over its tokens; of equal ones the first."""
    scores = [x / n if mean else x for x, n in zip(row[name], row[f"{name}_tokens"])]
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


def same(text, row):
    """Whether an option is a right one."""
    return answer_words(text) in [words for words in map(answer_words, row["answer"]) if words]


def read_predictions(path, answered=True):
    """What ask wrote -> [prediction]. answered: all are to have an answer. Raises UserError with the line."""
    rows = {}
    for where, row in data.read_rows(path):
        for name in ("id", "video", "question"):
            data.field(row, where, name)
        if answered and not row.get("answer"):
            raise UserError(f"{where}: has no answers; `export --dataset SET` writes a submission")
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
    return column([same(*x) for x in zip(found, rows)] if judge in CHOICE else [x or 0 for x in found])


def groups_of(rows):
    """-> (Q,) int64, which of them fall together: those about a video, unless a row names its group."""
    return metrics.numbered([row.get("group", row["video"]) for row in rows])


def cell(values, groups):
    """Scores (Q,), or None -> "96.3 (94.9 to 97.7)"."""
    if values is None:
        return "not run"
    low, high = share_interval(values, groups)
    return f"{100 * values.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"


def score(cfg):
    """Prints tables of a file of predictions."""
    rows = read_predictions(cfg.file)
    if cfg.verdicts:
        return imported(cfg, rows)
    control = {row["id"]: row for row in read_predictions(cfg.control)} if cfg.control else {}
    if control and set(control) != {row["id"] for row in rows}:
        raise UserError(f"{cfg.control}: not predictions for the questions of {cfg.file}")
    known = known_answers(cfg.train, SETS[cfg.dataset].kinds) if cfg.train else [
        (row["question"], row["answer"][0], row.get("kind")) for row in rows]
    for judges in (OPEN, CHOICE):
        if part := [row for row in rows if ("options" in row) == (judges is CHOICE)]:
            report(cfg, part, judges, [control[row["id"]] for row in part] if control else None, known)


def report(cfg, rows, judges, control, known):
    """Prints the tables of questions of one sort, open or with options. control: the same, asked blindly;
    known: [(question, answer, kind)], for guesses."""
    groups, seen = groups_of(rows), torch.tensor(["skipped" not in row for row in rows])
    lines = {name: scores_of(rows, name) for name in judges}   # {name: scores (Q,), or None: not run}
    headline = next((name for name, values in lines.items() if values is not None), next(iter(lines)))
    lines[f"blind: {headline}"] = control and scores_of(control, headline)
    lines |= guesses(cfg, rows, known) if judges is OPEN else blind_options(rows)
    if cfg.vocabulary:
        closed = {tuple(answer_words(text)) for text in frequent(cfg.vocabulary, cfg.top)}
        lines["in the vocabulary, the most that rank can"] = column(
            any(tuple(answer_words(text)) in closed for text in row["answer"]) for row in rows)
    videos = len({row["video"] for row in rows})
    print(f"{cfg.file}: {len(rows)} questions about {videos} videos, in percent; 95 % intervals over "
          f"{groups.max() + 1} groups")
    if not seen.all():
        without = None if lines[headline] is None else lines[headline][seen]
        print(f"answered {seen.sum()} of {len(rows)}; the others count as wrong below, and without them "
              f"{headline} is {cell(without, groups[seen])}")
    width = max(map(len, lines)) + 2
    for name, values in lines.items():
        print(f"{name:{width}}{cell(values, groups):>22}")
    if judges is CHOICE and lines["generated"] is not None:
        nameless = sum(not named(row) for row in rows if "prediction" in row)
        print(f"{nameless} answers name no option, which is wrong")
    print_kinds(rows, groups, {name: values for name, values in lines.items()
                               if values is not None and (name == headline or name not in judges)})
    likelihoods(rows, control, groups)
    if judges is OPEN:
        two_and_numbers(rows)


def print_kinds(rows, groups, lines):
    """Prints a table of lines {name: scores (Q,)} for each kind of question, and their means over kinds."""
    kinds = collections.defaultdict(list)   # {kind: places in rows}; "free: colour" counts as "free", too
    for i, row in enumerate(rows):
        for kind in {row["kind"].split(": ")[0], row["kind"]} if "kind" in row else ():
            kinds[kind].append(i)
    if not kinds:
        return
    print("\n" + " " * 26 + "".join(f"{re.split('[:,;]', name)[0]:>22}" for name in lines))
    for kind, where in sorted(kinds.items()):
        cells = "".join(f"{cell(values[where], groups[where]):>22}" for values in lines.values())
        print(f"{kind} ({len(where)})".ljust(26) + cells)
    whole = sorted({row["kind"] for row in rows if "kind" in row})
    means = (sum(values[kinds[kind]].mean() for kind in whole) / len(whole) for values in lines.values())
    print(f"mean over {len(whole)} kinds".ljust(26) + "".join(f"{100 * mean:>22.1f}" for mean in means))


def guesses(cfg, rows, known):
    """What takes no look: the commonest answer, of all, of a kind, to a beginning of the question."""
    everything = metrics.commonest(answer for _, answer, _ in known)[0]
    here, kinds = "" if cfg.train else ", found here", collections.defaultdict(list)
    for _, answer, kind in known:
        kinds[kind].append(answer)
    said = {f"most frequent{here}: {everything}": [everything] * len(rows)}
    asked = {row["kind"] for row in rows if "kind" in row}
    if cfg.train and asked and len(kinds) > 1 and not asked & kinds.keys():
        warnings.warn(f"{cfg.train}: its kinds of questions are not those of {cfg.file}; is it of another "
                      "--dataset?")
    if len(kinds) > 1:
        of_kind = {kind: metrics.commonest(answers)[0] for kind, answers in kinds.items()}
        said[f"by kind{here}"] = [of_kind.get(row.get("kind"), everything) for row in rows]
    if all(question for question, *_ in known):
        said[f"by question{here}"] = metrics.guess_by_beginning(
            [(question, answer) for question, answer, _ in known], [row["question"] for row in rows])
    return {name: column(exact(guess, row["answer"]) for guess, row in zip(answers, rows))
            for name, answers in said.items()}


def blind_options(rows):
    """The same for options: the place that is most often right, the longest text; chance in its name."""
    right = [[same(text, row) for text in row["options"]] for row in rows]
    places = list(map(column, itertools.zip_longest(*right, fillvalue=False)))
    best = max(range(len(places)), key=lambda i: places[i].sum())
    longest = column(same(max(row["options"], key=len), row) for row in rows)
    chance = 100 * statistics.mean(1 / len(row["options"]) for row in rows)
    return {f"best place, found here: {LETTERS[best]}": places[best],
            f"longest option; chance is {chance:.1f}": longest}


def likelihoods(rows, control, groups):
    """Prints how likely the right answers were, in nats a token, and how much of that the picture tells."""
    told = [i for i, sides in enumerate(zip(rows, control or rows))
            if all("answer_loglik" in row for row in sides)]
    mine, blind = (column(part[i]["answer_loglik"][0] / part[i]["answer_loglik_tokens"][0] for i in told)
                   for part in (rows, control or rows))
    said = f"log-likelihood of right answers, nats a token: {mine.mean():.3f}; blind: "
    if told and control:
        gain, half = (mine - blind).mean(), interval((mine - blind)[:, None], groups[told]).item()
        print(f"{said}{blind.mean():.3f}; the picture tells {gain:.3f} "
              f"({gain - half:.3f} to {gain + half:.3f})")
    elif told:
        print(f"{said}not run")


def two_and_numbers(rows):
    """Prints how far two predictions with one answer agree, and how far predicted numbers are off."""
    pairs = [[row.get("prediction", "") for row in pair] for pair in pairs_of(rows) if len(pair) == 2]
    if pairs:
        values = column(token_f1(one, [other]) for one, other in pairs)
        print(f"f1 of two predictions with each other: {cell(values, torch.arange(len(pairs)))}")
    if all(row["answer"][0].isdecimal() for row in rows):
        said = [("".join(answer_words(row.get("prediction", ""))), int(row["answer"][0])) for row in rows]
        off = [(int(number) - right) ** 2 for number, right in said if number.isdecimal()]
        error = f"; mean squared error {statistics.mean(off):.2f}" if off else ""
        print(f"{len(off)} of {len(rows)} predictions are a number{error}")


def known_answers(path, kinds):
    """A training file -> [(question or "", answer, kind or None)]: rows with answers, maybe beside
    questions, or conversations. kinds: of a Set. Raises UserError."""
    known = []
    for where, row in table_rows(path):
        pairs = [(pick(row, "question") or "", pick(row, "answer"))]
        if "conversations" in row or "messages" in row:
            pairs = data.turns(row, where)
        kind = kinds.get(str(pick(row, "kind")), pick(row, "kind"))
        known += [(q, str(answer).strip(), kind) for q, answer in pairs if answer is not None]
    if not known:
        raise UserError(f"{path}: no answers in it")
    return known


def frequent(path, top):
    """--vocabulary -> the answers that a closed set consists of: lines of text, or the most frequent `top` of
    a training file, those of equal number in alphabetical order."""
    if not path.endswith((".json", ".jsonl", ".csv", ".tsv")):
        return list(dict.fromkeys(filter(None, map(str.strip, data.read_text(path).splitlines()))))
    return metrics.commonest(answer for _, answer, _ in known_answers(path, {}))[:top]


def compare(cfg):
    """Prints how two runs differ on the same questions, paired."""
    sides = [{row["id"]: row for row in read_predictions(path)} for path in (cfg.file, cfg.other)]
    if alone := sides[0].keys() ^ sides[1].keys():
        raise UserError(f"{cfg.file}, {cfg.other}: {len(alone)} questions are in one of the two alone")
    for judge in JUDGES:
        asked = [name for name, row in sides[0].items() if ("options" in row) == (judge in CHOICE)]
        a, b = (scores_of([side[name] for name in asked], judge) for side in sides)
        if a is None or b is None:
            continue
        gain, groups = (a - b)[:, None], groups_of([sides[0][name] for name in asked])
        mean, half = gain.mean().item(), interval(gain, groups).item()
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


def official(pair):
    """One prediction, or two with one answer -> what the official scripts take: each some of these keys."""
    row, answer, said = pair[0], pair[0]["answer"][0], [x.get("prediction", "") for x in pair]
    found = {"id": row["id"], "video_name": row["video"], "answer": answer, "A": answer}
    if len(pair) == 2:
        return found | {"Q1": row["question"], "Q2": pair[1]["question"], "pred1": said[0], "pred2": said[1]}
    return found | {"question": row["question"], "Q": row["question"], "pred": said[0]}


def export(cfg):
    """Writes the file that Video-ChatGPT's and BT-Adapter's judging scripts take, each by keys of its own; of
    a set with hidden answers, what its server takes. Raises UserError."""
    if cfg.dataset in SUBMISSIONS:
        rows = read_predictions(cfg.file, answered=False)
        judge = next((name for name in CHOICE if all(CHOICE[name][0] in row for row in rows)), None)
        if not judge:
            raise UserError(f"{cfg.file}: not all questions have options and an answer")
        chose = [row["options"].index(text) if (text := CHOICE[judge][1](row)) else 0 for row in rows]
        out = SUBMISSIONS[cfg.dataset](rows, chose)
    else:
        out = list(map(official, pairs_of(read_predictions(cfg.file))))
    if os.path.exists(cfg.other):
        raise UserError(f"{cfg.other}: is there already; choose another name")
    cli.write_atomic(cfg.other, lambda f: f.write(json.dumps(out, indent=1).encode()))
    print(f"{cfg.other}: {len(out)} entries")


def words_of(about):
    """What finds a verdict: question, answer and prediction, or two and two with one answer."""
    about = {name.lower(): text for name, text in about.items()}
    return tuple(about.get(name) for name in ("q", "q1", "q2", "a", "pred", "pred1", "pred2"))


def imported(cfg, rows):
    """Prints what another judge said, {key: [verdict, {"q", "a", "pred"}]} of the official scripts, or JSON
    lines {"id", "verdict", "score"}. The official keys depend on an order, so words are compared."""
    if not cfg.judge_name:
        raise UserError("--verdicts needs --judge_name: which model judged, and when")
    said = collections.defaultdict(list)   # {an id, or words: [(verdict, score)]}
    try:
        for where, row in data.read_rows(cfg.verdicts):
            if by_id := "verdict" in row:
                said[row["id"]].append((str(row["verdict"]), float(row.get("score", 0))))
                continue
            for verdict, about in row.values():
                said[words_of(about)].append((str(verdict.get("pred", "")), float(verdict.get("score", 0))))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{where}: no verdicts of an official script, nor our own rows ({type(e).__name__})")
    keys = [row["id"] for row in rows] if by_id else [words_of(official(pair)) for pair in pairs_of(rows)]
    found = [said[key].pop(0) for key in keys if said[key]]
    foreign = sum(map(len, said.values()))
    print(f"{cfg.judge_name}: {len(found)} of {len(keys)} questions have a verdict, {foreign} belong to none")
    for name, value in metrics.verdict_scores(found, len(keys)).items():
        print(f"{cfg.judge_name}: {name} {value:.2f}")


# ------------------------------------------------------------------------------------------------ data sets
COLUMNS = {   # our names: those that sets have, of which the first counts
    "id": ("question_id", "id", "key", "q_uid"),
    "video": ("video_name", "videoID", "video_path", "video", "video_id", "gif_name", "q_uid"),
    "question": ("question", "Q", "q", "Question"),
    "answer": ("answer", "A", "a", "Answer", "answer_id", "correct_choice"),
    "options": ("options", "candidates", "Answer_Choices"),
    "kind": ("area", "kind", "question_type", "type", "Type", "duration_group")}


def pick(row, ours):
    """What a row has in one of our columns, or None."""
    return next((row[name] for name in COLUMNS[ours] if row.get(name) is not None), None)


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
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if "\t" in lines[0] else {}
    rows = csv.DictReader(lines, **form)
    return [(f"{path}, line {rows.line_num}", row) for row in rows]


def folder_rows(path):
    """Rows of all JSON files in a folder, which are tasks."""
    return [(where, row | {"task": os.path.basename(file)[:-5]})
            for file in sorted(glob.glob(os.path.join(glob.escape(path), "*.json")))
            for where, row in data.read_rows(file)]


def nested_rows(path):
    """Rows of {video: {kind: [question]}}."""
    [(where, whole)] = data.read_rows(path)
    return [(f"{where}, {video}", {"kind": kind} | row | {"video": video}) for video, kinds in whole.items()
            for kind, rows in kinds.items() if isinstance(rows, list) for row in rows if "question" in row]


def paired_rows(path):
    """Rows of two questions with one answer, which become a group."""
    return [(where, row | {"id": f"{number}.{i}", "question": row[f"Q{i}"], "group": f"pair {number}"})
            for number, (where, row) in enumerate(data.read_rows(path)) for i in (1, 2)]


def mvbench(row, root):
    """The first revision shows parts of videos, a later one has cut them out: in folders of other names."""
    folder = next(folder for folder, tasks in MVBENCH.items() if row["task"] in tasks.split())
    change = {"kind": row["task"]}
    if folder in SEGMENTS and not os.path.isdir(os.path.join(root, folder)):
        folder = SEGMENTS[folder]
        change |= {"start": None, "end": None}
    return change | {"video": f"{folder}/{row['video']}",
                     "frames_fps": 3 if "frames_fps3" in folder else None}


MVBENCH = {   # folders of videos: the tasks about them
    "star/Charades_v1_480": "action_sequence action_prediction object_interaction",
    "sta/sta_video": "action_localization", "tvqa/frames_fps3_hq": "episodic_reasoning",
    "ssv2_video": "action_antonym", "Moments_in_Time_Raw/videos": "fine_grained_action",
    "FunQA_test/test": "unexpected_action", "scene_qa/video": "scene_transition",
    "clevrer/video_validation":
        "object_existence moving_direction moving_count moving_attribute counterfactual_inference",
    "perception/videos": "object_shuffle action_count state_change character_order",
    "nturgbd": "fine_grained_pose", "vlnqa": "egocentric_navigation"}
SEGMENTS = {"star/Charades_v1_480": "star/Charades_segment", "sta/sta_video": "sta/sta_video_segment",
            "tvqa/frames_fps3_hq": "tvqa/video_fps3_hq_segment"}


def tempcompass(row, root):
    """Options stand in the question, a line each, and the answer is such a line."""
    mark = re.compile(r"(?:[A-Z]\.|(?:Option|Caption|Sentence) \w+:) *")
    first, *lines = row["question"].split("\n")
    options = [mark.sub("", line, 1) for line in lines if mark.match(line)]
    question = "\n".join([first, *(line for line in lines if not mark.match(line))])
    return {"question": question, "answer": mark.sub("", row["answer"], 1), "options": options or None}


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
    sizes: tuple = ()           # of its files
    counted: bool = False       # on the file itself; else another size only warns
    rows: object = table_rows   # path -> [(where, row)]
    # What becomes of a row that has our columns, as a folder of videos wants it; None: it is not asked
    change: object = lambda row, root: {}
    name: str = "{}"            # of a video's file, where it is not as in the questions
    kinds: dict = dataclasses.field(default_factory=dict)   # its types -> kinds; "a: b" counts as "a", too
    columns: tuple = tuple(COLUMNS)   # that it may call otherwise


SETS = {
    "own": Set(columns=()),
    "activitynet_qa": Set((8000, 18000, 32000), True, name="v_{}", kinds=dict(zip("012345678", (
        "motion", "spatial", "temporal", "free: yes/no", "free: colour", "free: object", "free: location",
        "free: number", "free: other")))),
    "msvd_qa": Set((13157,), name="vid{}"),
    "msrvtt_qa": Set((72821,), name="video{}"),
    "tgif_frameqa": Set((13691,), True, kinds=dict(zip("0123", ("object", "number", "colour", "location")))),
    "tgif_count": Set((3554,), True),
    "videochatgpt_generic": Set((1996,)),
    "videochatgpt_temporal": Set((499,)),
    "videochatgpt_consistency": Set((998,), rows=paired_rows),
    "nextqa": Set((4996, 8564), True, change=lambda row, _: {
        "id": f"{row['video']}_{row['qid']}", "answer": int(row["answer"]),
        "options": [row[f"a{i}"] for i in range(5)]},
        kinds={**{x: f"{x[0]}: {x}" for x in ("CW", "CH", "TN", "TC", "DC", "DL", "DO")}, "TP": "T: TN"}),
    "egoschema": Set((500, 5031), True, change=lambda row, _: {
        "options": [row[f"option {i}"] for i in range(5)]}),
    "mvbench": Set((4000,), rows=folder_rows, change=mvbench),
    "videomme": Set((2700,), change=lambda row, _: {
        "kind": row["duration"], "options": [re.sub(r"^[A-Z]\. ?", "", text) for text in row["options"]]}),
    "mlvu": Set((2175,), True, folder_rows, lambda row, _: {   # without candidates: descriptions
        "video": f"{row['task']}/{row['video']}"} if "candidates" in row else None),
    "tempcompass": Set((1580, 2453, 1503), True, nested_rows, tempcompass),
    "perceptiontest": Set((19140,), rows=nested_rows, change=lambda row, _: {
        "id": f"{row['video']}_{row['id']}"}),
    "videovista": Set(change=lambda row, _:   # the one that is left out shows a picture besides
                      None if row["kind"] == "Relation Reasoning-Image" else {}),
    "longvideobench": Set((1337, 5341), name="videos/{}", change=lambda row, _: {
        "options": [text for text in row["options"] if text != "N/A"]})}


if __name__ == "__main__":
    cli.run(main, CONFIG)
