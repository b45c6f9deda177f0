"""The `smartfrz` command: parses, calls, prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from .predictor import add_commands

app = typer.Typer(
    name="smartfrz",
    help="Freeze converged layers while a DeepSpeed run goes on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@contextmanager
def _plain_errors(extra: str = "predictor") -> Iterator[None]:
    """What the user got wrong is told without a traceback, with exit code 2. extra: what brings a package that may be missing."""
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
        typer.echo(f"smartfrz {version('smartfrz_ds')} (deepspeed {version('deepspeed')}, torch {version('torch')})")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and those of DeepSpeed and torch.")
    ] = False,
) -> None:
    pass


add_commands(app, _plain_errors)


@app.command()
def check_config(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A DeepSpeed JSON.")],
    total_steps: Annotated[
        int | None, typer.Option(min=1, help="Length of the run in steps, where FILE does not say it (a Trainer, a scheduler of yours).")
    ] = None,
) -> None:
    """Check a DeepSpeed JSON, print the settings.

    Checks the "smartfrz" section and prints the settings that a run would use, shares of the run also as steps where its length is known,
    and the first freezing stage. Name patterns are checked only with the model, when the engine is made.
    """
    with _plain_errors():
        from .check_config import settings_text  # here, as it needs torch

        text = settings_text(file, total_steps)
    typer.echo(text)


@app.command()
def plan(
    profile: Annotated[Path | None, typer.Option(dir_okay=False, help="JSON file with measured layer costs (docs/planning.md).")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks of a GPT whose costs are estimated, instead of --profile.")] = None,
    hidden: Annotated[int, typer.Option(min=1, help="Its hidden size.")] = 4096,
    vocabulary: Annotated[int, typer.Option(min=1, help="Its vocabulary.")] = 32000,
    sequence: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 4096,
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences of a micro-batch.")] = 1,
    tflops: Annotated[float, typer.Option(help="TFLOP/s that a device reaches.")] = 150.0,
    recompute: Annotated[bool, typer.Option("--recompute", help="Activation checkpointing in every block.")] = False,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages; 1: no pipeline.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Data-parallel replicas.")] = 1,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a step (gradient accumulation).")] = 1,
    zero: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage; in a pipeline 0 or 1.")] = 1,
    bandwidth: Annotated[float, typer.Option(help="GB/s that a rank sends.")] = 25.0,
    latency: Annotated[float, typer.Option(min=0, help="Microseconds of the smallest message.")] = 50.0,
    overlap: Annotated[bool, typer.Option("--overlap", help="Without a pipeline: communication hides behind computing.")] = False,
    element_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a weight and of its gradient: 2 (bf16) or 4 (fp32).")] = 2,
    memory_limit: Annotated[float | None, typer.Option(min=0, help="GB of a rank, which every cut respects.")] = None,
    parts: Annotated[str | None, typer.Option(help="Bounds of the stages at first, e.g. 0,9,18 (default: the best).")] = None,
    order: Annotated[str, typer.Option(help="Order of instructions: 1f1b (DeepSpeed's) or gpipe.")] = "1f1b",
    frozen: Annotated[str | None, typer.Option(help="Fractions of the layers to compare, e.g. 0.25,0.5.")] = None,
    schedule: Annotated[str | None, typer.Option(help="A run's phases, SHARE:FRACTION, e.g. 0.4:0,0.6:0.5.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the run.")] = 100_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: seconds, bytes, hours.")] = False,
) -> None:
    """Predict what freezing saves on a cluster.

    Step time with front layers frozen, with and without re-balancing the pipeline; bytes; hours of a run. Nothing is run.
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
        )
    typer.echo(json.dumps(made.as_dict(), indent=2) if as_json else command.render(made, of_run=schedule is not None))


@app.command()
def reshape(
    checkpoint: Annotated[Path, typer.Argument(file_okay=False, help="Folder as load_checkpoint takes it.")],
    pp: Annotated[int, typer.Option(help="Pipeline stages of the new run.")],
    dp: Annotated[int, typer.Option(help="Data-parallel replicas of the new run.")],
    output: Annotated[Path | None, typer.Option(file_okay=False, help="New folder (default: CHECKPOINT-ppP-dpD).")] = None,
    tag: Annotated[str | None, typer.Option(help="Which checkpoint of the folder (default: the one that `latest` names).")] = None,
    bounds: Annotated[str | None, typer.Option(help="Bounds of the stages, e.g. 0,9,18 (default: even, frozen layers a third).")] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Unpickle objects of yours (client_state): runs code that the files name.")
    ] = False,
) -> None:
    """Give a pipeline's checkpoint fewer stages and more replicas.

    Or any others: writes a checkpoint of a freezing PipelineEngine anew, so that a run of P stages and D replicas goes on from it.
    The checkpoint itself is only read.
    """
    with _plain_errors():
        from smartfrz_ds.checkpoint.reshape import reshape as write

        try:
            cut = None if bounds is None else [int(bound) for bound in bounds.split(",")]
        except ValueError:
            raise ValueError(f"--bounds: got {bounds!r}; allowed: rising integers, by commas") from None
        made = write(checkpoint, pp, dp, output=output, tag=tag, bounds=cut, trust=trust, progress=True)
    typer.echo(made.text())


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder with the run's log (smartfrz.log_path), or the log itself.")],
    output: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the page and its charts (default: RUN_DIR/report).")
    ] = None,
) -> None:
    """Make a page of what a run's log says.

    One HTML file that needs nothing else, and its charts as PNGs: frozen layers, probabilities, loss, times, bytes, savings, events.
    """
    with _plain_errors("report"):
        from smartfrz_ds.telemetry.report import write_report

        page = write_report(run_dir, output)
    typer.echo(str(page))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.json]", help="A DeepSpeed JSON to look at too.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="MODULE:CALLABLE that returns a model, or a Hugging Face model's name or folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: findings, and the model's layers.")] = False,
) -> None:
    """Look for what would stop a run.

    Versions, compiler, stale build locks, MPI, host name, ports, shared memory; the settings; which layers of a model can freeze, and why
    not. Every problem with what to do. Exit code 1 if there is one, 0 with none but warnings.
    """
    with _plain_errors("demo"):
        from .doctor import examine, render

        examined = examine(config, model)
    typer.echo(json.dumps(examined.to_json(), indent=2) if as_json else render(examined))
    raise typer.Exit(examined.exit_code)


bench = typer.Typer(no_args_is_help=True, help="Measure what freezing saves, on real engines on this machine.", rich_markup_mode=None)
app.add_typer(bench, name="bench")


@bench.command("zero")
def bench_zero(
    stages: Annotated[str, typer.Option(help="ZeRO stages, by commas.")] = "0,1,2,3",
    engine: Annotated[list[str] | None, typer.Option(help="Only this engine (z2-bf16, ...); may be given again.")] = None,
    params: Annotated[float, typer.Option(help="Size of the net, in millions of weights.")] = 38.0,
    rounds: Annotated[int, typer.Option(help="Rounds; figures are medians over them.")] = 5,
    steps: Annotated[int, typer.Option(help="Timed steps a round of each copy.")] = 3,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the results; what is there is not measured again.")] = Path(
        "bench-zero"
    ),
) -> None:
    """Freeze half of a net on each ZeRO engine.

    Two ranks on CPU. Step time, bytes, memory and the pause, beside the ideal and beside requires_grad_(False).
    """
    with _plain_errors():
        from smartfrz_ds.bench.zero import bench_zero as measure
        from smartfrz_ds.bench.zero import engines_of

        try:
            wanted = [int(stage) for stage in stages.split(",")]
        except ValueError:
            raise ValueError(f"--stages: got {stages!r}; allowed: some of 0, 1, 2, 3, by commas") from None
        text = measure(engine or engines_of(wanted), out, params=params, rounds=rounds, steps=steps)
    typer.echo(text)


@bench.command("pipeline")
def bench_pipeline(
    case: Annotated[list[str] | None, typer.Option(help="Only this case: sleep-pp2, sleep-pp4 or gpt-pp2; may be given again.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of each copy.")] = 7,
    nap: Annotated[float, typer.Option(help="Milliseconds that a sleeping layer takes for its forward, and for each gradient.")] = 10.0,
    micro_batches: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 8,
    blocks: Annotated[int, typer.Option(help="Blocks of the GPT, a multiple of 4.")] = 16,
    width: Annotated[int, typer.Option(help="Its width.")] = 256,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the results; what is there is not measured again.")] = Path(
        "bench-pipeline"
    ),
) -> None:
    """Freeze the front of a pipeline, move layers, and compare with what was predicted.

    Layers that sleep for a known time on 2 and 4 stages, and a GPT on 2, on CPU. Step times, bytes between stages, optimizer memory.
    """
    with _plain_errors():
        from smartfrz_ds.bench.pipeline import CASES
        from smartfrz_ds.bench.pipeline import bench_pipeline as measure

        text = measure(case or CASES, out, rounds=rounds, nap=nap / 1000, micro_batches=micro_batches, blocks=blocks, width=width)
    typer.echo(text)


@bench.command("policies")
def bench_policies(
    task: Annotated[
        list[str] | None, typer.Option(help="Only this task: a shipped one's name, or a task file of yours; may be given again.")
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Only this policy of the policies' file; may be given again.")] = None,
    policies_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="YAML file with policies and their settings (default: the shipped one)."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="At most so many seeds.")] = None,
    workers: Annotated[int | None, typer.Option(help="Runs at a time, one thread each (default: one for each core).")] = None,
    tables: Annotated[bool, typer.Option("--tables", help="Run nothing: make the tables of what is there.")] = False,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the results; what is there is not run again.")] = Path(
        "bench-policies"
    ),
) -> None:
    """Compare policies at equal saved FLOPs.

    The same tasks, seeds and engine for every policy and for training without freezing. Tables, CSV and a plot.
    """
    with _plain_errors("bench"):
        # Here, not above: it needs packages that the other commands don't.
        from smartfrz_ds.bench.policies.command import bench_policies as measure
        from smartfrz_ds.bench.policies.files import POLICIES_FILE

        text = measure(
            out,
            tasks=task or (),
            policies=policy or (),
            policies_file=policies_file or POLICIES_FILE,
            seeds=seeds,
            workers=workers,
            run=not tables,
        )
    typer.echo(text)
