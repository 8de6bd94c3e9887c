"""A workspace on wandb for the runs of a project: made by the first call, updated by later ones.

wandb-workspaces, a public preview, is imported in this module only. The workspace's address is kept in a file beside the runs,
since a second workspace would be made without it. An update replaces the panels of our sections that differ; sections that people
have added, and filters, colours and the order of runs, stay as they are.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galaxydist.atomic_files import replace_bytes
from galaxydist.errors import UserError, first_line
from galaxydist.tracking.run_info import FACTS_KEY
from galaxydist.tracking.wandb_sink import end_service, explained_refusal, has_wandb_key, is_reachable, wandb_address

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

FILE = "wandb-workspace.json"
NAME = "galaxydist"
# Final results that become columns of the table of runs.
RESULTS = ("test/accuracy", "test/balanced_accuracy", "test/loss")


@dataclass(frozen=True)
class SavedWorkspace:
    """A workspace as it was saved.

    Args:
        url: its address.
        is_new: False if it was there before.
        changed: names of its sections that were added or changed.
    """

    url: str
    is_new: bool
    changed: tuple[str, ...]


def save_workspace(
    runs_dir: Path, *, project: str, entity: str | None, make_new: bool, environ: Mapping[str, str]
) -> SavedWorkspace:
    """Make the workspace of a project, or bring the existing one up to date.

    Args:
        runs_dir: folder of the runs, in which the address is kept.
        project: wandb project.
        entity: team or user; None for the key's own.
        make_new: make a workspace even if there is one.
        environ: the process's environment, with wandb's key if it is there.

    Raises:
        UserError: there is no key, or wandb does not answer, refuses the key, or has no such project; or the workspace was
            deleted.
    """
    file = runs_dir / FILE
    known = _read_addresses(file)
    _check_access(environ)
    with _wandb_errors():
        entity = entity or _own_entity()
        _check_project(entity, project)
        url = None if make_new else known.get(f"{entity}/{project}")
        if url is None:
            runs_dir.mkdir(parents=True, exist_ok=True)
            _write_addresses(file, known)  # if that is impossible, nothing is made
        workspace = _new_workspace(entity, project) if url is None else _load_workspace(url, file)
        changed = _update_sections(workspace)
        if changed:
            workspace.save()
        address = str(workspace.url)
    if url is None:
        _write_addresses(file, {**known, f"{entity}/{project}": address})
    return SavedWorkspace(address, url is None, tuple(changed))


def _read_addresses(file: Path) -> dict[str, str]:
    """Return the address of each ``entity/project``."""
    try:
        text = file.read_text()
    except FileNotFoundError:
        return {}
    try:
        known = json.loads(text)
        if isinstance(known, dict) and all(isinstance(url, str) for url in known.values()):
            return known
    except ValueError:
        pass
    raise UserError(f"{file} does not hold addresses of workspaces; remove it, and the next call makes a new workspace")


def _write_addresses(file: Path, known: Mapping[str, str]) -> None:
    replace_bytes(file, (json.dumps(known, indent=1) + "\n").encode())


def _check_access(environ: Mapping[str, str]) -> None:
    try:
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError:
        raise UserError("workspaces need the package wandb-workspaces: pip install 'galaxydist[track]'") from None
    host, port = wandb_address(environ)
    if not has_wandb_key(environ):
        raise UserError(f"there is no key for wandb's server {host}: set WANDB_API_KEY, or run `wandb login`")
    if not is_reachable(host, port):
        raise UserError(
            f"wandb's server {host}:{port} does not answer; give the command on a machine with internet access, such as a "
            "login node. `galaxydist dashboard local` needs no network"
        )


@contextmanager
def _wandb_errors() -> Iterator[None]:
    """Keep wandb from printing, and explain an error of its packages, which have no common base class."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    try:
        with explained_refusal():
            yield
    except BaseException as error:
        end_service()
        if isinstance(error, UserError | OSError) or not isinstance(error, Exception):
            raise
        raise UserError(f"wandb's server did not do it; try again later ({first_line(error)})") from error


def _own_entity() -> str:
    import wandb

    entity = wandb.Api().default_entity
    if not entity:
        raise UserError("wandb's key has no default entity; give --entity, a team or user")
    return str(entity)


def _check_project(entity: str, project: str) -> None:
    import wandb

    try:
        _ = wandb.Api().project(project, entity).id
    except ValueError as error:
        if "not found" not in str(error):
            raise
        raise UserError(
            f"wandb has no project {entity}/{project}, or your key does not see it. A project is made by its first run "
            f"(tracker.name=wandb tracker.project={project}, or `galaxydist track push`); other projects: --project, --entity"
        ) from None


def _new_workspace(entity: str, project: str) -> "Workspace":
    import wandb_workspaces.workspaces as ws

    columns = [f"summary:{name}" for name in RESULTS]
    runs = ws.RunsetSettings(pinned_columns=["run:displayName", "run:state", "run:jobType", "run:group", *columns])
    settings = ws.WorkspaceSettings(x_axis="step", max_runs=50)
    return ws.Workspace(entity=entity, project=project, name=NAME, settings=settings, runset_settings=runs)


def _load_workspace(url: str, file: Path) -> "Workspace":
    import wandb_workspaces.workspaces as ws

    try:
        return ws.Workspace.from_url(url)
    except ValueError as error:
        if "not found" not in str(error):
            raise
        raise UserError(
            f"the workspace {url}, named in {file}, is not there: it was deleted, or your key does not see it. To make another "
            "one: --new"
        ) from None


def _update_sections(workspace: "Workspace") -> list[str]:
    """Add our sections, or replace the panels of those that differ; return the names of those that were changed."""
    known = {section.name: section for section in workspace.sections}
    changed = []
    for position, wanted in enumerate(build_sections()):
        section = known.get(wanted.name)
        if section is None:
            workspace.sections.insert(position, wanted)
        elif _content(section) != _content(wanted):
            section.panels = wanted.panels
        else:
            continue
        changed.append(wanted.name)
    return changed


def _content(section: "Section") -> list[dict[str, Any]]:
    """Return the section's panels without their ids and places, which people change in the browser."""
    panels = [panel._to_model().model_dump(by_alias=True, exclude_none=True) for panel in section.panels]
    return [{name: value for name, value in panel.items() if name not in ("__id__", "layout", "isAuto")} for panel in panels]


def build_sections() -> list["Section"]:
    """Return the sections, from the top."""
    import wandb_workspaces.workspaces as ws

    sections = {
        "Curves by recipe": _curves(),
        "Results": _results(),
        "Classes": _classes(),
        "Throughput and scaling": _throughput(),
        "GPU use": _devices(),
        "Restarts and failures": _failures(),
    }
    layout = ws.SectionLayoutSettings(columns=3, rows=3)
    return [ws.Section(name=name, panels=panels, is_open=True, layout_settings=layout) for name, panels in sections.items()]


def _line(title: str, *metrics: str, **options: Any) -> Any:
    """Return a plot over the optimizer steps, with a curve a run."""
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(title=title, x="step", y=list(metrics), title_x="step", **options)


def _recipe_line(title: str, metric: str, **options: Any) -> Any:
    """Return a plot over the optimizer steps, with a curve a recipe: mean and range of its runs."""
    return _line(title, metric, groupby="JobType", groupby_aggfunc="mean", groupby_rangefunc="minmax", **options)


def _node_line(title: str, name: str) -> Any:
    """Return a plot of a value of all nodes and GPUs, whose names are not known."""
    return _line(title, metric_regex=f"system/.+/{name}")


def _scatter(title: str, fact: str, metric: str) -> Any:
    """Return a plot of a metric against a fact of the run, with a point a run."""
    import wandb_workspaces.reports.v2 as wr

    return wr.ScatterPlot(title=title, x=wr.Config(f"{FACTS_KEY}.{fact}"), y=wr.SummaryMetric(metric))


def _curves() -> list[Any]:
    return [
        _recipe_line("Validation accuracy", "val/accuracy"),
        _recipe_line("Validation balanced accuracy", "val/balanced_accuracy"),
        _recipe_line("Validation loss", "val/loss", log_y=True),
        _recipe_line("Training loss", "train/loss", log_y=True),
        _recipe_line("Training accuracy", "train/accuracy"),
        _recipe_line("Learning rate", "train/lr"),
        _recipe_line("Norm of the gradient", "train/grad_norm", log_y=True),
    ]


def _results() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    by_recipe = {"groupby": "JobType", "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    bars = [wr.BarPlot(title=name, metrics=[wr.SummaryMetric(name)], **by_recipe) for name in RESULTS]
    return [wr.RunComparer(diff_only="split"), *bars]


def _classes() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [
        _chart("Confusion matrix", "val/confusion", "wandb/confusion_matrix/v1", "Actual", "Predicted", "nPredictions"),
        _chart("Recall by class", "val/recall_by_class", "wandb/bar/v0", label="class", value="recall"),
        _chart("Calibration", "val/calibration", "wandb/line/v0", x="confidence", y="accuracy"),
        wr.WeavePanelSummaryTable(table_name="val/galaxies"),
    ]


def _chart(title: str, name: str, kind: str, *same: str, **columns: str) -> Any:
    """Return one of wandb's own charts of a table that each validation logs.

    Args:
        title: above the chart.
        name: under which the chart is logged; wandb adds ``_table`` for its table.
        kind: of chart.
        same: columns with the chart's own names.
        columns: the chart's names of further columns.
    """
    import wandb_workspaces.reports.v2 as wr

    return wr.CustomChart(
        query={"summaryTable": {"tableKey": f"{name}_table"}},
        chart_name=kind,
        chart_fields={**{column: column for column in same}, **columns},
        chart_strings={"title": title},
    )


def _throughput() -> list[Any]:
    shares = [f"time/{part}" for part in ("data_wait", "forward_backward", "optimizer", "checkpoint", "other")]
    return [
        _line("Images per second, all devices", "time/img_s"),
        _line("Images per second, each device", "time/img_s_device"),
        _line("Share of data wait", "time/data_wait"),
        _scatter("Images per second, all devices, by number of devices", "world_size", "time/img_s"),
        _scatter("Images per second, each device, by number of devices", "world_size", "time/img_s_device"),
        _line("Shares of the step time", *shares, plot_type="stacked-area", max_runs_to_show=1),
    ]


def _devices() -> list[Any]:
    return [
        _line("Model FLOPs utilisation", "gpu/mfu"),
        _line("Memory of rank 0's GPU (GB)", "gpu/memory_gb", "gpu/memory_reserved_gb"),
        _line("Memory of rank 0 (GB), without a GPU", "memory/rss_gb"),
        _node_line("GPU busy (%)", "gpu[0-9]+_percent"),
        _node_line("GPU memory (GB)", "gpu[0-9]+_memory_gb"),
        _node_line("GPU power (W)", "gpu[0-9]+_power_w"),
        _node_line("GPU temperature (°C)", "gpu[0-9]+_temperature_c"),
        _node_line("Processors busy (%)", "cpu_percent"),
        _node_line("Memory of the node (%)", "memory_percent"),
        _node_line("Disk (MB/s)", "disk_(read|write)_mb_s"),
        _node_line("Network (MB/s)", "network_(in|out)_mb_s"),
    ]


def _failures() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    restarts = wr.Config(f"{FACTS_KEY}.restarts")
    return [
        wr.WeavePanelSummaryTable(table_name="events"),
        wr.ScatterPlot(title="Restarts, by creation of the run", x=wr.Metric("CreatedTimestamp"), y=restarts),
        _line("Steps left out: non-finite gradients", "train/nonfinite"),
        _line("Images that could not be read", "train/skipped"),
        _line("Loss scale (fp16)", "train/loss_scale"),
    ]
