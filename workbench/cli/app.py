"""What every command shares: the app, the types of its options, and how tables are shown and kept."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.validators import Number

app = App(
    name="workbench",
    help="Where does a language model keep what it knows, and how do you teach it something new "
    "without breaking the rest?",
    help_format="plaintext",
    result_action="return_value",
)

Model = Annotated[str, Parameter(help="default's name, folder of safetensors, .gguf file or hub id")]
Facts = Annotated[str, Parameter(help="world, fictional, fictional:N:SEED, or a file or folder of facts")]
Out = Annotated[Path | None, Parameter(help="where to write the result")]
Chat = Annotated[bool, Parameter(name="--chat", negative="", help="ask through the chat template, as LoKI does")]
Seed = Annotated[int, Parameter(help="seed of everything that is drawn", validator=Number(gte=0))]
Count = Annotated[int | None, Parameter(validator=Number(gte=1))]
Draws = Annotated[int, Parameter(validator=Number(gte=1))]
KnownOnly = Annotated[bool, Parameter(help="only the facts that the model answers")]
Quiet = Annotated[bool, Parameter(name=["--quiet", "-q"], negative="", help="no progress bars")]
FORMATS = ("auto", "native", "csv", "lre", "pararel", "counterfact", "counterfact-new", "mmlu", "mmlu-loki")


def show(frame: Any) -> None:
    """Print a whole table."""
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4g}"))


def check_table(out: Path | None) -> None:
    """Raise before long work if a table could not be written."""
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--out must end in .csv or .parquet, not {out.name!r}.")


def write_table(frame: Any, out: Path | None) -> None:
    """Write a table where the user asked for it."""
    if out is None:
        return
    from workbench.results import save_frame

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".csv":
        frame.to_csv(out, index=False)
    else:
        save_frame(frame, out)
    print(out)


@contextmanager
def unfinished(out: Path | None) -> Iterator[Path | None]:
    """A folder beside a result for its parts while it is made: kept after an error or a stop, gone after success."""
    parts = None if out is None else out.with_name(f"{out.name}.parts")
    yield parts
    if parts is not None:
        shutil.rmtree(parts, ignore_errors=True)


def known_among(model: Any, facts: Any, quiet: bool) -> Any:
    """The facts that the model answers; none is a `ValueError`."""
    from workbench.recollection import recall

    frame = recall(model, facts, progress=not quiet)
    known = [str(i) for i in frame.index[frame["known"]]]
    if not known:
        raise ValueError(f"The model knows none of the {len(facts)} facts of {facts.name}; leave --known-only out.")
    return facts.filter(ids=known)


def model_and_facts(
    model: str,
    facts: str,
    *,
    format: str = "auto",
    chat: bool = False,
    known_only: bool = False,
    sample: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    quiet: bool = False,
) -> tuple[Any, Any]:
    """The model, and the facts to ask it: through its chat template, those it knows, so many drawn by seed, if wished.

    Facts are read before the model is opened, so that what is wrong with them shows at once.
    """
    from workbench.facts import load_facts

    chosen = load_facts(facts, format=format)
    from workbench.models import load_model

    opened = load_model(model, device=device, dtype=dtype)
    chosen = chosen.as_chat(opened.tokenizer) if chat else chosen
    chosen = known_among(opened, chosen, quiet) if known_only else chosen
    return opened, chosen.at_most(sample, seed)
