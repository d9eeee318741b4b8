"""What a DataFrame's rows depend on, as a short text: the query, the session's settings, and the files that it reads.

DataFrames of one fingerprint hold the same rows. Where that cannot be told (a table behind JDBC, a text file read
through an RDD, a query that asks for the date), there is none, and no rows of an earlier fit are used again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hvdspark.plan import Manifest
from hvdspark.store import Store

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

logger = logging.getLogger(__name__)

_PLAN = "org.apache.spark.sql.catalyst.plans.logical."
_EXPRESSION = "org.apache.spark.sql.catalyst.expressions."
_FILES = "org.apache.spark.sql.execution.datasources.LogicalRelation"
_RDD = "org.apache.spark.sql.execution.LogicalRDD"

# Nodes whose description says all that they do. Others (a user's functions, and what Spark may bring in future) do not:
# their rows are known to be the same only where the DataFrame is the very same object.
_TRANSPARENT = re.compile(
    "Aggregate|Deduplicate|Distinct|Except|Expand|Filter|Generate|GlobalLimit|Intersect|Join|LocalLimit|LocalRelation"
    "|Offset|OneRowRelation|Project|Range|Repartition|RepartitionByExpression|ResolvedHint|Sample|Sort|SubqueryAlias"
    "|Tail|Union|View|Window"
)
# Of those, the ones that give the same rows however the rows before them are shared out among partitions. A sample does
# not, nor a limit, nor a choice of one row out of several.
_BY_ROW = re.compile(
    "Distinct|Except|Expand|Filter|Generate|Intersect|Join|LocalRelation|OneRowRelation|Project|Range|Repartition"
    "|RepartitionByExpression|ResolvedHint|Sort|SubqueryAlias|Union|View"
)
_OPAQUE = re.compile(r"UD[AT]?F|^objects\.|Aggregator|Invoke|Reflect")

# Different every time that it is run, or, for a subquery, with sources that are not among the query's own leaves.
_CHANGING = re.compile(r"^Current(Date|Time)|^Now$|^LocalTimestamp|Subquery|^Exists$")

# Settings that say where things are, or how they are shown, and change no row.
_SQL = "spark.sql."
_BESIDE_THE_ROWS = re.compile(r"spark\.sql\.(artifact|catalog|ui|warehouse)\.")
# Settings that share rows out among partitions, and change nothing else.
_SHARING = re.compile(
    r"spark\.sql\.(adaptive\.|autoBroadcastJoinThreshold$|execution\.arrow\.maxRecordsPerBatch$|files\.(max|min|open)"
    r"|join\.|leafNodeDefaultParallelism$|shuffle\.|sources\.bucketing\.)"
)

# RDDs that hold what the driver gave them, or compute on another one.
_LASTING_RDDS = frozenset({"ParallelCollectionRDD", "MapPartitionsRDD", "PythonRDD", "UnionRDD", "CoalescedRDD"})

# What file systems tell of a file that was written anew; each calls its time otherwise.
_FILE_STATES = ("size", "mtime", "last_modified", "LastModified", "updated", "ETag", "etag", "modificationTime")

_FILE_STATUS = re.compile(r"path=(.*?); isDirectory=.*?; length=(\d+);.*? modification_time=(\d+);")


def fingerprint(df: DataFrame) -> str | None:
    """Describe what the rows of a DataFrame depend on.

    Parameters
    ----------
    df
        The DataFrame; no job is run for it, but its files are listed anew.

    Returns
    -------
    str or None
        64 hexadecimal digits. The same query over the same files has the same ones in every session whose settings
        give the same rows: the time zone and most others of ``spark.sql`` count; parallelism, and settings that share
        rows out among partitions, where the rows depend on that, as those of ``sample()`` and ``randomSplit()`` do.
        Where the query holds code, the same DataFrame object within its session. ``None`` where nobody can tell.
    """
    try:
        found = _describe(df)
    except Exception:
        logger.debug("no fingerprint of the DataFrame", exc_info=True)
        return None
    return None if found is None else hashlib.sha256(found.encode()).hexdigest()


def files_fingerprint(store: Store, manifest: Manifest) -> str:
    """Describe the rows in a dataset's files by the files' names, row groups, sizes and times.

    Parameters
    ----------
    store
        Where the files are.
    manifest
        What is in them.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    splits = {name: [asdict(group) for group in groups] for name, groups in manifest.splits.items()}
    paths = sorted({group["path"] for groups in splits.values() for group in groups})
    # One listing for each folder: a request for each file would take long where they are far away.
    states: dict[str, list[str]] = {}
    for folder in sorted({posixpath.dirname(path) for path in paths}):
        for entry in store.filesystem.ls(store.path(*filter(None, (folder,))), detail=True):
            name = posixpath.basename(entry["name"])
            states[posixpath.join(folder, name)] = [str(entry.get(key)) for key in _FILE_STATES]
    known = [[path, states.get(path)] for path in paths]
    return hashlib.sha256(json.dumps([splits, known], sort_keys=True).encode()).hexdigest()


def _describe(df: DataFrame) -> str | None:
    execution: Any = df._jdf.queryExecution()
    plan = execution.analyzed()
    nodes = json.loads(plan.toJSON())
    names = set(_classes(nodes))
    if any(name.startswith(_EXPRESSION) and _CHANGING.search(name.removeprefix(_EXPRESSION)) for name in names):
        return None
    sources = []
    for leaf in _items(plan.collectLeaves()):
        source = _source(df, leaf)
        if source is None:
            return None
        sources.append(source)
    if _RDD in names or any(_is_opaque(name) for name in names):
        # Spark numbers the queries of a driver.
        query = f"{df.sparkSession.sparkContext.applicationId} {execution.id()}"
    else:
        query = json.dumps(_without_ids(nodes, {})) + plan.canonicalized().toString()
    is_by_row = plan.deterministic() and all(map(_is_by_row, names))
    return "\n".join([query, _settings(df, of_sharing=not is_by_row), *sources])


def _settings(df: DataFrame, *, of_sharing: bool) -> str:
    """Describe the session's settings that rows depend on; ``of_sharing``: those that share them out as well."""
    context: Any = df.sparkSession.sparkContext
    conf = df.sparkSession._jsparkSession.sessionState().conf()
    settings = dict(item.split(" -> ", 1) for item in conf.getAllConfs().mkString("\0").split("\0") if item)
    found = {
        key: value
        for key, value in settings.items()
        if key.startswith(_SQL) and not _BESIDE_THE_ROWS.match(key) and (of_sharing or not _SHARING.match(key))
    }
    # What they are where nobody sets them: the version decides, and the process for these two.
    found |= {
        "version": context.version,
        f"{_SQL}session.timeZone": conf.sessionLocalTimeZone(),
        f"{_SQL}ansi.enabled": conf.ansiEnabled(),
    }
    if of_sharing:
        found["parallelism"] = context.defaultParallelism
    return json.dumps(found, sort_keys=True)


def _classes(value: Any) -> Iterator[str]:
    """Yield the class of every node and expression in a plan's JSON."""
    if isinstance(value, dict):
        if "class" in value and "num-children" in value:
            yield value["class"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _classes(item)


def _is_opaque(name: str) -> bool:
    if name.startswith(_EXPRESSION):
        return bool(_OPAQUE.search(name.removeprefix(_EXPRESSION)))
    return name != _FILES and _TRANSPARENT.fullmatch(name.removeprefix(_PLAN)) is None


def _is_by_row(name: str) -> bool:
    if name.startswith(_EXPRESSION) or name == _FILES:
        return True
    return _BY_ROW.fullmatch(name.removeprefix(_PLAN)) is not None


def _without_ids(value: Any, numbers: dict[tuple[int, str], int]) -> Any:
    """Give expressions numbers by their first appearance, as Spark's own differ from session to session."""
    if isinstance(value, list):
        return [_without_ids(item, numbers) for item in value]
    if not isinstance(value, dict):
        return value
    if "jvmId" in value:
        return numbers.setdefault((value["id"], value["jvmId"]), len(numbers))
    return {key: _without_ids(item, numbers) for key, item in value.items() if key not in ("createTime", "desc")}


def _source(df: DataFrame, leaf: Any) -> str | None:
    """Describe the state of what a leaf of the query reads; ``None`` where that cannot be told."""
    name = leaf.getClass().getName()
    if name == _FILES:
        return _files(df, leaf.relation())
    if name == _RDD:
        kinds = set(re.findall(r"(\w+RDD)\[", leaf.rdd().toDebugString()))
        return name if kinds <= _LASTING_RDDS else None
    if name == f"{_PLAN}LocalRelation":
        return str(leaf.data().mkString("|"))
    return name if name.removeprefix(_PLAN) in ("Range", "OneRowRelation", "CTERelationRef") else None


def _files(df: DataFrame, relation: Any) -> str | None:
    """Describe a relation's files as they are now: format, options, and path, size and time of each."""
    if relation.getClass().getSimpleName() != "HadoopFsRelation":
        return None
    jvm: Any = df.sparkSession.sparkContext._jvm
    datasources = jvm.org.apache.spark.sql.execution.datasources
    nothing = jvm.scala.Option.empty()
    no_cache = getattr(datasources, "NoopCache$").__getattr__("MODULE$")
    # A listing of its own: the relation keeps the one of the time at which it was made.
    listing = datasources.InMemoryFileIndex(
        df.sparkSession._jsparkSession,
        relation.location().rootPaths(),
        relation.options(),
        nothing,
        no_cache,
        nothing,
        nothing,
    )
    files = sorted(_FILE_STATUS.findall(listing.allFiles().mkString("\n")))
    what = (relation.fileFormat().toString(), relation.options().toString(), relation.schema().json())
    return json.dumps([what, files]) if files else None


def _items(sequence: Any) -> Iterator[Any]:
    return (sequence.apply(index) for index in range(sequence.size()))
