"""Every number that is printed, as plain functions of tensors."""
import math

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
