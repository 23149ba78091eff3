"""metrics.py: as worked by hand, and as recorded from the released code."""
import json
import os

import pytest
import torch
import torch.nn.functional as F

import metrics
from metrics import grounding_scores, interval, meteor, retrieval_metrics, temporal_iou, words
from plumbing import weightfile
from plumbing.cli import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "tests", "fixtures", "vtimellm_metrics.json")) as f:
    VTIMELLM = json.load(f)   # recorded outputs of the metrics that VTimeLLM's evaluation computes


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def java_counts(prediction, reference):
    """What METEOR's Java program counts about a pair, as recorded; a word that nobody says it never saw."""
    if "".join(reference).startswith("\0"):
        pair = next(pair for pair in VTIMELLM["counts"] if pair.startswith(" ".join(prediction) + "|"))
        length, _, function, *_ = map(float, VTIMELLM["counts"][pair].split())
        return double([length, 1, function, *[0] * 20])
    counts = VTIMELLM["counts"][f"{' '.join(prediction)}|{' '.join(reference)}"]
    return double([float(n) for n in counts.split()])


def test_metrics_equal_the_recorded_ones_of_the_released_code():
    cases = weightfile.read_file(os.path.join(ROOT, "tests", "fixtures", "retrieval_metric.safetensors"))
    for name in ("random", "one", "two"):
        video, text = (F.normalize(cases[f"{name}.{what}"], dim=1) for what in ("video", "text"))
        found = retrieval_metrics(text @ video.T)
        for ours, theirs in (("R@1", "R1"), ("R@5", "R5"), ("R@10", "R10"), ("MdR", "MdR"), ("MnR", "MnR")):
            assert found[ours] == pytest.approx(cases[f"{name}.{theirs}"].item(), rel=1e-5)


def test_ties_are_a_fair_coin():
    similarity = torch.tensor([[1.0, 1, 0], [1, 1, 1], [0, 1, 2]])   # tied with one, tied with two, alone
    assert metrics.recall_at_k(similarity, 1) == pytest.approx(100 * (1 / 2 + 1 / 3 + 1) / 3)
    assert metrics.recall_at_k(similarity, 2) == pytest.approx(100 * (1 + 2 / 3 + 1) / 3)
    assert retrieval_metrics(similarity)["MnR"] == pytest.approx((1.5 + 2 + 1) / 3)


def test_captions_of_one_video_do_not_compete_and_the_best_of_them_counts():
    similarity = torch.tensor([[.9, .1, .1], [.2, .5, .5], [.3, .3, .1], [.1, .2, .8]])   # captions x videos
    right = torch.tensor([0, 0, 1, 2])[:, None] == torch.arange(3)
    found = retrieval_metrics(similarity, right)   # ranks 1, 3, 1.5 (a tie), 1
    assert (found["R@1"], found["MdR"], found["MnR"]) == (62.5, 1.25, 1.625)
    found = retrieval_metrics(similarity.T, right.T)   # ranks 1, 2 (behind a foreign caption), 1
    assert (found["R@1"], found["MdR"], found["MnR"]) == pytest.approx((200 / 3, 1, 4 / 3))
    tied = torch.tensor([[.5, .5, .5]])   # two own captions and a foreign one: one coin, not two
    assert metrics.recall_at_k(tied, 1, torch.tensor([[True, True, False]])) == 50


def test_similarities_that_are_not_numbers_are_no_success():
    with pytest.raises(UserError, match="not numbers"):
        retrieval_metrics(torch.tensor([[float("nan"), 0], [0, 1]]))


# ------------------------------------------------------------------------------------ when does it happen?
def test_iou_is_what_two_spans_share():
    spans = double([[0, 4], [2, 6], [5, 9], [4, 2], [3, 3], [float("nan"), 4]])
    found = temporal_iou(spans, double([2, 6]))
    assert found.tolist() == pytest.approx([2 / 6, 1, 1 / 7, 0, 0, 0])
    assert temporal_iou(double([3, 3]), double([3, 3])) == 1        # two equal points
    assert temporal_iou(double([4, 2]), double([4, 2])) == 0        # backwards
    assert temporal_iou(double([3, 3]), double([3, 2])) == 0


def test_a_share_that_binary_numbers_miss_by_a_hair_counts():
    span, event = double([[0.4, 0.7]]), double([[0, 1]])            # 0.29999999999999993
    assert grounding_scores(span, event, 0).tolist() == pytest.approx([0.3, 1, 0, 0, 1])


def test_the_right_event_is_the_one_that_an_answer_agrees_with_most():
    events = double([[0, 0.4], [0.3, 0.6], [0.6, 1], [0.6, 1]])
    right = [[grounding_scores(double([span]), events, asked)[4].item() for asked in range(4)]
             for span in ([0, 0.3], [0.3, 0.5], [0.7, 1], [0.5, 0.5], [float("nan")] * 2)]
    assert right == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0.5], [0] * 4, [0] * 4]


def test_an_event_picked_blindly_is_right_as_often_as_there_are_events():
    events = double([[0, 0.2], [0.3, 0.5], [0.6, 1]])
    assert grounding_scores(events, events, 1).tolist() == pytest.approx([1 / 3] * 5)


def test_an_interval_counts_videos_not_questions():
    values, video = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)).double(), torch.arange(200)
    plain = 1.96 * values.std(0) / 200 ** 0.5
    assert torch.allclose(interval(values, video), plain)
    assert torch.allclose(interval(values.repeat(5, 1), video.repeat(5)), plain)        # no new videos
    assert (interval(values.repeat(5, 1), torch.arange(1000)) < plain / 2).all()
    assert interval(values, video * 0).isnan().all()


# ------------------------------------------------------------------------------------ captions
def test_words_are_those_of_the_penn_treebank_but_for_oddities():
    different = [text for text, expected in VTIMELLM["tokens"] if " ".join(words(text)) != expected]
    assert different == ["cannot gonna wanna", "#hashtag @user http://a.bc/d?e=f", "o'clock rock'n'roll",
                         "A.B.C. Mr. Smith St. Louis", "Ph.D. student", "<b>bold</b>"]


def test_meteor_follows_from_the_counts_of_its_java_program():
    for prediction, reference, expected, swapped in VTIMELLM["pairs"]:
        a, b = prediction.split(), reference.split()
        assert meteor(java_counts(a, b)[None]) == pytest.approx(expected, abs=1e-9)
        assert meteor(java_counts(b, a)[None]) == pytest.approx(swapped, abs=1e-9)
    for pairs, expected, _, _ in VTIMELLM["sets"]:   # counts are added up: not a mean
        counts = torch.stack([java_counts(a.split(), b.split()) for a, b in pairs])
        assert meteor(counts) == pytest.approx(expected, abs=1e-9)


def test_our_meteor_is_that_of_exact_and_stem_matches_within_half_a_point():
    pairs = [[tuple(text.split()) for text in pair.split("|")] for pair in VTIMELLM["exact_stem"]]
    ours = double([meteor(metrics.meteor_exact_stem(*pair)[None]) for pair in pairs])
    theirs = double(list(VTIMELLM["exact_stem"].values()))
    assert (ours - theirs).abs().mean() < 0.005 and torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.995


def test_an_alignment_prefers_equal_words_to_equal_stems():
    exact, stems = metrics.meteor_exact_stem(("running",), ("runs", "running"))[4:12].split(4)
    assert exact.tolist() == [1, 1, 0, 0] and not stems.any()


def test_soda_compares_what_was_found_with_what_is_true_and_exchanged_the_other_way_round():
    gold, found = [(0, 10, ("dog", "runs", "fast"))], [(0, 10, ("dog",))]
    for exchanged, pair in ((False, (found, gold)), (True, (gold, found))):
        expected = meteor(metrics.meteor_exact_stem(*(side[0][2] for side in pair))[None])
        soda = metrics.caption_scores(gold, found, metrics.rarity([gold[0][2]]), exchanged=exchanged)[0]
        assert soda == pytest.approx(expected) and 0 < expected < 1


@pytest.mark.parametrize("several", ["plays played playing play", "carries carried carry", "run runs running",
                                     "dances danced dancing dance", "watches watched watch", "box boxes"])
def test_forms_of_a_word_have_one_stem(several):
    assert len({metrics.stem(word) for word in several.split()}) == 1


@pytest.mark.parametrize("one, other", [("was", "way"), ("on", "one"), ("king", "kick"), ("thing", "the"),
                                        ("bus", "but"), ("his", "hit"), ("red", "rest"), ("glass", "glad")])
def test_other_words_have_other_stems(one, other):
    assert metrics.stem(one) != metrics.stem(other)


def test_cider_equals_the_recorded_one():
    for pairs, _, mean, each in VTIMELLM["sets"]:
        found = metrics.cider([(tuple(a.split()), tuple(b.split())) for a, b in pairs])
        assert found.tolist() == pytest.approx(each, abs=1e-9)
        assert found.mean().item() == pytest.approx(mean, abs=1e-9)


def test_a_perfect_caption_alone_has_cider_only_beside_a_whole_set():
    caption = ("a", "dog", "jumps", "high")
    rare = metrics.rarity([caption, ("a", "cat", "sleeps")])
    assert metrics.cider([(caption, caption)]) == 0 and metrics.cider([(caption, caption)], rare) > 7


def test_soda_keeps_the_order_of_events():
    iou, alike = torch.eye(2).double(), torch.ones(2, 2).double()
    assert metrics.soda_c(iou, alike) == 1
    assert metrics.soda_c(iou.flip(0), alike) == 0.5            # only one of two crossing pairs
    assert metrics.soda_c(iou[:, :1], alike[:, :1]) == 2 / 3    # precision 1, recall 1/2
    assert metrics.soda_c(torch.ones(1000, 1000).double(), torch.ones(1000, 1000).double()) == 1


# ------------------------------------------------------------------------------------ is an answer right?
@pytest.mark.parametrize("text, expected", [
    ("It's the man's T-shirt.", "its mans t shirt"), ("1,000 people", "1000 people"), ("9.75", "9.75"),
    ("3.", "3"), ("twenty-one", "21"), ("Twenty One dogs", "21 dogs"), ("forty two three", "42 3"),
    ("one hundred", "1 hundred"), ("two-thirds", "2 thirds"), ("Ten, twenty", "10 20"), ("a", "a"),
    ("The A", "the a"), ("red_car", "red car"), ("\uff42\uff4c\uff41\uff43\uff4b", "black"), ("?!", ""),
    ("twenty zero", "20 0"), ("the man\u2019s", "mans"), ("1,0000", "1 0000")])
def test_words_of_an_answer(text, expected):
    assert metrics.answer_words(text) == expected.split()


@pytest.mark.parametrize("prediction, answers, exact, within", [
    ("Black.", ["black"], 1, 1), ("It is black.", ["black"], 0, 1), ("Yes, he wears trousers.", ["yes"], 1, 1),
    ("yesterday", ["yes"], 0, 0), ("There are two people", ["2"], 0, 1), ("two", ["2"], 1, 1),
    ("", ["no"], 0, 0), ("The", ["the"], 1, 1), ("dogs", ["dog"], 0, 0), ("frisbee", ["ball", "frisbee"], 1, 1),
    ("a black and white dog", ["white and black"], 0, 0), ("a black and white dog", ["black and white"], 0, 1),
    ("not red", ["red"], 0, 1), ("", ["?"], 0, 0), ("He says yes", ["yes"], 0, 0)])
def test_exact_and_within(prediction, answers, exact, within):
    assert (metrics.exact(prediction, answers), metrics.within(prediction, answers)) == (exact, within)


def test_f1_counts_words_that_are_shared():
    assert metrics.token_f1("a man is riding a white horse", ["man riding horse"]) == 0.75
    assert metrics.token_f1("black and white", ["white", "black"]) == 0.5
    assert metrics.token_f1("dog", ["cat"]) == metrics.token_f1("", ["x"]) == 0


@pytest.mark.parametrize("prediction, options, place", [
    ("B. running", "walking running", 1), ("(b)", "walking running", 1), ("Running", "walking running", 1),
    ("A man is running", "walking running", 1), ("The best answer is A.", "up down", 0),
    ("A or B", "up down", None), ("neither", "up down", None), ("b", "up down", 1), ("C.", "up down", None),
    ("The video is a time-lapse. In a normal speed video people would walk.", "time-lapse/normal speed", 0),
    ("It is zooming in slowly", "zooming in/zooming in slowly", 1),
    ("Not A. red but B. blue", "red blue", None), ("I think the answer is (B)", "up down", 1),
    ("Answer: B", "up down", 1), ("B", "same/other/same", 1), ("C", "same/other/same", 0), ("", "/up", None),
    ("A", "up down", 0), ("A\nB", "up down", 0), ("it goes up", "up/up", 0)])
def test_an_answer_names_an_option_or_none(prediction, options, place):
    options = options.split("/") if "/" in options else options.split()
    assert metrics.chosen(prediction, options) == place


@pytest.mark.parametrize("videos, low, high", [
    ([[1, 1], [1, 0], [0, 0], [1, 0]], 10.0, 90.0), ([[1, 1]] * 4, 51.0, 100.0), ([[0]] * 3, 0.0, 56.2),
    ([[1, 0, 1]], 9.4, 97.5)])
def test_intervals_of_shares_are_clustered_by_video(videos, low, high):
    groups = torch.tensor([i for i, scores in enumerate(videos) for _ in scores])
    found = metrics.share_interval(double([score for scores in videos for score in scores]), groups)
    assert [round(100 * x, 1) for x in found] == [low, high]


def test_what_guesses_without_a_look_says():
    assert metrics.commonest(["yes", "yes", "no", "no", "red"]) == ["no", "yes", "red"]   # ties by the alphabet
    asked = [("is the man old", "yes")] * 5 + [("is the man tall", "no")] * 3 + [("is it red", "no")] * 4
    assert metrics.guess_by_beginning(asked, ["Is the man thin?"]) == ["yes"]
    asked += [("is the man here", "here")] * 4   # too seldom to be trusted
    assert metrics.guess_by_beginning(asked, ["Is the man here?"]) == ["yes"]
    assert metrics.guess_by_beginning(asked, ["Where?"]) == ["no"]   # nothing is known but that no is commonest


def test_verdicts_count_as_officially_and_over_all():
    found = metrics.verdict_scores([("yes", 4.8), ("no", 2), ("Yes", 5), ("unsure", 3)], 4).values()
    assert list(found) == pytest.approx([200 / 3, 50, 3.5, 3.7])
