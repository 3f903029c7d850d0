"""What icon names say: captions, styles, concepts, design systems, and which systems are held out.

A name such as `bell-off-outline` is a stem (`bell-off`) and style words. Names of one design system with equal stems
are one family: the same drawing as outline, filled, in several sizes. The concept is the stem without a trailing
number; many design systems draw the same concept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

# Words that say how an icon is drawn. The second list also has other meanings (traffic-light): it counts in sets that
# declare the word, or that have most of their names with it also without it or in another style.
STYLES = frozenset("outline outlined filled fill solid baseline twotone duotone rounded sharp linear stroke".split())
AMBIGUOUS_STYLES = "line light thin bold regular round flat broken duo color dark"
SIZES = frozenset("8 10 12 14 16 20 24 28 32 48 64 96 16px 20px 24px 32px 48px".split())
_LEAST_SHARE, _LEAST_NAMES = 0.5, 5

# Sets of one design system, and sets drawn from them: they are held out together. Other sets are systems of their own.
SYSTEMS = {
    "boxicons": "boxicons bx bxl bxs",
    "codicons": "codicon msc",
    "coreui": "cib cif cil",
    "cryptocurrency": "cryptocurrency cryptocurrency-color",
    "devicon": "devicon devicon-line devicon-original devicon-plain",
    "elusive": "el",
    "emojione": "emojione emojione-monotone emojione-v1",
    "fluent": "fluent fluent-color fluent-mdl2",
    "fluent-emoji": "fluent-emoji fluent-emoji-flat fluent-emoji-high-contrast",
    "font-awesome": "fa fa-brands fa-regular fa-solid fa5-brands fa5-regular fa5-solid fa6-brands fa6-regular "
    "fa6-solid fa7-brands fa7-regular fa7-solid la",
    "glyphs": "glyphs glyphs-poly",
    "guidance": "guidance streamline-guidance",
    "heroicons": "heroicons heroicons-outline heroicons-solid sidekickicons",
    "icon-park": "icon-park icon-park-outline icon-park-solid icon-park-twotone",
    "ionicons": "ion famicons",
    "lucide": "lucide lucide-lab feather vadivam",
    "material": "material-symbols material-symbols-light ic mdi mdi-light mdi5 mdi6 zmdi",
    "mono-icons": "mi mono-icons",
    "noto": "noto noto-v1",
    "pepicons": "pepicons pepicons-pencil pepicons-pop pepicons-print",
    "phosphor": "ph",
    "remix": "ri",
    "streamline": "streamline streamline-block streamline-color streamline-cyber streamline-cyber-color "
    "streamline-flex streamline-flex-color streamline-freehand streamline-freehand-color streamline-kameleon-color "
    "streamline-logos streamline-pixel streamline-plump streamline-plump-color streamline-sharp "
    "streamline-sharp-color streamline-stickies-color streamline-ultimate streamline-ultimate-color covid",
    "thesvg": "thesvg thesvg-color",
    "token": "token token-branded",
    "unicons": "uil uim uis uit",
}
# Words for one concept, as the sets name it: the first is the name of the class.
SYNONYMS = {
    "filter": "funnel",
    "fire": "flame",
    "home": "house",
    "image": "photo picture",
    "mail": "email envelope",
    "settings": "cog gear",
    "trash": "bin",
    "user": "person",
    "users": "people",
}
_CONCEPT_OF = {word: concept for concept, words in SYNONYMS.items() for word in words.split()}
_SYSTEM_OF = {prefix: system for system, prefixes in SYSTEMS.items() for prefix in prefixes.split()}


def system_of(prefix: str) -> str:
    return _SYSTEM_OF.get(prefix, prefix)


def caption_of(name: str) -> str:
    return " ".join(name.replace("_", "-").split("-")).strip()


def style_words(names: Collection[str], declared: Iterable[str]) -> frozenset[str]:
    """The style words of a set: STYLES, the words of its `declared` suffixes, and ambiguous ones that it uses so."""
    known = {*STYLES, *SIZES, *(word for suffix in declared for word in suffix.split("-"))}
    for word in AMBIGUOUS_STYLES.split():
        bases = [name.removesuffix(f"-{word}") for name in names if name.endswith(f"-{word}")]
        others = ("", *(f"-{style}" for style in {*STYLES, *AMBIGUOUS_STYLES.split()} - {word}))
        styled = sum(any(base + other in names for other in others) for base in bases)
        if len(bases) >= _LEAST_NAMES and styled >= _LEAST_SHARE * len(bases):
            known.add(word)
    return frozenset(known)


def stem_of(name: str, styles: Collection[str], leading: Collection[str] = ()) -> str:
    """The name without style words at its end, and without those of `leading` at its begin; at least one word stays."""
    words = name.replace("_", "-").replace("two-tone", "twotone").split("-")
    while len(words) > 1 and words[-1] in styles:
        words.pop()
    while len(words) > 1 and words[0] in leading:
        del words[0]
    return "-".join(words)


def concept_of(stem: str) -> str:
    """The stem without a trailing number, with spaces between the words; one name for synonyms of one word."""
    words = stem.split("-")
    while len(words) > 1 and words[-1].isdigit():
        words.pop()
    concept = " ".join(words)
    return _CONCEPT_OF.get(concept, concept)
