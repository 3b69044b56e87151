"""What every command shares: the app, the types of its options, and how tables are shown and kept."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import App, CoercionError, Parameter, convert
from cyclopts.validators import Number


def whole(type_: Any, tokens: Any) -> Any:
    """What cyclopts makes of an option, but whole numbers are not rounded: it reads 1.5 as 2 without a word."""
    if _of_whole_numbers(type_) and not isinstance(tokens, dict):
        for token in tokens:
            if "." in token.value:
                raise CoercionError(token=token, target_type=int)
    return convert(type_, tokens)


def _of_whole_numbers(type_: Any) -> bool:
    """Whether a type is int, or a tuple or an option of it."""
    parts = get_args(type_)
    return type_ is int or (float not in parts and any(_of_whole_numbers(part) for part in parts))


app = App(
    name="workbench",
    help="Where does a language model keep what it knows, and how do you teach it something new "
    "without breaking the rest?",
    help_format="plaintext",
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `main` says what is kept
    default_parameter=Parameter(converter=whole),
)

Model = Annotated[str, Parameter(help="default's name, folder of safetensors or of an adapter, .gguf file or hub id")]
Facts = Annotated[str, Parameter(help="world, fictional, fictional:N:SEED, or a file or folder of facts")]
Out = Annotated[Path | None, Parameter(help="where to write the result")]
Chat = Annotated[bool, Parameter(name="--chat", negative="", help="ask through the chat template, as LoKI does")]
Seed = Annotated[int, Parameter(help="seed of everything that is drawn", validator=Number(gte=0))]
Count = Annotated[int | None, Parameter(validator=Number(gte=1))]
Draws = Annotated[int, Parameter(validator=Number(gte=1))]
KnownOnly = Annotated[bool, Parameter(help="only the facts that the model answers")]
Quiet = Annotated[bool, Parameter(name=["--quiet", "-q"], negative="", help="no progress bars")]
Sample = Annotated[
    int | None,
    Parameter(
        name=["--sample", "--limit"], help="at most so many facts, drawn by --seed", validator=Number(gte=1)
    ),
]  # fmt: skip
FORMATS = ("auto", "native", "csv", "lre", "pararel", "counterfact", "counterfact-new", "mmlu", "mmlu-loki")


@Parameter(name="*")
@dataclass(frozen=True)
class Asked:
    """How facts are read and asked, which of them, and where the model runs: options of every command about facts."""

    format: Annotated[Literal[FORMATS], Parameter(help="how the file of facts is written")] = "auto"  # type: ignore[valid-type]
    chat: Chat = False
    known_only: KnownOnly = False
    sample: Sample = None
    seed: Seed = 0
    device: Annotated[str, Parameter(help="auto, cpu, cuda or mps")] = "auto"
    dtype: Annotated[str, Parameter(help="auto, float32, bfloat16, float16 or float64")] = "auto"
    tokenizer: Annotated[
        str | None, Parameter(help="a folder or name whose tokenizer is taken, for a model without its own")
    ] = None
    quiet: Quiet = False

    def how(self) -> dict[str, Any]:
        """What `open_model` is told."""
        from workbench.models import tokenizer_of

        tokenizer = None if self.tokenizer is None else tokenizer_of(self.tokenizer)
        return {"device": self.device, "dtype": self.dtype, "tokenizer": tokenizer}


def show(frame: Any) -> None:
    """Print a whole table."""
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4g}"))


def check_table(out: Path | None, *inputs: str | Path | None) -> None:
    """Raise before long work if a table could not be written, or only over something that is read."""
    check_out(out, None, *inputs)


def check_out(out: Path | None, kind: str | None, *inputs: str | Path | None) -> None:
    """Raise before long work if a table, or a result of this kind in a .zarr folder, could not be written.

    That is: another ending, a place where nothing can be written, or one of the inputs, which would be lost.
    """
    if out is None:
        return
    if kind is not None and out.suffix == ".zarr":
        from workbench.results.labelled import check_replaceable

        check_replaceable(out, kind=kind)
    elif out.suffix not in (".csv", ".parquet"):
        endings = ".csv or .parquet" if kind is None else ".zarr, .csv or .parquet"
        raise ValueError(f"--out must end in {endings}, not {out.name!r}.")
    check_place(out, *inputs)


def check_place(out: Path, *inputs: str | Path | None) -> None:
    """Raise where nothing can be written, or only over one of the inputs; a folder above is made."""
    if out.is_dir() and out.suffix != ".zarr":
        raise ValueError(f"{out} is a folder; give the name of a file as --out.")
    if any(given is not None and Path(given).exists() and out.resolve() == Path(given).resolve() for given in inputs):
        raise ValueError(f"{out} is what is read here, and would be lost; give another --out.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"{out} cannot be written: {out.parent} is a file, or lies under one; give another --out."
        ) from None
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"{out} cannot be written: {out.parent} is not yours to write to; give another --out.")


def write_table(frame: Any, out: Path | None) -> None:
    """Write a table where the user asked for it."""
    if out is None:
        return
    from workbench.results import save_frame, write_atomically

    if out.suffix == ".csv":
        write_atomically(out, lambda partial: frame.to_csv(partial, index=False))
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


def model_and_facts(model: str, facts: str, asked: Asked) -> tuple[Any, Any]:
    """The model, and the facts to ask it: through its chat template, those it knows, so many drawn by seed, if wished.

    Facts are read before the model is opened, so that what is wrong with them shows at once.
    """
    from workbench.facts import load_facts

    chosen = load_facts(facts, format=asked.format)
    from workbench.opening import open_model

    opened = open_model(model, **asked.how())
    return opened, narrowed(opened, chosen, asked)


def two_models_and_facts(before: str, after: str, facts: str, asked: Asked) -> tuple[Any, Any, Any]:
    """Two models, and the facts to ask both: which are known, and the chat template, are those of the first.

    A folder without a tokenizer, as a Trainer's checkpoint is, is read by that of the other.
    """
    from workbench.facts import load_facts
    from workbench.models import lacks_tokenizer
    from workbench.opening import check_comparable, open_model

    chosen, how = load_facts(facts, format=asked.format), asked.how()
    turned = how["tokenizer"] is None and lacks_tokenizer(before)
    one = open_model(after if turned else before, **how)
    other = open_model(before if turned else after, beside=one, **how)
    first, second = (other, one) if turned else (one, other)
    check_comparable(first, second)
    return first, second, narrowed(first, chosen, asked)


def narrowed(model: Any, facts: Any, asked: Asked) -> Any:
    """The facts as they are to be asked: as chats, those that the model answers, a sample of them."""
    facts = facts.as_chat(model.tokenizer) if asked.chat else facts
    facts = known_among(model, facts, asked.quiet) if asked.known_only else facts
    return facts.at_most(asked.sample, asked.seed)
