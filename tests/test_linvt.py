"""LinVT: what its weights are, what they depend on, and that nothing stands between the tokens and their
averages."""
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from films import film, stacked
from linvt import Attention, LinVT, save_linvt
from model import IGNORE_INDEX, VIDEO_TOKENS, open_chat, prompt_ids, save_chat
from plumbing.cli import UserError
from plumbing.weightfile import read_file, read_metadata, write_safetensors

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.join(ROOT, "weights", "tiny")
CASES = read_file(os.path.join(ROOT, "tests", "fixtures", "linvt_blocks.safetensors"))
TERMS = {"a b": {"top_k": None}, "a b c": {"top_k": None, "content": True}, "a b d": {},
         "a b c d": {"content": True}}
each_choice_of_terms = pytest.mark.parametrize("terms", TERMS)


def made(terms="a b c d", shaken=True, dim=24, tokens=5, seed=0, **options):
    """A small LinVT. shaken: no parameter is zero, as after a training."""
    torch.manual_seed(seed)
    linvt = LinVT(dim, tokens, width=16, heads=2, **{**TERMS[terms], **options}).eval()
    if shaken:
        with torch.no_grad():
            for parameter in linvt.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return linvt.double()


def asked(linvt, B=2, T=4, L=3, seed=1):
    """-> tokens (B, T, N, D), words (B, L, D), a mask that sees all of them."""
    generator = torch.Generator().manual_seed(seed)
    N, D = linvt.place.shape[1], linvt.proj_in.in_features
    x = torch.randn(B, T, N, D, generator=generator, dtype=torch.float64)
    return x, torch.randn(B, L, D, generator=generator).double(), torch.ones(B, L, dtype=torch.bool)


def whole(linvt, x, text, mask):
    """W (B, M, T*N): the weights with the tokens that were not kept as zeros."""
    kept, weights = linvt.weigh(x, text, mask)
    W = weights.new_zeros(*weights.shape[:2], x.shape[1] * x.shape[2])
    return W.scatter(2, kept[:, None].expand_as(weights), weights)


# -------------------------------------------------------------------------------------- rows are averages
@each_choice_of_terms
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_values_that_are_an_identity_give_the_weights(terms, dtype, near):
    linvt = made(terms, top_k=7 if "d" in terms else None).to(dtype)
    x, text, mask = asked(linvt)
    places = torch.eye(20, dtype=dtype).view(1, 4, 5, 20).expand(2, -1, -1, -1)
    W = linvt(x.to(dtype), text.to(dtype), mask, values=places)
    assert W.dtype == dtype and (W >= 0).all() and (W.float().sum(-1) - 1).abs().max() < near
    assert (W.float() - whole(linvt, x.to(dtype), text.to(dtype), mask)).abs().max() < near


@each_choice_of_terms
def test_a_row_is_its_weights_times_the_tokens(terms):
    linvt = made(terms, top_k=7 if "d" in terms else None)
    x, text, mask = asked(linvt)
    expected = whole(linvt, x, text, mask).double() @ x.flatten(1, 2)
    assert (linvt(x, text, mask) - expected).abs().max() < 1e-5


def test_no_row_leaves_the_tokens_span_nor_their_range():
    linvt = made(dim=64)
    x, text, mask = asked(linvt)   # 20 tokens in 64 dimensions
    y, tokens = linvt(x, text, mask), x.flatten(1, 2)
    inside = y @ torch.linalg.pinv(tokens) @ tokens
    assert (y - inside).norm() < 1e-4 * y.norm()
    low, high = tokens.amin(1, keepdim=True), tokens.amax(1, keepdim=True)
    assert (y >= low - 1e-6).all() and (y <= high + 1e-6).all()


def test_an_average_commutes_with_an_affine_map():
    """So a linear projector may stand before or behind it."""
    linvt, narrow = made(), torch.randn(2, 4, 5, 9, dtype=torch.float64)
    projector = torch.nn.Linear(9, 24).double()
    _, text, mask = asked(linvt)
    before = linvt(projector(narrow), text, mask)
    behind = projector(linvt(projector(narrow), text, mask, values=narrow))
    assert before.shape == (2, 5, 24) and (before - behind).abs().max() < 1e-6


@pytest.mark.parametrize("queries", [1, 5, 9])
def test_one_unit_passes_bit_for_bit(queries):
    linvt = made(queries=queries)
    x, text, mask = asked(linvt, T=1)
    values = torch.randn(2, 1, 5, 7)
    assert torch.equal(linvt(x, text, mask), x[:, 0])
    assert torch.equal(linvt(x, text, mask, values), values[:, 0])


def test_no_parameter_stands_between_tokens_and_rows():
    """Where the weights are held fixed, the row is a function of the values alone."""
    linvt = made()
    x, text, mask = asked(linvt)
    kept, weights = linvt.weigh(x, text, mask)
    linvt.weigh = lambda *_: (kept, weights.detach())
    assert not linvt(x, text, mask).requires_grad


# -------------------------------------------------------------------------------- what weights depend on
def test_samples_of_a_batch_do_not_mix():
    linvt = made()
    x, text, mask = asked(linvt)
    together = linvt(x, text, mask)
    for i in (0, 1):
        alone = linvt(x[i:i + 1], text[i:i + 1], mask[i:i + 1])
        assert (together[i] - alone[0]).abs().max() < 1e-6


def test_padding_changes_nothing():
    linvt = made()
    x, text, mask = asked(linvt)
    padded = torch.cat([text, 100 * torch.randn(2, 4, 24)], 1)
    y = linvt(x, padded, F.pad(mask, (0, 4)))
    assert (y - linvt(x, text, mask)).abs().max() < 1e-6


def test_without_words_the_null_word_alone_is_read():
    linvt = made()
    x, text, mask = asked(linvt)
    hidden = linvt(x, text, torch.zeros_like(mask))
    assert hidden.isfinite().all()
    assert (hidden - linvt(x, text[:, :0], mask[:, :0])).abs().max() < 1e-6
    linvt.null_word.data += torch.randn(16)
    assert (hidden - linvt(x, text, torch.zeros_like(mask))).abs().max() > 1e-4


@pytest.mark.parametrize("drawn, hidden", [(0.09, True), (0.11, False)])
def test_in_training_one_question_in_ten_is_hidden_and_padding_always(monkeypatch, drawn, hidden):
    linvt = made(top_k=None).train()
    x, text, mask = asked(linvt)
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: torch.full(size, drawn))
    y = linvt(x, text, mask)
    assert torch.allclose(y, linvt(x, text.flip(0), mask)) == hidden
    padded = torch.cat([text, 100 * torch.randn(2, 4, 24)], 1)
    assert torch.allclose(y, linvt(x, padded, F.pad(mask, (0, 4))))


def test_a_question_of_any_length_is_read():
    linvt = made()
    for length in (1, 64, 200):
        assert linvt(*asked(linvt, L=length)).isfinite().all()


@each_choice_of_terms
def test_another_question_has_other_weights(terms):
    linvt = made(terms)
    x, text, mask = asked(linvt)
    change = whole(linvt, x, text, mask) - whole(linvt, x, torch.randn_like(text), mask)
    assert change.abs().max() > 1e-3


def test_queries_see_each_other():
    linvt = made()
    x, text, mask = asked(linvt)
    before = whole(linvt, x, text, mask)
    linvt.query.data[0] += torch.randn(16)
    assert ((whole(linvt, x, text, mask) - before).abs().amax((0, 2)) > 1e-7).all()


@pytest.mark.parametrize("axis", ["space", "time"])
def test_attention_stays_within_a_unit_or_at_a_place(axis):
    linvt = made()
    setattr(linvt, "time" if axis == "space" else "space", torch.nn.ModuleList([torch.nn.Identity()]))
    x, *_ = asked(linvt)
    nudged = x.clone()
    nudged[:, 2, 3] += torch.randn(24)
    moved = (linvt.read(x) - linvt.read(nudged)).abs().amax((0, 3)) > 1e-9   # (T, N)
    expected = torch.zeros(4, 5, dtype=torch.bool)
    if axis == "space":
        expected[2] = True
    else:
        expected[:, 3] = True
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("scale", [1, 4, 16])
def test_tokens_stay_apart(scale):
    """Without residuals all tokens became one vector after four layers: a spread of 1e-7."""
    linvt = made(layers=4)
    h = linvt.read(scale * asked(linvt)[0]).flatten(1, 2)
    assert (h - h.mean(1, keepdim=True)).norm() > 0.1 * h.norm()


@each_choice_of_terms
def test_every_parameter_gets_a_gradient(terms):
    linvt = made(terms, top_k=7 if "d" in terms else None).train()
    x, text, mask = asked(linvt)
    (linvt(x, text, mask) * torch.randn(2, 5, 24)).sum().backward()
    small = [name for name, p in linvt.named_parameters() if p.grad is None or p.grad.norm() < 1e-6]
    assert small == []


# ------------------------------------------------------------------------------------- which tokens count
def test_kept_tokens_stand_in_the_order_of_time():
    linvt = made(top_k=7)
    kept, weights = linvt.weigh(*asked(linvt))
    assert kept.shape == (2, 7) and weights.shape == (2, 5, 7) and (kept.diff() > 0).all()
    assert not torch.equal(kept[0], kept[1])   # each video its own


@pytest.mark.parametrize("top_k", [None, 20, 1024])
def test_all_tokens_are_kept_where_there_is_room(top_k):
    linvt = made("a b c d", top_k=top_k)
    kept, _ = linvt.weigh(*asked(linvt))
    assert torch.equal(kept, torch.arange(20).expand(2, -1))


def test_noise_lets_other_tokens_in_but_only_in_training():
    linvt = made(top_k=7)
    chosen = [linvt.weigh(*asked(linvt))[0] for _ in range(3)]
    assert torch.equal(chosen[0], chosen[1])
    linvt.train()
    assert any(not torch.equal(chosen[0], linvt.weigh(*asked(linvt))[0]) for _ in range(3))


@pytest.mark.parametrize("options, T", [
    ({}, 2), ({"queries": 1}, 4), ({"queries": 12}, 4), ({"tokens": 1}, 4), ({"tokens": 1, "top_k": 2}, 4),
    ({"max_units": 3}, 4), ({"max_units": 1}, 9), ({"layers": 2}, 3)], ids=str)
def test_sizes_at_the_edge_work(options, T):
    linvt = made(**options)
    y = linvt(*asked(linvt, T=T))
    assert y.shape == (2, options.get("queries", linvt.place.shape[1]), 24) and y.isfinite().all()


def test_times_of_a_longer_video_are_straight_lines_from_the_first_to_the_last():
    linvt = made(max_units=3)
    x = torch.zeros(1, 5, 5, 24).double()
    linvt.space = linvt.time = torch.nn.ModuleList()
    times = linvt.read(x)[0, :, 0] - linvt.read(x[:, :1])[0, 0, 0] + linvt.time_embed[0]   # (5, w)
    first, middle, last = linvt.time_embed
    expected = torch.stack([first, (first + middle) / 2, middle, (middle + last) / 2, last])
    assert torch.allclose(times, expected)


def test_a_video_of_one_unit_can_be_weighed():
    linvt = made()
    kept, weights = linvt.weigh(*asked(linvt, T=1))
    assert kept.shape == (2, 5) and (weights.sum(-1) - 1).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------- the start
@pytest.mark.parametrize("shaken", [False, True])
def test_with_two_terms_it_chooses_units_and_keeps_their_pictures(shaken):
    """W[m, (t, n)] = unit_m[t] * place_m[n]."""
    linvt = made("a b", shaken)
    W = whole(linvt, *asked(linvt)).unflatten(2, (4, 5))
    assert (W - W.sum(3, keepdim=True) * W.sum(2, keepdim=True)).abs().max() < 1e-6


@each_choice_of_terms
@pytest.mark.parametrize("tokens, queries", [(17, None), (256, None), (17, 4), (5, 9)])
def test_at_first_a_query_looks_at_its_own_place(terms, tokens, queries):
    linvt = made(terms, shaken=False, tokens=tokens, queries=queries)
    W = whole(linvt, *asked(linvt)).unflatten(2, (4, tokens)).sum(2)   # (B, M, N)
    own = torch.arange(W.shape[1]) * tokens // W.shape[1]
    assert (W[:, torch.arange(len(own)), own] > 0.98).all()


def test_without_its_query_it_is_mean_pooling():
    linvt = made("a b", shaken=False, tokens=17)
    linvt.w_query.weight.data.zero_()
    x, text, mask = asked(linvt)
    assert (whole(linvt, x, text, mask).unflatten(2, (4, 17)).sum(3) - 1 / 4).abs().max() < 1e-6
    assert F.cosine_similarity(linvt(x, text, mask), x.mean(1), dim=-1).min() > 0.999


def test_at_first_the_unit_that_holds_the_words_is_the_heaviest():
    """Words and image tokens lie in one space, and one matrix reads both."""
    hits = 0
    for seed in range(10):
        linvt = made(shaken=False, dim=64, seed=seed)
        x, text, mask = asked(linvt, B=8, T=4, L=2, seed=seed)
        asked_about = torch.arange(8) % 4
        x[torch.arange(8), asked_about] += 2 * text.mean(1, keepdim=True)
        units = whole(linvt, x, text, mask).unflatten(2, (4, 5)).sum((1, 3))   # (B, T)
        hits += (units.argmax(1) == asked_about).sum().item()
    assert hits > 70   # of 80; by chance 20


@pytest.mark.parametrize("seed", range(3))
def test_a_short_training_finds_the_unit_that_is_asked_about(seed):
    """Four units, each a shape and a colour; the word for a shape is its vector, turned. What is read off a
    row is the colour, by a reader that stays as it is. By chance one unit in four is right."""
    torch.manual_seed(seed)
    shapes, colours = F.normalize(torch.randn(2, 8, 48), dim=-1)
    turned = shapes @ torch.linalg.qr(torch.randn(48, 48)).Q
    linvt, mask = LinVT(48, 5, width=32, heads=2, top_k=None), torch.ones(16, 1, dtype=torch.bool)
    optimizer = torch.optim.AdamW(linvt.parameters(), lr=2e-3, weight_decay=0.01)

    def batch():
        shape, colour = torch.rand(16, 8).argsort(1)[:, :4], torch.randint(8, (16, 4))
        asked_about, i = torch.randint(4, (16,)), torch.arange(16)
        x = (shapes[shape] + colours[colour])[:, :, None] + 0.1 * torch.randn(16, 4, 5, 48)
        return x, turned[shape[i, asked_about]][:, None], colour[i, asked_about], asked_about
    for _ in range(50):
        x, text, colour, _ = batch()
        loss = F.cross_entropy(20 * linvt(x, text, mask).mean(1) @ colours.T, colour)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hits = 0
    for _ in range(8):
        x, text, _, asked_about = batch()
        units = whole(linvt, x, text, mask).unflatten(2, (4, 5)).sum((1, 3))
        hits += (units.argmax(1) == asked_about).sum().item()
    assert hits > 64   # of 128


# --------------------------------------------------------------------- blocks as the released code has them
def near(a, b):
    return (a - b).abs().max() < 2e-5


def recorded_attention(prefix, heads=4, names=("wq", "wk", "wv", "dense")):
    """An Attention with recorded matrices; the bias of the keys, which a softmax does not see, left out."""
    parts = {n.removeprefix(prefix): t for n, t in CASES.items() if n.startswith(prefix)}
    if "in_proj_weight" in parts:
        for name, w, b in zip(names, parts["in_proj_weight"].chunk(3), parts["in_proj_bias"].chunk(3)):
            parts |= {f"{name}.weight": w, f"{name}.bias": b}
        parts |= {"dense.weight": parts["out_proj.weight"], "dense.bias": parts["out_proj.bias"]}
    attention = Attention(parts["wq.weight"].shape[0], heads)
    for linear, name in zip(("q_proj", "k_proj", "v_proj", "out_proj"), names):
        getattr(attention, linear).weight.data = parts[f"{name}.weight"]
        if linear != "k_proj":
            getattr(attention, linear).bias.data = parts[f"{name}.bias"]
    return attention


@torch.no_grad()
def test_attention_in_space_and_time_equals_the_released_blocks():
    space, time = (recorded_attention(f"a.space_time.{axis}_attention.") for axis in ("spatial", "temporal"))
    x = CASES["a.x"]
    h = space(x.flatten(0, 1), x.flatten(0, 1)).view_as(x)
    assert near(h, CASES["a.space_time.after_space"])
    h = h.transpose(1, 2)
    h = time(h.flatten(0, 1), h.flatten(0, 1)).view_as(h).transpose(1, 2)
    assert near(h, CASES["a.space_time.after_time"])


@torch.no_grad()
def test_queries_tokens_and_words_equal_the_released_layer():
    prefix, q = "a.aggregator_layers.", CASES["a.aggregator_layers.queries"]
    for step, name, norm, other in (("own", "self_attention", "norm_self", None),
                                    ("visual", "visual_cross_attention", "norm_cross_v", "visual"),
                                    ("text", "text_cross_attention", "norm_cross_t", "text")):
        y = q if other is None else CASES[prefix + other]
        q = q + recorded_attention(f"{prefix}{name}.")(q, y)   # released: the norm comes after
        q = F.layer_norm(q, q.shape[-1:], CASES[f"{prefix}{norm}.weight"],
                                           CASES[f"{prefix}{norm}.bias"])
        assert near(q, CASES[f"{prefix}inner.{step}"]), step


@torch.no_grad()
@pytest.mark.parametrize("case, k", [("a", 12), ("b", 20)])
def test_the_kept_tokens_are_those_of_the_released_scorer(case, k):
    x, prefix = CASES[f"{case}.x"].flatten(1, 2), f"{case}.select_pool."
    linvt = LinVT(x.shape[-1], 6, width=x.shape[-1], top_k=k).eval()
    linvt.score = torch.nn.Linear(x.shape[-1], 1)
    linvt.score.load_state_dict({p: CASES[f"{prefix}score_net.{p}"] for p in ("weight", "bias")})
    kept, prior = linvt.select(x)
    assert torch.equal(kept, CASES[f"{prefix}kept_by_score"].sort().values)
    scores = CASES[f"{prefix}scores"].gather(1, kept)
    assert near(prior, F.logsigmoid(scores))
    best_first = scores.argsort(1, descending=True)   # windows of one token, in their order of score
    best_first = kept.gather(1, best_first)[..., None]
    assert near(x.take_along_dim(best_first, 1), CASES[f"{prefix}pooled"][:, :k])


class Aggregator(LinVT):
    """The last step alone: tokens and queries as they are recorded."""
    def read(self, x):
        return x

    def ask(self, h, text, mask):
        return text


@torch.no_grad()
@pytest.mark.parametrize("case", ["a", "b"])
def test_weights_and_rows_equal_the_released_ones_of_one_head(case):
    prefix = f"{case}.aggregate_one_head."
    queries, tokens = CASES[prefix + "queries"], CASES[prefix + "visual"][:, :, None]   # (B, S, 1, d)
    width = queries.shape[-1]
    linvt = Aggregator(width, 1, queries.shape[1], width=width, heads=1, top_k=None, content=True)
    linvt.norm_query = linvt.norm_token = torch.nn.Identity()
    linvt.w_query, linvt.w_token = torch.nn.Linear(width, width), torch.nn.Linear(width, width)
    for linear, name in ((linvt.w_query, "wq"), (linvt.w_token, "wk")):
        parts = {p: CASES[f"{prefix}linear_aggregator.{name}.{p}"] for p in ("weight", "bias")}
        linear.load_state_dict(parts)
    linvt.w_unit.weight.data.zero_()
    kept, weights = linvt.weigh(tokens, queries, None)
    rows = linvt(tokens, queries, None)
    assert near(weights, CASES[prefix + "A"]) and near(rows, CASES[prefix + "y"])
    # several heads, each with weights of its own for its channels, give no average of tokens
    assert not near(rows, CASES[f"{case}.aggregate_as_released.y"])


# ------------------------------------------------------------------------------------ kinds of video tokens
@pytest.fixture(scope="module")
def kinds(weights):
    """kinds(name) -> a chat with that kind of tokens; a frame has 4 patches, a LLaMA's row 32 numbers."""
    chat, made_once = open_chat(weights).load(), {}

    def kind(name):
        if name not in made_once:
            torch.manual_seed(0)
            tokens, linvt = chat.video_tokens, LinVT(32, 5 if name == "branch+linvt" else 4, width=16)
            made_once[name] = VIDEO_TOKENS[name](tokens.mm_projector, tokens.branch, linvt).eval()
        chat.video_tokens = made_once[name]
        return chat
    return kind


def pixels(T, B=2):
    generator = torch.Generator().manual_seed(T)
    return torch.randint(256, (B, T, 3, 32, 32), dtype=torch.uint8, generator=generator)


QUESTIONS = ["What colour is the circle?", "Which way does the blue square move?"]


@torch.no_grad()
def test_a_picture_keeps_its_logits_bit_for_bit(kinds):
    prompts = [prompt_ids(kinds("mean").tokenizer, [(question, "left")]) for question in QUESTIONS]
    logits = [kinds(name).logits(pixels(1), prompts)[0] for name in ("mean", "linvt")]
    assert torch.equal(*logits)


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 3, 8])
def test_one_window_gives_the_rows_of_the_branch_bit_for_bit(T, kinds):
    assert torch.equal(kinds("branch").embed_video(pixels(T)),
                       kinds("branch+linvt").embed_video(pixels(T), QUESTIONS))


@torch.no_grad()
def test_windows_have_eight_frames_and_the_last_what_is_left(kinds):
    chat, video = kinds("branch+linvt"), pixels(20)
    units = chat.video_tokens.see(chat.clip, video)
    assert units.shape == (2, 3, 5, 32)
    branch = kinds("branch").video_tokens
    for i, window in enumerate((video[:, :8], video[:, 8:16], video[:, 16:])):
        assert torch.equal(units[:, i], branch.see(chat.clip, window))


@torch.no_grad()
@pytest.mark.parametrize("name, K", [("linvt", 4), ("branch+linvt", 5)])
@pytest.mark.parametrize("question", ["", "left", "\u043a\u0443\u0434\u0430?", "\U0001f534", "left? " * 100])
def test_any_question_about_a_video_of_any_length_has_its_rows(question, name, K, kinds):
    chat = kinds(name)
    for T in (1, 2, 9, 70):
        rows = chat.embed_video(pixels(T, B=1), [question])
        assert rows.shape == (1, K, 32) and rows.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["linvt", "branch+linvt"])
def test_rows_follow_the_question_and_what_is_seen_does_not(name, kinds):
    chat = kinds(name)
    seen = chat.video_tokens.see(chat.clip, pixels(40))
    words, mask = chat.embed_questions(QUESTIONS)
    rows, others = chat.video_tokens(seen, words, mask), chat.video_tokens(seen, words.flip(0), mask.flip(0))
    assert (rows - others).abs().max() > 1e-4
    assert torch.equal(rows, chat.embed_video(pixels(40), QUESTIONS))
    assert (chat.video_tokens(seen.half(), words, mask) - rows).abs().max() < 1e-2 * rows.abs().max()


def test_frames_follow_the_length_of_a_video_up_to_a_cap():
    frames = {name: [VIDEO_TOKENS[name](None).frames_of(None, size, seconds) for size in (64, 224)
                     for seconds in (0.04, 9, 64, 1e6)] for name in ("linvt", "branch+linvt")}
    assert frames == {"linvt": 2 * [8, 9, 64, 128], "branch+linvt": [8, 32, 256, 512, 8, 8, 64, 512]}
    assert VIDEO_TOKENS["branch+linvt"](None).frames_of(5, 64, 9) == 5


@torch.no_grad()
@pytest.mark.parametrize("name", ["branch", "branch+linvt"])
def test_tuning_reads_the_prompt_of_a_chat(name, kinds):
    """Rows are those of the last question. Where they depend on it, no earlier answer is learned."""
    chat, turns = kinds(name), [(QUESTIONS[0], "It is red."), (QUESTIONS[1], "Left.")]
    prompts, asked = chat.prompts([turns], "vicuna_v1")
    logits, target = chat.logits(pixels(20, B=1), prompts, asked)
    learned = target[0] != IGNORE_INDEX
    assert chat.tokenizer.decode(target[0][learned][:-1].tolist()).endswith("Left.")
    assert ("red" in chat.tokenizer.decode(target[0][learned][:-1].tolist())) == (name == "branch")
    ids, _ = prompt_ids(chat.tokenizer, [*turns[:1], (QUESTIONS[1], None)])
    embeds = chat.splice(ids, chat.embed_video(pixels(20, B=1), QUESTIONS[1:])[0])
    expected = chat.llm(embeds=embeds[None])[:, -1]
    assert (logits[:, len(embeds) - 1] - expected).abs().max() < 1e-4


@torch.no_grad()
def test_of_a_question_the_first_64_tokens_are_read(kinds):
    chat = kinds("linvt")
    words, mask = chat.embed_questions(["left, then up. " * 50, "left", ""])
    assert words.shape == (3, 64, 32) and mask.sum(1).tolist() == [64, len(chat.tokenizer.encode("left")), 0]
    assert torch.equal(words[0], chat.embed_questions(["left, then up. " * 60])[0][0])


def test_only_the_linvt_is_trained(kinds):
    chat = kinds("branch+linvt")
    chat.requires_grad_(False).video_tokens.linvt.requires_grad_(True)
    chat.llm.requires_grad_(True)   # a stage with LoRA trains it, but not by the words of the question
    chat.video_tokens.branch.requires_grad_(True)   # what is seen is frozen, whatever a stage trains
    chat.embed_video(pixels(24), QUESTIONS).sum().backward()
    trained = {name for name, p in chat.named_parameters() if p.grad is not None}
    assert trained and all(name.startswith("video_tokens.linvt.") for name in trained)
    chat.requires_grad_(False)


@torch.no_grad()
def test_a_long_film_is_seen_as_its_scenes_side_by_side(kinds, tmp_path):
    scenes = np.random.default_rng(0).integers(256, size=(3, 10, 4, 4, 3), dtype=np.uint8)
    scenes = scenes.repeat(12, axis=2).repeat(12, axis=3)   # blocks of 12 pixels
    options = {"options": {"qp": "0", "g": "1"}, "rate": 5}   # without loss, every frame a key frame
    films = [film(tmp_path / f"{i}.mp4", "libx264", scene, **options) for i, scene in enumerate(scenes)]
    whole_film = film(tmp_path / "long.mp4", "libx264", scenes.reshape(-1, *scenes.shape[2:]), **options)
    chat = kinds("branch+linvt")

    def see(path, count):
        frames, _ = stacked(data.sample_frames(path, count, "uniform"))
        return chat.video_tokens.see(chat.clip, data.squash(frames, 32)[None])
    parts = torch.cat([see(path, 8) for path in films], dim=1)
    assert parts.shape == (1, 3, 5, 32) and (see(whole_film, 24) - parts).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------- linvt.bin
@pytest.fixture
def saved(weights, tmp_path):
    """saved(options of LinVT...) -> a folder of weights with a linvt.bin, and what that was written from."""
    def saved(dim=32, tokens=5, **options):
        for name in os.listdir(weights):
            if not os.path.exists(tmp_path / name):
                os.symlink(os.path.join(weights, name), tmp_path / name)
        linvt = LinVT(dim, tokens, **{"width": 16, "heads": 2, **options})
        save_linvt(tmp_path / "linvt.bin", linvt)
        return tmp_path, linvt
    return saved


@torch.no_grad()
@pytest.mark.parametrize("options", [
    {}, {"top_k": None}, {"content": True, "top_k": 7}, {"queries": 3, "layers": 2, "max_units": 9}], ids=str)
def test_a_file_brings_back_what_was_saved(options, saved):
    folder, linvt = saved(**options)
    chat = open_chat(folder, tokens="branch+linvt").load()
    loaded = chat.video_tokens.linvt
    assert (loaded.heads, loaded.top_k) == (2, options.get("top_k", 1024))
    assert chat.embed_video(pixels(20), QUESTIONS).shape == (2, options.get("queries", 5), 32)
    for name, t in linvt.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t.half().float()), name


@torch.no_grad()
def test_the_shipped_one_finds_scenes_among_the_32_of_a_minute():
    """And where they are. The branch alone, of as many rows, does not know. Units in fp16 say the same."""
    path, talks = os.path.join(ROOT, "assets", "scenes.mp4"), [
        [("What does the red circle do?", "It moves right.")], [("What colour is the star?", "It is cyan.")]]
    assert os.path.getsize(os.path.join(TINY, "linvt.bin")) < 500_000 and os.path.getsize(path) < 1_000_000
    frames, _ = stacked(data.sample_frames(path, 256, "uniform"))
    video = data.squash(frames, 64)[None].expand(2, -1, -1, -1, -1)
    chat = open_chat(TINY, "branch+linvt").load()
    tokens = chat.video_tokens
    seen = tokens.see(chat.clip, video[:1]).expand(2, -1, -1, -1)
    for rows in (seen, seen.half()):
        assert chat.exact(rows, talks, "vicuna_v1") == [True, True]
    questions = chat.embed_questions([question for [(question, _)] in talks])
    units = tokens.weigh(seen, *questions).sum((1, 3))
    assert units.argmax(1).tolist() == [27, 13]   # from 54 to 56 s, from 26 to 28 s
    assert open_chat(TINY, "branch").load().exact(video, talks, "vicuna_v1") == [False, False]


@pytest.mark.parametrize("tokens", ["linvt", "branch+linvt"])
def test_without_a_file_no_random_numbers_answer_and_nothing_else_is_said(tokens, saved, recwarn):
    folder, _ = saved()
    save_chat(folder / "chat.bin", open_chat(folder, tokens="branch").load())
    os.remove(folder / "linvt.bin")
    with pytest.raises(UserError, match=f"lacks linvt.bin, which --tokens {re.escape(tokens)} needs$"):
        open_chat(folder, tokens=tokens)
    assert not recwarn.list


def edited(path, change):
    """Writes a file again, with other tensors or other metadata."""
    tensors, about = {n: t.clone() for n, t in read_file(path).items()}, read_metadata(path)
    change(tensors, about)
    write_safetensors(path, tensors, about)


@pytest.mark.parametrize("made_for, change, message", [
    ({"dim": 24}, None, "made for 5 tokens of 24 numbers, and here are 5 of 32"),
    ({"tokens": 4}, None, "made for 4 tokens of 32 numbers, and here are 5 of 32"),
    ({}, lambda tensors, about: tensors.update(query=torch.zeros(6, 16)), "as query"),   # another M
    ({}, lambda tensors, about: tensors.pop("null_word"), "missing, as null_word"),
    ({}, lambda tensors, about: tensors.pop("place"), "holds no LinVT"),
    ({}, lambda tensors, about: about.update(heads="5"), "5 heads for a width of 16"),
    ({}, lambda tensors, about: about.update(heads="0"), "0 heads for a width of 16"),
    ({}, lambda tensors, about: about.update(heads="two"), "holds no LinVT"),
    ({}, lambda tensors, about: about.update(top_k="9" * 5000), "holds no LinVT")])
def test_a_file_that_does_not_fit_is_one_line(made_for, change, message, saved):
    folder, _ = saved(**made_for)
    if change:
        edited(folder / "linvt.bin", change)
    with pytest.raises(UserError, match=message) as raised:
        open_chat(folder, tokens="branch+linvt")
    assert "linvt.bin: " in str(raised.value) and "\n" not in str(raised.value)


def test_what_was_tuned_for_the_branch_serves_windows_of_it_without_a_warning(saved, recwarn):
    folder, _ = saved()
    save_chat(folder / "chat.bin", open_chat(folder, tokens="branch").load())
    opened = open_chat(folder, tokens="branch+linvt")
    assert not recwarn.list and opened.description == "tuned for branch, branch.pth unused"


def test_long_videos_are_counted_before_memory_runs_out(saved):
    folder, _ = saved()
    opened, cpu = open_chat(folder, tokens="branch+linvt"), torch.device("cpu")
    few, many = (opened.need(torch.float32, None, cpu, frames)["video"] for frames in (64, 6400))
    assert 10 * few < many
