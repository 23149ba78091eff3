#!/usr/bin/env bash
# The paper's studies in the toy world: tables on stdout, pictures in docs/. 100 minutes on a 2-core CPU, no
# study more than 25; docs/numbers.md has the tables to expect. Needs what runs/tiny.sh leaves in out/. Every
# study can be run alone and goes on where it was stopped. PYTHON: another interpreter than `python`.
#
#   bash runs/ablate.sh            all of them
#   bash runs/ablate.sh losses     one: structure, losses, depth, mask, projection or chat
set -euo pipefail
cd "$(dirname "$0")/.."
D=out/shapes R=out/tiny PYTHON=${PYTHON:-python}
export OMP_WAIT_POLICY=PASSIVE   # as in runs/tiny.sh
tune() {   # the paper's Table 1: kinds of video tokens, the LLaMA frozen, a third of the steps of tiny.sh
    local tokens=$1 seed=$2
    $PYTHON chat_tune.py --stage video --tokens $tokens --num_frames 8 \
        --clip $R/clip --llm $R/language/llava --branch $R/branch_seed0/branch.pth \
        --root $D --annotations $D/train_talks.jsonl \
        --eval_annotations $D/test_talks.jsonl --out out/ablate/chat_${tokens}_$seed \
        --batch_size 16 --steps 330 --lr 1e-3 --seed $seed
}
export D R PYTHON; export -f tune

for study in ${1:-structure losses depth mask projection chat}; do
    if [ "$study" = chat ]; then   # two at a time, a thread each, as toy/ablate.py does it
        export OMP_NUM_THREADS=1
        printf '%s\n' {branch,mean,st_pool}" "{0,1,2} | xargs -P 2 -L 1 bash -c 'tune "$@"' tune
    fi
    $PYTHON -m toy.ablate "$study"
done
