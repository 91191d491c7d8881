"""A file that says which data there is: name -> rows, root, weight; TOML, or JSON of the same shape."""

import json
from pathlib import Path
from typing import Any

from perception.errors import ConfigError
from perception.settings import read_settings
from perception.training.files import MAX_RUN_FILE, read_toml
from perception_lm.training.sources import SourceConfig


def read_datasets(path: str | Path) -> dict[str, SourceConfig]:
    """The sources of a datasets file, by name; paths in it start where the file is.

        [sa1b]
        rows = "sa1b/rows.jsonl"       # or a folder of *.jsonl
        root = "sa1b/images"

    The reference's key `annotation` is read as `rows`, and `root_dir` as `root`. Raises ConfigError for a file that is
    none.
    """
    path = Path(path)
    data = _read_json(path) if path.suffix == ".json" else read_toml(path)
    found = {}
    for name, value in data.items():
        if isinstance(value, dict):
            value = {{"annotation": "rows", "root_dir": "root"}.get(key, key): item for key, item in value.items()}
        config = read_settings(SourceConfig, value, f"{path}, {name}")
        found[name] = _beside(config, path.parent)
    return found


def _beside(config: SourceConfig, folder: Path) -> SourceConfig:
    from dataclasses import replace

    rows, root = ((None if p is None else str(folder / p)) for p in (config.rows, config.root))
    return replace(config, rows=rows, root=root)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > MAX_RUN_FILE:
            raise ConfigError(f"{path} is no file of datasets, or too large for one")
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}; expected name -> source")
    return data
