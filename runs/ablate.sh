#!/usr/bin/env bash
# The paper's studies in the toy world: tables on stdout, pictures in docs/. Two hours and a half on a 2-core CPU,
# no study more than 40 minutes; docs/numbers.md has the tables. Needs the clips of `python -m toy render`. Every
# study can be run alone and goes on where it was stopped. PYTHON: another interpreter than `python`.
#
#   bash runs/ablate.sh            all of them
#   bash runs/ablate.sh losses     one: structure, losses, depth, mask, projection, kept or related
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE   # as in runs/tiny.sh

for study in ${1:-structure losses depth mask projection kept related}; do
    ${PYTHON:-python} -m toy.ablate "$study"
done
