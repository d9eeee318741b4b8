"""Two hosts with a cluster on them, for all tests of this lane.

Spark knows the first host by its name and, with its second worker, by its address. The second host's own name leads to
its loopback, as on Debian.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from clusters import (  # noqa: F401 - pytest finds fixtures in a conftest
    _environment,
    _leaves_no_process,
    _travels_by_value,
    store,
    warm_parents,
)
from networks import DRIVER, NAMES, SLOTS, Host, HostsCluster, Net, Site, inside, why_not
from pyspark.sql import SparkSession
from standalone import wait_for

from hvdspark.launch.slots import count_slots


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, _environment: None) -> Iterator[Site]:  # noqa: F811
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    with Net() as net:
        driver = net.add(Host(DRIVER, 1, {}, folder / DRIVER))
        alpha = net.add(Host("alpha", 2, NAMES, folder / "alpha"))
        beta = net.add(Host("beta", 3, {**NAMES, "beta": "127.0.1.1"}, folder / "beta"))
        with inside(driver), HostsCluster(driver, NAMES, folder) as cluster:
            found = Site(net, alpha, beta, cluster)
            found.start_workers(alpha)
            found.start_workers(beta)
            cluster.wait_for_cores(sum(SLOTS.values()))
            yield found


@pytest.fixture(scope="session")
def spark(site: Site) -> Iterator[SparkSession]:
    os.environ["SPARK_LOCAL_IP"] = site.cluster.driver.address
    session = (
        SparkSession.builder.master(site.cluster.url)
        .appName("hvdspark-hosts")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.shuffle.partitions", "4")
        .config("spark.executor.memory", "600m")
        .config("spark.driver.host", site.cluster.driver.address)
        .config("spark.driver.bindAddress", site.cluster.driver.address)
        .config("spark.driver.extraJavaOptions", f"-Djdk.net.hosts.file={site.cluster.java_hosts}")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("OFF")
    wait_for(lambda: count_slots(session) == sum(SLOTS.values()), "executors")
    yield session
    session.stop()
    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    wait_for(lambda: not warm_parents(), "the end of the warm pool", 10)
