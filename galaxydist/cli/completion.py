"""``galaxydist completion``: shell completion of commands, options, recipes, clusters, keys and run folders.

It uses argcomplete: the shell calls galaxydist with ``_ARGCOMPLETE`` set, and the parser answers with the possible words.
"""

import argparse
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from galaxydist.cli.options import Commands, add_command

EPILOG = """to turn it on in this shell, and in all shells:
  eval "$(galaxydist completion bash)"
  echo 'eval "$(galaxydist completion bash)"' >> ~/.bashrc
  galaxydist completion fish > ~/.config/fish/completions/galaxydist.fish
"""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    description = "Print the shell code that completes commands, options, recipes, clusters, keys and run folders."
    parser = add_command(commands, "completion", run, "shell completion", description=description, epilog=EPILOG)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="bash|zsh|fish", help="name of the shell")


def run(arguments: argparse.Namespace) -> None:
    """Print the shell code."""
    from argcomplete.shell_integration import shellcode

    print(shellcode(["galaxydist"], shell=arguments.shell))


def complete(parser: argparse.ArgumentParser) -> None:
    """Print the completions that the shell asks for, and end the process."""
    import argcomplete

    completer: Any = _complete_word
    argcomplete.autocomplete(parser, always_complete_options="long", default_completer=completer, append_space=False)


def _complete_word(prefix: str, action: argparse.Action, **_: Any) -> list[str]:
    """Return the completions of one word: ``key=value`` for commands that take such arguments, else files."""
    from argcomplete.completers import FilesCompleter

    metavar = str(action.metavar or "")
    if "=" not in metavar:
        files: list[str] = FilesCompleter()(prefix)
        return files
    return [word for word in _settings(prefix, with_cluster="cluster" in metavar) if word.startswith(prefix)]


def _settings(prefix: str, *, with_cluster: bool) -> Iterator[str]:
    """Yield ``key=`` for the beginning of a key, and ``key=value`` for a complete key."""
    from galaxydist.recipe.fields import RECIPE
    from galaxydist.recipe.resolve import list_recipes

    key, equals, _ = prefix.partition("=")
    if not equals:
        yield from ("recipe=", *(["cluster="] if with_cluster else []))
        yield from (f"{name}=" for name in RECIPE.fields if name != "name")
    elif key == "recipe":
        yield from (f"recipe={name}" for name in list_recipes())
    elif key == "cluster" and with_cluster:
        from galaxydist.cluster.profile import list_clusters

        yield from (f"cluster={name}" for name in list_clusters())
    elif (field := RECIPE.fields.get(key)) is not None:
        choices: tuple[str, ...] = ("true", "false") if field.annotation is bool else ()
        if get_origin(field.annotation) is Literal:
            choices = tuple(map(str, get_args(field.annotation)))
        yield from (f"{key}={choice}" for choice in choices)
