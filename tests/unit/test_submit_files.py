"""The files in examples/submit for clusters that no test has: that they say what they mean, and fit together.

The scripts are run, with another program in the place of spark-submit; the names of Spark's settings are looked up in
its jars. Nothing of it ran on YARN or Kubernetes.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyspark
import pytest
import yaml

from hvdspark import Store

FOLDER = Path(__file__).parents[2] / "examples" / "submit"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sh") if "NOT TESTED HERE" in path.read_text())

# In the place of spark-submit: notes its arguments.
SUBMIT = """#!{python} -IS
import json, os, sys
json.dump(sys.argv[1:], open(os.environ["ARGUMENTS"], "w"))
if "RESULT" in os.environ:
    os.makedirs(os.environ["STORE"] + "/runs/nightly", exist_ok=True)
    open(os.environ["STORE"] + "/runs/nightly/result.json", "w").write(os.environ["RESULT"])
sys.exit(int(os.environ["SUBMITTED"]))
"""


class Submitted:
    """One call of a script."""

    def __init__(self, tmp_path: Path, script: str, arguments: list[str], **environment: str) -> None:
        program, noted = tmp_path / "submit.py", tmp_path / "arguments"
        program.write_text(SUBMIT.format(python=sys.executable))
        program.chmod(0o755)
        values = {
            "SPARK_SUBMIT": str(program),
            "PYTHON": sys.executable,
            "ARGUMENTS": str(noted),
            "STORE": str(tmp_path / "store"),
            "MASTER": "k8s://https://host:6443",
            "IMAGE": "host/hvdspark:1",
            "SUBMITTED": "0",
        }
        command = [str(FOLDER / script), *arguments]
        self.done = subprocess.run(
            command, env={**os.environ, **values, **environment}, capture_output=True, text=True, check=False
        )
        given = json.loads(noted.read_text()) if noted.exists() else []
        pairs = itertools.pairwise(given)
        self.conf = dict(value.split("=", 1) for option, value in pairs if option == "--conf")
        self.options = given


def arguments_of(script: str) -> list[str]:
    return ["nightly", "/etc/job.yaml"] if script == "yarn.sh" else ["nightly"]


def test_there_are_scripts_for_both() -> None:
    assert SCRIPTS == ["kubernetes.sh", "yarn.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("code", "submitted"), [(0, "1"), (65, "0")])
def test_a_script_ends_with_the_exit_code_of_the_job_whatever_spark_submit_says(
    tmp_path: Path, script: str, code: int, submitted: str
) -> None:
    result = {"run_id": "nightly", "exit_code": code, "promoted": code == 0}
    found = Submitted(
        tmp_path, script, [*arguments_of(script), "--set", "estimator.epochs=3"],
        RANKS="4", RANKS_PER_EXECUTOR="2", SUBMITTED=submitted, RESULT=json.dumps(result),
    )  # fmt: skip
    assert found.done.returncode == code, found.done.stderr
    assert json.loads(found.done.stdout.splitlines()[-1]) == result
    assert found.options[found.options.index("--deploy-mode") + 1] == "cluster"
    program = next(i for i, value in enumerate(found.options) if value.endswith("hvdspark_job.py"))
    job = found.options[program + 1 :]
    assert job[0::2] == ["--config", "--store", "--run-id", "--set"]
    assert job[3::2] == [str(tmp_path / "store"), "nightly", "estimator.epochs=3"]
    assert found.conf["spark.dynamicAllocation.enabled"] == "false"
    slots = int(found.conf["spark.executor.instances"]) * int(found.conf["spark.executor.cores"])
    assert slots // int(found.conf["spark.task.cpus"]) == 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_that_left_nothing_may_be_tried_again_and_a_wrong_call_may_not(tmp_path: Path, script: str) -> None:
    found = Submitted(tmp_path, script, arguments_of(script), SUBMITTED="1")
    assert found.done.returncode == 75
    assert "left no result" in json.loads(found.done.stdout)["cause"]
    assert Submitted(tmp_path, script, arguments_of(script), SUBMITTED="127").done.returncode == 127
    (tmp_path / "arguments").unlink()
    for wrong in (
        Submitted(tmp_path, script, []),
        Submitted(tmp_path, script, arguments_of(script), RANKS="3", RANKS_PER_EXECUTOR="2"),
    ):
        assert wrong.done.returncode == 64
        assert wrong.options == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_result_of_the_try_before_is_not_that_of_a_driver_that_never_started(tmp_path: Path, script: str) -> None:
    store = Store.create(tmp_path / "store")

    def left_before(**result: Any) -> subprocess.CompletedProcess[str]:
        store.publish_bytes(json.dumps({"run_id": "nightly", **result}).encode(), "runs", "nightly", "result.json")
        return Submitted(tmp_path, script, arguments_of(script), SUBMITTED="1").done

    assert left_before(exit_code=65, seconds=3.25).returncode == 75
    assert left_before(exit_code=0, seconds=3.25).returncode == 0
    store.delete("runs")
    store.make_folder("runs/nightly/result.json")  # what cannot be read
    done = Submitted(tmp_path, script, arguments_of(script)).done
    assert (done.returncode, "cannot read" in done.stdout) == (75, True), done.stderr


@pytest.fixture(scope="module")
def spark_texts() -> bytes:
    """The classes of Spark that may name settings."""
    jars = Path(pyspark.__file__).parent / "jars"
    found = []
    for part in ("core", "launcher", "yarn", "kubernetes"):
        (jar,) = jars.glob(f"spark-{part}_*.jar")
        with zipfile.ZipFile(jar) as archive:
            names = (name for name in archive.namelist() if re.search(r"onfig|package|Conf\.class|k8s/|yarn/", name))
            found += [archive.read(name) for name in names if name.endswith(".class")]
    return b"".join(found)


def is_text(text: bytes, classes: bytes) -> bool:
    """Whether a text is a constant of a class, as Java's class files hold them: kind, length, bytes."""
    return b"\x01" + len(text).to_bytes(2, "big") + text in classes


def is_known(key: str, classes: bytes) -> bool:
    """Whether Spark has a setting, or joins it of two texts that it has, or takes any name behind a text."""
    name = key.encode()
    free = re.match(rb"spark\.(executorEnv|yarn\.appMasterEnv|kubernetes\.(driver|executor)\.secretKeyRef)\.", name)
    if free is not None:
        return is_text(free[0], classes) or is_text(free[0][:-1], classes)
    # In a text that is joined at run time, the byte 1 stands for what comes before.
    parts = ((name[:at], b"\x01" + name[at:]) for at in range(len(name)) if name[at : at + 1] == b".")
    return is_text(name, classes) or any(is_text(one, classes) and is_text(two, classes) for one, two in parts)


@pytest.mark.parametrize("script", SCRIPTS)
def test_spark_knows_the_settings_of_a_script(tmp_path: Path, script: str, spark_texts: bytes) -> None:
    found = Submitted(tmp_path, script, arguments_of(script), SECRET="hvdspark-store", PYTHON="true")
    assert len(found.conf) > 10
    assert [key for key in found.conf if not is_known(key, spark_texts)] == []
    assert not is_known("spark.executor.memoryOverheads", spark_texts)
    assert not is_known("spark.kubernetes.image", spark_texts)


def documents(name: str) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all((FOLDER / name).read_text())


def test_the_files_for_kubernetes_refer_to_what_is_there(tmp_path: Path) -> None:
    made = {document["kind"]: document for document in documents("kubernetes.yaml")}
    (secret,) = documents("secret.yaml")
    found = Submitted(tmp_path, "kubernetes.sh", ["nightly"], SECRET=secret["metadata"]["name"], PYTHON="true")
    namespace = made["Namespace"]["metadata"]["name"]
    assert found.conf["spark.kubernetes.namespace"] == namespace
    assert {document["metadata"].get("namespace", namespace) for document in [*made.values(), secret]} == {namespace}
    account = found.conf["spark.kubernetes.authenticate.driver.serviceAccountName"]
    assert made["ServiceAccount"]["metadata"]["name"] == account
    assert [subject["name"] for subject in made["RoleBinding"]["subjects"]] == [account]
    assert made["RoleBinding"]["roleRef"]["name"] == made["Role"]["metadata"]["name"]
    references = [value for key, value in found.conf.items() if ".secretKeyRef." in key]
    assert len(references) == 4
    assert {value.partition(":")[2] for value in references} == set(secret["stringData"])

    labels = made["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    (source,) = made["NetworkPolicy"]["spec"]["ingress"][0]["from"]
    assert source["podSelector"]["matchLabels"] == labels
    for role in ("driver", "executor"):
        path = Path(found.conf[f"spark.kubernetes.{role}.podTemplateFile"])
        assert path.parent == FOLDER
        (pod,) = documents(path.name)
        assert (pod["apiVersion"], pod["kind"]) == ("v1", "Pod")
        assert pod["metadata"]["labels"] == labels
        (container,) = pod["spec"]["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert set(mounts) == set(volumes)
        claim = volumes["store"]["persistentVolumeClaim"]["claimName"]
        assert claim == made["PersistentVolumeClaim"]["metadata"]["name"]
        if role == "executor":
            assert (mounts["shm"], volumes["shm"]["emptyDir"]["medium"]) == ("/dev/shm", "Memory")
        else:
            config = found.options[found.options.index("--config") + 1]
            assert Path(config).parent == Path(mounts["job"])


def test_all_of_it_says_that_it_is_not_tested() -> None:
    names = ["yarn.sh", "kubernetes.sh", "Dockerfile", *(path.name for path in FOLDER.glob("*pod.yaml"))]
    names += ["kubernetes.yaml", "secret.yaml"]
    for name in names:
        assert "NOT TESTED HERE" in (FOLDER / name).read_text(), name


def test_the_image_has_the_spark_that_is_tested() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    instructions = [line.split()[0] for line in lines if line and line[0].isupper()]
    assert instructions[0] == "ARG"
    assert instructions[-1] == "ENTRYPOINT"
    assert set(instructions) <= {"ARG", "FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "ENTRYPOINT"}
    assert f"ARG SPARK_IMAGE=apache/spark:{pyspark.__version__}-" in "\n".join(lines)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"FROM python:{version}-slim-bookworm" in lines
