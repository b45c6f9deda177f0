"""The predictor's commands of `smartfrz`: collect, label, train-predictor, compare-costs, eval-predictor, calibrate."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from smartfrz_ds.predictor.constants import CONVERGED, RULES

_Seed = Annotated[int, typer.Option(min=0, help="Random seed.")]
_Quick = Annotated[bool, typer.Option("--quick", help="Only a few short runs, to try the command out; the result is not usable.")]
_Workers = Annotated[int, typer.Option(min=1, help="Number of collecting processes, one thread each.")]
_Data = Annotated[Path, typer.Option("--data", file_okay=False, help="Folder of a data set written by `smartfrz collect` or a Recorder.")]
_Predictor = Annotated[Path | None, typer.Option(dir_okay=False, help="A predictor's .safetensors file (default: the shipped one).")]
_Rule = Annotated[str, typer.Option(help=f"Labelling rule: {', '.join(RULES)}.")]
_Similarity = Annotated[float, typer.Option(help="Linear CKA with the end of the run at which a layer counts as converged.")]


def add_commands(app: typer.Typer, plain_errors: Callable[[], AbstractContextManager[None]]) -> None:
    """Add the predictor's commands to `app`.

    Args:
        app: The application.
        plain_errors: Context manager that prints errors of the user without a traceback.
    """

    @app.command()
    def collect(
        out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the data set; existing recordings are kept.")],
        seed: _Seed = 0,
        quick: _Quick = False,
        branches: Annotated[bool, typer.Option(help="Also record counterfactual branches: freeze a prefix, train to the end.")] = True,
        workers: _Workers = 1,
        script: Annotated[
            Path | None,
            typer.Option(dir_okay=False, help="Run this Python script instead, whose Recorder saves into the folder."),
        ] = None,
    ) -> None:
        """Record training runs for a predictor.

        Trains networks and records snapshots of their weights and the changes of their layers' outputs on held-out inputs.
        """
        with plain_errors():
            # Here, not above: this command needs scikit-learn and others.
            from smartfrz_ds.predictor.recording.collect import collect_dataset, collect_script

            if script is not None:
                names = collect_script(script, out)
                typer.echo(f"recorded: {', '.join(names)}")
                return
            data = collect_dataset(out, seed=seed, quick=quick, branches=branches, workers=workers)
        minutes = data.cpu_seconds / 60
        typer.echo(f"{out}: {len(data.recordings)} runs, {len(data.branches)} branches, {minutes:.1f} minutes of one core in total")

    @app.command()
    def label(data: _Data, rule: _Rule = "prefix-settled", similarity: _Similarity = CONVERGED, tie_embeddings: bool = True) -> None:
        """Label recordings: at which step each layer had converged.

        Writes labels.safetensors and labels.json into the folder, and prints how sensitive the labels are to their constants.
        """
        with plain_errors():
            from smartfrz_ds.predictor.recording.labels import LabelSettings
            from smartfrz_ds.predictor.training.card import sensitivity_table
            from smartfrz_ds.predictor.training.labelling import label_dataset

            settings = LabelSettings(rule=rule, similarity=similarity, tie_embeddings=tie_embeddings)  # type: ignore[arg-type]  # checked there
            figures = label_dataset(data, settings)
        typer.echo(sensitivity_table(figures["sensitivity"]))
        typer.echo(f"{data}: {figures['runs']} runs labelled, {figures['positive_share']:.1%} of the labels are positive")

    @app.command()
    def train_predictor(
        out: Annotated[Path, typer.Option(help="The .safetensors file to write. Its model card (.md) is written next to it.")],
        seed: _Seed = 0,
        quick: _Quick = False,
        data: Annotated[
            Path | None,
            typer.Option(
                "--data", "--cache", file_okay=False, help="Folder that keeps the data set, so that an interrupted run can continue."
            ),
        ] = None,
        workers: _Workers = 1,
        rule: _Rule = "prefix-settled",
        similarity: _Similarity = CONVERGED,
    ) -> None:
        """Train the attention predictor.

        Records runs, labels them by similarity to the trained network, trains the predictor, and writes its weights and model card.
        """
        with plain_errors():
            if out.suffix != ".safetensors":
                raise ValueError(f"--out: got {str(out)!r}; allowed: a path with the suffix .safetensors")
            from smartfrz_ds.predictor.recording.labels import LabelSettings
            from smartfrz_ds.predictor.training.train import train_predictor as train

            settings = LabelSettings(rule=rule, similarity=similarity)  # type: ignore[arg-type]  # checked there
            figures = train(out=out, seed=seed, quick=quick, cache=data, workers=workers, settings=settings)
        typer.echo(out.with_suffix(".md").read_text(encoding="utf-8"))
        typer.echo(f"written: {out}, threshold {figures['threshold']:.4f}")

    @app.command()
    def compare_costs(
        out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the results, one small file per run; existing ones are kept.")],
        runs: Annotated[int, typer.Option(min=2, max=96, help="Number of runs, nine branches and three matched runs each.")] = 48,
        seed: _Seed = 0,
    ) -> None:
        """Compare what freezing a prefix costs with the same saving by fewer steps.

        Trains small networks, branches and shorter runs, about 20 seconds of one core each, and prints how well predictor and loss curve
        tell the costs.
        """
        with plain_errors():
            from smartfrz_ds.predictor.recording.costs import collect_costs, cost_runs
            from smartfrz_ds.predictor.training.cost_eval import cost_rows, cost_table

            held = [collect_costs(run, out) for run in cost_runs(seed)[:runs]]
        typer.echo(cost_table(cost_rows(held)))
        typer.echo(f"{len(held)} runs, {sum(x['cpu_seconds'] for x in held) / 60:.1f} minutes of one core in total")

    @app.command()
    def eval_predictor(
        data: _Data,
        predictor: _Predictor = None,
        ablations: Annotated[
            bool,
            typer.Option("--ablations", help="Refit without each of its parts, leaving out one network kind at a time. Takes minutes."),
        ] = False,
        out: Annotated[Path | None, typer.Option(dir_okay=False, help="JSON file for all results.")] = None,
        seed: _Seed = 0,
    ) -> None:
        """Evaluate a predictor on recordings.

        Prints AUC, AUC among windows at the same time of their runs, precision, recall and calibration, and a comparison with the branches.
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
        out: Annotated[Path | None, typer.Option(dir_okay=False, help="The .safetensors file to write, with the new threshold.")] = None,
        precision: Annotated[float, typer.Option(help="Required precision of 'converged', in (0.5, 1).")] = 0.96,
        plot: Annotated[Path | None, typer.Option(dir_okay=False, help="PNG file for the reliability diagram.")] = None,
    ) -> None:
        """Fit the threshold to your own recordings.

        Finds the lowest threshold at which the predictor reaches --precision, and draws the reliability diagram.
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
