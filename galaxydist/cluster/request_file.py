"""What was asked for in one submission: kept beside the job, so that its batch script knows which runs it is about."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from galaxydist.atomic_files import read_json, write_json
from galaxydist.cluster.profile import ClusterConfig
from galaxydist.errors import UserError

FORMAT_VERSION = 2


@dataclass(frozen=True)
class JobRequest:
    """One run to submit.

    Args:
        arguments: ``recipe=NAME`` and ``key=value``, as for launch.py.
        run_dir: its run folder.
        recipe_path: the recipe's file.
        recipe_name: what it is called in the snapshot.
    """

    arguments: tuple[str, ...]
    run_dir: Path
    recipe_path: Path
    recipe_name: str


@dataclass(frozen=True)
class RequestFile:
    """A submission.

    Args:
        path: where it is written.
        requests: its runs; in an array in the order of the tasks.
        cluster: the profile, resolved.
        cluster_arguments: ``cluster=NAME`` and ``cluster.key=value``, for the record.
        code: the snapshot.
        folder: submitit's.
        name: of the job.
    """

    path: Path
    requests: tuple[JobRequest, ...]
    cluster: ClusterConfig
    cluster_arguments: tuple[str, ...]
    code: Path
    folder: Path
    name: str

    def write(self) -> None:
        """Write it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        plain = {
            "format": FORMAT_VERSION,
            "requests": [_plain(asdict(request)) for request in self.requests],
            "cluster": self.cluster.model_dump(mode="json"),
            "cluster_arguments": list(self.cluster_arguments),
            "code": str(self.code),
            "folder": str(self.folder),
            "name": self.name,
        }
        write_json(self.path, plain)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read it.

        Raises:
            UserError: it is not there or of another galaxydist: the snapshot of its submission reads it.
        """
        if not path.exists():
            raise UserError(f"{path} is not there: is the folder of the runs on a file system that all nodes share?")
        plain = read_json(path)
        if not isinstance(plain, dict) or plain.get("format") != FORMAT_VERSION:
            raise UserError(f"{path} is not a submission of format {FORMAT_VERSION}. Submit the run again.")
        return cls(
            path=path,
            requests=tuple(
                JobRequest(tuple(item["arguments"]), Path(item["run_dir"]), Path(item["recipe_path"]), item["recipe_name"])
                for item in plain["requests"]
            ),
            cluster=ClusterConfig.model_validate_json(json.dumps(plain["cluster"])),  # strict: paths and tuples from JSON only
            cluster_arguments=tuple(plain["cluster_arguments"]),
            code=Path(plain["code"]),
            folder=Path(plain["folder"]),
            name=plain["name"],
        )


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(item) if isinstance(item, Path) else item for key, item in value.items()}
