#!/usr/bin/env bash
# One run a target, each resumable by itself: bash examples/targets.sh cifar_resnet20.digits digits runs/targets 75% 50% 25%
set -euo pipefail
model=$1 data=$2 out=$3
shift 3
for macs in "$@"; do
  run="$out/macs-${macs%\%}"
  if [ -f "$run/report.json" ]; then continue; fi
  resume=()
  if [ -f "$run/recipe.yaml" ]; then resume=(--resume); fi
  prunecli compress "$model" --data "$data" --target "macs=$macs" --out "$run" "${resume[@]}"
done
