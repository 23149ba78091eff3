"""Every number that is printed, as plain functions of tensors."""
import collections
import difflib
import functools
import heapq
import json
import math
import re
import unicodedata

import torch

from plumbing.cli import UserError


# ------------------------------------------------------------------------------------ retrieval
def ranks(similarity, right=None):
    """How many answers stand before the best right one of each query -> (better (Q,), tied (Q,)), float64.

    similarity: (Q, G). right: (Q, G) bool, one or more a query; None: answer i for query i. better: how many
    wrong ones score higher. tied: how many score exactly as high, which are that one and wrong ones."""
    if not similarity.isfinite().all():
        raise UserError("similarities that are not numbers; are the weights damaged, or does --no-amp help?")
    right = torch.eye(len(similarity), dtype=torch.bool) if right is None else right
    best = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)   # (Q, 1)
    better, tied = ((similarity > best) & ~right).sum(1), ((similarity == best) & ~right).sum(1)
    return better.double(), tied.double() + 1


def recall_at_k(similarity, k, right=None):
    """Share of queries with a right answer among the first k, in percent. Of ties, a fair share."""
    better, tied = ranks(similarity, right)
    return 100 * ((k - better) / tied).clamp(0, 1).mean().item()


def retrieval_metrics(similarity, right=None):
    """-> {"R@1", "R@5", "R@10": percent; "MdR", "MnR": median and mean rank, from 1, of ties the middle}."""
    better, tied = ranks(similarity, right)
    rank = better + (tied - 1) / 2 + 1
    recalls = {f"R@{k}": recall_at_k(similarity, k, right) for k in (1, 5, 10)}
    return {**recalls, "MdR": rank.quantile(0.5).item(), "MnR": rank.mean().item()}


def twin_accuracy(video, text):
    """video, text (2Q, P) normalised, twins side by side -> (2Q,): 1 where a clip is nearer to its caption
    than to its twin's, 0.5 where both are as near."""
    own, other = (video * text).sum(1), (video * text.view(-1, 2, text.shape[1]).flip(1).flatten(0, 1)).sum(1)
    return (own > other).float() + 0.5 * (own == other).float()


# ------------------------------------------------------------------------------------ when does it happen?
GROUNDING = "mIoU", "R@.3", "R@.5", "R@.7", "right event"


def temporal_iou(a, b, epsilon=0.0):
    """Spans a, b (..., 2), start and end in one unit -> (...), 0 to 1: what both share, as a part of the
    stretch from the earlier start to the later end (plus epsilon, which scorers of captions add).

    A span that runs backwards, or is nan, has 0; two equal points have 1."""
    shared = torch.minimum(a[..., 1], b[..., 1]) - torch.maximum(a[..., 0], b[..., 0])
    hull = torch.maximum(a[..., 1], b[..., 1]) - torch.minimum(a[..., 0], b[..., 0])
    return torch.where(hull > 0, shared.clamp(min=0) / (hull + epsilon), ((hull == 0) & (shared == 0)).to(a))


def grounding_scores(spans, events, asked, digits=None):
    """The span of an answer, or all K that it might be, against the events of its video -> (5,): the columns
    GROUNDING, from 0 to 1, means over the K.

    spans (K, 2), events (E, 2) float64; asked: which event is meant. It is the right one if the span agrees
    better with no other; where n are as good, by a share of 1/n. digits: that IoU is rounded to, or None."""
    iou = temporal_iou(spans[:, None], events)                      # (K, E)
    best, mine = iou == iou.amax(1, keepdim=True), iou[:, asked]    # (K, E), (K,)
    right = (best[:, asked] & (mine > 0)) / best.sum(1)
    if digits is not None:   # as Python rounds; torch multiplies first, and makes .3 of .295
        mine = mine.new_tensor([round(x, digits) for x in mine.tolist()])
    hits = [mine >= share - 1e-9 for share in (0.3, 0.5, 0.7)]   # in binary, .7 - .4 is less than .3
    return torch.stack([mine, *hits, right], dim=1).mean(0)


def numbered(names):
    """Names (Q,) -> (Q,) int64, equal numbers for equal names: the groups that interval takes."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])


def interval(values, groups):
    """Half the width of the normal 95 % interval of values.mean(0), clustered: values (Q, C), groups (Q,) the
    video of each -> (C,). Answers about one video stand or fall together, so what counts is how many videos
    there are (Liang and Zeger 1986). nan for one."""
    numbers, group = groups.unique(return_inverse=True)
    n = len(numbers)
    off = values.new_zeros(n, values.shape[1]).index_add(0, group, values - values.mean(0))
    return 1.96 * (off.square().sum(0) * n / (n - 1 or math.nan)).sqrt() / len(values)


# ------------------------------------------------------------------------------------ times in an answer
TIME = r"(?<![\d.:])(\d+(?:\.\d+)?)( ?s\b| seconds?\b)?(?![\d:])"
SPAN = re.compile(TIME + " ?(?:to|and|until|-) ?" + TIME)
RELEASED_SPAN = re.compile(r"(\d\d)() (?:to|and) (\d\d)()")   # VTimeLLM's


def read_spans(answer, duration, released=False):
    """The times in an answer, as "23 to 45" -> [[start, end]], shares of a clip of `duration` seconds. They
    are steps of the clock, of one or two digits, or seconds where the answer says so."""
    spans = []
    for start, _, end, seconds in (RELEASED_SPAN if released else SPAN).findall(answer):
        if seconds:
            spans.append([min(1.0, float(t) / duration) for t in (start, end)])
        elif max(len(start), len(end)) <= 2:
            spans.append(shares(int(start), int(end), released))
    return spans


def shares(start, end, released, wider=0):
    """Two times of the clock, 00 to 99 -> shares of the clip. An end of 99 is the end of the clip.
    released: VTimeLLM has no such rule, but its captions end a step later (wider)."""
    return [start / 100, (end + wider) / 100 if released else 1.0 if end == 99 else end / 100]


def read_events(answer, released=False):
    """An answer about all events -> [(start, end, text)], shares of the clip: a JSON list of {"event",
    "timestamps": "from 10 to 23"}, on one line if as released; else sentences, `From 10 to 23, text.`

    Two that follow each other and say the same are one."""
    events, merged = [], []
    listed = re.search(r"\[.*\]" if released else r"(?s)\[\s*\{.*\}\s*\]", answer)
    try:
        for item in json.loads(listed[0]) if listed else ():
            times = item["timestamps"]
            events.append((int(times[5:7]), int(times[-2:]), item["event"].strip()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass   # what stands before the mistake counts
    if not listed and not released:
        found = re.findall(r"[Ff]rom (\d\d?) to (\d\d?),? ((?:[^.]|\.\d)+)", answer)
        events = [(int(start), int(end), text) for start, end, text in found]
    for start, end, text in events:
        if merged and abs(start - merged[-1][1]) <= 1:
            if difflib.SequenceMatcher(None, merged[-1][2], text).ratio() > 0.98:
                start = merged.pop()[0]
        merged.append((start, end, text))
    return [(*shares(start, end, released, wider=1), text) for start, end, text in merged]


# ------------------------------------------------------------------------------------ dense captions
CAPTIONS = "SODA_c*", "METEOR*", "CIDEr", "CIDEr, all"   # *: of exact and stem matches alone
WORD = re.compile(r"""-[lr][rsc]b- | (?:[a-z]\.){2,} | can(?=not\b) | \w+(?=n't\b) | n't\b
    | '(?:s|re|ve|ll|d|m)\b | \d+(?:[.,:]\d+)+ | \w+(?:-\w+|'(?!(?:s|re|ve|ll|d|m)\b)\w+)* | & | !!+""", re.X)
BRACKETS = {ord(sign): f" -{name}- " for sign, name in zip("()[]{}", "lrb rrb lsb rsb lcb rcb".split())}
FUNCTION = set("a an the of and or to in on at is are was were be been it its he she they his her their them "
               "as for with from by that this then while out one two".split())   # common: they count a third


def words(text):
    """A caption -> tuple of words in small letters, without commas and the like, near the Penn Treebank's."""
    return tuple(WORD.findall(re.sub(r"[^\0-\x7f]", " ", text).lower().translate(BRACKETS)))


@functools.lru_cache(1 << 16)
def stem(word):
    """A word without a common English ending: carries, carried -> carry. Coarser than Porter's."""
    word = re.sub(r"(?<=\w\w)i(?:es|ed)$", "y", word)
    word = re.sub(r"(?<=[sxo])es$|(?<=[cs]h)es$|(?<=\w\w[^su])s$", "", word)
    word = re.sub(r"^(\w*[aeiouy]\w*?)(?:ing|ed|ly)$", r"\1", word)
    return re.sub(r"(?<=\w\w\w)e$", "", re.sub(r"([^aeiouls])\1$", r"\1", word))   # running -> runn -> run


@functools.lru_cache(1 << 16)
def meteor_exact_stem(prediction, reference):
    """Two tuples of words -> counts (23,) for `meteor`, of equal words and equal stems. METEOR in full also
    matches synonyms and paraphrases, which it has lists of; it is some two points higher.

    Of all alignments the one with most words, then most equal ones, fewest chunks, least distance."""
    stems, beam = [stem(word) for word in reference], [(0, 0, 0, 0, ())]   # the 16 best so far
    for i, word in enumerate(prediction):
        root = stem(word)
        places = [j for j, other in enumerate(stems) if other == root]
        more = [(n - 1, equal - (word == reference[j]), chunks + (pairs[-1:] != ((i - 1, j - 1),)),
                 distance + abs(i - j), (*pairs, (i, j)))
                for n, equal, chunks, distance, pairs in beam
                for j in places if all(j != other for _, other in pairs)]
        beam = heapq.nsmallest(16, beam + more)
    *_, chunks, _, pairs = beam[0]
    counts = [len(prediction), len(reference)] + [sum(map(FUNCTION.__contains__, side))
                                                  for side in (prediction, reference)]
    for equal in (True, False):
        found = [(prediction[i], reference[j]) for i, j in pairs if (prediction[i] == reference[j]) == equal]
        counts += [sum((pair[side] in FUNCTION) == common for pair in found)
                   for common in (False, True) for side in (0, 1)]
    return torch.tensor([*counts, *[0] * 8, chunks, len(pairs), len(pairs)], dtype=torch.float64)


def meteor(counts):
    """METEOR 1.5 (Denkowski and Lavie 2014), 0 to 1, of pairs that count as one text.

    counts (pairs, 23), as its Java program has them: words of prediction and reference; function words of
    both; for the matchers exact, stem, synonym, paraphrase: content words of both that it matched, function
    words of both; then chunks; matched words of both. A pair that is equal in full adds no chunk."""
    equal = (counts[:, 20] == 1) & (counts[:, :2] == counts[:, 21:]).all(1)
    total, shares = counts.sum(0).tolist(), []
    for side in (0, 1):   # content words weigh .75, function words .25, and a match by its matcher
        matched = sum(weight * (0.75 * total[at + side] + 0.25 * total[at + 2 + side])
                      for at, weight in ((4, 1), (8, 0.6), (12, 0.8), (16, 0.6)))
        shares.append(matched / (0.75 * total[side] - 0.5 * total[2 + side] or 1))
    precision, recall = shares
    if precision * recall == 0:
        return 0.0
    chunks = counts[~equal, 20].sum().item() / (total[21] + total[22]) * 2
    return precision * recall / (0.85 * precision + 0.15 * recall) * (1 - 0.6 * chunks ** 0.2)


def ngrams(text):
    """A tuple of words -> its runs of one to four words."""
    return [text[i:i + n] for n in range(1, 5) for i in range(len(text) - n + 1)]


def rarity(texts):
    """Tuples of words -> how many of them hold a run of words, {run: number}; how many there are."""
    return collections.Counter(run for text in texts for run in set(ngrams(text))), len(texts)


def cider(pairs, rare=None):
    """CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726) of pairs (prediction, reference) -> (pairs,), 0 to 10.

    rare: `rarity` of a set of references; None: of those of these pairs. A single pair then has 0, whatever
    it says, as log 1 = 0. The penalty for length counts bigrams, as released."""
    (holding, n), scores = rare or rarity([reference for _, reference in pairs]), []
    for pair in pairs:
        p, r = ({run: count * math.log(n / max(1, holding[run])) for run, count in
                 collections.Counter(ngrams(text)).items()} for text in pair)
        total = 0.0
        for size in range(1, 5):
            lengths = [math.hypot(*(x for run, x in side.items() if len(run) == size)) for side in (p, r)]
            shared = sum(min(p[run], r[run]) * r[run] for run in p.keys() & r.keys() if len(run) == size)
            total += shared / (lengths[0] * lengths[1] or 1)
        off = max(1, len(pair[0])) - max(1, len(pair[1]))
        scores.append(10 / 4 * total * math.exp(-off ** 2 / 72))
    return torch.tensor(scores, dtype=torch.float64)


def soda_c(iou, alike):
    """SODA_c (Fujita et al. 2020) of a video, 0 to 1. iou (G, P): of true and predicted events, each in order
    of start; alike (G, P): METEOR of their words. It is the best matching that keeps the order: its sum over
    P is the precision, over G the recall, and their F-measure 2 sum / (P + G)."""
    best = [0.0] * (iou.shape[1] + 1)
    for row in (iou * alike).tolist():
        above, best = best, [0.0]
        for p, gain in enumerate(row):
            best.append(max(best[p], above[p + 1], above[p] + gain))
    return 2 * best[-1] / sum(iou.shape)


def caption_scores(gold, found, rare, counts=meteor_exact_stem, exchanged=False):
    """What was found in a video against what is true, both [(start, end, words)] -> (4,): the columns
    CAPTIONS, from 0 to 1 (CIDEr: to 10).

    METEOR and CIDEr: a mean over four thresholds, of all pairs that agree in time by as much; a prediction
    without one is compared with a word that nobody says. rare: of "CIDEr, all". counts: METEOR's, of
    prediction and reference. exchanged: SODA gives it these the other way round, as VTimeLLM's (2024)."""
    if not found:
        return torch.zeros(4, dtype=torch.float64)
    gold, found = (sorted(side, key=lambda event: event[0]) for side in (gold, found))
    g, f = (torch.tensor([event[:2] for event in side], dtype=torch.float64) for side in (gold, found))
    iou = temporal_iou(g[:, None], f, epsilon=1e-8)   # (G, P)
    alike = [[meteor(counts(*(t, p)[::1 if exchanged else -1])[None]) for *_, p in found] for *_, t in gold]
    rows = []
    for share in (0.3, 0.5, 0.7, 0.9):
        pairs = []
        for k, (*_, p) in enumerate(found):
            pairs += [(p, t) for (*_, t), x in zip(gold, iou[:, k]) if x >= share] or [(p, (f"\0{k}",))]
        rows.append([meteor(torch.stack([counts(*pair) for pair in pairs])), cider(pairs).mean(),
                     cider(pairs, rare).mean()])
    return torch.cat([g.new_tensor([soda_c(iou, g.new_tensor(alike))]), g.new_tensor(rows).mean(0)])


# ------------------------------------------------------------------------------------ is an answer right?
NUMBERS = {word: n for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen".split())}
TENS = {word: 10 * n for n, word in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
# what a letter that names an option stands between
BEFORE, BEHIND = r"[\[(\"']?", r"(?=[).:,\]\"'”’]|\s*$"


def answer_words(text):
    """An answer, a question or an option -> list of words that can be compared: small letters, digits for
    number words, no signs, no article unless nothing else is there. Plurals and synonyms are other words."""
    text = re.sub(r"['’]|(?<=\d),(?=\d{3}(?!\d))", "", unicodedata.normalize("NFKC", text).casefold())
    found = []
    for word in re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w.]|_", " ", text).split():
        if 0 < NUMBERS.get(word, 0) < 10 and found and found[-1] in TENS:
            found[-1] = str(TENS[found[-1]] + NUMBERS[word])   # twenty one
        else:
            found.append(str(NUMBERS[word]) if word in NUMBERS else word)
    found = [str(TENS.get(word, word)) for word in found]
    return [word for word in found if word not in ("a", "an", "the")] or found


def inside(part, whole):
    """Whether the words of `part`, one or more, stand side by side in `whole`."""
    return any(whole[i:i + len(part)] == part for i in range(len(whole) - len(part) + 1)) and part != []


def exact(prediction, answers):
    """Whether a prediction says what one of the right answers says, and no more. A right yes or no only has
    to come first."""
    said = answer_words(prediction)
    return any(said[:1] == right if right in (["yes"], ["no"]) else said == right != []
               for right in map(answer_words, answers))


def within(prediction, answers):
    """Whether a right answer stands in a prediction: an upper bracket of `exact`, for "not red" names red."""
    said = answer_words(prediction)
    return any(said[:1] == right if right in (["yes"], ["no"]) else inside(right, said)
               for right in map(answer_words, answers))


def token_f1(prediction, answers):
    """Words that a prediction shares with a right answer, twice, as a part of those of both; of the best."""
    said = collections.Counter(answer_words(prediction))
    rights = (collections.Counter(answer_words(answer)) for answer in answers)
    return max(2 * (said & right).total() / (said.total() + right.total() or 1) for right in rights)


def chosen(prediction, options):
    """Which of the options (A), (B), ... an answer names -> its place from 0, or None. Options of equal words
    are one, the first. The first of these rules that finds exactly one decides."""
    texts, said = [answer_words(option) for option in options], answer_words(prediction)

    def only(places):
        places = {texts.index(texts[i]) for i in places}
        return places.pop() if len(places) == 1 else None

    def letters(pattern):
        return [i for i in (ord(x.upper()) - ord("A") for x in re.findall(pattern, prediction))
                if i < len(options)]

    def named(sentence):
        there = [text for text in texts if inside(text, sentence)]
        return [texts.index(a) for a in there if not any(a != b and inside(a, b) for b in there)]
    rules = (
        # a letter with its own text: "B. running"
        [i for i, option in enumerate(options) if option.strip() and re.search(
            rf"(?<!\w){chr(65 + i)}[).:,]\s*(?i:{re.escape(option.strip())})(?!\w)", prediction)],
        [i for i, text in enumerate(texts) if text == said != []],
        letters(r"^\s*[\[(]?([A-Za-z])[\])]?\.?\s*$"),
        # at the start, alone: of "A man runs" it is a word
        letters(r"^\s*(?i:(?:the )?(?:(?:best|correct|final|right) )?(?:answer|option|choice) is:? )?"
                rf"{BEFORE}([A-Z]){BEHIND}|\s(?!\s*[a-z]))"),
        letters(rf"\b(?i:is|answer|option|choice):? {BEFORE}([A-Z]){BEHIND})"),
        named(answer_words(re.split(r"[.!?]\s", prediction.strip())[0])),
        named(said))
    return next((place for place in map(only, rules) if place is not None), None)


def share_interval(values, groups):
    """Scores (Q,) from 0 to 1, groups (Q,) -> (low, high), the 95 % interval of their mean: see interval.
    Where that has no width, Wilson's (1927), as if each group were one trial."""
    p, half = values.mean().item(), interval(values[:, None], groups).item()
    if half > 0:
        return max(0, p - half), min(1, p + half)
    z, n = 1.96 ** 2, len(groups.unique())
    half = (z * p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return tuple((p + z / (2 * n) + sign * half) / (1 + z / n) for sign in (-1, 1))


def commonest(texts):
    """-> the different ones of some texts, the most frequent first; as frequent ones by the alphabet."""
    counts = collections.Counter(texts)
    return sorted(counts, key=lambda text: (-counts[text], text))


def guess_by_beginning(known, questions):
    """Answers from questions alone: the commonest to the longest beginning, in words, that was asked at least
    5 times. known: [(question, answer)], from training -> [answer], one for each of `questions`."""
    answers, guesses = collections.defaultdict(list), []   # {the first words of questions: answers}
    for question, answer in known:
        asked = answer_words(question)
        for n in range(len(asked) + 1):
            answers[tuple(asked[:n])].append(answer)
    for question in questions:
        asked = answer_words(question)
        found = (answers.get(tuple(asked[:n]), ()) for n in range(len(asked), 0, -1))
        guesses.append(commonest(next((x for x in found if len(x) >= 5), answers[()]))[0])
    return guesses


def verdict_scores(verdicts, questions):
    """[(what a judge says, its score 0 to 5)] -> {name: value}. As the official scripts count, what is
    neither yes nor no leaves the denominator, and 4.8 is 4."""
    said = ["yes" if "yes" in text.lower() else "no" if "no" in text.lower() else "" for text, _ in verdicts]
    yes, scores = said.count("yes"), [score for _, score in verdicts]
    return {"yes, of yes and no": 100 * yes / ((yes + said.count("no")) or math.nan),
            "yes, of all questions": 100 * yes / questions,
            "score, cut to whole numbers": sum(map(int, scores)) / (len(scores) or math.nan),
            "score": sum(scores) / (len(scores) or math.nan)}
