from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from raytune_llm.data import store as store_module
from raytune_llm.data.dropped import Dropped
from raytune_llm.data.intact import check_intact
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.conversations import ConversationRow
from raytune_llm.data.store import Store, complete, finished_shard, key_of, locked, under_construction, write_shard
from raytune_llm.errors import ConfigError, DataError

ROWS = [([1, 2, 3], [1, 3]), ([4], [0, 1]), ([5, 6, 7, 8], [0, 2, 3, 4]), ([9, 9], [])]


def test_rows_come_back_over_all_shards(make_store):
    store = make_store(ROWS, rows_per_shard=3)
    assert [(ids.tolist(), spans.tolist()) for ids, spans, _ in map(store.row, range(len(store)))] == ROWS
    assert store.lengths.tolist() == [3, 1, 4, 2]


def test_targets_leave_out_a_first_token_which_nothing_predicts(make_store):
    assert make_store(ROWS, rows_per_shard=3).trained.tolist() == [2, 0, 2, 0]


def test_the_same_rows_make_the_same_bytes(tmp_path):
    rows = [ConversationRow(np.array(ids), np.array(spans)) for ids, spans in ROWS]
    shards = [write_shard(tmp_path / name, rows, Dropped(), kind=KINDS["conversations"]) for name in "ab"]
    assert shards[0].sha256 == shards[1].sha256


def test_a_finished_shard_is_known_again_with_its_dropped_rows(tmp_path):
    dropped = Dropped()
    dropped.add("too odd", "7", "a.jsonl, row 3")
    shard = write_shard(tmp_path / "shard", [ConversationRow([1, 2], [1, 2])], dropped, kind=KINDS["conversations"])
    assert finished_shard(tmp_path / "shard") == shard


def test_a_shard_that_is_cut_off_is_not_taken_for_finished(tmp_path):
    write_shard(tmp_path / "shard", [ConversationRow([1, 2], [1, 2])], Dropped(), kind=KINDS["conversations"])
    (tmp_path / "shard").write_bytes((tmp_path / "shard").read_bytes()[:-20])
    assert finished_shard(tmp_path / "shard") is None


def test_whatever_byte_of_a_shard_changes_it_is_not_taken_for_finished_and_the_store_is_refused(make_store, tmp_path):
    store = make_store(ROWS)
    shard = tmp_path / "shard-00000.arrow"
    write_shard(shard, [ConversationRow([1, 2], [1, 2])], Dropped(), kind=KINDS["conversations"])
    for path, refuse in ((shard, no_finished_shard), (store.folder / shard.name, refused)):
        content = path.read_bytes()
        for place in {*random.Random(1).sample(range(len(content)), 300), *range(len(content) - 300, len(content))}:
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
            refuse(path)


def test_a_preparation_that_ends_at_its_very_end_loses_no_shard(tmp_path):
    making = tmp_path / ".key.partial"
    making.mkdir()
    shard = write_shard(making / "shard-00000.arrow", [ConversationRow([1], [1])], Dropped(), kind=KINDS["conversations"])
    (making / ".shard-00000.arrow.7").touch()

    (tmp_path / "key" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"):
        complete(making, [shard], {}, tmp_path / "key", kind="conversations")
    assert finished_shard(making / shard.name) == shard
    (tmp_path / "key" / "in the way").rmdir()
    complete(making, [shard], {}, tmp_path / "key", kind="conversations")
    assert {file.name for file in (tmp_path / "key").iterdir()} == {"manifest.json", shard.name}


def test_a_comparison_with_hashes_that_lasts_is_said(make_store, monkeypatch, caplog):
    store = make_store(ROWS)
    monkeypatch.setattr(store_module, "SAID_AFTER_S", 0.0)
    store.verify()
    assert f"1 of 1 shards in {store.folder} are compared with their hashes" in caplog.text


def no_finished_shard(path):
    assert finished_shard(path) is None


def refused(path):
    with pytest.raises(DataError, match=r"shard-00000\.arrow: .*Delete the folder"):
        check_intact(path.parent)


def test_a_missing_shard_is_refused(make_store):
    store = make_store(ROWS)
    (store.folder / "shard-00000.arrow").unlink()
    with pytest.raises(DataError, match=r"shard-00000\.arrow: is missing\. Delete the folder"):
        Store.open(store.folder)


def test_a_shard_of_another_size_is_refused(make_store):
    store = make_store(ROWS)
    with (store.folder / "shard-00000.arrow").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(DataError, match=r"has \d+ bytes, but \d+ in the manifest"):
        Store.open(store.folder)


def test_verify_finds_a_changed_byte(make_store):
    store = make_store(ROWS)
    store.verify()
    path = store.folder / "shard-00000.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="does not match its hash"):
        store.verify()


def test_a_store_of_another_version_is_refused(make_store):
    path = make_store(ROWS).folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 999}))
    with pytest.raises(DataError, match="version 999"):
        Store.open(path.parent)


def test_a_folder_without_a_manifest_is_no_store(make_store):
    store = make_store(ROWS)
    (store.folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="is not a token store"):
        Store.open(store.folder)


def test_a_complete_store_is_not_made_again(tmp_path, make_store):
    make_store(ROWS)
    with under_construction(tmp_path / "stores", "key") as folder:
        assert folder is None


def test_a_complete_store_of_another_user_is_taken_from_a_cache_that_can_not_be_written(tmp_path, make_store):
    make_store(ROWS)
    stores = tmp_path / "stores"
    (stores / ".key.lock").unlink(missing_ok=True)
    for key in ("key", "other"):
        (stores / f".{key}.lock").mkdir()  # a lock that can't be opened, also by root
    with under_construction(stores, "key") as folder:
        assert folder is None
    with (
        pytest.raises(ConfigError, match=r"data\.cache must be a folder that can be written"),
        under_construction(stores, "other"),
    ):
        pass


def test_who_waits_for_a_store_says_which_process_makes_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(store_module, "SAID_AFTER_S", 0.1)
    holds = [f"from pathlib import Path; from raytune_llm.data.store import locked; place = Path({str(tmp_path)!r})"]
    holds += ["with locked(place, 'key'): print('held', flush=True); input()"]
    with subprocess.Popen([sys.executable, "-c", "\n".join(holds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        mine = threading.Thread(target=lambda: locked(tmp_path, "key").__enter__())
        mine.start()
        while not caplog.messages:
            time.sleep(0.05)
        said = caplog.messages[0]
        other.communicate(b"\n")
        mine.join(30)
    assert f"waiting for {tmp_path}/key, which process {other.pid} on {socket.gethostname()} makes (" in said
    assert not mine.is_alive()


def test_the_key_does_not_depend_on_the_order_of_its_parts():
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1, "b": 3})


def test_a_store_is_read_without_pandas(make_store):
    code = "import sys; from pathlib import Path; from raytune_llm.data.store import Store; Store.open(Path(sys.argv[1])).row(0)"
    words = [sys.executable, "-c", f"{code}; print('pandas' in sys.modules)", str(make_store(ROWS).folder)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "False\n"
