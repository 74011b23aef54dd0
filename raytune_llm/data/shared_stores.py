"""Token stores in an object store (data.cache=s3://bucket/folder), of which each machine makes a copy once.

Stores are mapped into memory, so they are built in and read from a folder of the cache. `<cache>/<key>/` in the object store
has the shards, each in a folder named by its hash, and manifest.json, which is written last and by one machine only: a store is
complete or absent there, too. Other folders beside them, such as a reference's table, are a manifest.json and a folder of files,
which is named by the manifest's hash.

A place is a location that is the same for all machines: a folder on shared storage, or an address.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial as bound
from pathlib import Path

from raytune_llm.config.paths import expanded
from raytune_llm.data.intact import check_intact, mark_compared
from raytune_llm.data.store import MANIFEST, Shard, Store, locked, manifest_in, partial, record, shard_at, under_construction
from raytune_llm.errors import ConfigError, DataError, ResourceError
from raytune_llm.file_hash import sha256_of
from raytune_llm.object_store import AT_ONCE, RemoteFolder, is_address
from raytune_llm.packaged import cache_dir

HASH_CHARS = 16
"""A shard's folder is named by this many characters of its hash."""


def place_in(cache: str, name: str) -> str:
    """The place of a store, or of another folder, in data.cache."""
    return f"{cache.rstrip('/')}/{name}" if is_address(cache) else str(expanded(cache).resolve() / name)


def local_cache(cache: str) -> Path:
    """The folder of data.cache on this machine."""
    if not is_address(cache):
        return expanded(cache).resolve()
    return cache_dir() / "tokens" / hashlib.sha256(cache.rstrip("/").encode()).hexdigest()[:16]


def local_folder(place: str) -> Path:
    """The folder of a place on this machine."""
    if not is_address(place):
        return Path(place)
    cache, _, name = place.rpartition("/")
    return local_cache(cache) / name


def open_store(place: str) -> Store:
    """Open the store at a place. Raises DataError if it is missing, damaged, or of another version."""
    folder = local_folder(place)
    if is_address(place):
        SharedStore(place).fetch()
        check_intact(folder)
    return Store.open(folder, place)


@contextmanager
def being_made(place: str) -> Iterator[Path | None]:
    """`under_construction` for the store at a place."""
    folder = local_folder(place)
    with ExitStack() as stack:
        try:
            made = stack.enter_context(under_construction(folder.parent, folder.name))
        except ConfigError as error:
            if not is_address(place):
                raise
            lacking = f"this machine's copy of {place} {error.rule}, {error.got}"
            raise ResourceError(lacking, "Let XDG_CACHE_HOME name a folder that can be written.") from None
        yield made


class SharedStore:
    """A token store in an object store, and this machine's copy."""

    def __init__(self, place: str) -> None:
        self.place, self.folder = place, local_folder(place)
        self._remote = RemoteFolder(place)

    def fetch(self) -> bool:
        """Download the store unless this machine has a copy; other processes of this machine wait. Returns False if the object
        store has no such store."""
        with being_made(self.place) as folder:
            return folder is None or self.fetch_into(folder)

    def fetch_into(self, folder: Path) -> bool:
        """Complete the folder of a store under construction from the object store. Returns False if that has no such store.

        Raises DataError if a shard is missing or damaged there.
        """
        manifest = self._remote.read(MANIFEST)
        if manifest is None:
            return False
        listed = manifest_in(manifest, self.place)
        for member in listed.get("members", ()):
            SharedStore(f"{self.place.rpartition('/')[0]}/{member['store']}").fetch()
        self._fetch_shards(folder, {shard["name"]: shard["sha256"] for shard in listed["shards"]})
        for file in folder.iterdir():
            if file.name not in {shard["name"] for shard in listed["shards"]}:
                file.unlink()
        (folder / MANIFEST).write_bytes(manifest)
        folder.rename(self.folder)
        mark_compared(self.folder)
        return True

    def fetch_unfinished(self, folder: Path) -> None:
        """Download the shards of a store that was not completed, except those that the folder has."""
        found = [name.split("/") for name in self._remote.files() if name.endswith(".arrow")]
        self._fetch_shards(folder, {name: beginning for beginning, name in found if not (folder / name).exists()})

    def fetch_others(self, folder: Path, shards: list[Shard]) -> None:
        """Download the shards that other machines built. A local file with the name of one may come from an earlier attempt, and
        is replaced."""
        self._fetch_shards(folder, {shard.name: shard.sha256 for shard in shards})

    def keep(self, folder: Path, shard: Shard) -> None:
        """Upload a shard."""
        self._folder_of(shard.sha256).upload(folder, [shard.name])

    def publish(self) -> None:
        """Upload the parts of the copy that the object store lacks. If another machine was first and its manifest differs (it
        names the files of dropped rows), its store replaces this copy."""
        mine, theirs = (self.folder / MANIFEST).read_bytes(), self._remote.read(MANIFEST)
        if theirs is None:
            there = self._remote.files()
            listed = [(shard["name"], shard["sha256"]) for shard in manifest_in(mine, str(self.folder))["shards"]]
            lacking = [(name, sha256) for name, sha256 in listed if f"{sha256[:HASH_CHARS]}/{name}" not in there]
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda shard: self._folder_of(shard[1]).upload(self.folder, [shard[0]]), lacking))
            if self._remote.create(MANIFEST, mine):
                return
            theirs = self._remote.read(MANIFEST)
        if theirs != mine:
            with locked(self.folder.parent, self.folder.name):
                shutil.rmtree(self.folder)
            self.fetch()

    def _folder_of(self, sha256: str) -> RemoteFolder:
        return self._remote / sha256[:HASH_CHARS]

    def _fetch_shards(self, folder: Path, shards: Mapping[str, str]) -> None:
        """shards: name -> hash, or its first HASH_CHARS characters."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(bound(self._fetch_shard, folder), shards, shards.values()))

    def _fetch_shard(self, folder: Path, name: str, sha256: str) -> None:
        path = folder / name
        if path.exists() and sha256_of(path).startswith(sha256):
            return
        fix = f"Delete {self.place} and run prepare again."
        try:
            self._folder_of(sha256).download([name], folder)
        except FileNotFoundError:
            raise DataError(f"{self.place}/{name}", "is missing", fix) from None
        if not (found := sha256_of(path)).startswith(sha256):
            path.unlink()
            raise DataError(f"{self.place}/{name}", "has other bytes than were written", fix)
        record(path, shard_at(path, found))


def has_folder(place: str) -> bool:
    """Whether the folder at a place is complete: its manifest, which is written last, is there."""
    return RemoteFolder(place).read(MANIFEST) is not None if is_address(place) else (Path(place) / MANIFEST).exists()


def fetch_folder(place: str) -> Path:
    """This machine's copy of a complete folder. It is downloaded once."""
    folder = local_folder(place)
    if is_address(place):
        with locked(folder.parent, f"{folder.name}.copy"):
            if not (folder / MANIFEST).exists():
                remote, beside = RemoteFolder(place), partial(folder)
                manifest = remote.read(MANIFEST)
                if manifest is None:
                    raise DataError(f"{place}/{MANIFEST}", "is missing", "Repeat the command.")
                there = remote / _name_of(manifest)
                names = list(there.files())
                if not names:  # earlier versions wrote them beside the manifest
                    there, names = remote, [name for name in remote.files() if "/" not in name]
                there.download(names, beside)
                (beside / MANIFEST).write_bytes(manifest)
                shutil.rmtree(folder, ignore_errors=True)
                beside.rename(folder)
    return folder


def publish_folder(place: str) -> None:
    """Upload this machine's copy of a folder, the manifest last. If another machine was first, its manifest and files stay: of
    tables that differ in their last bits, no reader gets a mixture."""
    if is_address(place):
        folder, remote = local_folder(place), RemoteFolder(place)
        manifest = (folder / MANIFEST).read_bytes()
        name = _name_of(manifest)
        (remote / name).upload(folder, [file.name for file in folder.iterdir() if file.name != MANIFEST])
        if not remote.create(MANIFEST, manifest):
            remote.remove(name)


def _name_of(manifest: bytes) -> str:
    """The name, in the object store, of the folder of a manifest's files. The manifest has their hashes, so that other files have
    another name."""
    return hashlib.sha256(manifest).hexdigest()[:HASH_CHARS]
