"""ImageNet classification (Russakovsky et al. 2015, arXiv 1409.0575): folders of images, one a class."""

from __future__ import annotations

from pathlib import Path

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.reading import Faults, first_of, text_of
from flamingo_export.evaluation.task import Item, Split, Task

_SUFFIXES = frozenset({".jpeg", ".jpg", ".png"})


def read(data: Path, split: str) -> Split:
    """Items of `train` or `val`, one folder of images a class. Class names: the first of each line of LOC_synset_mapping.txt."""
    names = class_names(
        first_of(data, ("LOC_synset_mapping.txt",), "the names of the classes, `n01440764 tench, Tinca tinca` a line")
    )
    folder = first_of(data, (split, f"ILSVRC/Data/CLS-LOC/{split}"), f"{split}/, with a folder of images a class")
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    if loose := [path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES]:
        raise EvaluationError(
            f"{folder} holds {len(loose)} images outside of class folders. Sort them into a folder a class first (the usual valprep.sh)."
        )
    if unknown := [path.name for path in found if path.name not in names]:
        raise EvaluationError(f"{folder} has folders of no known class: {', '.join(unknown[:5])}")
    if not found:
        raise EvaluationError(f"{folder} has no folders of images")
    candidates = tuple(names.values())
    items = []
    for each in found:
        own = names[each.name]
        relevance = tuple(float(candidate == own) for candidate in candidates)
        items += [
            Item(
                id=f"{each.name}/{path.name}",
                medium=path,
                references=(own,),
                answer=own,
                candidates=candidates,
                relevance=relevance,
                class_name=own,
            )
            for path in sorted(each.iterdir())
            if path.suffix.lower() in _SUFFIXES
        ]
    return Split(items=tuple(items))


def class_names(file: Path) -> dict[str, str]:
    """Class name by folder name; a name that two classes share (there are two cranes) is followed by its second name."""
    faults = Faults()
    lines: dict[str, list[str]] = {}
    for number, line in enumerate(text_of(file, "`n01440764 tench, Tinca tinca` a line").split("\n"), start=1):
        if not line.strip():
            continue
        folder, _, listed = line.strip().partition(" ")
        given = [name.strip() for name in listed.split(",") if name.strip()]
        if not given:
            faults.add(file, number, "expected a folder's name and the class's names after it")
        elif folder in lines:
            faults.add(file, number, f"{folder} occurs a second time")
        else:
            lines[folder] = given
    faults.check()
    firsts = [given[0] for given in lines.values()]
    names = {
        folder: given[0] if firsts.count(given[0]) == 1 else ", ".join([*given[:2], *([folder] if len(given) == 1 else [])])
        for folder, given in lines.items()
    }
    taken: set[str] = set()
    for folder, name in names.items():
        if name in taken:
            names[folder] = f"{name} ({folder})"
        taken.add(name)
    return names


TASK = Task(
    name="imagenet",
    title="ImageNet",
    form="caption",
    mode="closed",
    metric="choice",
    read=read,
    files="train/CLASS/*.JPEG, val/CLASS/*.JPEG, LOC_synset_mapping.txt",
    source="https://image-net.org/download.php",
)
