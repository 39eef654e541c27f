"""`prune2serve doctor`: what this machine can run and what to install."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from prune2serve.serve.diagnosis import Diagnosis


@click.command("doctor")
@click.option("--vllm-python", type=click.Path(), help="The Python of vLLM's own environment.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(vllm_python: str | None, as_json: bool) -> None:
    """Say which devices, engines and packages are here, and the command for each that is missing."""
    from prune2serve.serve.diagnosis import diagnose

    found = diagnose(vllm_python)
    click.echo(found.to_json().rstrip() if as_json else "\n".join(_lines(found)))


def _lines(found: Diagnosis) -> list[str]:
    lines = [
        f"Machine   {found.platform}, {found.num_cores} cores, {found.memory_bytes / 2**30:.1f} GiB, "
        f"{' '.join(found.cpu_flags) or 'no vector extensions known'}",
        f"GPU       {'; '.join(found.gpus) or 'none that torch can use'}",
        f"Python    {found.python}",
        "",
        "Engines",
    ]
    for engine in found.engines:
        lines.append(f"  {'ready  ' if engine.ready else 'missing'} {engine.name}: {engine.detail}")
        if engine.fix:
            lines.append(f"          {engine.fix}")
    lines += [f"  serve --engine auto takes {found.engine} here", "", "Packages"]
    for extra, packages in found.packages.items():
        shown = ", ".join(f"{name} {version or '(missing)'}" for name, version in packages.items())
        lines.append(f"  {extra}: {shown}")
    if found.missing:
        lines += ["", "To install what is missing"]
        lines += [f"  {command}" for command in found.missing.values()]
    return lines
