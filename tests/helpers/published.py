"""Invented files in exactly the layouts that the makers of the benchmarks publish; nothing is copied from a data set.

`write(task, folder)` fills a folder; pictures are tiny, clips are animations, so that a run needs no decoder of video files.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ANSWERS = ("red", "red", "red", "red", "a red one", "red", "crimson", "red", "red", "Red.")


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(path)


def animation(path: Path, seed: int) -> None:
    """A clip of 10 s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (5, 12, 16, 3), dtype=np.uint8)
    frames = [Image.fromarray(frame) for frame in noise]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=2000)


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def rows(path: Path, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)


def _vqa(folder: Path, prefix: str, version: str) -> None:
    for split in ("train", "val"):
        questions, annotations = [], []
        for number in range(4):
            image = 100 + number
            picture(folder / f"{split}2014" / f"COCO_{split}2014_{image:012d}.jpg", image + (split == "val") * 50)
            asked = f"What colour is thing {number}?"
            questions.append({"question_id": image * 10, "image_id": image, "question": asked})
            answers = [
                {"answer": text, "answer_id": at, "answer_confidence": "yes"} for at, text in enumerate(ANSWERS, start=1)
            ]
            annotations.append(
                {
                    "question_id": image * 10, "image_id": image, "question_type": "what colour", "answer_type": "other",
                    "multiple_choice_answer": "red", "answers": answers,
                }
            )  # fmt: skip
        head = {"info": {"year": 2026}, "license": {}, "data_type": "mscoco", "data_subtype": f"{split}2014"}
        dump(
            folder / f"{prefix}OpenEnded_mscoco_{split}2014_questions.json",
            {**head, "task_type": "Open-Ended", "questions": questions},
        )
        dump(folder / f"{version}mscoco_{split}2014_annotations.json", {**head, "annotations": annotations})


def vqav2(folder: Path) -> None:
    _vqa(folder, "v2_", "v2_")


def okvqa(folder: Path) -> None:
    _vqa(folder, "", "")


def textvqa(folder: Path) -> None:
    for split in ("train", "val"):
        data = []
        for number in range(3):
            name = f"{split}{number}abc"
            picture(folder / "train_images" / f"{name}.jpg", number + 10 * (split == "val"))
            data.append(
                {
                    "question": "what does it say?", "image_id": name, "image_classes": ["Sign"], "flickr_original_url": "",
                    "image_width": 16, "image_height": 12, "answers": ["stop"] * 9 + ["halt"], "question_tokens": ["what"],
                    "question_id": 34600 + number, "set_name": split,
                }
            )  # fmt: skip
        dump(
            folder / f"TextVQA_0.5.1_{split}.json",
            {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data},
        )


def vizwiz(folder: Path) -> None:
    for split in ("train", "val"):
        data = []
        for number in range(3):
            name = f"VizWiz_{split}_{number:08d}.jpg"
            picture(folder / split / name, number)
            answers = [{"answer_confidence": "yes", "answer": "soup"}] * 8 + [
                {"answer_confidence": "maybe", "answer": "unanswerable"}
            ] * 2
            data.append(
                {"image": name, "question": "What is this?", "answers": answers, "answer_type": "other", "answerable": 1}
            )
        dump(folder / f"{split}.json", data)


def coco(folder: Path) -> None:
    images = []
    for number, split in enumerate(("train", "restval", "val", "test", "test")):
        name = f"COCO_val2014_{number:012d}.jpg"
        picture(folder / "val2014" / name, number)
        sentences = [
            {"tokens": ["a", "dog"], "raw": f"A dog on beach {number}.", "imgid": number, "sentid": 10 * number},
            {"tokens": ["sand"], "raw": "Sand and a dog", "imgid": number, "sentid": 10 * number + 1},
        ]
        images.append(
            {
                "filepath": "val2014", "sentids": [10 * number], "filename": name, "imgid": number, "split": split, "sentences": sentences,
                "cocoid": 500 + number,
            }
        )  # fmt: skip
    dump(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def coco_own(folder: Path) -> None:
    for split in ("train", "val"):
        images = [
            {"id": 7 + number, "file_name": f"COCO_{split}2014_{7 + number:012d}.jpg", "height": 12, "width": 16}
            for number in range(2)
        ]
        captions = [{"image_id": 7 + at // 2, "id": at, "caption": f"a cat {at}"} for at in range(4)]
        dump(
            folder / "annotations" / f"captions_{split}2014.json",
            {"info": {}, "images": images, "licenses": [], "annotations": captions},
        )
        for image in images:
            picture(folder / f"{split}2014" / str(image["file_name"]), 1)


def flickr30k(folder: Path) -> None:
    names = [f"{1000 + number}.jpg" for number in range(5)]
    lines = []
    for name in names:
        picture(folder / "flickr30k-images" / name, int(name[:4]))
        lines += [f"{name}#{at}\tTwo men , café {name[:4]} number {at} ." for at in range(5)]
    (folder / "results_20130124.token").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "train.txt").write_text("\n".join(name[:-4] for name in names[:3]) + "\n", encoding="utf-8")
    (folder / "test.txt").write_text("\n".join(names[3:]) + "\n", encoding="utf-8")


def youcook2(folder: Path) -> None:
    database = {}
    for number, subset in enumerate(("training", "training", "validation")):
        name = f"xHr8X2Wpm{number}Q"
        animation(folder / "videos" / f"{name}.gif", number)
        segments = [{"segment": [4 * at, 4 * at + 3], "id": at, "sentence": f"grill the tomatoes {at} "} for at in range(2)]
        database[name] = {"duration": 10.0, "subset": subset, "recipe_type": "101", "annotations": segments, "video_url": "x"}
    dump(folder / "youcookii_annotations_trainval.json", {"database": database})


def vatex(folder: Path) -> None:
    for file, first in (("vatex_training_v1.0.json", 0), ("vatex_public_test_english_v1.1.json", 5)):
        data = []
        for number in range(first, first + 2):
            name = f"Ptf_2VRj-V{number}_000122_000132"
            animation(folder / "videos" / f"{name}.gif", number)
            data.append({"videoID": name, "enCap": [f"A man lifts {at}" for at in range(10)], "chCap": ["一个人"]})
        dump(folder / file, data)


def _video_qa(folder: Path, stem: str) -> None:
    for split, first in (("train", 1), ("val", 5), ("test", 8)):
        data = []
        for number in range(first, first + 2):
            animation(folder / "videos" / f"{stem}{number}.gif", number)
            data.append(
                {"answer": "someone", "category_id": 14, "id": number, "question": "who is chopping?", "video_id": number}
            )
        dump(folder / f"{split}_qa.json", data)


def msvdqa(folder: Path) -> None:
    _video_qa(folder, "vid")


def msrvttqa(folder: Path) -> None:
    _video_qa(folder, "video")


def ivqa(folder: Path) -> None:
    header = ("video_id", "start", "end", "question", *(f"answer{at}" for at in range(1, 6)), "conf1")
    for split in ("train", "val", "test"):
        lines = []
        for number in range(3):
            animation(folder / "videos" / f"{split}{number}.gif", number)
            lines.append((f"{split}{number}", 1, 7, "What, then, is used?", "spoon", "spoon", "ladle", "a spoon", "fork", 1))
        rows(folder / f"{split}.csv", header, lines)


def nextqa(folder: Path) -> None:
    for split in ("train", "val", "test"):
        lines = []
        for number, kind in enumerate(("CW", "TN", "DC")):
            name = f"{4010069380 + number}"
            animation(folder / "videos" / f"{name}.gif", number)
            lines.append((name, 369, 640, 480, "how did the baby move", "crawl" if kind != "DC" else "two", 6, kind))
        rows(folder / f"{split}.csv", ("video", "frame_count", "width", "height", "question", "answer", "qid", "type"), lines)
    dump(folder / "add_reference_answer_test.json", {"4010069380": {"6": "crawls forward"}})


def star(folder: Path) -> None:
    for split in ("train", "val"):
        data = []
        for number in range(3):
            animation(folder / "Charades_v1_480" / f"{split[0].upper()}6R9{number}.gif", number)
            choices = [
                {"choice_id": at, "choice": f"The {what}.", "choice_program": []}
                for at, what in enumerate(("book", "bag", "cup", "door"))
            ]
            data.append(
                {
                    "question_id": f"Interaction_T1_{number}", "question": "Which object was tidied up by the person?",
                    "video_id": f"{split[0].upper()}6R9{number}", "start": 1.3, "end": 7.9, "answer": "The bag.", "question_program": [],
                    "choices": choices, "situations": {},
                }
            )  # fmt: skip
        dump(folder / f"STAR_{split}.json", data)


def visdial(folder: Path) -> None:
    answers = [f"answer {number}" for number in range(100)]
    for split in ("train", "val"):
        dialogs, dense = [], []
        for number in range(3):
            picture(folder / f"VisualDialog_{split}2018" / f"VisualDialog_{split}2018_{number:012d}.jpg", number)
            rounds = [{"question": at, "answer": at, "answer_options": list(range(100)), "gt_index": at} for at in range(10)]
            dialogs.append({"image_id": number, "caption": "two people at a table", "dialog": rounds})
            if number < 2:
                dense.append(
                    {
                        "image_id": number,
                        "round_id": 3,
                        "gt_relevance": [1.0 if at == 2 else 0.5 if at == 5 else 0.0 for at in range(100)],
                    }
                )
        questions = [f"is it sunny {number}" for number in range(10)]
        data = {"questions": questions, "answers": answers, "dialogs": dialogs}
        dump(folder / f"visdial_1.0_{split}.json", {"version": "1.0", "split": split, "data": data})
        dump(folder / f"visdial_1.0_{split}_dense_{'annotations' if split == 'val' else 'sample'}.json", dense)


def hateful_memes(folder: Path) -> None:
    for split in ("train", "dev_seen"):
        lines = []
        for number in range(4):
            name = f"img/{number + 100 * (split == 'train'):05d}.png"
            picture(folder / name, number)
            lines.append(json.dumps({"id": number, "img": name, "label": number % 2, "text": f"they're  like {number}"}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def rareact(folder: Path) -> None:
    lines = []
    for number in range(6):
        animation(folder / "videos" / f"v{number // 2}.gif", number)
        verb, noun = ("cut", "laptop") if number % 2 else ("blend", "phone")
        lines.append((number, f"v{number // 2}", 1, 5, 8, verb, noun, (1, 1, 0, 2, 3, 4)[number]))
    rows(folder / "rareact.csv", ("id", "video_id", "start", "end", "class_id", "verb", "noun", "annotation"), lines)


def imagenet(folder: Path) -> None:
    names = {"n01440764": "tench, Tinca tinca", "n02012849": "crane", "n03126707": "crane"}
    (folder / "LOC_synset_mapping.txt").write_text(
        "".join(f"{wnid} {said}\n" for wnid, said in names.items()), encoding="utf-8"
    )
    for split in ("train", "val"):
        for wnid in names:
            for number in range(2):
                picture(folder / split / wnid / f"ILSVRC2012_{split}_{number:08d}.JPEG", number)


def kinetics700(folder: Path) -> None:
    for split in ("train", "val"):
        lines = []
        for number, label in enumerate(("abseiling", "zumba", "abseiling")):
            animation(folder / split / label / f"_0AbC{number}_{number:06d}_{number + 10:06d}.gif", number)
            lines.append((label, f"_0AbC{number}", number, number + 10, split))
        rows(folder / f"{split}.csv", ("label", "youtube_id", "time_start", "time_end", "split"), lines)


def write(task: str, folder: Path) -> Path:
    """The files of a task, in a folder of its name."""
    place = folder / task
    place.mkdir(parents=True)
    globals()[task](place)
    return place
