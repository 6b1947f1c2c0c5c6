"""The recipes of clusters that are not at hand: fields, and the command lines in them, which are run or parsed here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from paceline.cli.argv import sort_words
from paceline.options import TrainOptions

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

Schema = dict[str, Any]
TEXT, NUMBER = str, int
RESOURCES: Schema = {"requests?": {"*": TEXT}, "limits?": {"*": TEXT}}
CONTAINER: Schema = {
    "name": TEXT,
    "image": TEXT,
    "env?": [{"name": TEXT, "value": TEXT}],
    "volumeMounts?": [{"name": TEXT, "mountPath": TEXT}],
}
POD: Schema = {
    "restartPolicy": TEXT,
    "terminationGracePeriodSeconds?": NUMBER,
    "containers": [CONTAINER],
    "volumes?": [{"name": TEXT, "persistentVolumeClaim": {"claimName": TEXT}}],
}
JOB: Schema = {
    "name": TEXT,
    "template": {"metadata": {"labels": {"*": TEXT}}, "spec": {"backoffLimit?": NUMBER, "template": {"spec": POD}}},
}
# Written by hand from the documented fields of Kubeflow Trainer v2 (v1alpha1), JobSet and SkyPilot.
SCHEMAS: dict[str, Schema] = {
    "TrainingRuntime": {
        "apiVersion": TEXT,
        "kind": TEXT,
        "metadata": {"name": TEXT, "labels": {"*": TEXT}},
        "spec": {
            "mlPolicy": {"numNodes": NUMBER, "torch": {"numProcPerNode?": TEXT}},
            "template": {"spec": {"failurePolicy?": {"maxRestarts": NUMBER}, "replicatedJobs": [JOB]}},
        },
    },
    "TrainJob": {
        "apiVersion": TEXT,
        "kind": TEXT,
        "metadata": {"name": TEXT},
        "spec": {
            "runtimeRef": {"name": TEXT, "kind?": TEXT, "apiGroup?": TEXT},
            "trainer": {
                "numNodes?": NUMBER,
                "resourcesPerNode?": RESOURCES,
                "command?": [TEXT],
                "args?": [TEXT],
            },
        },
    },
    "sky": {
        "name": TEXT,
        "resources": {"accelerators": TEXT, "use_spot?": bool},
        "num_nodes": NUMBER,
        "workdir": TEXT,
        "file_mounts": {"*": {"source": TEXT, "mode": TEXT}},
        "envs": {"*": TEXT},
        "setup": TEXT,
        "run": TEXT,
    },
}


def mistakes(value: Any, schema: Any, place: str = "") -> list[str]:
    """Name every field that is missing, unknown or of another type."""
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{place} is no list"]
        return [m for number, entry in enumerate(value) for m in mistakes(entry, schema[0], f"{place}[{number}]")]
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{place} is no mapping"]
        if "*" in schema:
            return [m for key, entry in value.items() for m in mistakes(entry, schema["*"], f"{place}.{key}")]
        known = {key.rstrip("?"): part for key, part in schema.items()}
        found = [f"{place}.{key} is unknown" for key in value if key not in known]
        found += [f"{place}.{key} is missing" for key in schema if key[-1] != "?" and key not in value]
        return found + [m for key in value if key in known for m in mistakes(value[key], known[key], f"{place}.{key}")]
    return [] if type(value) is schema else [f"{place} is {value!r}"]


def test_the_schema_sees_mistakes() -> None:
    job = {"name": 3, "templates": {}}
    assert set(mistakes(job, JOB)) == {".name is 3", ".templates is unknown", ".template is missing"}


def test_the_train_job_has_only_documented_fields() -> None:
    runtime, job = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    assert mistakes(runtime, SCHEMAS["TrainingRuntime"]) == []
    assert mistakes(job, SCHEMAS["TrainJob"]) == []
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert {runtime["apiVersion"], job["apiVersion"]} == {"trainer.kubeflow.org/v1alpha1"}
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (part,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert part["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    (container,) = part["template"]["spec"]["template"]["spec"]["containers"]
    assert (part["name"], container["name"]) == ("node", "node")
    words = job["spec"]["trainer"]["args"]
    assert words[:3] == ["-m", "paceline", "train"]
    options = TrainOptions.from_flat(sort_words(TrainOptions, words[3:]).options)
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(str(options.run.project).startswith(mount) for mount in mounts)
    assert (options.loop.resume, options.run.name) == ("auto", job["metadata"]["name"])


def torchrun_words(script: str) -> list[str]:
    """Take the command line of torchrun out of a shell script, as the shell would read it."""
    start = re.search(r"\S*torchrun \\\n(.*\\\n)*.*", script)
    assert start is not None
    return shlex.split(start[0].replace("\\\n", " "))


def test_the_sky_task_runs_what_it_says(tmp_path: Path) -> None:
    task = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())
    assert mistakes(task, SCHEMAS["sky"]) == []
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], check=True, text=True)
    # The script itself, with a torchrun that says what it was given.
    program = tmp_path / "paceline" / "bin" / "torchrun"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", **task["envs"],
    }  # fmt: skip
    run = subprocess.run(["bash", "-c", task["run"]], check=True, capture_output=True, text=True, env=environment)
    words = run.stdout.splitlines()
    assert words[:5] == [
        "--nnodes=2", "--nproc-per-node=8", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29400",
    ]  # fmt: skip
    assert words[5:8] == ["-m", "paceline", "train"]
    options = TrainOptions.from_flat(sort_words(TrainOptions, words[8:]).options)
    assert options.data.data == "/workspace/coco/data.yaml"
    assert options.loop.resume == "auto"


@pytest.mark.parametrize("file", ["skypilot.yaml", "slurm.sbatch"])
def test_torchrun_knows_the_options(file: str) -> None:
    from torch.distributed.run import get_args_parser

    text = (DEPLOY / file).read_text()
    script = yaml.safe_load(text)["run"] if file.endswith("yaml") else text
    words = torchrun_words(script)
    known = get_args_parser().parse_args([re.sub(r"\$\{?[^}\"]*\}?", "1", word) for word in words[1:] if word != "$@"])
    assert known.module
    assert known.training_script == "paceline"


def test_the_slurm_script_is_shell() -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / "slurm.sbatch")], check=True)
    lines = (DEPLOY / "slurm.sbatch").read_text().splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--requeue", "--signal=USR1@120", "--ntasks-per-node=1", "--open-mode=append"} <= set(asked)
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(f"#SBATCH {line}") < first for line in asked)


def test_the_ray_recipe_loads_without_ray() -> None:
    code = f"import sys; sys.path.insert(0, {str(DEPLOY)!r}); import ray_train; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
