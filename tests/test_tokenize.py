"`speedrun tokenize`, end to end: every kind of file, any number of processes, and what is left behind when it fails."
import functools
import gzip
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import BIN, environment, finish, start

from speedrun_nb.core.errors import SpeedrunError
from speedrun_nb.gpt import tokenize as module
from speedrun_nb.gpt.data import read_tokens
from speedrun_nb.gpt.settings import Data
from speedrun_nb.gpt.shards import open_shard
from speedrun_nb.gpt.text import byte_encoding, gpt2_encoding
from speedrun_nb.gpt.tokenize import tokenize

SUPPLIED = Path(os.environ.get("SPEEDRUN_DATA") or "absent") / "tiktoken_cache"
CACHE = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or SUPPLIED)
needs_gpt2 = pytest.mark.skipif(not CACHE.is_dir(), reason="needs the gpt2 vocabulary, by TIKTOKEN_CACHE_DIR")


@functools.cache
def documents():
    "Some two hundred of many sizes, the longest cut into sections; made of words by a fixed seed."
    generator = np.random.default_rng(0)
    words = ["the", " cat", " sat's", "\n", "\n\n", " 1984", "  ", " naïve", " 北京", "\t🎲", "<|endoftext|>", "."]
    sizes = [*generator.integers(1, 400, 200), 30_000]
    return ["".join(np.array(words)[generator.integers(0, len(words), size)]) for size in sizes]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    return path


def streams(folder, made):
    "Training and validation tokens, as one array each."
    shards = {shard["file"]: open_shard(folder / shard["file"]) for shard in made["shards"]}
    def stream(which): return np.concatenate([tokens for file, tokens in shards.items() if f"_{which}_" in file])
    return stream("train"), stream("val")


def parts(tokens, encoding):
    "What stands between end-of-text tokens, decoded."
    starts = np.flatnonzero(tokens == encoding.eot_token)
    assert starts[0] == 0
    return [encoding.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


@pytest.mark.parametrize("name", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
def test_round_trip(source, tmp_path, name):
    made = tokenize([source], tmp_path / "out", encoding=name, shard_tokens=7_000)
    train, validation = streams(tmp_path / "out", made)
    encoding = byte_encoding() if name == "bytes" else gpt2_encoding()
    assert (made["tokens"]["train"], made["tokens"]["validation"]) == (len(train), len(validation))
    assert made["documents"] == len(documents())
    found = parts(train, encoding), parts(validation, encoding)
    short = documents()[:-1]
    whole = [part for side in found for part in side if part in short]
    assert sorted(whole) == sorted(short)  # each once
    assert [part for part in found[0] if part in short] == [text for text in short if text in found[0]]  # in order
    rest = [part for side in found for part in side if part not in short]
    assert sum(map(len, rest)) == len(documents()[-1]) and all(part in documents()[-1] for part in rest)


@needs_gpt2
def test_a_known_sentence(tmp_path):
    texts = ["Hello world"] * 2 + [f"{i} is a number" for i in range(40)]
    for i, text in enumerate(texts): (tmp_path / f"{i:02}.txt").write_text(text)
    made = tokenize(sorted(tmp_path.glob("*.txt")), tmp_path / "out", validation="0.3")
    both = np.concatenate(streams(tmp_path / "out", made)).tolist()
    at = both.index(15496)
    assert both[at - 1:at + 3] == [50256, 15496, 995, 50256] and both.count(15496) == 2
    assert made["vocabulary"] == 50257
    on_each_side = sorted((side == 15496).sum() for side in streams(tmp_path / "out", made))
    assert on_each_side == [0, 2]  # copies stand on one side


@needs_gpt2
def test_cutting_a_document_changes_no_token(tmp_path):
    (tmp_path / "long.txt").write_text(documents()[-1])
    made = tokenize([tmp_path / "long.txt"], tmp_path / "out", validation="0.5")
    cut = np.concatenate(streams(tmp_path / "out", made))
    whole = gpt2_encoding().encode_ordinary(documents()[-1])
    assert sorted(cut[cut != 50256].tolist()) == sorted(whole) and (cut == 50256).sum() >= 2


def test_the_number_of_processes_changes_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module.section_batches, "__defaults__", (2_000,))
    folders = {n: tmp_path / f"out{n}" / "same" for n in (1, 2, 3)}
    made = [tokenize([source], folder, encoding="bytes", shard_tokens=20_000, processes=n)
            for n, folder in folders.items()]
    assert made[0] == made[1] == made[2] and len(made[0]["shards"]) > 3
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders.values()]
    assert files[0] == files[1] == files[2]


def test_all_kinds_of_files_give_the_same_tokens(source, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "docs.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    table = pyarrow.table({"id": range(len(documents())), "body": documents()})
    coded = pyarrow.table({"body": pyarrow.array(documents(), pyarrow.large_string()).dictionary_encode()})
    parquet.write_table(table, tmp_path / "docs.parquet", row_group_size=50)
    parquet.write_table(coded, tmp_path / "coded.parquet")
    for i, text in enumerate(documents()): (tmp_path / f"{i:03}.txt").write_bytes(text.encode())
    kinds = {"a": ([source], "text"), "b": ([tmp_path / "docs.jsonl.gz"], "text"),
             "c": ([tmp_path / "docs.parquet"], "body"), "d": ([tmp_path / "coded.parquet"], "body"),
             "e": (sorted(tmp_path.glob("*.txt")), "text")}
    made = {name: tokenize(files, tmp_path / "out", name=name, encoding="bytes", column=column)
            for name, (files, column) in kinds.items()}
    expected = streams(tmp_path / "out", made["a"])
    for name in kinds: assert all(map(np.array_equal, streams(tmp_path / "out", made[name]), expected)), name
    assert len({json.dumps([shard["sha256"] for shard in each["shards"]]) for each in made.values()}) == 1


def test_validation_as_asked(source, tmp_path):
    def validated(name, asked):
        made = tokenize([source], tmp_path / "out", name=name, encoding="bytes", validation=asked)
        return made["tokens"]["validation"]
    some = validated("some", "4000")
    assert 4_000 < some < 4_000 + 8_000  # whole documents: one more than is used, and the last of them
    assert validated("half", "50%") > some


def test_a_study_can_train_on_it(source, tmp_path, monkeypatch):
    made = tokenize([source], tmp_path / "home" / "mine", name="docs", encoding="bytes", shard_tokens=20_000)
    monkeypatch.setenv("SPEEDRUN_DATA", str(tmp_path / "home"))
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)
    tokens = read_tokens(Data("mine", "docs_train", "docs_val", None, 128), 257)
    assert tokens.hashes == {shard["file"]: shard["sha256"] for shard in made["shards"]}
    assert sum(map(len, tokens.train)) == made["tokens"]["train"]


# the command

def test_command(source, tmp_path, speedrun):
    out = tmp_path / "home" / "mine"
    done = speedrun("tokenize", source, "--out", out, "--encoding", "bytes", "--name", "docs")
    assert done.code == 0 and f"{len(documents())} documents" in done.out
    assert "docs_train_000001.bin" in done.out and "docs_val_000000.bin" in done.out
    command = next(line for line in done.out.splitlines() if line.startswith("SPEEDRUN_DATA="))
    assert command.startswith(f"SPEEDRUN_DATA={out.parent} speedrun run gpt -p profile cpu -p overrides ")
    assert "data.dataset=mine data.train=docs_train data.validation=docs_val model.vocabulary=320" in command
    again = speedrun("tokenize", source, "--out", out, "--encoding", "bytes", "--name", "docs")
    assert again.code == 1 and "already" in again.err and "--name" in again.err
    assert all(name in again.err for name in ("docs_train_000001.bin", "docs_val_000000.bin", "docs.json"))
    made = json.loads(speedrun("tokenize", source, "--out", out, "--encoding", "bytes", "--json").out)
    assert made["sources"][0]["file"] == str(source) and made == json.loads((out / "text.json").read_text())


@pytest.mark.parametrize("content, expected", [
    (b'{"text": "a"}\n{"text": \n', "bad.jsonl, line 2: not JSON"),
    (b'{"text": "\xe9"}\n', "bad.jsonl, line 1: not UTF-8"),
    (b'{"body": "a", "id": 1}\n', "there is no column 'text', but body, id"),
    (b'{"text": 1}\n', "'text' is no text but int"),
    (b"\n\n", "there is no text in"),
    (b'{"text": null}\n{"text": ""}\n', "there is no text in"),
    (b'{"text": "short"}\n', "too little text to split")])
def test_bad_input_leaves_nothing_behind(tmp_path, speedrun, content, expected):
    (tmp_path / "bad.jsonl").write_bytes(content)
    done = speedrun("tokenize", tmp_path / "bad.jsonl", "--out", tmp_path / "out", "--encoding", "bytes")
    assert done.code == 1 and done.out == "" and expected in done.err and list(tmp_path.glob("out/*")) == []


def test_bad_input_after_full_shards_leaves_nothing_behind(source, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SpeedrunError, match="bad.txt is not UTF-8 at byte 3"):
        tokenize([source, tmp_path / "bad.txt"], tmp_path / "out", encoding="bytes", shard_tokens=100, processes=2)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("failing", ["train_000001", "val_000000"])
def test_a_disk_that_is_full_at_the_end(source, tmp_path, monkeypatch, failing):
    write = module.ShardWriter._flush
    def flush(self, count):
        if f"{self.name}_{self.first:06d}".endswith(failing): raise SpeedrunError("No space left on device")
        write(self, count)
    monkeypatch.setattr(module.ShardWriter, "_flush", flush)
    with pytest.raises(SpeedrunError, match="No space"): tokenize([source], tmp_path / "out", encoding="bytes")
    assert list((tmp_path / "out").iterdir()) == []


def die(*arguments): os._exit(3)


def test_a_process_that_dies(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "encode_sections", die)
    with pytest.raises(SpeedrunError, match="one of 2 processes died.*--processes"):
        tokenize([source], tmp_path / "out", encoding="bytes", processes=2)
    assert list((tmp_path / "out").iterdir()) == []


def test_interrupted(tmp_path):
    text = "A line of text, and then another one.\n" * 2_000
    with (tmp_path / "big.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(600))
    words = (tmp_path / "big.jsonl", "--out", tmp_path / "out", "--encoding", "bytes", "--shard-tokens", "200000")
    process = start(BIN / "speedrun", "tokenize", *words, "--processes", "2", env=environment())
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if list(tmp_path.glob("out/*.part")): break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process)
    assert done.code == 130 and "interrupted" in done.err and "Traceback" not in done.err
    assert list((tmp_path / "out").iterdir()) == []
