"""A reader of tar headers for untrusted files.

The standard library's reader is not used: on the Python versions that we support it loops without end on a negative
size, recurses once per extended header, allocates what a header asks for before it checks the file, and treats a
truncated or zeroed header as the end of the archive. Here every number is checked against the size of the file before
it is used, nothing recurses, and the archive must end with its end mark and nothing behind it.

Supports ustar, old GNU and pax archives, as written by webdataset, img2dataset, GNU tar and Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MAX_MEMBERS = 1_000_000
_MAX_EXTENDED = 1 << 16  # bytes of a long name or of a pax header; a path has at most 4096
_REGULAR = b"0\x007"
_DIRECTORY = b"5"
_LINKS_AND_DEVICES = b"12346"  # no data follow, whatever their size field says
_LONG_NAME, _LONG_LINK, _SPARSE, _PAX, _PAX_GLOBAL = b"L", b"K", b"S", b"x", b"g"
_ZERO = bytes(BLOCK)


class TarDamage(ValueError):  # noqa: N818  a fault of the data
    """The archive cannot be read past a point; the message names the byte and the reason."""


@dataclass(frozen=True)
class Member:
    """One entry of an archive. `offset` and `size`: its data in bytes, inside of the file; `regular`: a plain file."""

    name: str
    offset: int
    size: int
    regular: bool
    directory: bool

    @property
    def stop(self) -> int:
        """The byte after its padding, where the headers of the next member begin."""
        return self.offset + _padded(self.size)


def members(file: BinaryIO, total: int) -> Iterator[Member]:
    """The entries of an archive of `total` bytes, in order. Raises TarDamage at the first inconsistency."""
    at, count = 0, 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        header = _read(file, at, BLOCK, total, "a header")
        if header == _ZERO:
            _check_end(file, at, total)
            return
        if (count := count + 1) > MAX_MEMBERS:
            raise TarDamage(f"more than {MAX_MEMBERS:,} members, at byte {at}")
        _check_sum(header, at)
        kind, size, data = header[156:157], _number(header[124:136], at, "size"), at + BLOCK
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            if size > _MAX_EXTENDED:
                raise TarDamage(f"an extended header of {size} bytes, more than {_MAX_EXTENDED}, at byte {at}")
            payload = _read(file, data, size, total, "an extended header")
            if kind == _LONG_NAME:
                long_name = _text(payload.partition(b"\0")[0])
            elif kind == _PAX:
                pax = _records(payload, at)
            at = data + _padded(size)
            continue
        if kind == _SPARSE:
            extended = header[482]
            while extended:
                extended, data = _read(file, data, BLOCK, total, "a sparse header")[504], data + BLOCK
        if "size" in pax:
            size = _decimal(pax["size"], at)
        name = pax.get("path", long_name)
        if name is None:
            prefix = header[345:500].partition(b"\0")[0]
            name = _text((prefix + b"/" if prefix and kind != _SPARSE else b"") + header[:100].partition(b"\0")[0])
        if kind in _LINKS_AND_DEVICES or kind == _DIRECTORY:
            size = 0
        if data + _padded(size) > total:
            # A file that was cut inside of the padding has lost its end mark as well.
            if data + size > total:
                raise TarDamage(f"{name} has {size} bytes from byte {data} on, but the file ends at byte {total}")
            raise TarDamage(f"the file ends at byte {total}, in the padding behind {name}")
        directory = kind == _DIRECTORY or (kind == b"\0" and name.endswith("/"))
        sparse = kind == _SPARSE or any(key.startswith("GNU.sparse") for key in pax)
        yield Member(name, data, size, kind in _REGULAR and not sparse and not directory, directory)
        long_name, pax = None, {}
        at = data + _padded(size)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _read(file: BinaryIO, at: int, size: int, total: int, what: str) -> bytes:
    if at + size > total:
        if what == "a header" and at >= total:
            raise TarDamage(
                f"no end-of-archive mark where the file ends, at byte {total}" if total else "the file is empty"
            )
        raise TarDamage(f"the file ends at byte {total}, inside {what} that begins at byte {at}")
    file.seek(at)
    data = file.read(size)
    if len(data) != size:
        raise TarDamage(f"only {len(data)} of {size} bytes can be read at byte {at}")
    return data


def _check_end(file: BinaryIO, at: int, total: int) -> None:
    """Raise TarDamage for data behind the end mark: a header overwritten with zeros would hide all later samples."""
    file.seek(at)
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise TarDamage(f"data behind the end-of-archive mark at byte {at} (of {total} bytes)")


def _check_sum(header: bytes, at: int) -> None:
    stored = _number(header[148:156], at, "checksum")
    rest = header[:148] + b" " * 8 + header[156:]
    signed = sum(byte - 256 if byte > 127 else byte for byte in rest) if stored != sum(rest) else stored
    if stored != signed:  # some old writers summed signed bytes
        raise TarDamage(f"no valid header at byte {at}")


def _number(field: bytes, at: int, what: str) -> int:
    """A number in octal digits, or big-endian after a byte 0x80."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):  # int() alone would accept signs, underscores and spaces
        raise TarDamage(f"no valid header at byte {at}: its {what} is {field!r}")
    return int(digits or b"0", 8)


def _decimal(digits: str, at: int) -> int:
    """The number of a pax record."""
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 20):
        raise TarDamage(f"a pax header with size {digits[:24]!r} at byte {at}")
    return int(digits)


def _records(payload: bytes, at: int) -> dict[str, str]:
    """The pax records `LENGTH KEY=VALUE\\n`, where LENGTH is that of the whole record."""
    records: dict[str, str] = {}
    begin = 0
    while begin < len(payload):
        digits, _, _ = payload[begin : begin + 8].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = payload[begin + len(digits) + 1 : begin + length]
        key, equals, value = record.partition(b"=")
        if length <= len(digits) + 1 or begin + length > len(payload) or not equals or value[-1:] != b"\n":
            raise TarDamage(f"a pax header that cannot be read at byte {at}")
        records[_text(key)] = _text(value[:-1])
        begin += length
    return records


def _text(name: bytes) -> str:
    """Decoded UTF-8; invalid bytes become surrogates, which `is_safe` refuses."""
    return name.decode("utf-8", errors="surrogateescape")


def is_safe(name: str) -> bool:
    """Whether a member's name is relative, without "..", printable and UTF-8.

    Nothing is ever extracted, so an unsafe name is harmless, but it indicates a tar that is not a data set.
    """
    control = any(ord(c) < 32 or ord(c) == 127 or 0xDC80 <= ord(c) <= 0xDCFF for c in name)
    return not (control or name.startswith("/") or ".." in name.split("/"))
