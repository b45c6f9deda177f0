"""The `smartfrz` command: parses, calls, prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from smartfrz_ds.config import FreezeConfig

app = typer.Typer(
    name="smartfrz",
    help="Freeze converged layers while a DeepSpeed run goes on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What the user got wrong is told without a traceback, with exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("smartfrz_ds"):
            raise
        typer.echo(f"error: {error.name} is missing: pip install 'smartfrz_ds[predictor]'", err=True)
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


@app.command()
def train_predictor(
    out: Annotated[Path, typer.Option(help="The .safetensors file to write; its card (.md) goes beside it.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few short runs only: to see that it works, not to be used.")] = False,
    cache: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder that keeps the recorded training runs for the next time.")
    ] = None,
) -> None:
    """Train the attention predictor.

    Records runs of small networks, labels them by similarity to the trained network, trains on them, and writes the weights and their card.
    """
    with _plain_errors():
        if out.suffix != ".safetensors":
            raise ValueError(f"--out: got {str(out)!r}; allowed: a path that ends in .safetensors")
        # Here, not above: it needs scikit-learn and mlxtend, which the other commands don't.
        from smartfrz_ds.predictor.train import train_predictor as train

        figures = train(out=out, seed=seed, quick=quick, cache=cache)
    typer.echo(json.dumps(figures, indent=2, default=str))
    typer.echo(f"written: {out}")


@app.command()
def check_config(file: Annotated[Path, typer.Argument(metavar="FILE", help="A DeepSpeed JSON.")]) -> None:
    """Check a DeepSpeed JSON, print the settings.

    Checks the "smartfrz" section and prints the settings that a run would use.
    Name patterns are checked only with the model, when the engine is made.
    """
    with _plain_errors():
        config = FreezeConfig.load(file)
    settings = config.model_dump(mode="json")
    defaults = FreezeConfig().model_dump(mode="json")
    lines = [(key, value, defaults[key]) for key, value in settings.items() if not isinstance(value, dict)]
    lines += [(f"{config.policy}.{key}", value, defaults[config.policy][key]) for key, value in settings[config.policy].items()]
    width = max(len(key) for key, _, _ in lines)
    for key, value, default in lines:
        shown = json.dumps(value, ensure_ascii=False)
        typer.echo(f"smartfrz.{key:<{width}}  {shown}" + ("  (default)" if value == default else ""))
    typer.echo(f"{file}: ok" + ("" if config.enabled else ", freezing is switched off"))


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
