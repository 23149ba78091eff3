#!/usr/bin/env bash
# The toy world from nothing on a 2-core CPU, in about 70 minutes: clips, a tiny CLIP, the branch, a tiny
# LLaVA, video chat, and the tables; docs/numbers.md has what to expect. Models this small take a thread each.
# Every stage can be run alone and goes on where it was stopped, but for clip and llama, which begin again.
# PYTHON: another interpreter than `python`.
#
#   bash runs/tiny.sh                      all of it, into weights/tiny
#   bash runs/tiny.sh out/my_tiny          the same, into another folder
#   SEEDS="0 1 2" bash runs/tiny.sh        three branches instead of one, for the spread; half an hour more
set -euo pipefail
cd "$(dirname "$0")/.."
W=${1:-weights/tiny} D=out/shapes R=out/tiny PYTHON=${PYTHON:-python}
train() { $PYTHON "$1" --clip $R/clip --root $D "${@:2}"; }

# The world, 2 minutes. A LLaMA that can read, 20; beside it a CLIP that knows the world from stills, 10.
[ -e $D/watch_captions.jsonl ] || $PYTHON -m toy render --data $D
learn_to_read() {
    $PYTHON -m toy llama --out $R
}
[ -e $R/llama/config.json ] || learn_to_read & reading=$!
[ -e $R/clip/model.safetensors ] || $PYTHON -m toy clip --data $D --out $R

# Stage 1: the branch, 15 minutes. Twins share a batch: captions differ in nothing but the order of events.
# R@1 on clips to watch goes beyond the 50 % that a model blind to order can have.
branches=""
for seed in ${SEEDS:-0}; do
    train pretrain.py --annotations $D/train_captions.jsonl --eval_annotations $D/watch_captions.jsonl \
        --eval_every 200 --out $R/branch_seed$seed --seed $seed \
        --lr 1e-5 --anneal --batch_size 64 --together 2 --steps 800 --min_area 0.8
    branches=$branches,$R/branch_seed$seed/branch.pth
done
branch=$R/branch_seed0/branch.pth

# A LLaVA that has only seen pictures, 6 minutes: the LLaMA's projector, then both.
# Three in four questions about held-out stills are answered word for word.
wait $reading
train chat_tune.py --stage projector --tokens mean --num_frames 1 --llm $R/llama \
    --annotations $D/train_stills.jsonl --out $R/projector --batch_size 32 --steps 500 --lr 2e-3
train chat_tune.py --stage language --tokens mean --num_frames 1 --llm $R/projector/llava \
    --annotations $D/train_stills.jsonl --eval_annotations $D/test_stills.jsonl --out $R/language \
    --batch_size 32 --steps 200 --lr 1e-4

# Stage 2, 25 minutes: tuning on questions about time, the LLaMA frozen, with three kinds of video tokens.
# Right about time: nearly 9 in 10 with the branch, 2 in 10 with the mean frame.
for tokens in branch mean st_pool; do
    train chat_tune.py --stage video --tokens $tokens --num_frames 8 \
        --llm $R/language/llava --branch $branch \
        --annotations $D/train_talks.jsonl --eval_annotations $D/test_talks.jsonl --out $R/chat_$tokens \
        --batch_size 16 --steps 1000 --lr 1e-3
done

# The result, and the tables: the branch plugged into the image model with no video tuning, then twins.
mkdir -p "$W/clip" "$W/llava"
cp $R/clip/* "$W/clip/" && cp $R/language/llava/* "$W/llava/" && cp $branch "$W/branch.pth"
cp $R/chat_branch/chat.bin "$W/chat.bin"
train chat_tune.py --stage video --eval_only --num_frames 8 --llm $R/language/llava --branch $branch \
    --annotations $D/train_talks.jsonl --eval_annotations $D/test_talks.jsonl --out $R/zero_shot
$PYTHON -m toy score --data $D --out $R --branches "${branches#,}"

# Is the answer right, beside black frames and guesses? And the questions about time with four options.
for tokens in branch mean st_pool; do
    for asked in talks options; do
        ask() {
            $PYTHON eval_qa.py ask --weights "$W" --tokens $tokens --chat $R/chat_$tokens/chat.bin --root $D \
                --batch_size 16 --annotations $D/test_$asked.jsonl "$@"
        }
        ask --out $R/$tokens.$asked.jsonl
        ask --blind black --out $R/$tokens.$asked.black.jsonl
        $PYTHON eval_qa.py score $R/$tokens.$asked.jsonl --control $R/$tokens.$asked.black.jsonl \
            --train $D/train_talks.jsonl
    done
done
