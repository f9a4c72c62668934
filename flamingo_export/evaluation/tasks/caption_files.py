"""Caption files of COCO and Flickr30K: COCO's own JSON, Karpathy's split JSON, Flickr30K's token file."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from flamingo_export.evaluation.media_files import image_in
from flamingo_export.evaluation.reading import Faults, line_of, read_json, refuse_duplicates, text_of
from flamingo_export.evaluation.task import Item, Split


class _Sentence(msgspec.Struct):
    raw: str


class _KarpathyImage(msgspec.Struct):
    filename: str
    split: str
    sentences: list[_Sentence]
    filepath: str = ""
    cocoid: int | None = None


class _Karpathy(msgspec.Struct):
    images: list[_KarpathyImage]


class _CocoImage(msgspec.Struct):
    id: int
    file_name: str


class _CocoCaption(msgspec.Struct):
    image_id: int
    caption: str


class _Coco(msgspec.Struct):
    images: list[_CocoImage]
    annotations: list[_CocoCaption]


def caption_item(name: str, medium: Path, captions: tuple[str, ...]) -> Item:
    """An image with its captions; the first of them is what it says as an example."""
    cleaned = tuple(" ".join(caption.split()) for caption in captions)
    return Item(id=name, medium=medium, references=cleaned, answer=next((caption for caption in cleaned if caption), ""))


def read_karpathy(file: Path, split: str, folders: list[Path]) -> Split:
    """Karpathy's splits; `train` includes `restval`, as is usual."""
    wanted = ("train", "restval") if split == "train" else (split,)
    images = read_json(file, _Karpathy, '{"images": [{"filename", "split", "sentences": [{"raw"}]}]}').images
    faults = Faults()
    names = [image.filename for image in images]
    if len(set(names)) < len(names):
        refuse_duplicates(file, names, [line_of(file, "images", index) for index in range(len(names))], faults)
    items = []
    for index, image in enumerate(images):
        if image.split not in wanted:
            continue
        if not image.sentences:
            faults.add(file, line_of(file, "images", index), f"{image.filename} has no captions")
        places = [folder / image.filepath for folder in folders] + folders
        captions = tuple(sentence.raw for sentence in image.sentences)
        items.append(caption_item(str(image.cocoid or image.filename), image_in(places, image.filename), captions))
    if not items:
        held = sorted({image.split for image in images})
        faults.add(file, None, f"no image is of split {split!r}; there are {', '.join(held)}")
    faults.check()
    return Split(items=tuple(items))


def read_coco(file: Path, folders: list[Path]) -> Split:
    """COCO's own caption file."""
    found = read_json(file, _Coco, '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}')
    faults = Faults()
    captions: dict[int, list[str]] = {image.id: [] for image in found.images}
    if len(captions) < len(found.images):
        lines = [line_of(file, "images", index) for index in range(len(found.images))]
        refuse_duplicates(file, [str(image.id) for image in found.images], lines, faults)
    for index, each in enumerate(found.annotations):
        if each.image_id not in captions:
            faults.add(
                file, line_of(file, "annotations", index), f"a caption of image {each.image_id}, which is not among the images"
            )
        else:
            captions[each.image_id].append(each.caption)
    for index, image in enumerate(found.images):
        if not captions[image.id]:
            faults.add(file, line_of(file, "images", index), f"image {image.id} has no captions")
    faults.check()
    return Split(
        items=tuple(
            caption_item(str(image.id), image_in(folders, image.file_name), tuple(captions[image.id])) for image in found.images
        )
    )


_TOKEN_LINE = re.compile(r"(?P<image>[^#\t]+)#(?P<number>\d+)\t(?P<caption>.*)")


def read_tokens(file: Path, wanted: Path, folders: list[Path]) -> Split:
    """Flickr30K's token file, `1000092795.jpg#0<TAB>caption` a line, and a list of the split's images, one name a line (suffix or not)."""
    faults = Faults()
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(text_of(file, "IMAGE.jpg#N, a tab and a caption on each line").split("\n"), start=1):
        if line.strip():
            parsed = _TOKEN_LINE.fullmatch(line.rstrip("\r"))
            if parsed is None:
                faults.add(file, number, "expected IMAGE.jpg#N, a tab and a caption")
            else:
                captions.setdefault(parsed["image"], []).append(parsed["caption"])
    items = []
    seen: set[str] = set()
    for number, line in enumerate(text_of(wanted, "names of the split's images").split("\n"), start=1):
        name = line.strip()
        if not name:
            continue
        name = name if name.endswith(".jpg") else f"{name}.jpg"
        if name in seen:
            faults.add(wanted, number, f"{name} occurs a second time")
        elif name not in captions:
            faults.add(wanted, number, f"{name} has no captions in {file.name}")
        else:
            items.append(caption_item(name.removesuffix(".jpg"), image_in(folders, name), tuple(captions[name])))
        seen.add(name)
    faults.check()
    return Split(items=tuple(items))
