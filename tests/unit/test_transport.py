"""Which sessions want more of the network than ranks keep."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hvdspark.errors import ParamError
from hvdspark.launch.transport import check_transport

SETTINGS = ["spark.authenticate", "spark.network.crypto.enabled", "spark.ssl.enabled", "spark.ssl.rpc.enabled"]


def session(master: str, **settings: str) -> Any:
    values = {"spark.master": master, **settings}
    conf = SimpleNamespace(get=lambda name, default=None: values.get(name, default))
    return SimpleNamespace(sparkContext=SimpleNamespace(getConf=lambda: conf))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("master", ["yarn", "spark://host:7077", "k8s://https://host:443"])
def test_a_protected_cluster_is_refused_by_name_unless_allowed(master: str, name: str) -> None:
    protected = session(master, **{name: "true"})
    with pytest.raises(ParamError, match=rf"^{name}=true: .*allow_insecure_transport=True") as caught:
        check_transport(protected, allow_insecure=False)
    assert caught.value.param == "allow_insecure_transport"
    check_transport(protected, allow_insecure=True)


def test_all_settings_that_were_found_are_named() -> None:
    with pytest.raises(
        ParamError, match=r"^spark\.authenticate=true and spark\.ssl\.enabled=true: .*authenticates and"
    ):
        check_transport(
            session("yarn", **{"spark.authenticate": "TRUE", "spark.ssl.enabled": "true"}), allow_insecure=False
        )


@pytest.mark.parametrize("master", ["local", "local[4]", "local-cluster[2,1,1024]"])
def test_on_one_machine_nothing_is_refused(master: str) -> None:
    check_transport(session(master, **dict.fromkeys(SETTINGS, "true")), allow_insecure=False)


def test_without_protection_nothing_is_refused() -> None:
    check_transport(session("yarn"), allow_insecure=False)
    check_transport(session("yarn", **dict.fromkeys(SETTINGS, "false")), allow_insecure=False)
