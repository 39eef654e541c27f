"""`prune2serve serve`: an OpenAI-compatible endpoint for a build, its parent, or any model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("serve", context_settings={"ignore_unknown_options": False})
@click.argument("directory", type=click.Path(path_type=Path), required=False)
@click.argument("engine_flags", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--engine",
    type=click.Choice(["auto", "onnxruntime", "vllm"]),
    default="auto",
    show_default=True,
    help="auto: vLLM where a CUDA GPU and vLLM are there, else ONNX Runtime.",
)
@click.option("--baseline", is_flag=True, help="Serve the unpruned parent of the build, the same way.")
@click.option("--precision", help="ONNX: fp32 or int4 on cpu; fp16, bf16 or int4 on cuda. [default: the first]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 listens on every interface.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@click.option("--api-key", envvar="PRUNE2SERVE_API_KEY", help="Clients must send it. Better in PRUNE2SERVE_API_KEY.")
@click.option("--served-model-name", multiple=True, help="What clients call it; may be given more than once.")
@click.option("--max-num-seqs", type=click.IntRange(1, 1024), default=16, show_default=True, help="Served at once.")
@click.option("--max-model-len", type=click.IntRange(2), help="Prompt and answer. [default: the context, up to 4096]")
@click.option("--max-num-waiting", type=click.IntRange(0), default=256, show_default=True, help="Then 429.")
@click.option("--threads", type=click.IntRange(1), help="ONNX Runtime's threads. [default: every core]")
@click.option("--request-timeout", type=click.FloatRange(1), default=600, show_default=True, help="Seconds.")
@click.option("--shutdown-timeout", type=click.FloatRange(1), default=30, show_default=True, help="Seconds.")
@click.option("--max-body-mb", type=click.FloatRange(0.001), default=8, show_default=True, help="Of one request.")
@click.option("--vllm-python", type=click.Path(), help="The Python of vLLM's own environment.")
@click.option("--speculative-draft", type=click.Path(path_type=Path), help="vLLM: a build that drafts for this model.")
@click.option("--force", is_flag=True, help="Serve a build whose quality has collapsed.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(directory: Path | None, engine_flags: tuple[str, ...], **options: Any) -> None:
    """Serve DIRECTORY (default: the last build) over HTTP. What follows -- goes to vLLM as it is."""
    from prune2serve.paths import DEFAULT_OUTPUT
    from prune2serve.progress import set_quiet
    from prune2serve.serve.targets import choose_target

    set_quiet(options["quiet"])
    target = choose_target(directory or DEFAULT_OUTPUT, baseline=options["baseline"], force=options["force"])
    names: tuple[str, ...] = options["served_model_name"] or (target.name,)
    _run(target.directory, names, engine_flags, options)


def _run(directory: Path, names: tuple[str, ...], engine_flags: tuple[str, ...], options: dict[str, Any]) -> None:
    from prune2serve.errors import Prune2ServeError
    from prune2serve.export.onnx_graph import PRECISIONS, check_precision
    from prune2serve.serve.ort_launch import ServeSettings, serve_onnx
    from prune2serve.serve.targets import choose_device, choose_engine
    from prune2serve.serve.vllm_engine import VllmSettings, serve_vllm

    engine = choose_engine(options["engine"], options["vllm_python"])
    if engine == "vllm":
        serve_vllm(
            VllmSettings(
                directory,
                names,
                host=options["host"],
                port=options["port"],
                api_key=options["api_key"],
                max_num_seqs=options["max_num_seqs"],
                max_model_len=options["max_model_len"],
                precision=options["precision"],
                shutdown_timeout_s=options["shutdown_timeout"],
                python=options["vllm_python"],
                speculative_draft=options["speculative_draft"],
                flags=engine_flags,
            )
        )
        return
    if options["speculative_draft"]:
        raise Prune2ServeError("--speculative-draft is vLLM's, but the engine is onnxruntime: add --engine vllm")
    if engine_flags:
        raise Prune2ServeError(
            f"{' '.join(engine_flags)} would go to vLLM, but the engine is onnxruntime: add --engine vllm or drop them"
        )
    device = choose_device(options["device"])
    precision = options["precision"] or PRECISIONS[device][0]
    check_precision(precision, device)
    serve_onnx(
        ServeSettings(
            directory,
            names,
            precision=precision,
            device=device,
            host=options["host"],
            port=options["port"],
            api_key=options["api_key"],
            max_num_seqs=options["max_num_seqs"],
            max_model_len=options["max_model_len"],
            max_num_waiting=options["max_num_waiting"],
            num_threads=options["threads"],
            max_body_bytes=int(options["max_body_mb"] * 2**20),
            request_timeout_s=options["request_timeout"],
            shutdown_timeout_s=options["shutdown_timeout"],
        )
    )
