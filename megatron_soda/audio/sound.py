"""The location of a recording, and the error for one that cannot be used."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sound:
    """The location of a recording: the file `path`; or its bytes [offset, offset + size) (a tar member, a value in an
    Arrow file); or row `row` of a Parquet file's column `column`. Of that, the seconds from `start` to `end`. `name` is
    the recording's own name there: its suffix identifies formats without a header (.g722)."""

    path: str
    offset: int = -1
    size: int = -1
    row: int = -1
    column: str = ""
    name: str = ""
    start: float = 0.0
    end: float = 0.0  # 0: to the end
    seconds: float = 0.0  # the whole recording's length according to the manifest; 0: not given

    def __str__(self) -> str:
        return f"{self.path}:{self.name or self.row}" if self.offset >= 0 or self.row >= 0 else self.path


class BadAudio(ValueError):  # noqa: N818  (a verdict on the file, not a failure of the program)
    """This file is not usable audio. The message is the reason, without the path; its part before ':' is one of a few
    fixed phrases, to count by."""
