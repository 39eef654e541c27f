"""The command line: a file per command; each parses, calls and prints.

Nothing here or at the top of a command's module may import torch: `--help` answers in under half a second.
"""

from __future__ import annotations

import importlib
import sys

import click

from prune2serve import __version__
from prune2serve.errors import Prune2ServeError, near_match

COMMANDS = {
    "build": "Prune a model into a deployable directory.",
    "score": "Score the decoder layers: a table and a chart.",
    "evaluate": "Measure the quality of a build against its parent.",
    "export": "Export a directory to ONNX.",
    "serve": "Serve a build over an OpenAI-compatible endpoint.",
    "bakeoff": "Compare several methods on one model: quality against size.",
    "measure": "Compare latency and throughput, pruned against unpruned.",
    "rollout": "Write the files that hand a build to gateways and clusters.",
    "doctor": "Say what this machine can run and what to install.",
}
"""Command -> short help; prune2serve/cli/NAME.py holds `command`, imported only when it is called."""


class LazyGroup(click.Group):
    """Imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"prune2serve.cli.{name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}{near_match(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="prune2serve")
def group() -> None:
    """Make a large language model shallower, and put it into production safely.

    \b
        prune2serve build --ratio 0.25 && prune2serve serve
    """


def main() -> None:
    """Run the command line. Exit 0 done, 1 a user's error, 2 usage, 3 a gate failed."""
    try:
        group.main(standalone_mode=True)
    except Prune2ServeError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
