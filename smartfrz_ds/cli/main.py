"""The `smartfrz` command: parses arguments, calls the package, prints the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from .bench_policies import add_command as add_bench_policies
from .predictor import add_commands

app = typer.Typer(
    name="smartfrz",
    help="Freeze converged layers during a DeepSpeed or FSDP run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@contextmanager
def _plain_errors(extra: str = "predictor") -> Iterator[None]:
    """Print errors of the user without a traceback and exit with code 2.

    Args:
        extra: The extra of this package that installs what may be missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("smartfrz_ds"):
            raise
        typer.echo(f"error: {error.name} is missing: pip install 'smartfrz_ds[{extra}]'", err=True)
        raise typer.Exit(2) from None
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        from smartfrz_ds.config.versions import tested_range

        typer.echo(f"smartfrz {version('smartfrz_ds')} (deepspeed {version('deepspeed')}, torch {version('torch')})")
        typer.echo(f"tested with {tested_range('deepspeed')}; {tested_range('torch')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the installed and the tested versions of DeepSpeed and torch."
        ),
    ] = False,
) -> None:
    """Freeze converged layers during a DeepSpeed or FSDP run."""


add_commands(app, _plain_errors)


@app.command()
def check_config(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A DeepSpeed JSON.")],
    total_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Length of the run in steps, if only the script knows it (a Trainer, a scheduler of your own)."),
    ] = None,
) -> None:
    """Check a DeepSpeed JSON and print the settings.

    Checks the "smartfrz" section and prints the settings that a run would use and the first freezing stage. Percentages are also printed as
    steps if the length of the run is known. Name patterns are checked only when the engine is created, as they need the model.
    """
    with _plain_errors():
        from .check_config import settings_text  # here: it needs pydantic

        text = settings_text(file, total_steps)
    typer.echo(text)


@app.command()
def schedule(
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with the config.json of a Hugging Face model.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check the schedule in this DeepSpeed JSON against --model, and print its table.")
    ] = None,
    from_log: Annotated[
        Path | None, typer.Option(metavar="LOG", help="Turn the freezes and thaws of an earlier run into a schedule.")
    ] = None,
    unfreeze: Annotated[bool, typer.Option("--unfreeze", help="Begin with all but the head frozen; the last layers thaw first.")] = False,
    total_steps: Annotated[int | None, typer.Option(min=1, help="Length of the run, to print shares as steps.")] = None,
) -> None:
    """Write a schedule to edit.

    `smartfrz schedule --model DIR > schedule.json` writes settings for the policy `schedule`, with the layers in order and what trains in
    each phase as comments. No weights are loaded.
    """
    with _plain_errors("demo"):
        from .schedule import made

        text = made(model, config, from_log, unfreeze=unfreeze, total_steps=total_steps)
    typer.echo(text)


@app.command()
def plan(
    profile: Annotated[Path | None, typer.Option(dir_okay=False, help="JSON file with measured layer costs (docs/planning.md).")] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Instead of --profile: number of blocks of a GPT whose costs are estimated.")
    ] = None,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size of that GPT.")] = 4096,
    vocabulary: Annotated[int, typer.Option(min=1, help="Vocabulary size of that GPT.")] = 32000,
    sequence: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 4096,
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences per micro-batch.")] = 1,
    tflops: Annotated[float, typer.Option(help="TFLOP/s that a device achieves.")] = 150.0,
    recompute: Annotated[bool, typer.Option("--recompute", help="Activation checkpointing in every block.")] = False,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages; 1: no pipeline.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Data-parallel replicas.")] = 1,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches per step (gradient accumulation).")] = 1,
    zero: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage; 0 or 1 in a pipeline.")] = 1,
    bandwidth: Annotated[float, typer.Option(help="Bandwidth of a rank in GB/s.")] = 25.0,
    latency: Annotated[float, typer.Option(min=0, help="Latency of a message in microseconds.")] = 50.0,
    overlap: Annotated[bool, typer.Option("--overlap", help="Without a pipeline: communication overlaps with computation.")] = False,
    element_bytes: Annotated[int, typer.Option(min=1, help="Bytes per weight and per gradient: 2 (bf16) or 4 (fp32).")] = 2,
    memory_limit: Annotated[float | None, typer.Option(min=0, help="Memory limit per rank in GB, for every partition into stages.")] = None,
    parts: Annotated[str | None, typer.Option(help="Initial stage bounds, e.g. 0,9,18 (default: the best).")] = None,
    order: Annotated[str, typer.Option(help="Pipeline schedule: 1f1b (DeepSpeed's) or gpipe.")] = "1f1b",
    frozen: Annotated[str | None, typer.Option(help="Fractions of the layers to compare, e.g. 0.25,0.5.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Phases of a run as SHARE:FRACTION, e.g. 0.4:0,0.6:0.5.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the run.")] = 100_000,
    rows: Annotated[int | None, typer.Option(min=1, help="Samples of the data: predicts the prefix cache as well.")] = None,
    cache_space: Annotated[float, typer.Option(help="GB of a host for the cache's rows, memory and disk.")] = 4.3,
    hosts: Annotated[int, typer.Option(min=1, help="Hosts; with several, samples stay on their host (HostSampler).")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in seconds, bytes and hours.")] = False,
) -> None:
    """Predict what freezing saves on a cluster.

    Predicts step times with a frozen prefix, with and without rebalancing the pipeline, communicated bytes and the hours of a run. Nothing
    is executed.
    """
    with _plain_errors():
        from smartfrz_ds.cli import plan as command

        made = command.planned(
            profile=profile,
            shape={"layers": layers, "hidden": hidden, "vocabulary": vocabulary, "sequence": sequence, "micro_batch": micro_batch},
            tflops=tflops,
            recompute=recompute,
            stages=pp,
            replicas=dp,
            micro_batches=micro_batches,
            zero=zero,
            bandwidth=bandwidth,
            latency=latency,
            overlap=overlap,
            element_bytes=element_bytes,
            memory_limit=memory_limit,
            parts=parts,
            order=order,
            frozen=frozen,
            schedule=schedule,
            steps=steps,
            rows=rows,
            cache_space=cache_space,
            hosts=hosts,
        )
    typer.echo(json.dumps(made.as_dict(), indent=2) if as_json else command.render(made, of_run=schedule is not None))


@app.command()
def reshape(
    checkpoint: Annotated[Path, typer.Argument(file_okay=False, help="Checkpoint folder, as load_checkpoint takes it.")],
    pp: Annotated[int, typer.Option(help="Pipeline stages of the new run.")],
    dp: Annotated[int, typer.Option(help="Data-parallel replicas of the new run.")],
    output: Annotated[Path | None, typer.Option(file_okay=False, help="New folder (default: CHECKPOINT-ppP-dpD).")] = None,
    tag: Annotated[str | None, typer.Option(help="Which checkpoint of the folder (default: the one named in `latest`).")] = None,
    bounds: Annotated[
        str | None, typer.Option(help="Stage bounds, e.g. 0,9,18 (default: balanced, a frozen layer counts as a third).")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Unpickle your own objects (client_state). This runs code named in the files.")
    ] = False,
) -> None:
    """Convert a pipeline's checkpoint to other numbers of stages and replicas.

    Writes a new checkpoint from which a run with P stages and D replicas resumes. The original checkpoint is only read.
    """
    with _plain_errors():
        from smartfrz_ds.checkpoint.reshape import reshape as write

        try:
            cut = None if bounds is None else [int(bound) for bound in bounds.split(",")]
        except ValueError:
            raise ValueError(f"--bounds: got {bounds!r}; allowed: a comma-separated list of increasing integers") from None
        made = write(checkpoint, pp, dp, output=output, tag=tag, bounds=cut, trust=trust, progress=True)
    typer.echo(made.text())


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of the run's log (smartfrz.log_path), or the log itself.")],
    output: Annotated[Path | None, typer.Option(file_okay=False, help="Output folder (default: RUN_DIR/report).")] = None,
) -> None:
    """Make a report of a run from its log.

    Writes one self-contained HTML file, and its charts as PNGs: frozen layers, probabilities, loss, step times, bytes, savings, events.
    """
    with _plain_errors("report"):
        from smartfrz_ds.telemetry.report import write_report

        page = write_report(run_dir, output)
    typer.echo(str(page))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.json]", help="A DeepSpeed JSON to check as well.")] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="MODULE:CALLABLE that returns a model, or the name or folder of a Hugging Face model."),
    ] = None,
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Train a toy model with the installed versions: freeze, thaw, save, load. Some seconds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings and the model's layers as JSON.")] = False,
) -> None:
    """Look for problems that would stop a run.

    Checks versions, compiler, stale build locks, MPI, host name, ports and shared memory, optionally the settings, and which layers of a
    model can freeze. Prints a remedy for each problem. The exit code is 1 if there is a problem, 0 if there are only warnings.
    """
    with _plain_errors("demo"):
        from .doctor import examine, render

        examined = examine(config, model, self_check=self_check)
    typer.echo(json.dumps(examined.to_json(), indent=2) if as_json else render(examined))
    raise typer.Exit(examined.exit_code)


bench = typer.Typer(no_args_is_help=True, help="Measure what freezing saves, with real engines on this machine.", rich_markup_mode=None)
app.add_typer(bench, name="bench")
add_bench_policies(bench, _plain_errors)


@bench.command("zero")
def bench_zero(
    stages: Annotated[str, typer.Option(help="Comma-separated ZeRO stages.")] = "0,1,2,3",
    engine: Annotated[list[str] | None, typer.Option(help="Only this engine (z2-bf16, ...). Repeatable.")] = None,
    params: Annotated[float, typer.Option(help="Size of the network in millions of weights.")] = 38.0,
    rounds: Annotated[int, typer.Option(help="Number of rounds; results are medians over them.")] = 5,
    steps: Annotated[int, typer.Option(help="Timed steps per round and copy.")] = 3,
    ranks: Annotated[int, typer.Option(help="Number of ranks.")] = 2,
    out: Annotated[Path, typer.Option(file_okay=False, help="Results folder; existing results are not measured again.")] = Path(
        "bench-zero"
    ),
) -> None:
    """Measure freezing half of a network on each ZeRO engine.

    Runs ranks on the CPU. Compares step time, communicated bytes, memory and pause with the ideal and with requires_grad_(False).
    """
    with _plain_errors():
        from smartfrz_ds.bench.zero import bench_zero as measure
        from smartfrz_ds.bench.zero import engines_of

        try:
            wanted = [int(stage) for stage in stages.split(",")]
        except ValueError:
            raise ValueError(f"--stages: got {stages!r}; allowed: a comma-separated list of 0, 1, 2, 3") from None
        text = measure(engine or engines_of(wanted), out, params=params, rounds=rounds, steps=steps, ranks=ranks)
    typer.echo(text)


@bench.command("peak")
def bench_peak(
    ranks: Annotated[str, typer.Option(help="Comma-separated numbers of ranks.")] = "2,4",
    engine: Annotated[list[str] | None, typer.Option(help="Only this engine (z2-bf16, ...). Repeatable.")] = None,
    params: Annotated[float, typer.Option(help="Size of the network in millions of weights.")] = 4.0,
    staging: Annotated[int, typer.Option(help="Size of a staging buffer in KiB.")] = 256,
    out: Annotated[Path, typer.Option(file_okay=False, help="Results folder; existing results are not measured again.")] = Path(
        "bench-peak"
    ),
) -> None:
    """Measure the memory that a freeze of half of a network holds above the level before.

    Runs ranks on the CPU and compares the allocator's peak with the formula. A second table has the need on paper: 7 billion weights on
    accelerators, 2 to 1024 ranks.
    """
    with _plain_errors():
        from smartfrz_ds.bench.peak.command import ENGINES
        from smartfrz_ds.bench.peak.command import bench_peak as measure

        text = measure(out, ranks=_counts("--ranks", ranks), engines=engine or ENGINES, params=params, staging=staging)
    typer.echo(text)


@bench.command("scale")
def bench_scale(
    model: Annotated[list[str] | None, typer.Option(help="Only this model: llama-7b, llama-13b, llama-70b, ... Repeatable.")] = None,
    ranks: Annotated[str, typer.Option(help="Comma-separated numbers of ranks.")] = "8,64,256,1024",
    engine: Annotated[list[str] | None, typer.Option(help="Only this engine: zero-1, zero-2, zero-3 or pipeline. Repeatable.")] = None,
    repeats: Annotated[int, typer.Option(help="Number of timed calls of each part; the fastest counts.")] = 5,
    out: Annotated[Path, typer.Option(file_okay=False, help="Results folder; existing results are not measured again.")] = Path(
        "bench-scale"
    ),
) -> None:
    """Measure this package's Python on a large cluster, without the cluster.

    One process plays rank 0 of 8 to 1024, on tensors without storage: seconds and collectives of a snapshot, a freezing stage, a freeze and
    a checkpoint, the bytes that a freeze moves, and how all of it grows with ranks and layers.
    """
    with _plain_errors():
        from smartfrz_ds.bench.scale.command import bench_scale as measure
        from smartfrz_ds.bench.scale.measure import ENGINES
        from smartfrz_ds.bench.scale.shapes import MODELS

        text = measure(out, models=model or MODELS, ranks=_counts("--ranks", ranks), engines=engine or ENGINES, repeats=repeats)
    typer.echo(text)


@bench.command("overhead")
def bench_overhead(
    params: Annotated[str, typer.Option(help="Comma-separated numbers of parameters of the nets that are timed.")] = "700,4800",
    steps: Annotated[int, typer.Option(help="Steps of each timed run.")] = 120,
    few: Annotated[int, typer.Option(help="Number of parameters of the nets on two ranks.")] = 100,
    out: Annotated[Path, typer.Option(file_okay=False, help="Results folder; existing results are not measured again.")] = Path(
        "bench-overhead"
    ),
) -> None:
    """Measure what the plugin costs in a run in which nothing freezes.

    Trains nets of many small parameters on the CPU. Reports the plugin's own seconds in a plain step, at a status line, a snapshot and a
    freezing stage, and counts its calls, reads of tensors and collectives under ZeRO-2, ZeRO-3, FSDP2 and in a pipeline.
    """
    with _plain_errors():
        from smartfrz_ds.bench.overhead.command import bench_overhead as measure

        try:
            wanted = [int(count) for count in params.split(",")]
        except ValueError:
            raise ValueError(f"--params: got {params!r}; allowed: a comma-separated list of numbers of at least 18") from None
        text = measure(out, params=wanted, steps=steps, few=few)
    typer.echo(text)


@bench.command("pipeline")
def bench_pipeline(
    case: Annotated[list[str] | None, typer.Option(help="Only this case: sleep-pp2, sleep-pp4 or gpt-pp2. Repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps per copy.")] = 7,
    nap: Annotated[float, typer.Option(help="Milliseconds that a sleeping layer takes for its forward and for each gradient.")] = 10.0,
    micro_batches: Annotated[int, typer.Option(help="Micro-batches per step.")] = 8,
    blocks: Annotated[int, typer.Option(help="Number of blocks of the GPT, a multiple of 4.")] = 16,
    width: Annotated[int, typer.Option(help="Width of the GPT.")] = 256,
    out: Annotated[Path, typer.Option(file_okay=False, help="Results folder; existing results are not measured again.")] = Path(
        "bench-pipeline"
    ),
) -> None:
    """Measure freezing and rebalancing a pipeline, and compare with the prediction.

    Runs layers that sleep for a known time on 2 and 4 stages, and a GPT on 2, on the CPU. Reports step times, bytes between stages and
    optimizer memory.
    """
    with _plain_errors():
        from smartfrz_ds.bench.pipeline import CASES
        from smartfrz_ds.bench.pipeline import bench_pipeline as measure

        text = measure(case or CASES, out, rounds=rounds, nap=nap / 1000, micro_batches=micro_batches, blocks=blocks, width=width)
    typer.echo(text)


@bench.command("cache")
def bench_cache(
    net: Annotated[list[str] | None, typer.Option(help="Only this network: minilm, mlp; gpt with --trainings. Repeatable.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="Only this engine: one, ddp, z1, z2, z3 or fsdp2. Repeatable.")] = None,
    frozen: Annotated[str, typer.Option(help="Comma-separated fractions of the blocks that are frozen.")] = "1/2,3/4,5/6",
    params: Annotated[float, typer.Option(help="Size of the network mlp in millions of weights.")] = 38.0,
    epochs: Annotated[int, typer.Option(help="Number of epochs.")] = 4,
    trainings: Annotated[bool, typer.Option("--trainings", help="Whole trainings instead, with the matched one.")] = False,
    seeds: Annotated[int, typer.Option(help="Number of seeds with --trainings.")] = 2,
    out: Annotated[Path, typer.Option(file_okay=False, help="Results folder; existing results are not measured again.")] = Path(
        "bench-cache"
    ),
) -> None:
    """Measure the prefix cache: steps with nothing frozen, a frozen prefix, and the cache, on each engine."""
    with _plain_errors("bench"):
        from smartfrz_ds.bench.cache import cells
        from smartfrz_ds.bench.cache.command import bench_cache as measure
        from smartfrz_ds.bench.cache.trainings import TASKS, bench_trainings

        if trainings:
            text = bench_trainings(out, tasks=net or list(TASKS), seeds=seeds)
        else:
            nets, engines = net or list(cells.BLOCKS), engine or list(cells.RANKS)
            text = measure(out, nets=nets, engines=engines, frozen=frozen.split(","), params=params, epochs=epochs)
    typer.echo(text)


def _counts(option: str, text: str) -> list[int]:
    """Read a comma-separated list of numbers."""
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: got {text!r}; allowed: a comma-separated list of numbers of at least 2") from None
