"""From the name of a dataset to its documents: files, folders, HuggingFace datasets, the embedded corpus.

A document is a text, a chat or an array of token ids. Knows nothing of tokenizers, rows or the held-out split.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae import log
from sae.config import UserError, require
from sae.files import beside, one_sentence

PIECE = 1 << 20  # characters or tokens: a longer file is read as several documents, texts cut at line ends
BATCH = 256  # rows of a table read at a time
PEEK = 20  # records that are looked at to find the column
# Names of the column that holds the text or the chat in the hub's datasets, in order of preference.
COLUMNS = "input_ids text content messages conversations conversation chat document article passage body".split()
COLUMNS += "story code dialogue hard_text sentence context question".split()
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
HELD_OUT = ("validation", "valid", "val", "dev", "test")  # splits that can validate, in the order they are taken
FOLDERS = ("data", "datasets", "out")  # with these, owner/name is meant as a path
RECORDS = (".json", ".jsonl", ".ndjson")
FILES = (".txt", ".md", ".py", *RECORDS, ".parquet", ".bin", ".csv", ".gz")
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


@dataclass
class Dataset:
    """Where documents come from. A document is a text, a chat (list of role/content) or an array of token ids.

    documents(split) starts from the first document every time; split is "train" or "val", which differ only if
    has_split. fingerprint() is a sha256 that changes with the content. The other fields are what was asked for.
    """

    name: str
    has_split: bool
    documents: Callable[[str], Iterator[Any]]
    fingerprint: Callable[[], str]
    text_column: str | None = None
    split: str = "train"
    streaming: bool = False


def open_dataset(
    name: str | None = None, *, text_column: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset:
    """The dataset `name` means: None for the embedded corpus, else as DataConfig.dataset says; a local path wins.

    text_column: the field to read (default: found by name and content). split, streaming: for HuggingFace datasets.
    """
    path = Path(name or "")
    if name is not None and not (name and _exists(path)):
        return _from_hub(name, text_column, split, streaming)
    what = f"'{name or 'the embedded corpus'}'"
    require(not streaming, f"{what} lies on this machine and is read as it is needed; leave --streaming out")
    if name is not None and _saved_to_disk(path):
        return _from_disk(name, text_column, split)
    require(split == "train", f"{what} has no split '{split}'; leave --split out")
    has_bins = name is not None and (path / "train.bin").is_file()
    files = [] if name is None or has_bins else _files_below(path)
    has_columns = any(_kind(file) in (*RECORDS, ".parquet") for file in files)
    require(text_column is None or has_columns, f"{what} has no columns to read; leave --text_column out")
    if name is None:
        corpus = beside("assets/pygpt/corpus.py")
        sources = lambda: [Path(str(corpus.__file__)), *(file for file, _ in corpus.library_files())]
        return Dataset("embedded", True, corpus.documents, lambda: _hash_files(sources()))
    if has_bins:
        bins = {part: path / f"{part}.bin" for part in ("train", "val")}
        has_val = bins["val"].is_file()
        read = lambda part: _token_pieces(bins[part] if has_val else bins["train"])
        return Dataset(name, has_val, read, lambda: _hash_files([f for f in bins.values() if f.is_file()]))
    return _from_files(name, files, text_column)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long to be one
        return False


def _saved_to_disk(path: Path) -> bool:
    has = lambda *names: all((path / file).is_file() for file in names)
    return has("dataset_dict.json") or has("dataset_info.json", "state.json")


def _extra(package: str, what: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise UserError(f"{what} needs {package}; run: pip install 'nanosae[hf]'") from e


# --------------------------------------------------------------------------------------------------
# files


def _files_below(path: Path) -> list[Path]:
    hidden = lambda p: any(part.startswith(".") for part in p.relative_to(path).parts)
    return sorted(p for p in path.rglob("*") if p.is_file() and not hidden(p)) if path.is_dir() else [path]


def _from_files(name: str, files: list[Path], column: str | None) -> Dataset:
    require(bool(files), f"folder '{name}' holds no files; give text, jsonl, json, parquet or .bin files")
    require(any(p.stat().st_size for p in files), f"dataset '{name}' is empty; give a text that is not")
    read = lambda _split: chain.from_iterable(_file_documents(file, column, name) for file in files)
    return Dataset(name, False, read, lambda: _hash_files(files), column)


def _kind(file: Path) -> str:
    """Its ending, or the one below .gz."""
    return file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix


def _file_documents(file: Path, column: str | None, name: str) -> Iterator[Any]:
    zipped, kind = file.suffix == ".gz", _kind(file)
    if kind == ".bin" and not zipped:
        yield from _token_pieces(file)
        return
    if kind == ".parquet":
        yield from _parquet_documents(file, column, name)
        return
    try:
        with gzip.open(file, "rt", encoding="utf-8") if zipped else file.open(encoding="utf-8") as f:
            if kind in RECORDS:
                yield from documents_of(_json_records(f, file), column, str(file), name)
                return
            while piece := f.read(PIECE):
                yield piece + f.readline(PIECE)
    except UnicodeDecodeError as e:
        raise UserError(f"'{file}' is not utf-8 text ({e.reason} at byte {e.start}); convert it or leave it out") from e
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"cannot read '{file}': {getattr(e, 'strerror', None) or e}") from e


def _json_records(f: Any, file: Path) -> Iterator[Any]:
    """A json list's items (it is read whole), or one value a line, which many files named .json hold too."""
    first = next((line for line in f if line.strip()), "")
    if first.lstrip().startswith("[") and ".json" in file.suffixes:
        try:
            yield from json.loads(first + f.read())
        except ValueError as e:
            raise UserError(f"'{file}' is not json ({e}); a list of records was expected") from e
        return
    f.seek(0)
    for number, line in enumerate(f, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as e:
                raise UserError(f"{file}:{number} is not json ({e}); give a list of records, or one a line") from e


def _parquet_documents(file: Path, column: str | None, name: str) -> Iterator[Any]:
    """Read in batches of rows, and only the column wanted."""
    parquet, types = _extra("pyarrow.parquet", f"'{file}'"), _extra("pyarrow.types", f"'{file}'")
    nested = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_struct)
    texts = (types.is_string, types.is_large_string, types.is_dictionary, *nested)
    with one_sentence(f"cannot read '{file}' as parquet", "copy it again"), parquet.ParquetFile(file) as open_file:
        schema = open_file.schema_arrow
        likely = [c for c, kind in zip(schema.names, schema.types, strict=True) if any(is_(kind) for is_ in texts)]

        def rows(columns: Sequence[str]) -> Iterator[dict]:
            for batch in open_file.iter_batches(batch_size=BATCH, columns=columns):
                yield from batch.to_pylist()

        yield from documents_of(rows(likely), column, str(file), name, Table(schema.names, rows))


def _token_pieces(file: Path) -> Iterator[np.ndarray]:
    """A nanoGPT .bin (uint16 ids) in pieces, so that it need not fit in memory."""
    if file.stat().st_size % 2:
        raise UserError(f"'{file}' has an odd number of bytes; a nanoGPT .bin holds uint16 token ids")
    if file.stat().st_size == 0:
        return
    ids = np.memmap(file, dtype=np.uint16, mode="r")
    for start in range(0, len(ids), PIECE):
        yield ids[start : start + PIECE]


def _hash_files(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    total = sum(file.stat().st_size for file in files)
    with log.progress(total, "hashing the data", unit="B", quiet=total < 1 << 28) as bar:
        for file in files:
            digest.update(file.name.encode())
            with file.open("rb") as f:
                while block := f.read(1 << 20):
                    digest.update(block)
                    bar.update(len(block))
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# HuggingFace datasets


def _from_disk(name: str, column: str | None, split: str) -> Dataset:
    """A folder that save_to_disk wrote."""
    library = _extra("datasets", f"'{name}'")
    with one_sentence(f"cannot read the dataset saved in '{name}'", "save it again"):
        whole = library.load_from_disk(name)
    splits = dict(whole) if isinstance(whole, dict) else {"train" if split == "train" else str(whole.split): whole}
    return _from_splits(name, splits, column, split, False, lambda _: _hash_files(sorted(Path(name).rglob("*.arrow"))))


def _from_hub(name: str, column: str | None, split: str, streaming: bool) -> Dataset:
    """A dataset of the hub, `name` or `name:config`. No code of a dataset's own is ever run."""
    if not HUB_NAME.fullmatch(name) or Path(name).suffix in FILES:
        raise UserError(f"dataset '{name}' does not exist; give a file, a folder, or a HuggingFace dataset")
    parent = Path(name).parts[0] if "/" in name else ""
    if parent in FOLDERS or (parent and Path(parent).is_dir()):  # asking the hub would take half a minute
        here = f"there is no such thing in '{parent}'" if Path(parent).is_dir() else f"there is no folder '{parent}'"
        raise UserError(f"dataset '{name}' does not exist, {here}; give a file, a folder, or a HuggingFace dataset")
    library = _extra("datasets", f"there is no file or folder '{name}', and a HuggingFace dataset")
    library.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # older versions would ask
    path, _, config = name.partition(":")
    load = lambda **which: library.load_dataset(path, config or None, streaming=streaming, **which)
    todo = "it is no file or folder here either, so check the name and the network"
    with one_sentence(f"cannot load '{name}' from the HuggingFace hub", todo):
        try:
            splits = load()
        except ValueError:
            configs = [] if config else library.get_dataset_config_names(path)
            if len(configs) < 2:
                raise
            config = configs[0]
            name = f"{path}:{config}"
            log.say(f"'{path}' has configurations ({_some(configs)}); reading the first, as in --dataset {name}")
            splits = load()
        # a slice, as in train[:10%]
        more = {split: load(split=split)} if split not in splits and re.search(r"[\[+]", split) else {}

    def prints(used: list[Any]) -> str:
        told = [str(d.info.version) if streaming else d._fingerprint for d in used]
        return hashlib.sha256(json.dumps([name, split, *told]).encode()).hexdigest()

    return _from_splits(name, {**splits, **more}, column, split, streaming, prints)


def _from_splits(
    name: str, splits: dict[str, Any], column: str | None, split: str, streaming: bool, prints: Callable[[list], str]
) -> Dataset:
    if split not in splits:
        raise UserError(f"'{name}' has no split '{split}' (it has: {_some(splits)}); choose one with --split")
    words = re.findall(r"\w+", split)
    candidates = [*(words[0].replace("train", word) for word in HELD_OUT), *HELD_OUT]  # train_sft goes with test_sft
    val = next((c for c in candidates if c in splits and c not in words), None)
    used = {"train": splits[split], "val": splits[val or split]}
    readers = {part: _row_reader(data, column, name) for part, data in used.items()}
    fingerprint = lambda: prints(list(used.values()))
    return Dataset(name, val is not None, lambda part: readers[part](), fingerprint, column, split, streaming)


def _row_reader(data: Any, column: str | None, name: str) -> Callable[[], Iterator[Any]]:
    """Reads a HuggingFace dataset, from its first row at each call."""
    columns = list(data.features or {})
    pictures = [c for c in columns if hasattr(data.features[c], "decode_example")]  # and sounds

    def rows(wanted: Sequence[str]) -> Iterator[dict]:
        chosen = data.select_columns(list(wanted)) if wanted else data
        with one_sentence(f"cannot read on in '{name}'", "--resume goes on from a checkpoint"):
            for batch in chosen.with_format("arrow").iter(BATCH):  # 40 times quicker than row by row
                yield from batch.to_pylist()

    @cache
    def head() -> list[dict]:
        return list(islice(rows([c for c in columns if c not in pictures]), PEEK))

    def documents() -> Iterator[Any]:
        yield from documents_of(head(), column, f"'{name}'", name, Table(columns, rows))

    return documents


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


# --------------------------------------------------------------------------------------------------
# records -> documents


class Table(NamedTuple):
    """All columns of a table, and what reads the rows of some of them."""

    columns: Sequence[str]
    rows: Callable[[Sequence[str]], Iterator[dict]]


def documents_of(
    records: Iterable[Any], column: str | None, where: str, name: str, table: Table | None = None
) -> Iterator[Any]:
    """The documents in records: dicts that hold one in a column, or texts and chats as they are; empty ones left out.

    where: the records' place, for errors. name: the dataset, for the message about its column. table: the records come
    from its head; the column with the documents alone is read from it.
    """
    records = iter(records)
    head = list(islice(records, PEEK))
    found = choose_column(head, column, where, name, table.columns if table else ())
    records = chain(head, records)
    if table is not None and found is not None:
        masked = found == "input_ids" and "attention_mask" in head[0]
        records = table.rows([found, "attention_mask"] if masked else [found])
    for number, record in enumerate(records, 1):
        value = record.get(found) if isinstance(record, dict) and found is not None else record
        if value is None or value in ("", [], {}) or (isinstance(value, str) and value.isspace()):
            continue
        document = _document(value)
        if document is None or (isinstance(document, np.ndarray) and not isinstance(record, dict)):
            raise UserError(
                f"{where}: record {number} holds neither a text, a chat nor token ids"
                + (f" in '{found}'; mend it, or choose another with --text_column" if found else "")
            )
        if isinstance(document, np.ndarray) and isinstance(record, dict) and record.get("attention_mask") is not None:
            document = document[np.asarray(record["attention_mask"], dtype=bool)]  # padding is no text
        yield document


def choose_column(
    head: Sequence[Any], asked: str | None, where: str, name: str, columns: Sequence[str] = ()
) -> str | None:
    """The column that holds the documents, said once if it was not asked for; None for records that have no columns.

    A known name wins (COLUMNS), else the column with the longest texts or chats: the first is often an id or a title.
    """
    tables = [record for record in head if isinstance(record, dict)]
    columns = list(dict.fromkeys((*columns, *(key for record in tables for key in record))))
    if not tables:
        return asked if columns else None
    if asked is not None:
        require(asked in columns, f"{where} has no column '{asked}' (it has: {_some(columns)}); see --text_column")
        return asked
    lengths: dict[str, int] = {}
    for c in columns:
        documents = [_document(record[c]) for record in tables if record.get(c)]
        if documents and all(d is not None and (c == "input_ids") == isinstance(d, np.ndarray) for d in documents):
            lengths[c] = sum(len(str(d)) for d in documents)
    if not lengths:
        raise UserError(f"{where} has no column of texts or chats alone (it has: {_some(columns)}); see --text_column")
    found = next((c for c in COLUMNS if c in lengths), max(lengths, key=lambda c: lengths[c]))
    if len(columns) > 1:
        log.once(f"reading column '{found}' of '{name}' (it has: {_some(columns)}); --text_column chooses another")
    return found


def _document(value: Any) -> Any:
    """The text, chat or array of ids that a record's value is, or None."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, np.ndarray)) and len(value) and isinstance(value[0], (int, np.integer)):
        return np.asarray(value)
    return _chat(value)


def _chat(value: Any) -> list[dict[str, str]] | None:
    """A chat as a list of role and content, also from ShareGPT's from and value or a table of columns; else None."""
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        return None
    chat = []
    for turn in value:
        if not isinstance(turn, dict):
            return None
        role = next((turn[key] for key in ("role", "from", "speaker") if isinstance(turn.get(key), str)), None)
        content = next((turn[key] for key in ("content", "value", "text") if key in turn), None)
        if isinstance(content, list):  # parts, of which pictures have no text
            content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
        if role is None or not isinstance(content, (str, type(None))):
            return None
        chat.append({"role": SPEAKERS.get(role.lower(), role), "content": content or ""})
    return chat
