"""The C++ kernels choose what plain torch chooses, with proof, and compute what it computes; without them all works.

Run: python -m pytest tests/kernels/test_native.py
"""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from sae.kernels import native, selection, sparse

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("ninja") is None, reason="needs a C++ compiler and ninja"
)


@pytest.fixture
def encoder():
    """The compiled encoder; tests of what only it promises are left out on processors without one."""
    ops = sparse.encoder(torch.ones(32, 1))
    if ops is None:
        pytest.skip("no encoder for this processor")
    return ops


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@needs_compiler
def test_it_compiles_here():
    assert native.ops(torch.ones(1)) is not None
    assert native.status().startswith("C++")


def assert_best(x, W, b, k, indices, values, absolute=False):
    """No latent left out is better than one chosen, by more than what float32 can tell; values are those at indices."""
    exact = x.double() @ W.double() + b.double()
    size = x.double().norm(dim=1, keepdim=True) * W.double().norm(dim=0).max() + b[b.isfinite()].abs().max()
    blur = (1e-6 + len(W) * 2.0**-28) * size
    assert indices.shape == values.shape == (len(x), k)
    if not len(x):
        return
    torch.testing.assert_close(values.double(), exact.gather(1, indices), rtol=0, atol=float(blur.max()))
    assert all(len(set(row)) == k for row in indices.tolist())
    rank = exact.abs() if absolute else exact
    chosen = rank.gather(1, indices).min(1, keepdim=True).values
    others = rank.scatter(1, indices, -torch.inf).max(1, keepdim=True).values
    assert (others <= chosen + blur).all()


def problems():
    x, W, b = randn(33, 127), randn(1001, 127).t() / 11, randn(1001) / 10
    outlier = x.clone()
    outlier[:, 5] += 3000.0
    skewed = W.t() * torch.logspace(-3, 3, 1001)[:, None]
    close = W.t()[:1].repeat(1001, 1) + 1e-6 * randn(1001, 127)
    spikes = x + 500 * torch.eye(33, 127)
    thorns = W.t() + 20 * torch.eye(1001, 127)
    steep = torch.full((600, 8192), 0.1) * (1 - 2 * (torch.arange(600) < 50))[:, None]
    late = -W.abs() * (torch.arange(1001) < 500)
    return {
        "plain": (x, W, b, 7),
        "k = 1": (x, W, b, 1),
        "one token": (x[:1], W, b, 7),
        "a tile and a bit": (randn(33, 33), randn(37, 33).t(), randn(37), 2),
        "none": (x[:0], W, b, 7),
        "many tokens": (randn(700, 64), randn(300, 64).t(), randn(300), 30),
        "few latents": (x, W[:, :9], b[:9], 1),
        "outlier dimension": (outlier, W, b, 7),
        "latents of all sizes": (x, skewed.t(), b, 7),
        "all negative": (x, W, b - 1000, 7),
        "bias decides": (x * 1e-4, W, b, 7),
        "no activation": (x * 0, W, b, 7),
        "no weights": (x, W * 0, b, 7),
        "nearly equal latents": (x, close.t(), b * 0, 7),
        "a spike in every row": (spikes, thorns.t(), b, 7),
        "all kept": (x, W[:, :200], b[:200], 200),
        "blank latents beat negative ones": (x.abs(), late, b * 0, 5),
        "tiny": (x * 1e-27, W, b * 0, 7),
        "float32 loses what it can": (torch.ones(40, 8192) * torch.rand(40, 1), steep.t(), torch.zeros(600), 7),
        "strided": (randn(33, 254)[:, ::2], W.contiguous(), b, 7),
        "huge": (x * 1e15, W, b, 7),
    }


@needs_compiler
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("name", problems())
def test_the_selection_is_the_best(name, absolute):
    x, W, b, k = problems()[name]
    indices, values = selection.choose_top_k(x, W, b, k, absolute=absolute)
    assert_best(x, W, b, k, indices, values, absolute)


PROCESSORS = {"avx512bw": "-march=skylake-avx512", "avx2": "-march=haswell", "sse4_2": "-march=nehalem"}


@needs_compiler
@pytest.mark.parametrize("least", PROCESSORS)
def test_what_other_processors_run_chooses_the_same(least):
    """Without 8-bit products and, in turn, AVX512 and AVX2: tests of the C++ operations, compiled for these."""
    info = Path("/proc/cpuinfo")
    if least not in (info.read_text() if info.is_file() else "").split():
        pytest.skip(f"this processor has no {least}")
    asked = [PROCESSORS[least] if flag == "-march=native" else flag for flag in native._flags()]
    assert PROCESSORS[least] in asked
    code = (
        f"import sys, pytest; from sae.kernels import native; native._flags = lambda: {asked}; "
        "assert native.status().startswith('C++'), native.status(); "
        "files = ['tests/kernels/test_native.py', 'tests/kernels/test_sparse.py']; "
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *files, '-k', 'best or first_latents or thousand "
        "or few_tokens or twin or formula or finite or bounds or rules_out or read_with']))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


@needs_compiler
@pytest.mark.parametrize("absolute", [False, True])
def test_ties_go_to_the_first_latents_as_in_the_twin(absolute, encoder):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (40, 16), generator=g).float()  # whole numbers: no rounding, and ties all over
    W, b = torch.randint(-2, 3, (200, 16), generator=g).float().t(), torch.zeros(200)
    indices, values = selection.choose_top_k(x, W, b, 9, absolute=absolute)
    want, of = selection.choose_top_k_reference(x, W, b, 9, absolute=absolute)
    assert torch.equal(indices.sort(1).values, want.sort(1).values)
    assert torch.equal(values.sort(1).values, of.sort(1).values)


@needs_compiler
def test_the_best_are_found_where_rounding_moves_products_as_far_as_it_can(encoder):
    """Thresholds trust rounding not to; the proof at the end has to notice that they were too high."""
    low = torch.tensor([127.0, 100.51]).repeat(700, 1)  # in units of 1 the products round up by .49
    unit = 100.52 / 111.49
    high = torch.tensor([127 * unit, 100.52]).repeat(300, 1)  # in units of this they round down by as much
    x, W, b = torch.tensor([[0.0, 1.0]]).repeat(64, 1), torch.cat((low, high)).t(), torch.zeros(1000)
    indices, values, again = encoder.encode_top_k(x, W.t().contiguous(), b, 8, False)
    assert (indices.sort(1).values == torch.arange(700, 708)).all()
    assert (values == torch.tensor(100.52)).all()
    if "avx512_vnni" in native.cpuinfo("flags") and "-march=native" in native._flags():
        assert again > 0  # eight bits were tried, and refused


@needs_compiler
def test_equal_latents_by_the_thousand(encoder):
    x, W, b = randn(40, 8), torch.ones(8, 3000), torch.zeros(3000)
    indices, values = selection.choose_top_k(x, W, b, 5)
    assert torch.equal(indices.sort(1).values, torch.arange(5).expand(40, 5))


@needs_compiler
def test_every_other_path_chooses_the_same(monkeypatch):
    x, W, b, k = problems()["many tokens"]
    fast, values = selection.choose_top_k(x, W, b, k)
    monkeypatch.setattr(native, "enabled", False)
    plain, of = selection.choose_top_k(x, W, b, k)
    assert torch.equal(fast.sort(1).values, plain.sort(1).values)
    torch.testing.assert_close(values.sort(1).values, of.sort(1).values, rtol=1e-5, atol=1e-5)


def packed_problem(name):
    x, W, b, k = problems()[name]
    W = W.t().contiguous().t()
    packed = native.pack(W)
    assert packed.serves(x[:31], W, b)
    return x[:31].contiguous(), W, b, k, packed


@needs_compiler
@pytest.mark.parametrize("name", problems())
@pytest.mark.parametrize("absolute", [False, True])
def test_eight_bits_choose_the_same_for_few_tokens(name, absolute):
    x, W, b, k, packed = packed_problem(name)
    assert_best(x, W, b, k, *selection.choose_top_k(x, W, b, k, absolute=absolute, packed=packed), absolute)
    pre = (x.double() @ W.double() + b).float()
    floor = torch.full_like(b, float(pre.quantile(0.97)) if len(x) else 0.0)
    indices, values, offsets = selection.choose_above(x, W, b, floor, packed=packed)
    blur = 1e-6 * float((x.norm(dim=1).max() * W.norm(dim=0).max() + b.abs().max()) if len(x) else 0)
    found = sparse.Codes(indices, values, offsets)
    dense = found.dense(len(b))
    torch.testing.assert_close(dense[dense != 0], pre[dense != 0], rtol=1e-5, atol=blur)
    assert not ((pre > floor + blur) & (dense == 0)).any()
    assert (values > floor[0]).all()
    assert offsets.tolist() == [0, *(dense != 0).sum(1).cumsum(0).tolist()][: len(x)]


@needs_compiler
def test_eight_bits_of_other_weights_are_not_used(monkeypatch):
    x, W, b, k, packed = packed_problem("plain")
    assert not packed.serves(torch.cat((x, x)), W, b)
    bad = x.clone()
    bad[3], bad[17, 0] = torch.nan, torch.inf
    indices, values = selection.choose_top_k(bad, W, b, k, packed=packed)
    good = [i for i in range(31) if i not in (3, 17)]
    assert_best(x[good], W, b, k, indices[good], values[good])
    assert values[3].isnan().all()
    assert not packed.serves(x, W.t().clone().t(), b)
    assert native.pack(W).serves(x, W.neg_(), b) is False  # changed in place since
    with torch.inference_mode():
        assert native.pack(W.t().clone().t()) is None
    assert native.pack(W.contiguous()) is None  # the other layout: nothing would be saved
    monkeypatch.setattr(native, "enabled", False)
    assert native.pack(W) is None


@needs_compiler
def test_a_token_that_is_not_finite_spoils_no_other():
    x, W, b, k = problems()["plain"]
    bad = x.clone()
    bad[3], bad[17, 0] = torch.nan, torch.inf
    indices, values = selection.choose_top_k(bad, W, b, k)
    good = [i for i in range(33) if i not in (3, 17)]
    assert_best(x[good], W, b, k, indices[good], values[good])
    assert ((indices >= 0) & (indices < 1001)).all()
    assert values[3].isnan().all()


@needs_compiler
@pytest.mark.parametrize("every", [20, 250])
def test_latents_that_the_bias_rules_out(every):
    x, W, b, k = problems()["plain"]
    b = torch.where(torch.arange(1001) % every == 3, b, -torch.inf)  # fewer than k, and more
    for at, packed in ((33, None), (5, native.pack(W))):
        assert_best(x[:at], W, b, k, *selection.choose_top_k(x[:at], W, b, k, packed=packed))


@needs_compiler
@pytest.mark.parametrize("absolute", [False, True])
def test_what_has_no_bounds_is_chosen_as_in_torch(absolute):
    x, W, b, k = problems()["plain"]
    bad = x.clone()
    bad[3], bad[17, 0], bad[20, :3] = torch.nan, torch.inf, torch.tensor([torch.inf, -torch.inf, 1.0])
    for few in (False, True):
        packed = native.pack(W) if few else None
        at = [3, 17, 20, 5] if few else list(range(33))
        indices, values = selection.choose_top_k(bad[at], W, b, k, absolute=absolute, packed=packed)
        pre = bad[at] @ W + b
        sizes = lambda v: (v.abs() if absolute else v).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        torch.testing.assert_close(sizes(values).sort(1).values, sizes(pre).topk(k).values.flip(1))
        assert all(len(set(row)) == k for row in indices.tolist())


@needs_compiler
def test_a_rows_product_does_not_depend_on_how_many_are_read_with_it():
    for D in (1, 15, 97, 100, 111, 127):
        x, W = randn(4, D), randn(1, D).expand(40, D).contiguous()
        for n in range(1, 40):
            dots = torch.ops.nanosae.dot_at(torch.arange(n).repeat(4, 1), None, x, W)
            assert (dots == dots[:, :1]).all(), (D, n)


@needs_compiler
def test_second_looks_are_rare_where_tokens_are_alike(encoder):
    x, W, b = randn(2000, 64), randn(1000, 64).t(), randn(1000)
    assert encoder.encode_top_k(x, W.t(), b, 16, False)[2] < 200  # of 2000 tokens


@needs_compiler
@pytest.mark.parametrize("size", [(33, 127, 1001, 7), (1, 5, 9, 1), (300, 64, 40, 3)])
def test_sparse_products_equal_their_twins(size, monkeypatch):
    B, D, F, K = size
    x, W, values = randn(B, D), randn(F, D), randn(B, K)
    indices = torch.rand(B, F, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :K]
    values[0, 0] = 0  # its gradient is not
    first = torch.arange(B).mul_(3).clamp_(max=B * K)  # tokens with places of their own number
    flat = indices.reshape(-1), first, values.reshape(-1)
    run = lambda: (
        sparse._sum_by_latent(indices, None, values, x, F),
        sparse._dot_at(indices, None, x, W),
        *sparse._bag_backward(indices, None, values, x, W),
        *sparse._bag_backward(*flat, x, W),
    )
    fast = run()
    monkeypatch.setattr(native, "enabled", False)
    for got, want in zip(fast, run(), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@needs_compiler
def test_an_index_out_of_range_is_refused():
    with pytest.raises(RuntimeError, match="outside"):
        sparse.decode(torch.tensor([[0, 9]]), torch.ones(1, 2), torch.ones(3, 4))
    with pytest.raises(RuntimeError, match="outside"):
        sparse._sum_by_latent(torch.tensor([[0, 9]]), None, torch.ones(1, 2), torch.ones(1, 4), 3)
    with pytest.raises(RuntimeError, match="outside"):
        sparse._dot_at(torch.tensor([[-1]]), None, torch.ones(1, 4), torch.ones(3, 4))


@pytest.mark.parametrize("enabled", [True, False])
def test_moments_equal_their_twin(enabled, monkeypatch):
    monkeypatch.setattr(native, "enabled", enabled)
    x, y = randn(100, 37) + 1000, randn(100, 37, seed=1) + 1000
    for got, want in zip(sparse.moments(x, y), sparse.moments_reference(x, y), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("enabled", [True, False])
def test_rows_are_projected_and_brought_to_unit_norm(enabled, monkeypatch):
    monkeypatch.setattr(native, "enabled", enabled)
    W, grad = randn(30, 17), randn(30, 17, seed=1)
    W[4] = 0
    along = ((grad * W).sum(1) / W.square().sum(1).clamp(min=1e-24))[:, None] * W
    want, length = grad - along, W.norm(dim=1, keepdim=True).clamp(min=1e-12)
    sparse.project_rows_(grad, W)
    torch.testing.assert_close(grad, want)
    rows = W.clone()
    factors = sparse.unit_rows_(rows)
    torch.testing.assert_close(factors, 1 / length)
    torch.testing.assert_close(rows, W / length)


@pytest.mark.parametrize("enabled", [True, False])
def test_variance_equals_the_formula(enabled, monkeypatch):
    monkeypatch.setattr(native, "enabled", enabled)
    x = randn(50, 9) + 100
    want = (x.double() - x.double().mean(0)).square().sum(1).mean().float()
    torch.testing.assert_close(sparse.variance(x), want)


def test_square_norms_have_the_gradients_of_the_formula():
    x = randn(5, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(sparse.square_norms, (x,))
    torch.testing.assert_close(sparse.square_norms(x), x.square().sum(-1))


@needs_compiler
def test_bfloat16_products_and_doubles_take_the_plain_path():
    x, W, b, k = problems()["plain"]
    with torch.autocast("cpu", torch.bfloat16):
        assert native.ops(x) is None
        indices, _ = selection.choose_top_k(x, W, b, k)
    assert native.ops(x.double()) is None and native.ops(x.bfloat16()) is None
    exact, _ = selection.choose_top_k(x.double(), W.double(), b.double(), k)
    shared = [len(set(p) & set(q)) for p, q in zip(indices.tolist(), exact.tolist(), strict=True)]
    assert sum(shared) > 0.9 * 33 * k


def test_no_compiler_is_one_clear_sentence_and_all_goes_on(monkeypatch, tmp_path):
    def refuse():
        raise RuntimeError("Ninja is required to load C++ extensions (pip install ninja to get it)\nmore")

    monkeypatch.setattr(native, "_load", refuse)
    monkeypatch.setattr(torch.ops, "nanosae", types.SimpleNamespace())
    native._compiled.cache_clear()
    try:
        assert native.ops(torch.ones(1)) is None
        assert "plain torch" in native.status() and "Ninja is required" in native.status()
        assert "\n" not in native.status()
        x, W, b, k = problems()["plain"]
        W_dec = W.t().clone().requires_grad_()
        indices, values = selection.choose_top_k(x, W, b, k)
        assert_best(x, W, b, k, indices, values)
        sparse.decode(indices, values, W_dec).sum().backward()
        assert W_dec.grad[indices].sum() > 0
    finally:
        native._compiled.cache_clear()


@needs_compiler
def test_two_threads_compile_once(tmp_path):
    code = (
        "import threading, torch; from sae.kernels import native; flags = native._flags()[1:]\n"
        "native._flags = lambda: ['-O0', *flags]\n"
        "found = []; use = lambda: found.append(native.ops(torch.ones(1)) is not None)\n"
        "threads = [threading.Thread(target=use) for _ in range(2)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]; print(found)"
    )
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "[True, True]\n"), run.stderr[-2000:]


@needs_compiler
def test_compiled_once_and_kept_whole(tmp_path):
    """A second process loads what the first made; a damaged file is made anew; a folder that cannot be is no matter."""
    source = "from sae.kernels import native; print(native.ready(), native.status())"

    def run(folder):
        env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder)}
        return subprocess.run([sys.executable, "-c", source], cwd=ROOT, env=env, capture_output=True, text=True).stdout

    assert run(tmp_path).startswith("False C++")
    (library,) = (tmp_path / "nanosae").iterdir()
    assert run(tmp_path).startswith("True C++")
    whole = library.read_bytes()
    library.write_text("something else")
    assert "C++" in run(tmp_path)
    assert len(library.read_bytes()) == len(whole)
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file").startswith("False C++")
