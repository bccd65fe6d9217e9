"""A store of one's own: paths `drive://...` lie below the folder $DRIVE_ROOT."""

from __future__ import annotations

import os
from typing import Any

from iopath.common.file_io import PathHandler


class DriveHandler(PathHandler):
    """What torchrec_mdr asks of a store; a real one calls its client here, and raises OSErrors."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["drive://"]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        if "w" in mode:  # folders come into being with the first file in them
            os.makedirs(os.path.dirname(self._place(path)), exist_ok=True)
        return open(self._place(path), mode)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return os.path.exists(self._place(path))

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return os.path.isfile(self._place(path))

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        return os.path.isdir(self._place(path)) and bool(os.listdir(self._place(path)))

    def _ls(self, path: str, **kwargs: Any) -> list[str]:
        return os.listdir(self._place(path))

    def _rm(self, path: str, **kwargs: Any) -> None:
        os.remove(self._place(path))

    def stamp(self, path: str) -> str:
        """What changes when a file is written anew; without it each process copies files for itself."""
        found = os.stat(self._place(path))
        return f"{found.st_mtime_ns} {found.st_size}"

    def _place(self, path: str) -> str:
        return os.path.join(os.environ["DRIVE_ROOT"], path.removeprefix("drive://"))
