"""A run as a folder: which files there are, what is in them, and how they are written so that none is ever half there.

    manifest.json                                  what was run, by what, on what
    clean/MODEL/CHUNK.parquet                      a row per image: the model on it as it is
    shards/MODEL/ATTACK/EPS/CHUNK.parquet          a row per image: the model after the attack; FIRST-LAST.parquet, of
                                                   all chunks, when these are complete
    checks/MODEL/CHECK/EPS/CHUNK.parquet           the same for the attacks of the trust checks
    transfer/MODEL/SOURCE/ATTACK/EPS/CHUNK.parquet the same for the adversarial images of another model, SOURCE
    transfer.json                                  which models have judged those of others
    images/MODEL/ATTACK/EPS/CHUNK.safetensors      adversarial images, bit for bit; the clean ones under ATTACK "clean"
    images/MODEL/ATTACK/EPS/CHUNK-POSITION.png     the same, one by one, of a run that is exact in 8 bits
    sessions/NUMBER-HOST-PROCESS.json              one process at work on the run: when, how, on what, and how it ended
    unfinished/KIND,MODEL,ATTACK,EPS,CHUNK,FIRST-END.parquet, .safetensors
                                                   some rows of a chunk at work, and their images; gone when it is whole

Every file is whole or not there (`files`), so what exists is finished. Several processes may write to one run: each has
its own session, shards depend on nothing but the configuration, and manifest.json is created once. What it says of
sessions and status is a copy, for whoever opens it by hand.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from orthattack.eval.data import parquet
from orthattack.eval.errors import EvaluationError, first_line, out_of_memory
from orthattack.eval.storage.files import Disk, Store, open_files
from orthattack.eval.storage.schema import NULLABLE, SCHEMAS, STATUSES, Kind, SessionRecord, from_json, schema_of, unfit

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1

_CHUNK = re.compile(r"\d{6,8}(-\d{6,8})?\.(parquet|safetensors)")  # a chunk, or all from one to another
_MAX_COMPACT, _MAX_IMAGES = 500_000, 2**27  # rows, and bytes of images, in one file
_PICTURE = re.compile(r"\d{6,}-(\d{6,18})\.png")
_FOREIGN = r"|\..+\.partial|\.nfs\w+|\.DS_Store"  # what a killed process, NFS and file managers leave behind
_FIRST_NAMES = re.compile(r"sessions" + _FOREIGN)
_NAMES = re.compile(
    r"(manifest|checks|transfer|results|classes|confusion)(-\w+)?\.json|results(-\w+)?\.(csv|md)|report(-\w+)?\.html"
    r"|sessions|clean|shards|checks|transfer|images|unfinished|[\w-]+\.damaged(-\d+)?" + _FOREIGN
)
_SESSIONS = re.compile(r"\d{5}-.+\.json|(whole|shard-\d+-of-\d+)\.lock|.+\.damaged(-\d+)?" + _FOREIGN)
"""What a run's folder and its folder of sessions may hold, before there is a manifest and after."""
_UNFINISHED = "unfinished"
_PART = re.compile(r"(.+,\d{6,8}),(\d{6,8})-(\d{6,8})\.(parquet|safetensors)")  # a chunk, and which of its rows


def shown_eps(eps: float | None, norm: str) -> str:
    """A radius as people write it: 4/255, 0.5, or "minimal" for None, an attack that minimises the norm."""
    if eps is None:
        return "minimal"
    return f"{255 * eps:.4g}/255" if norm == "linf" and eps < 0.2 else f"{eps:.4g}"


def _slug(text: str) -> str:
    """A file name for any text: the text itself where it is one, else a readable part and a hash."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", text)[:60].lstrip(".") or "_"
    is_free = plain == text and re.search(r"-[0-9a-f]{8}$", text) is None  # or it could be that of another text
    return plain if is_free else f"{plain}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


@dataclass(frozen=True)
class Shard:
    """One result file: one attack at one radius on one chunk of the images with one model."""

    model: str  # label of the model
    attack: str  # label of the attack, "clean" for the model on its own
    eps: float | None  # radius in pixel units, or None for an attack that minimises the norm
    chunk: int  # number of the chunk
    kind: Kind = "shards"  # which part of the folder it belongs to
    source: str = ""  # label of the model that was attacked, for transfer

    @property
    def path(self) -> Path:
        """Where its rows are, relative to the run's folder."""
        return self._in(self.kind, ".parquet")

    @property
    def image_path(self) -> Path:
        """Where its images are, relative to the run's folder; those of the checks are apart from the run's."""
        return self._in("checks" if self.kind == "checks" else "images", ".safetensors")

    @property
    def part(self) -> str:
        """What the names of its parts begin with, while it is not finished."""
        return ",".join(self.path.with_suffix("").parts)

    def _in(self, folder: str, suffix: str) -> Path:
        parts = [folder, _slug(self.model), *([_slug(self.source)] if self.source else [])]
        if self.kind != "clean" or folder == "images":
            parts += [_slug(self.attack), "minimal" if self.eps is None else f"{self.eps:.9g}"]
        return Path(*parts, f"{self.chunk:06d}{suffix}")


class RunFolder:
    """The files of one run, in a folder, or at the URL of one in a store; it need not exist before `create`."""

    def __init__(self, place: Path | str, say: Callable[[str], None] = lambda _: None) -> None:
        self._files = open_files(place, say)
        self._say = say
        self._whole: set[str] = set()  # files of many chunks that have been read
        self._manifest: bytes | None = None
        self._ended: dict[str, dict[str, Any]] = {}  # sessions that have, whose records do not change any more
        self.notes: list[str] = []  # what of it belongs into the session's record

    def __str__(self) -> str:
        """The folder as people call it."""
        return str(self._files)

    @property
    def path(self) -> Path | None:
        """Where it is on this machine's disks; None for a store."""
        return self._files.root if isinstance(self._files, Disk) else None

    @property
    def exists(self) -> bool:
        """Whether there is a run."""
        return self._files.exists("manifest.json")

    def create(self) -> None:
        """Make the folder; EvaluationError if that cannot be done, or if it holds something else."""
        try:
            # Another process of the same run may be ahead of this one, but not have written the manifest yet.
            names = self._files.names()
            known = _NAMES if "manifest.json" in names else _FIRST_NAMES
            inner = self._files.names("sessions") if "sessions" in names else []
            strange = [name for name in names if not known.fullmatch(name)]
            strange += [f"sessions/{name}" for name in inner if not _SESSIONS.fullmatch(name)]
            if strange and not self.exists:
                raise EvaluationError(f"{self} is not empty and not the folder of a run; choose another")
            if strange:
                raise EvaluationError(
                    f"{self} holds what no run writes ({', '.join(strange[:3])}): move it, or choose another folder"
                )
            if self.path is not None:
                self.path.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.path):  # can it be written to?
                    pass
        except (OSError, ValueError) as error:  # a name with a null character is a ValueError
            text = getattr(error, "strerror", None) or error
            raise EvaluationError(f"could not make the run folder {self} ({text})") from error

    def manifest(self) -> dict[str, Any]:
        """What manifest.json and the sessions say; EvaluationError if it cannot be read."""
        try:
            # It is created once, and only its copies of what the sessions say change; a store takes long to ask.
            kept = self._manifest if isinstance(self._files, Store) else None
            manifest: dict[str, Any] = from_json(kept or self._files.read("manifest.json"))
        except (OSError, ValueError, RecursionError) as error:
            odd = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            why = f" ({error.strerror or error})" if isinstance(error, OSError) and odd else ""
            raise EvaluationError(f"{self} is not the folder of a run: no readable manifest.json{why}") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise EvaluationError(f"{self} has format {found!r}; this version reads format {FORMAT}")
        self._manifest = _json(manifest)
        records = self.sessions()
        if records:
            texts = (text for one in records for text in one.get("warnings", ()))
            manifest["warnings"] = list(dict.fromkeys(texts))
            manifest["status"] = _status(records)
            # Runs of older versions have theirs in the manifest.
            listed = manifest.get("sessions")
            if isinstance(listed, list):
                records = [one for one in listed if not isinstance(one, dict) or "id" not in one] + records
            manifest["sessions"] = records
        return manifest

    def create_manifest(self, manifest: Mapping[str, Any]) -> bool:
        """Write manifest.json unless there is one; whether it was written."""
        return self._files.create("manifest.json", _json({"format": FORMAT, **manifest}))

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        self._files.write("manifest.json", _json({"format": FORMAT, **manifest}))

    def sessions(self) -> list[dict[str, Any]]:
        """The records of all sessions, in the order in which they began, whatever their clocks say."""
        found = []
        for name in self._names("sessions"):
            if name.endswith(".json") and not name.startswith("."):
                if name in self._ended:
                    found.append(dict(self._ended[name]))
                    continue
                try:
                    record = from_json(self._files.read(f"sessions/{name}"))
                    if (why := unfit(SessionRecord, record)) is not None:
                        raise ValueError(why)
                except (OSError, ValueError, RecursionError) as error:
                    raise EvaluationError(
                        f"{self}/sessions/{name} cannot be read ({getattr(error, 'strerror', None) or error}): it only "
                        "says who worked on the run; remove it"
                    ) from error
                found.append(record)
                if record["outcome"] != "running":
                    self._ended[name] = dict(record)
        return found

    def new_session_id(self, host: str, process: int) -> str:
        """A name for a session's record that no other has, after those of all that began before."""
        numbers = [int(name[:5]) for name in self._names("sessions") if re.fullmatch(r"\d{5}-.*\.json", name)]
        return f"{max(numbers, default=0) + 1:05d}-{_slug(host)}-{process}-{secrets.token_hex(3)}"

    def write_session(self, session: Mapping[str, Any]) -> None:
        """Write a session's record; nobody else writes that file."""
        self._ended.pop(f"{session['id']}.json", None)
        self._files.write(f"sessions/{session['id']}.json", _json(session))

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self._files.exists(name)

    def read_text(self, name: str) -> str | None:
        """A file of the run as text, None if there is none; OSError or UnicodeDecodeError if it cannot be read."""
        return self._files.read(name).decode("utf-8") if self._files.exists(name) else None

    def write_text(self, name: str, text: str) -> Path | str:
        """Write a file of the run, whole or not at all; returns its path, or its URL."""
        self._files.write(name, text.encode("utf-8", "backslashreplace"))
        return f"{self}/{name}" if self.path is None else self.path / name

    def at_once(self) -> AbstractContextManager[None]:
        """A context in which what there is is told from one look, where that is cheaper, as in a store."""
        return self._files.at_once()

    def is_done(self, shard: Shard, rows: int) -> bool:
        """Whether the shard's file is there and whole. One that is damaged, by a failing disk, say, is put aside.

        In a store, what is there counts as whole: stores keep checksums, and to open each of many thousands takes long.
        """
        name = shard.path.as_posix()
        if self._files.exists(name):
            return isinstance(self._files, Store) or self._is_whole(name, shard.kind, rows)
        return any(shard.chunk in _range(one) and self._is_whole(one, shard.kind) for one in self._chunks(shard.path))

    def _is_whole(self, name: str, kind: Kind, rows: int | None = None) -> bool:
        """Whether a file of rows can be read; if not, it is put aside."""
        if name in self._whole:
            return True
        try:
            (path,) = self._files.fetch([name])
            table = _table(path, None)
            if rows in (None, table.num_rows) and table.schema.equals(schema_of(kind, table.column_names)):
                if "-" in PurePosixPath(name).stem:  # of many chunks, which may ask one by one
                    self._whole.add(name)
                return True
            reason = _OTHER
        except _DAMAGE as error:
            _check_memory(error)
            reason = getattr(error, "strerror", None) or first_line(error)
        self._put_aside([name], reason)
        return False

    def _put_aside(self, names: Sequence[str], reason: str) -> None:
        """Put what is damaged aside, on a disk, and say so."""
        kept = ""
        if isinstance(self._files, Disk):
            kept = "; what there was is kept as *.damaged"
            for name in names:
                self._files.put_aside(name)
        note = f"{names[0]} was damaged ({reason}) and is made again{kept}"
        self.notes.append(note)
        self._say(note)

    def done(self, example: Shard, rows: Mapping[int, int]) -> set[int]:
        """Which chunks of the model, attack and radius of `example` are finished, found with one look at their folder;
        `rows` is how many rows each chunk in question has."""
        wanted = self.there(example) & rows.keys()
        if self.path is None:
            return wanted
        whole: set[int] = set()
        for name in self._chunks(example.path):
            if len(own := _range(name)) > 1:
                total = sum(rows[k] for k in own) if rows.keys() >= set(own) else None  # None for a share of the work
                whole |= set(own) if self._is_whole(name, example.kind, total) else set()
        return {k for k in wanted if k in whole or self.is_done(replace(example, chunk=k), rows[k])}

    def there(self, example: Shard) -> set[int]:
        """Which chunks of a model, attack and radius have a file."""
        return {chunk for name in self._chunks(example.path) for chunk in _range(name)}

    def compact(self, example: Shard, rows: Mapping[int, int]) -> None:
        """Make one file of all chunks of a model, attack and radius, and one of their images, on a disk. The chunks go
        when what has been made of them was read back and is the same, so that whoever is killed loses nothing."""
        if not isinstance(self._files, Disk) or len(rows) < 2 or sum(rows.values()) > _MAX_COMPACT:
            return
        kinds: list[tuple[Path, Callable[[Sequence[Path]], bytes | None], Callable[[Path, Sequence[Path]], bool]]] = [
            (example.image_path, _merged_images, _same_images),
            (example.path, _merged_rows, _same_rows),
        ]
        for path, merged, same in kinds:
            target = path.with_name(f"{min(rows):06d}-{max(rows):06d}{path.suffix}").as_posix()
            names = self._chunks(path)
            if target not in names and len(names) > 1:
                content = merged(self._fetched(names))
                if content is None:
                    continue
                self._files.write(target, content)
                try:
                    is_same = same(self._fetched([target])[0], self._fetched(names))
                except _DAMAGE as error:
                    _check_memory(error)
                    is_same = False
                if not is_same:
                    self._files.put_aside(target)
                    continue
            if target in self._singles(path):  # also of what a process that was killed has left
                self._files.remove([name for name in self._singles(path) if name != target])

    def _singles(self, example: Path) -> list[str]:
        """All files of a model, attack and radius, in order."""
        folder = example.parent.as_posix()
        return [f"{folder}/{n}" for n in self._names(folder) if _CHUNK.fullmatch(n) and n.endswith(example.suffix)]

    def write(
        self,
        shard: Shard,
        columns: Mapping[str, Sequence[object]],
        images: Mapping[int, Tensor],
        as_png: bool = False,
    ) -> None:
        """Store a finished shard: its rows and, by position, the images to keep of it, `as_png` if 8 bits hold them."""

        # Images before the rows, since it is the rows that say that the shard is finished.
        if as_png:
            for position in list(images):
                content = _png(images[position])
                if content is not None:
                    name = f"{shard.image_path.with_suffix('').as_posix()}-{position:06d}.png"
                    self._files.write(name, content)
                    images = {k: image for k, image in images.items() if k != position}
        self._store(shard.path.as_posix(), shard.image_path.as_posix(), shard.kind, columns, images)

    def _store(
        self,
        rows: str,
        pictures: str,
        kind: Kind,
        columns: Mapping[str, Sequence[object]],
        images: Mapping[int, Tensor],
        about: Mapping[str, str] | None = None,
    ) -> None:
        import torch
        from safetensors.torch import save

        schema = schema_of(kind, columns).with_metadata(about)
        table = pa.table(
            {field.name: pa.array(map(_text, columns[field.name]), field.type) for field in schema}, schema
        )
        if images:
            positions = sorted(images)
            tensors = {
                "position": torch.tensor(positions),
                "images": torch.stack([images[position].cpu() for position in positions]).contiguous(),
            }
            self._files.write(pictures, save(tensors))
        stream = io.BytesIO()
        pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
        self._files.write(rows, stream.getvalue())

    def keep(
        self,
        shard: Shard,
        first: int,
        columns: Mapping[str, Sequence[object]],
        images: Mapping[int, Tensor],
        batch_size: int,
    ) -> None:
        """Store some rows, and images, of a shard that is not finished, of which `first` others are stored already, and
        how many images were attacked at a time in the end."""
        name = f"{_UNFINISHED}/{shard.part},{first:06d}-{first + len(columns['position']):06d}"
        about = {"batch_size": str(batch_size)}
        self._store(f"{name}.parquet", f"{name}.safetensors", shard.kind, columns, images, about)

    def kept(self, shard: Shard) -> tuple[list[dict[str, Any]], dict[int, Tensor], int | None]:
        """What was stored of a shard that is not finished: rows in the order in which they were made, images by
        position, and how many images were attacked at a time. A part that is damaged is put aside, and what came after
        it is not told."""
        rows: list[dict[str, Any]] = []
        images: dict[int, Tensor] = {}
        size = None
        for name, first, end in self._parts().get(shard.part, ()):
            if first > len(rows):
                break
            if end > len(rows) and (found := self._part(name, shard.kind, end - first)) is not None:
                rows += found[0].to_pylist()[len(rows) - first :]
                images |= found[1]
                size = int((found[0].schema.metadata or {}).get(b"batch_size", b"0")) or None
        return rows, images, size

    def kept_counts(self, shards: Iterable[Shard]) -> dict[Shard, int]:
        """How many rows of each of some shards are stored that are not finished, by the names of their parts."""
        parts = self._parts()
        return {shard: max(end for *_, end in parts[shard.part]) for shard in shards if shard.part in parts}

    def forget(self, shard: Shard | None = None) -> None:
        """Remove what was stored of a shard before it was finished; of all, when everything is."""
        found = (_PART.fullmatch(name) for name in self._names(_UNFINISHED))
        names = [match[0] for match in found if match and (shard is None or match[1] == shard.part)]
        self._files.remove([f"{_UNFINISHED}/{name}" for name in names])
        if shard is None and isinstance(self._files, Disk):
            self._files.remove_folder(_UNFINISHED)

    def _parts(self) -> dict[str, list[tuple[str, int, int]]]:
        """The parts of shards that are not finished, in order: by `Shard.part`, name and which rows."""
        found: dict[str, list[tuple[str, int, int]]] = {}
        for name in self._names(_UNFINISHED):
            if (match := _PART.fullmatch(name)) and match[4] == "parquet":
                part = f"{_UNFINISHED}/{name}", int(match[2]), int(match[3])
                found.setdefault(match[1], []).append(part)
        return found

    def _part(self, name: str, kind: Kind, count: int) -> tuple[pa.Table, dict[int, Tensor]] | None:
        """Rows and images of a part; None if it is damaged."""
        pictures = name.removesuffix("parquet") + "safetensors"
        names = [name, *([pictures] if self._files.exists(pictures) else [])]
        rows, *others = self._fetched(names)
        images: dict[int, Tensor] = {}
        try:
            table = _table(rows, None)
            if table.num_rows != count or not table.schema.equals(schema_of(kind, table.column_names)):
                raise ValueError(_OTHER)
            frame = table.sort_by("position").to_pandas(types_mapper=NULLABLE.get, use_threads=False)
            if (why := _unsound(frame, kind)) is not None:
                raise ValueError(why)
            for path in others:
                with _opened(path) as (file, positions):
                    images |= zip(positions, file.get_tensor("images"), strict=True)
        except (*_DAMAGE, EvaluationError) as error:
            _check_memory(error)
            is_rows = not isinstance(error, EvaluationError)
            reason = getattr(error, "strerror", None) or first_line(error) if is_rows else "its images cannot be read"
            self._put_aside(names, reason)
            return None
        return table, images

    def read(
        self,
        kind: Kind,
        model: str,
        attack: str = "clean",
        eps: float | None = None,
        columns: Sequence[str] | None = None,
        source: str = "",
        unfinished: bool = False,
    ) -> pd.DataFrame:
        """The rows of one model and, but for clean, one attack at one radius, in the order of the images; for transfer,
        with the model that was attacked. With those of `unfinished` chunks, if asked."""
        schema, example = schema_of(kind, columns or ()), Shard(model, attack, eps, 0, kind, source)
        more = self._begun(example) if unfinished else []
        parts = self._tables(self._chunks(example.path), schema, None if more else columns)
        if more:
            whole = pa.concat_tables([*parts, *more]).sort_by("position")
            parts = [whole.select(schema.names if columns is None else list(columns))]
        if not parts:
            parts = [schema.empty_table() if columns is None else schema.empty_table().select(list(columns))]
        return _frame(parts, kind, f"{self}/{kind}/{_slug(model)}" + ("" if kind == "clean" else f"/{_slug(attack)}"))

    def _begun(self, example: Shard) -> list[pa.Table]:
        """The rows that are kept of chunks that are not finished."""
        there, begins = self.there(example), example.part.rpartition(",")[0]
        parts = [part for part in self._parts() if part.rpartition(",")[0] == begins]
        missing = {chunk for part in parts if (chunk := int(part.rpartition(",")[2])) not in there}
        rows = [row for chunk in sorted(missing) for row in self.kept(replace(example, chunk=chunk))[0]]
        return [pa.Table.from_pylist(rows, schema_of(example.kind, rows[0]))] if rows else []

    def read_shard(self, shard: Shard, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The rows of one shard."""
        name = shard.path.as_posix()
        return _frame(self._tables([name], schema_of(shard.kind, columns or ()), columns), shard.kind, f"{self}/{name}")

    def images(
        self,
        model: str,
        attack: str,
        eps: float | None,
        positions: Iterable[int] | None = None,
        kind: Kind = "shards",
    ) -> Iterator[tuple[int, Tensor]]:
        """Stored images (3, H, W), float32, with their positions; only those at `positions` if given."""
        wanted = None if positions is None else set(positions)
        pictures = self._pictures(Shard(model, attack, eps, 0, kind).image_path)
        if wanted is not None:
            pictures = {position: name for position, name in pictures.items() if position in wanted}
        for position, path in zip(pictures, self._fetched([*pictures.values()]), strict=True):
            yield position, _from_png(path)
        for path in self._fetched(self._chunks(Shard(model, attack, eps, 0, kind).image_path)):
            with _opened(path) as (file, found):
                for row, position in enumerate(found):
                    if wanted is None or position in wanted:
                        yield position, file.get_slice("images")[row]

    def image_positions(self, model: str, attack: str, eps: float | None) -> list[int]:
        """Positions of the stored images, without reading the images."""
        found = [*self._pictures(Shard(model, attack, eps, 0).image_path)]
        for path in self._fetched(self._chunks(Shard(model, attack, eps, 0).image_path)):
            with _opened(path) as (_, positions):
                found += positions
        return found

    def _tables(self, names: Sequence[str], schema: pa.Schema, columns: Sequence[str] | None) -> list[pa.Table]:
        """The tables in files; EvaluationError that names one which is damaged."""
        paths = self._fetched(names)
        return [_rows(path, f"{self}/{name}", schema, columns) for path, name in zip(paths, names, strict=True)]

    def _names(self, folder: str) -> list[str]:
        """What lies in one of its folders; EvaluationError if that cannot be told."""
        try:
            return self._files.names(folder)
        except OSError as error:
            raise EvaluationError(f"{self} cannot be read ({error.strerror or error})") from error

    def _chunks(self, example: Path) -> list[str]:
        """The files of a model, attack and radius, in order; without chunks that are in another file too."""
        names = self._singles(example)
        ranges = {name: _range(name) for name in names if "-" in PurePosixPath(name).stem}
        if not ranges:
            return names
        return [n for n in names if not any(n != m and _range(n).start in whole for m, whole in ranges.items())]

    def _pictures(self, example: Path) -> dict[int, str]:
        """The PNG files of a model, attack and radius, by position."""
        folder = example.parent.as_posix()
        found = (_PICTURE.fullmatch(name) for name in self._names(folder))
        return {int(match[1]): f"{folder}/{match[0]}" for match in found if match}

    def _fetched(self, names: Sequence[str]) -> list[Path]:
        """Where files lie; EvaluationError that names one which cannot be had."""
        try:
            return self._files.fetch(names)
        except OSError as error:
            raise EvaluationError(f"{self} cannot be read ({error.strerror or error})") from error


def _range(name: str) -> range:
    """The chunks that a file holds."""
    first, _, last = PurePosixPath(name).stem.partition("-")
    return range(int(first), int(last or first) + 1)


def _merged_rows(paths: Sequence[Path]) -> bytes | None:
    """The content of one file of several."""
    stream = io.BytesIO()
    table = pa.concat_tables([_table(path, None) for path in paths])
    pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
    return stream.getvalue()


def _same_rows(path: Path, parts: Sequence[Path]) -> bool:
    """Whether a file has the rows of others, one after the other."""
    whole, table = pa.concat_tables([_table(part, None) for part in parts]), _table(path, None)
    frames = [one.to_pandas(types_mapper=NULLABLE.get) for one in (whole, table)]
    return table.schema.equals(whole.schema) and bool(frames[0].equals(frames[1]))


def _merged_images(paths: Sequence[Path]) -> bytes | None:
    """The same for images; None if they would be too large for one file."""
    import torch
    from safetensors.torch import load, save

    if sum(path.stat().st_size for path in paths) > _MAX_IMAGES:
        return None
    parts = [load(path.read_bytes()) for path in paths]
    return bytes(save({key: torch.cat([part[key] for part in parts]) for key in ("position", "images")}))


def _same_images(path: Path, parts: Sequence[Path]) -> bool:
    return path.read_bytes() == _merged_images(parts)


def _status(sessions: Sequence[Mapping[str, Any]]) -> str:
    """Of a run with these sessions: complete once one of them has seen that nothing is left."""
    outcomes = [session["outcome"] for session in sessions]
    return next((status for status in ("complete", "running") if status in outcomes), "interrupted")


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode("utf-8")


def _text(value: object) -> object:
    """File names, and messages that quote them, need not be valid text; what is stored is."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _table(path: Path, columns: Sequence[str] | None) -> pa.Table:
    """A file's table, checksums verified. ValueError: it claims more than rows of a run could be."""
    # Half the time of pq.read_table, which looks for a data set of many files around each.
    with parquet.opened(path, page_checksum_verification=True, read_dictionary=_TEXTS) as file:
        sizes = [size for group in range(file.num_row_groups) for size in parquet.page_sizes(file, path, group)]
        if sum(map(sum, sizes)) > _MAX_TABLE or file.metadata.num_rows * file.metadata.num_columns > _MAX_CELLS:
            raise ValueError("larger than rows of a run are")
        table = file.read(columns=None if columns is None else list(columns), use_threads=False)
    for k, name in enumerate(table.column_names):
        if pa.types.is_dictionary(table.column(k).type):  # which may repeat a long text as often as there are rows
            parts = table.column(k).chunks
            length = sum(pc.sum(pc.binary_length(part.dictionary).take(part.indices)).as_py() or 0 for part in parts)
            if length > _MAX_TABLE:
                raise ValueError(f"{name} unpacks to {length / 1e6:.3g} MB")
            table = table.set_column(k, name, table.column(k).cast(pa.string()))
    return table


_TEXTS = ["name", "status", "message"]
_MAX_TABLE, _MAX_CELLS = 64 * 2**20, 20_000_000  # bytes of pages, and of texts; numbers


def _rows(path: Path, name: str, schema: pa.Schema, columns: Sequence[str] | None) -> pa.Table:
    try:
        table = _table(path, columns)
        for column in schema.names if columns is None else columns:
            if column not in table.column_names or table.schema.field(column).type != schema.field(column).type:
                raise ValueError(f"no column {column} of {schema.field(column).type}")
    except _DAMAGE as error:
        _check_memory(error)
        raise EvaluationError(
            f"{name} is damaged ({first_line(error)}): start the run again with the same command, which makes it again"
        ) from error
    return table


_OTHER = "another number of rows, or other columns"
_DAMAGE = (OSError, ValueError, pa.ArrowException)
"""What reading a damaged Parquet file raises; ValueError where a column's name is no text any more."""


def _check_memory(error: BaseException) -> None:
    """A file that cannot be read for want of memory is not damaged."""
    if out_of_memory(error):
        raise MemoryError(first_line(error)) from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, list[int]]]:
    """A file of images, and their positions."""
    import torch

    try:
        with parquet.as_text(path) as name, safe_open(name, framework="pt") as file:
            positions, shape = file.get_tensor("position"), file.get_slice("images").get_shape()
            fits = positions.dim() == 1 and positions.dtype == torch.int64
            if not (fits and len(shape) == 4 and shape[:2] == [len(positions), 3] and min(shape[2:]) > 0):
                raise SafetensorError(f"images of shape {shape}")
            yield file, positions.tolist()
    except (SafetensorError, OSError) as error:
        _check_memory(error)
        raise EvaluationError(
            f"{path} is damaged ({first_line(error)}): delete it, and the Parquet file of the same number of that "
            "model and attack, and start the run again with the same command, which makes them again"
        ) from error


def _png(image: Tensor) -> bytes | None:
    """An image (3, H, W) as a file that gives back the same floats, as k / 255; None if 8 bits do not hold it."""
    import torch
    from PIL import Image

    k = (image.cpu().nan_to_num() * 255).round().clamp(0, 255)
    if not torch.equal(k / 255, image.cpu()):
        return None
    stream = io.BytesIO()
    Image.fromarray(k.byte().permute(1, 2, 0).contiguous().numpy()).save(stream, "PNG")
    return stream.getvalue()


def _from_png(path: Path) -> Tensor:
    """The image (3, H, W), float32, in a file that `_png` has made."""
    import torch

    from orthattack.eval.models.preprocessing import DecodeError, decode

    try:
        image = decode(path.read_bytes())
        if image.format != "PNG" or image.mode != "RGB":
            raise DecodeError(f"{image.format} of mode {image.mode}")
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{path} is damaged ({first_line(error)}): delete it, and the Parquet file of the same number of that "
            "model and attack, and start the run again with the same command, which makes them again"
        ) from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32) / 255


def _unsound(frame: pd.DataFrame, kind: Kind) -> str | None:
    """What is wrong with rows whose columns have the right types."""
    for name in _KEYS.intersection(frame.columns):
        if frame[name].isna().any():
            return f"one has no {name}"
    if "status" in frame and not frame["status"].isin(STATUSES).all():
        return "a status that there is not"
    if "position" in frame and not (np.diff(frame["position"].to_numpy(int), prepend=-1) > 0).all():
        return "positions that do not rise"
    if "status" in frame:
        ok = frame[(frame["status"] == "ok").to_numpy(bool)]
        for name in _OF_OK[kind].intersection(frame.columns):
            if ok[name].isna().any():
                return f"one that is ok has no {name}"
    return None


_KEYS = {"position", "label", "status"}
_ATTACKED = {"success", "adversarial_prediction"}
_OF_OK: dict[Kind, set[str]] = {kind: {*_ATTACKED} for kind in SCHEMAS} | {"clean": {"prediction", "wrong_share"}}


def _frame(tables: Sequence[pa.Table], kind: Kind, place: str) -> pd.DataFrame:
    """A frame of nullable types, so that a whole number stays one where some are missing. EvaluationError: its rows
    are none that a run writes."""
    table = pa.concat_tables(tables)
    # For few rows threads cost more than they save, and where memory is short they cannot be had.
    frame: pd.DataFrame = table.to_pandas(types_mapper=NULLABLE.get, use_threads=table.num_rows > 50_000)
    if (why := _unsound(frame, kind)) is not None:
        raise EvaluationError(
            f"{place} is damaged, with rows that no run writes ({why}): remove it, and start the run again with the "
            "same command, which makes it again"
        )
    return frame
