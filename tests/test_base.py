"""What all SAEs share: decoding, initialisation, scale, unit norms, transcoding; forward counts nothing.

Run: python -m pytest tests/test_base.py
"""

import pytest
import torch

from sae.config import SAEConfig, UserError
from sae.learner import start_from_
from sae.models import create_sae
from tests.conftest import ALL
from tests.test_models import data, loss, make


@pytest.mark.parametrize("activation", ALL)
def test_encode_decode_agree_with_forward(activation):
    sae, x = make(activation).eval(), data()
    out = sae(x)
    torch.testing.assert_close(sae.decode(sae.encode(x)), out.x_hat)
    torch.testing.assert_close(sae.decode_codes(sae.encode_sparse(x)), out.x_hat)
    cube = x.view(4, 16, 12)
    torch.testing.assert_close(sae.encode(cube).view(64, -1), sae.encode(x))
    with pytest.raises(UserError, match="13 wide"):
        sae.encode(torch.zeros(2, 13))


@pytest.mark.parametrize("activation", ALL)
def test_initialisation(activation):
    sae = make(activation)
    torch.testing.assert_close(sae.W_enc.detach(), sae.W_dec.t().detach())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert sae.W_enc.shape == (12, 40)
    assert torch.equal(sae.W_dec, make(activation).W_dec)
    assert not torch.equal(sae.W_dec, make(activation, seed=1).W_dec)


def test_unit_norm_decoder_and_projected_gradient():
    sae, x = make("topk"), data()
    loss(sae, x).total.backward()
    sae.project_gradient_()
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(40), atol=1e-6, rtol=0)
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.renormalize_()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    free = make("relu", normalize_decoder=False)
    with torch.no_grad():
        free.W_dec.mul_(3)
    free.renormalize_()
    torch.testing.assert_close(free.W_dec.norm(dim=1), torch.full((40,), 3.0))


@pytest.mark.parametrize("activation", ALL)
def test_scaled_folds_the_scale_away(activation):
    sae, x = make(activation), data()
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1)
    raw = sae.scaled(4.0)
    torch.testing.assert_close(raw(x / 4).x_hat, sae(x).x_hat / 4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw.encode(x / 4), sae.encode(x) / 4, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ALL)
def test_forward_is_pure(activation):
    sae, x = make(activation), data()
    before = {n: p.clone() for n, p in sae.state_dict().items()}
    loss(sae, x)
    assert all(torch.equal(p, before[n]) for n, p in sae.state_dict().items())
    sae.train()
    trained = sae(x).x_hat
    sae.eval()
    assert torch.equal(trained, sae(x).x_hat) or activation in ("batchtopk", "matryoshka")


def test_a_transcoder_does_not_centre_and_starts_from_data():
    x, y = data() + 3, data(d=9, seed=1) - 2
    sae = make("topk", transcode=True, d_out=9)
    assert sae.decode(torch.zeros(1, 40)).shape == (1, 9)
    start_from_(sae, x, y)
    torch.testing.assert_close(sae.b_dec.detach(), y.mean(0))
    torch.testing.assert_close(sae.b_enc.detach(), -x.mean(0) @ sae.W_enc.detach())
    torch.testing.assert_close(sae.pre_activations(x).mean(0), torch.zeros(40), atol=1e-4, rtol=0)
    skip = make("relu", transcode=True, skip_connection=True, d_out=9)
    with torch.no_grad():
        skip.W_skip.add_(1.0)
    torch.testing.assert_close(skip(x).x_hat, x @ torch.ones(12, 9))
    raw = skip.scaled(2.0, 5.0)
    torch.testing.assert_close(raw(x / 2).x_hat, skip(x).x_hat / 5)


def test_layer_norm_belongs_to_the_finished_sae():
    x = 4 * data() + 7
    sae = make("topk", k=40, normalize_activations="layer_norm")
    centred = x - x.mean(1, keepdim=True)
    z = centred / (x.std(1, keepdim=True) + 1e-5)
    sae.layer_norm = False
    inner = sae(z).x_hat
    sae.layer_norm = True
    torch.testing.assert_close(sae(x).x_hat, inner * (x.std(1, keepdim=True) + 1e-5) + x.mean(1, keepdim=True))
    torch.testing.assert_close(sae.reconstruct_from(sae.encode_sparse(x), x), sae(x).x_hat)


@pytest.mark.parametrize("seed", range(3))
def test_toy_data_of_the_same_seed_is_not_there_from_the_start(seed):
    rows = create_sae(SAEConfig(d_in=24, d_sae=96, seed=seed)).W_dec.detach()
    toy = torch.randn(48, 24, generator=torch.Generator().manual_seed(seed))
    assert float((torch.nn.functional.normalize(toy) @ rows.t()).max()) < 0.9
