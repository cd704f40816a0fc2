"""What `cluster/deploy/` holds, against the schemas and the code of those that will read it."""

import ast
import copy
import json
import lzma
import re
from collections import Counter
from fnmatch import fnmatch
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from serving.config import load_profile
from serving.deploy.application import Arguments, application
from tests.support import known_metrics
from tests.support.known_metrics import ROOT

DEPLOY = ROOT / "cluster" / "deploy"
SCHEMA = ROOT.parent / "shared" / "data" / "schemas" / "rayservice-v1.schema.json.xz"
SERVE_FILES = ["serve.yaml", "serve-cluster.yaml"]
GUIDE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
POOL_OF = {
    "Memorizer": "memory",
    "Recaller": "memory",
    "Embedder": "retrieval",
    "Retriever": "retrieval",
    "Generator": "generator",
    "Router": "cpu",
    "Ingress": "cpu",
}

# -- Serve ------------------------------------------------------------------------------------------------


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def settings_of_up() -> dict[str, str]:
    """What `memorag up` sets for Serve before it starts Ray."""
    tree = ast.parse((ROOT / "serving" / "deploy" / "local_ray.py").read_text(encoding="utf-8"))
    dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    pairs = [pair for node in dicts for pair in zip(node.keys, node.values, strict=True)]
    known = [(ast.literal_eval(key), value) for key, value in pairs if isinstance(key, ast.Constant)]
    return {key: ast.literal_eval(value) for key, value in known if key.startswith("RAY_SERVE_")}


@pytest.mark.parametrize("name", SERVE_FILES)
def test_serve_accepts_the_file_and_nothing_in_it_is_ignored(name):
    given = read(name)
    config = ServeDeploySchema.model_validate(given)
    (shipped,) = given["applications"]
    assert set(given) <= set(ServeDeploySchema.model_fields)
    assert set(shipped) <= set(ServeApplicationSchema.model_fields)
    assert set(given["http_options"]) <= set(HTTPOptions.model_fields)
    assert "deployments" not in shipped, "the profile says what each deployment takes"
    assert load_profile(Arguments.model_validate(shipped["args"]).profile)
    assert settings_of_up() and config.controller_options.runtime_env == {"env_vars": settings_of_up()}


def test_the_resource_of_kubernetes_deploys_the_file_for_clusters():
    assert yaml.safe_load(ray_service()["spec"]["serveConfigV2"]) == read("serve-cluster.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"profile": "embeded"}, "did you mean 'embedded'"),
        ({"profile": {"memory": {"engine": {"model": "a"}}, "generater": {}}}, "did you mean 'generator'"),
    ],
)
def test_a_profile_that_cannot_be_used_is_one_line_in_serves_status(arguments, words):
    with pytest.raises(RayServeException, match=words) as raised:
        call_user_app_builder_with_args_if_necessary(application, arguments)
    assert "\n" not in str(raised.value)


def test_an_unknown_argument_is_refused():
    with pytest.raises(ValueError, match="storrage"):
        call_user_app_builder_with_args_if_necessary(application, {"storrage": "/storage"})


# -- pools ------------------------------------------------------------------------------------------------


def rendered(name: str) -> dict[str, dict[str, Any]]:
    """The types of nodes of a manifest as Ray's own autoscaler understands them, checked by its own schema."""
    if name == "ray-cluster-aws.yaml":
        config = prepare_config(copy.deepcopy(read(name)))
        validate_config(config)
    else:
        cluster = {"metadata": {"name": "memorag", "namespace": "default"}, "spec": cluster_of(ray_service())}
        config = _derive_autoscaling_config_from_ray_cr(cluster)
    return config["available_node_types"]


@pytest.fixture(scope="module")
def demands(tmp_path_factory, local_ray) -> dict[str, tuple[int, int, list[dict[str, float]]]]:
    """Of each deployment that `serve-cluster.yaml` builds: fewest and most replicas, and what one takes."""
    arguments = read("serve-cluster.yaml")["applications"][0]["args"]
    arguments["storage"] = str(tmp_path_factory.mktemp("storage"))
    # An engine's settings are checked in a Ray task.
    built = build_app(call_user_app_builder_with_args_if_necessary(application, arguments), name="memorag")
    found = {}
    for deployment in built.deployments:
        scaling, replica = deployment._deployment_config.autoscaling_config, deployment._replica_config
        fixed = deployment._deployment_config.num_replicas
        options = replica.ray_actor_options
        alone = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0), **options.get("resources", {})}
        bundles = replica.placement_group_bundles or [alone]
        fewest, most = (scaling.min_replicas, scaling.max_replicas) if scaling else (fixed, fixed)
        found[deployment.name] = (fewest, most, [{k: v for k, v in bundle.items() if v} for bundle in bundles])
    assert set(found) == set(POOL_OF)
    return found


@pytest.mark.parametrize("name", ["rayservice.yaml", "ray-cluster-aws.yaml"])
def test_each_pool_has_nodes_of_its_own_and_enough_of_them(name, demands):
    types = rendered(name)
    head = "head" if "head" in types else "headgroup"
    assert set(types) == {head, *POOL_OF.values()}
    assert types[head]["resources"]["CPU"] == 0, "nothing of ours belongs beside the control plane"
    for deployment, (fewest, most, bundles) in demands.items():
        for replicas in {fewest, most}:
            added = wanted(types, head, bundles * replicas)
            assert set(added) == {POOL_OF[deployment]}, f"{deployment} × {replicas} would start {added}"
    everything = [bundle for _, most, bundles in demands.values() for bundle in bundles * most]
    assert all(count <= types[pool]["max_workers"] for pool, count in wanted(types, head, everything).items())
    assert all(types[pool]["min_workers"] >= 1 for pool in POOL_OF.values()), "what has a replica needs a node for it"


def wanted(types: dict[str, Any], head: str, demands: list[dict[str, float]]) -> dict[str, int]:
    """The nodes that Ray's autoscaler would start for these demands; all of them must find one."""
    demands = sorted(demands, key=lambda demand: -demand.get("GPU", 0))
    scorer = partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))
    added, left = get_nodes_for(types, {}, head, 1000, demands, scorer)
    assert not left, f"no node for {left}"
    return dict(added)


# -- Kubernetes -------------------------------------------------------------------------------------------

# Fields of ray.io/v1, as KubeRay 1.5.1 has them, that a resource like ours may set.
RAY_SERVICE = {"serveConfigV2", "rayClusterConfig", "upgradeStrategy", "serveService", "excludeHeadPodFromServeSvc"}
RAY_SERVICE |= {"rayClusterDeletionDelaySeconds"}
RAY_CLUSTER = {"rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions"}
RAY_CLUSTER |= {"gcsFaultToleranceOptions", "authOptions", "headServiceAnnotations", "suspend", "managedBy"}
GROUP = {"template", "rayStartParams", "resources", "labels"}
WORKER_GROUP = GROUP | {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds"}
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "rayservice.yaml").read_text(encoding="utf-8")))


def ray_service() -> dict[str, Any]:
    (service,) = [manifest for manifest in manifests() if manifest["kind"] == "RayService"]
    return service


def cluster_of(service: dict[str, Any]) -> dict[str, Any]:
    return service["spec"]["rayClusterConfig"]


def pods() -> dict[str, dict[str, Any]]:
    """The pod templates, by what they are for."""
    cluster = cluster_of(ray_service())
    redis = {m["metadata"]["name"]: m["spec"]["template"] for m in manifests() if m["kind"] == "StatefulSet"}
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return redis | groups | {"head": cluster["headGroupSpec"]["template"]}


def test_the_ray_service_has_the_fields_of_one():
    service, cluster = ray_service(), cluster_of(ray_service())
    assert service["apiVersion"] == "ray.io/v1" and set(service["spec"]) <= RAY_SERVICE
    assert set(cluster) <= RAY_CLUSTER and set(cluster["headGroupSpec"]) <= GROUP
    assert set(cluster["gcsFaultToleranceOptions"]) <= {"redisAddress", "redisPassword", "redisUsername"}
    assert service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    assert cluster["enableInTreeAutoscaling"] is True and cluster["authOptions"] == {"mode": "token"}
    pinned = (ROOT / "cluster" / "requirements" / "gpu.txt").read_text(encoding="utf-8")
    assert f"ray=={cluster['rayVersion']}" in pinned.splitlines(), "KubeRay acts on this; it must be the image's"
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_GROUP and group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())
    assert all(isinstance(value, str) for group in groups for value in group.get("resources", {}).values())


def test_the_ray_service_passes_the_schema_of_its_kind():
    """KubeRay's own, which is not ours to ship."""
    if not SCHEMA.exists():
        pytest.skip(f"KubeRay's schema, shared/data/schemas/{SCHEMA.name}, is not beside the checkout")
    with lzma.open(SCHEMA, "rt", encoding="utf-8") as file:
        schema = closed(json.load(file))
    jsonschema.validate(ray_service(), schema)
    wrong = copy.deepcopy(ray_service())
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replikas"] = 1
    with pytest.raises(jsonschema.ValidationError, match="replikas"):
        jsonschema.validate(wrong, schema)


def closed(schema: Any) -> Any:
    """A schema that refuses fields it does not name, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        inner.pop("type", None)
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        inner.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
        if set(schema["properties"]) >= {"kind", "metadata", "spec"}:
            inner["properties"]["metadata"] = {"type": "object"}
    return inner


def test_every_pod_is_confined_probed_and_finds_what_it_names():
    claims = {m["metadata"]["name"] for m in manifests() if m["kind"] == "PersistentVolumeClaim"}
    assert len(pods()) == 6
    for name, template in pods().items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0, name
        assert pod.get("automountServiceAccountToken") is False or name == "head", "only the autoscaler needs one"
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        assert {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "emptyDir" not in v} <= claims
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["livenessProbe"] and container["readinessProbe"], name
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert set(limits) == set(requests) and limits["memory"]
            named = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert all(NAME.fullmatch(port) and len(port) <= 15 for port in named)
            for probe in (container["livenessProbe"], container["readinessProbe"]):
                assert (probe.get("httpGet") or probe["tcpSocket"])["port"] in named
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts == set(volumes) or (name == "memorag-redis" and mounts == {"data"})
            assert NAME.fullmatch(name) and NAME.fullmatch(container["name"])


def test_the_object_store_of_the_memory_pool_holds_what_its_keepers_may():
    budget = load_profile("cluster").memory.keeper.budget_bytes
    (group,) = [g for g in cluster_of(ray_service())["workerGroupSpecs"] if g["groupName"] == "memory"]
    store = int(group["rayStartParams"]["object-store-memory"])
    (shm,) = [v["emptyDir"]["sizeLimit"] for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
    assert budget < store <= int(shm.removesuffix("Gi")) * 2**30
    node = rendered("ray-cluster-aws.yaml")["memory"]
    assert budget < node["resources"]["object_store_memory"]
    (option,) = node["docker"]["worker_run_options"]
    assert node["resources"]["object_store_memory"] <= int(re.search(r"=(\d+)g", option)[1]) * 2**30


def test_only_the_servers_own_port_is_open_to_all():
    policies = [manifest["spec"] for manifest in manifests() if manifest["kind"] == "NetworkPolicy"]
    for name, template in pods().items():
        labels = template["metadata"]["labels"].items()
        over = [p for p in policies if p["podSelector"]["matchLabels"].items() <= labels]
        assert len(over) == 1 and over[0]["policyTypes"] == ["Ingress"], f"{name} needs exactly one policy"
        to_all = [port["port"] for rule in over[0]["ingress"] if "from" not in rule for port in rule["ports"]]
        assert to_all == ([] if name == "memorag-redis" else [8000])
    services = [manifest["metadata"]["name"] for manifest in manifests() if manifest["kind"] == "Service"]
    assert services == ["memorag-redis"] and "serveService" not in ray_service()["spec"]


def test_secrets_are_named_and_the_guide_says_how_to_make_them():
    text = (DEPLOY / "rayservice.yaml").read_text(encoding="utf-8")
    keys = set(re.findall(r"secretKeyRef: \{name: memorag, key: ([\w-]+)\}", text))
    assert keys == {"redis-password", "server-secret"} and text.count("secretKeyRef:") == 3
    assert not [manifest for manifest in manifests() if manifest["kind"] == "Secret"]
    (command,) = re.findall(r"kubectl create secret generic memorag.*?\n\n?(?=[^ ])", GUIDE, flags=re.S)
    assert set(re.findall(r"--from-literal=([\w-]+)=", command)) == keys


# -- the cluster launcher ---------------------------------------------------------------------------------


def test_the_launchers_cluster_has_a_token_and_keeps_its_dashboard_to_itself():
    config = read("ray-cluster-aws.yaml")
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in commands)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in starts[0] and "--dashboard-host=127.0.0.1" in starts[0]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token", "where Ray looks for it"
    for local in config["file_mounts"].values():
        assert local.startswith("~/") or (ROOT / local).is_file(), local
    assert sum(node["max_workers"] for node in rendered("ray-cluster-aws.yaml").values()) == config["max_workers"]


# -- images -----------------------------------------------------------------------------------------------


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Containerfile, each with its text on one line."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_an_image_is_built_from_files_that_are_there_and_runs_a_command_that_is(extra):
    steps = instructions(DEPLOY / f"Containerfile.{extra}")
    ignored = (ROOT / ".containerignore").read_text(encoding="utf-8").splitlines()
    kept = [line.removeprefix("!").rstrip("/") for line in ignored if line.startswith("!")]
    copied = [source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists() and any(fnmatch(source.split("/")[0], name) for name in kept), source
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.search(r"include = \[(.*)\]", project)[1].replace("*", "").replace('"', "").split(", ")
    assert set(packages) <= set(copied)
    assert f"sh cluster/requirements/install.sh {extra}" in " ".join(rest for word, rest in steps if word == "RUN")
    words = Counter(word for word, _ in steps)
    assert words["FROM"] == words["USER"] == words["CMD"] == 1 and dict(steps)["USER"] == "memorag"
    assert [rest for word, rest in steps if word == "ARG"] == ["PIP_EXTRA_INDEX_URL"]
    environment = dict(part.split("=", 1) for part in dict(steps)["ENV"].split())
    assert settings_of_up().items() <= environment.items()
    assert environment["MEMORAG_STORAGE"] == dict(steps)["VOLUME"]
    program, command, *options = json.loads(dict(steps)["CMD"])
    from serving.cli.main import app

    assert program == "memorag"
    parsed = typer.main.get_group(app).commands[command].make_context(command, options).params
    profile = load_profile(parsed["profile"])
    assert parsed["foreground"] and (parsed["host"] == "127.0.0.1") == (profile.auth.mode == "off")


# -- Prometheus and Grafana -------------------------------------------------------------------------------


def dashboards() -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (DEPLOY / "grafana").glob("*.json")}


def rules() -> list[dict[str, Any]]:
    (group,) = read("prometheus/alerts.yml")["groups"]
    return group["rules"]


def expressions() -> dict[str, str]:
    """All PromQL there is, by where it is, with what Grafana fills in."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in rules()}
    for file, board in dashboards().items():
        names = [variable["name"] for variable in board["templating"]["list"]]
        for panel in board["panels"]:
            for number, target in enumerate(panel["targets"]):
                text = target["expr"].replace("$__rate_interval", "5m")
                for name in names:
                    text = text.replace(f"${name}", ".*")
                found[f"{file}: {panel['title']}, {number}"] = text
    return found


def test_every_expression_reads_metrics_that_exist_with_labels_that_they_have():
    declared = known_metrics.declared()
    assert len(expressions()) > 30
    for place, text in expressions().items():
        assert "$" not in text, f"{place}: a variable that the dashboard does not have"
        uses = known_metrics.uses(text)
        assert uses, place
        for use in uses:
            metric = declared.get(use.name)
            assert metric or known_metrics.is_of_ray_core(use.name), f"{place}: nothing reports {use.name}"
            if metric:
                strangers = use.labels - metric.labels - known_metrics.EVERYWHERE
                assert not strangers, f"{place}: {use.name} has no label {strangers}"


def test_every_metric_of_ours_is_on_a_dashboard():
    shown = {use.name for text in expressions().values() for use in known_metrics.uses(text)}
    ours = {name for name in known_metrics.declared() if name.startswith("ray_memorag_")}
    ends = r"_(bucket|count|sum|total)$"
    missing = {re.sub(ends, "", name) for name in ours} - {re.sub(ends, "", name) for name in shown}
    assert not missing, f"no panel shows {missing}"


def test_alerts_say_what_is_wrong_and_what_to_do():
    assert len({rule["alert"] for rule in rules()}) == len(rules())
    for rule in rules():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket") and re.fullmatch(r"\d+m", rule.get("for", "0m"))
        assert set(rule["annotations"]) == {"summary", "description"}
        kept = {label for use in known_metrics.uses(rule["expr"]) for label in use.labels} | known_metrics.EVERYWHERE
        assert set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))) <= kept
    for name in ("prometheus.yml", "prometheus-kubernetes.yml"):
        config = read(f"prometheus/{name}")
        assert all((DEPLOY / "prometheus" / file).is_file() for file in config["rule_files"])
        assert [job["job_name"] for job in config["scrape_configs"]] == ["ray"]
    relabels = read("prometheus/prometheus-kubernetes.yml")["scrape_configs"][0]["relabel_configs"]
    ports = {
        port["name"] for template in pods().values() for c in template["spec"]["containers"] for port in c["ports"]
    }
    (chosen,) = [rule["regex"] for rule in relabels if "port_name" in rule["source_labels"][0]]
    assert set(chosen.split("|")) <= ports


def test_dashboards_are_as_grafana_takes_them():
    boards = dashboards()
    assert len({board["uid"] for board in boards.values()}) == len(boards) == 3
    for name, board in boards.items():
        assert board["title"] and board["schemaVersion"] >= 39 and "id" not in board
        source = [v for v in board["templating"]["list"] if v["type"] == "datasource"]
        assert [v["query"] for v in source] == ["prometheus"]
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            x, y, width, height = (panel["gridPos"][side] for side in "xywh")
            cells = set(product(range(x, x + width), range(y, y + height)))
            assert x + width <= 24 and not cells & taken, f"{name}: {panel['title']}"
            taken |= cells
            assert panel["title"] and panel["targets"] and panel["datasource"]["uid"] == "${datasource}"
