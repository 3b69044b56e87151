"""The labelled results that flow between the rooms, and the only door to zarr."""

from workbench.results.files import (
    check_scores_fit,
    digest_of,
    finite,
    free_bytes,
    load_frame,
    load_json,
    save_frame,
    save_json,
    write_atomically,
)
from workbench.results.hdf5 import export_hdf5, import_hdf5
from workbench.results.labelled import open_result, save_parts, save_result
from workbench.results.parts import Parts
from workbench.results.run import RunDir, provenance
from workbench.results.schema import (
    check_asked,
    check_finite,
    check_made_with,
    validate_attribution,
    validate_harm,
    validate_interference,
    validate_trace,
)
from workbench.results.store import AttributionStore, open_store, unwritten

__all__ = [
    "AttributionStore",
    "Parts",
    "RunDir",
    "check_asked",
    "check_finite",
    "check_made_with",
    "check_scores_fit",
    "digest_of",
    "export_hdf5",
    "finite",
    "free_bytes",
    "import_hdf5",
    "load_frame",
    "load_json",
    "open_result",
    "open_store",
    "provenance",
    "save_frame",
    "save_json",
    "save_parts",
    "save_result",
    "unwritten",
    "validate_attribution",
    "validate_harm",
    "validate_interference",
    "validate_trace",
    "write_atomically",
]
