"""N processes give what one gives: every architecture on every layout, resume across layouts, bytes on the wire.

Real processes over gloo, four for all cases (tests/world_runner.py); no torchrun but where it is what is tested.
Run: python -m pytest tests/test_distributed.py
"""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import scale_model
from sae import distributed, files, log
from sae.checkpoint import checkpoints
from sae.config import UserError
from sae.distributed import Axis, arrange, balance
from sae.flags import Lost
from sae.formats import store
from sae.models import KINDS
from tests import world_runner
from tests.conftest import ROOT

LIMIT_S = 600  # of a machine that does much else


@pytest.fixture(scope="module")
def done(tmp_path_factory, gpt_path, text_file):
    """The folder in which four processes left all cases."""
    folder = tmp_path_factory.mktemp("world")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.world_runner", str(folder), gpt_path, str(text_file)]
    children = []
    for rank in range(4):
        with (folder / f"{rank}.log").open("w") as f:
            children.append(
                subprocess.Popen(command, cwd=ROOT, env={**env, "RANK": str(rank)}, stdout=f, stderr=subprocess.STDOUT)
            )
    deadline = time.monotonic() + LIMIT_S
    while any(c.poll() is None for c in children) and not any(c.poll() for c in children):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if any(c.poll() != 0 for c in children):
        time.sleep(1)
        for c in children:
            c.kill()
            c.wait()
        logs = "\n".join(f"process {r}: {(folder / f'{r}.log').read_text()[-1500:]}" for r in range(4))
        pytest.fail(f"the processes did not finish:\n{logs}")
    return folder


def metrics(folder, hookpoint, what):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r[what] for r in lines if r.get("hookpoint", hookpoint) == hookpoint and what in r]


def same_weights(one, other, tolerance):
    a, b = (files.read_safetensors(folder / store.WEIGHTS) for folder in (one, other))
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x - b[name]).norm() <= tolerance * x.norm(), name


# ------------------------------------------------------------------------------------- every cell


@pytest.mark.parametrize("layout", ["1x2", "2x1", "2x2", "plan"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_equal_those_of_one_process(done, kind, layout):
    """After 50 steps on the same global batches."""
    one, ours = done / f"{kind}_alone", done / f"{kind}_{layout}"
    for hookpoint in world_runner.WIDTHS if layout == "plan" else ("a",):
        same_weights(one / hookpoint, ours / hookpoint if layout == "plan" else ours, 1e-4)
        assert len(metrics(ours, hookpoint, "loss")) == 10
        for what in ("loss", "explained_variance", "l0", "dead_fraction", "grad_norm", "val_total_loss", "val_l0"):
            want = metrics(one, hookpoint, what)
            closer = what == "explained_variance" and not KINDS[kind].penalised
            assert metrics(ours, hookpoint, what) == pytest.approx(want, rel=0 if closer else 1e-4, abs=1e-5), what
    best = [files.read_torch(f / "best_model.pt") for f in (one / "a", ours / "a" if layout == "plan" else ours)]
    torch.testing.assert_close(best[1]["sae_state_dict"], best[0]["sae_state_dict"], rtol=1e-3, atol=1e-5)
    assert torch.equal(best[1]["feature_counts"], best[0]["feature_counts"])


def test_some_latents_died_and_auxk_took_part(done):
    for kind in ("topk", "abstopk", "batchtopk", "groupmax", "matryoshka"):
        assert max(metrics(done / f"{kind}_2x2", "a", "aux")) > 0, kind


def test_resume_on_other_numbers_of_processes(done):
    """4 (modules x latents) -> 2 replicas -> 1 -> a 2 x 2 mesh: the losses of the run that was never stopped."""
    one, ours = done / "uninterrupted", done / "resumed"
    assert [p.stem for p in checkpoints(ours)] == [f"checkpoint_step{n}" for n in (20, 40, 60, 80, 100, 120, 128)]
    assert (ours / "checkpoint_step20.part4of4.pt").is_file()
    assert not list(ours.glob("checkpoint_step60.part*"))
    for hookpoint in ("a", "b"):
        assert metrics(ours, hookpoint, "step") == metrics(one, hookpoint, "step")
        for what in ("loss", "val_total_loss", "n_passes", "l0", "dead_fraction"):
            want = metrics(one, hookpoint, what)
            assert metrics(ours, hookpoint, what) == pytest.approx(want, rel=1e-5, abs=1e-6), what
        same_weights(one / hookpoint, ours / hookpoint, 1e-5)


# ------------------------------------------------------------------------------------- single facts


@pytest.mark.parametrize("name", world_runner.OPTIONS)
def test_options_on_a_mesh(done, name):
    apart = json.loads((done / "options.json").read_text())[name]
    assert max(apart.values()) < 2e-4, apart


@pytest.mark.parametrize("case", [*KINDS, "transcoder"])
def test_bytes_on_the_wire_are_those_of_the_formula(done, case):
    got = json.loads((done / "bytes.json").read_text())[case]
    kind = "topk" if case == "transcoder" else case
    c = world_runner.config(kind, d_in=16, auxk_alpha=0.0, transcode=case == "transcoder")
    want = scale_model.wire_bytes(c, 2, 2)
    assert (got["data"], got["latents"]) == (want["data"], want["latents"])
    delivered = scale_model.delivery(world_runner.BATCH, [16, 16] if c.transcode else [16], 2)
    assert sum(got["everyone"]) == delivered + 4 * want["team"]  # here the team is everyone
    assert got["largest"] < 96 * 16 // 2, "a matrix of latents crossed"


def test_gradients_cross_once_however_many_parts_a_step_has(done):
    counted = json.loads((done / "bytes.json").read_text())
    assert counted["in parts"]["data"] == counted["topk"]["data"]


def test_activations_go_to_their_owner_and_to_nobody_else(done):
    """Two groups of two replicas: each activation crosses once, not to all."""
    counted = json.loads((done / "bytes.json").read_text())["plan"]
    assert sum(counted["everyone"]) == scale_model.delivery(world_runner.BATCH, [16, 24], 1)


def test_a_replica_that_differs_is_found(done):
    step, message = json.loads((done / "differing.json").read_text())
    assert step == 10
    assert "a: encoder is not the same on process 0 and process 1" in message


def test_a_live_model_and_evaluation(done):
    difference, reports = json.loads((done / "text.json").read_text())
    assert difference < 1e-5
    for n in ("3", "4"):
        assert reports[n].keys() == reports["1"].keys()
        for key, value in reports["1"].items():
            assert reports[n][key] == (pytest.approx(value, rel=1e-6) if isinstance(value, (float, dict)) else value)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_end_to_end_training_on_replicas(done, activation):
    apart, aux = json.loads((done / "end_to_end.json").read_text())[activation]
    assert max(apart.values()) < 1e-4, apart
    assert aux > 0


def test_selection_over_shards_is_exact(done):
    """Also where all of the largest lie on one shard, which offered too few at first, and where all are equal."""
    differences, least, n_kept = json.loads((done / "crowded.json").read_text())
    assert differences == pytest.approx([0, 0, 0], abs=1e-5)
    assert least == pytest.approx([1.0, -4.0, 0.1, 0.0])
    assert n_kept == [8, 8]


def test_the_mesh():
    assert arrange(8, n_saes=4, shard_latents=2, distribute_modules=True) == (4, 1, 2)
    assert arrange(8, n_saes=2, shard_latents=2, distribute_modules=True) == (2, 2, 2)
    assert arrange(3, n_saes=4, distribute_modules=True) == (3, 1, 1)
    assert arrange(6, n_saes=4, shard_latents=2) == (1, 3, 2)
    with pytest.raises(UserError, match="multiple of 4"):
        arrange(6, n_saes=1, shard_latents=4)
    with pytest.raises(UserError, match="3 SAEs do not go to 5 processes"):
        arrange(5, n_saes=3, distribute_modules=True)
    assert balance({"a": 1, "b": 9, "c": 4, "d": 5}, 2) == {"a": 0, "b": 0, "c": 1, "d": 1}
    assert [list(Axis(range(3), r).range(7)) for r in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]


# ------------------------------------------------------------------------------------- real commands


def command(folder, gpt_path, text_file, *flags, processes=2):
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    places = ["--model", gpt_path, "--dataset", str(text_file), "--save_dir", str(folder), "--run_name", "run"]
    sizes = "--layers 0 1 --k 4 --batch_size 64 --buffer_tokens 512 --max_tokens 16000 --val_tokens 500".split()
    how = "--save_every 20 --eval_every 100 --kernels plain".split()
    return [sys.executable, *torchrun, "-m", "scripts.sae_train", *places, *sizes, *how, *flags]


def test_a_dead_process_ends_the_run_and_another_number_goes_on(gpt_path, text_file, tmp_path):
    """torchrun, one of two processes killed; the others end soon with a sentence; one process ends the run."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as f:
        run = subprocess.Popen(
            command(tmp_path, gpt_path, text_file, "--shard_latents", "2"),
            cwd=ROOT,
            env=env,
            stdout=f,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + LIMIT_S
    while not checkpoints(tmp_path / "run") and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.02)
    assert run.poll() is None, (tmp_path / "log").read_text()
    workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(workers[-1]), 9)
    killed = time.monotonic()
    assert run.wait(timeout=60) != 0
    assert time.monotonic() - killed < 60
    text = (tmp_path / "log").read_text()
    assert "data axis" not in text
    assert "1 groups of SAEs x 1 replicas x 2 shards of latents" in text
    assert "another process of this run has ended" in text or "Signal 9" in text
    ended = subprocess.run(
        command(tmp_path, gpt_path, text_file, "--resume", processes=1),
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    steps = metrics(tmp_path / "run", "transformer.h.0", "step")
    assert steps == sorted(steps)
    assert steps[-1] == 250
    assert set(store.load_saes(tmp_path / "run")) == {"transformer.h.0", "transformer.h.1"}


def test_what_several_processes_cannot_do_is_said(gpt_path, text_file, tmp_path):
    for given in ("--shard_latents 2", "--distribute_modules"):
        ended = subprocess.run(
            command(tmp_path, gpt_path, text_file, *given.split(), processes=1),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 2
        assert f"{given} is for several processes; start them with torchrun" in ended.stderr


# torch.optim imports torch._dynamo late, in the midst of training. A thread of gloo that lets go of its last tensor
# while Python ends aborts the process, once in some hundred runs: none may be left.
ONE_OF_TWO = """
import os, sys, torch
from pathlib import Path
from sae import distributed
from sae.distributed import World
w = World(distributed.join(torch.device("cpu")), (1, 1, 2))
import torch._dynamo
said = f"{os.environ['LOCAL_RANK']} {w.shard} {w.latents.sum_(torch.ones(1)).item()}"
distributed.leave()
left = [name for t in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := t.read_text())]
Path(sys.argv[1], str(w.everyone.rank)).write_text(f"{said} {left}")
"""


def test_nodes_count_their_processes_apart(tmp_path):
    """Two torchruns of one process each, as on two machines: both have LOCAL_RANK 0, and they are two of one world."""
    (tmp_path / "one.py").write_text(ONE_OF_TWO)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torchrun = (
        f"-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --master_addr 127.0.0.1 --master_port {port}".split()
    )
    script = [str(tmp_path / "one.py"), str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = lambda i: subprocess.Popen([sys.executable, *torchrun, "--node_rank", str(i), *script], cwd=ROOT, env=env)
    nodes = [start(i) for i in range(2)]
    assert [node.wait(timeout=LIMIT_S) for node in nodes] == [0, 0]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["0 0 2.0 []", "0 1 2.0 []"]


def test_a_process_takes_the_gpu_of_its_own_number(monkeypatch):
    for name, value in {"WORLD_SIZE": "16", "RANK": "13", "LOCAL_RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert distributed.local_device(None) == distributed.local_device("cuda") == "cuda:5"
    assert distributed.local_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the launcher showed each process its own alone
    assert distributed.local_device(None) == "cuda:0"


def test_one_process_never_enters_a_collective(monkeypatch, tmp_path):
    """Nor under torchrun: what it would call is gone, and it trains, saves and resumes."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    collectives = "init_process_group all_reduce all_gather all_gather_object all_to_all_single broadcast barrier"
    for name in (*collectives.split(), "new_subgroups_by_enumeration"):
        monkeypatch.delattr(torch.distributed, name)
    everyone = distributed.join(torch.device("cpu"))
    assert everyone.size == 1
    for kind in KINDS:
        c = world_runner.config(kind, save_every=10, resample_every=5)
        t = world_runner.make(c, everyone, 1, 1, False, tmp_path / kind, steps=10)
        t.train(verbose=False)
        world_runner.make(c, everyone, 1, 1, False, tmp_path / kind, steps=10).load_checkpoint()


def test_of_an_error_that_all_have_one_speaks(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(log.time, "sleep", waited.append)

    def fail(argv):
        raise (UserError, Lost)[len(argv)]("this is wrong")

    for rank, lost, patient in (("0", [], 0), ("1", [], 1), ("0", ["-"], 0), ("1", ["-"], 0), ("2", ["-"], 1)):
        monkeypatch.setenv("RANK", rank)
        waited.clear()
        with pytest.raises(SystemExit) as e:
            log.run_script(fail, lost)
        assert e.value.code == 2
        assert len(waited) == patient, (rank, lost)
        assert capsys.readouterr().err.startswith("error: this" if rank == "0" else f"error (process {rank}): this")
