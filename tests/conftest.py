import json
import os
import sys

import pytest
import sentencepiece
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
torch.set_num_threads(1)   # small models: threads would only wait for each other

import chat  # noqa: E402
from clip import CLIP, CLIPConfig, Tokenizer, load_clip, save_clip  # noqa: E402
from llm import LLaMA, LLaMAConfig, save_llama  # noqa: E402
from model import Branch, branch_tensors  # noqa: E402
from plumbing import training  # noqa: E402
from small import CORPUS, write_branch, write_clip, write_llava, write_video  # noqa: E402
from toy import world as shapes  # noqa: E402
from toy.tiny_models import train_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with eight clips of the toy world, captions, questions, a small CLIP, a small LLaMA and a branch."""
    folder = tmp_path_factory.mktemp("world")
    clips = shapes.make_clips(4, 0, False)
    captions, talks, stills = [], [], []
    for i, clip in enumerate(clips):
        shapes.write_video(str(folder / f"{i}.mp4"), shapes.film(clip, 32))
        Image.fromarray(shapes.draw(clip, 0.5, 32)).save(folder / f"{i}.png")
        captions.append({"video": f"{i}.mp4", "caption": clip.caption})
        questions = shapes.temporal_questions(clip)[:2]
        talks.append(shapes.conversation(str(i), questions, video=f"{i}.mp4", kind="temporal"))
        stills.append(shapes.conversation(str(i), shapes.still_caption(clip, 0.5)[1][:2], image=f"{i}.png"))
    for name, rows in (("captions", captions), ("talks", talks), ("stills", stills)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    full = Tokenizer.from_file(os.path.join(ROOT, "assets", "bpe_simple_vocab_16e6.txt.gz"))
    tokenizer = Tokenizer([(full.symbols[a], full.symbols[b]) for a, b in full.merges][:200])
    clip = CLIP(CLIPConfig(image_size=32, patch_size=8, vision_width=32, vision_layers=3, vision_heads=2, vision_mlp=64, text_width=32,
                           text_layers=1, text_heads=2, text_mlp=64, vocab_size=tokenizer.vocab_size, projection_dim=16))
    save_clip(str(folder / "clip"), clip, tokenizer)
    words = train_tokenizer([turn["value"] for row in talks + stills for turn in row["conversations"]], 300)
    (folder / "tokenizer.model").write_bytes(words)
    torch.manual_seed(0)
    save_llama(str(folder / "llama"), LLaMA(LLaMAConfig(vocab_size=300, width=32, layers=2, heads=2, mlp=64, context_length=512)),
               str(folder / "tokenizer.model"))
    training.save_checkpoint(folder / "branch.pth", {"state_dict": branch_tensors(Branch.beside(load_clip(str(folder / "clip"))[0], 2), "backbone.")})
    return folder


@pytest.fixture(scope="session", autouse=True)
def nothing_is_kept_at_home(tmp_path_factory):
    """The cache and the history of chat.py, here and in processes that tests start, are in a folder of the tests."""
    for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        os.environ[variable] = str(tmp_path_factory.mktemp(variable.lower()))


# ---------------------------------------------------------------------------------------------------- for chats
@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(path).removesuffix(".model"), vocab_size=60, minloglevel=2,
        model_type="bpe", remove_extra_whitespaces=False, normalization_rule_name="identity")
    return str(path)


@pytest.fixture(scope="session")
def weights(tmp_path_factory, tokenizer_model):
    """A folder of weights in the layout of the released ones: random, and small."""
    folder = tmp_path_factory.mktemp("weights")
    write_clip(folder / "clip")
    write_llava(folder / "llava", tokenizer_model)
    write_branch(folder / "branch.pth")
    return str(folder)


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "bar.mp4")


@pytest.fixture
def session(weights, video):
    return chat.begin(chat.Config(video, weights=weights, max_new_tokens=12))
