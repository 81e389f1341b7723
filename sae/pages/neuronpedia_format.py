"""Features in the forms that Neuronpedia takes: upload payloads, its bulk-import tree, and json for its graph page.

The server answers most broken rules with the same HTTP 500, so they are all checked here first, and named. They are the
rules of hijohnnylin/neuronpedia (apps/webapp) in August 2026.
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
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sae.config import UserError, require
from sae.files import write_atomic
from sae.pages.records import read_values

Json = dict[str, Any]
T = TypeVar("T")
MAX_FEATURES = 128  # in one request
MAX_BYTES = 4 << 20  # of one request: hosts of such sites refuse bodies of 4.5 MB and more
MAX_INDEX = 10_000_000
MAX_LOGITS = 20
MAX_TOKENS = 1024
MAX_TEXT = 512
MAX_VALUE = 99_999_999
QUANTILES = (  # of a context drawn from an interval: our name, the upload's, the import's, least, most
    ("low", "quantileMin", "binMin", -MAX_VALUE, MAX_VALUE),
    ("high", "quantileMax", "binMax", -MAX_VALUE, MAX_VALUE),
    ("share", "quantileFraction", "binContains", 0, 1),
)
MODEL_ID = r"(?!.*(--|\.\.))[a-z][a-z0-9.-]{0,30}[a-z0-9]"
SET_NAME = r"(?!.*--|neurons$)([a-z][a-z0-9-]*)?[a-z0-9]"
LARGEST = sys.float_info.max  # json has no infinity
EMPTY, NUL = "\u2205", "\u2400"  # an empty token is refused, and Postgres keeps no NUL
CREATOR = "clkht01d40000jv08hvalcvly"  # the account that a fresh Neuronpedia starts with
ROWS_PER_FILE = 512  # features in a file of the import tree
# Tables of the bulk import: their columns in order, =json where it is the same in most rows.
TABLES = {
    "release": 'name description descriptionShort urls=[] creatorName creatorNameShort visibility="PUBLIC" '
    "isNewUi=false featured=false defaultSourceSetName creatorId createdAt",
    "model": "id instruct=false displayName displayNameShort tlensId=null dimension layers neuronsPerLayer=0 "
    'owner="custom" visibility="PUBLIC" updatedAt creatorId createdAt',
    "sourceset": 'modelId name description creatorName releaseName visibility="PUBLIC" type="" urls=[] '
    "hasDashboards=true allowInferenceSearch=false defaultRange=1 defaultShowBreaks=true showDfa=false "
    "showCorrelated=false showHeadAttribution=false showUmap=false creatorId createdAt",
    "source": 'id modelId setName hasDashboards=true inferenceEnabled=false visibility="PUBLIC" dataset notes=null '
    "creatorId createdAt",
    "features": "modelId layer index creatorId createdAt maxActApprox hasVector=false vector=[] vectorLabel=null "
    "vectorDefaultSteerStrength=10 hookName=null sourceSetName topkCosSimIndices topkCosSimValues "
    "neuron_alignment_indices=[] neuron_alignment_values=[] neuron_alignment_l1=[] correlated_neurons_indices=[] "
    "correlated_neurons_pearson=[] correlated_neurons_l1=[] correlated_features_indices correlated_features_pearson "
    "correlated_features_l1=[] pos_str pos_values neg_str neg_values frac_nonzero freq_hist_data_bar_heights "
    "freq_hist_data_bar_values logits_hist_data_bar_heights=[] logits_hist_data_bar_values=[] decoder_weights_dist=[]",
    "activations": "id modelId layer index tokens values maxValue maxValueTokenIndex minValue creatorId "
    "dataSource=null dataIndex=null dfaValues=[] dfaTargetIndex=null dfaMaxValue=null createdAt lossValues=[] "
    "logitContributions=null binMin=-1 binMax binContains=-1 qualifyingTokenIndex",
    "explanations": "id modelId layer index description authorId typeName=null explanationModelName=null notes=null "
    "createdAt",
}
COLUMNS = {
    table: {name: json.loads(usual) if usual else ... for name, _, usual in (c.partition("=") for c in columns.split())}
    for table, columns in TABLES.items()
}


# --------------------------------------------------------------------------------------------------
# rules


def check_model(model_id: str, layers: int | None = None) -> None:
    """Raise UserError unless model/new takes this."""
    wanted = "2 to 32 of a-z, 0-9, '-' and '.' were wanted, a letter first, a letter or digit last, no '--' or '..'"
    require(bool(re.fullmatch(MODEL_ID, model_id)), f"model id '{model_id}': {wanted}")
    require(layers is None or 1 <= layers <= 127, f"{layers} layers; Neuronpedia takes models of 1 to 127")


def check_set(name: str) -> None:
    """Raise UserError unless source-set/new takes this."""
    wanted = "a-z, 0-9 and '-' were wanted, a letter first, a letter or digit last, no '--', and not 'neurons'"
    require(bool(re.fullmatch(SET_NAME, name)), f"set name '{name}': {wanted}")


def _number(value: Any, what: str, low: float = -LARGEST, high: float = LARGEST, *, whole: bool = False) -> Any:
    if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:
        bounds = "" if high == LARGEST else f" from {low:,} to {high:,}"
        raise UserError(f"{what} is {value!r:.60}; a {'whole' if whole else 'finite'} number{bounds} was wanted")
    return value


def _text(value: Any, what: str) -> str:
    if type(value) is not str:
        raise UserError(f"{what} is {value!r}; a text was wanted")
    return storable(value)


def _list(value: Any, what: str) -> Sequence[Any]:
    require(isinstance(value, (list, tuple)), f"{what} is {value!r:.60}; a list was wanted")
    return value


def _each(values: Any, what: str, check: Callable[[Any, str], T]) -> list[T]:
    try:
        return [check(v, what) for v in _list(values, f"{what}s")]
    except UserError:  # now with the place of the first bad one
        return [check(v, f"{what} {n}") for n, v in enumerate(_list(values, f"{what}s"))]


@lru_cache(1 << 16)
def storable(text: str) -> str:
    """A text as json and Postgres can store it: with signs for NUL, half a surrogate pair, and the empty text."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\0", NUL) or EMPTY


# --------------------------------------------------------------------------------------------------
# upload payloads


def to_feature(record: Mapping[str, Any]) -> Json:
    """The upload payload of a record (a line of features.jsonl). The server takes none without activations, that is of
    a dead feature. Raises UserError that names the feature and the first rule it breaks."""
    index = _number(record.get("latent"), f"feature {record.get('latent', '?')}: latent", 0, MAX_INDEX, whole=True)
    name = f"feature {index}"
    feature: Json = {"index": index}
    if record.get("density") is not None:
        feature["density"] = _number(record["density"], f"{name}: density", 0, 1)
    for ours, theirs in (("promoted", "topLogits"), ("suppressed", "bottomLogits")):
        pairs = _list(record.get(ours) or (), f"{name}: {ours}")[:MAX_LOGITS]
        feature[theirs] = [_logit(pair, f"{name}: {ours}[{n}]") for n, pair in enumerate(pairs)]
    text = _explanation(record, name)
    if text:
        feature["explanations"] = [{"text": text}]
    contexts = _list(record.get("contexts"), f"{name}: contexts")
    feature["activations"] = [_activation(c, f"{name}: context {n}") for n, c in enumerate(contexts)]
    return feature


def _logit(pair: Any, what: str) -> Json:
    require(len(_list(pair, what)) == 2, f"{what} is {pair!r:.60}; a token and a value were wanted")
    return {"token": _text(pair[0], f"{what}'s token"), "value": _number(pair[1], f"{what}'s value")}


def _explanation(record: Mapping[str, Any], name: str) -> str:
    """The label with its quality, so that a weak one says so."""
    label = record.get("label")
    text = EMPTY if label is None else _text(label, f"{name}: label").strip()
    if text in ("", EMPTY):
        return ""
    known = [what for what in ("precision", "recall") if record.get(f"label_{what}") is not None]
    found = [f"{what} {_number(record[f'label_{what}'], f'{name}: label_{what}', 0, 1):.2f}" for what in known]
    text += f" ({', '.join(found)})" if found else ""
    require(len(text) <= MAX_TEXT, f"{name}: label has {len(text)} characters; {MAX_TEXT} at most were wanted")
    return text


def _activation(context: Any, what: str) -> Json:
    require(isinstance(context, dict), f"{what} is {context!r:.60}; tokens and values were wanted")
    tokens = _each(context.get("tokens"), f"{what}: token", _text)
    values = _each(context.get("values"), f"{what}: value", _number)
    require(1 <= len(tokens) <= MAX_TOKENS, f"{what} has {len(tokens)} tokens; 1 to {MAX_TOKENS:,} were wanted")
    same = len(tokens) == len(values)
    require(same, f"{what} has {len(tokens)} tokens and {len(values)} values; one value for each token was wanted")
    found: Json = {"tokens": tokens, "values": values}
    for ours, theirs, _, low, high in QUANTILES:
        if context.get(ours) is not None:
            found[theirs] = _number(context[ours], f"{what}: {ours}", low, high)
    return found


@dataclass
class Inspection:
    """What a features.jsonl holds: counts, the requests it takes, broken rules, and a hash of what would be sent."""

    records: int = 0
    dead: int = 0
    features: int = 0
    activations: int = 0
    explanations: int = 0
    requests: int = 0
    n_bytes: int = 0
    first: Json | None = None
    problems: list[str] = field(default_factory=list)
    sha256: str = ""


def inspect_features(path: str | Path, batch_size: int, checked: Callable[[int], Any]) -> Inspection:
    """Check every record of a features.jsonl in one pass that holds one batch. checked(1) is called for each."""
    found, digest, seen = Inspection(), hashlib.sha256(), set[int]()

    def good() -> Iterator[Json]:
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
                text = json_bytes(feature)
                found.n_bytes += len(text)
                digest.update(text)  # feature by feature, so that the hash does not depend on the batches
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


def features_of(path: str | Path) -> Iterator[Json]:
    """The payloads of a features.jsonl that can be uploaded, one at a time."""
    return (f for f in map(to_feature, read_values(path)) if f["activations"])


def json_bytes(value: Any) -> bytes:
    """Json as it is sent, without NaN."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def batches(features: Iterable[Json], size: int = MAX_FEATURES) -> Iterator[list[Json]]:
    """Batches of at most `size` features and about MAX_BYTES."""
    batch: list[Json] = []
    n_bytes = 0
    for feature in features:
        length = len(json_bytes(feature))
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
    """The source of features in an import tree. vectors: decoder rows (F, D), to steer with."""

    model_id: str
    layers: int
    set_name: str
    layer: int
    hook_name: str = ""
    dataset: str = ""
    vectors: np.ndarray | None = None

    @property
    def source(self) -> str:
        return f"{self.layer}-{self.set_name}"

    @cached_property
    def facts(self) -> Json:
        """What every row says in a column of this name, if its table has one."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        model, name, creator = self.model_id, self.set_name, "nanosae"
        return {
            **dict.fromkeys(("createdAt", "updatedAt"), now),
            **dict.fromkeys(("creatorId", "authorId"), CREATOR),
            **dict.fromkeys(("creatorName", "creatorNameShort"), creator),
            **dict.fromkeys(("modelId", "displayName", "displayNameShort"), model),
            **dict.fromkeys(("setName", "sourceSetName", "defaultSourceSetName", "descriptionShort"), name),
            **{"description": f"SAEs on {model}", "releaseName": f"{model}-{name}", "layer": self.source},
            **{"layers": self.layers, "dataset": self.dataset},
            "dimension": None if self.vectors is None else self.vectors.shape[1],
        }

    def row(self, table: str, **own: Any) -> Json:
        """A row of one of the TABLES."""
        known = {**self.facts, **own}
        return {name: known.get(name, usual) for name, usual in COLUMNS[table].items()}


def write_export(path: str | Path, folder: str | Path, about: Export) -> Path:
    """Write {folder}/{model}/{source}/ with release, model, sourceset, source, features, activations and explanations.

    It is the layout that Neuronpedia's bulk import (admin/import, or its data bucket) reads. Every line of a file has
    the same keys, as the import takes its columns from the first. Ids are hashes of what they name, so importing twice
    adds nothing. Dead latents are included. Returns the folder of the source.
    """
    root = Path(folder) / about.model_id / about.source
    ids = {"release": {"name": about.facts["releaseName"]}, "model": {"id": about.model_id}}
    ids |= {"sourceset": {"name": about.set_name}, "source": {"id": about.source}}
    for table, own in ids.items():
        _write_lines([about.row(table, **own)], root / f"{table}.jsonl")
    records = read_values(path)
    for number, part in enumerate(iter(lambda: list(islice(records, ROWS_PER_FILE)), [])):
        rows: dict[str, list[Json]] = {"features": [], "activations": [], "explanations": []}
        for record in part:
            feature = to_feature(record)
            key = {"modelId": about.model_id, "layer": about.source, "index": str(feature["index"])}
            rows["features"].append(about.row("features", **key, **_of_feature(record, feature, about)))
            for n, a in enumerate(feature["activations"]):
                rows["activations"].append(about.row("activations", id=_id(key, n), **key, **_of_activation(a)))
            for text in (e["text"] for e in feature.get("explanations", ())):
                rows["explanations"].append(about.row("explanations", id=_id(key, text), **key, description=text))
        for table, lines in rows.items():
            if lines:
                _write_lines(lines, root / table / f"batch-{number}.jsonl.gz")
    return root


def _write_lines(rows: list[Json], path: Path) -> None:
    data = b"".join(json_bytes(row) + b"\n" for row in rows)
    # the import blanks what reads as NUL's escape, even in a text that has a backslash and u0000
    data = data.replace(rb"\\u0000", rb"\u005cu0000")
    packed = gzip.compress(data, 5, mtime=0) if path.suffix == ".gz" else data
    write_atomic(path, lambda tmp: tmp.write_bytes(packed))


def _id(key: dict[str, str], what: object) -> str:
    """25 characters, like the site's own ids."""
    return "c" + hashlib.sha256(json_bytes([key, str(what)])).hexdigest()[:24]


def _of_feature(record: Mapping[str, Any], feature: Json, about: Export) -> Json:
    largest = max((max(a["values"]) for a in feature["activations"]), default=0)
    row: Json = {"maxActApprox": largest, "frac_nonzero": feature.get("density", 0)}
    if about.vectors is not None:
        index, n = feature["index"], len(about.vectors)
        require(index < n, f"the file has feature {index} and the SAE {n}; give the file made of it")
        vector = [float(f"{v:.9g}") for v in about.vectors[index].tolist()]
        row |= {"hasVector": True, "vector": vector, "hookName": about.hook_name, "vectorDefaultSteerStrength": largest}
    histogram = record.get("histogram") or {}
    edges = histogram.get("edges") or []
    middles = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    row |= {"freq_hist_data_bar_heights": histogram.get("counts") or [], "freq_hist_data_bar_values": middles}
    for names, pairs in (
        ("topkCosSimIndices topkCosSimValues", record.get("neighbours") or []),
        ("correlated_features_indices correlated_features_pearson", record.get("cofiring") or []),
        ("pos_str pos_values", [t.values() for t in feature["topLogits"]]),
        ("neg_str neg_values", [t.values() for t in feature["bottomLogits"]]),
    ):
        row |= zip(names.split(), ([name for name, _ in pairs], [value for _, value in pairs]), strict=True)
    return row


def _of_activation(activation: Json) -> Json:
    """The strongest contexts have the bin -1 to their largest value, with the share -1, which marks that group."""
    values = activation["values"]
    largest = max(values)
    row = {**activation, "maxValue": largest, "minValue": min(values), "binMax": largest}
    row |= dict.fromkeys(("maxValueTokenIndex", "qualifyingTokenIndex"), values.index(largest))
    return row | {column: activation[theirs] for _, theirs, column, *_ in QUANTILES if theirs in activation}


# --------------------------------------------------------------------------------------------------
# json for the graph page


def write_graph_features(path: str | Path, folder: str | Path, layer: int) -> int:
    """Write {folder}/{latent}.json, for a graph's metadata.feature_details.feature_json_base_url, and return how many.

    Served over https with `Access-Control-Allow-Origin: *`, they show in Neuronpedia's graph page without an upload.
    """
    n = 0
    for feature in features_of(path):
        groups: dict[str, list[Json]] = {}
        for a in feature["activations"]:
            limits = a.get("quantileMin"), a.get("quantileMax")
            name = "Top activations" if None in limits else f"Interval {limits[0]:.4g} - {limits[1]:.4g}"
            groups.setdefault(name, []).append({"tokens_acts_list": a["values"], "tokens": a["tokens"]})
        value = {
            "layer": layer,
            "index": feature["index"],
            "examples_quantiles": [{"quantile_name": name, "examples": e} for name, e in groups.items()],
            "top_logits": [t["token"] for t in feature["topLogits"]],
            "bottom_logits": [t["token"] for t in feature["bottomLogits"]],
        }
        _write_lines([value], Path(folder) / f"{feature['index']}.json")
        n += 1
    return n
