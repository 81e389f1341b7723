"""features.jsonl holds records exactly, one a line, in ascii; a broken line is named.

Run: python -m pytest tests/pages/test_records.py
"""

import json

import pytest

from sae.config import UserError
from sae.pages.records import Context, FeatureRecord, Histogram, read_features, read_values

KEYS = set(
    "latent density max_activation mean_active label label_precision label_recall promoted suppressed neighbours"
    " histogram contexts".split()
)
CONTEXT = Context(["a", "\x00", "\u202e", "\ud83d"], [0.0, 1.5, 0.0, 2.25], 3, 7, 12)
RECORDS = [
    FeatureRecord(3, 100, 0.0, 0.0, 0.0),
    FeatureRecord(
        5,
        100,
        0.25,
        2.25,
        1.875,
        label="`a`",
        label_precision=0.5,
        label_recall=1.0,
        promoted=[("x", 0.5)],
        neighbours=[(3, 0.25)],
        positions=[1.0],
        histogram=Histogram([1.0, 2.0, 4.0], [1, 3]),
        contexts=[CONTEXT, Context(["b"], [1.0], 0, 1, 2, 0.0, 1.25, 0.5)],
    ),
]


def write(records, path):
    path.write_text("".join(record.to_line() + "\n" for record in records), encoding="ascii")


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "features.jsonl"
    write(RECORDS, path)
    lines = path.read_bytes().decode("ascii").splitlines()
    assert list(read_features(path)) == RECORDS
    for line in lines:
        assert json.loads(line).keys() >= KEYS
    assert json.loads(lines[1])["contexts"][0]["tokens"] == CONTEXT.tokens
    assert json.loads(lines[1])["contexts"][0]["values"] == CONTEXT.values
    assert RECORDS[1].strongest == [CONTEXT]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"latent": 3}', '{"latent":3,"contexts":[],"histogram":{},"x":1}', "null"]
)
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "features.jsonl"
    write(RECORDS[:1], path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match="line 2"):
        list(read_features(path))


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "features.jsonl"
    path.write_bytes(b'{"latent":3,\xff}\n')
    for read in (read_features, read_values):
        with pytest.raises(UserError, match="is not utf-8 text"):
            list(read(path))


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="run sae_viz"):
        list(read_features(tmp_path / "features.jsonl"))
