#!/usr/bin/env bash
# One run a target, from one recipe; each can be resumed by itself: bash examples/targets.sh quickstart runs/targets 75% 50% 25%
set -euo pipefail
recipe=$1 out=$2
shift 2
for macs in "$@"; do
  run="$out/macs-${macs%\%}"
  if [ -f "$run/report.json" ]; then continue; fi
  if [ -f "$run/recipe.yaml" ]; then
    prunecli compress --resume --out "$run"
  else
    prunecli compress --recipe "$recipe" --target "macs=$macs" --out "$run"
  fi
done
