"""The sparse operations equal their dense twins, forward and backward, at odd sizes; codes count what they say.

Run: python -m pytest tests/kernels/test_sparse.py
"""

import pytest
import torch

from sae.kernels import native, selection, sparse
from sae.kernels.sparse import Codes

SIZES = [(33, 127, 1001, 7), (1, 5, 9, 9), (64, 32, 64, 1), (7, 3, 2, 2)]  # B, D, F, K


def problem(B, D, F, K, dtype=torch.float64):
    g = torch.Generator().manual_seed(B * 1000 + F)
    r = lambda *s: torch.randn(*s, generator=g, dtype=dtype)
    x, W_enc, b_enc, W_dec = r(B, D), r(F, D).t(), r(F), r(F, D)
    indices = torch.rand(B, F, generator=g).argsort(1)[:, :K]
    return x, W_enc, b_enc, W_dec, indices, r(B, K), r(B, D)


def gradients(f, *inputs, out_grad):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = f(*inputs)
    out.backward(out_grad)
    return [out.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gather_pre_equals_its_twin(size, dtype):
    x, W_enc, b_enc, _, indices, grad, _ = problem(*size, dtype=dtype)
    values = (x @ W_enc + b_enc).gather(1, indices)
    run = lambda f: gradients(lambda x, W, b: f(x, W, b, values, indices), x, W_enc, b_enc, out_grad=grad)
    for got, want in zip(run(sparse.gather_pre), run(sparse.gather_pre_reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 if dtype is torch.float32 else 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_centre_of_gather_pre_has_the_gradient_of_its_twin(dtype):
    x, W_enc, b_enc, _, indices, grad, _ = problem(*SIZES[0], dtype=dtype)
    centre = x.mean(0) + 1
    values = ((x - centre) @ W_enc + b_enc).gather(1, indices)
    run = lambda f: gradients(
        lambda c, W, b: f(x - centre, W, b, values, indices, centre=c), centre, W_enc, b_enc, out_grad=grad
    )
    for got, want in zip(run(sparse.gather_pre), run(sparse.gather_pre_reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3 if dtype is torch.float32 else 1e-10)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("of_each", [False, True])  # a token has a bias of its own
def test_decode_equals_its_twin(size, dtype, of_each):
    _, _, _, W_dec, indices, values, grad = problem(*size, dtype=dtype)
    bias = 2 * grad if of_each else grad[0]
    run = lambda f: gradients(lambda v, W, b: f(indices, v, W, bias=b), values, W_dec, bias, out_grad=grad)
    for got, want in zip(run(sparse.decode), run(sparse.decode_reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 if dtype is torch.float32 else 1e-10)


def ragged(size, dtype=torch.float64):
    """The problem with as many latents per token as comes: about half of the places, tokens without any included."""
    x, W_enc, b_enc, W_dec, indices, values, grad = problem(*size, dtype=dtype)
    keep = torch.rand(indices.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[0] = False
    keep[-1] = False
    counts = keep.sum(1)
    return x, W_enc, b_enc, W_dec, indices[keep], counts.cumsum(0) - counts, values[keep], grad


@pytest.mark.parametrize("size", [SIZES[0], SIZES[2]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ragged_codes_equal_their_twins(size, dtype):
    x, W_enc, b_enc, W_dec, indices, offsets, values, grad = ragged(size, dtype)
    pre = sparse.at(x @ W_enc + b_enc, indices, offsets)
    gather = lambda f: gradients(
        lambda x, W, b: f(x, W, b, pre, indices, offsets), x, W_enc, b_enc, out_grad=torch.ones_like(values) + values
    )
    decode = lambda f: gradients(lambda v, W: f(indices, v, W, offsets), values, W_dec, out_grad=grad)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-10
    for fast, twin in (
        (gather(sparse.gather_pre), gather(sparse.gather_pre_reference)),
        (decode(sparse.decode), decode(sparse.decode_reference)),
    ):
        for got, want in zip(fast, twin, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=tolerance)
    codes = Codes(indices, values, offsets)
    dense = Codes(None, codes.dense(size[2]))
    for got, want in zip(codes.activity(size[2]), dense.activity(size[2]), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(codes.sparse(size[2]).dense(size[2]), dense.values)


@pytest.mark.parametrize("enabled", [True, False])
def test_batch_top_k_and_above(enabled, monkeypatch):
    monkeypatch.setattr(native, "enabled", enabled)
    g = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(90, 31, generator=g), torch.randn(301, 31, generator=g).t(), torch.randn(301, generator=g)
    x[5] *= 30  # a token with far more than its share
    pre = x @ W + b
    ragged_to_dense = lambda found: Codes(found[0], found[1], found[2]).dense(301)
    for n in (1, 40, 2000, 90 * 301):
        found = selection.choose_batch_top_k(x, W, b, n)
        cut = pre.flatten().topk(n).values.min()
        assert len(found[0]) == n
        torch.testing.assert_close(ragged_to_dense(found), pre * (pre >= cut), rtol=1e-5, atol=1e-4)
    assert len(selection.choose_batch_top_k(x[:3], W, b, 10**6)[0]) == 3 * 301
    assert len(selection.choose_batch_top_k(x[:0], W, b, 40)[0]) == 0
    assert selection.choose_batch_top_k(x * torch.nan, W, b, 40)[1].isnan().all()  # the loss then shows it
    assert selection.choose_group_max(x[:0], W, b, 7)[0].shape == (0, 43)
    for threshold in (torch.full((301,), 0.5), torch.linspace(-1, 30, 301), torch.full((301,), -torch.inf)):
        found = selection.choose_above(x, W, b, threshold)
        torch.testing.assert_close(ragged_to_dense(found), pre * (pre > threshold), rtol=1e-5, atol=1e-4)
    assert len(selection.choose_above(x, W, b, torch.full((301,), 1e9))[0]) == 0


def test_a_latent_named_twice_counts_twice():
    W_dec = torch.eye(3)
    indices, values = torch.tensor([[1, 1]]), torch.tensor([[2.0, 3.0]])
    assert sparse.decode(indices, values, W_dec).tolist() == [[0.0, 5.0, 0.0]]
    assert sparse.decode_reference(indices, values, W_dec).tolist() == [[0.0, 5.0, 0.0]]


def test_second_derivatives_are_refused_rather_than_wrong():
    x, W_enc, b_enc, W_dec, indices, values, _ = problem(5, 6, 9, 2, dtype=torch.float32)
    uses = {
        W_enc.requires_grad_(): lambda W: sparse.gather_pre(x, W, b_enc, values, indices),
        W_dec.requires_grad_(): lambda W: sparse.decode(indices, values, W),
    }
    for weights, use in uses.items():
        (grad,) = torch.autograd.grad(use(weights).square().sum(), weights, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_backward_is_deterministic_to_the_bit():
    x, W_enc, b_enc, _, indices, grad, _ = problem(200, 40, 300, 8, dtype=torch.float32)
    pre = (x @ W_enc + b_enc).gather(1, indices)
    run = lambda: gradients(lambda W: sparse.gather_pre(x, W, b_enc, pre, indices), W_enc, out_grad=grad)[1]
    assert torch.equal(run(), run())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # plain torch, and C++ where there is a compiler
def test_both_gradients_of_a_step_take_one_sort_of_its_latents(dtype, monkeypatch):
    x, W_enc, b_enc, W_dec, indices, _, _ = problem(20, 8, 30, 5, dtype)
    sort, sorted_ = sparse._by_latent, []
    monkeypatch.setattr(sparse, "_by_latent", lambda *a: sorted_.append(sort(*a)) or sorted_[-1])
    weights = [t.requires_grad_() for t in (W_enc, b_enc, W_dec)]
    pre = sparse.gather_pre(x, W_enc, b_enc, (x @ W_enc + b_enc).detach().gather(1, indices), indices)
    sparse.decode(indices, pre.relu(), W_dec).square().sum().backward()
    chosen = torch.zeros(20, 30, dtype=dtype).scatter(1, indices, 1.0)
    want = torch.autograd.grad(((x @ W_enc + b_enc).relu() * chosen @ W_dec).square().sum(), weights)
    torch.testing.assert_close([w.grad for w in weights], list(want), rtol=1e-4, atol=1e-4)
    assert len(sorted_) == 2 and sorted_[0] is sorted_[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sort_serves_the_latents_it_was_made_of_alone(dtype):
    x, values = torch.eye(4, dtype=dtype), torch.ones(8, dtype=dtype)
    indices, offsets = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0]), torch.tensor([0, 2, 4, 6])
    sums = lambda n=3: sparse._sum_by_latent(indices, offsets, values, x, n).int().tolist()
    assert sums() == [[1, 1, 0, 2], [1, 0, 1, 0], [0, 1, 1, 0]] and sums(4) == [*sums(), [0] * 4]
    indices[0] = 2
    assert sums() == [[0, 1, 0, 2], [1, 0, 1, 0], [1, 1, 1, 0]]
    offsets[1] = 1
    assert sums() == [[0, 1, 0, 2], [0, 1, 1, 0], [1, 1, 1, 0]]
    offsets = torch.tensor([0, 8, 8, 8])
    assert sums() == [[3, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0]]


def test_double_check_by_finite_differences():
    x, W_enc, b_enc, W_dec, indices, values, _ = problem(4, 3, 6, 2)
    inputs = [t.requires_grad_() for t in (x, W_enc.contiguous(), b_enc)]
    pre_at = lambda x, W, b: sparse.gather_pre(x, W, b, (x @ W + b).detach().gather(1, indices), indices)
    assert torch.autograd.gradcheck(pre_at, inputs)
    assert torch.autograd.gradcheck(
        lambda v, W: sparse.decode(indices, v, W), [values.requires_grad_(), W_dec.requires_grad_()]
    )


def test_the_path_for_other_devices_equals_the_fast_one():
    _, _, _, W_dec, indices, _, left = problem(33, 127, 1001, 7)
    fast = sparse._dot_at(indices, None, left, W_dec)
    slow = torch.stack([(left * W_dec[indices[:, j]]).sum(-1) for j in range(indices.shape[1])], 1)
    torch.testing.assert_close(fast, slow)


def test_top_k_with_ties_negatives_and_all():
    pre = torch.tensor([[1.0, 1.0, 1.0, 0.0], [-3.0, -1.0, -2.0, -4.0]])
    values, picked = selection.top_k(pre, 2)
    assert torch.equal(pre.gather(1, picked), values)
    assert values.sort(1).values.tolist() == [[1.0, 1.0], [-2.0, -1.0]]
    assert selection.top_k(pre, 4)[1].sort(1).values.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("how", ["plain", "ties", "all negative", "not finite"])
@pytest.mark.parametrize("n_latents", [1024, 4096])  # groups of 4, of 4; groups of 8, of 4, of 4
def test_top_k_by_groups_finds_what_sorting_finds(how, n_latents):
    pre = torch.randn(20, n_latents, generator=torch.Generator().manual_seed(0))
    if how == "ties":
        pre = pre.round()
    if how == "all negative":
        pre = -pre.abs() - 1
    if how == "not finite":
        pre[3, 5], pre[4, 7] = torch.inf, -torch.inf
    values, picked = selection.top_k(pre, 16)
    assert all(len(set(row)) == 16 for row in picked.tolist())
    want = pre.sort(1, descending=True).values[:, :16]
    assert torch.equal(values.sort(1, descending=True).values, want)
    assert torch.equal(pre.gather(1, picked), values)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_pre_activations_in_blocks_are_those_of_one_product(onednn, transposed, monkeypatch):
    x, W, b, *_ = problem(600, 40, 9000, 8, dtype=torch.float32)
    W = W.t().contiguous().t() if transposed else W.contiguous()
    if not onednn:
        monkeypatch.setattr(selection, "_onednn_linear", lambda: None)
    blocks = list(selection._blocks(x, W, b))
    assert [len(block) for block in blocks] == [200, 200, 200]
    torch.testing.assert_close(torch.cat(blocks), torch.addmm(b, x, W))


def test_codes_count_only_what_is_active():
    sparse = Codes(torch.tensor([[2, 0], [1, 2]]), torch.tensor([[1.5, 0.0], [2.0, -1.0]]))
    dense = Codes(None, sparse.dense(4))
    assert dense.values.tolist() == [[0, 0, 1.5, 0], [0, 2.0, -1.0, 0]]
    for codes in (sparse, dense):
        l0, fired = codes.activity(4)
        assert l0.tolist() == [1, 2]
        assert fired.tolist() == [0, 1, 2, 0]  # a selected 0 has not fired
        assert torch.equal(codes.sparse().dense(4), dense.values)
    assert Codes(None, torch.zeros(3, 5)).sparse().values.shape == (3, 1)


def test_codes_at_and_strongest_in_every_form():
    g = torch.Generator().manual_seed(0)
    pre = torch.randn(7, 40, generator=g)
    places = pre > 1.0
    places[3] = False  # a token without any
    dense = Codes(None, pre * places)
    rows, indices = places.nonzero(as_tuple=True)
    flat = Codes(indices, pre[places], torch.searchsorted(rows, torch.arange(7)))
    latents = torch.tensor([30, 2, 2, 11])
    for codes in (dense, flat, dense.sparse(), flat.sparse(40)):
        assert torch.equal(codes.at(latents[[0, 1, 3]], 40), dense.values[:, latents[[0, 1, 3]]])
        for k in (1, 3, 40):
            best = codes.strongest(k)
            assert best.offsets is None and best.values.shape[1] <= k
            want = dense.values.topk(min(k, 40))
            assert torch.equal(best.dense(40), torch.zeros(7, 40).scatter(1, *want[::-1]))
    one = Codes(torch.tensor([7, 3]), torch.tensor([1.0, 2.0]), torch.tensor([0]))
    for k, values in ((1, [2.0]), (3, [1.0, 2.0, 0.0])):
        assert one.strongest(k).values.tolist() == [values]
    signed = Codes(None, torch.tensor([[1.0, -3.0, 2.0]])).strongest(2)
    assert sorted(signed.values.tolist()[0]) == [-3.0, 2.0]
