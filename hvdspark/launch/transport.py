"""What a session wants of the network that a job's own traffic does not keep: asked before a launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdspark.errors import ParamError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# What each of them has Spark do with its own connections.
_PROTECTIONS = {
    "spark.authenticate": "authenticates",
    "spark.network.crypto.enabled": "encrypts",
    "spark.ssl.enabled": "encrypts",
    "spark.ssl.rpc.enabled": "encrypts",
}


def check_transport(spark: SparkSession, *, allow_insecure: bool) -> None:
    """Refuse a job where Spark protects its connections, unless it is said that the job's own need not be.

    Where the executors are processes of this machine (``local[…]``, ``local-cluster[…]``) nothing leaves it, and there
    is nothing to refuse.

    Raises
    ------
    ParamError
        Naming the settings.
    """
    conf = spark.sparkContext.getConf()
    if allow_insecure or (conf.get("spark.master") or "").startswith("local"):
        return
    found = [name for name in _PROTECTIONS if (conf.get(name) or "").lower() == "true"]
    if found:
        verbs = " and ".join(sorted({_PROTECTIONS[name] for name in found}))
        raise ParamError(
            f"{' and '.join(f'{name}=true' for name in found)}: Spark {verbs} its own connections, but those by which"
            " the ranks exchange gradients (Gloo's or MPI's) would be neither authenticated nor encrypted."
            " If only the cluster's own machines can reach that network, say so with allow_insecure_transport=True;"
            " else train on one machine, or in a network that others cannot reach.",
            param="allow_insecure_transport",
        )
