"""A ninth kind of SAE: the whole of what one adds to models.py for it, and sae_train with it.

Run: python -m tests.toy_kind --activation toy [flags of sae_train]
"""

import sys

from torch import Tensor

from sae import log
from sae.kernels.sparse import Codes
from sae.models import TopK

CAP = 3.0


class Toy(TopK, kind="toy"):
    """The k largest pre-activations of a token, no latent above a cap: nothing fires louder than CAP."""

    flags = frozenset()
    saelens = None

    def codes(self, x: Tensor, *, k: int | None = None, whole: Tensor | None = None) -> tuple[Codes, Codes | None]:
        codes, source = super().codes(x, k=k, whole=whole)
        return codes._replace(values=codes.values.clamp(max=CAP)), source


if __name__ == "__main__":
    from scripts import sae_train

    log.run_script(sae_train.main, sys.argv[1:])
