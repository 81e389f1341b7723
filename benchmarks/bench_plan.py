"""What `sae_train --plan` foretells beside what the run then takes, peak resident memory of its largest process:

    python -m benchmarks.bench_plan

Writes benchmarks/results/plan.json.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import about

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plan.json"
RUNS = (  # processes, flags
    (1, "--layer 10 --max_tokens 66000 --val_tokens 8000"),
    (1, "--layer 10 --max_tokens 20000 --expansion_factor 64 --buffer_tokens 8192 --val_tokens 4000"),
    (1, "--layers 2 6 10 --max_tokens 20000 --expansion_factor 16 --buffer_tokens 16384 --val_tokens 4000"),
    (1, "--layer 2 --max_tokens 8192 --expansion_factor 256 --buffer_tokens 4096 --val_tokens 1000"),
    (2, "--layer 2 --max_tokens 20000 --expansion_factor 64 --buffer_tokens 16384 --val_tokens 4000"),
    (2, "--layer 2 --max_tokens 8192 --expansion_factor 256 --buffer_tokens 4096 --val_tokens 1000 --shard_latents 2"),
    (2, "--layers 0 1 2 --max_tokens 16384 --expansion_factor 64 --buffer_tokens 8192 --distribute_modules"),
)
PEAK = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
PEAK += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"  # KiB on Linux


def main() -> None:
    rows = []
    for n, flags in RUNS:
        with tempfile.TemporaryDirectory() as tmp:
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)] if n > 1 else []
            script = ["-m", "scripts.sae_train", *flags.split(), "--save_dir", tmp]
            env = {**os.environ, "WORLD_SIZE": str(n)}
            said = subprocess.run(
                [sys.executable, *script, "--plan"], cwd=ROOT, env=env, capture_output=True, text=True, check=True
            ).stdout
            found = re.search(r"peak per process\s+([\d,]+)", said)
            assert found is not None
            predicted = float(found[1].replace(",", ""))
            ran = subprocess.run(
                [sys.executable, "-c", PEAK, sys.executable, *start, *script],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
            measured = float(ran.stdout.split()[-1])  # of the largest process
            row = {"processes": n, "flags": flags, "predicted_mib": predicted, "measured_mib": measured}
        rows.append(row)
        print(row, flush=True)
    RESULTS.write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
