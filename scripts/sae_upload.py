"""Publish a trained SAE's features on Neuronpedia:  python -m scripts.sae_upload  (shows what --upload would send)"""

from __future__ import annotations

import getpass
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from sae import log
from sae.config import UploadConfig, UserError, from_cli, require

if TYPE_CHECKING:
    from sae.pages.neuronpedia_format import Inspection

SHOWN = 100  # broken records named


class Target(NamedTuple):
    """What is published, and where: names as on Neuronpedia, and the SAE's folder if there is one."""

    features: Path
    folder: Path | None
    trained_on: dict[str, Any]
    model_id: str
    layer: int
    source: str


def find_target(c: UploadConfig) -> Target:
    """The features and names that the flags mean. No SAE is needed if --features and names are given."""
    from sae.formats import store
    from sae.pages.neuronpedia_format import check_model, check_set

    folder, trained_on = None, {}
    if c.sae_path or not (c.features and c.model_id and c.layer is not None):
        path = Path(c.sae_path) if c.sae_path else store.newest_run("sae_models")
        folder, trained_on = store.find_sae(path).parent, store.load_cfg(path)
    if c.features:
        features = Path(c.features)
    else:
        assert folder is not None
        features = folder / "features" / "features.jsonl"
    name = str(trained_on.get("model_name") or "")
    model_id = c.model_id or re.sub(r"[^a-z0-9]+", "-", Path(name.rstrip("/")).name.lower()).strip("-")
    number = re.search(r"(?<!\w)\d+(?!\w)", trained_on.get("hookpoint") or "")
    layer = c.layer if c.layer is not None else int(number[0]) if number else None
    require(bool(model_id), "the SAE does not say which model it belongs to; give --model_id")
    if layer is None:
        raise UserError(f"hookpoint '{trained_on.get('hookpoint')}' names no layer; give --layer")
    check_model(model_id)
    check_set(c.set_name)
    return Target(features, folder, trained_on, model_id, layer, f"{layer}-{c.set_name}")


def count_layers(c: UploadConfig, target: Target) -> int:
    """The number of the model's layers. Without --model_layers the model is loaded to see."""
    from sae.lm.language_model import load_language_model
    from sae.pages.neuronpedia_format import check_model

    layers = c.model_layers
    if layers is None:
        name = str(target.trained_on.get("model_name") or "")
        require(bool(name), "the SAE does not say which model it belongs to; give --model_layers")
        dataset = target.trained_on.get("dataset_path")
        layers = load_language_model(name, device="cpu", dataset=None if dataset == "embedded" else dataset).n_layers
    require(target.layer < layers, f"layer {target.layer} was given and the model has {layers}")
    check_model(target.model_id, layers)
    return layers


def show(found: Inspection, target: Target, api_base: str) -> None:
    """Say what would be sent. Raise UserError if a record breaks a rule."""
    for problem in found.problems[:SHOWN]:
        log.say(problem)
    n = len(found.problems)
    broken = f"{n:,} of {found.records:,} records in '{target.features}' break Neuronpedia's rules, as said above"
    require(n == 0, f"{broken}; nothing was sent")
    require(found.features > 0, f"no feature in '{target.features}' ever fired; there is nothing to publish")
    sent = f"{found.features:,} features, {found.activations:,} activations, {found.explanations:,} labels"
    log.say(f"{sent}; left out: {found.dead:,} latents that never fired")
    size = f"{found.requests:,} requests, {found.n_bytes / 1e6:,.1f} MB"
    log.say(f"to {api_base}: model {target.model_id}, source {target.source}; {size}")


def export(c: UploadConfig, target: Target) -> None:
    """Write the import tree, with decoder directions if there is an SAE."""
    from sae.formats import store
    from sae.pages.neuronpedia_format import Export, write_export

    assert c.export is not None
    layers, hookpoint = count_layers(c, target), str(target.trained_on.get("hookpoint") or "")
    is_block = re.fullmatch(r"[\w.]*\.\d+", hookpoint)
    hook_name = f"blocks.{target.layer}.hook_resid_post" if is_block else hookpoint
    dataset = str(target.trained_on.get("dataset_path") or "")
    vectors = store.load_sae(target.folder).W_dec.detach().numpy() if target.folder else None
    about = Export(target.model_id, layers, c.set_name, target.layer, hook_name, dataset, vectors)
    log.say(f"written to {write_export(target.features, c.export, about)}")


def ask_key() -> str:
    """The API key, from the environment or a hidden prompt."""
    from sae.neuronpedia import KEY

    key = os.environ.get(KEY, "").strip()
    if not key and sys.stdin.isatty():
        key = getpass.getpass("Neuronpedia API key (neuronpedia.org, Settings): ").strip()
    require(bool(key), f"no API key; set {KEY} to the one in the settings of neuronpedia.org")
    return key


def upload(c: UploadConfig, target: Target, found: Inspection) -> None:
    """Send what is not there yet."""
    from sae.neuronpedia import Journal, NeuronpediaClient
    from sae.pages.neuronpedia_format import features_of

    client = NeuronpediaClient(ask_key(), api_base=c.api_base)
    about = {"api_base": client.api_base, "model_id": target.model_id, "source": target.source, "sha256": found.sha256}
    host = urlsplit(client.api_base).netloc.replace(":", "_")
    folder = target.folder or target.features.parent
    is_there = lambda: client.source_set(target.model_id, c.set_name) is not None
    path = folder / "neuronpedia" / f"{host}_{target.model_id}_{target.source}.jsonl"
    with Journal(path, about, lambda: not is_there()) as journal:
        if not is_there():
            client.create(target.model_id, count_layers(c, target), c.set_name)
        features, bar = features_of(target.features), log.progress(found.features, "uploading", unit="feature")
        with bar:
            client.upload(features, target.model_id, target.source, journal, batch_size=c.batch_size, sent=bar.update)
    assert found.first is not None
    log.say(f"all there: {client.page(target.model_id, target.source, found.first['index'])}")


def main(argv: list[str]) -> None:
    c = from_cli(UploadConfig, argv, prog="python -m scripts.sae_upload", description=__doc__)
    from sae.pages import neuronpedia_format as form

    target = find_target(c)
    log.say(f"checking {target.features}")
    with log.progress(None, "checking", unit="feature") as bar:
        found = form.inspect_features(target.features, c.batch_size, bar.update)
    show(found, target, c.api_base)
    if c.export:
        export(c, target)
    if c.graph_features:
        n = form.write_graph_features(target.features, c.graph_features, target.layer)
        log.say(f"{n:,} files written to {c.graph_features}")
    if c.upload:
        upload(c, target, found)
    else:
        log.say("nothing was sent; --upload sends it")


if __name__ == "__main__":
    log.run_script(main)
