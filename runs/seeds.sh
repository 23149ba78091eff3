#!/usr/bin/env bash
# The headline table with its spread: two more branches, of seeds 1 and 2, beside the one of runs/tiny.sh, which comes first.
set -euo pipefail
cd "$(dirname "$0")/.."
W=${1:-weights/tiny} D=out/shapes R=out/tiny PYTHON=${PYTHON:-python}
export OMP_WAIT_POLICY=PASSIVE
for seed in 1 2; do
    $PYTHON pretrain.py --clip "$W/clip" --annotations $D/train_captions.jsonl --root $D --out $R/branch_seed$seed --seed $seed \
        --lr 1e-5 --anneal --batch_size 64 --together 2 --steps 800 --min_area 0.8
done
$PYTHON shapes.py score --data $D --out "$W" --branches $R/branch/branch.pth,$R/branch_seed1/branch.pth,$R/branch_seed2/branch.pth
