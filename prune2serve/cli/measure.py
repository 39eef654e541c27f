"""`prune2serve measure`: latency and throughput of two arms, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from prune2serve.records import Comparison
    from prune2serve.serve.arms import Arms
    from prune2serve.serve.compare import Plan
    from prune2serve.serve.workload import Workload

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(1)
POSITIVE = click.FloatRange(0, min_open=True)


@click.command("measure")
@click.argument("directory", type=PATH, required=False)
@click.argument("engine_flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--engine", type=click.Choice(["auto", "onnxruntime", "vllm"]), default="auto", show_default=True)
@click.option("--precision", help="Passed to `serve`, for both arms; so are the next five.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--threads", type=COUNT)
@click.option("--max-num-seqs", type=COUNT)
@click.option("--max-model-len", type=COUNT)
@click.option("--vllm-python", type=click.Path())
@click.option("--a", "url_a", metavar="URL", help="The baseline: an endpoint already running.")
@click.option("--b", "url_b", metavar="URL", help="The candidate.")
@click.option("--a-model", help="Model name at --a. [default: the only one it lists]")
@click.option("--b-model", help="Model name at --b.")
@click.option("--a-key-env", metavar="NAME", help="Environment variable that holds the key for --a.")
@click.option("--b-key-env", metavar="NAME", help="The same for --b.")
@click.option("--api", type=click.Choice(["completions", "chat"]), default="completions", show_default=True)
@click.option("--prompts", type=PATH, help="JSONL or ShareGPT file. [default: a bundled list]")
@click.option("--sonnet", type=PATH, help="Prompts of lines drawn from this text file.")
@click.option("--random-prompts", is_flag=True, help="Prompts of random tokens.")
@click.option("--tokenizer", type=PATH, help="Model directory for --input-tokens. [default: DIRECTORY]")
@click.option("--input-tokens", type=click.IntRange(8), help="Prompt length. [default: 64; as they are for URLs]")
@click.option("--output-tokens", type=click.IntRange(2), help="[default: 32; 16 with --quick]")
@click.option("--length-spread", type=click.FloatRange(0, 0.95), default=0.0, help="0.5: lengths vary by half.")
@click.option("--concurrency", type=COUNT, help="Requests in flight. [default: 1; no limit with --rate, --replay]")
@click.option("--rate", type=POSITIVE, help="Open loop: requests per second.")
@click.option("--burstiness", type=POSITIVE, default=1.0, help="With --rate: 1 Poisson, less is burstier.")
@click.option("--replay", type=PATH, help="Open loop: a file with one send time (seconds) a line.")
@click.option(
    "--requests",
    type=COUNT,
    help="Requests per period, four periods a round. [default: 1; 3 x concurrency above 1; 8 in an open loop]",
)
@click.option("--share-prefixes", is_flag=True, help="Leave prompts as they are, so that prefix caches may help.")
@click.option("--slo", help="Goodput: ttft=MS,tpot=MS,e2e=MS.")
@click.option("--rounds", type=click.IntRange(2), help="Stop after so many rounds.")
@click.option("--precision-target", type=POSITIVE, default=0.02, show_default=True, help="Stop at this half width.")
@click.option("--time-limit", type=POSITIVE, default=90.0, show_default=True, help="Seconds of measuring.")
@click.option("--quick", is_flag=True, help="About 15 seconds of measuring: a first impression.")
@click.option("--noise-floor", is_flag=True, help="Measure the baseline against itself too, by the same design.")
@click.option("--plan", "only_plan", type=POSITIVE, metavar="EFFECT", help="Say how long finding EFFECT takes (0.05).")
@click.option("--resident", type=click.Choice(["auto", "both", "one"]), default="auto", show_default=True)
@click.option("--allow-unfair", is_flag=True, help="Go on where a fairness check refuses.")
@click.option("--fail-if", multiple=True, metavar="CONDITION", help="'p95_ttft_ratio > 0.9': exit 3 (repeatable).")
@click.option("--export", "formats", multiple=True, type=click.Choice(["vllm", "guidellm"]), help="Extra result files.")
@click.option("--output", type=PATH, help="Directory for comparison.json and report.html. [default: a new one]")
@click.option("--force", is_flag=True, help="Replace --output.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON (without the requests, which the file keeps).")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(**options: Any) -> None:
    """Compare a build in DIRECTORY (default: the last) with its unpruned parent, or endpoint --b with --a.

    Both get the same prompts, lengths and schedule, in rounds of four periods A B B A or B A A B; the intervals come
    from resampling rounds. What follows -- goes to vLLM as it is, for both arms.
    """
    from prune2serve.progress import set_quiet
    from prune2serve.serve import gates
    from prune2serve.serve.compare import run
    from prune2serve.serve.conclude import comparison_of, note_problems

    set_quiet(options["quiet"])
    conditions = [gates.parse(text) for text in options["fail_if"]]
    target = _output(options)
    arms = _arms(options)
    plan = _plan(options, arms)
    if options["only_plan"]:
        _print_plan(plan, options)
        return
    floor = _noise_floor(plan, arms) if options["noise_floor"] else None
    comparison = comparison_of(plan, run(plan), floor)
    note_problems(comparison.checks)
    written = _write(comparison, arms, target, options)
    if options["as_json"]:
        import json

        click.echo(json.dumps(comparison.summary() | {"output": str(written)}, indent=2, allow_nan=False))
    else:
        _print_table(comparison, written)
    gates.check(conditions, comparison)


def _output(options: dict[str, Any]) -> Path:
    """Choose where the results go, and refuse at once what could not be written at the end."""
    from datetime import UTC, datetime

    from prune2serve.paths import DEFAULT_OUTPUT
    from prune2serve.staging import refuse_existing

    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    beside = Path("prune2serve" if options["url_a"] else options["directory"] or DEFAULT_OUTPUT).resolve()
    target = options["output"] or beside.with_name(f"{beside.name}-measure") / stamp
    refuse_existing(target, force=options["force"])
    return Path(target)


def _arms(options: dict[str, Any]) -> Arms:
    from prune2serve.errors import Prune2ServeError
    from prune2serve.paths import DEFAULT_OUTPUT
    from prune2serve.serve.arms import directory_arms, url_arms

    if options["url_a"] or options["url_b"]:
        if not (options["url_a"] and options["url_b"]):
            raise Prune2ServeError("--a and --b go together: name both endpoints, or neither")
        if options["directory"]:
            raise Prune2ServeError("a build directory and --a, --b were given: measure one or the other")
        return url_arms(
            (options["url_a"], options["url_b"]),
            (options["a_model"], options["b_model"]),
            (options["a_key_env"], options["b_key_env"]),
        )
    passed = []
    for name in ("precision", "device", "threads", "max_num_seqs", "max_model_len", "vllm_python"):
        if options[name] is not None:
            passed += [f"--{name.replace('_', '-')}", str(options[name])]
    if options["engine_flags"]:
        passed += ["--", *options["engine_flags"]]
    return directory_arms(options["directory"] or DEFAULT_OUTPUT, options["engine"], passed)


def _plan(options: dict[str, Any], arms: Arms) -> Plan:
    from prune2serve.serve.arms import fits_twice
    from prune2serve.serve.compare import Plan
    from prune2serve.serve.design import StoppingRule
    from prune2serve.serve.metrics import parse_slo

    resident = options["resident"]
    both = fits_twice(arms.directories, options["engine"]) if resident == "auto" else resident == "both"
    limit = 15.0 if options["quick"] else options["time_limit"]
    return Plan(
        start=arms.start,
        workload=_workload(options, arms),
        stopping=StoppingRule(options["rounds"], options["precision_target"], limit),
        api=options["api"],
        both_resident=both,
        slo=parse_slo(options["slo"]) if options["slo"] else None,
        seed=options["seed"],
        directories=arms.directories,
        costs=arms.costs,
        allow_unfair=options["allow_unfair"],
    )


def _workload(options: dict[str, Any], arms: Arms) -> Workload:
    from prune2serve.serve import prompts
    from prune2serve.serve.workload import Lengths, Workload

    directory = options["tokenizer"] or (arms.directories[1] if arms.directories else None)
    fitter = prompts.Fitter(directory) if directory else None
    length = options["input_tokens"] or (64 if fitter else None)
    source, found = prompts.choose_prompts(
        file=options["prompts"],
        sonnet=options["sonnet"],
        random=options["random_prompts"],
        fitter=fitter,
        num_tokens=length or 64,
        seed=options["seed"],
    )
    arrival = _arrival(options)
    return Workload(
        prompts=found,
        source=source,
        output=Lengths(options["output_tokens"] or (16 if options["quick"] else 32), options["length_spread"]),
        arrival=arrival,
        num_requests=options["requests"] or _requests_per_period(arrival.concurrency),
        input=Lengths(length, options["length_spread"]) if length else None,
        fitter=fitter,
        share_prefixes=options["share_prefixes"],
        seed=options["seed"],
    )


def _requests_per_period(concurrency: int | None) -> int:
    """Few for one stream, so that there are many rounds; more where a period must fill up and drain."""
    if concurrency is None:
        return 8
    return 1 if concurrency == 1 else 3 * concurrency


def _arrival(options: dict[str, Any]) -> Any:
    from prune2serve.errors import Prune2ServeError
    from prune2serve.serve.workload import Arrival, load_timestamps

    if options["rate"] and options["replay"]:
        raise Prune2ServeError("--rate and --replay both set the send times: choose one")
    if options["replay"]:
        return Arrival("replay", options["concurrency"], timestamps_s=load_timestamps(options["replay"]))
    if options["rate"]:
        kind = "poisson" if options["burstiness"] == 1 else "gamma"
        return Arrival(kind, options["concurrency"], options["rate"], options["burstiness"])
    return Arrival("closed", options["concurrency"] or 1)


def _noise_floor(plan: Plan, arms: Arms) -> Comparison:
    """Run the same design with the baseline on both arms."""
    from dataclasses import replace

    from prune2serve.serve.compare import run
    from prune2serve.serve.conclude import comparison_of

    twice = arms.noise_floor()
    same = replace(plan, start=twice.start, directories=twice.directories, costs=None, label="Noise floor (A/A)")
    return comparison_of(same, run(same))


def _print_plan(plan: Plan, options: dict[str, Any]) -> None:
    import json

    from prune2serve.serve.planning import estimate_rounds, explain

    found = estimate_rounds(plan, options["only_plan"])
    click.echo(json.dumps(found, indent=2) if options["as_json"] else explain(found))


def _write(comparison: Comparison, arms: Arms, target: Path, options: dict[str, Any]) -> Path:
    from prune2serve.serve import interchange, report
    from prune2serve.staging import staged_directory

    with staged_directory(target, force=options["force"]) as staging:
        (staging / "comparison.json").write_text(comparison.to_json())
        (staging / "report.html").write_text(report.render(comparison, arms.manifest), encoding="utf-8")
        for name in options["formats"]:
            interchange.export(comparison, staging, name)
    return target


def _print_table(comparison: Comparison, written: Path) -> None:
    from rich.console import Console

    from prune2serve.serve.table import attribution_lines, table_of

    console = Console(highlight=False)
    console.print(table_of(comparison))
    for line in [comparison.verdict, *attribution_lines(comparison)]:
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"Report: {written / 'report.html'}", soft_wrap=True, markup=False)
