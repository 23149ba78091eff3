"""The method's claim in the toy world, in numbers: can the branch tell a clip from its twin?"""
import dataclasses
import json
import os

import torch

import data
from metrics import retrieval_metrics, twin_accuracy
from model import encode, encode_texts, load_encoder
from toy.world import COLOURS, MOTIONS, SHAPES, SIZE, TURNS, read_clips

STATIC = {"colour": list(COLOURS), "shape": SHAPES}


def static_features(clips, encode_text):
    """Each clip's caption with every colour, and with every shape -> (Q, 2, 8, P) of encode_text(texts)."""
    texts = [dataclasses.replace(clip, **{field: value}).caption
             for clip in clips for field, values in STATIC.items() for value in values]
    once = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(once)}
    return encode_text(once)[[place[text] for text in texts]].view(len(clips), 2, 8, -1)


def static_accuracy(video, clips, features):
    """video (Q, P), features (Q, 2, 8, P) -> how often the right colour or shape is the nearest."""
    nearest = (features @ video[:, None, :, None])[..., 0].argmax(2)   # (Q, 2)
    truth = [[values.index(getattr(clip, field)) for field, values in STATIC.items()] for clip in clips]
    return (nearest == torch.tensor(truth)).float().mean().item()


def score(cfg):
    """Twins, statics and retrieval on held-out combinations: mean-pooled CLIP beside branches of several
    seeds."""
    annotations, device = os.path.join(cfg.data, "test_captions.jsonl"), torch.device("cpu")
    dataset = data.RetrievalDataset(annotations, cfg.data, 8, SIZE)
    clips = read_clips(annotations)
    rows = {}        # {model: [metrics of a seed]}
    by_motion = {}   # {pair of motions, how many: [twin accuracy of the branch, a seed each]}
    for file in cfg.branches.split(","):
        encoder, tokenizer = load_encoder(cfg.out, file, device)
        features = static_features(clips, lambda texts: encode_texts(encoder, tokenizer, texts, 32, device))
        branch, mean, text, _ = encode(encoder, tokenizer, dataset, device, 64)
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
            kind = f"{forwards} / {backwards} | {which.sum() // 2}"
            by_motion.setdefault(kind, []).append(100 * right[which].mean().item())

    def spread(values):
        return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"
    columns = ["twins", "static", "R@1", "R@5", "R@10"]
    print(f"\n{len(clips) // 2} pairs of held-out twins, {len(rows['branch'])} seeds: "
          "mean (lowest to highest), in percent\n")
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, found in rows.items():
        print(f"| {name} | " + " | ".join(spread([metrics[c] for metrics in found]) for c in columns) + " |")
    print("\n| branch, twins of | pairs | told apart |\n|---|---|---|")
    for name, values in by_motion.items():
        print(f"| {name} | {spread(values)} |")
