import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ["CUDA_VISIBLE_DEVICES"] = ""   # to the bit, and in fp32: `python -m bench gpu` is a GPU's test
sys.path.insert(0, ROOT)
torch.set_num_threads(1)   # small models: threads would only wait for each other

import chat  # noqa: E402
from clip import Tokenizer  # noqa: E402
from llm import LLaMA, LLaMAConfig, save_llama  # noqa: E402
from small import write_branch, write_clip, write_llava, write_video  # noqa: E402
from toy import language
from toy import world as shapes  # noqa: E402
from toy.tiny_models import train_tokenizer  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def nothing_is_kept_at_home(tmp_path_factory):
    """chat.py keeps its cache and its history in folders of the tests, also in processes that tests start."""
    for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        os.environ[variable] = str(tmp_path_factory.mktemp(variable.lower()))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder: eight clips of the toy world, captions, questions, a small CLIP, a small LLaMA, a branch."""
    folder = tmp_path_factory.mktemp("world")
    captions, talks, stills = [], [], []
    for i, clip in enumerate(shapes.make_clips(4, 0, False)):
        shapes.write_video(str(folder / f"{i}.mp4"), shapes.film(clip, 32))
        Image.fromarray(shapes.draw(clip, 0.5, 32)).save(folder / f"{i}.png")
        captions.append({"video": f"{i}.mp4", "caption": clip.caption})
        asked = language.ask(language.moves(clip), clip, 2, np.random.default_rng(i))
        talks.append(language.conversation(str(i), asked, video=f"{i}.mp4", kind="temporal"))
        asked = language.ask(language.still_caption(clip, 0.5)[1], clip, 2, np.random.default_rng(i))
        stills.append(language.conversation(str(i), asked, image=f"{i}.png"))
    for name, rows in (("captions", captions), ("talks", talks), ("stills", stills)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    full = Tokenizer.from_file(os.path.join(ROOT, "assets", "bpe_simple_vocab_16e6.txt.gz"))
    tokenizer = Tokenizer([(full.symbols[a], full.symbols[b]) for a, b in full.merges][:200])
    write_clip(folder / "clip", tokenizer, patch_size=8, text_width=32, text_mlp=64, context_length=77)
    write_branch(folder / "branch.pth")
    words = train_tokenizer([turn["value"] for row in talks + stills for turn in row["conversations"]], 340)
    (folder / "tokenizer.model").write_bytes(words)
    torch.manual_seed(0)
    llama = LLaMA(LLaMAConfig(vocab_size=340, width=32, layers=2, heads=2, mlp=64, context_length=512))
    save_llama(str(folder / "llama"), llama, str(folder / "tokenizer.model"))
    return folder


# ------------------------------------------------------------------------------------------- for chats
@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory):
    corpus = ["USER: which way does the red circle move? ASSISTANT: left, then up.",
              "what goes right? a blue square."] * 20
    path = tmp_path_factory.mktemp("words") / "tokenizer.model"
    path.write_bytes(train_tokenizer(corpus, 316))
    return str(path)


@pytest.fixture(scope="session")
def weights(tmp_path_factory, tokenizer_model):
    """A folder of weights in the layout of the released ones: random, and small."""
    folder = tmp_path_factory.mktemp("weights")
    write_clip(folder / "clip")
    write_branch(folder / "branch.pth")
    write_llava(folder / "llava", tokenizer_model)
    return str(folder)


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "bar.mp4")


@pytest.fixture
def begin(weights, video):
    """begin(fields of chat.Config...) -> chat.Session, about that video and with these weights."""
    defaults = {"video": video, "weights": weights, "max_new_tokens": 12}
    return lambda **fields: chat.begin(chat.Config(**{**defaults, **fields}))


@pytest.fixture
def session(begin):
    return begin()
