"""The Store of a job, and its addresses as Spark takes them."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from pyspark.sql import SparkSession

from hvdspark.errors import ParamError, StoreError
from hvdspark.store import Store

# What fsspec and Hadoop call the same file system.
_SCHEMES = {"s3": "s3a", "gcs": "gs"}


def spark_address(session: SparkSession, store: Store, *parts: str) -> str:
    """Return the address of something in the Store for Spark's readers and writers.

    A local path is one only where Spark's default file system is the local one; elsewhere it gets its scheme.
    """
    url = store.url_of(*parts)
    if store.is_local:
        context: Any = session.sparkContext
        default = context._jsc.hadoopConfiguration().get("fs.defaultFS") or "file:///"
        return url if default.startswith("file:") else PurePosixPath(url).as_uri()
    scheme, separator, rest = url.partition("://")
    return f"{_SCHEMES.get(scheme, scheme)}{separator}{rest}"


def open_store(url: str) -> Store:
    """Open the Store of a job; raises ``ParamError`` for an address that nothing can be made of."""
    try:
        return Store.create(url)
    except StoreError as exc:
        raise ParamError(f"store: {exc}", param="store") from exc
