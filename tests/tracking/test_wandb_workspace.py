"""The workspace on wandb, against the stand-in of its server."""

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from galaxydist.cli.main import main as galaxydist
from galaxydist.tracking.wandb_workspace import FILE
from galaxydist.training.system_metrics import NodeSampler
from tests.helpers.runs import quick_settings, run_here
from tests.helpers.wandb_server import RIGHT_KEY, USER, WRONG_KEY, WandbServer

PACKAGE = Path(__file__).parents[2] / "galaxydist"
# A run on one CPU logs none of these; the package's sources hold the names.
ELSEWHERE = {"gpu/mfu", "gpu/memory_gb", "gpu/memory_reserved_gb", "train/loss_scale", "train/skipped"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    """wandb's server with a project, used by this process from an empty folder."""
    import wandb

    with WandbServer() as server:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        for name, value in server.environ().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.chdir(tmp_path)
        server.projects.add(f"{USER}/galaxydist")
        wandb.teardown()
        yield server
        wandb.teardown()


def read_spec(server: WandbServer) -> dict[str, Any]:
    (view,) = server.views.values()
    spec: dict[str, Any] = json.loads(view["spec"])
    return spec


def sections_of(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {section["name"]: section["panels"] for section in spec["section"]["panelBankConfig"]["sections"]}


def test_second_call_updates_the_same_view_and_keeps_what_people_added(
    server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert galaxydist(["dashboard", "wandb"]) == 0
    url = json.loads((Path("runs") / FILE).read_text())[f"{USER}/galaxydist"]
    assert capsys.readouterr().out == f"New workspace: {url}\n"
    ((view_id, view),) = server.views.items()
    made = read_spec(server)
    assert list(sections_of(made))[:2] == ["Curves by recipe", "Results"]

    assert galaxydist(["dashboard", "wandb"]) == 0
    assert "Nothing has changed" in capsys.readouterr().out
    assert server.calls["UpsertView2"] == 1

    # In the browser: a section of their own, a filter, a panel moved, and a section of ours from an earlier version.
    edited = json.loads(view["spec"])
    sections = edited["section"]["panelBankConfig"]["sections"]
    own = {**sections[2], "name": "Ours", "__id__": "own"}
    sections[0]["panels"][0]["layout"]["x"] = 16
    sections[1]["panels"][1]["config"]["metrics"] = ["summary_metrics.test/renamed"]
    del sections[2]
    sections.insert(0, own)
    edited["section"]["runSets"][0]["search"]["query"] = "vit"
    server.views[view_id]["spec"] = json.dumps(edited)
    assert galaxydist(["dashboard", "wandb"]) == 0
    assert capsys.readouterr().out == f"Updated (Results, Classes): {url}\n"
    assert list(server.views) == [view_id]
    updated = read_spec(server)
    assert [section["name"] for section in updated["section"]["panelBankConfig"]["sections"]].count("Ours") == 1
    assert updated["section"]["runSets"][0]["search"]["query"] == "vit"
    assert sections_of(updated)["Curves by recipe"][0]["layout"]["x"] == 16
    assert sections_of(updated)["Results"][1]["config"] == sections_of(made)["Results"][1]["config"]
    assert set(sections_of(made)) < set(sections_of(updated))

    assert galaxydist(["dashboard", "wandb", "--new"]) == 0
    assert len(server.views) == 2


def test_what_is_wrong_has_a_message_and_changes_nothing(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def refused(*arguments: str) -> str:
        wandb.teardown()  # it keeps the key and the address of its server
        assert galaxydist(["dashboard", "wandb", *arguments]) == 2
        found = capsys.readouterr()
        assert found.out == ""
        return found.err

    file = Path("runs") / FILE
    assert "wandb has no project galaxyteam/other" in refused("--project", "other")
    assert "wandb has no project other/galaxydist" in refused("--entity", "other")
    Path("full").write_text("")
    assert "is in the way" in refused("--runs", "full") and not server.views
    monkeypatch.setenv("WANDB_API_KEY", WRONG_KEY)
    assert "refuses the key" in refused()
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert "refuses the key" in refused()
    monkeypatch.delenv("WANDB_API_KEY")
    assert "there is no key" in refused()
    monkeypatch.setenv("WANDB_API_KEY", RIGHT_KEY)
    with monkeypatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as closed:
        patch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        closed.close()
        assert "does not answer" in refused()
    assert not file.exists()
    assert galaxydist(["dashboard", "wandb"]) == 0
    text = file.read_text()
    capsys.readouterr()
    server.views.clear()
    assert "it was deleted, or your key does not see it. To make another one: --new" in refused()
    assert file.read_text() == text
    file.write_text("[]")
    assert "does not hold addresses" in refused()
    assert not server.views


@pytest.mark.slow
def test_panels_show_only_what_a_run_logs(server: WandbServer, blobs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "run"
    assert run_here(quick_settings(blobs, run_dir, train__epochs=2, train__on_nonfinite="skip")) == 0
    assert galaxydist(["track", "push", str(run_dir), "--mode", "online"]) == 0
    assert galaxydist(["dashboard", "wandb"]) == 0
    sent = server.run
    logged = {name for row in sent.history for name in row} | set(sent.summary)
    text = json.dumps(read_spec(server))
    names = set(re.findall(r"(?:train|val|test|time|gpu|memory)/[a-z_]+", text)) | {"events"}
    assert len(names) > 20 and names - logged == ELSEWHERE
    facts = set(re.findall(r"config[.:]run\.value\.([a-z_]+)", text))
    assert facts and facts <= set(sent.config["run"])
    sources = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "wandb_workspace.py")
    assert all(f'"{name}"' in sources for name in ELSEWHERE)
    gpu = [f"system/node/gpu0_{name}" for name in re.findall(r'yield "(\w+)"', sources)]
    sampler = NodeSampler("node", [os.getpid()])
    sampler.start()
    measured = [*sampler.sample(), *gpu]
    for pattern in re.findall(r'"metricRegex": "([^"]+)"', text):
        assert any(re.fullmatch(pattern, name) for name in measured), pattern
