"""llm.py: against transformers, against itself, and against bad folders. CPU, offline."""
import base64
import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil

import numpy as np
import pytest
import regex
import sentencepiece
import torch

import llm
from llm import (KVCache, LLaMA, LLaMAConfig, generate, load_llama, load_tokenizer, sample, save_llama,
                 stream_text)
from plumbing.cli import UserError
from plumbing.weightfile import read_tensors, write_safetensors

FIXTURES = os.path.join(os.path.dirname(__file__), "fixtures")
CORPUS = ["the quick brown fox jumps over the lazy dog", "a red circle moves left, then up",
          "what goes right?"] * 20
TEXTS = ["the red circle", "café ☕ naïve", "日本語のテキスト", "👩‍👩‍👧 family 🎉🎉", "Ω≈ç√∫",
         "line\nbreak\ttab  two spaces", "", "🎉"]


def train_sentencepiece(path, vocab_size, byte_fallback):
    """A LLaMA-like sentencepiece model: BPE, ids 0 1 2 = unk, BOS, EOS, spaces kept as they are."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(path).removesuffix(".model"), vocab_size=vocab_size,
        minloglevel=2, model_type="bpe", byte_fallback=byte_fallback, remove_extra_whitespaces=False,
        normalization_rule_name="identity")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "tokenizer.model"
    train_sentencepiece(path, 60, byte_fallback=False)
    return path


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    train_sentencepiece(folder / "tokenizer.model", 330, byte_fallback=True)
    return load_tokenizer(folder)


def write_ranks(path):
    """A tiktoken file: the 256 bytes in no special order, then a few merges of bytes."""
    words = [bytes([b]) for b in sorted(range(256), key=lambda b: (b * 37) % 256)]
    words += [b"th", b"the", b" the", b"12", b"123", b"re", b"\xf0\x9f", b"\xe6\x97"]
    path.write_bytes(b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words)))


@pytest.fixture(scope="session")
def tiktoken_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiktoken")
    write_ranks(folder / "tokenizer.model")
    return load_tokenizer(folder)


@pytest.fixture
def folder(tmp_path, small_tokenizer):
    """Copies a fixture into a folder that can be loaded and damaged: folder("mha") -> path."""
    def copy(name):
        target = tmp_path / name
        shutil.copytree(os.path.join(FIXTURES, f"llm_{name}"), target)
        shutil.copy(small_tokenizer, target / "tokenizer.model")
        return target
    return copy


def edit(path, **changes):
    """Changes entries of a JSON file; None removes one."""
    entries = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))


def edit_tensors(folder, change):
    """Rewrites model.safetensors as change({name: tensor}) leaves it."""
    tensors = {name: t.clone() for name, t in read_tensors(folder).items()}
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


def tiny(**options):
    """A small LLaMA with sharp attention, in evaluation mode."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, mlp=48, context_length=64)
    model = LLaMA(LLaMAConfig(**{**sizes, **options}))
    for p in model.parameters():
        if p.ndim == 2:
            p.data.normal_(std=0.2)
    return model.eval()


def cache_of(model, max_len=64, batch=1):
    return KVCache(model.config, batch, max_len, "cpu", model.lm_head.weight.dtype)


# ---------------------------------------------------------------------------------------- the decoder
@pytest.mark.parametrize("name", ["mha", "gqa", "llama3", "linear"])
def test_logits_equal_transformers(folder, name):
    model, _, extra = load_llama(folder(name))
    expected = read_tensors(os.path.join(FIXTURES, f"llm_{name}", "expected.safetensors"))
    with torch.no_grad():
        logits = model.float()(expected["ids"])[:, ::expected["ids"].shape[1] // 24]
    assert not extra and logits.shape == expected["logits"].shape
    assert (logits - expected["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama3", "linear"])
def test_rope_scaling_matters_in_the_recorded_logits(folder, name):
    model, _, _ = load_llama(folder(name))
    expected = read_tensors(os.path.join(FIXTURES, f"llm_{name}", "expected.safetensors"))
    model.config.rope_scaling = None
    with torch.no_grad():
        logits = model.float()(expected["ids"])[:, ::expected["ids"].shape[1] // 24]
    assert (logits - expected["logits"]).abs().max() > 0.1


def test_the_llama3_fixture_has_a_frequency_of_each_kind_and_is_longer_than_its_original_context(folder):
    path = folder("llama3")
    config = load_llama(path)[0].config
    plain = dataclasses.replace(config, rope_scaling=None)
    ratio = llm.rope_frequencies(plain, "cpu") / llm.rope_frequencies(config, "cpu")
    assert ratio.min() == 1 and ratio.max() == 8 and ((ratio > 1.1) & (ratio < 7)).any()
    length = read_tensors(path / "expected.safetensors")["ids"].shape[1]
    assert length > config.rope_scaling["original_max_position_embeddings"]


def test_old_and_new_spelling_of_rope_scaling_mean_the_same(folder):
    path = folder("linear")
    new = load_llama(path)[0].config
    scaling = {"type": "linear", "factor": 4.0}
    edit(path / "config.json", rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling)
    old = load_llama(path)[0].config
    assert torch.equal(llm.rope_frequencies(old, "cpu"), llm.rope_frequencies(new, "cpu"))


@pytest.mark.parametrize("chunks", [[1] * 20, [20], [7, 1, 12], [1, 19], [13, 7]])
def test_cached_decoding_equals_full_forward(chunks):
    model, ids = tiny(), torch.randint(64, (2, 20))
    cache = cache_of(model, batch=2)
    with torch.no_grad():
        parts = [model(part, kv_cache=cache) for part in ids.split(chunks, dim=1)]
        full = model(ids)
    assert cache.length == 20
    assert torch.allclose(torch.cat(parts, dim=1), full, atol=1e-5)


def test_a_truncated_cache_continues_as_if_the_rest_had_never_been():
    model, ids = tiny(), torch.randint(64, (1, 20))
    cache = cache_of(model)
    with torch.no_grad():
        model(torch.cat((ids[:, :8], ids[:, :9].flip(1)), dim=1), kv_cache=cache)
        cache.truncate(8)
        assert torch.allclose(model(ids[:, 8:], kv_cache=cache), model(ids)[:, 8:], atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_tokens_apart_are_as_many_continuations_of_one_cache(kv_heads):
    model, ids = tiny(kv_heads=kv_heads), torch.randint(64, (1, 20))
    cache = cache_of(model)
    with torch.no_grad():
        model(ids[:, :12], kv_cache=cache)
        together = model(ids[:, 12:], kv_cache=cache, apart=True)[0]
        for i in range(8):
            alone = model(torch.cat((ids[:, :12], ids[:, 12 + i:13 + i]), dim=1))[0, -1]
            assert torch.allclose(together[i], alone, atol=1e-5)


def test_number_probabilities_are_those_of_a_model_that_reads_each_prompt_by_itself():
    model, ids, digits = tiny(), torch.randint(64, (1, 9)), list(range(30, 50, 2))
    cache = cache_of(model)
    with torch.no_grad():
        model(ids[:, :8], kv_cache=cache)
        found = llm.number_probabilities(model, cache, ids[0, 8].item(), digits)
        for a, b in [(0, 0), (4, 7), (9, 3)]:
            written = torch.cat((ids, torch.tensor([[digits[a], digits[b]]])), dim=1)
            p = model(written)[0].softmax(-1)
            assert torch.allclose(found[10 * a + b], p[8, digits[a]] * p[9, digits[b]], rtol=1e-4)
    assert found.shape == (100,) and cache.length == 8


def test_a_fork_of_a_cache_goes_on_from_its_beginning_and_leaves_it_to_the_bit():
    model, ids, more = tiny(), torch.randint(64, (1, 20)), torch.randint(64, (1, 7))
    cache = cache_of(model)
    with torch.no_grad():
        model(ids, kv_cache=cache)
        before = [t[:, :, :20].clone() for t in (*cache.k, *cache.v)]
        fork = cache.fork(5, 12)
        whole = model(torch.cat([ids[:, :5], more], 1))[:, 5:]
        assert torch.allclose(model(more, kv_cache=fork), whole, atol=1e-5) and fork.length == fork.max_len
    assert cache.length == 20
    assert all(torch.equal(t[:, :, :20], old) for t, old in zip((*cache.k, *cache.v), before))


def test_last_only_is_the_last_row():
    model, ids = tiny(), torch.randint(64, (2, 9))
    with torch.no_grad():
        last = model(ids, last_only=True)
        assert last.shape == (2, 1, 64) and torch.allclose(last, model(ids)[:, -1:], atol=1e-6)


def test_ids_and_their_embeddings_give_the_same_logits():
    model, ids = tiny(), torch.randint(64, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(ids), model(embeds=model.model.embed_tokens(ids)))


def test_padding_on_the_right_does_not_reach_the_text():
    model, ids = tiny(), torch.randint(64, (1, 12))
    padded = torch.cat((ids, torch.zeros(1, 5, dtype=torch.int64)), dim=1)
    with torch.no_grad():
        assert torch.allclose(model(padded)[:, :12], model(ids), atol=1e-5)


def test_a_token_after_a_cache_is_the_last_of_the_whole_in_bf16():
    """On a CPU its row is doubled for attention."""
    model = tiny(heads=4, kv_heads=2).bfloat16()
    ids = torch.randint(1, 60, (2, 9))
    cache = model.new_cache(2, 9)
    with torch.no_grad():
        model(ids[:, :8], kv_cache=cache)
        assert torch.allclose(model(ids[:, 8:], kv_cache=cache)[:, -1], model(ids)[:, -1], atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_give_fp32_logits_near_those_of_fp32(dtype):
    model, ids = tiny(), torch.randint(64, (1, 12))
    with torch.no_grad():
        full = model(ids)
        half = model.to(dtype)(embeds=model.model.embed_tokens(ids).float())   # as features would arrive
    assert half.dtype == torch.float32 and (half - full).abs().max() < 0.05 * full.abs().max()


def test_rms_norm_survives_values_whose_square_overflows_fp16():
    norm = tiny().model.norm.half()
    assert torch.allclose(norm(torch.full((1, 32), 1000.0, dtype=torch.float16)).float(), torch.ones(1, 32))


def test_gradient_flows_to_embeds_and_to_no_frozen_parameter():
    model = tiny().requires_grad_(False)
    embeds = torch.randn(2, 7, 32, requires_grad=True)
    model(embeds=embeds).logsumexp(-1).sum().backward()
    assert (embeds.grad.abs().sum(-1) > 0).all() and all(p.grad is None for p in model.parameters())


def test_every_parameter_gets_a_gradient_when_not_frozen():
    model = tiny()
    model(torch.randint(64, (2, 12))).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_an_untrained_model_finds_all_tokens_about_equally_likely():
    torch.manual_seed(0)
    model = LLaMA(LLaMAConfig(vocab_size=64, width=128, layers=4, heads=4, mlp=344))
    assert (model(torch.randint(64, (4, 32))).softmax(-1) * 64 - 1).abs().mean() < 0.25


def test_more_tokens_than_the_context_are_refused_with_both_numbers():
    with pytest.raises(UserError, match="65 tokens.* 64"):
        tiny()(torch.zeros(1, 65, dtype=torch.int64))


def test_the_step_of_a_gpu_is_the_step_of_the_model(monkeypatch):
    """Its shapes are fixed, for a CUDA graph: here what would be recorded is called. What lies behind a
    token's place in the cache counts nothing."""
    model, ids = tiny(context_length=1100), torch.randint(64, (1, 510))
    caches = [cache_of(model, 1100) for _ in range(2)]
    step = llm.GraphedStep(model, caches[1])
    for t in (*caches[1].k, *caches[1].v):
        t.fill_(1e3)

    class Graph:
        def replay(self):
            step.logits = step.run()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    with torch.no_grad():
        for cache in caches:
            model(ids, kv_cache=cache)
        for token in range(5):   # over the end of the first 512 places
            expected = model(torch.tensor([[token]]), kv_cache=caches[0])
            assert torch.allclose(step(token), expected, atol=1e-5) and caches[1].length == caches[0].length
        caches[1].truncate(100)
        caches[0].truncate(100)
        assert torch.allclose(step(7), model(torch.tensor([[7]]), kv_cache=caches[0]), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_resize_vocab_keeps_old_rows_and_fills_new_ones_with_their_mean(tied):
    model = tiny(tied=tied).requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters() if p.shape == (64, 32)}
    model.resize_vocab(67)
    for name, old in before.items():
        new = model.get_parameter(name)
        assert torch.equal(new[:64], old) and not new.requires_grad
        assert torch.allclose(new[64:], old.mean(0).expand(3, -1))
    assert model(torch.tensor([[66]])).shape == (1, 1, 67) and model.config.vocab_size == 67
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("sizes", [
    dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), dict(rope_scaling={"type": "linear"})])
def test_an_unknown_stretch_of_positions_is_refused(sizes):
    with pytest.raises((ValueError, KeyError)):
        LLaMAConfig(**sizes)


# ---------------------------------------------------------------------------------------- generation
def test_greedy_generation_is_the_argmax_of_full_forwards():
    model, ids = tiny(), torch.randint(64, (1, 5))
    expected = ids
    with torch.no_grad():
        for _ in range(10):
            expected = torch.cat((expected, model(expected)[:, -1].argmax(-1, keepdim=True)), dim=1)
    by_ids = list(generate(model, ids, max_new_tokens=10))
    by_embeds = list(generate(model, embeds=model.model.embed_tokens(ids), max_new_tokens=10))
    assert by_ids == by_embeds == expected[0, 5:].tolist()


def test_generation_with_a_cached_prefix_equals_generation_from_the_whole_prompt():
    model, ids = tiny(), torch.randint(64, (1, 9))
    cache = cache_of(model)
    with torch.no_grad():
        model(ids[:, :6], kv_cache=cache)
    rest = list(generate(model, ids[:, 6:], max_new_tokens=8, kv_cache=cache))
    assert rest == list(generate(model, ids, max_new_tokens=8))
    assert cache.length == 9 + 8 - 1


def test_same_seed_same_sample_and_other_seeds_other_samples():
    model, ids = tiny(), torch.randint(64, (1, 5))
    runs = [tuple(generate(model, ids, max_new_tokens=12, temperature=1.0, seed=s)) for s in (0, 0, 1, 2)]
    assert runs[0] == runs[1] and len(set(runs)) == 3


def test_generation_stops_before_a_stop_id():
    model, ids = tiny(), torch.randint(64, (1, 5))
    how, cache = dict(max_new_tokens=12, temperature=1.0), cache_of(model)
    free = list(generate(model, ids, **how))
    end = free.index(free[7])
    assert list(generate(model, ids, **how, stop_ids={free[7]}, kv_cache=cache)) == free[:end]
    assert cache.length == 5 + end


def test_generation_ends_when_the_context_is_full():
    model, ids = tiny(context_length=16), torch.randint(64, (1, 10))
    assert len(list(generate(model, ids, max_new_tokens=100))) == 6
    assert len(list(generate(model, ids, max_new_tokens=100, kv_cache=cache_of(model, max_len=13)))) == 3


def test_a_prompt_beyond_the_context_is_refused():
    with pytest.raises(UserError, match="17 tokens, .* at most 16"):
        next(generate(tiny(context_length=16), torch.zeros(1, 17, dtype=torch.int64), max_new_tokens=1))


LOGITS = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]).log()


def draws(temperature, top_p, count=2000):
    generator = torch.Generator().manual_seed(0)
    tokens = [sample(LOGITS, temperature, top_p, generator) for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=5) / count


def test_a_full_cache_and_logits_that_are_no_numbers_are_one_line():
    model = LLaMA(LLaMAConfig(20, 16, 1, 2, mlp=16))
    cache = KVCache(model.config, 1, 8, "cpu", torch.float32)
    model(torch.zeros(1, 7, dtype=torch.long), kv_cache=cache)
    with pytest.raises(UserError, match="18 tokens, .* at most 8 at once"):
        llm.number_probabilities(model, cache, 3, list(range(10)))
    for temperature in (0, 1):
        with pytest.raises(UserError, match="gives no numbers"):
            sample(torch.tensor([1, torch.nan]), temperature, 1, None)


def test_sampling_follows_the_softmax_of_the_logits():
    assert (draws(1.0, 1.0) - LOGITS.exp()).abs().max() < 0.04


def test_top_p_draws_only_from_the_fewest_tokens_that_reach_it():
    assert (draws(1.0, 0.6) > 0).tolist() == [False, True, False, True, False]    # 0.40 + 0.25 reaches 0.6
    assert (draws(1.0, 0.66) > 0).tolist() == [False, True, False, True, True]    # but not 0.66
    assert (draws(1.0, 0.01) > 0).tolist() == [False, True, False, False, False]  # never none


def test_temperature_towards_zero_becomes_greedy():
    assert draws(1e-6, 1.0, count=50)[1] == 1 and draws(0.0, 1.0, count=5)[1] == 1
    assert sample(-LOGITS, 1e-40, 1.0, torch.Generator()) == 2   # logits / temperature would be inf
    for temperature, top_p in ((1e-50, 1.0), (1e-300, 0.5), (1.0, 1e-50), (1e-50, 1e-300)):   # 0 in fp32
        assert sample(LOGITS, temperature, top_p, torch.Generator()) == 1


# ---------------------------------------------------------------------------------------- text
@pytest.mark.parametrize("text", TEXTS)
def test_both_tokenizers_give_back_any_text(byte_tokenizer, tiktoken_tokenizer, text):
    for tokenizer in (byte_tokenizer, tiktoken_tokenizer):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids, default=0) < tokenizer.vocab_size


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_join_to_decode_and_never_show_half_a_character(
        byte_tokenizer, tiktoken_tokenizer, text):
    for tokenizer in (byte_tokenizer, tiktoken_tokenizer):
        pieces = list(stream_text(tokenizer, iter(tokenizer.encode(text))))
        assert "".join(pieces) == text and all(pieces) and "\ufffd" not in "".join(pieces)


def test_a_character_of_several_tokens_comes_with_its_last_byte(byte_tokenizer):
    ids = byte_tokenizer.encode("a🎉")
    assert len(ids) >= 5                      # four of them are the bytes of the emoji
    taken = []
    stream = stream_text(byte_tokenizer, (taken.append(i) or i for i in ids))
    assert [(piece, len(taken)) for piece in stream][-1] == ("🎉", len(ids))
    assert list(stream_text(byte_tokenizer, ids[:-1])) == ["a", "\ufffd\ufffd\ufffd"]   # cut short


def test_streams_of_random_tokens_join_to_decode(byte_tokenizer, tiktoken_tokenizer):
    rng = random.Random(0)
    for tokenizer, _ in itertools.product((byte_tokenizer, tiktoken_tokenizer), range(150)):
        ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randrange(30))]
        assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_text_streams_word_by_word_with_the_spaces_between(byte_tokenizer):
    pieces = list(stream_text(byte_tokenizer, byte_tokenizer.encode("the red circle")))
    assert len(pieces) > 1 and not pieces[0].startswith(" ")
    assert any(piece.startswith(" ") for piece in pieces[1:])


def test_sentencepiece_puts_its_space_before_every_segment_and_no_bos_or_eos(byte_tokenizer):
    first, second = byte_tokenizer.encode("the"), byte_tokenizer.encode("red")
    assert byte_tokenizer.decode(first + second) == "the red"
    assert not {byte_tokenizer.bos_id, byte_tokenizer.eos_id} & set(first + second)
    assert (byte_tokenizer.bos_id, byte_tokenizer.eos_id, byte_tokenizer.stop_ids) == (1, 2, {2})


def test_control_tokens_in_a_text_are_only_text(byte_tokenizer, tiktoken_tokenizer):
    for tokenizer, text in ((byte_tokenizer, "a</s>b"), (tiktoken_tokenizer, "a<|eot_id|>b<|end_of_text|>")):
        ids = tokenizer.encode(text)
        assert not tokenizer.stop_ids & set(ids) and tokenizer.decode(ids) == text


def test_control_and_added_tokens_have_no_text(byte_tokenizer, tiktoken_tokenizer):
    for tokenizer in (byte_tokenizer, tiktoken_tokenizer):
        ids, V = tokenizer.encode("the red"), tokenizer.vocab_size
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, V, V + 2]) == "the red"


def test_llama3_has_256_special_tokens_after_its_words(tiktoken_tokenizer):
    tokenizer, n = tiktoken_tokenizer, 264
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (n, n + 1, n + 256)
    assert tokenizer.stop_ids == {n + 1, n + 9}   # <|end_of_text|> and <|eot_id|>, as released


@pytest.mark.parametrize("text, words", [
    ("It's what WE'LL do", ["It", "'s", " what", " WE", "'LL", " do"]), ("I'mx", ["I", "'m", "x"]),
    ("in 12345 days", ["in", " ", "123", "45", " days"]),
    ("a  b\n\n c", ["a", " ", " b", "\n\n", " c"]), ("end... \n(so)", ["end", "...", " \n", "(so", ")"]),
    ("x   ", ["x", "   "])])
def test_llama3_cuts_text_into_these_words_before_merging(text, words):
    assert regex.findall(llm.LLAMA3_SPLIT, text) == words


def test_tiktoken_merges_by_rank_within_words(tiktoken_tokenizer):
    pieces = [tiktoken_tokenizer.decode([i]) for i in tiktoken_tokenizer.encode("the there 12345")]
    assert pieces == ["the", " the", "re", " ", "123", "4", "5"]


def test_a_folder_with_only_tokenizer_json_says_what_to_put_there(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="add tokenizer.model from the page .*original"):
        load_tokenizer(tmp_path)


def test_the_tokenizer_of_llama_3_is_found_where_its_page_has_it(folder):
    path = folder("mha")
    (path / "original").mkdir()
    shutil.move(path / "tokenizer.model", path / "original")
    assert load_llama(path)[1].vocab_size == 60


@pytest.mark.parametrize("content", [
    b"version https://git-lfs.github.com/spec/v1", b"\n\x0fgarbage", b"IQ== 0\n!! x\n", b"IQ== 0\nno\n", b"", None])
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.model"):
        load_tokenizer(tmp_path)


def test_a_cut_sentencepiece_model_is_refused(tmp_path, small_tokenizer):
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer.read_bytes()[:200])
    with pytest.raises(UserError, match="tokenizer.model"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------------------------------- folders
def split_into_shards(folder, kind):
    """Rewrites a folder's model.safetensors as two shards with an index, or as one or two .bin files."""
    tensors = {name: t.clone() for name, t in read_tensors(folder).items()}
    os.remove(folder / "model.safetensors")
    names, base = list(tensors), "model" if "safetensors" in kind else "pytorch_model"
    halves = [names] if kind == "bin" else [names[::2], names[1::2]]
    ending, weight_map = "safetensors" if "safetensors" in kind else "bin", {}
    for i, half in enumerate(halves, 1):
        shard = f"{base}.{ending}" if len(halves) == 1 else f"{base}-0000{i}-of-00002.{ending}"
        part = {name: tensors[name] for name in half}
        torch.save(part, folder / shard) if ending == "bin" else write_safetensors(folder / shard, part)
        weight_map |= {name: shard for name in half}
    if len(halves) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{base}.{ending}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["bin", "sharded bin", "sharded safetensors"])
def test_every_layout_of_a_folder_is_the_same_model(folder, kind):
    path = folder("gqa")
    single = {name: t.clone() for name, t in load_llama(path)[0].state_dict().items()}
    split_into_shards(path, kind)
    model, _, _ = load_llama(path)
    loaded = model.state_dict()
    assert single.keys() == loaded.keys() and all(torch.equal(t, single[name]) for name, t in loaded.items())


def test_a_missing_shard_is_named(folder):
    path = folder("gqa")
    split_into_shards(path, "sharded bin")
    os.remove(path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(UserError, match="pytorch_model-00002-of-00002.bin"):
        load_llama(path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": None}])
def test_what_is_no_list_of_shards_is_refused_by_name(folder, index):
    path = folder("gqa")
    split_into_shards(path, "sharded bin")
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="pytorch_model.bin.index.json: not a list of shards"):
        load_llama(path)


def test_weights_are_the_memory_map_of_the_file_and_not_a_copy(folder, monkeypatch):
    mapped = {}
    monkeypatch.setattr(llm, "read_tensors", lambda path: mapped.update(read_tensors(path)) or dict(mapped))
    model, _, _ = load_llama(folder("mha"))
    places = {name: t.data_ptr() for name, t in mapped.items()}
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places


def test_tied_embeddings_are_one_parameter_also_after_a_move(folder):
    model, _, _ = load_llama(folder("llama3"))
    assert "lm_head.weight" not in read_tensors(os.path.join(FIXTURES, "llm_llama3"))
    assert model.config.tied and model.float().lm_head.weight is model.model.embed_tokens.weight


def test_an_output_head_in_the_file_counts_also_where_the_config_ties_it(folder):
    path, head = folder("llama3"), torch.randn(64, 32).bfloat16()
    edit_tensors(path, lambda tensors: tensors.update({"lm_head.weight": head}))
    model, _, _ = load_llama(path)
    assert torch.equal(model.lm_head.weight, head) and not torch.equal(model.model.embed_tokens.weight, head)


def test_a_llava_folder_gives_its_projector_and_tower_as_extra_and_drops_rotary_tables(folder):
    path = folder("mha")
    extra = {"model.mm_projector.weight": torch.randn(32, 16), "model.mm_projector.bias": torch.randn(32),
             "model.vision_tower.vision_model.post_layernorm.weight": torch.randn(16)}
    rotary = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.randn(4) for i in range(2)}
    edit_tensors(path, lambda tensors: tensors.update(extra | rotary))
    _, _, found = load_llama(path)
    assert found.keys() == extra.keys() and all(torch.equal(found[name], t) for name, t in extra.items())


def test_the_size_of_the_vocabulary_is_that_of_embed_tokens(folder):
    path = folder("mha")
    edit(path / "config.json", vocab_size=61)
    assert load_llama(path)[0].config.vocab_size == 64


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape, dtype=torch.bfloat16):
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize("change, message", [
    (drop("model.layers.1.mlp.up_proj.weight"), "1 missing.*model.layers.1.mlp.up_proj.weight"),
    (drop("lm_head.weight"), "1 missing.*lm_head.weight"), (drop("model.embed_tokens.weight"), "not a LLaMA"),
    (put("model.layers.0.self_attn.q_proj.bias", 32), "1 unexpected.*q_proj.bias"),
    (put("model.layers.0.self_attn.inv_freq", 4), "1 unexpected.*inv_freq"),
    (put("model.norm.weight", 31), r"model.norm.weight: \(31,\) \w+ in the file, \(32,\)"),
    (put("model.norm.weight", 32, dtype=torch.int64), "int64"),
    (put("model.layers.0.mlp.up_proj.qweight", 4, 48, dtype=torch.int32), "quantised by another.*int32"),
    (put("model.layers.0.mlp.up_proj.weight", 48, 32, dtype=torch.int8), "quantised by another.*int8"),
    (put("model.layers.0.mlp.up_proj.weight.absmax", 24, dtype=torch.uint8), "quantised by another.*uint8"),
    (put("model.embed_tokens.weight", 50, 32), "60 tokens .* but 50")])
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    path = folder("mha")
    edit_tensors(path, change)
    with pytest.raises(UserError, match=message):
        load_llama(path)


@pytest.mark.parametrize("changes, message", [
    (dict(hidden_size=None), "of another size"), (dict(hidden_size="wide"), "config.json"),
    (dict(hidden_act="gelu"), "gelu"), (dict(num_attention_heads=0), "does not fit"),
    (dict(num_hidden_layers=3), "3 layers, but its weights have 2"),
    (dict(num_key_value_heads=2), "of another size"),
    (dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "yarn"),
    (dict(rope_parameters="yarn"), "config.json")])
def test_a_config_that_does_not_fit_is_refused(folder, changes, message):
    path = folder("mha")
    edit(path / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_llama(path)


def test_that_weights_are_quantised_is_said_before_what_their_description_lacks(folder):
    path = folder("mha")
    edit_tensors(path, put("model.layers.0.mlp.up_proj.qweight", 4, 48, dtype=torch.int32))
    (path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="quantised by another program: take the release in fp16"):
        load_llama(path)


def test_an_adapter_in_the_place_of_a_model_is_called_that(folder):
    path = folder("mha")
    for file in ("model.safetensors", "config.json"):
        os.remove(path / file)
    adapter = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(8, 32)}
    write_safetensors(path / "adapter_model.safetensors", adapter)
    with pytest.raises(UserError, match="it looks like an adapter"):
        load_llama(path)
    os.rename(path / "adapter_model.safetensors", path / "model.safetensors")
    (path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="it looks like an adapter"):
        load_llama(path)


def test_norms_in_fp32_beside_fp16_are_read_and_said(folder):
    path = folder("mha")
    edit_tensors(path, lambda tensors: tensors.update(
        {name: t.float() if "norm" in name else t.half() for name, t in tensors.items()}))
    with pytest.warns(UserWarning, match="mha: of its tensors 16 in float16 and 5 in float32; all are"):
        model = load_llama(path)[0].half()
    assert torch.isfinite(model(torch.tensor([[1, 2]]))).all()


def test_null_in_a_config_is_the_default(folder):
    path = folder("mha")
    stated = json.loads((path / "config.json").read_text())
    keys = {"rope_theta", "rope_scaling", "rope_parameters", "head_dim", "num_key_value_heads", "hidden_act",
            "tie_word_embeddings", "sliding_window", "max_position_embeddings", "rms_norm_eps"}
    configs = []
    for nulls in ({}, dict.fromkeys(keys)):
        text = json.dumps({key: value for key, value in stated.items() if key not in keys} | nulls)
        (path / "config.json").write_text(text)
        configs.append(load_llama(path)[0].config)
    assert configs[0] == configs[1] and (configs[0].rope_theta, configs[0].norm_eps) == (1e4, 1e-6)


@pytest.mark.parametrize("name", ["gqa", "llama3", "linear"])
def test_saving_and_loading_gives_the_same_model(folder, tmp_path, name):
    model, tokenizer, _ = load_llama(folder(name))
    out, projector, ids = tmp_path / "saved", torch.randn(32, 16), torch.randint(60, (1, 40))
    save_llama(out, model, tmp_path / name / "tokenizer.model", {"model.mm_projector.weight": projector},
               dtype=torch.float32, config_extra={"mm_hidden_size": 16})
    again, tokenizer_again, extra = load_llama(out)
    assert torch.equal(model.float()(ids), again(ids))
    assert torch.equal(extra["model.mm_projector.weight"], projector)
    assert again.config == model.config and tokenizer_again.encode("the red") == tokenizer.encode("the red")
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["LlavaLlamaForCausalLM"], "llava")
    assert config["mm_hidden_size"] == 16
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "tokenizer.model"]


def test_saving_rounds_to_fp16_by_default_and_into_its_own_folder(folder):
    path = folder("mha")
    model, _, _ = load_llama(path)
    save_llama(path, model, path / "tokenizer.model")
    assert {t.dtype for t in read_tensors(path).values()} == {torch.float16}
    assert json.loads((path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_what_is_saved_beside_a_sharded_model_counts(folder):
    path = folder("mha")
    model, _, _ = load_llama(path)
    split_into_shards(path, "sharded safetensors")
    model.model.norm.weight.data.fill_(3)
    save_llama(path, model, path / "tokenizer.model")
    assert (load_llama(path)[0].model.norm.weight == 3).all()


# ---------------------------------------------------------------------------------------- Meta's folders
SLICED = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}   # its dimension
NAMES = {"embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn": "attention",
         "mlp": "feed_forward", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
         "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
         "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}


def pairs_from_halves(weight, d):
    """Our order of a head's rows -> Meta's: row i goes to 2i, row i + d/2 to 2i + 1."""
    order = torch.empty(len(weight), dtype=torch.int64)
    for row in range(len(weight)):
        head, i = divmod(row, d)
        order[head * d + (2 * i if i < d // 2 else 2 * (i - d // 2) + 1)] = row
    return weight[order]


def write_meta(folder, model, shards=1, embed_dim=1, tokenizer=None, **params):
    """Our model as Meta writes it: params.json, and consolidated.NN.pth with a slice of every matrix each."""
    c, files = model.config, [{} for _ in range(shards)]
    for name, t in model.state_dict().items():
        parts = [NAMES.get(part, part) for part in name.removeprefix("model.").split(".")]
        if parts[-2] in ("wq", "wk"):
            t = pairs_from_halves(t, c.head_dim)
        dim = SLICED.get(parts[-2], embed_dim if parts[-2] == "tok_embeddings" else None)
        for file, piece in zip(files, [t] * shards if dim is None else t.chunk(shards, dim), strict=True):
            file[".".join(parts)] = piece.clone()
    folder.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(files):
        torch.save({**file, "rope.freqs": torch.zeros(c.head_dim // 2)}, folder / f"consolidated.{i:02}.pth")
    params = {"dim": c.width, "n_layers": c.layers, "n_heads": c.heads, "n_kv_heads": c.kv_heads,
              "norm_eps": 1e-5, "vocab_size": -1, "multiple_of": 256, **params}
    params = {key: value for key, value in params.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(params))
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("shards, kv_heads, embed_dim", [
    (1, 4, 1), (1, 2, 1), (2, 4, 1), (2, 2, 0), (4, 4, 1), (4, 4, 0)])
def test_a_folder_of_meta_gives_the_logits_of_the_same_model(
        tmp_path, small_tokenizer, shards, kv_heads, embed_dim):
    source = tiny(kv_heads=kv_heads)
    path = write_meta(tmp_path / "meta", source, shards, embed_dim, small_tokenizer)
    model, tokenizer, extra = load_llama(path)
    ids = torch.randint(60, (2, 20))
    with torch.no_grad():
        assert torch.allclose(model(ids), source(ids), atol=1e-5)
    assert tokenizer.vocab_size == 60 and not extra and model.config.kv_heads == kv_heads


def test_turning_neighbouring_numbers_is_turning_halves_of_rows_in_another_order():
    """Meta's way, a pair as a complex number times exp(i angle): the same scores from weights as released."""
    torch.manual_seed(0)
    H, d, D, S = 3, 8, 16, 7
    config = LLaMAConfig(width=H * d, heads=H)
    x, wq, wk = torch.randn(S, D), torch.randn(H * d, D), torch.randn(H * d, D)
    turn = torch.polar(torch.ones(S, d // 2), torch.arange(S)[:, None] * llm.rope_frequencies(config, "cpu"))
    cos, sin = llm.rope_tables(config, torch.arange(S))

    def by_pairs(w):   # -> (H, S, d)
        pairs = torch.view_as_complex((x @ w.T).view(S, H, d // 2, 2))
        return torch.view_as_real(pairs * turn[:, None]).flatten(2).transpose(0, 1)

    def by_halves(w):
        states = (x @ llm.halves_from_pairs(w, d).T).view(1, S, H, d).transpose(1, 2)
        return llm.rotate(states, cos, sin)[0]
    assert torch.allclose(by_pairs(wq) @ by_pairs(wk).mT, by_halves(wq) @ by_halves(wk).mT, atol=1e-4)
    assert not torch.allclose(llm.halves_from_pairs(wq, d), wq)


def test_one_shard_of_meta_stays_a_memory_map_but_for_queries_and_keys(
        tmp_path, small_tokenizer, monkeypatch):
    path, mapped = write_meta(tmp_path / "meta", tiny(), tokenizer=small_tokenizer), []
    read_file = llm.read_file
    monkeypatch.setattr(llm, "read_file", lambda path: mapped.append(read_file(path)) or mapped[-1])
    model, _, _ = load_llama(path)
    places = {t.data_ptr() for t in mapped[0].values()}
    for name, p in model.named_parameters():
        assert (p.data_ptr() in places) != ("q_proj" in name or "k_proj" in name), name


META_TENSORS = {"model.embed_tokens.weight": torch.zeros(64, 1),
                "model.layers.0.mlp.gate_proj.weight": torch.zeros(48, 1)}


@pytest.mark.parametrize("params, context_length, factor", [
    (dict(norm_eps=1e-6, n_kv_heads=None), 2048, None), (dict(), 4096, None),
    (dict(rope_theta=5e5), 8192, None), (dict(rope_theta=5e5, use_scaled_rope=True), 131072, 8),
    (dict(rope_theta=1e6), 16384, None),
    (dict(dim=8192, n_heads=64, n_kv_heads=None), 2048, None),                          # the 65B of LLaMA 1
    (dict(dim=8192, n_heads=64, n_kv_heads=8), 4096, None),                             # the 70B of LLaMA 2
    (dict(dim=2048, n_heads=32, n_kv_heads=8, use_scaled_rope=True), 131072, 32),       # the 1B of LLaMA 3.2
    (dict(dim=3072, n_heads=24, n_kv_heads=8, use_scaled_rope=True), 131072, 32)])      # the 3B
def test_the_context_of_meta_models_is_told_from_what_params_json_says(params, context_length, factor):
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "norm_eps": 1e-5}
    c = llm.meta_config({**sizes, **params}, META_TENSORS)
    assert (c.context_length, (c.rope_scaling or {}).get("factor")) == (context_length, factor)
    assert (c.rope_theta, c.norm_eps) == (params.get("rope_theta", 1e4), params.get("norm_eps", 1e-5))


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_meta_folders_come_with_a_tokenizer_of_either_kind(tmp_path, small_tokenizer, kind):
    path = write_meta(tmp_path / "meta", tiny(vocab_size=600, kv_heads=4), tokenizer=small_tokenizer)
    if kind == "tiktoken":
        write_ranks(path / "tokenizer.model")
    kinds = {"tiktoken": llm.TiktokenTokenizer, "sentencepiece": llm.SentencePieceTokenizer}
    assert type(load_llama(path)[1]) is kinds[kind]


def test_the_tokenizer_of_llama_1_lies_one_folder_up(tmp_path, small_tokenizer):
    path = write_meta(tmp_path / "release" / "7B", tiny(), norm_eps=1e-6)
    with pytest.raises(UserError, match="7B/tokenizer.model"):
        load_llama(path)
    shutil.copy(small_tokenizer, tmp_path / "release" / "tokenizer.model")
    assert load_llama(path)[1].vocab_size == 60


def test_tokenizer_of_a_hugging_face_folder_is_not_looked_for_one_folder_up(folder, tmp_path):
    path = folder("mha")
    shutil.move(path / "tokenizer.model", tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="mha/tokenizer.model"):
        load_llama(path)


def rewrite(path, change):
    """Changes the tensors of a torch.save file."""
    tensors = torch.load(path)
    change(tensors)
    torch.save(tensors, path)


def change_shard(i, **tensors):
    return lambda path: rewrite(path / f"consolidated.0{i}.pth", lambda t: t.update(tensors))


@pytest.mark.parametrize("damage, message", [
    (lambda p: os.remove(p / "consolidated.01.pth"), "of another size"),
    (lambda p: [os.remove(file) for file in p.glob("*.pth")], "consolidated.00.pth: No such file"),
    (change_shard(0, norm__=torch.zeros(1)), "not a LLaMA .KeyError: 'norm__'"),
    (change_shard(1, **{"layers.0.attention.wo.weight": torch.zeros(7)}), "params.json: .*Tensors must have"),
    (lambda p: edit(p / "params.json", dim=None), "KeyError: 'dim'"),
    (lambda p: edit(p / "params.json", norm_eps=None), "KeyError: 'norm_eps'"),
    (lambda p: edit(p / "params.json", n_heads=5), "params.json: .*shape .* is invalid"),
    (lambda p: [rewrite(file, drop("tok_embeddings.weight")) for file in p.glob("*.pth")], "not a LLaMA")])
def test_a_folder_of_meta_that_is_not_whole_is_refused(tmp_path, small_tokenizer, damage, message):
    path = write_meta(tmp_path / "meta", tiny(kv_heads=4), 2, tokenizer=small_tokenizer)
    damage(path)
    with pytest.raises(UserError, match=message):
        load_llama(path)


def test_a_vision_llama_of_meta_is_refused_by_its_names(tmp_path, small_tokenizer):
    path = write_meta(tmp_path / "meta", tiny(), tokenizer=small_tokenizer)
    rewrite(path / "consolidated.00.pth", lambda t: t.update({"vision_model.conv.weight": torch.zeros(2, 2)}))
    with pytest.raises(UserError, match="1 unexpected"):
        load_llama(path)


@pytest.mark.parametrize("key, value", [
    ("residual_multiplier", 0.22), ("no_rope_layers", [1, 0]), ("sliding_window", 4096)])
def test_a_relative_that_computes_otherwise_is_refused(folder, key, value):
    path = folder("gqa")
    edit(path / "config.json", **{key: value})   # as a Granite's, a SmolLM3's, a Mistral's
    with pytest.raises(UserError, match=f"its {key} is .*, that of a LLaMA"):
        load_llama(path)


# ------------------------------------------------------------------------------------- a closed set of answers
def test_the_search_follows_what_is_likeliest_until_an_answer_is_whole():
    after = {(): {0: -0.5, 1: -1.0}, (0,): {9: -2.0, 2: -1.5}, (0, 2): {9: -0.2}, (1,): {9: -0.1}}
    asked = []
    found = llm.likeliest([(0, 9), (0, 2, 9), (1, 9)], lambda path: asked.append(path) or after[path])
    assert found == (2, pytest.approx(-1.1)) and asked == [(), (0,), (1,)]
    assert llm.likeliest([(0, 9), (1, 9)], lambda path: {0: -1.0, 1: -1.0, 9: 0.0})[0] == 0   # a tie: the first


def test_the_search_finds_what_scoring_all_finds():
    torch.manual_seed(0)
    for seed in range(5):
        model = llm.LLaMA(llm.LLaMAConfig(12, 16, 2, 2, mlp=16)).eval()
        torch.nn.init.normal_(model.lm_head.weight)
        rng = np.random.default_rng(seed)
        answers = [(*map(int, rng.integers(0, 11, rng.integers(1, 5))), 11) for _ in range(30)]
        embeds = torch.randn(1, 4, 16)
        scores = llm.log_likelihoods(model, embeds, answers)
        place, score = llm.closed_answer(model, embeds, answers)
        assert score == pytest.approx(max(scores), abs=1e-5) and scores[place] == pytest.approx(score, abs=1e-5)
