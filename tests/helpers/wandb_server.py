"""A stand-in of wandb's server on loopback, which keeps what it is sent: runs, artifacts, alerts and views.

It answers the requests that wandb 0.31 and wandb-workspaces 0.4 make, as wandb's server does where our code can see the
difference: a run continues at its stored step, rows are stored by their line, a view is updated by its id. A request that it does
not know is refused, and the test fails when the server is closed.
"""

import base64
import gzip
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

Json = dict[str, Any]
RIGHT_KEY = "0123456789" * 4  # wandb refuses keys of another length before it asks a server
WRONG_KEY = "f" * 40
USER = "galaxyteam"  # the key's user, and the entity of runs that name none
CREATED = "2026-01-01T00:00:00Z"


@dataclass
class StoredRun:
    """A run as the server has it.

    Args:
        entity, project, run_id: its address.
        attributes: display name, group, job type, tags and so on, as they were sent last.
        config, summary: their values.
        lines: each file's lines by their number: ``wandb-history.jsonl``, ``wandb-events.jsonl``, ``output.log``.
        uploads: files of the run.
        exit_code: None until a program has said that the run has ended.
        used: artifacts that are its inputs, by their id.
    """

    entity: str
    project: str
    run_id: str
    attributes: Json = field(default_factory=dict)
    config: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    used: list[str] = field(default_factory=list)

    @property
    def history(self) -> list[Json]:
        """The rows in the order of their lines."""
        return [json.loads(line) for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())]

    @property
    def steps(self) -> list[int]:
        """The steps of the rows in the order of their lines; exact if each step is there once, in order."""
        return [row["_step"] for row in self.history]


@dataclass
class StoredArtifact:
    """An artifact as the server has it.

    Args:
        artifact_id: its id.
        run_id: of the run that made it.
        name, kind: its collection and type.
        version: 0 for the first of its name.
        request: what was asked for: description, metadata, aliases, digest.
        manifest: its files' names, sizes and digests.
        files: content of the files by their names.
        is_complete: all of it has been sent.
    """

    artifact_id: str
    run_id: str
    name: str
    kind: str
    version: int
    request: Json
    manifest: Json = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    is_complete: bool = False

    @property
    def metadata(self) -> Json:
        return dict(json.loads(self.request.get("metadata") or "{}"))


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Print nothing about a client that closed its connection."""


class WandbServer:
    """The server; use as a context manager.

    Attributes:
        runs: by ``entity/project/run_id``.
        artifacts, views: by their id. A view has ``name``, ``displayName``, ``entityName``, ``projectName`` and ``spec``.
        alerts: title, text, severity and run of each.
        calls: number of requests of each operation.
        unknown: requests that it does not know.
        status: if not 200, the answer to every request, such as 500.
        is_dropping: if True, each connection is closed without an answer.
        projects: known projects, as ``entity/project``; the first run makes its project.
    """

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.artifacts: dict[str, StoredArtifact] = {}
        self.views: dict[str, Json] = {}
        self.alerts: list[Json] = []
        self.calls: Counter[str] = Counter()
        self.unknown: list[str] = []
        self.projects: set[str] = set()
        self.status = 200
        self.is_dropping = False
        self._is_open = threading.Event()
        self._is_open.set()
        self._lock = threading.Lock()
        self._slots: dict[str, Callable[[bytes], None]] = {}
        self._server = _QuietServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def run(self) -> StoredRun:
        """The only run."""
        (run,) = self.runs.values()
        return run

    def environ(self, key: str = RIGHT_KEY) -> dict[str, str]:
        """The variables with which wandb's programs use this server."""
        return {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": key, "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}

    def stall(self) -> None:
        """Answer nothing until ``resume`` is called; connections are accepted."""
        self._is_open.clear()

    def resume(self) -> None:
        self._is_open.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._is_open.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        assert failure is not None or not self.unknown, f"the stand-in of wandb's server does not know {self.unknown}"

    def answer(self, method: str, path: str, body: bytes, key: str) -> tuple[int, Json]:
        """Return the status and the answer to one request, under the lock."""
        self._is_open.wait()
        with self._lock:
            parts = path.strip("/").split("/")
            if parts[0] == "storage" and method == "PUT":
                self.calls["upload"] += 1
                self._slots[parts[1]](body)
                return 200, {}
            if path.startswith("/sdk/otel/"):  # wandb's reports of its own errors, without WANDB_ERROR_REPORTING=false
                return 200, {}
            if key != RIGHT_KEY:
                self.calls["refused"] += 1
                return 401, {"error": "user is not logged in", "statusCode": 401}
            if path == "/graphql" and method == "POST":
                return self._answer_query(json.loads(body))
            if parts[0] == "files" and parts[-1] == "file_stream" and method == "POST":
                self.calls["file_stream"] += 1
                return self._store_lines("/".join(parts[1:4]), json.loads(body))
            return self._refuse(f"{method} {path}")

    def _refuse(self, request: str) -> tuple[int, Json]:
        self.unknown.append(request)
        return 400, {"errors": [{"message": f"the stand-in of wandb's server does not know {request}"}]}

    def _answer_query(self, request: Json) -> tuple[int, Json]:
        found = re.search(r"\b(query|mutation)\s+(\w+)", request["query"])
        name = found.group(2) if found else request["query"][:60]
        self.calls[name] += 1
        known = getattr(self, f"_do_{name}", None)
        if known is None:
            return self._refuse(f"GraphQL {name}")
        try:
            return 200, {"data": known(request.get("variables") or {})}
        except KeyError as error:
            return 200, {"data": None, "errors": [{"message": f"{name}: there is no {error}"}]}

    def _store_lines(self, address: str, sent: Json) -> tuple[int, Json]:
        run = self.runs[address]
        for name, part in (sent.get("files") or {}).items():
            if name == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
                continue
            lines = run.lines.setdefault(name, {})
            lines.update(enumerate(part["content"], start=part["offset"]))
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]
        return 200, {"exitcode": None, "limits": {}}

    def _slot(self, store: Callable[[bytes], None]) -> str:
        """Return an address for the upload of a file."""
        name = f"{len(self._slots)}"
        self._slots[name] = store
        return f"{self.address}/storage/{name}"

    # What follows answers one GraphQL operation each, from its variables.

    def _do_Viewer(self, _: Json) -> Json:
        return {"viewer": _USER_ANSWER}

    _do_GetViewer = _do_GetDefaultEntity = _do_Viewer

    def _do_ServerFeaturesQuery(self, _: Json) -> Json:
        return {"serverInfo": {"features": []}}

    def _do_OrgFeatureFlags(self, _: Json) -> Json:
        return {"organization": None}

    def _do_GetProject(self, given: Json) -> Json:
        is_known = f"{given['entity']}/{given['name']}" in self.projects
        return {"project": self._project(given["entity"], given["name"]) if is_known else None}

    def _do_RunResumeStatus(self, given: Json) -> Json:
        entity, project = given.get("entity") or USER, given["project"]
        if f"{entity}/{project}" not in self.projects:
            return {"model": None}
        run = self.runs.get(f"{entity}/{project}/{given['name']}")
        bucket = None if run is None else self._bucket(run)
        return {"model": {**self._project(entity, project), "entity": {"id": entity, "name": entity}, "bucket": bucket}}

    def _do_UpsertBucket(self, given: Json) -> Json:
        entity, project = given.get("entity") or USER, given.get("project") or "uncategorized"
        address = f"{entity}/{project}/{given['name']}"
        is_new = address not in self.runs
        run = self.runs.setdefault(address, StoredRun(entity, project, given["name"]))
        self.projects.add(f"{entity}/{project}")
        run.attributes |= {name: value for name, value in given.items() if value not in (None, "", [])}
        if given.get("config"):
            run.config = {name: entry["value"] for name, entry in json.loads(given["config"]).items()}
        if given.get("summaryMetrics"):
            run.summary = json.loads(given["summaryMetrics"])
        run.exit_code = None if is_new else run.exit_code
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": is_new}}

    def _do_CreateRunFiles(self, given: Json) -> Json:
        run = self.runs[f"{given['entity']}/{given['project']}/{given['run']}"]
        files = [{"name": name, "uploadUrl": self._slot(partial(run.uploads.__setitem__, name))} for name in given["files"]]
        return {"createRunFiles": {"runID": _id("Run", run.run_id), "uploadHeaders": [], "files": files}}

    def _do_MarkRunFilesUploaded(self, _: Json) -> Json:
        return {"markRunFilesUploaded": {"success": True}}

    def _do_RunState(self, given: Json) -> Json:
        run = self.runs[f"{given['entity']}/{given['project']}/{given['run']}"]
        return {"project": {"run": {"id": _id("Run", run.run_id), "state": "running" if run.exit_code is None else "finished"}}}

    def _do_NotifyScriptableRunAlert(self, given: Json) -> Json:
        self.alerts.append(given)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _do_OrganizationCoreWeaveOrganizationID(self, _: Json) -> Json:
        return {"entity": {"organization": None}}

    def _do_ArtifactType(self, given: Json) -> Json:
        wanted = given["name"].partition(":")[0]
        kinds = [one.kind for one in self.artifacts.values() if one.name == wanted]
        return {"project": {"artifact": {"artifactType": {"name": kinds[-1]}} if kinds else None}}

    def _do_FetchArtifactDigestAlgorithm(self, _: Json) -> Json:
        return {"project": None}

    def _do_XXHashDigestsEnabled(self, _: Json) -> Json:
        return {"entity": {"xxhashDigestsEnabled": False}}

    def _do_CreateArtifact(self, given: Json) -> Json:
        request = given["input"]
        name, kind = request["artifactCollectionName"], request["artifactTypeName"]
        same = [one for one in self.artifacts.values() if (one.name, one.kind) == (name, kind) and one.is_complete]
        equal = [one for one in same if one.request["digest"] == request["digest"]]
        if equal:  # the server keeps equal content once
            artifact = equal[0]
        else:
            artifact_id = _id("Artifact", f"{len(self.artifacts)}")
            artifact = StoredArtifact(artifact_id, request.get("runName") or "", name, kind, len(same), request)
            self.artifacts[artifact_id] = artifact
        state = "COMMITTED" if artifact.is_complete else "PENDING"
        latest = {"id": same[-1].artifact_id} if same else None
        answer = {"id": artifact.artifact_id, "state": state, "artifactSequence": {"latestArtifact": latest}}
        return {"createArtifact": {"artifact": answer}}

    def _do_CreateArtifactManifest(self, given: Json) -> Json:
        return {"createArtifactManifest": {"artifactManifest": self._manifest_slot(given["artifactID"])}}

    def _do_UpdateArtifactManifest(self, given: Json) -> Json:
        artifact_id = base64.b64decode(given["artifactManifestID"]).decode().split(":", 1)[1]
        return {"updateArtifactManifest": {"artifactManifest": self._manifest_slot(artifact_id)}}

    def _manifest_slot(self, artifact_id: str) -> Json:
        artifact = self.artifacts[artifact_id]
        url = self._slot(lambda data: artifact.manifest.update(json.loads(data)))
        return {
            "id": _id("Manifest", artifact_id),
            "file": {"id": _id("File", artifact_id), "uploadUrl": url, "uploadHeaders": []},
        }

    def _do_CreateArtifactFiles(self, given: Json) -> Json:
        edges = []
        for one in given["input"]["artifactFiles"]:
            artifact = self.artifacts[one["artifactID"]]
            url = self._slot(partial(artifact.files.__setitem__, one["name"]))
            edges.append(
                {
                    "node": {
                        "storagePath": f"wandb_artifacts/{one['name']}",
                        "uploadUrl": url,
                        "uploadHeaders": [],
                        "uploadMultipartUrls": None,
                        "artifact": {"id": artifact.artifact_id},
                    }
                }
            )
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _do_CommitArtifact(self, given: Json) -> Json:
        artifact = self.artifacts[given["artifactID"]]
        artifact.is_complete = True
        return {"commitArtifact": {"artifact": {"id": artifact.artifact_id, "digest": artifact.request["digest"]}}}

    def _do_UseArtifact(self, given: Json) -> Json:
        request = given["input"]
        run = self.runs[f"{request['entityName']}/{request['projectName']}/{request['runName']}"]
        artifact = self.artifacts[request["artifactID"]]
        if artifact.artifact_id not in run.used:
            run.used.append(artifact.artifact_id)
        return {"useArtifact": {"artifact": {"id": artifact.artifact_id}}}

    def _do_ArtifactByID(self, given: Json) -> Json:
        artifact = self.artifacts[given["id"]]
        request = artifact.request
        sequence = {"__typename": "ArtifactSequence", "name": artifact.name}
        sequence["project"] = self._project(request["entityName"], request["projectName"])
        size = sum(entry["size"] for entry in artifact.manifest.get("contents", {}).values())
        answer = {
            "__typename": "Artifact",
            "id": artifact.artifact_id,
            "artifactSequence": sequence,
            "versionIndex": artifact.version,
            "artifactType": {"name": artifact.kind},
            "description": request.get("description"),
            "metadata": request.get("metadata"),
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED" if artifact.is_complete else "PENDING",
            "size": size,
            "digest": request["digest"],
            "commitHash": None,
            "fileCount": len(artifact.manifest.get("contents", {})),
            "createdAt": CREATED,
            "updatedAt": None,
            "aliases": [],
        }
        return {"artifact": answer}

    def _do_UpsertView2(self, given: Json) -> Json:
        if f"{given['entityName']}/{given['projectName']}" not in self.projects:
            raise KeyError(f"project {given['entityName']}/{given['projectName']}")
        view_id, is_new = given.get("id"), not given.get("id")
        if not view_id:
            view_id = _id("View", f"{len(self.views)}")
        elif view_id not in self.views:
            raise KeyError(f"view {view_id}")
        self.views[view_id] = given
        return {"upsertView": {"view": {"id": view_id, "name": given["name"]}, "inserted": is_new}}

    def _do_View(self, given: Json) -> Json:
        entity, project = given["entityName"], given["projectName"]
        if f"{entity}/{project}" not in self.projects:
            return {"project": None}
        wanted = {"entityName": entity, "projectName": project, "name": given["viewName"], "type": given["viewType"]}
        edges = [
            {"node": {"id": view_id, "displayName": view["displayName"], "spec": view["spec"]}}
            for view_id, view in self.views.items()
            if wanted.items() <= view.items()
        ]
        return {"project": {"allViews": {"edges": edges}}}

    def _project(self, entity: str, name: str) -> Json:
        project_id = _id("Project", f"{entity}:{name}")
        shared = {"__typename": "Project", "id": project_id, "internalId": project_id, "name": name, "entityName": entity}
        return {**shared, "entity": {"name": entity}, "createdAt": CREATED, "isBenchmark": False, "user": _USER_ANSWER}

    def _bucket(self, run: StoredRun) -> Json:
        rows = [line for _, line in sorted(run.lines.get("wandb-history.jsonl", {}).items())]
        events = [line for _, line in sorted(run.lines.get("wandb-events.jsonl", {}).items())]
        project = self._project(run.entity, run.project)
        return {
            "id": _id("Run", run.run_id),
            "name": run.run_id,
            "displayName": run.attributes.get("displayName", run.run_id),
            "description": None,
            "notes": None,
            "tags": run.attributes.get("tags", []),
            "config": json.dumps({name: {"value": value} for name, value in run.config.items()}),
            "wandbConfig": json.dumps({"t": 1}),
            "summaryMetrics": json.dumps(run.summary),
            "sweepName": None,
            "project": {**project, "entity": {"id": run.entity, "name": run.entity}},
            "logLineCount": len(run.lines.get("output.log", {})),
            "historyLineCount": len(rows),
            "historyTail": json.dumps(rows[-1:]),
            "eventsLineCount": len(events),
            "eventsTail": json.dumps(events[-1:]),
        }


_USER_ANSWER: Json = {
    "id": "VXNlcjox",
    "name": USER,
    "entity": USER,
    "username": USER,
    "email": "",
    "admin": False,
    "flags": "{}",
    "deletedAt": None,
    "apiKeys": {"edges": []},
    "teams": {"edges": [{"node": {"name": USER}}]},
}


def _id(kind: str, name: str) -> str:
    return base64.b64encode(f"{kind}:{name}".encode()).decode()


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if server.is_dropping:
                self.close_connection = True
                return
            status, answer = server.status, {}
            if status == 200:
                path = urlsplit(self.path).path
                status, answer = server.answer(self.command, path, body, _key(self.headers.get("Authorization", "")))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    return Handler


def _key(authorization: str) -> str:
    """Return the key of a request: wandb sends it as the password of the user ``api``."""
    if not authorization.startswith("Basic "):
        return ""
    return base64.b64decode(authorization.removeprefix("Basic ")).decode().partition(":")[2]
