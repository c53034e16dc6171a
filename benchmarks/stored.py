"""Stored results: ``benchmarks/results/WHAT/MACHINE.json``, one schema for all.

A file holds tables, each measured in one process: a new measurement of a table replaces the old one, and leaves the
others. `benchmarks.report` makes pages of them. The study's results are larger, and lie beside as Parquet files.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, field_validator
from tabulate import tabulate

from orthattack.attacks.scoring import has_bfloat16

__all__ = ["RESULTS", "Row", "Stored", "Table", "by_machine", "keep", "machine", "medians", "shown", "stored"]

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
_ROWS: TypeAdapter[list[Row]] = TypeAdapter(list[dict[str, str | int | float | list[float]]])


class Table(BaseModel):
    """What one process measured.

    Attributes:
        name: what of, among the tables of its file, such as "resnet18-8-10".
        hardware: in words, such as "CPU with AVX512, 2 threads".
        versions: of the packages that were measured.
        rows: lists are one number per round.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    hardware: str
    versions: dict[str, str]
    rows: list[Row]

    @field_validator("rows")
    @classmethod
    def _plain(cls, rows: list[Row]) -> list[Row]:
        return _ROWS.validate_python(rows)


class Stored(BaseModel):
    """One file: all that was measured of one kind on one kind of machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    what: str
    machine: str
    tables: list[Table]


def machine() -> tuple[str, str]:
    """The name of this machine's kind in file names, and what it is called: a GPU, or how wide a CPU computes."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), name
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and not has_bfloat16(torch.device("cpu")):
        return "avx512-without-bfloat16", "CPU with AVX512, without bfloat16"
    return capability.lower(), f"CPU with {capability}"


def keep(what: str, name: str, rows: Iterable[Row], threads: int, folder: Path = RESULTS, *beside: str) -> Path:
    """Store a table in place of the one of the same name, and show it. `beside`: packages that were measured too."""
    rows = list(rows)
    slug, hardware = machine()
    if not torch.cuda.is_available():
        hardware += f", {threads} threads"
    packages = ("orthattack", "torch", "foolbox", *beside)
    versions = {package: version(package) for package in packages}
    new = Table(name=name, hardware=hardware, versions=versions, rows=rows)
    path = folder / what / f"{slug}.json"
    before = Stored.model_validate_json(path.read_text(encoding="utf-8")).tables if path.exists() else []
    tables = sorted([table for table in before if table.name != name] + [new], key=lambda table: table.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = Stored(what=what, machine=slug, tables=tables)
    path.write_text(content.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print(f"{what}, {name}: {hardware}\n\n{tabulate(shown(rows), 'keys', 'github')}\n", flush=True)
    return path


def stored(folder: Path = RESULTS) -> list[Stored]:
    """All files of a folder, by what was measured and on what.

    Raises:
        pydantic.ValidationError: a file is not what this module writes.
    """
    return [Stored.model_validate_json(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/*.json"))
            if path.parent.name != "study"]  # fmt: skip


def shown(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows with each list as its median and range."""
    return [
        {
            key: f"{statistics.median(value):.4g} ({min(value):.4g} to {max(value):.4g})"
            if isinstance(value, list)
            else value
            for key, value in row.items()
        }
        for row in rows
    ]


def by_machine(folder: Path, what: str) -> dict[str, list[Table]]:
    """The tables of one kind, by machine."""
    return {file.machine: file.tables for file in stored(folder) if file.what == what}


def medians(rows: Sequence[Row]) -> dict[str, float]:
    """The median time of each candidate, in ms."""
    return {row["candidate"]: statistics.median(row["ms"]) for row in rows}
