"""Folders and Hub names into raw records, through `datasets`. Data only: it runs no code of the repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from amopo_fast import hub
from amopo_fast.data.sources.candidate import RawRecord
from amopo_fast.data.sources.json_list import RECORD_BYTES, too_large
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError


def hub_records(source: Source) -> Iterator[RawRecord]:
    """Records of a data set that `datasets` reads, one at a time, numbered from 0. Split "train" unless named.

    Raises:
        DataError: the data set, its split or its files cannot be read.
    """
    import datasets

    hub.prefer_cache_if_unreachable(source.path)
    split = source.split or "train"
    by_record = source.data_dir == "preference" and bool(source.split)  # its files know one split; records name theirs
    try:
        if (Path(source.path) / "dataset_dict.json").exists() or (Path(source.path) / "state.json").exists():
            rows = datasets.load_from_disk(source.path)
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[split]
        else:
            rows = datasets.load_dataset(
                source.path,
                source.subset or None,
                data_dir=source.data_dir or None,
                split="train" if by_record else split,
                streaming="[" not in split,  # a slice, train[:500], needs the whole split at hand
            )
        for record, value in enumerate(rows):
            if sum(len(part) for part in value.values() if isinstance(part, str)) > RECORD_BYTES:
                raise too_large(str(source), record)
            yield RawRecord(record, None, value)
    except DataError:
        raise
    except Exception as error:  # datasets raises the errors of a dozen readers and of its transport
        raise DataError(
            "unreadable data set",
            " ".join(f"{type(error).__name__}: {error}".split())[:300],
            hub.remedy(source.path)
            or "check the name, split and subset, and that the data set holds plain files (json, csv, parquet); a file "
            "that you have can be named by its path",
            source=str(source),
        ) from None
