"""Which units are trained: `select`, and how firm and how like each other selections are: `stability`, `agreement`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from workbench.cli.app import Count, Out, Quiet, Seed, app, check_table, show, write_table

Scores = Annotated[Path, Parameter(help="a result of `workbench attribute`")]
Strategy = Annotated[
    str,
    Parameter(
        help="layer_balanced, layer_highest, global_lowest, global_highest, random, global_random, or "
        "interference_aware, which reads --interference, --new, --weights and --advice"
    ),
]


@Parameter(name="*")
@dataclass(frozen=True)
class Choice:
    """What every selection is told, its strategy aside."""

    quota: Annotated[float, Parameter(help="share of the units that is trained, in percent")] = 10.0
    score: Annotated[Literal["signed", "magnitude"], Parameter(help="rank by score or by its absolute value")] = (
        "signed"
    )
    layers: Annotated[
        tuple[int, ...] | None, Parameter(consume_multiple=True, negative="", help="only these layers; others freeze")
    ] = None
    interference: Annotated[Path | None, Parameter(help="how the same facts collide: interference.zarr of a run")] = (
        None
    )
    new: Annotated[Path | None, Parameter(help="a result of `workbench attribute` for the facts to be taught")] = None
    advice: Annotated[
        Path | None, Parameter(help="table of `workbench advise`: every layer's share, in place of --quota")
    ] = None
    weights: Annotated[
        dict[str, float] | None, Parameter(help="of the terms collision, load, new: --weights.load 0 leaves load out")
    ] = None
    seed: Seed = 0

    def options(self, strategy: str) -> dict[str, Any]:
        """Arguments of `select` for a strategy; what only `interference_aware` reads is opened."""
        from workbench.results import open_result

        opened = {name: open_result(path) for name in ("interference", "new") if (path := getattr(self, name))}
        found: dict[str, Any] = {name: getattr(self, name) for name in ("quota", "score", "layers", "seed")}
        if self.advice is not None:
            found["quota"] = _advised(self.advice)
        return found | {"strategy": strategy} | opened | ({"weights": self.weights} if self.weights else {})


def _advised(table: Path) -> dict[int, float]:
    """The share of every layer, in percent, as `advise` wrote it."""
    import pandas as pd

    from workbench.results import load_frame

    if not table.is_file():
        raise FileNotFoundError(f"There is no file {table} (advice).")
    frame = pd.read_csv(table, dtype=str) if table.suffix == ".csv" else load_frame(table)  # text is read to the bit
    if not {"layer", "percent"} <= set(frame):
        raise ValueError(f"{table} has no columns layer and percent: give a table of `workbench advise`.")
    return dict(zip(frame["layer"].astype(int), frame["percent"].astype(float), strict=True))


@app.command(name="select")
def select_command(
    attribution: Scores,
    *,
    out: Annotated[Path, Parameter(help="position file to write: JSON, layer -> rows, as LoKI's")],
    strategy: Strategy = "layer_balanced",
    choice: Choice = Choice(),
) -> None:
    """Choose the units to be trained from an attribution."""
    from workbench.results import open_result
    from workbench.selection import select

    if out.is_dir():
        raise ValueError(f"{out} is a folder: name the position file to write, such as {out / 'rows.json'}.")
    chosen = select(open_result(attribution, kind="attribution"), **choice.options(strategy))
    print(f"{chosen.n_selected} {chosen.unit}s in {chosen.n_layers} layers: {chosen.to_positions(out)}")
    if chosen.unit != "node":
        print(f"A position file does not say of what: give --unit {chosen.unit} where this one is read.")


@app.command(name="stability")
def stability_command(
    attribution: Scores,
    *,
    draws: Count = 20,
    share: Annotated[float, Parameter(help="of the facts that a draw takes")] = 0.5,
    bootstrap: Annotated[
        bool, Parameter(negative="", help="draw as many facts as there are, with replacement")
    ] = False,
    strategy: Strategy = "layer_balanced",
    choice: Choice = Choice(),
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Say how much of a selection is kept when facts are drawn again, all layers and each; --out keeps the table."""
    from workbench.results import open_result
    from workbench.selection import stability

    check_table(out, attribution)
    drawn: dict[str, Any] = {"share": 1.0, "replace": True} if bootstrap else {"share": share}
    scores = open_result(attribution, kind="attribution")
    frame = stability(scores, draws=draws or 20, **drawn, **choice.options(strategy), progress=not quiet)
    show(frame)
    whole = frame.iloc[0]
    print(f"{whole['kept']:.2%} of {whole['n_selected']:.0f} units kept, by chance {whole['chance']:.2%}")
    write_table(frame, out)


@app.command(name="agreement")
def agreement_command(
    attribution: Scores,
    *,
    strategies: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="", help="to compare")] = (
        "layer_balanced",
        "layer_highest",
        "global_lowest",
        "global_highest",
    ),
    positions: Annotated[
        tuple[Path, ...],
        Parameter(consume_multiple=True, negative="", help="position files or selections to compare as well"),
    ] = (),
    choice: Choice = Choice(),
    out: Out = None,
) -> None:
    """Say how much the selections of several strategies share, beside chance; --out keeps the table with each layer."""
    from workbench.results import open_result
    from workbench.selection import READ_INTERFERENCE, agreement, select

    check_table(out)
    scores = open_result(attribution, kind="attribution")
    plain = replace(choice, interference=None, new=None, weights=None, advice=None)
    compared = {
        name: select(scores, **(choice if name in READ_INTERFERENCE else plain).options(name)) for name in strategies
    }
    compared |= {str(path): saved_units(path, scores) for path in positions}
    frame = agreement(compared)
    show(frame[frame["layer"].isna()].drop(columns="layer"))
    write_table(frame, out)


def saved_units(path: Path, scores: Any) -> Any:
    """A saved selection, or a bare position file of the units of an attribution."""
    from workbench.results import load_json
    from workbench.selection import Selection

    if not isinstance(load_json(path), list):
        return Selection.load(path)
    if scores is None:
        raise ValueError(f"{path} lists positions without saying of what: give --attribution as well.")
    return Selection.from_positions(path, unit=str(scores.attrs["unit"]), n_units=scores.sizes["unit"])
