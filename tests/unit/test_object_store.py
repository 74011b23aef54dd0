"""A folder in an object store that fails now and then, for a while, or for good."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from raytune_llm import object_store
from raytune_llm.errors import ConfigError, ResourceError, RunLost
from raytune_llm.object_store import RemoteFolder, check_writable
from tests.limits import no_file_larger_than
from tests.s3 import Faulty, s3_bucket


class Failing(MemoryFileSystem):
    """Answers every second question with the error of a store that is throttled."""

    protocol = "failing"
    questions = 0
    always = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.removeprefix("failing://"))

    def _fail(self) -> None:
        Failing.questions += 1
        if self.always or Failing.questions % 2:
            raise OSError("SlowDown: Please reduce your request rate.")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._fail()
        super().pipe_file(path, value, mode=mode, **kwargs)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._fail()
        return super().cat_file(path, *args, **kwargs)

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        self._fail()
        if Failing.questions % 4 == 0:  # of the file a part arrives
            super().pipe_file(rpath, Path(lpath).read_bytes()[:3])
        else:
            super().put_file(lpath, rpath, *args, **kwargs)

    def get_file(self, rpath: str, lpath: str, *args: Any, **kwargs: Any) -> None:
        super().get_file(rpath, lpath, *args, **kwargs)
        Failing.questions += 1
        if Failing.questions % 2:  # the connection ends early, without an error
            Path(lpath).write_bytes(Path(lpath).read_bytes()[:3])


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> RemoteFolder:
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setattr(object_store, "PAUSE_S", 0.01)
    Failing.questions = 0
    return RemoteFolder(f"failing://bucket/{uuid.uuid4().hex}")


def test_a_store_that_is_throttled_is_asked_again_and_no_part_of_a_file_passes_for_it(folder: RemoteFolder, tmp_path: Path):
    names = [f"a/{number}" for number in range(9)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"the text of {name}")
    folder.upload(tmp_path, names)
    assert folder.files() == dict.fromkeys(names, 15)
    folder.download(names, tmp_path / "back")
    assert [(tmp_path / "back" / name).read_text() for name in names] == [f"the text of {name}" for name in names]
    assert Failing.questions > 2 * len(names)
    folder.remove("a")
    assert folder.files() == {} and folder.read("a/0") is None


def test_of_two_who_create_a_file_one_does(folder: RemoteFolder):
    assert folder.create("lock", b"mine")
    assert not folder.create("lock", b"theirs")
    assert folder.read("lock") == b"mine"


def test_a_file_that_arrived_though_the_answer_was_lost_is_the_writer_s_own(
    folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch
):
    def answer_lost(self: Failing, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        MemoryFileSystem.pipe_file(self, path, value, mode=mode, **kwargs)
        raise TimeoutError("no answer")

    monkeypatch.setattr(Failing, "pipe_file", answer_lost)
    assert folder.create("lock", b"mine")
    assert not folder.create("lock", b"theirs")


def test_a_store_that_stays_away_is_named(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Failing, "always", True)
    with pytest.raises(RunLost, match=r"failing://bucket/\w+/x can't be written \(OSError: SlowDown"):
        RemoteFolder(folder.address, patience_s=0.05).write("x", b"")
    with pytest.raises(
        ConfigError, match=r"output_dir must be a folder that can be written \(OSError: SlowDown.*AWS_ENDPOINT_URL"
    ):
        check_writable(folder.address, "output_dir")


@pytest.mark.parametrize("address", ["http://host/x", "file:///tmp/x", "nothing://x"])
def test_what_is_no_object_store_is_refused(address: str):
    with pytest.raises(ConfigError, match="output_dir must be"):
        check_writable(address, "output_dir")


def test_a_store_that_refuses_to_create_with_an_error_of_its_own_is_no_store_that_fails(
    folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch
):
    """MinIO and Ceph answer 412 without the condition by which s3fs tells that the file exists."""

    def refuse(self: Failing, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if mode == "create" and self.exists(path):
            raise OSError(22, "At least one of the pre-conditions you specified did not hold")
        MemoryFileSystem.pipe_file(self, path, value, **kwargs)

    monkeypatch.setattr(Failing, "pipe_file", refuse)
    folder = RemoteFolder(folder.address, patience_s=0.05)
    assert folder.create("lock", b"mine")
    assert not folder.create("lock", b"theirs")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError("The provided token has expired."), "credentials may have expired"),
        (FileNotFoundError("The specified bucket does not exist"), "once there is such a bucket"),
    ],
)
def test_what_a_store_no_longer_permits_ends_a_run_that_can_be_resumed(
    error: Exception, said: str, folder: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(self: Failing, *args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(Failing, "put_file", refuse)
    (tmp_path / "x").write_text("x")
    with pytest.raises(RunLost, match=rf"/x can't be written \({type(error).__name__}: .*{said}"):
        RemoteFolder(folder.address, patience_s=0.05).upload(tmp_path, ["x"])


def test_an_upload_in_parts_that_the_store_has_lost_begins_again(
    folder: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As where a request to complete it is repeated, since its answer was lost."""
    errors = [FileNotFoundError("The specified upload does not exist. The upload ID may be invalid.")]

    def put_file(self: Failing, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        if errors:
            raise errors.pop()
        MemoryFileSystem.put_file(self, lpath, rpath, *args, **kwargs)

    monkeypatch.setattr(Failing, "put_file", put_file)
    (tmp_path / "x").write_text("x")
    folder.upload(tmp_path, ["x"])
    assert folder.files() == {"x": 1}


def test_a_full_local_disk_is_not_the_store_s_failure(folder: RemoteFolder, tmp_path: Path):
    (tmp_path / "x").write_text("x" * 10_000)
    folder.upload(tmp_path, ["x"])
    with no_file_larger_than(100), pytest.raises(ResourceError, match=r"can't be copied to .*here.*XDG_CACHE_HOME") as full:
        folder.download(["x"], tmp_path / "here")
    assert not isinstance(full.value, RunLost) and not list((tmp_path / "here").iterdir())


def test_each_fault_of_a_server_is_survived_and_expired_credentials_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of botocore, which would wait for seconds; s3fs and this program also ask again
    monkeypatch.setattr(object_store, "PAUSE_S", 0.01)
    servers: list[Faulty] = []
    (tmp_path / "x").write_bytes(content := bytes(range(256)) * 400)
    with s3_bucket("faults", faulty=servers.append) as address:
        folder, [server] = RemoteFolder(f"{address}/a"), servers
        survived = ["SlowDown", "reset", "lost"]
        server.faults = {"PUT": survived, "HEAD": survived[:], "GET": [*survived, "cut"], "POST": survived[:]}
        folder.upload(tmp_path, ["x"])
        folder.download(["x"], tmp_path / "here")
        assert (tmp_path / "here" / "x").read_bytes() == content
        assert folder.create("lock", b"mine") and not folder.create("lock", b"theirs")
        folder.remove("lock")
        assert folder.files() == {"x": len(content)} and not any(server.faults.values())
        server.faults = {"PUT": ["ExpiredToken"] * 9}
        with pytest.raises(RunLost, match=r"/x can't be written \(PermissionError: .*ExpiredToken.*credentials may have expired"):
            folder.upload(tmp_path, ["x"])
