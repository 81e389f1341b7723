#!/usr/bin/env bash
# The project's main job on the embedded default: train an SAE on layer 10, measure it, look at it.
# Flags are handed to sae_train:  bash runs/demo.sh --k 16
source "$(dirname "$0")/setup.sh"

"$PY" -m scripts.sae_train --layer 10 --max_tokens 8e5 --num_epochs 3 --d_sae 4608 --lr 3e-3 --overwrite "$@"
"$PY" -m scripts.sae_eval
"$PY" -m scripts.sae_viz
