#!/usr/bin/env python3
"""Generate the parts of the documentation that come from code or from a demo run.

    tools/docs.py                      rewrite the tables of docs/configuration.md from the models in megacid/config
    tools/docs.py --check              exit 1 when they are stale; change nothing
    tools/docs.py --demo runs/demo     pictures in docs/images/, results in README.md and docs/demo.md
    tools/docs.py --corpus data/icons  facts in docs/corpus/, a picture in docs/images/, tables in docs/corpus.md
    tools/docs.py --study STUDY.json runs/study    results in docs/study/STUDY/, pictures of them and those of
                                       runs/study/figures that docs/study.md shows in docs/images/, tables in
                                       docs/study.md and README.md

--demo reads what tools/demo.sh wrote: summary.json, the figures of the balance stage and the TensorBoard event files of
the students. --corpus reads an output of tools/prepare_icons.py, --study the file and the output directory of a study
of tools/study.py. --demo and --study need matplotlib.
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tools")]

from PIL import Image
from pydantic.fields import FieldInfo

from argtypes import ToolParser, local_path
from corpus_page import TITLES, facts_of, page_part
from figure_kinds.curves import choose_tags, curves_figure, read_curves
from figure_kinds.study import arm_rows, arms_figure
from megacid.config.conditions import Needs
from megacid.config.fields import Section, block_of, is_named
from megacid.config.schema import MegacidConfig
from megacid.errors import UserError, run_tool
from megacid.offline.figure_style import figure_style, save_figure
from megacid.storage.atomic import read_json, write_atomic, write_json_atomic
from megacid.storage.metadata import read_meta
from study_file import TEACHER, StudyFile, load_study
from study_report import METRICS, Finished, load_results, measured, report, test_table

CONFIGURATION = ROOT / "docs" / "configuration.md"
FIGURES = {  # name of a figure of tools/figures.py -> caption
    "fig2a_perceptual": "Perceptual redundancy: a kept picture and the near-copies removed for it",
    "fig2b_semantic": "Semantic redundancy: a kept picture and the removed ones that show the same",
    "fig2c_process": "Balance of one cluster, step by step",
    "fig2d_clusters": "Cluster sizes before and after balance",
}
README_PICTURE = f"![{FIGURES['fig2a_perceptual']}](docs/images/demo-fig2a_perceptual.png)"
CURVES_CAPTION = "Training curves of the students"
MAX_WIDTH = 1000  # pixels of a committed picture
STUDENTS = {
    "student_plain": "plain (contrastive)",
    "student_instance": "instance",
    "student_cluster": "instance + cluster",
    "student_balanced": "instance + cluster, balanced data",
}
README_STUDY = "icons"
README_ARMS = {  # arm of that study -> its name in README.md
    "plain": "plain CLIP",
    "mse": "plain CLIP + feature MSE",
    "instance-cluster": "instance + cluster (CLIP-CID)",
}


# ---- docs/configuration.md ---------------------------------------------------------------------------------------


def _type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type as a reader of a run file would name it, with its range."""
    base, *inner = get_args(annotation) if get_origin(annotation) is Annotated else [annotation]
    limits = [limit for item in (*inner, *metadata) for limit in getattr(item, "metadata", [item])]
    signs = [("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")]
    bounds = [f"{sign} {getattr(limit, name):.15g}" for name, sign in signs for limit in limits if hasattr(limit, name)]
    origin, members = get_origin(base), get_args(base)
    if origin is dict:
        return "block of named blocks"
    if origin in (Union, UnionType):
        text = " or ".join(map(_type, members))
    elif origin is Literal:
        text = ", ".join(f"`{json.dumps(member)}`" for member in members)
    elif origin is tuple and members[-1] is ...:
        text = f"list of {_type(members[0])}"
    elif origin is tuple:
        text = f"list of {len(members)} numbers{_type(members[0]).removeprefix('number')}"
    else:
        text = {str: "string", bool: "true or false", int: "integer", float: "number", NoneType: "null"}[base]
    return ", ".join([text, *bounds])


def _only_with(field: FieldInfo) -> list[str]:
    needs = " and ".join(item.condition for item in field.metadata if isinstance(item, Needs))
    return [f"Only with {needs}."] if needs else []


def configuration_tables(block: type[Section]) -> str:
    """One table of the fields of each section."""
    lines: list[str] = []
    for section, schema in block.model_fields.items():
        lines += [f"### {section}", ""]
        for sentence in _only_with(schema):
            lines += [sentence, ""]
        lines += ["| key | type | default | description |", "|---|---|---|---|"]
        lines += [*_rows(section, schema.annotation), ""]
    return "\n".join(lines)


def _rows(path: str, section: type[Section]) -> Iterator[str]:
    """A row of each field; the fields of named blocks follow theirs."""
    for key, field in section.model_fields.items():
        if field.description is None:
            raise UserError(f"{path}.{key} has no description: add a string below the field")
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        description = " ".join([*field.description.split(), *_only_with(field)]).replace("|", "\\|")
        kind = _type(field.annotation, field.metadata)
        yield f"| `{path}.{key}` | {kind} | {default} | {description} |"
        if is_named(field.annotation):
            yield from _rows(f"{path}.{key}.NAME", block_of(field.annotation))


def between(text: str, name: str, content: str) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- end of NAME -->` replaced by `content`."""
    pattern = re.compile(rf"(<!-- {re.escape(name)}[^>]*-->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise UserError(f"expected one pair of markers <!-- {name} --> and <!-- end of {name} -->: restore them")
    return pattern.sub(lambda match: f"{match[1]}\n{content.strip()}\n\n{match[2]}", text)


def configuration_page(page: str, block: type[Section] = MegacidConfig) -> str:
    return between(page, "generated by tools/docs.py", configuration_tables(block))


# ---- --demo ------------------------------------------------------------------------------------------------------


def demo_table(summary: dict[str, Any]) -> str:
    """Accuracies and how they were measured, from summary.json of a demo run."""
    from summary import RUNS

    rows = ["| model | zero-shot top-1 | linear probe top-1 |", "|---|---:|---:|"]
    for name, run in summary["runs"].items():
        rows.append(f"| {RUNS[name]} | {100 * run['zero_shot_top1']:.1f} % | {100 * run['linear_probe_top1']:.1f} % |")
    teacher, student = summary["runs"]["teacher"], summary["runs"]["student_cluster"]
    minutes = sum(summary["seconds_per_stage"].values()) / 60
    balance = summary["balance"]
    rows += [
        "",
        f"{summary['date']}, CPU, {summary['machine']['cores']} cores, torch {summary['versions']['torch']}, deepspeed "
        f"{summary['versions']['deepspeed']}: {student['ranks']} ranks, ZeRO-{student['zero_stage']}, seed "
        f"{student['seed']}, {student['steps']} steps per student ({teacher['steps']} for the teacher); "
        f"{minutes:.1f} minutes in all. Balance removed {100 * balance['share_removed']:.1f} % of the pairs.",
    ]
    return "\n".join(rows)


def demo_pictures() -> str:
    """The pictures of docs/demo.md."""
    captions = {**FIGURES, "curves": CURVES_CAPTION}
    return "\n\n".join(f"**{text}**\n\n![{text}](images/demo-{name}.png)" for name, text in captions.items())


def _shrink(source: Path, target: Path) -> None:
    """A smaller copy in 256 colours."""
    with Image.open(source) as picture:
        small = picture.convert("RGB")
        small.thumbnail((MAX_WIDTH, 10 * MAX_WIDTH))
        target.parent.mkdir(parents=True, exist_ok=True)
        small.quantize(256).save(target, optimize=True)


def draw_curves(demo: Path, target: Path) -> None:
    """The training curves of the students, as one picture."""
    runs = {label: read_curves(demo / name) for name, label in STUDENTS.items()}
    with figure_style(), tempfile.TemporaryDirectory() as folder:
        picture, *_ = save_figure(curves_figure(runs, choose_tags(runs, None)), Path(folder) / "curves")
        _shrink(picture, target)


def from_demo(demo: Path, root: Path) -> list[Path]:
    """Write the pictures, the table of README.md and the results of docs/demo.md below `root`; returns the files."""
    path = demo / "summary.json"
    if not path.is_file():
        raise UserError(f"{path} is missing, so the demo did not finish: run tools/demo.sh, then this command again")
    summary = json.loads(path.read_text())
    images = root / "docs" / "images"
    written = []
    for name in FIGURES:
        source = demo / "figures" / f"{name}.png"
        if not source.is_file():
            raise UserError(f"{source} is missing: run tools/figures.py --demo {demo} --out {demo / 'figures'}")
        _shrink(source, images / f"demo-{name}.png")
        written.append(images / f"demo-{name}.png")
    draw_curves(demo, images / "demo-curves.png")
    pages = {
        root / "README.md": ("demo table", f"{demo_table(summary)}\n\n{README_PICTURE}"),
        root / "docs" / "demo.md": ("demo results", f"{demo_table(summary)}\n\n{demo_pictures()}"),
    }
    for page, (marker, content) in pages.items():
        write_atomic(page, between(page.read_text(), marker, content).encode())
    return [*written, images / "demo-curves.png", *pages]


# ---- --corpus ----------------------------------------------------------------------------------------------------


def corpus_page(page: str, facts: Path) -> str:
    """docs/corpus.md with its tables made from the JSON files in `facts`."""
    files = [facts / f"{kind}.json" for kind in TITLES]
    corpora = [json.loads(path.read_text()) for path in files if path.is_file()]
    return between(page, "corpus tables", page_part(corpora))


def from_corpus(corpus: Path, root: Path) -> list[Path]:
    """Copy the facts and the examples of a corpus, and rewrite the tables of docs/corpus.md; returns the files."""
    meta = read_meta(corpus, "prepare_icons")
    summary = json.loads((corpus / "summary.json").read_text())
    kind = summary["package"]["kind"]
    picture, page = root / "docs" / "images" / f"corpus-{kind}.png", root / "docs" / "corpus.md"
    facts = root / "docs" / "corpus" / f"{kind}.json"
    write_json_atomic(facts, facts_of(summary, meta, read_json(facts)))
    write_atomic(picture, (corpus / "examples.png").read_bytes())
    write_atomic(page, corpus_page(page.read_text(), facts.parent).encode())
    return [facts, picture, page]


# ---- --study -----------------------------------------------------------------------------------------------------


def study_parts(page: str, study: str) -> dict[str, list[str]]:
    """The parts of docs/study.md with tables of a study: name -> groups of arms; none stands for all."""
    markers = re.findall(rf"<!-- ({re.escape(study)}(?: [\w-]+)*) tables:", page)
    return {name: name.split()[1:] for name in markers or [study]}


def study_page(page: str, file: StudyFile, results: Path) -> str:
    """docs/study.md with the tables of a study made from the JSON files in `results`."""
    loaded = load_results(results)
    for name, groups in study_parts(page, file.path.stem).items():
        page = between(page, f"{name} tables", report(loaded, file, file.named(groups)))
    return page


def study_summary(readme: str, file: StudyFile, results: Path) -> str:
    """README.md with its table of the study, which is of one study alone."""
    if file.path.stem != README_STUDY:
        return readme
    return between(readme, "study table", test_table(load_results(results), file, README_ARMS))


def draw_study(finished: Finished, groups: list[str], target: Path) -> None:
    """The arms of these groups as one picture: on the test sets, or on the validation sets if only those are known."""
    arms = finished.file.named(groups)
    part = "test" if measured(finished, arms, "test") else "validation"
    rows = arm_rows(finished, (TEACHER, *finished.with_compared(arms)), part, list(METRICS))
    with figure_style(), tempfile.TemporaryDirectory() as folder:
        picture, *_ = save_figure(arms_figure(rows), Path(folder) / "arms")
        _shrink(picture, target)


def from_study(file: StudyFile, out: Path, root: Path) -> list[Path]:
    """Copy the results of a study and the figures that docs/study.md shows, draw the arms, rewrite the tables in
    docs/study.md and README.md; returns the files."""
    results, copies = out / "results", root / "docs" / "study" / file.path.stem
    page, readme = root / "docs" / "study.md", root / "README.md"
    if not page.is_file():
        raise UserError(f"{page} is missing, expected the page with the markers of the tables: restore it")
    texts = {
        page: study_page(page.read_text(), file, results),
        readme: study_summary(readme.read_text(), file, results),
    }
    written = [copies / path.name for path in sorted(results.glob("*.json"))]
    for path in written:
        write_atomic(path, (results / path.name).read_bytes())
    for path, text in texts.items():
        write_atomic(path, text.encode())
    images = root / "docs" / "images"
    pictures, finished = [], Finished(load_results(results), file)
    for name, groups in study_parts(texts[page], file.path.stem).items():
        pictures.append(images / f"study-{name.replace(' ', '-')}.png")
        draw_study(finished, groups, pictures[-1])
    for path in sorted((out / "figures").glob("*.png")):
        picture = images / f"study-{file.path.stem}-{path.name}"
        if f"(images/{picture.name})" in texts[page]:
            pictures.append(picture)
            _shrink(path, picture)
    return [*written, *texts, *pictures]


def main(argv: list[str] | None = None) -> int:
    parser = ToolParser(description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="exit 1 when docs/configuration.md is stale")
    what.add_argument("--demo", type=local_path, help="output directory of tools/demo.sh")
    what.add_argument("--corpus", type=local_path, help="output directory of tools/prepare_icons.py")
    what.add_argument(
        "--study", type=local_path, nargs=2, metavar=("STUDY.json", "OUT"), help="file and output directory of a study"
    )
    args = parser.parse_args(argv)
    written: list[Path] | None = None
    if args.demo is not None:
        written = from_demo(args.demo, ROOT)
    elif args.corpus is not None:
        written = from_corpus(args.corpus, ROOT)
    elif args.study is not None:
        written = from_study(load_study(args.study[0]), args.study[1], ROOT)
    if written is not None:
        for path in written:
            print(f"{path.relative_to(ROOT)}  {path.stat().st_size:,} bytes")
        return 0
    page = CONFIGURATION.read_text()
    fresh = configuration_page(page)
    if args.check:
        if page != fresh:
            print("docs/configuration.md is stale: run python tools/docs.py", file=sys.stderr)
        return int(page != fresh)
    write_atomic(CONFIGURATION, fresh.encode())
    print(f"{CONFIGURATION.relative_to(ROOT)}: {len(MegacidConfig.model_fields)} sections")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
