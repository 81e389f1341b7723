"""Features in the forms that Neuronpedia takes: its upload json, its bulk-import tree, feature json for its graph page.

Its upload answers most broken rules with one and the same HTTP 500, so all of them are checked here first, by name.
They are those of hijohnnylin/neuronpedia (apps/webapp) in August 2026.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sae.config import UserError, require
from sae.files import write_atomic
from sae.pages.records import read_values

MAX_FEATURES = 128  # in one request
MAX_BYTES = 4 << 20  # of one request: hosts of such sites refuse bodies of 4.5 MB and more
MAX_INDEX = 10_000_000
MAX_LOGITS = 20
MAX_TOKENS = 1024
MAX_TEXT = 512
QUANTILES = (  # of a context drawn from an interval: our name, theirs, least, most
    ("low", "quantileMin", -99_999_999, 99_999_999), ("high", "quantileMax", -99_999_999, 99_999_999),
    ("share", "quantileFraction", 0, 1),
)  # fmt: skip
MODEL_ID = re.compile(r"[a-z][a-z0-9.-]*[a-z0-9]")
SET_NAME = re.compile(r"[a-z][a-z0-9-]*[a-z0-9]|[a-z0-9]")
LARGEST = sys.float_info.max  # json has no infinity
EMPTY, NUL = "\u2205", "\u2400"  # an empty token is refused, and Postgres keeps no NUL
CREATOR = "clkht01d40000jv08hvalcvly"  # the account that a fresh Neuronpedia starts with
ROWS_PER_FILE = 512  # features in a file of the import tree


# --------------------------------------------------------------------------------------------------
# rules


def check_model(model_id: str, layers: int | None = None, display_name: str | None = None) -> None:
    """Raise UserError unless model/new takes this."""
    good = len(model_id) <= 32 and bool(MODEL_ID.fullmatch(model_id)) and not re.search(r"--|\.\.", model_id)
    require(
        good,
        f"model id '{model_id}': 2 to 32 of a-z, 0-9, '-' and '.' were wanted, a letter first, a letter or digit last, "
        "no '--' or '..'",
    )
    require(layers is None or 1 <= layers <= 127, f"{layers} layers; Neuronpedia takes models of 1 to 127")
    good = display_name is None or 1 <= len(display_name) <= 64
    require(good, f"display name '{display_name}': 1 to 64 characters were wanted")


def check_set(name: str, description: str | None = None) -> None:
    """Raise UserError unless source-set/new takes this."""
    require(
        bool(SET_NAME.fullmatch(name)) and "--" not in name and name != "neurons",
        f"set name '{name}': a-z, 0-9 and '-' were wanted, a letter first, a letter or digit last, no '--', "
        "and not 'neurons'",
    )
    good = description is None or len(description) <= 128
    require(good, f"a description of {len(description or '')} characters was given; 128 at most were wanted")


def _number(value: Any, what: str, low: float = -LARGEST, high: float = LARGEST, *, whole: bool = False) -> Any:
    good = type(value) in ((int,) if whole else (int, float)) and low <= value <= high
    bounds = "" if high == LARGEST else f" from {low:,} to {high:,}"
    require(good, f"{what} is {value!r:.60}; a {'whole' if whole else 'finite'} number{bounds} was wanted")
    return value


def _list(value: Any, what: str) -> Sequence[Any]:
    require(isinstance(value, (list, tuple)), f"{what} is {value!r:.60}; a list was wanted")
    return value


def _text(value: Any, what: str) -> str:
    require(isinstance(value, str), f"{what} is {value!r}; a text was wanted")
    return clean(value)


def _texts(values: Any, what: str) -> list[str]:
    bad = next((n for n, v in enumerate(_list(values, f"{what}s")) if type(v) is not str), None)
    return [clean(v) for v in values] if bad is None else [_text(values[bad], f"{what} {bad}")]


def _numbers(values: Any, what: str) -> list[float]:
    good = lambda v: type(v) in (float, int) and -LARGEST <= v <= LARGEST
    bad = next((n for n, v in enumerate(_list(values, f"{what}s")) if not good(v)), None)
    return list(values) if bad is None else [_number(values[bad], f"{what} {bad}")]


@lru_cache(1 << 16)
def clean(text: str) -> str:
    """A text as json and Postgres keep it: with signs for NUL, for half a surrogate pair, and for nothing at all."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\0", NUL) or EMPTY


# --------------------------------------------------------------------------------------------------
# records of features.jsonl -> features as the upload takes them


def to_feature(record: Mapping[str, Any]) -> dict[str, Any]:
    """A feature as feature/upload-batch takes it, but that without activations, having never fired, it does not.

    record: a FeatureRecord as features.jsonl has it. Of it are read latent, density, promoted, suppressed, label with
    label_precision and label_recall, and contexts, with low, high and share where they were drawn from an interval.
    Raises UserError that names the feature and the first rule of the server's that it breaks.
    """
    index = _number(record.get("latent"), f"feature {record.get('latent', '?')}: latent", 0, MAX_INDEX, whole=True)
    name = f"feature {index}"
    feature: dict[str, Any] = {"index": index}
    if record.get("density") is not None:
        feature["density"] = _number(record["density"], f"{name}: density", 0, 1)
    for ours, theirs in (("promoted", "topLogits"), ("suppressed", "bottomLogits")):
        feature[theirs] = _logits(record.get(ours) or (), f"{name}: {ours}")
    text = _explanation(record, name)
    if text:
        feature["explanations"] = [{"text": text}]
    contexts = _list(record.get("contexts"), f"{name}: contexts")
    feature["activations"] = [_activation(c, f"{name}: context {n}") for n, c in enumerate(contexts)]
    return feature


def _logits(pairs: Any, what: str) -> list[dict[str, Any]]:
    found = []
    for n, pair in enumerate(_list(pairs, what)[:MAX_LOGITS]):
        require(len(_list(pair, f"{what}[{n}]")) == 2, f"{what}[{n}] is {pair!r:.60}; a token and a value were wanted")
        token, value = pair
        found.append({"token": _text(token, f"{what}[{n}]'s token"), "value": _number(value, f"{what}[{n}]'s value")})
    return found


def _explanation(record: Mapping[str, Any], name: str) -> str:
    """The label, with how good it is, so that a weak one says so."""
    if record.get("label") is None:
        return ""
    text = _text(record["label"], f"{name}: label").strip()
    if text in ("", EMPTY):
        return ""
    found = []
    for what in ("precision", "recall"):
        if record.get(f"label_{what}") is not None:
            found.append(f"{what} {_number(record[f'label_{what}'], f'{name}: label_{what}', 0, 1):.2f}")
    text += f" ({', '.join(found)})" if found else ""
    require(len(text) <= MAX_TEXT, f"{name}: label has {len(text)} characters; {MAX_TEXT} at most were wanted")
    return text


def _activation(context: Any, what: str) -> dict[str, Any]:
    require(isinstance(context, dict), f"{what} is {context!r:.60}; tokens and values were wanted")
    tokens, values = _texts(context.get("tokens"), f"{what}: token"), _numbers(context.get("values"), f"{what}: value")
    require(1 <= len(tokens) <= MAX_TOKENS, f"{what} has {len(tokens)} tokens; 1 to {MAX_TOKENS:,} were wanted")
    same = len(tokens) == len(values)
    require(same, f"{what} has {len(tokens)} tokens and {len(values)} values; one value for each token was wanted")
    found: dict[str, Any] = {"tokens": tokens, "values": values}
    for ours, theirs, low, high in QUANTILES:
        if context.get(ours) is not None:
            found[theirs] = _number(context[ours], f"{what}: {ours}", low, high)
    return found


@dataclass
class Survey:
    """What a features.jsonl holds: counts, requests it takes, what breaks a rule, and a hash of what would be sent."""

    records: int = 0
    dead: int = 0
    features: int = 0
    activations: int = 0
    explanations: int = 0
    requests: int = 0
    n_bytes: int = 0
    first: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    sha256: str = ""


def survey(
    path: str | Path, batch_size: int = MAX_FEATURES, *, checked: Callable[[int], Any] = lambda _: None
) -> Survey:
    """Check every record of a features.jsonl. Reads it once; holds one batch. checked(1) is called after each."""
    found, digest, seen = Survey(), hashlib.sha256(), set[int]()

    def good() -> Iterator[dict[str, Any]]:
        for record in read_values(path):
            found.records += 1
            checked(1)
            try:
                feature = to_feature(record)
                index = record["latent"]
                require(index not in seen, f"feature {index}: latent stands in the file twice; each index goes once")
            except UserError as e:
                found.problems.append(str(e))
                continue
            seen.add(index)
            if feature["activations"]:
                text = as_json(feature)
                found.n_bytes += len(text)
                digest.update(text)  # one by one, so that it does not depend on how batches are cut
                yield feature
            else:
                found.dead += 1

    for batch in batches(good(), batch_size):
        found.requests += 1
        found.first = found.first or batch[0]
        found.features += len(batch)
        found.activations += sum(len(f["activations"]) for f in batch)
        found.explanations += sum("explanations" in f for f in batch)
    found.sha256 = digest.hexdigest()
    return found


def features_of(path: str | Path) -> Iterator[dict[str, Any]]:
    """The features of a features.jsonl that can be uploaded, one at a time."""
    return (f for f in map(to_feature, read_values(path)) if f["activations"])


def as_json(value: Any) -> bytes:
    """As it is sent. NaN cannot be in it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def batches(features: Iterable[dict[str, Any]], size: int = MAX_FEATURES) -> Iterator[list[dict[str, Any]]]:
    """Cut into batches of at most `size` features and about MAX_BYTES."""
    batch: list[dict[str, Any]] = []
    n_bytes = 0
    for feature in features:
        length = len(as_json(feature))
        if batch and (len(batch) == size or n_bytes + length > MAX_BYTES):
            yield batch
            batch, n_bytes = [], 0
        batch.append(feature)
        n_bytes += length
    if batch:
        yield batch


# --------------------------------------------------------------------------------------------------
# the bulk-import tree


@dataclass(frozen=True)
class Export:
    """What an import tree says of where its features come from. vectors: decoder rows (F, D), to steer with."""

    model_id: str
    layers: int
    set_name: str
    layer: int
    hook_name: str = ""
    dataset: str = ""
    creator: str = "nanosae"
    creator_id: str = CREATOR
    vectors: np.ndarray | None = None

    @property
    def source(self) -> str:
        return f"{self.layer}-{self.set_name}"


def write_export(path: str | Path, folder: str | Path, about: Export) -> Path:
    """Write {folder}/{model}/{source}/ with release, model, sourceset, source, features, activations and explanations.

    The layout that Neuronpedia's bulk import reads (admin/import, or its data bucket). Rows have the same keys in every
    line, for the import takes its columns from the first; ids follow from what they name, so that importing twice adds
    nothing. Latents that never fired are in it too. Returns the folder of the source.
    """
    root = Path(folder) / about.model_id / about.source
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    for name, row in _origins(about, now).items():
        _write_lines([row], root / f"{name}.jsonl")
    records = read_values(path)
    number = 0
    while part := list(islice(records, ROWS_PER_FILE)):
        rows: dict[str, list[dict[str, Any]]] = {"features": [], "activations": [], "explanations": []}
        for record in part:
            feature = to_feature(record)
            key = {"modelId": about.model_id, "layer": about.source, "index": str(feature["index"])}
            rows["features"].append({**key, **_feature_row(record, feature, about, now)})
            rows["activations"] += [
                {"id": _id(key, n), **key, **_activation_row(activation, about, now)}
                for n, activation in enumerate(feature["activations"])
            ]
            rows["explanations"] += [
                {"id": _id(key, e["text"]), **key, "description": e["text"], "authorId": about.creator_id,
                 "typeName": None, "explanationModelName": None, "notes": None, "createdAt": now}
                for e in feature.get("explanations", ())
            ]  # fmt: skip
        for name, lines in rows.items():
            if lines:
                _write_lines(lines, root / name / f"batch-{number}.jsonl.gz")
        number += 1
    return root


def _write_lines(rows: list[dict[str, Any]], path: Path) -> None:
    data = b"".join(as_json(row) + b"\n" for row in rows)
    # the import puts a blank for what reads as NUL's escape, also where the text itself has a backslash and u0000
    data = data.replace(rb"\\u0000", rb"\u005cu0000")
    packed = gzip.compress(data, 5, mtime=0) if path.suffix == ".gz" else data
    write_atomic(path, lambda tmp: tmp.write_bytes(packed))


def _id(key: dict[str, str], what: object) -> str:
    """25 characters, as the site's own ids have."""
    return "c" + hashlib.sha256(as_json([key, str(what)])).hexdigest()[:24]


def _origins(about: Export, now: str) -> dict[str, dict[str, Any]]:
    """The rows that everything else belongs to, by file."""
    made = {"creatorId": about.creator_id, "createdAt": now}
    release = f"{about.model_id}-{about.set_name}"
    width = None if about.vectors is None else about.vectors.shape[1]
    return {
        "release": {
            "name": release, "description": f"SAEs on {about.model_id}", "descriptionShort": about.set_name, "urls": [],
            "creatorName": about.creator, "creatorNameShort": about.creator, "visibility": "PUBLIC", "isNewUi": False,
            "featured": False, "defaultSourceSetName": about.set_name, **made,
        },
        "model": {
            "id": about.model_id, "instruct": False, "displayName": about.model_id, "displayNameShort": about.model_id,
            "tlensId": None, "dimension": width, "layers": about.layers, "neuronsPerLayer": 0, "owner": "custom",
            "visibility": "PUBLIC", "updatedAt": now, **made,
        },
        "sourceset": {
            "modelId": about.model_id, "name": about.set_name, "description": f"SAEs on {about.model_id}",
            "creatorName": about.creator, "releaseName": release, "visibility": "PUBLIC", "type": "", "urls": [],
            "hasDashboards": True, "allowInferenceSearch": False, "defaultRange": 1, "defaultShowBreaks": True,
            "showDfa": False, "showCorrelated": False, "showHeadAttribution": False, "showUmap": False, **made,
        },
        "source": {
            "id": about.source, "modelId": about.model_id, "setName": about.set_name, "hasDashboards": True,
            "inferenceEnabled": False, "visibility": "PUBLIC", "dataset": about.dataset, "notes": None, **made,
        },
    }  # fmt: skip


def _feature_row(record: Mapping[str, Any], feature: dict[str, Any], about: Export, now: str) -> dict[str, Any]:
    index = feature["index"]
    largest = max((max(a["values"]) for a in feature["activations"]), default=0)
    vector: list[float] = []
    if about.vectors is not None:
        known = index < len(about.vectors)
        require(known, f"the file has feature {index} and the SAE {len(about.vectors)}; give the file made of it")
        vector = [float(f"{v:.9g}") for v in about.vectors[index].tolist()]
    histogram = record.get("histogram") or {}
    edges, counts = histogram.get("edges") or [], histogram.get("counts") or []
    neighbours, cofiring = record.get("neighbours") or [], record.get("cofiring") or []
    return {
        "creatorId": about.creator_id, "createdAt": now, "maxActApprox": largest, "hasVector": bool(vector),
        "vector": vector, "vectorLabel": None, "vectorDefaultSteerStrength": largest if vector else 10,
        "hookName": about.hook_name if vector else None, "sourceSetName": about.set_name,
        "topkCosSimIndices": [i for i, _ in neighbours], "topkCosSimValues": [v for _, v in neighbours],
        "neuron_alignment_indices": [], "neuron_alignment_values": [], "neuron_alignment_l1": [],
        "correlated_neurons_indices": [], "correlated_neurons_pearson": [], "correlated_neurons_l1": [],
        "correlated_features_indices": [i for i, _ in cofiring],
        "correlated_features_pearson": [v for _, v in cofiring], "correlated_features_l1": [],
        "pos_str": [t["token"] for t in feature["topLogits"]],
        "pos_values": [t["value"] for t in feature["topLogits"]],
        "neg_str": [t["token"] for t in feature["bottomLogits"]],
        "neg_values": [t["value"] for t in feature["bottomLogits"]],
        "frac_nonzero": feature.get("density", 0),
        "freq_hist_data_bar_heights": counts,
        "freq_hist_data_bar_values": [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)],
        "logits_hist_data_bar_heights": [], "logits_hist_data_bar_values": [], "decoder_weights_dist": [],
    }  # fmt: skip


def _activation_row(activation: dict[str, Any], about: Export, now: str) -> dict[str, Any]:
    """The strongest contexts carry the mark of that group: -1, their largest value, -1."""
    values = activation["values"]
    largest = max(values)
    return {
        "tokens": activation["tokens"], "values": values, "maxValue": largest,
        "maxValueTokenIndex": values.index(largest), "minValue": min(values), "creatorId": about.creator_id,
        "dataSource": None, "dataIndex": None, "dfaValues": [], "dfaTargetIndex": None, "dfaMaxValue": None,
        "createdAt": now, "lossValues": [], "logitContributions": None,
        "binMin": activation.get("quantileMin", -1), "binMax": activation.get("quantileMax", largest),
        "binContains": activation.get("quantileFraction", -1), "qualifyingTokenIndex": values.index(largest),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------
# feature json for the graph page


def write_graph_features(path: str | Path, folder: str | Path, layer: int) -> int:
    """Write {folder}/{latent}.json, which a graph's metadata.feature_details.feature_json_base_url can point to.

    Served over https with `Access-Control-Allow-Origin: *`, they show in Neuronpedia's graph page with nothing
    uploaded. Returns how many.
    """
    n = 0
    for feature in features_of(path):
        groups: dict[str, list[dict[str, Any]]] = {}
        for a in feature["activations"]:
            limits = a.get("quantileMin"), a.get("quantileMax")
            name = "Top activations" if None in limits else f"Interval {limits[0]:.4g} - {limits[1]:.4g}"
            groups.setdefault(name, []).append({"tokens_acts_list": a["values"], "tokens": a["tokens"]})
        value = {
            "layer": layer, "index": feature["index"],
            "examples_quantiles": [{"quantile_name": name, "examples": e} for name, e in groups.items()],
            "top_logits": [t["token"] for t in feature["topLogits"]],
            "bottom_logits": [t["token"] for t in feature["bottomLogits"]],
        }  # fmt: skip
        _write_lines([value], Path(folder) / f"{feature['index']}.json")
        n += 1
    return n
