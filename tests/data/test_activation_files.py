"""Collected activations of any kind read alike, mixed anew each pass, resumed to the bit, never held; bad ones refused.

Run: python -m pytest tests/data/test_activation_files.py
"""

import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae.config import UserError
from sae.data import cache
from sae.data.activation_files import FileSource, is_activation_file
from sae.data.activations import ModelSource, Stream, gather
from sae.data.cache import BlockSource, first_held_out
from sae.data.collector import ActivationCollector
from sae.data.datasets import open_dataset
from sae.data.tokens import TokenRows
from sae.formats import store
from scripts import sae_collect, sae_eval, sae_train
from tests.conftest import ROOT, SMALL, Evil, call, planted

ENDINGS = (".npy", ".h5", ".hdf5", ".pt", ".safetensors")


def numbered(n=60, d=4):
    """(n, d): rows that say which they are, in numbers that float16 and bfloat16 hold too."""
    return torch.arange(n, dtype=torch.float32)[:, None] + torch.arange(d) / 4


def write(path, x, name="acts"):
    """A tensor in a file of whatever kind the path ends in."""
    if path.suffix == ".npy":
        np.save(path, x.numpy())
    elif path.suffix in (".h5", ".hdf5"):
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as f:
            f[name] = x.numpy()
    elif path.suffix == ".pt":
        torch.save(x, path)
    else:
        save_file({name: x}, path)
    return path


def everything(source):
    """All rows of a pass, in the order they come."""
    blocks = []
    while acts := source.read():
        blocks.append(next(iter(acts.values())))
    return torch.cat(blocks)


# ------------------------------------------------------------------------------------- all kinds


@pytest.mark.parametrize("shape", [(60, 4), (12, 5, 4)], ids=["rows", "sequences"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_every_kind_gives_the_same_rows(tmp_path, ending, shape):
    path = write(tmp_path / f"acts{ending}", numbered().view(shape))
    source = FileSource(str(path), val_split=0.0, block_rows=7)
    assert source.widths == {"acts": 4}
    got = everything(source)
    assert got.dtype == torch.float32
    assert torch.equal(got, numbered())
    for start, stop in ((0, 60), (3, 4), (3, 12), (5, 20), (58, 60)):
        assert torch.equal(source.readers["acts"](start, stop), numbered()[start:stop])


@pytest.mark.parametrize(
    ("ending", "dtype"),
    [(e, d) for e in (".npy", ".h5", ".pt", ".safetensors") for d in (torch.float16, torch.float64)]
    + [(".pt", torch.bfloat16), (".safetensors", torch.bfloat16)],
)
def test_every_float_is_read_as_float32(tmp_path, ending, dtype):
    path = write(tmp_path / f"acts{ending}", numbered().to(dtype))
    got = everything(FileSource(str(path), val_split=0.0))
    assert got.dtype == torch.float32
    assert torch.equal(got, numbered())


def test_odd_layouts_of_npy_and_pt(tmp_path):
    np.save(tmp_path / "fortran.npy", np.asfortranarray(numbered().numpy()))
    np.save(tmp_path / "big_endian.npy", numbered().numpy().astype(">f4"))
    torch.save(numbered().t().contiguous().t(), tmp_path / "strided.pt")
    torch.save(numbered().requires_grad_(), tmp_path / "parameter.pt")
    for name in ("fortran.npy", "big_endian.npy", "strided.pt", "parameter.pt"):
        assert torch.equal(everything(FileSource(str(tmp_path / name), val_split=0.0)), numbered()), name


def test_torchs_old_format_is_read_whole_and_says_so(tmp_path, capsys):
    torch.save(numbered(), tmp_path / "old_format.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(everything(FileSource(str(tmp_path / "old_format.pt"), val_split=0.0)), numbered())
    assert "old format and read into memory whole" in capsys.readouterr().out


def test_what_the_collector_saved_is_read(lm, tmp_path):
    names = ["blocks.0.hook_resid_post", "transformer.h.1"]
    with ActivationCollector(lm.module, names, save_path=tmp_path) as collector:
        lm.module(torch.randint(0, 300, (2, 10)))
    source = FileSource(str(tmp_path), val_split=0.0)
    assert set(source.widths) == set(names)
    acts = gather(source, 20, "t")
    assert all(torch.equal(acts[name], collector.get_activations(name)) for name in names)


# ---------------------------------------------------------------------------------- several tensors


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_dict_is_several_hookpoints(tmp_path, ending, capsys):
    held = {"h.0": numbered(), "h.1": numbered(d=6), "ids": torch.arange(60)}
    path = tmp_path / f"dict{ending}"
    torch.save(held | {"note": "x"}, path) if ending == ".pt" else save_file(held, path)
    source = FileSource(str(path), seed=1)
    assert source.widths == {"h.0": 4, "h.1": 6}
    assert f"left out of 'dict{ending}', being no activations: 'ids' (int64" in capsys.readouterr().out.replace(
        "I64", "int64"
    )
    acts = source.read()
    assert torch.equal(acts["h.0"][:, 0], acts["h.1"][:, 0])  # the same rows of both
    assert FileSource(str(path), hookpoints=["h.1"]).widths == {"h.1": 6}
    assert FileSource(f"{path}:h.0").widths == {"h.0": 4}
    with pytest.raises(UserError, match=r"holds 'h.0' \(\[60, 4\]\).*, not 'h.2'; choose among these"):
        FileSource(str(path), hookpoints=["h.2"])
    with pytest.raises(UserError, match=r"'ids' in .* is (int64|I64) of shape \[60\]; \[sequences, positions, width\]"):
        FileSource(str(path), hookpoints=["ids"])


def test_several_datasets_in_an_h5_must_be_chosen_among(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "many.h5"
    with h5py.File(path, "w") as f:
        f["train/hidden_states"] = numbered(40).view(8, 5, 4).numpy()
        f["mask"] = np.ones((8, 5), dtype=bool)
    assert FileSource(str(path)).widths == {"train.hidden_states": 4}  # the only one that fits
    with h5py.File(path, "a") as f:
        f["test"] = numbered(40).numpy()
    with pytest.raises(UserError) as e:
        FileSource(str(path))
    assert f"choose one with {path}:test" in str(e.value)
    assert "'train/hidden_states' ([8, 5, 4])" in str(e.value)
    assert FileSource(f"{path}:/train/hidden_states", val_split=0.0).positions == 5
    assert FileSource(str(path), hookpoints=["test"]).widths == {"test": 4}
    with pytest.raises(UserError, match="different lengths"):
        FileSource(str(path), hookpoints=["test", "train/hidden_states"])


def test_names_lead_nowhere_else(tmp_path):
    hostile = {"../../escaped": numbered(), "/etc/x": numbered(), "..": numbered(), "a b": numbered()}
    torch.save(hostile, tmp_path / "x.pt")
    assert list(FileSource(str(tmp_path / "x.pt")).widths) == ["escaped", "etc.x", "activations", "a_b"]
    torch.save({"a/b": numbered(), "a.b": numbered()}, tmp_path / "twins.pt")
    with pytest.raises(UserError, match="two of the chosen tensors would be named 'a.b'"):
        FileSource(str(tmp_path / "twins.pt"))
    one = str(write(tmp_path / "one.npy", numbered()))
    assert FileSource(one, hook_point="transformer.h.1.mlp@in").widths == {"transformer.h.1.mlp@in": 4}
    for name in ("../x", "a/b", "a..b", "x@out"):
        with pytest.raises(UserError, match="is no name of a module"):
            FileSource(one, hook_point=name)
    with pytest.raises(UserError, match="names one hookpoint and 4 were chosen"):
        FileSource(str(tmp_path / "x.pt"), hook_point="h.1")


# ------------------------------------------------------------------------- order, resuming, splitting


def test_blocks_come_in_a_new_order_every_pass(tmp_path):
    source = FileSource(str(write(tmp_path / "a.npy", numbered(1000))), val_split=0.0, block_rows=10, seed=3)
    passes = []
    for _ in range(3):
        passes.append(everything(source)[:, 0].long().tolist())
        source.rewind()
    assert all(sorted(rows) == list(range(1000)) for rows in passes)  # each row once
    starts = [rows[::10] for rows in passes]
    assert starts[0] != starts[1] != starts[2] != starts[0]
    assert all(rows[i : i + 10] == list(range(rows[i], rows[i] + 10)) for rows in passes for i in range(0, 1000, 10))
    again = FileSource(str(tmp_path / "a.npy"), val_split=0.0, block_rows=10, seed=3)
    assert everything(again)[:, 0].long().tolist() == passes[0]
    other = FileSource(str(tmp_path / "a.npy"), val_split=0.0, block_rows=10, seed=4)
    assert everything(other)[:, 0].long().tolist() != passes[0]


@pytest.mark.parametrize("ending", [".npy", ".h5", ".pt", ".safetensors"])
def test_resume_is_bit_exact_across_passes(tmp_path, ending):
    path = str(write(tmp_path / f"a{ending}", numbered(500)))
    make = lambda: Stream(
        FileSource(path, val_split=0.0, block_rows=16, seed=5), n_tokens=1400, batch_size=20, buffer_tokens=100, seed=5
    )
    want = [batch["a" if ending in (".npy", ".pt") else "acts"].clone() for batch in make()]
    for done in (1, 30, 60):  # in each of the three passes
        first, second = make(), make()
        for _ in range(done):
            next(first)
        second.load_state_dict(first.state_dict(), [first.held_dict()])
        got = [next(iter(batch.values())).clone() for batch in second]
        assert len(got) == 70 - done
        assert all(torch.equal(a, b) for a, b in zip(got, want[done:], strict=True))


@pytest.mark.parametrize("block_rows", [3, 10, 64])
def test_whole_sequences_are_held_out(tmp_path, block_rows):
    path = str(write(tmp_path / "a.npy", numbered(100).view(20, 5, 4)))
    source = FileSource(path, val_split=0.1, block_rows=block_rows, seed=0)
    train, val = (sorted(everything(s)[:, 0].tolist()) for s in (source, source.held_out()))
    assert (train, val) == (list(range(90)), list(range(90, 100)))
    assert (len(source), len(source.held_out())) == (90, 10)


def test_of_bare_rows_the_last_ones_are_held_out(tmp_path):
    source = FileSource(str(write(tmp_path / "a.npy", numbered(100))), val_split=0.07)
    assert everything(source.held_out())[:, 0].tolist() == list(range(93, 100))
    assert [first_held_out(n, 0.05) for n in (1, 2, 5, 100)] == [1, 1, 4, 95]
    assert first_held_out(7, 0.0) == 7
    assert first_held_out(7, 0.999) == 1


def test_blocks_keep_to_sequences_and_to_a_size():
    read = lambda start, stop: torch.zeros(stop - start, 4)
    source = BlockSource({"x": read}, {"x": 4}, 1000, 1000, where="x", positions=30, block_rows=100)
    assert source.block_rows == 90
    wide = BlockSource({"x": read}, {"x": 1 << 20}, 1000, 1000, where="x")
    assert wide.block_rows * 4 << 20 == cache.BLOCK_BYTES


# ----------------------------------------------------------------------------------------- bad files


def bad_files(folder):
    x = numbered()
    np.save(folder / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    (folder / "pickle.npy").write_bytes(pickle.dumps(x.numpy()))
    np.savez(folder / "archive.npz", x=x.numpy())
    (folder / "archive.npz").rename(folder / "archive.npy")
    (folder / "text.pt").write_text("hello")
    (folder / "empty.npy").touch()
    (folder / "empty.pt").touch()
    torch.save({"x": Evil()}, folder / "hostile.pt")
    torch.save([x], folder / "list.pt")
    torch.save({"n": 1}, folder / "no_tensor.pt")
    torch.save(x.to_sparse(), folder / "sparse.pt")
    torch.save({f"x{i}": torch.arange(3) for i in range(30)}, folder / "ids.pt")
    for name, bad in (
        ("ints", x.int()),
        ("flat", x[0]),
        ("deep", x.view(3, 5, 4, 4)),
        ("none", x[:0]),
        ("thin", x[:, :0]),
    ):
        write(folder / f"{name}.npy", bad)
        write(folder / f"{name}.safetensors", bad)
    for kind in (".npy", ".h5", ".pt", ".safetensors"):
        cut = write(folder / f"cut{kind}", numbered(5000))
        cut.write_bytes(cut.read_bytes()[:40_000])
    torch.save({"a": x, "b": x[:30]}, folder / "unequal.pt")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.npy", "does not exist; give a .npy"),
        ("object.npy", "Python objects in dtype"),
        ("pickle.npy", "pickled"),
        ("archive.npy", "it is an archive, not one array"),
        ("empty.npy", "No data left in file"),
        ("empty.pt", "is damaged"),
        ("text.pt", "is damaged"),
        ("hostile.pt", "is refused: it wants to run code"),
        ("list.pt", "holds a list; a tensor, or a dict of tensors, was wanted"),
        ("no_tensor.pt", "holds a dict; a tensor"),
        ("sparse.pt", "torch.sparse_coo float32 of shape [60, 4]"),
        ("ids.pt", "int64 of shape [3]"),
        ("ints.npy", "int32 of shape [60, 4]); [sequences, positions, width] or [tokens, width] of float16"),
        ("ints.safetensors", "I32 of shape [60, 4]"),
        ("flat.npy", "float32 of shape [4]"),
        ("deep.npy", "float32 of shape [3, 5, 4, 4]"),
        ("none.npy", "empty (shape [0, 4])"),
        ("none.safetensors", "empty (shape [0, 4])"),
        ("thin.npy", "empty (shape [60, 0])"),
        ("cut.npy", "cannot be read (mmap length is greater than file size)"),
        ("cut.h5", "truncated file"),
        ("cut.pt", "is damaged"),
        ("cut.safetensors", "cannot be read"),
        ("unequal.pt", "different lengths ('a' [60, 4], 'b' [30, 4])"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    bad_files(tmp_path)
    with pytest.raises(UserError) as e:
        FileSource(str(tmp_path / name))
    assert words in str(e.value)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 700
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("ending", [".npy", ".h5", ".pt", ".safetensors"])
def test_nan_is_found_while_reading_and_placed(tmp_path, ending):
    x = numbered()
    x[37, 2] = torch.nan
    source = FileSource(str(write(tmp_path / f"a{ending}", x)), val_split=0.0, block_rows=10)
    assert len(source.read()) == 1
    with pytest.raises(UserError, match=r"row 37 of '\w+' in '.*' holds NaN or infinity"):
        everything(source)
    source = FileSource(str(write(tmp_path / f"b{ending}", x.view(12, 5, 4))), val_split=0.0, seed=1)
    with pytest.raises(UserError, match=r"row 37 \(sequence 7, position 2\)"):
        everything(source)


def test_what_float32_cannot_hold_is_told(tmp_path):
    x = numbered().double()
    x[3] = 1e300
    for ending in (".npy", ".pt"):
        with pytest.raises(UserError, match="row 3 of 'a' .* infinity as float32"):
            everything(FileSource(str(write(tmp_path / f"a{ending}", x))))


@pytest.mark.parametrize("ending", [".npy", ".pt", ".safetensors"])
def test_a_file_that_shrinks_while_in_use(tmp_path, ending):
    path = write(tmp_path / f"a{ending}", numbered(5000))
    source = FileSource(str(path), block_rows=100)
    source.read()
    short = path.read_bytes()[:1000]
    path.unlink()
    path.write_bytes(short)
    with pytest.raises(UserError, match="cannot be read at row 100|is damaged, cut short") as e:
        source.read()
    assert "\n" not in str(e.value)


def test_without_h5py_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.h5").touch()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"pip install 'nanosae\[h5\]'"):
        FileSource(str(tmp_path / "a.h5"))


def test_which_paths_are_files(tmp_path):
    assert is_activation_file("x/a.npy")
    assert is_activation_file("a.h5:layer 3/x")
    assert not is_activation_file("activations/default")
    assert not is_activation_file("a.bin")
    (tmp_path / "cache.pt").mkdir()
    assert not is_activation_file(str(tmp_path / "cache.pt"))
    np.save(tmp_path / "a.npy:b.npy", numbered().numpy())  # a colon in a name is no name of a tensor
    assert FileSource(str(tmp_path / "a.npy:b.npy")).widths == {"a.npy_b": 4}


def test_provenance_tells_a_changed_file(tmp_path):
    path = write(tmp_path / "a.npy", numbered(200_000))
    was = FileSource(str(path)).provenance()
    assert (was["file"], was["file_bytes"]) == ("a.npy", path.stat().st_size)
    assert was["tensors"] == {"a": {"shape": [200_000, 4], "dtype": "float32"}}
    assert str(tmp_path) not in str(was)
    for at in (200, -8):
        raw = bytearray(path.read_bytes())
        raw[at] ^= 1
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / "a.npy").write_bytes(raw)
        changed = FileSource(str(tmp_path / "b" / "a.npy")).provenance()
        assert changed["file_ends_sha256"] != was["file_ends_sha256"]


# -------------------------------------------------------------------------------------------- memory

PASS = """
import resource, sys, torch
from sae.activation_files import FileSource
from sae.activations import Stream
unit = 2**20 if sys.platform == "darwin" else 2**10
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
before = peak()
for path in sys.argv[1:]:
    source = FileSource(path, val_split=0.0, seed=0)
    for batch in Stream(source, n_tokens=len(source), batch_size=1024, buffer_tokens=8192):
        pass
print(peak() - before)
"""


def test_a_large_file_is_never_held(tmp_path):
    """A pass over two sparse files of 400 MB adds less than 200 MB to the process, its 16 MB buffer included."""
    shape, size = (200_000, 512), 200_000 * 512 * 4
    np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.float32, shape=shape).flush()
    header = b'{"x":{"dtype":"F32","shape":[200000,512],"data_offsets":[0,409600000]}}'
    with (tmp_path / "a.safetensors").open("wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + size)
    files = [str(tmp_path / "a.npy"), str(tmp_path / "a.safetensors")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", PASS, *files], env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 200


# ------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("ending", [".npy", ".h5", ".pt", ".safetensors"])
def test_train_on_a_file(here, capsys, ending):
    x, _ = planted(3000, 16, 32, 3)
    write(here / f"acts{ending}", x.view(300, 10, 16) if ending == ".h5" else x)
    assert call(sae_train, "--activations", f"acts{ending}", *SMALL) == 0
    said = capsys.readouterr().out
    assert ("its last 150 rows are held out" in said) == (ending != ".h5")
    assert "training on 640 of 2,850 collected tokens" in said and "next:" not in said  # which model is not known
    run = here / "sae_models" / "acts"
    metadata = json.loads((run / "cfg.json").read_text())["metadata"]
    assert (metadata["hookpoint"], metadata["activations_file"]) == ("acts", f"acts{ending}")
    assert metadata["provenance"]["file"] == f"acts{ending}"
    assert str(here) not in (run / "cfg.json").read_text()
    assert call(sae_eval) == 2
    assert f"was trained on 'acts{ending}', which names no model; give --model and --dataset" in capsys.readouterr().err
    again = ["--activations", f"acts{ending}", *SMALL, "--overwrite", "--max_tokens", 4000]
    assert call(sae_train, *again) == 0
    assert (
        "training on all 2,850 collected tokens but those held out; --num_epochs goes over them again"
        in capsys.readouterr().out
    )
    assert call(sae_train, *again, "--num_epochs", 2) == 0
    assert "collected tokens" not in capsys.readouterr().out  # more than was asked for


def test_several_tensors_several_saes_and_epochs(here):
    x, _ = planted(1000, 16, 32, 3)
    torch.save({"h.0": x, "h.1": x * 2, "h.2": x}, "acts.pt")
    flags = ["--activations", "acts.pt", "--hookpoints", "h.0", "h.1", *SMALL, "--max_tokens", 10_000]
    assert call(sae_train, *flags, "--run_name", "r", "--num_epochs", 3) == 0
    assert list(store.load_saes(here / "sae_models" / "r")) == ["h.0", "h.1"]
    lines = [json.loads(line) for line in (here / "sae_models" / "r" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 950 * 3 // 64
    assert [line for line in lines if "n_passes" in line][-1][
        "n_passes"
    ] == 2  # each epoch is a pass in an order of its own


@pytest.mark.parametrize("kind", ["file", "cache"])
def test_a_run_on_collected_activations_resumes_to_the_bit(here, gpt_path, text_file, capsys, kind):
    if kind == "file":
        write(here / "acts.npy", planted(1000, 16, 32, 3)[0])
        acts = "acts.npy"
    else:
        acts = "acts"
        flags = ["--model", gpt_path, "--dataset", text_file, "--layer", 1, "--max_tokens", 1000, "--output_dir", acts]
        assert call(sae_collect, *flags) == 0
    flags = ["--activations", acts, *SMALL, "--max_tokens", 10_000, "--num_epochs", 3, "--save_every", 30]
    assert call(sae_train, *flags, "--run_name", "a") == 0
    shutil.copytree("sae_models/a", "whole")
    (here / "sae_models" / "a" / "checkpoint_step44.pt").unlink()
    assert call(sae_train, *flags, "--run_name", "a", "--resume") == 0
    assert "at step 30" in capsys.readouterr().out
    whole, resumed = (store.load_sae(here / run) for run in ("whole", "sae_models/a"))
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    if kind == "file":
        write(here / "acts.npy", planted(1000, 16, 32, 3, seed=1)[0])
        assert call(sae_train, *flags, "--run_name", "a", "--resume") == 2
        assert "file_ends_sha256 has changed since" in capsys.readouterr().err


def test_an_sae_from_a_file_is_evaluated_in_the_model_it_names(here, gpt_path, text_file, lm, capsys):
    rows = gather(ModelSource(TokenRows(lm, open_dataset(str(text_file)), "train", 32), ["transformer.h.1"]), 2000, "t")
    write(here / "acts.npy", rows["transformer.h.1"])
    assert call(sae_train, "--activations", "acts.npy", *SMALL, "--hook_point", "blocks.1.hook_resid_post") == 0
    model = ["--model", gpt_path, "--dataset", text_file, "--eval_tokens", 200]
    assert call(sae_eval, *model) == 0
    report = json.loads((here / "sae_models" / "blocks.1.hook_resid_post" / "eval.json").read_text())
    assert report["hookpoint"] == "transformer.h.1"
    assert report["explained_variance"] > 0.3  # of this place and no other
    assert call(sae_train, "--activations", "acts.npy", *SMALL) == 0
    assert call(sae_eval, *model) == 2
    assert "'acts' matches no module" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere.npy"], "'nowhere.npy' does not exist"),
        (["acts.npy", "--layer", "3"], "not by layer"),
        (["acts.npy", "--hookpoints", "h.1"], "holds 'acts' ([1000, 16]), not 'h.1'"),
        (["acts.npy:h.1"], "holds 'acts' ([1000, 16]), not 'h.1'"),
        (["acts.npy:acts", "--hookpoints", "acts"], "names a tensor and --hookpoints was given too"),
        (["acts.npy", "--hook_point", "../x"], "is no name of a module"),
        (["acts.npy", "--d_in", "7"], "--d_in 7 was given and 'acts' is 16 wide"),
        (["acts.bin"], "is not a cache of activations"),
        (["nan.npy"], "of 'nan' in 'nan.npy' holds NaN"),
        (["tiny.npy"], "do not fill one batch"),
    ],
)
def test_bad_files_leave_nothing(here, capsys, flags, words):
    x = planted(1000, 16, 32, 3)[0]
    write(here / "acts.npy", x)
    write(here / "tiny.npy", x[:3])
    write(here / "nan.npy", x * torch.nan)
    assert call(sae_train, "--activations", *flags, *SMALL, "--max_tokens", 10_000) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err
    assert not [p for p in here.rglob("*") if p.is_file() and p.suffix != ".npy"]


def test_collecting_for_transcoders_takes_what_goes_in_too(here, gpt_path, text_file, lm):
    base = ["--model", gpt_path, "--dataset", text_file, "--max_tokens", 500, "--transcode"]
    given = ["--hookpoints", "transformer.h.1.mlp", "transformer.h.1.mlp@in", "transformer.h.0"]
    assert call(sae_collect, *base, *given, "--output_dir", "acts") == 0
    source = cache.CacheSource("acts", val_split=0.0)
    names = ["transformer.h.0", "transformer.h.0@in", "transformer.h.1.mlp", "transformer.h.1.mlp@in"]
    assert sorted(source.widths) == names
    got = gather(source, 500, "t")
    want = gather(ModelSource(TokenRows(lm, open_dataset(str(text_file)), "train", 256), names), 500, "t")
    assert all(torch.equal(got[n], want[n]) for n in names)
    with torch.no_grad():
        again = lm.module.transformer.h[1].mlp(got["transformer.h.1.mlp@in"])
    torch.testing.assert_close(again, got["transformer.h.1.mlp"])  # the rows of a pair belong together
