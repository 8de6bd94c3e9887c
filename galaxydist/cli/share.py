"""``galaxydist publish`` and ``galaxydist app``: give a trained model to others as one folder, and as a page."""

import argparse
import json
import os
import re
import shlex
from typing import TYPE_CHECKING

from galaxydist.cli.jobs import find_folder
from galaxydist.cli.options import Commands, add_command, add_trust_code, local_path, non_negative_int, port_number, positive_int
from galaxydist.cli.track import print_line
from galaxydist.errors import UserError

if TYPE_CHECKING:
    from galaxydist.serving.publish import PublishReport
    from galaxydist.serving.space import SpaceReport

EPILOG = """examples:
  galaxydist publish runs/vit-0123abcd published/vit
  galaxydist publish runs/vit-0123abcd published/vit --repo me/galaxy-vit --name "ViT-S on Galaxy10 DECaLS"
  galaxydist publish runs/vit-0123abcd published/vit --overwrite --no-program
  galaxydist publish runs/vit-0123abcd published/resnet50 --space space --name "Galaxies"    the app, as a Hugging Face Space

The folder holds weights (safetensors), preprocessing and class names (config.json), ONNX, a torch.export archive, a model card
and stored training galaxies. It is what the Hugging Face Hub takes; galaxydist.load_predictor opens it without the run.
"""
APP_EPILOG = """examples:
  galaxydist app runs/vit-0123abcd                      its page, on this machine only
  galaxydist app runs/vit-0123abcd published/resnet50   a choice of two models
  galaxydist app published/vit --port 8000

A run is published into RUN/published at its first start, and again when its checkpoints or evaluations have changed. Uploads
lie in a temporary folder, and are deleted within minutes. Ctrl-C ends the page.
"""
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def add_publish(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "publish",
        run_publish,
        "write a trained model as a folder for others",
        description="Write the model of a run as one folder for others: weights, preprocessing, ONNX, model card.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "paths",
        type=local_path,
        nargs="+",
        metavar="PATH",
        help="run folder (or its name in ./runs), then the folder to write; with --space several runs or published folders",
    )
    parser.add_argument(
        "--space", type=local_path, metavar="DIR", help="write a Hugging Face Space into DIR: the app with these models"
    )
    parser.add_argument("--checkpoint", choices=("best", "last"), help="checkpoint (default: the recipe's)")
    parser.add_argument("--name", metavar="TITLE", help="name of the model for people (default: recipe and data set)")
    parser.add_argument("--no-onnx", action="store_true", help="leave out the ONNX file, which the app runs")
    parser.add_argument("--no-program", action="store_true", help="leave out the archive of torch.export")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="repository on the Hugging Face Hub, for the commands in the card")
    parser.add_argument("--overwrite", action="store_true", help="replace a published folder")
    parser.add_argument(
        "--reference",
        type=non_negative_int,
        metavar="N",
        help="largest number of training galaxies that are stored, 0 for none (default: 1,000)",
    )
    parser.add_argument(
        "--trained-on", metavar="FILE", help="manifest of the training data, if its shards have moved (a path or URL)"
    )
    add_trust_code(parser)


def run_publish(arguments: argparse.Namespace) -> None:
    """Write the folder, and print its files and the commands that use it."""
    if arguments.repo is not None and not _REPO.fullmatch(arguments.repo):
        raise UserError(f"--repo {arguments.repo}: a repository is written OWNER/NAME, with letters, digits, '-', '_' and '.'")
    if arguments.name is not None and not (arguments.name.strip() and arguments.name.isprintable()):
        raise UserError("--name: give a name of printable characters")
    if arguments.space is None and len(arguments.paths) != 2:
        given = " ".join(map(str, arguments.paths))
        raise UserError(
            f"publish takes a run and the folder to write, and was given {given}: galaxydist publish RUN DIR (or --space DIR, "
            "for several runs)"
        )
    if arguments.space is not None and arguments.no_onnx:
        raise UserError("--no-onnx: a Space runs the ONNX file; leave the option out")
    paths = arguments.paths if arguments.space is not None else arguments.paths[:1]
    sources = list(dict.fromkeys(find_folder(str(path)) for path in paths))
    from galaxydist.prediction.trained_model import ModelChoice
    from galaxydist.serving.publish import PublishOptions, publish

    options = PublishOptions(
        ModelChoice(arguments.checkpoint, None, arguments.trained_on, arguments.trust_code),
        title=None if arguments.name is None else arguments.name.strip(),
        onnx=not arguments.no_onnx,
        program=not arguments.no_program,
        repo=arguments.repo,
        overwrite=arguments.overwrite,
        **({} if arguments.reference is None else {"reference": arguments.reference}),
    )
    if arguments.space is not None:
        from galaxydist.serving.space import publish_space

        print(render_space(publish_space(sources, arguments.space, os.environ, options), arguments.repo))
        return
    print(render_report(publish(sources[0], arguments.paths[1], os.environ, options), arguments.repo))


def add_app(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "app",
        run_app_command,
        "show a page on which a trained model labels pictures",
        description="Show a page on which trained models label pictures, on this machine's loopback address until Ctrl-C.",
        epilog=APP_EPILOG,
    )
    parser.add_argument("sources", nargs="+", metavar="RUN|DIR", help="run folder, or its name in ./runs, or a published folder")
    parser.add_argument("--port", type=port_number, metavar="N", help="port of the page (default: 7860, or the next free one)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address that the page listens on (default: %(default)s)",
    )
    parser.add_argument(
        "--share", action="store_true", help="also make a public link, through gradio's servers, for a week at most"
    )
    parser.add_argument(
        "--max-upload",
        type=positive_int,
        default=100,
        metavar="MB",
        help="limit of an upload: a picture, a zip or several pictures together (default: %(default)s)",
    )
    parser.add_argument(
        "--queue", type=positive_int, default=32, metavar="N", help="requests that may wait for an answer (default: %(default)s)"
    )
    add_trust_code(parser)


def run_app_command(arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    from galaxydist.serving.app.web_server import ServerOptions
    from galaxydist.serving.run_app import AppOptions, run_app

    server = ServerOptions(arguments.host, arguments.port, arguments.share, arguments.max_upload, arguments.queue)
    sources = list(dict.fromkeys(find_folder(text) for text in arguments.sources))
    run_app(sources, AppOptions(server, arguments.trust_code), os.environ, print_line)


def render_report(report: "PublishReport", repo: str | None) -> str:
    """Return what was written, with sizes, and the commands that load and upload it."""
    width = max(map(len, report.sizes))
    trust = ", trust_code=True" if report.needs_code else ""
    lines = [f"published: {report.folder}"]
    lines += [f"  {name:{width}}  {_readable(size):>9}" for name, size in report.sizes.items()]
    lines += [f"note: {note}" for note in report.notes]
    lines += ["load it in Python:", f"  galaxydist.load_predictor({_python_text(str(report.folder))}{trust})"]
    if report.loads_in_timm:
        lines.append(f"  timm.create_model({_python_text(f'local-dir:{report.folder}')}, pretrained=True)")
    lines += ["upload it to the Hugging Face Hub:", f"  hf upload {repo or 'OWNER/NAME'} {shlex.quote(str(report.folder))} ."]
    return "\n".join(lines)


def render_space(report: "SpaceReport", repo: str | None) -> str:
    """Return what was written, and the commands that try and upload it."""
    name = shlex.quote(str(report.folder))
    return "\n".join(
        [
            f"Space: {report.folder} ({_readable(report.num_bytes)}), gradio {report.gradio}",
            *(f"  {title}" for title in report.models),
            *(f"note: {note}" for note in report.notes),
            "try it:",
            f"  python {shlex.quote(str(report.folder / 'app.py'))}",
            "upload it to the Hugging Face Hub, which makes the Space if there is none of that name:",
            f"  hf upload {repo or 'OWNER/NAME'} {name} . --repo-type space",
        ]
    )


def _python_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # in double quotes


def _readable(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
