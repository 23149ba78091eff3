#!/usr/bin/env bash
# LinVT in the toy world, on a 2-core CPU, from the shipped weights/tiny to tables and a linvt.bin;
# docs/numbers.md has what to expect, also of time. Every stage can be run alone; trainings of chat_tune.py go
# on where they were stopped. PYTHON: another interpreter than `python`.
#
#   bash runs/linvt.sh                     three trainings, all tables
#   SEEDS=0 bash runs/linvt.sh             one training
set -euo pipefail
cd "$(dirname "$0")/.."
W=${1:-weights/tiny} D=out/shapes R=out/linvt PYTHON=${PYTHON:-python}

# The clips. Long videos are lists of them: questions to train and to test.
[ -e $D/watch_captions.jsonl ] || $PYTHON -m toy render --data $D
$PYTHON -m toy.scenes write --data $D --steps 1200

# What the branch says of every clip, once; then LinVT alone learns. Asked about one of 16 scenes it is right
# in two of three or more, the mean of the windows in one of six.
folders=""
for seed in ${SEEDS:-0 1 2}; do
    $PYTHON chat_tune.py --stage linvt --weights "$W" --content --num_frames 8 --features $R/features \
        --annotations $D/train_scenes.jsonl --root $D \
        --out $R/seed$seed --seed $seed --batch_size 16 --lr 2e-3
    folders=$folders,$R/seed$seed
done

# Beside other rows; second questions, also of a LLaMA that learned to be asked about another scene; what is
# known of colours that no training asked about.
$PYTHON -m toy.scenes table --data $D --weights "${folders#,}" --out $R/clips --steps 1200
$PYTHON chat_tune.py --stage linvt_lora --weights $R/seed0 --num_frames 8 --features $R/features \
    --annotations $D/train_turns.jsonl --root $D --out $R/lora --batch_size 16 --lr 1e-3
for weights in "${folders#,}" $R/lora; do
    $PYTHON -m toy.scenes turns --data $D --weights "$weights" --out $R/clips
done
$PYTHON -m toy.scenes principle --data $D --weights "$W" --out $R/clips --steps 400
cp $R/seed0/linvt.bin "$W/linvt.bin"
