#!/usr/bin/env bash
# The toy world from nothing on a 2-core CPU: clips, a tiny CLIP, the branch, a tiny LLaVA, video chat, and the tables.
# Every stage can be run alone and goes on where it was stopped. Set PYTHON to use another interpreter than `python`.
#
#   bash runs/tiny.sh                 all of it, into weights/tiny
#   bash runs/tiny.sh out/my_tiny     the same, into another folder
set -euo pipefail
cd "$(dirname "$0")/.."
W=${1:-weights/tiny} D=out/shapes R=out/tiny PYTHON=${PYTHON:-python}
export OMP_WAIT_POLICY=PASSIVE   # the loader's process needs a core too: waiting threads should sleep
mkdir -p "$W" "$R"
train() { $PYTHON "$1" --clip "$W/clip" --root $D "${@:2}"; }

# The world and its CLIP.
[ -e $D/test_talks.jsonl ] || $PYTHON shapes.py render --data $D
[ -e $R/clip/config.json ] || $PYTHON shapes.py clip --data $D --out $R
mkdir -p "$W/clip" && cp $R/clip/* "$W/clip/"

# Stage 1: the branch. Twins share a batch, so that captions differ in nothing but the order of events.
train pretrain.py --annotations $D/train_captions.jsonl --out $R/branch --lr 1e-5 --anneal --batch_size 64 --together 2 \
    --steps 800 --min_area 0.8 --eval_annotations $D/watch_captions.jsonl --eval_every 250
cp $R/branch/branch.pth "$W/branch.pth"

# A LLaVA that has only seen pictures.
[ -e $R/llama/config.json ] || $PYTHON shapes.py llama --data $D --out $R
train chat_tune.py --stage projector --tokens mean --num_frames 1 --llm $R/llama --annotations $D/train_stills.jsonl \
    --out $R/projector --batch_size 32 --steps 500 --lr 2e-3
train chat_tune.py --stage language --tokens mean --num_frames 1 --llm $R/projector/llava --annotations $D/train_stills.jsonl \
    --eval_annotations $D/test_stills.jsonl --out $R/language --batch_size 32 --steps 500 --lr 3e-4
mkdir -p "$W/llava" && cp $R/language/llava/* "$W/llava/"

# Stage 2: tuning on questions about time, the LLaMA frozen, with three kinds of video tokens.
for tokens in mean st_pool branch; do
    train chat_tune.py --stage video --tokens $tokens --num_frames 8 --llm "$W/llava" --branch "$W/branch.pth" \
        --annotations $D/train_talks.jsonl --eval_annotations $D/test_talks.jsonl --out $R/chat_$tokens \
        --batch_size 16 --steps 1000 --lr 1e-3
done
cp $R/chat_branch/chat.bin "$W/chat.bin"

# The tables: the branch plugged into the image model with no video tuning, then twins and retrieval.
train chat_tune.py --stage video --eval_only --num_frames 8 --llm "$W/llava" --branch "$W/branch.pth" \
    --annotations $D/train_talks.jsonl --eval_annotations $D/test_talks.jsonl --out $R/zero_shot
$PYTHON shapes.py score --data $D --out "$W" --branches "$W/branch.pth"
