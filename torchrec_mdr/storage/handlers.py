"""How object stores are reached: a handler of iopath's for each scheme, on fsspec."""

from __future__ import annotations

import errno
import io
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from iopath.common.file_io import PathHandler

ENTRY_POINTS = "torchrec_mdr.storage"
# what to install for a scheme of our own
EXTRAS = {"s3": "pip install 'torchrec-mdr[s3]'", "s3a": "pip install 'torchrec-mdr[s3]'"}
# a request is tried so often, half a minute in all where the store refuses; a try ends after so many seconds
TRIES, CONNECT_SECONDS, READ_SECONDS = 6, 5, 30
# a read that breaks off is begun again, within so many seconds
REREAD_SECONDS = 30.0
PIECE = 1 << 23  # bytes that are read at once into a large buffer
_S3: dict[str, Any] = {
    "use_listings_cache": False,  # others write to it, too
    "config_kwargs": {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "retries": {"total_max_attempts": TRIES, "mode": "standard"},
    },
}
_OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3}

logger = logging.getLogger(__name__)


class FsspecHandler(PathHandler):
    """Paths of one scheme, through the fsspec file system of that name.

    Credentials, endpoint and region come from where that file system looks for them: the environment, its own files,
    or the machine's role.

    Args:
        scheme (str): for instance s3, gs or memory.

    Raises:
        ImportError: the package that knows the scheme is not installed.
        ValueError: no package knows it.
    """

    def __init__(self, scheme: str) -> None:
        super().__init__()
        from fsspec import get_filesystem_class  # needed for object stores alone

        self.scheme = scheme
        self._class = get_filesystem_class(scheme)

    @cached_property
    def fs(self) -> Any:
        """The file system; nothing is asked of the store before it is used."""
        made = self._class(**_OPTIONS.get(self.scheme, {}))
        if self.scheme in _OPTIONS:
            made.retries = 1  # botocore tries again, and _reread does: s3fs would do so around each of these
        return made

    def stamp(self, path: str) -> str:
        """What changes whenever a file is written anew."""
        with _os_errors():
            return _stamp(self.fs.info(path))

    def create(self, path: str, content: bytes) -> bool:
        """Writes a file where there is none; gives whether it did."""
        with _os_errors():
            try:
                self.fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if _code(error) == "ConditionalRequestConflict":  # two at the same moment
                    return False
                if error.errno != errno.ENOSYS:
                    raise
                self.fs.pipe_file(path, content)  # a store that knows no conditions
        return True

    def replace(self, path: str, content: bytes, before: str) -> bool:
        """Writes over a file that has this stamp; gives whether it did. S3 looks and writes in one."""
        with _os_errors():
            found = self.fs.info(path)
            if _stamp(found) != before:
                return False
            condition = {"IfMatch": found["ETag"]} if self.scheme in _OPTIONS and found.get("ETag") else {}
            try:
                self.fs.pipe_file(path, content, **condition)
            except OSError as error:
                if _code(error) in ("PreconditionFailed", "ConditionalRequestConflict"):
                    return bool(self.fs.cat_file(path) == content)  # by a try before whose answer was lost
                if error.errno != errno.ENOSYS:
                    raise
                self.fs.pipe_file(path, content)  # a store that knows no conditions
        return True

    def size(self, path: str) -> int:
        """Bytes of a file."""
        with _os_errors():
            return int(self.fs.info(path)["size"])

    def read(self, path: str) -> bytes:
        """A file's content, in one request."""
        return _reread(lambda: bytes(self.fs.cat_file(path)))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, in one request."""
        return _reread(lambda: bytes(self.fs.cat_file(path, start=start, end=stop)))

    def find(self, path: str) -> list[str]:
        """All files below a folder, by their names in it."""
        with _os_errors():
            found = self.fs.find(path)
        folder = self.fs._strip_protocol(path).rstrip("/") + "/"
        return sorted(name.removeprefix(folder) for name in found if name.startswith(folder) and name != folder)

    def _get_supported_prefixes(self) -> list[str]:
        return [f"{self.scheme}://"]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        with _os_errors():
            file = StoreFile(self.fs.open(path, mode.replace("t", "").replace("b", "") + "b"))
        return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._type(path) is not None

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return self._type(path) == "file"

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        return self._type(path) == "directory"

    def _type(self, path: str) -> str | None:
        try:
            with _os_errors():
                return str(self.fs.info(path)["type"])
        except FileNotFoundError:
            return None

    def _ls(self, path: str, **kwargs: Any) -> list[str]:
        with _os_errors():
            found = self.fs.ls(path, detail=False)
        folder = self.fs._strip_protocol(path).rstrip("/")
        names = (name.rstrip("/").rpartition("/")[2] for name in found if name.rstrip("/") != folder)
        return sorted({name for name in names if name})

    def _mkdirs(self, path: str, **kwargs: Any) -> None:
        """An object store has no folders: they are there with the first file in them."""

    def _rm(self, path: str, **kwargs: Any) -> None:
        with _os_errors():
            self.fs.rm_file(path)


class StoreFails(ValueError):
    """What lies in a store cannot be read since the store does not answer, or refuses; not since it is not there."""


class StoreFile(io.IOBase):
    """A file of a store, whose errors are all OSErrors; one whose writing fails does not come into being."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """Up to so many bytes; all where it is negative."""
        return _reread(lambda: self._file.read(size))

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer as far as the file goes, piece by piece."""
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view):
            content = self.read(min(len(view) - done, PIECE))
            if not content:
                break
            view[done : done + len(content)] = content
            done += len(content)
        return done

    def write(self, content: Any) -> int:
        """Adds bytes at the end."""
        with _os_errors():
            return int(self._file.write(content))

    def seek(self, offset: int, whence: int = 0) -> int:
        """See io.IOBase."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """See io.IOBase."""
        return int(self._file.tell())

    def readable(self) -> bool:
        """See io.IOBase."""
        return bool(self._file.readable())

    def writable(self) -> bool:
        """See io.IOBase."""
        return bool(self._file.writable())

    def seekable(self) -> bool:
        """See io.IOBase."""
        return bool(self._file.seekable())

    def discard(self) -> None:
        """Closes it without the file coming into being; a file under that name stays as it was."""
        if not self._file.closed:
            try:
                self._file.discard()
            except Exception as error:  # what is left of an upload costs room, not truth
                logger.warning("an upload could not be taken back: %s", error)
            with suppress(AttributeError):  # a file in memory has no upload to end
                self._file.closed = True
        super().close()

    def close(self) -> None:
        """Ends writing: from now on the file is there."""
        if not self.closed:
            try:
                with _os_errors():
                    self._file.close()
            finally:
                super().close()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None and self.writable():
            self.discard()
        else:
            self.close()

    def __del__(self) -> None:
        if not self.closed and self.writable():
            self.discard()


def handler_of(scheme: str) -> PathHandler:
    """The handler of a scheme: one that an installed package names as an entry point, or fsspec's.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    for entry in entry_points(group=ENTRY_POINTS, name=scheme):
        try:
            return entry.load()()
        except Exception as error:
            raise ValueError(
                f"{scheme}:// cannot be used: its handler {entry.value} fails ({type(error).__name__}: {error}); mend "
                "or uninstall the package that brings it"
            ) from error
    try:
        return FsspecHandler(scheme)
    except ImportError as error:
        mend = EXTRAS.get(scheme) or str(error).strip().splitlines()[0]
        raise ValueError(f"{scheme}:// cannot be used: the package that knows it is missing; {mend}") from error
    except ValueError as error:
        raise ValueError(
            f"{scheme}:// is no kind of path that is known; use s3://, gs://, a local path, or register a handler "
            f"(entry point '{ENTRY_POINTS}')"
        ) from error


def _reread(read: Callable[[], bytes]) -> bytes:
    """What read() gives; where it breaks off it is begun again, within a bound."""
    began, wait = time.monotonic(), 0.1
    while True:
        try:
            with _os_errors():
                return read()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            replaced = error.errno == errno.EBUSY  # since the file was opened
            if replaced or time.monotonic() - began > REREAD_SECONDS:
                raise
            logger.info("reading again: %s", error)
            time.sleep(wait)
            wait = min(2 * wait, 5.0)


@contextmanager
def _os_errors() -> Iterator[None]:
    """Libraries of stores raise errors of many kinds; iopath's callers expect OSErrors."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(2, "there is no such file, folder or bucket") from error
    except PermissionError as error:
        raise PermissionError(13, f"access denied ({_text(error)}); check the credentials") from error
    except OSError as error:
        raise OSError(error.errno or 5, f"the store fails ({_text(error)})") from error
    except MemoryError:
        raise
    except Exception as error:
        if "redentials" in str(error):
            raise PermissionError(13, f"access denied ({_text(error)}); check the credentials") from error
        raise OSError(5, f"the store fails ({_text(error)})") from error


def _stamp(found: dict[str, Any]) -> str:
    return repr([str(found.get(name)) for name in ("ETag", "etag", "mtime", "LastModified", "created", "size")])


def _code(error: OSError) -> str | None:
    """What S3 calls an error."""
    answer = getattr(error.__cause__, "response", {})
    return str(answer.get("Error", {}).get("Code"))


def _text(error: BaseException) -> str:
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__
