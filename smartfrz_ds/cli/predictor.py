"""The predictor's commands of `smartfrz`: collect, label, train-predictor, eval-predictor, calibrate."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from smartfrz_ds.predictor.constants import CONVERGED, RULES

_Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
_Quick = Annotated[bool, typer.Option("--quick", help="A few short runs only: to see that it works, not to be used.")]
_Workers = Annotated[int, typer.Option(min=1, help="Processes that collect, one thread each.")]
_Data = Annotated[Path, typer.Option("--data", file_okay=False, help="Folder of a data set, as `smartfrz collect` or a Recorder made it.")]
_Predictor = Annotated[Path | None, typer.Option(dir_okay=False, help="A predictor's .safetensors file; left out: the shipped one.")]
_Rule = Annotated[str, typer.Option(help=f"What is compared: {', '.join(RULES)}.")]
_Similarity = Annotated[float, typer.Option(help="Linear CKA with the end of the run from which a layer counts as converged.")]


def add_commands(app: typer.Typer, plain_errors: Callable[[], AbstractContextManager[None]]) -> None:
    """Adds the commands to `app`. plain_errors: a context in which what the user got wrong is told without a traceback."""

    @app.command()
    def collect(
        out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the data set; what is there is not made again.")],
        seed: _Seed = 0,
        quick: _Quick = False,
        branches: Annotated[bool, typer.Option(help="Counterfactual branches too: freeze a prefix now, train to the end.")] = True,
        workers: _Workers = 1,
        script: Annotated[
            Path | None,
            typer.Option(dir_okay=False, help="Run this Python script instead; its Recorder saves into the folder."),
        ] = None,
    ) -> None:
        """Record training runs for a predictor.

        Trains networks and writes down snapshots of their weights and how their layers' outputs on held-out inputs changed.
        """
        with plain_errors():
            # Here, not above: it needs scikit-learn and others, which the other commands don't.
            from smartfrz_ds.predictor.recording.collect import collect_dataset, collect_script

            if script is not None:
                names = collect_script(script, out)
                typer.echo(f"recorded: {', '.join(names)}")
                return
            data = collect_dataset(out, seed=seed, quick=quick, branches=branches, workers=workers)
        minutes = data.cpu_seconds / 60
        typer.echo(f"{out}: {len(data.recordings)} runs, {len(data.branches)} branches, {minutes:.1f} minutes of one core in all")

    @app.command()
    def label(data: _Data, rule: _Rule = "prefix-settled", similarity: _Similarity = CONVERGED, tie_embeddings: bool = True) -> None:
        """Label recordings: which layer had converged when.

        Writes labels.safetensors and labels.json into the folder, and prints how much the labels hang on their constants.
        """
        with plain_errors():
            from smartfrz_ds.predictor.recording.labels import LabelSettings
            from smartfrz_ds.predictor.training.card import sensitivity_table
            from smartfrz_ds.predictor.training.labelling import label_dataset

            settings = LabelSettings(rule=rule, similarity=similarity, tie_embeddings=tie_embeddings)  # type: ignore[arg-type]  # checked there
            figures = label_dataset(data, settings)
        typer.echo(sensitivity_table(figures["sensitivity"]))
        typer.echo(f"{data}: {figures['runs']} runs labelled, {figures['positive_share']:.1%} of the labels are true")

    @app.command()
    def train_predictor(
        out: Annotated[Path, typer.Option(help="The .safetensors file to write; its card (.md) goes beside it.")],
        seed: _Seed = 0,
        quick: _Quick = False,
        data: Annotated[
            Path | None,
            typer.Option("--data", "--cache", file_okay=False, help="Folder that keeps the data set, so that a cut-off run goes on."),
        ] = None,
        workers: _Workers = 1,
        rule: _Rule = "prefix-settled",
        similarity: _Similarity = CONVERGED,
    ) -> None:
        """Train the attention predictor.

        Collects, labels by similarity to the trained network, trains on it, and writes the weights and their card.
        """
        with plain_errors():
            if out.suffix != ".safetensors":
                raise ValueError(f"--out: got {str(out)!r}; allowed: a path that ends in .safetensors")
            from smartfrz_ds.predictor.recording.labels import LabelSettings
            from smartfrz_ds.predictor.training.train import train_predictor as train

            settings = LabelSettings(rule=rule, similarity=similarity)  # type: ignore[arg-type]  # checked there
            figures = train(out=out, seed=seed, quick=quick, cache=data, workers=workers, settings=settings)
        typer.echo(out.with_suffix(".md").read_text(encoding="utf-8"))
        typer.echo(f"written: {out}, threshold {figures['threshold']:.4f}")

    @app.command()
    def eval_predictor(
        data: _Data,
        predictor: _Predictor = None,
        ablations: Annotated[
            bool, typer.Option("--ablations", help="Fit it anew without its parts, one network kind left out after the other. Minutes.")
        ] = False,
        out: Annotated[Path | None, typer.Option(dir_okay=False, help="A JSON file for all figures.")] = None,
        seed: _Seed = 0,
    ) -> None:
        """Say how good a predictor is on recordings.

        AUC, the same among windows at the same time of their runs, precision, recall, calibration; and against branches.
        """
        with plain_errors():
            from smartfrz_ds.predictor.training.calibrate import evaluate_predictor

            figures: dict[str, Any] = evaluate_predictor(data, predictor)
            if ablations:
                from smartfrz_ds.predictor.model import load_predictor
                from smartfrz_ds.predictor.recording.collect import read_dataset
                from smartfrz_ds.predictor.training.ablate import ablation_table, replay, replay_table
                from smartfrz_ds.predictor.training.ablate import ablations as ablate
                from smartfrz_ds.predictor.training.labelling import labels_of

                found, settings = read_dataset(data), labels_of(data)
                figures["ablations"] = ablate(found, seed, settings)
                figures["replay"] = replay(found, (0.5, load_predictor(predictor).threshold), settings)
                typer.echo(ablation_table(figures["ablations"]) + "\n\n" + replay_table(figures["replay"]) + "\n")
        _show(figures, out)

    @app.command()
    def calibrate(
        data: _Data,
        predictor: _Predictor = None,
        out: Annotated[Path | None, typer.Option(dir_okay=False, help="A .safetensors file for it with the new threshold.")] = None,
        precision: Annotated[float, typer.Option(help="Share of what is called converged that must be so, in (0.5, 1).")] = 0.96,
        plot: Annotated[Path | None, typer.Option(dir_okay=False, help="A .png for the reliability diagram.")] = None,
    ) -> None:
        """Choose the threshold on your own recordings.

        The lowest probability from which on the predictor is right with the share --precision, and the reliability diagram.
        """
        with plain_errors():
            from smartfrz_ds.predictor.training.calibrate import calibrate as fit_threshold

            figures = fit_threshold(data, out=out, predictor=predictor, precision=precision, plot=plot)
        _show(figures, None)
        typer.echo(f"threshold: {figures['threshold']:.4f}" + ("" if out is None else f", written: {out}"))


def _show(figures: dict[str, Any], out: Path | None) -> None:
    text = json.dumps(figures, indent=1)
    typer.echo(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
