#!/usr/bin/env bash
# Trains the embedded default, pygpt, and exports it to out/pygpt_export (copy that over assets/pygpt to ship it).
# As it stands: the shipped model's recipe, two hours on two CPU cores. Flags go to train.py; with a GPU, for example:
#   bash runs/train_pygpt.sh --device cuda --compile --batch_size 128 --max_steps 4000 --dropout 0.1
# It can be stopped and goes on with --resume.
source "$(dirname "$0")/setup.sh"

out=out/pygpt
[ -f data/pygpt/train.bin ] || "$PY" assets/pygpt/corpus.py --out_dir data/pygpt --vocab_size 4096
"$PY" train.py --data_dir data/pygpt --out_dir "$out" --n_layer 12 --n_head 6 --n_embd 192 --block_size 256 \
    --batch_size 16 --max_steps 3000 --learning_rate 2e-3 --min_lr 5e-5 --warmup_steps 100 --dtype bfloat16 \
    --eval_tokens 20000 --eval_every 100 --log_every 20 "$@"
"$PY" train.py --export out/pygpt_export/ckpt.pt --out_dir "$out"
cp data/pygpt/tokenizer.json out/pygpt_export/tokenizer.json
"$PY" sample.py --checkpoint out/pygpt_export/ckpt.pt --num_samples 1
"$PY" sample.py --checkpoint out/pygpt_export/ckpt.pt --ask "What does os.path.join do?"
