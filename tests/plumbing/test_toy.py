"""The toy world keeps its promises: twins, held-out combinations, words that say what the pictures show."""
import copy
import dataclasses
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model
from films import stacked
from llm import LoRALinear, add_lora
from model import IGNORE_INDEX, VIDEO_INDEX, VideoTokens, open_chat, prompt_ids
from plumbing import cli
from toy import __main__ as toy
from toy import clock, language, needle, scenes, score, stories, world

TINY = os.path.join(os.path.dirname(model.__file__), "weights", "tiny")


def test_twins_are_the_same_pictures_backwards_to_the_bit(tmp_path):
    for motion in list(world.TURNS)[::2]:
        clip = next(c for c in world.make_clips(0, 0, True) if c.motion == motion)
        for name, c in (("a", clip), ("b", clip.twin)):
            world.write_video(str(tmp_path / f"{name}.mp4"), world.film(c))
        forwards, backwards = (stacked(data.sample_frames(str(tmp_path / f"{name}.mp4"), 8, "uniform"))[0]
                               for name in "ab")
        assert torch.equal(forwards, backwards.flip(0)), motion
        assert len(torch.unique(forwards, dim=0)) > 1, motion


def test_a_twin_has_a_caption_of_its_own_and_the_first_clip_as_its_twin():
    for clip in world.make_clips(0, 0, True):
        assert clip.twin.twin == clip and clip.twin.caption != clip.caption


def test_training_and_test_share_no_combination_of_colour_shape_and_motion():
    train, test = ({(c.colour, c.shape, c.motion) for c in world.make_clips(n, 0, held_out)}
                   for n, held_out in ((4000, False), (0, True)))
    assert not train & test
    assert {motion for *_, motion in test} == {motion for *_, motion in train} == set(world.TURNS)
    assert {combo[:2] for combo in test} <= {combo[:2] for combo in train}


def test_the_sample_clips_are_of_the_test_world():
    assert {world.SAMPLE.caption, *(clip.caption for clip in stories.SAMPLE.events)} <= {
        clip.caption for clip in world.make_clips(0, 0, True)}


def test_the_test_world_has_at_least_500_pairs_and_no_caption_twice():
    clips = world.make_clips(0, 0, True)
    assert len(clips) >= 1000 and len({c.caption for c in clips}) == len(clips)


def test_the_world_follows_from_its_seed():
    assert world.make_clips(20, 3, False) == world.make_clips(20, 3, False) != world.make_clips(20, 4, False)


def centre(picture):
    ys, xs = np.nonzero(np.ptp(picture.astype(int), axis=2) > 30)
    return xs.mean(), ys.mean(), len(xs)


@pytest.mark.parametrize("motion, what", [
    ("moves left", lambda a, b: a[0] - b[0]), ("moves right", lambda a, b: b[0] - a[0]),
    ("moves up", lambda a, b: a[1] - b[1]), ("moves down", lambda a, b: b[1] - a[1]),
    ("gets big", lambda a, b: (b[2] - a[2]) / 20), ("gets small", lambda a, b: (a[2] - b[2]) / 20)])
def test_pictures_do_what_the_caption_says(motion, what):
    clip = next(c for c in world.make_clips(0, 0, True) if c.motion == motion and c.colour == "red")
    assert what(centre(world.draw(clip, 0.02)), centre(world.draw(clip, 0.98))) > 10


def test_clockwise_is_clockwise():
    clip = world.Clip("red", "arrow", "spins clockwise", "in the middle", "", (0.5,) * 6)
    (x0, y0), (x1, y1) = (world.outline("arrow", clip.at(share)[3])[0] for share in (0.02, 0.98))   # the tip
    assert x0 < -0.5 and x1 > 0.5 and y0 < 0 and y1 < 0   # over the top; y points down


def rng():
    return np.random.default_rng(0)


def test_twins_are_asked_the_same_questions_in_the_test_world(tmp_path):
    language.annotate(str(tmp_path), 4, 0)
    rows = [json.loads(line) for line in (tmp_path / "test_talks.jsonl").read_text().splitlines()]
    kinds = ["static", "temporal", "other words", "nothing of it"]
    asked = [(row["kind"], row["conversations"][0]["value"]) for row in rows]
    answers = [row["conversations"][1]["value"] for row in rows]
    for i in range(0, len(rows), 8):   # four questions of a clip, then the same of its twin
        assert asked[i:i + 4] == asked[i + 4:i + 8] and [kind for kind, _ in asked[i:i + 4]] == kinds
        assert answers[i] == answers[i + 4] and answers[i + 1] != answers[i + 5]
        assert answers[i + 3] == language.NOTHING
    choices = [json.loads(line) for line in (tmp_path / "test_options.jsonl").read_text().splitlines()]
    for one, other in zip(choices[::2], choices[1::2], strict=True):   # blind to order, one has half of them
        assert one["options"] == other["options"] and len(set(one["options"])) == 4
        assert one["answer"] != other["answer"] and {one["answer"], other["answer"]} < set(one["options"])


def test_twins_have_the_same_static_facts_and_other_temporal_ones():
    for clip in world.make_clips(0, 0, True)[::2]:
        assert language.looks(clip) == language.looks(clip.twin)
        ours, theirs = language.moves(clip), language.moves(clip.twin)
        assert ours.keys() == theirs.keys(), clip.caption
        assert all(ours[topic] != theirs[topic] for topic in ours), clip.caption


def test_every_fact_can_be_asked_for_in_about_twenty_ways_and_some_are_kept_from_training():
    clips = world.make_clips(0, 0, True)
    topics = {topic for clip in clips for topic in language.looks(clip) | language.moves(clip)}
    for topic in topics:
        trained, kept = language.ways()[topic]
        assert kept and not set(trained) & set(kept)
        assert len(trained) >= 20


def test_fifty_questions_about_something_else_are_kept_from_training():
    kept = language.ways()["nothing of it"][1]
    clips, random = world.make_clips(40, 0, False), rng()
    trained = {q for _ in range(3000) for q, _ in language.talk(clips, random)[1]}
    assert len(set(kept)) == 50 and not trained & set(kept)


def test_whether_it_is_red_is_answered_by_what_it_is():
    random = rng()
    turns = [language.put("colour", world.SAMPLE, "It is orange.", random) for _ in range(300)]
    assert {answer for _, answer in turns} == {"It is orange."}
    named = {colour for question, _ in turns for colour in world.COLOURS if colour in question.lower()}
    assert named == {*world.COLOURS}   # the question does not tell the answer


def test_of_rows_that_are_exchanged_only_the_last_answer_is_learned():
    clips, random = world.make_clips(40, 0, False), rng()
    talks = [language.talk(clips, random) for _ in range(300)]
    exchanged = [(text, turns) for text, turns, learned in talks if learned < len(turns)]
    assert exchanged
    for text, turns in exchanged:
        for question, _ in turns[:-1]:   # names a shape or a colour that the text does not have
            asked = {*re.findall("[a-z]+", question.lower())} & {*world.SHAPES, *world.COLOURS}
            assert asked - {*text.split()}


def test_stills_say_nothing_about_motion():
    words = {"moves", "gets", "spins", "blinks", "then"}
    for clip in world.make_clips(0, 0, True):
        for share in (0.1, 0.5, 0.9):
            caption, facts = language.still_caption(clip, share)
            assert not words & set(" ".join([caption, *facts.values()]).split())


def test_twin_accuracy_of_equal_embeddings_is_one_half():
    text = torch.nn.functional.normalize(torch.randn(8, 5), dim=1)
    video = torch.nn.functional.normalize(torch.randn(4, 5), dim=1).repeat_interleave(2, dim=0)
    assert score.twin_accuracy(video, text).mean() == 0.5
    assert score.twin_accuracy(text, text).mean() == 1.0


def test_the_picture_shows_a_clip_and_its_twin(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    tiny = os.path.join(os.path.dirname(toy.__file__), "..", "weights", "tiny")
    cfg = toy.Config("picture", out=tiny, branches=os.path.join(tiny, "branch.pth"))
    monkeypatch.chdir(tmp_path)
    toy.main(cfg)
    with Image.open(tmp_path / "docs" / "twins.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert picture.width == 900 and {(26, 127, 55), (214, 39, 40)} <= colours   # a right and a wrong choice


# -------------------------------------------------------------------------------- stories
def test_answers_of_three_kinds_of_tokens_stand_side_by_side(world, tmp_path, capsys):
    """`world` here is the fixture: eight clips and their talks. The chat of all three is the shipped one."""
    for kind in ("branch", "mean", "st_pool"):
        (tmp_path / f"chat_{kind}").mkdir()
        os.symlink(os.path.join(TINY, "chat.bin"), tmp_path / f"chat_{kind}" / "chat.bin")
    (world / "test_talks.jsonl").write_text((world / "talks.jsonl").read_text())
    score.answers(toy.Config("answers", data=str(world), out=TINY, chats=str(tmp_path)))
    head, _, row = capsys.readouterr().out.strip().splitlines()
    _, file, question, *said, right, _ = row.split("|")
    assert head == "| clip | question | branch | mean | st_pool | right |" and file == " 0.mp4 "
    talk = json.loads((world / "talks.jsonl").read_text().splitlines()[0])["conversations"]
    assert right.strip() == talk[1]["value"] and len(said) == 3
    assert all((answer.strip() == right.strip()) != answer.startswith(" *") for answer in said)


def test_a_story_of_the_test_world_has_only_what_never_occurs_in_training():
    train, test = ({(c.colour, c.shape, c.motion) for story in stories.make_stories(split, 0)
                    for c in story.events} for split in ("train", "test"))
    assert not train & test and {motion for *_, motion in test} == {motion for *_, motion in train}


def test_events_of_a_story_take_8_to_40_percent_of_it_with_gaps_between_them():
    counts = {True: set(), False: set()}   # of events, where all look alike and where none do
    for story in stories.make_stories("test", 0):
        edges = [0, *np.ravel(story.spans), 1]
        lengths, gaps = np.diff(edges)[1::2], np.diff(edges)[::2]
        assert 0.08 <= lengths.min() + 1e-3 and lengths.max() <= 0.401 and gaps.min() > 0.0199
        looks, said = {(c.colour, c.shape) for c in story.events}, set(story.said)
        assert len(looks) in (1, len(story.events)) and len(said) == len(story.events)
        counts[len(looks) == 1].add(len(story.events))
    assert counts == {True: {2, 3, 4}, False: {2, 3, 4}}   # the number does not tell which kind it is


def test_a_story_as_a_file_shows_each_event_within_its_span_alone(tmp_path):
    story = stories.make_stories("test", 0)[1]
    stories.render_story((story, str(tmp_path / "a.mp4")))
    times = [share * story.duration for share in np.linspace(0, 0.999, 100)]
    for t, (_, picture) in zip(times, data.frames(str(tmp_path / "a.mp4"), times)):
        shows = np.ptp(picture.numpy().astype(int), axis=0).max() > 60   # a colour on the grey ground
        away = min(abs(t / story.duration - edge) for edge in np.ravel(story.spans))
        if away > 1 / stories.FRAMES:
            assert shows == any(a <= t / story.duration < b for a, b in story.spans)


@pytest.fixture(scope="module")
def beginner():
    """The shipped LLaVA with an untrained projector of frame_cls, and two stories of random features."""
    opened = model.open_chat(os.path.join(os.path.dirname(world.ASSETS), "weights", "tiny"))
    torch.manual_seed(0)
    tokens = model.FrameCLS(torch.nn.Linear(128, 128))
    chat = model.VideoChat(opened.chat.clip, tokens, opened.chat.llm, opened.chat.tokenizer).float().eval()
    told = [(["a red star moves left", "a blue bar moves up then left"], [(0.1, 0.3), (0.5, 0.85)]),
            (["a red star moves left"], [(0.2, 0.4)])]
    return chat, [(said, spans, torch.randn(100, 128)) for said, spans in told]


@torch.no_grad()
def test_each_question_of_a_row_is_answered_as_if_it_were_alone(beginner):
    chat, told = beginner
    batch = clock.assemble(chat, told, np.random.default_rng(2))
    states = clock.states_of(chat.llm, batch)
    logits = chat.llm.lm_head(chat.llm.model.norm(states[-1]))
    rng, compared = np.random.default_rng(2), 0
    for row, (said, spans, seen) in enumerate(told):
        at = batch.first + 100
        for question, answer, *_ in clock.questions(said, spans, rng):
            ids, _ = model.prompt_ids(chat.tokenizer, [(question, answer)], "vtimellm")
            alone = chat.llm(embeds=chat.splice(ids, chat.video_tokens(seen))[None])[0, batch.first + 100:]
            torch.testing.assert_close(logits[row, at:at + len(alone)], alone, atol=1e-4, rtol=1e-4)
            at, compared = at + len(alone), compared + 1
    assert compared == 3


@torch.no_grad()
def test_the_aid_that_points_sees_the_attention_that_the_model_has(beginner, monkeypatch):
    chat, told = beginner
    batch = clock.assemble(chat, told, np.random.default_rng(2))
    states = clock.states_of(chat.llm, batch)
    block, given = chat.llm.model.layers[-1], {}
    attention = torch.nn.functional.scaled_dot_product_attention

    def keep(q, k, v, mask, **options):
        given["weights"] = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -math.inf).softmax(-1)
        return attention(q, k, v, mask, **options)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", keep)
    block(states[-2], batch.cos, batch.sin, batch.mask, None)
    rows, _, places, _ = map(list, zip(*batch.starts))
    frames = torch.rand(len(rows), 100) < 0.3
    marks = [(*mark[:3], some) for mark, some in zip(batch.starts, frames)]
    share = clock.attention_on(block, states[-2], batch, marks).exp()
    video = given["weights"][rows, :, places][..., batch.video]
    torch.testing.assert_close(share, (video * frames[:, None]).sum(-1))


def test_aids_are_about_the_tokens_that_write_digits_and_words(beginner):
    chat, told = beginner
    seen = set()
    for seed in range(12):   # some list all events, some ask for words
        batch = clock.assemble(chat, told, np.random.default_rng(seed))
        for edge, marks in enumerate((batch.starts, batch.ends)):
            for row, event, at, frames in marks:
                spans = [*told[row][1], (1.0, 1.0)]
                span = spans[event] if edge == 0 else (spans[event][1], spans[event + 1][0])
                assert torch.equal(frames, clock.within(span))
                wanted = f"{min(round(100 * told[row][1][event][edge]), 99):02d}"
                assert chat.tokenizer.decode(batch.target[row, at:at + 2].tolist()) == wanted
        for row, event in {mark[:2] for mark in batch.words}:
            places = [at for *where, at, _ in batch.words if (row, event) == tuple(where)]
            written = chat.tokenizer.decode(batch.target[row, places].tolist())
            alone, listed = language.sentence(told[row][0][event]), f", {told[row][0][event]}."
            assert written in (alone, listed)
            seen.add(written == alone)
    assert seen == {True, False}


def test_a_story_told_anew_has_the_same_events_at_its_new_times():
    said, spans, seen = ["a", "b"], [(0.1, 0.3), (0.5, 0.85)], torch.zeros(100, 1)
    for i, span in enumerate(spans):
        seen[clock.within(span)] = i + 1.0
    new_said, new_spans, new = clock.told_anew(said, spans, seen, np.random.default_rng(0))
    for text, span in zip(new_said, new_spans):
        assert new[clock.within(span)].unique().tolist() == [said.index(text) + 1.0]
    assert (new == 0).sum() == sum(~clock.within(new_spans[0]) & ~clock.within(new_spans[1]))


# -------------------------------------------------------------------------------- long videos
@pytest.fixture(scope="module")
def long_world(tmp_path_factory):
    """A folder with captions of both splits and twenty clips of each as files; long videos of few clips."""
    folder = tmp_path_factory.mktemp("long")
    for split in ("train", "test"):
        clips = world.make_clips(10, 0, split == "test")
        clips = clips[::len(clips) // 20][:20]   # of all colours
        (folder / split).mkdir()
        for i, clip in enumerate(clips):
            world.write_video(str(folder / split / f"{i // 2:05d}{'ab'[i % 2]}.mp4"), world.film(clip))
        text = "".join(json.dumps(dataclasses.asdict(clip)) + "\n" for clip in clips)
        (folder / f"{split}_captions.jsonl").write_text(text)
    return folder


def test_the_scene_that_is_asked_about_is_the_only_one_with_its_look_and_the_answer_is_true(long_world):
    drawn = scenes.Scenes(long_world, "train")
    for i in range(60):
        kind, rng = scenes.KINDS[i % 4], np.random.default_rng(i)
        chosen, (question, answer) = drawn.draw(kind, 8, rng, ["red", "green", "blue", "white"])
        clips = [drawn.clips[j] for j in chosen]
        of = drawn.looks[kind.split(" by ")[1]][chosen]
        words = {*re.findall(r"\w+", question.lower())}
        named = [clip for clip, said in zip(clips, of) if {*said.split()} <= words]
        assert len(clips) == 8 and len(named) >= 1
        asked, = {clip.caption: clip for clip in named if answer == f"It is {clip.colour}."
                  or answer == f"It {clip.motion}."}.values()
        assert asked.colour in ("red", "green", "blue", "white")
        assert (of == of[clips.index(asked)]).sum() == 1


def test_questions_for_a_training_come_with_videos_of_one_length_a_step_and_short_ones_first(long_world):
    scenes.write(scenes.Config("write", data=str(long_world), steps=40, questions=32))
    train, test, turns = (data.ConversationDataset(str(long_world / f"{name}.jsonl"), long_world, 8, 64)
                          for name in ("train_scenes", "test_scenes", "train_turns"))
    lengths = [{len(talk.files) for talk in train.talks[i:i + 16]} for i in range(0, 640, 16)]
    assert all(len(some) == 1 for some in lengths) and lengths[:6] == [{2}] * 6 and {16} in lengths
    assert [(len(talk.files), len(talk.turns)) for talk in turns.talks] == [(8, 2), (8, 1)] * 80
    assert len(test) == 4 * 4 * 32 and test.talks[0].kind == "colour by shape,  1 scenes"
    assert test[32 * 4][0].shape == (4 * 8, 3, 64, 64)   # the first of four scenes


def test_a_file_of_copied_packets_shows_what_its_clips_show(long_world):
    """So LinVT sees the same units in it as in a list of clips."""
    files = [str(long_world / file) for file in scenes.Scenes(long_world, "test").files[:5]]
    world.join(files, str(long_world / "long.mp4"))
    assert data.probe(str(long_world / "long.mp4")).duration == pytest.approx(10)
    whole, _ = stacked(data.sample_frames(str(long_world / "long.mp4"), 40, "uniform"))
    parts = [stacked(data.sample_frames(file, 8, "uniform"))[0] for file in files]
    assert torch.equal(whole, torch.cat(parts))


def test_answers_about_the_shipped_minute_stand_beside_what_it_shows(tmp_path, capsys):
    rows = [json.dumps(dataclasses.asdict(clip)) + "\n" for clip in world.make_clips(0, 0, held_out=True)]
    (tmp_path / "test_captions.jsonl").write_text("".join(rows))
    scenes.answers(scenes.Config("answers", data=str(tmp_path), weights=cli.shipped("weights/tiny")))
    _, _, *found = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines()]
    assert [row[0] for row in found] == [f"{at} to {at + 2} s" for at in range(0, 64, 8)]
    assert sum(row[3] == row[4] for row in found) >= 4 and all(row[2] != row[4] for row in found)


def test_a_row_of_the_table_is_about_the_llama_that_it_names_and_a_reader_learns_alone(long_world, tmp_path):
    cfg = scenes.Config("table", data=str(long_world), out=str(tmp_path), steps=2, questions=32)
    test, kind, pool = scenes.World(cfg, "test", cli.shipped("weights/tiny")), scenes.KINDS[0], scenes.POOLS["all tokens"]
    tokens, other = VideoTokens(test.projector), copy.deepcopy(test.llm)
    other.lm_head.weight.data.zero_()
    assert [test.right(tokens, 1, kind, pool, llm=llm) > 50 for llm in (None, other, None)] == [True, False, True]
    before = {name: p.clone() for name, p in test.llm.state_dict().items()}
    reader = add_lora(copy.deepcopy(test.llm), 4, 8)
    loras = torch.nn.ModuleList(m for name, m in reader.named_modules() if name.endswith(("lora_A", "lora_B")))
    test.train(tokens, loras, 0, pool, llm=reader, lr=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in test.llm.state_dict().items())
    assert all(m.lora_B.weight.any() for m in reader.modules() if isinstance(m, LoRALinear))


def test_two_questions_are_about_two_scenes_and_a_moved_video_stands_before_the_last_answer(long_world):
    drawn, tokenizer = scenes.Scenes(long_world, "train"), open_chat(cli.shipped("weights/tiny")).chat.tokenizer
    for i in range(10):
        chosen, *turns = drawn.draw_two(8, np.random.default_rng(i))
        assert len(chosen) == 8 and len(turns) == 2 and turns[0] != turns[1]
        ids, labels = prompt_ids(tokenizer, turns, learned=1)
        new, new_labels = scenes.moved(tokenizer, ids, labels)
        at = new.index(VIDEO_INDEX)
        assert [i for i in new if i != VIDEO_INDEX] == [i for i in ids if i != VIDEO_INDEX]
        assert tokenizer.decode(new[at + 1:]).strip().removesuffix("</s>") == f"ASSISTANT: {turns[1][1]}"
        assert [i for i in new_labels if i != IGNORE_INDEX] == [i for i in labels if i != IGNORE_INDEX]


def test_needles_are_looked_for_by_four_kinds_of_rows_in_colours_seen_and_never_seen(monkeypatch, capsys):
    for name in ("SEEDS", "READING", "STEPS"):
        monkeypatch.setattr(needle, name, 1)
    toy.main(toy.Config("needle"))
    _, _, *rows = capsys.readouterr().out.strip().splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[1] for row in cells] == ["seen", "never seen"] * 4
    assert all(0 <= float(share) <= 100 for row in cells for share in row[2:])


@pytest.mark.parametrize("stage, folder", [("render", ""), ("stories", ""), ("clip", "clip"),
                                           ("llama", "llama")])
def test_no_file_that_others_made_is_written_over(tmp_path, stage, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "model.safetensors").write_text("mine")
    with pytest.raises(cli.UserError, match="other files than those of a run"):
        toy.main(toy.Config(stage, data=str(tmp_path), stories=str(tmp_path), out=str(tmp_path)))
