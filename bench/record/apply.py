"""Puts a record in its places in this checkout: page, pictures and results, the tuned table, and README's picture."""

import json
import re
import shutil
from pathlib import Path

from bench import records
from bench.record.page import PAGE, PICTURES
from bench.record.run import RECORD
from triton_rmsnorm.runtime import table

README = records.ROOT / "README.md"
MARK = "<!--bench.record-->"


def apply(out: Path) -> list[Path]:
    """Copies what a record holds, and returns where to. Results keep their own names, by which the notebook and bench.plot find them."""
    record = json.loads((out / RECORD).read_text())
    if record["rehearsal"]:
        raise ValueError(f"{out} holds a rehearsal, which is not a result")
    path = records.path("record", record["metadata"])
    written = []
    text = (out / PAGE).read_text()
    for name, *_ in PICTURES:
        if (out / name).exists():
            picture = path.with_name(f"{path.stem}-{name}")
            shutil.copyfile(out / name, picture)
            text = text.replace(f"]({name})", f"]({picture.name})")
            written.append(picture)
    page = path.with_suffix(".md")
    page.write_text(text)
    records.write(path, record | {"files": sorted(record["files"])})
    written += [page, path]
    for name, content in record["files"].items():
        tuned = name.startswith("tuned/")
        target = (table.SHIPPED if tuned else records.RESULTS) / Path(name).name
        target.parent.mkdir(exist_ok=True)
        if tuned:
            target.write_text(json.dumps(content, indent=1) + "\n")
        else:
            records.write(target, content, lines="rows" if "rows" in content else None)
        written.append(target)
    if (picture := path.with_name(f"{path.stem}-speed.png")).exists():
        _show(picture, page)
        written.append(README)
    for each in written:
        print(each)
    return written


def _show(picture: Path, page: Path) -> None:
    """README's picture, which leads to the page, below its mark and in place of the one before. Its title has the GPU and the versions."""
    text = README.read_text()
    if MARK not in text:
        raise ValueError(f"README.md must contain {MARK!r}")
    where, link = (each.relative_to(records.ROOT).as_posix() for each in (picture, page))
    before = re.escape(MARK) + r"\n(\[!\[.*\n\n)?"
    README.write_text(re.sub(before, lambda _: f"{MARK}\n[![Speed]({where})]({link})\n\n", text, count=1))
