"""Write the parts of the documents that nobody types: the figures of benchmarks/results/, all flags, the list of files.

    python -m benchmarks.render            rewrite the documents
    python -m benchmarks.render --check    fail if that would change one (a test runs this)

A block between `<!-- results: NAME -->` and `<!-- end -->` holds what table NAME renders to.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import sys
from pathlib import Path

from sae.config import ChatConfig, CollectConfig, EvalConfig, TrainConfig, UploadConfig, VizConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "SAE_README.md", "CONTRIBUTING.md", "assets/pygpt/README.md")
CORE = {  # the files of sae/ in the order to read them; CONTRIBUTING.md lists those that are there, and any other last
    "what a run is": "flags config schedules hookpoints",
    "the idea": "hooks base models metrics optim dead learner trainer rundir evaluator",
    "more than one": "distributed end_to_end checkpoint plan",
    "for people": "runtime edits feature_viz plots neuronpedia log",
    "others": "files",
}


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def machine(about: dict) -> str:
    """Where results were measured; older ones do not name their processor."""
    return f"{about['cores']} cores ({about.get('processor') or about['machine']})"


def first_sentence(path: Path) -> str:
    """Of a file's docstring; a command in it is left out."""
    said = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    return re.split(r":? python |(?<=[.]) ", said)[0].rstrip(".")


def files() -> str:
    """Every file of the project in reading order, in its own words: a line for each of the core and for each room."""
    sae, lines = ROOT / "sae", ["| | | what it is |", "|---|---|---|"]
    there = [p.stem for p in sorted(sae.glob("*.py")) if p.stem != "__init__"]
    known = {name for names in CORE.values() for name in names.split()}
    for group, names in CORE.items():
        more = [name for name in there if name not in known] if group == "others" else []
        for i, name in enumerate([*(n for n in names.split() if n in there), *more]):
            head = f"**{group}**" if i == 0 else ""
            lines.append(f"| {head} | `{name}.py` | {first_sentence(sae / f'{name}.py')} |")
    rooms = sorted(p.parent for p in sae.glob("*/__init__.py"))
    for i, room in enumerate([*rooms, ROOT / "scripts"]):
        words = [
            f"`{p.name}` {first_sentence(p).split(':')[0]}" for p in sorted(room.glob("*.py")) if p.stem != "__init__"
        ]
        words += [f"`{p.name}`" for p in sorted(room.iterdir()) if p.suffix in (".cpp", ".css", ".html", ".js")]
        head = "**rooms**" if i == 0 else ""
        lines.append(f"| {head} | `{room.name}/` | {first_sentence(room / '__init__.py')}. {'; '.join(words)} |")
    gpt = "; ".join(
        f"`{name}.py` {first_sentence(ROOT / f'{name}.py')}" for name in "model train sample tokenizer".split()
    )
    lines.append(f"| **the small GPT** | beside `sae/` | {gpt} |")
    return "\n".join(lines)


def flags(config: type) -> str:
    """Every field of a config as a flag."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for f in dataclasses.fields(config):
        if f.name == "sweep":  # no flag of its own
            continue
        names = " ".join(f"`--{name}`" for name in (f.name, *f.metadata["alias"]))
        default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        shown = "" if default is None else default
        text = f.metadata["help"].replace("|", chr(92) + "|") + (
            " [several: an SAE for each]" if f.metadata.get("sweep") else ""
        )
        lines.append(f"| {names} | {shown} | {text} |")
    return "\n".join(lines)


def quality() -> str:
    """The table of trained SAEs."""
    lines = [
        "| command | explained variance | L0 | dead | CE score vs zero | vs mean | tokens x uses | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    score = lambda v: "no head" if v is None else f"{v:.3f}"
    for name in ("quality_pygpt", "quality_minilm"):
        for r in load(name)["rows"]:
            cells = (
                f"`{r['command']}`",
                f"{r['explained_variance']:.3f}",
                f"{r['l0']:.1f}",
                f"{100 * r['dead_fraction']:.2f}% of {r['d_sae']}",
                score(r["ce_score_zero"]),
                score(r["ce_score_mean"]),
                f"{r['train_tokens'] / 1e6:.1f}M x {r['uses']}",
                f"{r['train_seconds']:.0f} s",
            )
            lines.append(f"| {' | '.join(cells)} |")
    about = load("quality_pygpt")["about"]
    lines += ["", f"(torch {r['torch']}, {machine(about)}, {about['date']})"]
    return "\n".join(lines)


def architectures() -> str:
    """Architecture x {SAE, transcoder, skip transcoder}: explained variance, L0, dead latents, seconds."""
    result = load("architectures")
    cells = {(r["activation"], r["form"]): r for r in result["cells"]}
    forms = ("sae", "transcoder", "skip")
    head = "| | " + " | ".join(f"{form}: explained variance | L0 | dead | seconds" for form in forms) + " |"
    lines = [head, "|---" * (1 + 4 * len(forms)) + "|"]
    for activation in dict.fromkeys(r["activation"] for r in result["cells"]):
        row = [f"`{activation}`"]
        for form in forms:
            r = cells.get((activation, form))
            if r is None:
                row += ["(not measured yet)", "", "", ""]
            else:
                dead = f"{100 * r['dead_fraction']:.2f}%"
                row += [f"{r['explained_variance']:.3f}", f"{r['l0']:.1f}", dead, f"{r['seconds']:.0f}"]
        lines.append(f"| {' | '.join(row)} |")
    r, about = result["cells"][0], result["about"]
    lines += [
        "",
        f"({r['n_tokens']:,} tokens once, {r['d_sae']} latents, batch {r['batch_size']}, held out "
        f"{r['n_held_out']:,} tokens; torch {about['torch']}, {about['threads']} threads, "
        f"{machine(about)}, {about['date']})",
    ]
    return "\n".join(lines)


def demo() -> str:
    """The demo's own figures, one line."""
    r = load("demo")
    e = r["eval"]
    return (
        f"`bash runs/demo.sh` on {r['about']['cores']} cores: {r['seconds']:.0f} s after installation "
        f"(limit {r['limit_s']} s); explained variance {e['explained_variance']:.3f}, L0 {e['l0']:.1f}, "
        f"dead {100 * e['dead_fraction']:.2f}% over {e['n_tokens']:,} tokens, CE score {e['ce_score_zero']:.3f} "
        f"against zero and {e['ce_score_mean']:.3f} against mean ablation; pages of {r['pages']:,} features."
    )


def pygpt() -> str:
    """How the embedded model was trained and how good it is."""
    r = load("pygpt")
    rows = [f"| {name} | {value} |" for name, value in r["facts"].items()]
    point = "| {step} | {tokens:,} | {val_loss:.3f} | {val_bits_per_byte:.3f} |"
    head = ["| step | tokens | validation loss (nats) | bits per byte |", "|---|---|---|---|"]
    return "\n".join(["| | |", "|---|---|", *rows, "", *head, *(point.format(**p) for p in r["curve"])])


def peers() -> str:
    """nanoSAE and its peers: mean and standard deviation over seeds."""
    r = load("peers")
    about, same = r["about"], {"nanosae": "nanoSAE"}
    lines = [
        "| library | setting | optimiser, lr, batch | explained variance | dead | L0 | processor seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in r["summary"]:
        spread = lambda name, form, s=s, by=1: " +- ".join(form.format(by * s[name][v]) for v in ("mean", "sd"))
        how = s["settings"]
        cells = (
            f"{same.get(s['library'], s['library'])} {s['version']}",
            s["setting"],
            f"{how['optimizer']} {how['lr']:.2g}, {how['batch']}",
            spread("explained_variance", "{:.4f}"),
            spread("dead_fraction", "{:.2f}", by=100) + "%",
            f"{s['l0']['mean']:.1f}",
            f"{s['cpu_seconds']['mean']:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"({about['hookpoint']} of MiniLM, {about['tokens']:,} tokens once, F = {about['d_sae']}, k = {about['k']}, "
        f"{r['summary'][0]['seeds']} seeds, mean +- standard deviation; {about['held_out_tokens']:,} held-out tokens; "
        f"{about['threads']} thread on {machine(about)}, {about['date']})",
    ]
    return "\n".join(lines)


def sweep() -> str:
    """Many SAEs in one pass beside the same one by one."""
    r = load("sweep")
    about = r["about"]
    return (
        f"The {r['saes']} SAEs of `--layers 4 7 10 --k 16 32 --init_seeds 0 1`, {r['tokens']:,} tokens each: "
        f"{r['sweep_seconds']:.0f} s in one run, {r['sum_alone_seconds']:.0f} s in twelve, one after the other "
        f"({100 * r['ratio']:.0f}%; {machine(about)}, {about['date']})."
    )


def half() -> str:
    """Runs on a language model in bfloat16 beside those in float32."""
    result = load("bench_half")
    about = result["about"]
    lines = [
        "| model | seed | computes in | tokens/s | forwards | explained variance | the same SAE in the float32 model | "
        "CE score vs mean |",
        "|---" * 8 + "|",
    ]
    for r in result["rows"]:
        score = r["in_float32"]["ce_score_mean"]
        lines.append(
            f"| {r['model']}, layer {r['layer']} | {r['seed']} | {r['dtype']} | {r['tokens_per_s']:,} | "
            f"{r['forwards_s']:.1f} s | {r['own']['explained_variance']:.4f} | "
            f"{r['in_float32']['explained_variance']:.4f} | {'no head' if score is None else f'{score:.4f}'} |"
        )
    return "\n".join([*lines, "", f"({about['tokens']:,} tokens; {machine(about)}, {about['date']})"])


def steps(file: str = "bench_step") -> str:
    """A training step, nanoSAE's and its peers'."""
    result = load(file)
    cells = {(r["contender"], r["shape"], r["allocator"]): r for r in result["rows"]}
    shapes = list(dict.fromkeys(r["shape"] for r in result["rows"]))
    sizes = {r["shape"]: f"D={r['D']} F={r['F']} k={r['K']}" for r in result["rows"]}
    allocators = [a for a in ("shipped", "tuned") if any(r["allocator"] == a for r in result["rows"])]
    head = "| tokens/s (times nanoSAE's) | " + " | ".join(f"{sizes[s]}, {a}" for s in shapes for a in allocators) + " |"
    lines = [head, "|---" * (1 + len(shapes) * len(allocators)) + "|"]
    for name in dict.fromkeys(r["contender"] for r in result["rows"]):
        row = [name]
        for at in ((s, a) for s in shapes for a in allocators):
            r, ours = cells.get((name, *at)), cells.get(("nanosae", *at))
            row.append(f"{r['tokens_per_s']:,.0f} ({r['step_ms'] / ours['step_ms']:.1f})" if r and ours else "")
        lines.append(f"| {' | '.join(row)} |")
    ours = [cells[("nanosae", s, a)] for s in shapes for a in allocators if ("nanosae", s, a) in cells]
    about = result["about"]
    shares = ", ".join(f"{r['step_over_encoder']:.2f}" for r in ours if "step_over_encoder" in r)
    where = f"{ours[0]['threads']} threads, {machine(about)}, {ours[0]['kernels']}, {about['date']}"
    lines += [
        "",
        f"(batch {ours[0]['B']}, float32, Adam but where another optimiser is named, the whole step; "
        f"nanoSAE's step over the encoder in it, column by column: {shares}; {where})",
    ]
    return "\n".join(lines)


def time_to_quality() -> str:
    """How soon nanoSAE is as good as sparsify after its time."""
    result = load("bench_quality")
    lines = ["| | peak step size | sparsify with Adam | nanoSAE | share of its time |", "|---|---|---|---|---|"]
    for s in result["shapes"].values():
        for row, share in zip(s["rows"], s["share_at_equal_lr"], strict=True):
            peer = row["sparsify"]
            enough = [r for r in row["nanosae"] if r["fvu"] <= peer["fvu"]]
            ours = min(enough, key=lambda r: r["seconds"]) if enough else row["nanosae"][-1]
            cells = (
                f"D={s['D']} F={s['F']} k={s['K']}",
                f"{row['lr']:g}",
                f"{peer['fvu']:.4f} after {peer['seconds']:.0f} s",
                f"{ours['fvu']:.4f} after {ours['seconds']:.1f} s",
                "not reached" if share is None else f"{share:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    best = ", ".join(f"{s['share_at_best_lr']:.2f}" for s in result["shapes"].values() if s["share_at_best_lr"])
    about = result["about"]
    lines += ["", f"(both at their best step size: {best} of its time; {machine(about)}, {about['date']})"]
    return "\n".join(lines)


def scaling() -> str:
    """What a step's time and memory grow with."""
    r = load("bench_scaling")
    base, grows, memory = r["base"], r["grows"], r["memory"]
    slopes = ", ".join(f"{name} {found['slope']:.2f}" for name, found in grows.items())
    added = "; ".join(
        f"at D={base[name]['D']} F={base[name]['F']} AuxK adds "
        + " and ".join(
            f"{value - 1:.0%} with {float(share):.0%} dead latents" for share, value in r["auxk"][name].items()
        )
        + f", twice as many latents per token {r['k_doubled'][name] - 1:.0%}"
        for name in base
    )
    peaks = ", ".join(
        f"{name.split()[0]} {m['peak_mib'] / m['needed_mib']:.2f}"
        for name, m in memory.items()
        if name.endswith("auto")
    )
    k, B, about = base["M"]["K"], base["M"]["B"], r["about"]
    return (
        f"With k={k} and batch {B} the time of a step grows with the power {slopes}; {added}. Peak memory of a "
        f"step over weights, gradients, optimiser, inputs and a block of at most 2^25 pre-activations: {peaks}. Plot: "
        f"benchmarks/results/bench_scaling.png ({machine(about)}, {about['date']})."
    )


def meshes() -> str:
    """Predicted and measured steps of several processes, and the best mesh for a cluster."""
    r = load("scale_model")
    about = r["about"]
    lines = [
        "| replicas x shards | kernels | wire and waiting | predicted | measured | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in r["measured"]:
        ms = lambda v: f"{1e3 * v:.0f} ms"
        cells = (
            f"{row['replicas']} x {row['shards']}",
            ms(row["kernels"]),
            ms(row["predicted"] - row["kernels"]),
            ms(row["predicted"]),
            ms(row["measured"]),
            f"{100 * row['error']:+.0f}%",
        )
        lines.append(f"| {' | '.join(cells)} |")
    shape = about["shape"]
    lines += [
        "",
        f"(D={shape['d_in']} F={shape['d_sae']} k={shape['k']}, {shape['batch_size']} tokens a step, "
        f"processes over gloo on {machine(about)}, {about['date']})",
        "",
    ]
    best = ", ".join(f"{p['gpus']}: {p['replicas']} x {p['shards']} {p['tokens_per_s']:,.0f}" for p in r["predicted"])
    lines.append(
        f"Best meshes for F={about['d_sae']:,} D={about['d_in']:,}, {about['batch']:,} tokens a step, by the "
        f"same model (GPUs: replicas x shards, tokens/s; nothing of it measured): {best}."
    )
    return "\n".join(lines)


def plans() -> str:
    """What --plan foretold and what the runs took."""
    r = load("plan")
    lines = ["| processes | flags | predicted peak | measured | error |", "|---|---|---|---|---|"]
    for row in r["rows"]:
        error = row["predicted_mib"] / row["measured_mib"] - 1
        lines.append(
            f"| {row.get('processes', 1)} | `{row['flags']}` | {row['predicted_mib']:.0f} MiB | "
            f"{row['measured_mib']:.0f} MiB | {100 * error:+.1f}% |"
        )
    about = r["about"]
    last = f"(peak resident memory of the largest process, {about['machine']}, {about['date']})"
    return "\n".join([*lines, "", last])


def world() -> str:
    """The layer for several processes in a run of one."""
    r = load("bench_world")
    lines = ["| device | a step with the layer | without | ratio |", "|---|---|---|---|"]
    for row in r["rows"]:
        lines.append(
            f"| {row['device']} | {1e3 * row['with']:.2f} ms | {1e3 * row['without']:.2f} ms | {row['ratio']:.3f} |"
        )
    if all(row["device"].startswith("CPU") for row in r["rows"]):
        lines.append("| one GPU | | | |")
    return "\n".join(lines)


def faults() -> str:
    """Killed processes."""
    r = load("fault")
    spoke = sum(row["said"] for row in r["rows"])
    return (
        f"One of four processes killed at a random moment, {len(r['rows'])} times in one run on changing meshes: the "
        f"others ended after at most {r['longest_s']:.1f} s ({spoke} times with the sentence, else at torchrun's "
        f"hand), and every resume went on to a later checkpoint ({r['about']['date']})."
    )


def viz() -> str:
    """What looking at features costs, one paragraph."""
    r = load("bench_viz")
    cost, about = r["cost"], r["cost"]["about"]
    share = cost["labels"]["good"] / cost["labels"]["live"]
    parts = [
        f"`sae_viz --all_features` over {cost['tokens']:,} tokens of pygpt's layer 10 takes {cost['cpu_ratio']:.2f} "
        f"times the processor time of one plain forward pass over them ({cost['wall_ratio']:.2f} times the wall time), "
        f"labels, map and pages included; {share:.0%} of the live features get a label with precision and recall of "
        "at least 0.5."
    ]
    if "memory" in r:
        m = r["memory"]
        parts.append(f"With {m['latents']:,} latents its memory peaks at {m['peak_bytes'] / 2**30:.2f} GiB.")
    if "peers" in r:
        p = r["peers"]
        parts.append(
            f"On {p['tokens']:,} tokens and {p['features']} features {p['peer']} takes {p['ratio_cpu']:.1f} times our "
            f"processor time ({p['ratio_wall']:.1f} times the wall time), and finds the same logit lists "
            f"({p['same_logits']:.1%}) and strongest contexts ({p['same_contexts']:.1%})."
        )
    parts.append(f"({about['threads']} threads, {machine(about)}, {about['date']})")
    return " ".join(parts)


def runtime() -> str:
    """What watching and steering cost per generated token."""
    result = load("bench_runtime")
    models = list(dict.fromkeys(r["model"] for r in result["rows"]))
    cells = {(r["model"], r["way"].replace("all 12 layers", "all layers")): r for r in result["rows"]}
    head = "| time per token, over the plain model's | " + " | ".join(f"{m} (quartiles)" for m in models) + " |"
    lines = [head, "|---" * (1 + len(models)) + "|"]
    for way in dict.fromkeys(way for _, way in cells):
        row = [cells[m, way] for m in models if (m, way) in cells]
        shown = [
            f"{r['ms']:.1f} ms" if way == "plain" else f"{r['ratio']:.3f} ({r['low']:.3f} to {r['high']:.3f})"
            for r in row
        ]
        lines.append(f"| {way} | {' | '.join(shown)} |")
    about = result["about"]
    lines += [
        "",
        f"(medians over {about['tokens']} tokens, all ways in turn after every token, batch 1, KV cache; "
        f"TopK, k = 32; {about['threads']} threads, {machine(about)}, "
        f"{about['kernels']}, {about['date']})",
    ]
    return "\n".join(lines)


def runtime_short() -> str:
    """The lines of that table that most people ask for, on the model of GPT-2 small's size."""
    rows = {r["way"]: r["ratio"] for r in load("bench_runtime")["rows"] if r["model"] == "gpt2-small"}
    ways = {
        "all latents of a hookpoint, 8 times the width": "all latents, expansion 8",
        "32 times": "all latents, expansion 32",
        "of all 12 layers": "all latents of all 12 layers, expansion 8",
        "64 chosen latents": "64 watched latents (topk)",
        "4 features steered": "4 features steered: add, set, scale (topk)",
    }
    shown = "; ".join(f"{words} {rows[way]:.3f}" for words, way in ways.items())
    return (
        "What it costs, by `python -m benchmarks.bench_runtime`: time per token over the plain model's, at GPT-2 "
        f"small's size: {shown} (SAE_README.md has the whole table)."
    )


def steering() -> str:
    """A feature found by what it means, and what turning it up does."""
    r = load("steering")
    f, what = r["feature"], r["what"]
    lines = [
        f"Of all latents, {f['latent']} says best which tokens lie inside a {what} (precision {f['precision']:.2f}, "
        f"recall {f['recall']:.2f} over {f['n_tokens']:,} held-out tokens). Added to the stream while pygpt goes on "
        f"with {r['about']['texts']} beginnings of code, with the same seeds:",
        "",
        f"| strength, of its largest activation | written inside a {what} |",
        "|---|---|",
    ]
    lines += [f"| {row['strength'] or 'plain'} | {100 * row['share']:.0f}% |" for row in r["rows"]]
    plain, steered = (row["examples"][r["shown"]] for row in (r["rows"][0], r["rows"][1]))
    command = f"python -m scripts.chat --raw --max_new_tokens {r['about']['tokens']} --prompt '{plain['start']}'"
    for steer, text in (("", plain["text"]), (f" --steer {r['rows'][1]['steer'][0]}", steered["text"])):
        lines += ["", f"`{command}{steer}`:", "", f"~~~\n{plain['start']}{text.rstrip()}\n~~~"]
    return "\n".join(lines)


def server() -> str:
    """Many clients of the page's server."""
    r = load("bench_server")
    m, about = r["memory_mb"], r["about"]
    return (
        f"{r['clients']} clients at once for {r['seconds']:.0f} s, a fifth of them slow readers: {r['answered']:,} "
        f"answers of {r['tokens_per_answer']} tokens, each the one that its question gets alone; {r['refused']} "
        f"refused in words, {r['left']} left halfway, {r['wrong']} wrong; memory {m['before']} MB before, "
        f"{m['middle']} in the middle, {m['after']} after ({machine(about)}, {about['date']})."
    )


def samples() -> str:
    """What the embedded model writes."""
    return "\n\n".join(f"`{r['command']}`:\n\n~~~\n{r['text']}\n~~~" for r in load("pygpt")["samples"])


TABLES = {
    "samples": samples,
    "architectures": architectures,
    "quality": quality,
    "demo": demo,
    "pygpt": pygpt,
    "peers": peers,
    "sweep": sweep,
    "steps": steps,
    "steps_elsewhere": lambda: steps("bench_step_xeon"),
    "viz": viz,
    "time_to_quality": time_to_quality,
    "half": half,
    "scaling": scaling,
    "meshes": meshes,
    "plans": plans,
    "faults": faults,
    "world": world,
    "runtime": runtime,
    "runtime_short": runtime_short,
    "steering": steering,
    "server": server,
    "files": files,
    "flags": lambda: flags(TrainConfig),
    "flags_eval": lambda: flags(EvalConfig),
    "flags_viz": lambda: flags(VizConfig),
    "flags_upload": lambda: flags(UploadConfig),
    "flags_collect": lambda: flags(CollectConfig),
    "chat_flags": lambda: flags(ChatConfig),
}


def table(name: str) -> str:
    """A table, or a word that its figures are not there."""
    try:
        return TABLES[name]()
    except FileNotFoundError:
        return "(not measured yet)"


def rendered(text: str) -> str:
    """The document with its blocks made anew."""
    block = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return block.sub(lambda m: f"{m[1]}{table(m[2])}\n{m[3]}", text)


def main() -> None:
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = rendered(old)
        if new != old:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"{', '.join(stale)} differ from benchmarks/results; run python -m benchmarks.render")


if __name__ == "__main__":
    main()
