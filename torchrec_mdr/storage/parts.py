"""Parts of large files of object stores: read by their ranges, and kept on the node's disk."""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Callable, Sequence

from torchrec_mdr.storage.cache import cache_bytes, folder_of, hold, let_go, make_room
from torchrec_mdr.storage.files import read_range, reason, size, stamp

MOST = 0.75  # of the cache, so that other files find room beside the parts
_THERE = "there"  # a byte for each part


class RangeFile(io.RawIOBase):
    """A file that reads just the bytes it is asked for.

    Args:
        path (str): the file.
        length (int | None): its bytes, where they are known.
        read (Callable[[int, int], bytes] | None): gives bytes [start, stop); by default from the file.

    Raises:
        ValueError: it cannot be read.

    Example::

        >>> from torchrec_mdr.storage import write_text
        >>> write_text("memory://bucket/text", "a long text")
        >>> file = RangeFile("memory://bucket/text")
        >>> file.seek(2), file.read(4)
        (2, b'long')
    """

    def __init__(self, path: str, length: int | None = None, read: Callable[[int, int], bytes] | None = None) -> None:
        self._read = read or (lambda start, stop: read_range(path, start, stop))
        self._size = size(path) if length is None else length
        self._place = 0

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fills a buffer as far as the file goes."""
        stop = min(self._place + len(buffer), self._size)
        if stop <= self._place:
            return 0
        content = self._read(self._place, stop)
        buffer[: len(content)] = content
        self._place = stop
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See io.IOBase."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(start + offset, 0)
        return self._place

    def tell(self) -> int:
        """See io.IOBase."""
        return self._place

    def readable(self) -> bool:
        """See io.IOBase."""
        return True

    def seekable(self) -> bool:
        """See io.IOBase."""
        return True


class PartialCopy:
    """A copy of a store's file on the node's disk, in which only the parts lie that were asked for.

    All processes of the node share it. It takes no more of the disk than these parts; the rest is a hole.

    Args:
        path (str): the file.
        parts (Sequence[tuple[int, int]]): its bytes [start, stop) in each.
        length (int): all of its bytes.

    Raises:
        ValueError: the file cannot be read.
    """

    def __init__(self, path: str, parts: Sequence[tuple[int, int]], length: int) -> None:
        self.path, self.size = path, length
        self.parts = tuple(parts)
        self._stamp = stamp(path)
        self._folder = folder_of(path, self._stamp, self.parts)
        self._file = os.path.join(self._folder, os.path.basename(path))
        self._there = os.path.join(self._folder, _THERE)
        self._held = False

    def fetch(self, part: int) -> str | None:
        """Makes a part be there.

        Returns:
            str | None: the copy; None where the cache has no room for the part.

        Raises:
            ValueError: the file cannot be read or copied, or is not what it was when this was made.
        """
        try:
            if self.has(part):
                return self._file
            start, stop = self.parts[part]
            if make_room(stop - start, int(MOST * cache_bytes())) < stop - start:
                return None
            content = self.read(part)
            self._prepare()
            for name, place, data in ((self._file, start, content), (self._there, part, b"\1")):
                with open(name, "r+b") as file:
                    file.seek(place)
                    file.write(data)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be copied to {self._file}: {reason(error)}") from error
        return self._file

    def has(self, part: int) -> bool:
        """Whether a part is there."""
        if not os.path.exists(self._there):
            return False
        self._hold()
        try:
            with open(self._there, "rb") as file:
                file.seek(part)
                return file.read(1) == b"\1" and os.path.exists(self._file)
        except FileNotFoundError:
            return False

    def read(self, part: int) -> bytes:
        """A part's bytes, straight from the store.

        Raises:
            ValueError: they cannot be read, or the file is not what it was when this was made.
        """
        content = read_range(self.path, *self.parts[part])
        if stamp(self.path) != self._stamp:
            raise ValueError(f"{self.path} was replaced while it was read; start again")
        return content

    def _hold(self) -> None:
        if not self._held:
            hold(self._folder)
            self._held = True
            weakref.finalize(self, let_go, self._folder).atexit = False

    def _prepare(self) -> None:
        """Makes the copy, of which nothing is there."""
        self._hold()
        os.makedirs(self._folder, exist_ok=True)
        for name, length in ((self._file, self.size), (self._there, len(self.parts))):
            try:
                with open(name, "xb") as file:
                    file.truncate(length)
            except FileExistsError:
                continue  # of another process, or of an earlier part
