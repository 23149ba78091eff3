"""LinVT's principle without videos: needles among random vectors. Each seed takes a minute or two.

A frame has 9 tokens: one object, the others ground. An object is a type plus a colour, a question is a type
under a rotation, and only one frame of a video has it. The reader learned from single frames with up to five
objects, knows all colours, and is frozen. What gives it rows learns from videos without six of the colours.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from linvt import LinVT
from plumbing import cli
from toy.scenes import WithMatrices
from toy.score import spread
from toy.tiny_models import fit

D, N, TYPES, COLOURS, SEEN = 48, 9, 20, 20, 14   # a token's numbers, a frame's tokens; 14 colours are seen
SEEDS, READING, STEPS = 3, 1600, 1200   # worlds; steps of a reader, and of what gives it rows
LEARNING = 1.5e-3, 0.01, 1.0   # learning rate, weight decay, norm of the gradient


class Needles(nn.Module):
    """A world of random vectors, and a reader that knows it."""
    def __init__(self):
        super().__init__()
        self.types, self.colours, self.grounds = (F.normalize(torch.randn(n, D), dim=-1)
                                                  for n in (TYPES, COLOURS, 3))
        self.words = self.types @ torch.linalg.qr(torch.randn(D, D)).Q
        layer = nn.TransformerEncoderLayer(D, 4, 2 * D, 0.0, batch_first=True, norm_first=True)
        self.reader = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(D, COLOURS)

    def tokens(self, kind, colour, place, shown):
        """Objects (B, T, K) and whether each is shown -> tokens (B, T, N, D)."""
        x = self.grounds[torch.randint(3, (*kind.shape[:2], N))]
        objects = self.types[kind] + self.colours[colour]
        index = place[..., None].expand(-1, -1, -1, D)
        x = x.scatter(2, index, torch.where(shown[..., None], objects, x.gather(2, index)))
        return x + 0.05 * torch.randn(x.shape)

    def frame(self, B):
        """One frame with up to five objects -> tokens (B, 1, N, D), type asked for (B,), its colour (B,)."""
        kind, place = torch.rand(B, 1, TYPES).argsort(2)[..., :5], torch.rand(B, 1, N).argsort(2)[..., :5]
        colour, shown = torch.randint(COLOURS, (B, 1, 5)), torch.arange(5) < torch.randint(1, 6, (B, 1, 1))
        return self.tokens(kind, colour, place, shown), kind[:, 0, 0], colour[:, 0, 0]

    def video(self, B, T, colours):
        """T frames with an object each -> as `frame`; only one has the type that is asked for."""
        kind, at, i = torch.randint(TYPES, (B, 1)), torch.randint(T, (B,)), torch.arange(B)
        kind = (kind + torch.randint(1, TYPES, (B, T)).scatter(1, at[:, None], 0)) % TYPES   # 0: the one
        colour, place = (torch.randint(*some, (B, T, 1)) for some in (colours, (0, N)))
        x = self.tokens(kind[..., None], colour, place, torch.ones(B, T, 1, dtype=torch.bool))
        return x, kind[i, at], colour[i, at, 0]

    def answer(self, rows, asked):
        """rows (B, K, D), types asked for (B,) -> logits of colours (B, 20)."""
        return self.head(self.reader(torch.cat([rows, self.words[asked][:, None]], 1))[:, -1])


@torch.no_grad()
def right(world, rows_of, T, colours):
    found = []
    for _ in range(4):
        x, asked, colour = world.video(128, T, colours)
        found.append((world.answer(rows_of(x, asked), asked).argmax(1) == colour).float().mean().item())
    return 100 * sum(found) / len(found)


def teach(seed):
    """-> a world, {name: rows_of(tokens, types asked for)}."""
    torch.manual_seed(seed)
    world = Needles()

    def reading(_):
        x, asked, colour = world.frame(64)
        return F.cross_entropy(world.answer(x[:, 0], asked), colour), ""
    fit("read", world.parameters(), reading, READING, 100, seed, *LEARNING)
    world.requires_grad_(False)
    kinds = {"mean of the frames": lambda x, _: x.mean(1),
             "the middle frame": lambda x, _: x[:, x.shape[1] // 2]}
    for name, module in (("LinVT", LinVT), ("value and output matrices", WithMatrices)):
        linvt = module(D, N, width=48, heads=2, top_k=None, content=True)

        def rows_of(x, asked, linvt=linvt):
            return linvt(x, world.words[asked][:, None], torch.ones(len(x), 1, dtype=torch.bool))

        def condensing(_):
            T = (2, 4, 8, 16)[torch.randint(4, ())]
            x, asked, colour = world.video(32, T, (0, SEEN))
            return F.cross_entropy(world.answer(rows_of(x, asked), asked), colour), ""
        fit(name, linvt.parameters(), condensing, STEPS, 100, seed, *LEARNING)
        linvt.eval()
        kinds[name] = rows_of
    return world, kinds


def needle(_):
    """A table of who finds a needle's colour, for colours that were learned and for others."""
    taught = [teach(seed) for seed in range(SEEDS)]
    rows = ([name, column, *(spread([right(world, kinds[name], T, colours) for world, kinds in taught])
                             for T in (1, 4, 16, 64))]
            for name in taught[0][1]
            for column, colours in (("seen", (0, SEEN)), ("never seen", (SEEN, COLOURS))))
    cli.table(["rows", "colours", "1 frame", "4", "16", "64"], rows)
