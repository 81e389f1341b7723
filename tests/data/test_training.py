"""What a run trains on: places of transcoders, and data that an earlier version's runs still know.

Run: python -m pytest tests/data/test_training.py
"""

import hashlib

import pytest

from sae.config import UserError
from sae.data.training import with_inputs
from tests.conftest import ROOT


def test_a_transcoder_reads_modules_inputs_and_is_named_by_modules():
    assert with_inputs(["h.1", "h.2@in"], False) == ["h.1", "h.2@in"]
    assert with_inputs(["h.1", "h.2"], True) == ["h.1", "h.2", "h.1@in", "h.2@in"]
    with pytest.raises(UserError, match="name a module without '@in'"):
        with_inputs(["h.1", "h.2@in"], True)


def test_the_embedded_corpus_is_the_one_that_earlier_runs_were_trained_on():
    """Its file is part of the hash in their checkpoints: changed, it would refuse to resume them."""
    source = (ROOT / "assets" / "pygpt" / "corpus.py").read_bytes()
    assert hashlib.sha256(source).hexdigest() == "1f0a94d2c35620fb9a6f52614134144d0116a85c83e4b1aa13bd377cea6f2e6d"
