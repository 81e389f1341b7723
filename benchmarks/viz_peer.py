"""SAEDashboard's part of bench_viz, run by a Python that has it (pip install sae-dashboard); knows nothing of nanoSAE.

    PEERS/bin/python benchmarks/viz_peer.py JOB.json

The job names a folder with tokens.npy (N, T), model.pt (a nanoGPT checkpoint), an SAE in SAELens's layout, and what to
do. Prints one line of json: seconds, and of each feature its logit lists and the places of its strongest tokens.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def transformer_lens_model(path: str) -> Any:
    """The GPT as a HookedSAETransformer. Final norm's gain folded in, as TransformerLens does by default."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    a, w = checkpoint["model_args"], {k: v.float() for k, v in checkpoint["model"].items()}
    d, h, L = a["n_embd"], a["n_head"], a["n_layer"]
    config = HookedTransformerConfig(
        n_layers=L,
        d_model=d,
        n_ctx=a["block_size"],
        d_head=d // h,
        n_heads=h,
        d_mlp=4 * d,
        d_vocab=a["vocab_size"],
        act_fn="gelu",
        normalization_type="LN",
        device="cpu",
        seed=0,
    )
    model = HookedSAETransformer(config)
    state = {name: torch.zeros_like(x) for name, x in model.state_dict().items()}
    for name, x in model.state_dict().items():
        if name.endswith(("mask", "IGNORE")):
            state[name] = x
    state["embed.W_E"], state["pos_embed.W_pos"] = w["transformer.wte.weight"], w["transformer.wpe.weight"]
    state["ln_final.w"], state["unembed.W_U"] = w["transformer.ln_f.weight"], w["lm_head.weight"].t().contiguous()
    for i in range(L):
        t, b = f"transformer.h.{i}.", f"blocks.{i}."
        state[b + "ln1.w"], state[b + "ln2.w"] = w[t + "ln_1.weight"], w[t + "ln_2.weight"]
        q, k, v = w[t + "attn.c_attn.weight"].view(3, h, d // h, d).transpose(2, 3)
        state[b + "attn.W_Q"], state[b + "attn.W_K"], state[b + "attn.W_V"] = q, k, v
        state[b + "attn.W_O"] = w[t + "attn.c_proj.weight"].t().reshape(h, d // h, d)
        state[b + "mlp.W_in"] = w[t + "mlp.c_fc.weight"].t()
        state[b + "mlp.W_out"] = w[t + "mlp.c_proj.weight"].t()
    model.load_state_dict(state)
    model.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    return model.eval()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE

    tokens = torch.from_numpy(np.load(job["tokens"])).long()
    model = transformer_lens_model(job["model"])
    sae = SAE.load_from_disk(job["sae"], device="cpu")
    if hasattr(sae.cfg, "rescale_acts_by_decoder_norm"):  # else it is refused; of unit rows it changes nothing
        sae.cfg.rescale_acts_by_decoder_norm = True
    config = SaeVisConfig(
        hook_point=job["hook"],
        features=list(range(job["features"])),
        minibatch_size_features=256,
        minibatch_size_tokens=16,
        ignore_tokens=set(job["ignore"]),
        device="cpu",
    )
    start = time.perf_counter(), time.process_time()
    data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    found = {}
    for i, feature in data.feature_data_dict.items():
        top = feature.sequence_data.seq_group_data[0].seq_data
        places = [[int(s.original_index), int(s.qualifying_token_index), max(s.feat_acts[:6])] for s in top]
        table = feature.logits_table_data
        found[int(i)] = {"places": places, "promoted": table.top_token_ids, "suppressed": table.bottom_token_ids}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    version = importlib.metadata.version("sae-dashboard")
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_bytes": peak, "version": version, "features": found}))


if __name__ == "__main__":
    main()
