"""The command `smartfrz bench policies`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer


def add_command(bench: typer.Typer, plain_errors: Callable[[str], AbstractContextManager[None]]) -> None:
    """Add the command to `smartfrz bench`. plain_errors(extra): prints errors of the user without a traceback."""

    @bench.command("policies")
    def bench_policies(
        task: Annotated[
            list[str] | None, typer.Option(help="Only this task: the name of a shipped one, or a task file of your own. Repeatable.")
        ] = None,
        policy: Annotated[list[str] | None, typer.Option(help="Only this entry of the policies file. Repeatable.")] = None,
        policies_file: Annotated[
            Path | None,
            typer.Option(exists=True, dir_okay=False, help="YAML file with policies and their settings (default: the shipped one)."),
        ] = None,
        seeds: Annotated[int | None, typer.Option(help="Maximum number of seeds.")] = None,
        workers: Annotated[int | None, typer.Option(help="Number of parallel runs, one thread each (default: one per core).")] = None,
        matched: Annotated[
            bool, typer.Option(help="Compare each freezing run with full training that is shortened to the same FLOPs.")
        ] = True,
        matched_time: Annotated[
            bool,
            typer.Option("--matched-time", help="Also with full training that is shortened to the same wall time, measured on --engine."),
        ] = False,
        engine: Annotated[str, typer.Option(help="ZeRO stage and number of ranks for --matched-time.")] = "zero2x2",
        plan: Annotated[bool, typer.Option("--plan", help="Run nothing; print the runs that are left, and their time.")] = False,
        tables: Annotated[bool, typer.Option("--tables", help="Run nothing; make tables of the existing results.")] = False,
        out: Annotated[Path, typer.Option(file_okay=False, help="Results folder; existing results are not run again.")] = Path(
            "bench-policies"
        ),
    ) -> None:
        """Compare policies at equal saved FLOPs, and each with full training that was shortened to the same cost.

        Runs the same tasks, seeds and engine for every policy and for training without freezing. Writes tables, a CSV file and a plot.
        """
        with plain_errors("bench"):
            # Here, not above: this command needs packages that the others do not.
            from smartfrz_ds.bench.policies.command import bench_policies as measure
            from smartfrz_ds.bench.policies.files import POLICIES_FILE
            from smartfrz_ds.bench.policies.side_by_side import Engine

            text = measure(
                out,
                tasks=task or (),
                policies=policy or (),
                policies_file=policies_file or POLICIES_FILE,
                seeds=seeds,
                workers=workers,
                matched=matched,
                matched_time=Engine.parse(engine) if matched_time else None,
                run=not tables,
                plan=plan,
            )
        typer.echo(text)
