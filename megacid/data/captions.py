"""Where the captions of shards are, and which of them are blank."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote

from megacid.errors import UserError

BLANK, NOT_A_TEXT, NO_FIELD, BAD_JSON = (
    "blank caption", "caption that is not a text", "json without the caption", "json that cannot be read"
)  # fmt: skip
COUNT_COLUMN = "captions"  # of the metadata of embeddings: number of captions of a sample, where it may have several
MAX_CAPTIONS = 100  # of a sample
TOO_MANY = f"more than {MAX_CAPTIONS} captions"
# How Python, pandas, JSON, JavaScript and spreadsheets print a missing value.
_MISSING_VALUES = ("nan", "none", "null", "<na>", "n/a", "undefined")
_MAX_TEXT_BYTES = 1 << 16  # a caption has a few hundred
_MAX_JSON_BYTES = 1 << 20
_MAX_SPEC_BYTES = 60  # it is part of the name of a directory
_ALL = ".*"  # at the end of a field: all elements of the list
_ENDING = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


class CaptionError(ValueError):
    """A caption that cannot be read; the message is the reason."""


@dataclass(frozen=True)
class CaptionSource:
    """Where captions are.

    Attributes:
        spec: the ending of a text member, such as `txt`, or `json:FIELD`. FIELD may be a path through blocks and lists,
            such as `meta.texts.0`; with `.*` at its end it is a list, all of whose texts are captions.
    """

    spec: str = "txt"

    @classmethod
    def parse(cls, text: str) -> CaptionSource:
        """The source that a setting or option names. Raises UserError."""
        kind, colon, field = text.partition(":")
        spec = f"json:{field}" if kind.lower() == "json" and colon else text.removeprefix(".").lower()
        named = field not in ("", _ALL) and field.isprintable() if spec.startswith("json:") else _ENDING.fullmatch(spec)
        if not named or spec in ("json", "cls") or len(spec.encode(errors="replace")) > _MAX_SPEC_BYTES:
            raise UserError(
                f"caption is {text[:80]!r}, expected txt, json:FIELD, or the ending of the members with the captions, "
                f"of at most {_MAX_SPEC_BYTES} bytes: write for example json:caption"
            )
        return cls(spec)

    @cached_property
    def field(self) -> str | None:
        """The field of the .json member; None for a text member."""
        return self.spec.removeprefix("json:").removesuffix(_ALL) if self.spec.startswith("json:") else None

    @property
    def several(self) -> bool:
        """Whether a sample may have several captions."""
        return self.spec.startswith("json:") and self.spec.endswith(_ALL)

    @property
    def ending(self) -> str:
        """The ending of the member that holds the caption."""
        return "json" if self.field else self.spec

    @cached_property
    def max_bytes(self) -> int:
        """Largest size of that member."""
        return _MAX_JSON_BYTES if self.field else _MAX_TEXT_BYTES

    @property
    def index_folder(self) -> str:
        """Name of the index directory: one for each source, so that several can be used on the same shards."""
        return "index" if self.spec == "txt" else f"index-{quote(self.spec, safe='')}"

    @property
    def setting(self) -> dict[str, str]:
        """For the settings of a stage; none for .txt, which earlier versions did not record."""
        return {} if self == CaptionSource() else {"caption": self.spec}

    @property
    def option(self) -> str:
        """For messages: the option of tools/index_shards.py that selects it, with a space; "" for the default."""
        return "" if self == CaptionSource() else f"--caption {shlex.quote(self.spec)} "

    def extract(self, data: bytes) -> list[bytes]:
        """The encoded captions of a member: one, which may be blank, or those of a list that are not blank.

        Raises CaptionError with the reason, also for a list without a caption.
        """
        if self.field is None:
            return [data]
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise CaptionError(BAD_JSON) from None
        value = _find(value, self.field)
        if not self.several:
            return [_encoded(value)]
        if not isinstance(value, list):
            raise CaptionError(NOT_A_TEXT)
        texts = [text for text in map(_encoded, value) if not is_blank(text.decode(errors="replace"))]
        if not texts:
            raise CaptionError(BLANK)
        if len(texts) > MAX_CAPTIONS:
            raise CaptionError(TOO_MANY)
        return texts


def _encoded(value: Any) -> bytes:
    """The bytes of a caption from json; none for a missing value. Raises CaptionError."""
    if value is None or value != value:  # null and NaN
        return b""
    if not isinstance(value, str):
        raise CaptionError(NOT_A_TEXT)
    return value.encode("utf-8", "surrogatepass")  # unpaired surrogates become invalid bytes, as in a text member


def _find(value: Any, field: str) -> Any:
    """A field of parsed json, or what the path `field` leads to. Raises CaptionError."""
    if isinstance(value, dict) and field in value:
        return value[field]
    for part in field.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and len(part) < 10 and int(part) < len(value):
            value = value[int(part)]
        else:
            raise CaptionError(NO_FIELD)
    return value


def is_blank(caption: str) -> bool:
    """Whether a caption has no visible character, or is a missing value written as text, such as "nan"."""
    text = caption.strip().lower()
    if text in _MISSING_VALUES:
        return True
    if text.isprintable():  # faster, and right since the first character is no space
        return not text
    return not any(c.isprintable() and not c.isspace() for c in text)


def recorded_caption(meta: dict[str, Any]) -> str:
    """The caption source in the meta.json of embeddings; earlier versions read .txt members only."""
    return str(meta.get("caption", "txt"))
