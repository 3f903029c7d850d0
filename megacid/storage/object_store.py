"""Access to objects by URL through fsspec: listing, reading and writing, with bounded retries and one-line errors."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megacid.errors import UserError, one_line
from megacid.storage.atomic import file_sha256

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_S = 60.0  # from the first attempt to the start of the last one
SILENCE_S = 20.0  # without a byte from the server, after which an attempt has failed
_THREADS = 16
_LEAST_BYTES_PER_S = 1e6  # of an upload
_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 16.0
# How each store finds credentials, for messages.
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE with ~/.aws/credentials, or the role of the "
    "machine; for a public bucket set FSSPEC_S3='{\"anon\": true}'",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default login, or the service account of the "
    "machine",
    "hf": "HF_TOKEN, or hf auth login",
    "http": 'the variable FSSPEC_HTTP, such as {"headers": {"Authorization": "Bearer ..."}}',
    "https": 'the variable FSSPEC_HTTPS, such as {"headers": {"Authorization": "Bearer ..."}}',
}
_SCHEME = re.compile(rf"({'|'.join(_CREDENTIALS)})://")
_USER_INFO = re.compile(r"^https?://[^/]*@")
_PERMANENT = (
    ValueError, TypeError, LookupError, AttributeError, NotImplementedError,
    NotADirectoryError, IsADirectoryError, FileExistsError,
)  # fmt: skip
_VERSION_FIELDS = (
    "ETag", "etag", "blob_id", "Content-MD5", "md5Hash", "Last-Modified", "LastModified", "last_modified", "mtime",
)  # fmt: skip


# A forked process must not close the clients that it inherited: their event loop watches connections by the epoll
# instance of its parent, which would not hear of an answer any more. So nothing in here is ever released.
_opened: dict[int, Any] = {}


class RemoteError(UserError):
    """An object that cannot be listed, read or written; the message names the URL and the remedy."""


class ObjectDiffers(RemoteError):  # noqa: N818  a finding of --verify
    """An object is missing, or is another one than the index says."""


class _MismatchError(Exception):
    """Other bytes arrived than expected. may_pass: this was the first time that these arrived."""

    def __init__(self, text: str, may_pass: bool) -> None:
        super().__init__(text)
        self.may_pass = may_pass


@dataclass(frozen=True)
class Purpose:
    """What objects are read or written for, in messages.

    Attributes:
        verb: "read" or "written".
        changed: what to do about an object that is another one than expected.
        full: what to do about a full disk.
    """

    verb: str
    changed: str
    full: str


TARS = Purpose(
    "read",
    "put the indexed object back, or run tools/index_shards.py again",
    "free space on the disk of the cache, or lower data.cache_gb",
)


@dataclass(frozen=True)
class RemoteObject:
    """An object of a store.

    Attributes:
        url: its full URL.
        size: in bytes; None: not asked, or the store does not tell.
        version: the store's ETag, or what else changes with the content; None: not asked, or not told.
    """

    url: str
    size: int | None = None
    version: str | None = None


def is_url(text: str) -> bool:
    """Whether `text` is a URL of a store that is read."""
    return bool(_SCHEME.match(text))


def has_magic(url: str) -> bool:
    """Whether a URL is a glob; a ? may begin the query of a URL, and is none."""
    return "*" in url or "[" in url


def list_tars(url: str) -> list[RemoteObject]:
    """The tars that a directory or a glob has, sorted by URL.

    Raises:
        RemoteError: the store cannot be read, or has no such directory.
    """
    filesystem, path = _open_store(url)

    def listing() -> list[dict[str, Any]]:
        filesystem.invalidate_cache()
        return list(filesystem.glob(path, detail=True).values() if has_magic(url) else filesystem.ls(path, detail=True))

    infos = _retrying(url, listing)
    tars = [info for info in infos if _is_tar(info)]
    return sorted((_remote_object(filesystem, info) for info in tars), key=lambda found: found.url)


def stat(url: str, *, again: bool = False) -> RemoteObject:
    """Size and version of an object; again: as they are now, not as a listing told. RemoteError if it cannot be read.

    Hugging Face's client would list the folder for every object, so there `again` has no effect.
    """
    filesystem, path = _open_store(url)

    def info() -> dict[str, Any]:
        if again and not url.startswith("hf://"):
            filesystem.invalidate_cache()
        try:
            return dict(filesystem.info(path))
        except FileNotFoundError as error:  # fsspec's for every error of an HTTP server
            raise (error.__cause__ if isinstance(error.__cause__, Exception) else error) from None

    found = _remote_object(filesystem, _retrying(url, info))
    return RemoteObject(url, found.size, found.version)


def stat_all(objects: list[RemoteObject]) -> list[RemoteObject]:
    """The objects with their sizes and versions; asks for those without a version. RemoteError as `stat`."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda known: known if known.version else stat(known.url), objects))


def download(
    url: str,
    target: Path,
    size: int | None,
    sha256: str | None,
    retry_s: float | None = None,
    purpose: Purpose = TARS,
) -> str:
    """Copy an object to a file, and return the sha256 of what was copied.

    Args:
        size, sha256: expected; None: not known.
        retry_s: attempts begin for so many seconds; None: RETRY_S.
        purpose: for messages.

    Raises:
        RemoteError: the object cannot be read, is another one than expected, or the disk is full.
    """
    filesystem, path = _open_store(url)
    wrong: list[str] = []

    def fetch() -> str:
        filesystem.get_file(path, str(target))
        got, digest = target.stat().st_size, file_sha256(target)
        if size in (None, got) and sha256 in (None, digest):
            return digest
        text = f"{got:,} bytes with sha256 {digest[:16]} arrived, expected {size:,}"
        text += f" with {sha256[:16]}" if sha256 else ""
        wrong.append(digest)
        raise _MismatchError(text, may_pass=wrong.count(digest) == 1)  # what is damaged on its way differs each time

    return _retrying(url, fetch, retry_s, purpose)


def upload(source: Path, url: str, purpose: Purpose) -> None:
    """Copy a file to an object, and check the size that the store then has of it.

    Raises:
        OSError: the file cannot be read.
        RemoteError: the object cannot be written.
    """
    filesystem, path = _open_store(url)
    size = source.stat().st_size
    # The clients' own limit begins when the last byte has been sent.
    limit = {"timeout": SILENCE_S + size / _LEAST_BYTES_PER_S} if filesystem.async_impl else {}

    def put() -> None:
        filesystem.put_file(str(source), path, **limit)
        filesystem.invalidate_cache()
        if (got := filesystem.info(path)["size"]) != size:
            raise OSError(f"the store has {got} bytes of it, expected {size}")

    _retrying(url, put, purpose=purpose)


def read(url: str, limit: int, purpose: Purpose) -> bytes | None:
    """The content of an object; None when there is none. RemoteError if it cannot be read or has more bytes."""
    filesystem, path = _open_store(url)

    def cat() -> bytes:
        filesystem.invalidate_cache()
        size = filesystem.info(path)["size"]  # None: the store does not tell
        if size is not None and size > limit:
            raise ValueError(f"it has {size} bytes, expected at most {limit}")
        data = bytes(filesystem.cat_file(path))
        if size not in (None, len(data)):
            raise OSError(f"{len(data)} bytes arrived, expected {size}")
        return data

    return _unless_missing(lambda: _retrying(url, cat, purpose=purpose))


def list_folder(url: str, purpose: Purpose) -> dict[str, int | None]:
    """Name -> size of the objects in a folder; None for the size of a folder in it. RemoteError on failure."""
    filesystem, path = _open_store(url)

    def listing() -> dict[str, int | None]:
        filesystem.invalidate_cache()
        infos = filesystem.ls(path, detail=True)
        # A store may list an object with the folder's own name.
        own = path.strip("/")
        names = {info["name"].strip("/"): None if info["type"] == "directory" else info["size"] for info in infos}
        return {name.rpartition("/")[2]: size for name, size in names.items() if name != own}

    return _unless_missing(lambda: _retrying(url, listing, purpose=purpose)) or {}


def remove(url: str, purpose: Purpose) -> None:
    """Remove an object, or a folder with all that is in it, if it is there. RemoteError if it cannot be removed."""
    filesystem, path = _open_store(url)
    _unless_missing(lambda: _retrying(url, lambda: filesystem.rm(path, recursive=True), purpose=purpose))


def _unless_missing(call: Callable[[], T]) -> T | None:
    try:
        return call()
    except ObjectDiffers:
        return None


def _open_store(url: str) -> tuple[Any, str]:
    """The file system of a URL or local path, and the path in it. UserError when its package is missing."""
    scheme = _scheme(url)
    if _USER_INFO.match(url):
        shown = _USER_INFO.sub(f"{scheme}://...@", url)
        raise UserError(
            f"{shown} has a user name or password, which would be logged: give them in {_CREDENTIALS[scheme]}"
        )
    try:
        import fsspec.config
        from fsspec.core import url_to_fs

        options: dict[str, Any] = {}
        configured = fsspec.config.conf.get(scheme, {})
        if scheme in ("http", "https", "gs"):
            import aiohttp

            # Without a limit on the whole transfer: a large tar may take longer than aiohttp's five minutes.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
            if scheme == "gs":
                options["requests_timeout"] = configured.get("requests_timeout", timeout)
            else:
                options["client_kwargs"] = {"timeout": timeout, **configured.get("client_kwargs", {})}
        elif scheme == "s3":
            limits = {"connect_timeout": SILENCE_S, "read_timeout": SILENCE_S, "retries": {"total_max_attempts": 1}}
            options["config_kwargs"] = {**limits, **configured.get("config_kwargs", {})}
        elif scheme == "file":
            options["auto_mkdir"] = True
        filesystem, path = url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(
            f"{url} needs a package that is not installed ({one_line(error)}): pip install 'megacid[remote]'"
        ) from None
    except ValueError as error:  # of a protocol that fsspec does not know
        raise UserError(f"{url[:200]} cannot be opened ({one_line(error)}): correct its beginning") from None
    if scheme == "s3":  # `_retrying` alone repeats what has failed; gcsfs has a fixed number of attempts, six
        filesystem.retries = 1
    _opened[id(filesystem)] = filesystem
    return filesystem, path


def _scheme(url: str) -> str:
    return url.partition("://")[0] if "://" in url else "file"


def _retrying(url: str, call: Callable[[], T], retry_s: float | None = None, purpose: Purpose = TARS) -> T:
    """The result of `call`, which is repeated after errors that may pass. RemoteError in the end."""
    began, wait = time.monotonic(), _BACKOFF_S
    limit = RETRY_S if retry_s is None else retry_s
    while True:
        try:
            return call()
        except Exception as error:
            spent = time.monotonic() - began
            if not _may_pass(error) or spent + wait > limit:
                kind = ObjectDiffers if isinstance(error, _MismatchError) or _is_missing(error) else RemoteError
                raise kind(_describe(url, error, spent, purpose)) from None
            log.info("%s: %s; trying again in %.0f s", url, _named(error), wait)
        time.sleep(wait)
        wait = min(2 * wait, _MAX_BACKOFF_S)


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error of any of the clients."""
    status = getattr(error, "status", None)  # aiohttp
    if status is None:
        status = getattr(getattr(error, "response", None), "status_code", None)  # httpx, requests
    if status is None:
        status = getattr(error, "code", None)  # gcsfs
    return status if isinstance(status, int) else None


def _is_refusal(error: BaseException) -> bool:
    """Whether credentials are missing or do not suffice."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return (
        _status(error) in (401, 403)
        or isinstance(error, PermissionError)
        or (isinstance(error, OSError) and str(error).startswith("Forbidden:"))  # gcsfs, without a status
        or any("Credential" in name or "GatedRepo" in name or "TokenRetrieval" in name for name in names)
    )


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, _MismatchError):
        return error.may_pass
    if _is_refusal(error) or _is_full(error) or isinstance(error, FileNotFoundError | ImportError):
        return False
    if (status := _status(error)) is not None:
        return status >= 500 or status in (408, 425, 429)
    return not isinstance(error, _PERMANENT) and getattr(error, "errno", None) != errno.EINVAL


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _is_missing(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError) or _status(error) == 404


def _describe(url: str, error: Exception, spent: float, purpose: Purpose) -> str:
    if isinstance(error, _MismatchError):
        return f"{url} has changed ({error}): {purpose.changed}"
    if _is_full(error):
        return f"{url} cannot be stored ({_named(error)}): {purpose.full}"
    if _is_refusal(error):
        return f"{url} may not be {purpose.verb} ({_named(error)}): {_credentials(url)}"
    if _is_missing(error):
        return f"{url} does not exist in its store ({_named(error)}): correct the name, or put the object back"
    return f"{url} cannot be {purpose.verb}, tried for {spent:.1f} s ({_named(error)}): check the network and its store"


def _credentials(url: str) -> str:
    """For messages: what to do when a URL is refused."""
    where = _CREDENTIALS.get(_scheme(url))
    return f"the store finds credentials in {where}" if where else "correct its permissions"


def _named(error: BaseException) -> str:
    text = one_line(error) if isinstance(error, Exception) else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_tar(info: dict[str, Any]) -> bool:
    name = str(info["name"]).rpartition("/")[2]
    return info.get("type") != "directory" and name.endswith(".tar") and not name.startswith(".")


def _remote_object(filesystem: Any, info: dict[str, Any]) -> RemoteObject:
    size = info.get("size")
    version = next((str(info[name]) for name in _VERSION_FIELDS if info.get(name)), None)
    return RemoteObject(filesystem.unstrip_protocol(info["name"]), size if isinstance(size, int) else None, version)
