"""Triton's kernels choose what plain torch chooses, with proof, and compute what it computes; on CPUs, in Triton's
interpreter. A process of its own compiles them for an H100, which takes no GPU.

Run: python -m pytest tests/kernels/test_triton.py
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.kernels import native, selection, sparse

ROOT = Path(__file__).resolve().parents[2]
if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read where functions are defined, which is here
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from sae.kernels import triton_encoder, triton_kernels  # noqa: E402

del os.environ["TRITON_INTERPRET"]


pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.fixture
def interpreted(monkeypatch):
    """All kernels through the interpreter, which loses most of its time in two places: it looks through the whole of
    Triton's language again at every call of a function, and it adds up bits in loops where Triton sorts."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sparse, "interpreted", True)
    interpreter._patch_lang(tl.standard.sum.fn)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", lambda self, *a, **k: self.rewrite()(*a, **k))
    monkeypatch.setattr(tl, "sort", quick_sort)


def quick_sort(x, descending=False):
    data = np.sort(x.handle.data)
    return tl.tensor(interpreter.TensorHandle(data[::-1] if descending else data, x.handle.dtype), x.type)


slow_sort = tl.sort


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_best(x, W, b, k, indices, values, absolute=False):
    """No latent left out is better than one chosen, by more than what float32 can tell; values are those at indices."""
    exact = x.double() @ W.double() + b.double()
    blur = 1e-6 * (x.double().norm(dim=1, keepdim=True) * W.double().norm(dim=0).max() + b.double().abs().max())
    assert indices.shape == values.shape == (len(x), k)
    assert indices.dtype == torch.int64
    error = 2.0**-8 * exact.abs().max() if x.dtype == torch.bfloat16 else blur.max()
    torch.testing.assert_close(values.double(), exact.gather(1, indices), rtol=0, atol=float(error))
    assert all(len(set(row)) == k for row in indices.tolist())
    rank = exact.abs() if absolute else exact
    chosen = rank.gather(1, indices).min(1, keepdim=True).values
    others = rank.scatter(1, indices, -torch.inf).max(1, keepdim=True).values
    assert (others <= chosen + blur).all()


# --------------------------------------------------------------------------------------------------
# the encoder


def problems():
    x, W, b = randn(6, 127), randn(300, 127).t() / 11, randn(300) / 10
    outlier = x.clone()
    outlier[:, 5] += 3000.0
    skewed = W.t() * torch.logspace(-3, 3, 300)[:, None]
    close = W.t()[:1].repeat(300, 1) + 1e-6 * randn(300, 127)
    return {
        "plain": (x, W, b, 7),
        "k = 1": (x, W, b, 1),
        "one token": (x[:1], W, b, 7),
        "none": (x[:0], W, b, 7),
        "many kept": (x[:2], W, b, 125),
        "a tile and a bit": (x, W[:, :129], b[:129], 16),
        "a whole number of tiles": (x, W[:, :256], b[:256], 3),
        "outlier dimension": (outlier, W, b, 7),
        "latents of all sizes": (x, skewed.t(), b, 7),
        "all negative": (x, W, b - 1000, 7),
        "bias decides": (x * 1e-4, W, b, 7),
        "no activation": (x * 0, W, b, 7),
        "no weights": (x, W * 0, b, 7),
        "nearly equal latents": (x[:2], close.t(), b * 0, 7),
        "tiny": (x * 1e-20, W, b * 0, 7),
        "huge": (x * 1e15, W, b, 7),
        "strided": (randn(6, 254)[:, ::2], W.contiguous(), b, 7),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", problems())
def test_the_selection_is_the_best(name, dtype):
    x, W, b, k = problems()[name]
    x, W, absolute = x.to(dtype), W.to(dtype), dtype == torch.bfloat16
    indices, values, _ = triton_encoder.encode_top_k(x.contiguous(), W.t().contiguous(), b, k, absolute)
    if len(x):
        assert_best(x, W, b, k, indices, values, absolute)
    assert values.dtype == dtype


@pytest.mark.parametrize("absolute", [False, True])
def test_the_twins_selection_at_odd_sizes_through_the_front_door(absolute):
    x, W, b = randn(33, 127), randn(1001, 127).t() / 11, randn(1001) / 10
    indices, values = selection.choose_top_k(x, W, b, 7, absolute=absolute)
    want, of = selection.choose_top_k_reference(x, W, b, 7, absolute=absolute)
    assert torch.equal(indices, want)  # in the twin's order, too, which plain torch does not promise
    torch.testing.assert_close(values, of, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("absolute", [False, True])
def test_ties_go_to_the_first_latents_as_in_the_twin(absolute):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (8, 16), generator=g).float()  # whole numbers: no rounding, and ties all over
    W, b = torch.randint(-2, 3, (200, 16), generator=g).float().t(), torch.zeros(200)
    indices, values, _ = triton_encoder.encode_top_k(x, W.t(), b, 9, absolute)
    want, of = selection.choose_top_k_reference(x, W, b, 9, absolute=absolute)
    assert torch.equal(indices, want)
    assert torch.equal(values, of)


def test_equal_latents_by_the_hundred_are_looked_at_again():
    x, W, b = randn(2, 8), torch.ones(300, 8), torch.zeros(300)
    indices, _, again = triton_encoder.encode_top_k(x, W, b, 5, False)
    assert torch.equal(indices, torch.arange(5).expand(2, 5))
    assert again == 2


@pytest.mark.parametrize("k", [3, 4, 10])
def test_a_tile_that_hides_some_of_the_best_is_looked_at_again(k, monkeypatch):
    """Nine of the ten best lie in one tile of five, which keeps two; what the others kept counts as it is."""
    monkeypatch.setattr(triton_encoder, "_kept_of_tile", lambda *_: 2)
    x, W, b = randn(4, 24), 0.01 * randn(640, 24), torch.zeros(640)
    best = [600, 210, 200, 190, 180, 170, 160, 150, 140, 130]
    b[best] = torch.linspace(2, 1, 10)
    x[3] *= 100  # this token's best lie all over
    indices, values, again = triton_encoder.encode_top_k(x, W, b, k, False)
    assert_best(x, W.t(), b, k, indices, values)
    assert set(indices[0].tolist()) == set(best[:k])
    assert again >= 3


def test_second_looks_are_rare():
    x, W, b = randn(32, 64), randn(2048, 64), randn(2048)
    assert triton_encoder.encode_top_k(x, W, b, 16, False)[2] == 0


def test_a_token_that_is_not_finite_spoils_no_other():
    x, W, b, k = problems()["plain"]
    bad = x.clone()
    bad[3], bad[5, 0] = torch.nan, torch.inf
    with np.errstate(all="ignore"):
        indices, values, _ = triton_encoder.encode_top_k(bad, W.t().contiguous(), b, k, False)
    good = [0, 1, 2, 4]
    assert_best(x[good], W, b, k, indices[good], values[good])
    assert ((indices >= 0) & (indices < 300)).all()
    assert values[3].isnan().all()


def test_tritons_own_sort(monkeypatch):
    monkeypatch.setattr(tl, "sort", slow_sort)
    x, W, b, k = problems()["plain"]
    indices, values, _ = triton_encoder.encode_top_k(x[:1], W.t().contiguous(), b, k, False)
    assert_best(x[:1], W, b, k, indices, values)


def test_batch_top_k_and_above(monkeypatch):
    x, W, b = randn(40, 31), randn(301, 31).t(), randn(301)
    x[5] *= 30  # a token with far more than its share
    pre = x @ W + b
    ragged_to_dense = lambda found: sparse.Codes(*found).dense(301)
    for n in (1, 900):
        found = selection.choose_batch_top_k(x, W, b, n)
        cut = pre.flatten().topk(n).values.min()
        assert len(found[0]) == n
        torch.testing.assert_close(ragged_to_dense(found), pre * (pre >= cut), rtol=1e-5, atol=1e-4)
    for threshold in (torch.linspace(-1, 30, 301), torch.full((301,), -torch.inf), torch.full((301,), torch.inf)):
        found = selection.choose_above(x, W, b, threshold)
        torch.testing.assert_close(ragged_to_dense(found), pre * (pre > threshold), rtol=1e-5, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# sparse products


def gradients(f, *inputs, out_grad):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = f(*inputs)
    out.backward(out_grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("of_each", [False, True])  # a token has a bias of its own
@pytest.mark.parametrize("size", [(33, 127, 1001, 7), (3, 600, 40, 40), (7, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_those_of_float64(size, dtype, of_each):
    """Of a code and its decoding: choose_top_k, gather_pre, decode, against autograd of the plain formula."""
    B, D, n, K = size
    if dtype == torch.bfloat16:
        n = min(n, 150)
    x, W_enc, b_enc, W_dec = randn(B, D), randn(n, D) / D**0.5, randn(n) / 4, randn(n, D) / D**0.5
    b_dec = randn(B, D, seed=2) if of_each else randn(D)
    inputs = [t.to(dtype) for t in (x, W_enc, b_enc, W_dec, b_dec)]
    out_grad = randn(B, D, seed=1)
    chosen = selection.choose_top_k(inputs[0], inputs[1].t(), inputs[2], K)

    def fast(x, W, b, W_dec, b_dec):
        pre = sparse.gather_pre(x, W.t(), b, chosen[1], chosen[0])
        return sparse.decode(chosen[0], pre.relu(), W_dec, bias=b_dec)

    def plain(x, W, b, W_dec, b_dec):
        pre = (x @ W.t() + b).gather(1, chosen[0]).relu()
        return torch.zeros(B, n, dtype=pre.dtype).scatter(1, chosen[0], pre) @ W_dec + b_dec

    got = gradients(fast, *inputs, out_grad=out_grad)
    want = gradients(plain, *(t.double() for t in inputs), out_grad=out_grad)
    for name, a, b in zip(("out", "x", "W_enc", "b_enc", "W_dec", "b_dec"), got, want, strict=True):
        assert a.dtype == dtype
        relative = (a.double() - b).norm() / b.norm().clamp(min=1e-30)
        assert relative < (1e-5 if dtype == torch.float32 else 3e-2), f"{name}: {relative:.1e}"


def ragged(B, n, K):
    """Codes with as many latents per token as comes, none for the first and the last."""
    indices = torch.rand(B, n, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :K]
    keep = torch.rand(B, K, generator=torch.Generator().manual_seed(2)) < 0.5
    keep[[0, -1]] = False
    counts = keep.sum(1)
    values = randn(B, K)[keep]
    values[::3] = 0
    return indices[keep], counts.cumsum(0) - counts, values


def test_ragged_codes_equal_their_twins():
    indices, offsets, values = ragged(9, 30, 12)
    x, W, grad = randn(9, 33), randn(30, 33), randn(9, 33, seed=1)
    decode = lambda f: gradients(lambda v, W: f(indices, v, W, offsets), values, W, out_grad=grad)
    pre = sparse.at(x @ W.t(), indices, offsets)
    gather = lambda f: gradients(
        lambda x, W, b: f(x, W.t(), b, pre, indices, offsets), x, W, torch.zeros(30), out_grad=values
    )
    for fast, twin in (
        (decode(sparse.decode), decode(sparse.decode_reference)),
        (gather(sparse.gather_pre), gather(sparse.gather_pre_reference)),
    ):
        for got, want in zip(fast, twin, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    codes = sparse.Codes(indices, values, offsets)
    dense = sparse.Codes(None, codes.dense(30))
    for got, want in zip(codes.activity(30), dense.activity(30), strict=True):
        assert torch.equal(got, want)


def test_a_latent_of_many_tokens_is_summed_in_pieces():
    indices = torch.stack([torch.full((300,), 2), torch.arange(300) % 7], 1)
    indices[:, 1][indices[:, 1] == 2] = 6
    x, values = randn(300, 20), randn(300, 2)
    got = sparse._sum_by_latent(indices, None, values, x, 9)
    want = torch.zeros(300, 9).scatter_add(1, indices, values).t() @ x
    assert len(x) > 2 * triton_kernels.PIECE
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(got, sparse._sum_by_latent(indices, None, values, x, 9))


# --------------------------------------------------------------------------------------------------
# rows


def test_moments_equal_their_twin():
    x, y = randn(20, 37) + 1000, randn(20, 37, seed=1) + 1000
    for got, want in zip(sparse.moments(x, y), sparse.moments_reference(x, y), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_rows_are_projected_and_brought_to_unit_norm():
    W, grad = randn(30, 17), randn(30, 17, seed=1)
    W[4] = 0
    along = ((grad * W).sum(1) / W.square().sum(1).clamp(min=1e-24))[:, None] * W
    want, length = grad - along, W.norm(dim=1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(triton_kernels.squares(grad, W), want.double().square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(triton_kernels.squares(grad, None), grad.double().square().sum(), rtol=1e-6, atol=0)
    sparse.project_rows_(grad, W)
    torch.testing.assert_close(grad, want)
    rows = W.clone()
    torch.testing.assert_close(sparse.unit_rows_(rows), 1 / length)
    torch.testing.assert_close(rows, W / length)


@pytest.mark.parametrize("shape", [(30, 70), (5000,)], ids=str)
def test_adam_takes_torchs_steps_on_scaled_gradients(shape):
    p, want = randn(*shape), randn(*shape).requires_grad_()
    m, v, adam = torch.zeros(shape), torch.zeros(shape), torch.optim.Adam([want], lr=0.01, betas=(0.9, 0.98))
    for step, scale in enumerate((1.0, torch.tensor(0.1, dtype=torch.float64), 3.0), 1):
        grad = randn(*shape, seed=step)
        want.grad = grad * scale
        adam.step()
        triton_kernels.adam_(p, grad, m, v, step, 0.01, 0.9, 0.98, 1e-8, scale, False)
        torch.testing.assert_close(p, want.detach(), rtol=1e-5, atol=1e-6)


def test_moments_in_bfloat16_are_rounded_at_random():
    """A moment moves by less than bfloat16 can tell each time, and gets there on average; each kind by its own bits."""
    p, m, v = torch.zeros(20000), torch.ones(20000, dtype=torch.bfloat16), torch.ones(20000, dtype=torch.bfloat16)
    for step in range(1, 11):
        triton_kernels.adam_(p, torch.full_like(p, 1.1), m, v, step, 0.0, 0.99, 0.99, 1e-8, 1.0, False)
    for moment, goal in ((m, 1.1), (v, 1.21)):
        want = goal + (1 - goal) * 0.99**10
        assert abs(moment.float().mean() - want) < 0.03 * (want - 1)
    assert torch.corrcoef(torch.stack([m.float(), v.float()]))[0, 1].abs() < 0.05


def test_the_flag_turns_them_off(monkeypatch):
    monkeypatch.setattr(native, "enabled", False)
    assert sparse.compiled(torch.ones(1)) is None
    assert sparse.encoder(torch.ones(40, 1)) is None
    assert sparse.status(torch.device("cuda")) == "plain torch, as asked"


def test_other_types_are_left_to_plain_torch():
    assert sparse.compiled(torch.ones(1, dtype=torch.float64)) is None
    assert sparse.compiled(torch.ones(1), torch.ones(1, dtype=torch.float16)) is None


# --------------------------------------------------------------------------------------------------
# the compiler

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae.kernels import triton_encoder as encoder, triton_kernels as kernels

f, h, i, l, d, n, r = "*fp32", "*bf16", "*i32", "*i64", "*fp64", "i32", "fp32"

def compile(kernel, types, num_warps=4, **constants):
    kinds, names = iter(types), kernel.arg_names
    signature = {name: "constexpr" if name in constants else next(kinds) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in ("x", "W", "width")}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": 3})

tile = compile(encoder._candidates, [h, h, f, f, f, f, i, n, n, n, n], ABSOLUTE=False)
compile(encoder._above, [h, h, f, f, f, f, l, l, n, n, n, n], 8, N=64)
compile(encoder._round, [f, h, f, f, n, n, n], STORE=True, AT_ONCE=4, BLOCK=1024)
compile(encoder._sift, [i, f, f, f, i, i, n, n, n, n], ROOM=64, AT_ONCE=2, BLOCK=1024)
for N in (32, 512):
    compile(encoder._rank, [h, h, f, i, i, i, l, f, n, n, n, n, n, n], ABSOLUTE=True, N=N)
compile(kernels._bag, [l, l, f, f, f, f, n, n, n, n, n], WIDE=512)
compile(kernels._bag, [l, f, f, f, n, n, n, n, n], offsets=None, bias=None, WIDE=512)
compile(kernels._dot_at, [l, f, f, f, n, n, n, n], offsets=None)
compile(kernels._sum_pieces, [l, l, l, l, l, f, f, f, f, n, n], WIDE=512)
compile(kernels._add_pieces, [l, f, f, n], WIDE=512)
compile(kernels._activity, [l, l, f, l, l, n, n, n])
compile(kernels._moments, [f, f, d, d, n, n], ROWS=16, WIDE=128)
compile(kernels._squares, [f, f, f, n, n], ROWS=2, BLOCK=1024)
compile(kernels._squares, [f, f, n, n], W=None, ROWS=2, BLOCK=1024)
rows, numbers = dict(ROWS=2, BLOCK=1024), [n, n, n, r, r, r, r, r]
compile(kernels._step_rows, [f, f, h, h, d, f, *numbers], **rows)
compile(kernels._step_rows, [f, f, f, f, f, *numbers], factors=None, **rows)
compile(kernels._step_rows, [f, f, *numbers], m=None, v=None, scale=None, factors=None, **rows)
compile(kernels._step_rows, [f, f, *numbers], grad=None, m=None, v=None, scale=None, **rows)
print("wgmma" in tile.asm["ptx"], tile.metadata.shared)
"""


def test_all_compile_for_an_h100_and_the_product_runs_on_its_tensor_cores_twice_on_a_multiprocessor(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tensor_cores, shared = done.stdout.split()
    assert tensor_cores == "True"
    assert 2 * int(shared) <= 227 * 1024
