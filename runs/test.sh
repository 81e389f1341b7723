#!/usr/bin/env bash
# All checks and tests. Flags are handed to pytest:  bash runs/test.sh -k topk
EXTRAS="[hf,h5,dev]" source "$(dirname "$0")/setup.sh"

"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$PY" -m mypy sae scripts benchmarks model.py tokenizer.py train.py sample.py
if [ $# -gt 0 ]; then
    "$PY" -m pytest "$@"
else
    "$PY" -m pytest --cov --cov-report=term --cov-fail-under=93
fi
