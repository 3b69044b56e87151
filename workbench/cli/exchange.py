"""Results to and from other people's formats: `convert`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from workbench.cli.app import app

HDF5 = (".h5", ".hdf5")


@app.command(name="convert")
def convert_command(
    source: Annotated[Path, Parameter(help="LoKI's attribution file (.h5), or a result of `workbench attribute`")],
    target: Annotated[Path, Parameter(help="result folder to write, or file that ends in .h5")],
    *,
    facts: Annotated[str | None, Parameter(help="facts that were asked, in order: they name the samples")] = None,
    unit: Literal["node", "neuron"] = "node",
    dtype: Annotated[Literal["float32", "float16"], Parameter(help="of the .h5 file; LoKI writes float16")] = "float32",
) -> None:
    """Turn LoKI's HDF5 attribution files into results of this workbench, and back (needs the extra `hdf5`)."""
    from workbench.results import export_hdf5, import_hdf5, open_result

    if (source.suffix in HDF5) == (target.suffix in HDF5):
        raise ValueError(f"One of {source} and {target} must end in .h5, and only one: it is LoKI's file.")
    if target.suffix in HDF5:
        print(export_hdf5(open_result(source), target, dtype=dtype))
        return
    asked: dict[str, Any] = {}
    if facts is not None:
        from workbench.facts import load_facts

        chosen = load_facts(facts)
        asked = {"ids": chosen.ids, "relations": [fact.relation for fact in chosen], "fact_digest": chosen.digest}
    ds = import_hdf5(source, target, unit=unit, **asked)
    sizes = f"{ds.sizes['fact']} facts, {ds.sizes['layer']} layers, {ds.sizes['unit']} {ds.attrs['unit']}s a layer"
    print(f"{sizes}: {target}")
