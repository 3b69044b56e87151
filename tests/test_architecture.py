"""The house: rooms, their layers, and the one door to every library, read from the imports.

Rooms whose main function is part of the public API under the same name (`interference`, `implant`, `report`, `recall`)
have another name than the function, because a package cannot hold a function and a module of one name.
"""

import ast
import importlib
import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest

import workbench

HOME = Path(workbench.__file__).parent

#: The picture. A room imports only from rooms of strictly lower layers.
LAYERS: dict[str, int] = {
    "announcing": 0,  # LoKI to peft, once both are imported
    "config": 0,  # what a run is told; no torch
    "facts": 0,  # Fact, FactSet: read, check, split, tokenise
    "intervals": 0,  # means with intervals: the bootstrap, shares
    "results": 0,  # labelled results and run folders; the only door to zarr
    "metrics": 1,  # logits to one number per fact
    "models": 1,  # HookedModel, the default model; the only door to transformer-lens and to loading
    "selection": 1,  # which units are trained
    "filtering": 1,  # which facts to teach, by how far the model is from them
    "figures": 1,  # frame in, figure out; the only door to plotly
    "engine": 2,  # many interventions in one pass
    "distances": 2,  # how far an answer is from its target: formulas, some differentiable
    "loki": 2,  # the tuner; the door to peft
    "recollection": 2,  # what a model says: recall, and reading texts
    "suppression": 3,  # units silenced or enhanced: what is still answered
    "tracing": 3,  # causal tracing, logit lens, direct logit attribution
    "path": 3,  # integrals from a baseline to the clean activations
    "opening": 3,  # a model from whatever stands for one, adapters included
    "attribution": 4,  # methods that score units
    "interfere": 4,  # how facts collide, per layer, against nulls
    "semantics": 4,  # semantic distance and drift
    "forgetting": 4,  # before against after; the only door to lm-eval
    "training": 4,  # one training path; the only door to transformers' Trainer
    "neurons": 5,  # knowledge neurons: find, suppress, erase, edit
    "learning": 5,  # what learning one fact does to others, which measure predicts it, layer advice
    "planning": 5,  # what an attribution will take, before it starts
    "reporting": 5,  # the page, published figures; the only door to jinja2
    "finetuning": 6,  # a person's own fine-tune, with a card
    "pipeline": 6,  # the straight way, resumable
    "cli": 7,  # the command
}

#: Library -> the rooms that may import it.
DOORS: dict[str, set[str]] = {
    "transformer_lens": {"models"},
    "zarr": {"results"},
    "h5py": {"results"},
    "plotly": {"figures"},
    "peft": {"loki", "training"},
    "jinja2": {"reporting"},
    "cyclopts": {"cli"},
    "pydantic": {"config"},
    "gguf": {"models"},
    "lm_eval": {"forgetting"},
}
#: Names of transformers that only one room may use.
TRANSFORMERS_DOORS: dict[str, set[str]] = {
    "Trainer": {"training"},
    "TrainingArguments": {"training"},
    "Auto": {"models"},
}


def room_of(path: Path) -> str:
    return path.relative_to(HOME).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [path for path in sorted(HOME.rglob("*.py")) if path != HOME / "__init__.py"]


def imports(source: str, package: str) -> list[tuple[str, str]]:
    """(module, name) of every import, relative ones resolved; names of `import a.b` are empty."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(module, alias.name) for alias in node.names]
    return found


def faults(source: str, room: str, package: str) -> list[str]:
    """Every import that breaks the picture."""
    wrong = []
    for module, name in imports(source, package):
        top, *rest = module.split(".")
        if top == "workbench":
            target = rest[0] if rest else name
            if target in LAYERS and target != room and LAYERS[target] >= LAYERS[room]:
                wrong.append(f"{room} (layer {LAYERS[room]}) imports {target} (layer {LAYERS[target]})")
        if room not in DOORS.get(top, {room}):
            wrong.append(f"{room} imports {top}, whose door is {', '.join(sorted(DOORS[top]))}")
        if top == "transformers":
            for start, rooms in TRANSFORMERS_DOORS.items():
                if name.startswith(start) and room not in rooms:
                    wrong.append(f"{room} imports transformers.{name}, whose door is {', '.join(sorted(rooms))}")
    return wrong


def test_every_room_stands_in_the_picture() -> None:
    rooms = {room_of(path) for path in modules()} | {p.name for p in HOME.iterdir() if (p / "__init__.py").exists()}
    assert rooms == set(LAYERS)
    readme = (HOME.parent / "README.md").read_text(encoding="utf-8")
    assert {room: int(layer) for layer, room in re.findall(r"^\| (\d+) \| `(\w+)` \|", readme, re.MULTILINE)} == LAYERS


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(HOME)))
def test_imports_go_down_and_through_the_doors(path: Path) -> None:
    package = ".".join(["workbench", *path.relative_to(HOME).parent.parts])
    assert faults(path.read_text(encoding="utf-8"), room_of(path), package) == []


def test_the_check_can_fail() -> None:
    assert faults("from workbench.cli import main", "models", "workbench.models")
    assert faults("from workbench import pipeline", "engine", "workbench")
    assert faults("from ..training import implant", "loki", "workbench.loki")
    assert faults("import zarr", "attribution", "workbench")
    assert faults("import plotly.express as px", "reporting", "workbench.reporting")
    assert faults("from transformers import Trainer", "loki", "workbench.loki")
    assert not faults("from workbench.metrics import kl\nimport torch", "engine", "workbench")


def test_every_library_that_is_imported_is_declared_and_pinned() -> None:
    project = tomllib.loads((HOME.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    pinned = (HOME.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    declared, exact = ({re.split("[<>=[]", one)[0].lower().replace("-", "_") for one in many}
                       for many in (listed, pinned))  # fmt: skip
    named = [imports(path.read_text(encoding="utf-8"), "workbench") for path in modules()]
    used = {module.split(".")[0] for found in named for module, _ in found} - sys.stdlib_module_names - {"workbench"}
    assert {"peft", "huggingface_hub"} < used
    assert used - declared - {""} == used - exact - {""} == set()
    assert "peft>=0.21,<1" in listed  # the first peft with KaSA


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(HOME)))
def test_no_room_pickles_and_only_the_command_prints(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"torch.save", "torch.load", "pickle.dump", "pickle.load", "pickle.dumps", "pickle.loads"}
    assert "print" not in calls or room_of(path) == "cli"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 340, "two rooms?"


@pytest.mark.parametrize("name", workbench.__all__)
def test_public_names_are_documented_and_typed(name: str) -> None:
    value = getattr(workbench, name)
    assert callable(value)
    assert not inspect.ismodule(value)
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        missing = [p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty]
        assert not missing
        assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("room", LAYERS)
def test_every_name_that_a_room_offers_is_there(room: str) -> None:
    module = importlib.import_module(f"workbench.{room}")
    assert not [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)]


def test_public_names_stay_functions_after_every_room_is_imported() -> None:
    for room in LAYERS:
        importlib.import_module(f"workbench.{room}")
    for name in ("recall", "attribute", "interference", "implant", "report", "run", "select"):
        assert inspect.isroutine(getattr(workbench, name)), name
    with pytest.raises(AttributeError, match="attribute nothing"):
        workbench.nothing  # noqa: B018
