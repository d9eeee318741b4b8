"""Batch inference: rows in, the same rows with the model's outputs out."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

from hvdspark.estimators.job.config import Input
from hvdspark.estimators.job.models import address_of, load_model
from hvdspark.estimators.job.rows import read_rows
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from hvdspark.aliases import AliasEntry, read_alias
from hvdspark.data.columns import find_field
from hvdspark.errors import ParamError
from hvdspark.store import Store
from hvdspark.warmstart import ALIAS


@dataclass(frozen=True)
class ScoreResult:
    """What scoring ends with; the last line that ``hvdspark score`` prints.

    Parameters
    ----------
    state
        ``"finished"``, ``"failed"`` or ``"interrupted"``.
    exit_code
        See :mod:`hvdspark.cli.exits`.
    model, run_id
        Address of the model, and the run that trained it where an alias named it.
    output
        Where the scored rows are.
    rows
        How many.
    cause, error
        The first line of the error, and its class.
    seconds
        Wall time.
    """

    state: str
    exit_code: int
    model: str | None = None
    run_id: str | None = None
    output: str | None = None
    rows: int | None = None
    cause: str | None = None
    error: str | None = None
    seconds: float = 0.0

    def to_json(self) -> str:
        """Return it as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True)
class ScoreJob:
    """What to score by what, and where it goes.

    Parameters
    ----------
    model
        Address of a saved model, or ``alias:<name>`` for the one that an alias of the Store refers to.
    source
        The rows.
    output
        Where the scored rows go.
    output_format
        Any writer of Spark's.
    mode
        ``"error"`` where something is there already, ``"overwrite"`` or ``"append"``.
    columns
        Columns to keep; empty for all.
    store
        For aliases.
    """

    model: str
    source: Input
    output: str
    output_format: str = "parquet"
    mode: str = "error"
    columns: tuple[str, ...] = ()
    store: Store | None = None

    def entry(self) -> AliasEntry | None:
        """Return what the alias refers to; ``None`` where the model has an address.

        Raises
        ------
        ConfigError
            When there is no such alias, or no Store to look in.
        """
        if not self.model.startswith(ALIAS):
            return None
        name = self.model.removeprefix(ALIAS)
        if self.store is None:
            raise ParamError(f"--model {self.model}: give the Store that has the alias, with --store", param="store")
        entry = read_alias(self.store, name)
        if entry is None:
            raise ParamError(f"--model {self.model}: there is no alias '{name}' in {self.store}", param="model")
        return entry

    def run(self, session: SparkSession) -> ScoreResult:
        """Score; raises an :class:`HvdSparkError` for what cannot be read, scored or written."""
        started = time.time()
        entry = self.entry()
        address, run_id = self.model, None
        if entry is not None:
            assert self.store is not None
            address, run_id = address_of(session, self.store, entry), entry.run_id
        scored = load_model(session, address, self.store).transform(read_rows(session, self.source))
        if self.columns:
            scored = _chosen(scored, self.columns)
        rows = self._write(scored)
        return ScoreResult("finished", 0, address, run_id, self.output, rows, seconds=round(time.time() - started, 3))

    def _write(self, scored: DataFrame) -> int:
        """Write the rows and count them on the way."""
        counted = Observation("scored")
        writer = scored.observe(counted, F.count(F.lit(1)).alias("rows")).write.format(self.output_format)
        try:
            writer.mode(self.mode).save(self.output)
        except Exception as exc:
            if "PATH_ALREADY_EXISTS" in str(exc):
                raise ParamError(
                    f"--output {self.output} is there already; give another path, or --mode overwrite or append",
                    param="output",
                ) from exc
            raise
        return int(counted.get["rows"])


def _chosen(scored: DataFrame, columns: tuple[str, ...]) -> DataFrame:
    for name in columns:
        find_field(scored.schema, name)
    return scored.select(*[f"`{name}`" for name in columns])
