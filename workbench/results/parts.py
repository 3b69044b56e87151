"""Parts of a long work that are kept as they are made, so that a second start does only what is missing."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workbench.results.files import digest_of, load_json, save_json

SETTINGS = "settings.json"


class Parts:
    """Lists of records by name, each a JSON file in a folder that belongs to one work with its settings.

    Without a folder nothing is kept. Settings other than those that the folder was begun with are a `ValueError`.

    >>> Parts(None, {}).rows("a", lambda: [{"n": 1}])
    [{'n': 1}]
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        begun = self.folder / SETTINGS
        if not begun.is_file():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise ValueError(f"{self.folder} holds something else: give another place for unfinished parts.")
            save_json(dict(settings), begun)
            return
        if differing := _differing(load_json(begun), settings):
            raise ValueError(
                f"{self.folder} holds the parts of a work with other settings (it differs in {', '.join(differing)}): "
                "delete it, or give another place."
            )

    def rows(self, name: str, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The records of this name: read where they are kept, made and kept where not; numbers must be finite."""
        if self.folder is None:
            return make()
        path = self.folder / f"{digest_of(name)[:32]}.json"
        if not path.is_file():
            save_json({"name": name, "rows": make()}, path)
        return load_json(path)["rows"]


def _differing(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    names = sorted({*stored, *given})
    return [name for name in names if digest_of(stored.get(name)) != digest_of(given.get(name))]
