"""A reader of tar headers for untrusted files.

The standard library's reader is not used: on the Python versions that we support it loops without end on a negative
size, recurses once per extended header, allocates what a header asks for before it checks the file, and treats a
truncated or zeroed header as the end of the archive. Here every number is checked against the size of the file before
it is used, nothing recurses, and the archive must end with its end mark and nothing behind it.

Supports ustar, old GNU and pax archives, as written by webdataset, img2dataset, GNU tar and Python.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from megacid.data.tar_bytes import TarBytes

BLOCK = 512
MAX_MEMBERS = 1_000_000
_MAX_EXTENDED = 1 << 16  # bytes of a long name or of a pax header; a path has at most 4096
# Type flags of members. A bytes object contains the numbers of its characters.
_REGULAR = b"0\x007"
_DIRECTORY = ord("5")
_NO_DATA = b"123456"  # links, devices and directories: their size field is ignored
_LONG_NAME, _SPARSE, _PAX = ord("L"), ord("S"), ord("x")
_EXTENDED = b"LKxg"  # headers that describe the member after them
_ZERO = bytes(BLOCK)
_ADLER = 65521
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\udc80-\udcff]")  # control characters, and bytes that are not UTF-8


class TarDamage(ValueError):  # noqa: N818  a fault of the data
    """The archive cannot be read past a point; the message names the byte and the reason."""


class Member(NamedTuple):
    """One entry of an archive.

    Attributes:
        offset, size: its data in bytes, inside of the file.
        stop: the byte after its padding, where the headers of the next member begin.
        regular: whether it is a plain file.
    """

    name: str
    offset: int
    size: int
    stop: int
    regular: bool
    directory: bool


def members(tar: TarBytes) -> Iterator[Member]:
    """The entries of an archive, in order. Raises TarDamage at the first inconsistency, and OSError."""
    at, count, total = 0, 0, tar.size
    long_name: bytes | None = None
    pax: dict[bytes, bytes] = {}
    checked: tuple[bytes, int] = b"", 0  # the last extended header and its size: writers repeat it for every member
    while True:
        header = _read(tar, at, BLOCK, "a header")
        if header == _ZERO:
            _check_end(tar, at)
            return
        if (count := count + 1) > MAX_MEMBERS:
            raise TarDamage(f"more than {MAX_MEMBERS:,} members, at byte {at}")
        kind, data = header[156], at + BLOCK
        if header == checked[0]:
            size = checked[1]
        else:
            _check_sum(header, at)
            size = _number(header[124:136], at, "size")
        if kind in _EXTENDED:
            checked = header, size
            if size > _MAX_EXTENDED:
                raise TarDamage(f"an extended header of {size} bytes, more than {_MAX_EXTENDED}, at byte {at}")
            payload = _read(tar, data, size, "an extended header")
            if kind == _LONG_NAME:
                long_name = payload.partition(b"\0")[0]
            elif kind == _PAX:
                # webdataset's writer gives every member a pax header with nothing but its time, which is not used.
                only_time = payload.startswith(b"%d mtime=" % size) and payload.endswith(b"\n")
                pax = {} if only_time else _records(payload, at)
            at = _next_block(data + size)
            continue
        if kind == _SPARSE:
            extended = header[482]
            while extended:
                extended, data = _read(tar, data, BLOCK, "a sparse header")[504], data + BLOCK
        path, sparse = long_name, kind == _SPARSE
        if pax:
            path = pax.get(b"path", long_name)
            sparse = sparse or any(key.startswith(b"GNU.sparse") for key in pax)
            if b"size" in pax:
                size = _decimal(pax[b"size"], at)
        if path is None:
            path = header[:100].partition(b"\0")[0]
            if header[345] and kind != _SPARSE:
                path = header[345:500].partition(b"\0")[0] + b"/" + path
        name = path.decode("utf-8", errors="surrogateescape")  # `is_safe` refuses surrogates
        if kind in _NO_DATA:
            size = 0
        at = _next_block(data + size)
        if at > total:
            # A file that was cut inside of the padding has lost its end mark as well.
            if data + size > total:
                raise TarDamage(f"{name} has {size} bytes from byte {data} on, but the file ends at byte {total}")
            raise TarDamage(f"the file ends at byte {total}, in the padding behind {name}")
        directory = kind == _DIRECTORY or (kind == 0 and name.endswith("/"))
        yield Member(name, data, size, at, kind in _REGULAR and not sparse and not directory, directory)
        long_name, pax = None, {}


def _next_block(at: int) -> int:
    """The first byte of a block from byte `at` on. Data begin and end in whole blocks."""
    return (at + BLOCK - 1) // BLOCK * BLOCK


def _read(tar: TarBytes, at: int, size: int, what: str) -> bytes:
    data = tar.read(at, size)
    if len(data) == size:
        return data
    total = tar.size
    if at + size <= total:
        raise TarDamage(f"only {len(data)} of {size} bytes can be read at byte {at}")
    if what == "a header" and at >= total:
        raise TarDamage(
            f"no end-of-archive mark where the file ends, at byte {total}" if total else "the file is empty"
        )
    raise TarDamage(f"the file ends at byte {total}, inside {what} that begins at byte {at}")


def _check_end(tar: TarBytes, at: int) -> None:
    """Raise TarDamage for data behind the end mark: a header overwritten with zeros would hide all later samples."""
    begin = at
    while block := tar.read(begin, 1 << 20):
        if block.strip(b"\0"):
            raise TarDamage(f"data behind the end-of-archive mark at byte {at} (of {tar.size} bytes)")
        begin += len(block)


def _check_sum(header: bytes, at: int) -> None:
    field = header[148:156]
    stored = _number(field, at, "checksum")
    # The sum of all bytes, where those of the field itself count as spaces. The lower half of Adler-32 is 1 plus the
    # sum, modulo 65,521; it takes a tenth of the time of sum().
    if (stored + sum(field) - 8 * ord(" ") + 1) % _ADLER == zlib.adler32(header) & 0xFFFF:
        return
    rest = header[:148] + b" " * 8 + header[156:]
    if stored != sum(byte - 256 if byte > 127 else byte for byte in rest):  # some old writers summed signed bytes
        raise TarDamage(f"no valid header at byte {at}")


def _number(field: bytes, at: int, what: str) -> int:
    """A number in octal digits, or big-endian after a byte 0x80."""
    digits = field.rstrip(b"\0 ")
    if not digits.isdigit():
        if field[:1] == b"\x80":
            return int.from_bytes(field[1:], "big")
        digits = field.partition(b"\0")[0].strip() or b"0"
    try:
        if digits.isdigit():  # int() alone would accept signs, underscores and spaces
            return int(digits, 8)
    except ValueError:
        pass  # an 8 or a 9
    raise TarDamage(f"no valid header at byte {at}: its {what} is {field!r}")


def _decimal(digits: bytes, at: int) -> int:
    """The number of a pax record."""
    if not (digits.isdigit() and len(digits) <= 20):
        text = digits[:24].decode(errors="replace")
        raise TarDamage(f"a pax header with size {text!r} at byte {at}")
    return int(digits)


def _records(payload: bytes, at: int) -> dict[bytes, bytes]:
    """The pax records `LENGTH KEY=VALUE\\n`, where LENGTH is that of the whole record."""
    records: dict[bytes, bytes] = {}
    begin, end = 0, len(payload)
    while begin < end:
        equals = payload.find(b"=", begin)
        digits, _, key = payload[begin:equals].partition(b" ")
        stop = begin + int(digits) if digits.isdigit() and len(digits) <= 8 else 0
        if not begin < equals < stop <= end or payload[stop - 1] != ord("\n"):
            raise TarDamage(f"a pax header that cannot be read at byte {at}")
        records[key] = payload[equals + 1 : stop - 1]
        begin = stop
    return records


def is_safe(name: str) -> bool:
    """Whether a member's name is relative, without "..", printable and UTF-8.

    Nothing is ever extracted, so an unsafe name is harmless, but it indicates a tar that is not a data set.
    """
    if not name.isprintable() and _UNSAFE.search(name):
        return False
    return name[:1] != "/" and (".." not in name or ".." not in name.split("/"))
