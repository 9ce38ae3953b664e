"""A source into raw records: local files by this package's own readers, everything else through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator

from amopo_fast.data.sources.candidate import RawRecord
from amopo_fast.data.sources.files import file_records
from amopo_fast.data.sources.hub import hub_records
from amopo_fast.data.sources.spec import Source
from amopo_fast.errors import DataError


def raw_records(source: Source) -> Iterator[RawRecord | DataError]:
    """Raises DataError for what spoils the whole source; yields one in the place of a bad line."""
    return file_records(source.path) if source.is_file else hub_records(source)
