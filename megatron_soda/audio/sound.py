"""Where a recording is, and the verdict on one that cannot be used."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sound:
    """Where a recording is: the file `path`; or bytes [offset, offset + size) of it (a member of a tar, a value in an
    Arrow file); or the value in row `row` of a Parquet file's column `column`; and of that, the seconds from `start` to
    `end`. `name` is the recording's own name in there: formats without a header (.g722) are told by its suffix."""

    path: str
    offset: int = -1
    size: int = -1
    row: int = -1
    column: str = ""
    name: str = ""
    start: float = 0.0
    end: float = 0.0  # 0: to the end
    seconds: float = 0.0  # how long the manifest says that all of it is; 0: it does not say

    def __str__(self) -> str:
        return f"{self.path}:{self.name or self.row}" if self.offset >= 0 or self.row >= 0 else self.path


class BadAudio(ValueError):  # noqa: N818  (a verdict on the file, not a failure of the program)
    """This file is no usable audio. The message is the reason, without the path; up to its ':' it is one of a few
    fixed phrases, to count by."""
