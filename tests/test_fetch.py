"Fetching shards from the Hugging Face hub, which a module in its place plays here: nothing leaves this machine."
import hashlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from speedrun_nb.core import data
from speedrun_nb.gpt.settings import DATASETS
from speedrun_nb.gpt.shards import write_shard

FINEWEB = DATASETS["fineweb"]
NAMES = FINEWEB.file_names(3)


class Hub:
    "huggingface_hub, as far as it is used: what it announces, what it hands out, what it was asked for."
    def __init__(self, folder):
        self.files, self.asked, self.served = {}, [], {}
        self.after, self.failure = None, ConnectionError("no route to host")
        for i, name in enumerate(NAMES):
            write_shard(folder / name, np.arange(i, i + 500))
            self.files[name] = (folder / name).read_bytes()

    def get_paths_info(self, repo_id, paths, *, repo_type=None):
        assert (repo_id, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        if self.after == -1: raise self.failure
        return [self.info(name) for name in paths if name in self.files]

    def info(self, name):
        content = self.files[name]
        sha256 = hashlib.sha256(content).hexdigest()
        return SimpleNamespace(path=name, size=len(content), lfs=SimpleNamespace(sha256=sha256))

    def hf_hub_download(self, repo_id, filename, *, repo_type=None, local_dir=None, force_download=False):
        assert (repo_id, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset") and not (local_dir / filename).exists()
        self.asked.append((filename, force_download))
        if self.after is not None and len(self.asked) > self.after: raise self.failure
        content = self.served.get(filename, [self.files[filename]])
        (local_dir / filename).write_bytes(content.pop(0) if len(content) > 1 else content[0])
        return str(local_dir / filename)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub(tmp_path / "published")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)
    monkeypatch.delenv("SPEEDRUN_DATA", raising=False)
    return hub


@pytest.fixture
def folder(tmp_path): return tmp_path / "cache" / "speedrun_nb" / "fineweb"


def hashes(folder): return json.loads((folder / "hashes.json").read_text())


def test_fetches_the_validation_shard_and_as_many_others(hub, folder, speedrun):
    done = speedrun("data", "fetch", "fineweb", "--shards", "2")
    assert done.code == 0 and done.out.strip() == str(folder) and [name for name, _ in hub.asked] == NAMES[:3]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*NAMES[:3], "hashes.json"])
    assert hashes(folder) == {name: hashlib.sha256(hub.files[name]).hexdigest() for name in NAMES[:3]}
    assert [row["right"] for row in json.loads(speedrun("data", "check", "fineweb", "--json").out)] == ["yes"] * 3
    assert json.loads(speedrun("doctor", "--json").out)["FineWeb"] == f"2 of 103 shards in {folder}"


def test_what_is_there_is_kept_without_a_network(hub, folder, speedrun):
    assert speedrun("data", "fetch", "fineweb", "--shards", "2").code == 0
    hub.after = -1
    assert speedrun("data", "fetch", "fineweb", "--shards", "2").code == 0 and len(hub.asked) == 3
    refused = speedrun("data", "fetch", "fineweb", "--shards", "3")
    assert refused.code == 1 and "cannot be downloaded (ConnectionError: no route to host)" in refused.err
    assert "set SPEEDRUN_DATA" in refused.err


def test_goes_on_after_an_interruption(hub, folder):
    hub.after, hub.failure = 2, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt): data.fetch(FINEWEB, 3)
    assert set(hashes(folder)) == set(NAMES[:2])
    hub.after, hub.asked = None, []
    data.fetch(FINEWEB, 3)
    assert [name for name, _ in hub.asked] == NAMES[2:] and set(hashes(folder)) == set(NAMES)


class OddError(Exception):
    "httpx2.ConnectError, say, which is no OSError."


@pytest.mark.parametrize("failure", [
    ConnectionError("no route to host"), OddError("[Errno -2] Name or service not known\nmore"),
    OSError(28, "No space left on device"), OddError()])
@pytest.mark.parametrize("after", [-1, 1])
def test_no_network(hub, folder, speedrun, failure, after):
    hub.after, hub.failure = after, failure
    done = speedrun("data", "fetch", "fineweb", "--shards", "1")
    assert done.code == 1 and done.out == "" and f"cannot be downloaded ({type(failure).__name__}" in done.err
    assert "Traceback" not in done.err
    assert "put fineweb_val_000000.bin, fineweb_train_000001.bin and so on into a folder fineweb/" in done.err
    assert "set SPEEDRUN_DATA" in done.err


def test_a_truncated_file_is_fetched_anew(hub, folder):
    data.fetch(FINEWEB, 2)
    (folder / NAMES[1]).write_bytes(hub.files[NAMES[1]][:-100])
    assert ["truncated" in row["right"] for row in data.check(FINEWEB)] == [False, True, False]
    hub.asked = []
    data.fetch(FINEWEB, 2)
    assert [name for name, _ in hub.asked] == [NAMES[1]]
    assert [row["right"] for row in data.check(FINEWEB)] == ["yes"] * 3


@pytest.mark.parametrize("spoil", [
    lambda content: content[:-50], lambda content: content[:-2] + b"\xff\xff", lambda content: b"<html>sign in</html>"])
def test_a_download_that_arrives_damaged_is_made_once_more(hub, folder, speedrun, spoil):
    hub.served[NAMES[1]] = [spoil(hub.files[NAMES[1]]), hub.files[NAMES[1]]]
    data.fetch(FINEWEB, 1)
    assert hub.asked == [(NAMES[0], False), (NAMES[1], False), (NAMES[1], True)]
    assert (folder / NAMES[1]).read_bytes() == hub.files[NAMES[1]]
    (folder / NAMES[1]).unlink()
    hub.served[NAMES[1]] = [spoil(hub.files[NAMES[1]])]
    done = speedrun("data", "fetch", "fineweb", "--shards", "1")
    assert done.code == 1 and "fetched twice, is not sound" in done.err and not (folder / NAMES[1]).exists()


def test_files_put_there_by_hand_are_compared_where_there_is_a_network(hub, folder):
    folder.mkdir(parents=True)
    (folder / NAMES[0]).write_bytes(hub.files[NAMES[0]])
    (folder / NAMES[1]).write_bytes(hub.files[NAMES[1]][:-2] + b"\xff\xff")
    hub.after, told = -1, []
    data.fetch(FINEWEB, 1, told.append)
    assert hub.asked == [] and "not compared with those published" in told[0]
    (folder / "hashes.json").unlink()
    assert [row["by"] for row in data.check(FINEWEB)] == ["size and header; hashes.json has no hash of it"] * 2
    hub.after = None
    data.fetch(FINEWEB, 1)
    assert [name for name, _ in hub.asked] == [NAMES[1]]
    assert hashes(folder)[NAMES[1]] == hashlib.sha256(hub.files[NAMES[1]]).hexdigest()


def test_check_says_what_is_missing_and_what_was_altered(hub, folder, speedrun):
    data.fetch(FINEWEB, 3)
    content = hub.files[NAMES[3]]
    (folder / NAMES[3]).write_bytes(content[:-2] + b"\0\0")
    (folder / NAMES[1]).unlink()
    done = speedrun("data", "check", "fineweb", "--json")
    rows = json.loads(done.out)
    assert done.code == 1 and [row["right"] for row in rows[:3]] == ["yes", "missing", "yes"]
    assert "has the wrong content (sha256" in rows[3]["right"]
    (folder / "hashes.json").write_text("{")
    broken = speedrun("data", "check", "fineweb")
    assert broken.code == 1 and "hashes.json is broken; remove it" in broken.err


def test_a_folder_that_speedrun_data_names_comes_first(hub, folder, monkeypatch, tmp_path):
    own = tmp_path / "own" / "fineweb"
    write_shard(own / NAMES[1], [1, 2, 3])
    monkeypatch.setenv("SPEEDRUN_DATA", str(tmp_path / "own"))
    expected = f"1 of 103 shards in {own}, which lacks fineweb_val_000000.bin; `speedrun data fetch fineweb`"
    assert data.found_files(FINEWEB).startswith(expected)
    assert [(row["found in"], row["right"]) for row in data.check(FINEWEB)] == [(None, "missing"), (own, "yes")]


@pytest.mark.parametrize("arguments, expected", [
    ("fineweb --shards 0", "--shards 0: fineweb has 1 to 103"),
    ("fineweb --shards 104", "--shards 104: fineweb has 1 to 103. A shard has 100 million tokens: 27"),
    ("cifar10 --shards 3", "cifar10 comes whole, not in shards: leave --shards out"),
    ("finweb", 'no data set "finweb". Did you mean "fineweb"?')])
def test_mistakes_are_explained(hub, speedrun, arguments, expected):
    done = speedrun("data", "fetch", *arguments.split())
    assert done.code == 1 and done.out == "" and expected in done.err and hub.asked == []


def test_nine_by_default_and_says_how_many_are_enough(hub, folder, speedrun):
    done = speedrun("data", "fetch", "fineweb")
    assert done.code == 1 and "9 of 103 shards; --shards N fetches another number" in done.err
    assert "27 are enough for 5,100 steps" in done.err
    assert "has no fineweb_train_000004.bin, " in done.err and "fineweb_train_000009.bin any more" in done.err
    assert hub.asked == []  # this hub has three


def test_without_the_package(hub, speedrun, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    done = speedrun("data", "fetch", "fineweb")
    assert done.code == 1 and "pip install 'speedrun_nb[fineweb]'" in done.err
