"""metrics.py: as worked by hand, and as recorded from the released code."""
import os

import pytest
import torch
import torch.nn.functional as F

import metrics
from metrics import retrieval_metrics
from plumbing import weightfile
from plumbing.cli import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


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
