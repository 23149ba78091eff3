#!/usr/bin/env bash
# VTimeLLM in miniature, from nothing on a 2-core CPU in 33 minutes: stories of events, its three
# stages, and its Table 2; docs/numbers.md has what to expect. It begins with weights/tiny, whose CLIP and
# LLaVA know the toy world and no clock. What is done is not done again. PYTHON: another interpreter than
# `python`.
#
#   bash runs/vtimellm.sh                        rows 1, 8, 9 and 10, one seed, into out/time
#   SEEDS="0 1 2" ROWS=all bash runs/vtimellm.sh   three seeds, also row 7 and the rows without aids; 3 hours
set -euo pipefail
cd "$(dirname "$0")/.."
W=weights/tiny D=out/shapes S=out/stories T=out/time PYTHON=${PYTHON:-python} ROWS=${ROWS:-some}
export OMP_NUM_THREADS=1

# Pictures, 1 minute; long clips with events, 1 minute.
[ -e $D/watch_captions.jsonl ] || $PYTHON -m toy render --data $D
[ -e $S/test_talks.jsonl ] || $PYTHON -m toy stories --stories $S

boundaries() {   # the second stage: folder of the first, name of the row, more
    [ -e $R/$2/stage2 ] || $PYTHON -m toy.clock --weights $1 --stories $S --out $R/$2 --seed $seed "${@:3}"
}
moments() {      # the third: folder of the second, name of the row, more
    [ -e $R/$2/mm_projector.bin ] || $PYTHON chat_tune.py --stage moments --weights $1 --out $R/$2 --root $S \
        --annotations $S/train_talks.jsonl --eval_annotations $S/test_talks.jsonl --features $S/features \
        --rank 32 --alpha 64 --batch_size 16 --steps 400 --lr 1e-3 --no-checkpointed --seed $seed "${@:3}"
}
when() {         # all events of the test world: name of the row, more
    $PYTHON eval_grounding.py --annotations $S/test_events.jsonl --root $S --weights $R/$1 \
        --save $R/$1.jsonl --captions "${@:2}"
}
THIRD="When does it happen that {}?"   # in the words of the third stage

for seed in ${SEEDS:-0}; do
    R=$T/seed$seed
    # Stage 1, 5 minutes: the projector, from pictures; in questions, as a LLaMA this small needs them.
    [ -e $R/align/mm_projector.bin ] || $PYTHON chat_tune.py --stage align --template vtimellm \
        --clip $W/clip --llm $W/llava --annotations $D/train_stills.jsonl --root $D --out $R/align \
        --batch_size 32 --steps 700 --lr 3e-4 --no-checkpointed --seed $seed
    # Stage 2, 15 minutes; beside it row 8, the third stage without the second.
    { moments $R/align row8 && when row8 --ask "$THIRD"; } & beside=$!
    boundaries $R/align row1 --aids
    when row1
    wait $beside
    # Stage 3, 5 minutes: a new LoRA on the merged one, and the same one tuned on.
    { moments $R/row1 row9 --reuse && when row9 --ask "$THIRD"; } & beside=$!
    moments $R/row1 row10
    when row10 --ask "$THIRD"
    wait $beside
    if [ $ROWS = all ]; then
        boundaries $R/align row7 --fresh --aids
        when row7
        boundaries $R/align row1_no_aids
        when row1_no_aids
        moments $R/row1_no_aids row10_no_aids
        when row10_no_aids --ask "$THIRD"
    fi
done
$PYTHON -m toy times --stories $S --out $T
