"""Measures the nano checkpoint on held-out images: `python -m flamingo_reference.nano.evaluate [--markdown | --json] [--images FOLDER]`.

Prints what the model card quotes: exact captions, right answers, and few-shot prompts whose format only the shots tell. Greedy decoding,
in PyTorch. An answer is right when it is the expected text to the letter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

from flamingo_reference.model import Flamingo
from flamingo_reference.nano import CHECKPOINT, data, pages
from flamingo_reference.nano.bridge import collate
from flamingo_reference.nano.contrastive import to_pixels
from flamingo_reference.nano.data import Item
from flamingo_reference.nano.pool import Pool
from flamingo_reference.nano.tokenizer import load_tokenizer
from flamingo_reference.time_weights import time_weights

SHOTS = (0, 1, 2, 4, 8, 16, 32)
MAX_NEW_TOKENS = 16


class Rate(msgspec.Struct, frozen=True):
    """right of total, in per cent."""

    right: int
    total: int

    @property
    def percent(self) -> float:
        """Share that is right."""
        return 100 * self.right / self.total


class Results(msgspec.Struct, frozen=True):
    """Everything measured."""

    captions: dict[str, Rate]
    questions: dict[str, Rate]
    few_shot: dict[str, dict[int, Rate]]
    """Style ("all" for their sum) -> number of shots -> rate."""


class Reader:
    """Answers prompts about a fixed list of items with greedy decoding."""

    def __init__(self, model: Flamingo, tokenizer: Tokenizer, items: Sequence[Item]) -> None:
        self.model, self.tokenizer, self.items = model.eval(), tokenizer, items
        self._latents = torch.stack([self._encode(item) for item in items]) if items else torch.zeros(0)

    @torch.no_grad()
    def _encode(self, item: Item) -> torch.Tensor:
        features = self.model.vision_encoder(to_pixels(list(item.frames), self.model.config))[None]
        weights = time_weights(len(item.frames), self.model.config.resampler.num_time_embeddings)
        latents: torch.Tensor = self.model.resampler(features, torch.from_numpy(weights))[0]
        return latents

    def ask(self, prompts: Sequence[Sequence[pages.Piece]], *, batch: int = 32) -> list[str]:
        """What the model says after each prompt; the last piece of a prompt is what is asked, its `said` left out."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            for index, answer in zip(chosen, self._greedy([prompts[index] for index in chosen]), strict=True):
                answers[index] = answer
        return answers

    @torch.no_grad()
    def _greedy(self, prompts: Sequence[Sequence[pages.Piece]]) -> list[str]:
        tokens = self.model.config.tokens
        documents = [self._open(prompt) for prompt in prompts]
        said: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        _, _, _, rows, bank = collate(documents)
        media = self.model.media_kv(self._latents[bank] if bank else torch.zeros(1, *self._latents.shape[1:]))
        for _ in range(MAX_NEW_TOKENS):
            grown = [
                pages.Encoded(
                    np.concatenate([document.token_ids, answer]).astype(np.int64),
                    np.concatenate([document.phi, np.full(len(answer), document.phi[-1])]).astype(np.int64),
                    np.zeros(len(document.token_ids) + len(answer), dtype=bool),
                    document.media,
                )
                for document, answer in zip(documents, said, strict=True)
            ]
            ids, phi, _, _, _ = collate(grown)
            logits = self.model(ids, media, rows, phi)
            for index, document in enumerate(grown):
                scores = logits[index, len(document.token_ids) - 1].clone()
                scores[tokens.image] = -torch.inf
                token = int(scores.argmax())
                if not done[index]:
                    done[index] = token == tokens.eoc
                    said[index] += [] if done[index] else [token]
            if all(done):
                break
        return [self.tokenizer.decode(answer).strip() for answer in said]

    def _open(self, prompt: Sequence[pages.Piece]) -> pages.Encoded:
        asked = msgspec.structs.replace(prompt[-1], said="")
        encoded = pages.encode([*prompt[:-1], asked], self.tokenizer, self.model.config.tokens)
        return pages.Encoded(encoded.token_ids[:-1], encoded.phi[:-1], encoded.loss[:-1], encoded.media)  # without the <EOC>


def rate(answers: Sequence[str], expected: Sequence[str]) -> Rate:
    """How many answers are the expected ones."""
    return Rate(sum(answer == wanted for answer, wanted in zip(answers, expected, strict=True)), len(answers))


def heldout(kind: str, count: int) -> list[Item]:
    """Held-out items: scenes (half of them with two or more objects), digits, videos; the same ones at every call."""
    if kind == "digit":
        return [data.digit(index, split="test") for index in range(count)]
    if kind == "video":
        return [data.video(index, split="test") for index in range(count)]
    several, single, items = 0, 0, []
    for seed in range(100 * count):
        item = data.scene(seed, split="test")
        if item.num_objects > 1 and several < count // 2:
            several += 1
        elif item.num_objects == 1 and single < count - count // 2:
            single += 1
        else:
            continue
        items.append(item)
        if len(items) == count:
            break
    return items


def evaluate(
    model: Flamingo, tokenizer: Tokenizer, *, scenes: int = 1000, digits: int = 449, videos: int = 200, few_shot: int = 40
) -> Results:
    """Runs all measurements."""
    captions, questions = {}, {}
    for kind, count in (("scene", scenes), ("digit", digits), ("video", videos)):
        reader = Reader(model, tokenizer, heldout(kind, count))
        said = reader.ask([[pages.Piece(index, "Output:", "")] for index in range(len(reader.items))])
        captions[kind] = rate(said, [item.caption for item in reader.items])
        if kind == "scene":
            for name, wanted in (("scene, one object", True), ("scene, two or more", False)):
                chosen = [index for index, item in enumerate(reader.items) if (item.num_objects == 1) == wanted]
                captions[name] = rate([said[index] for index in chosen], [reader.items[index].caption for index in chosen])
        asked = [(index, question) for index, item in enumerate(reader.items) for question in _some(item, index)]
        said = reader.ask([[pages.Piece(index, f"Question: {question} Answer:", "")] for index, (question, _) in asked])
        questions[kind] = rate(said, [answer for _, (_, answer) in asked])
    for table in (captions, questions):
        table["images"] = Rate(table["scene"].right + table["digit"].right, table["scene"].total + table["digit"].total)
    return Results(captions, questions, few_shot_rates(model, tokenizer, count=few_shot))


def _some(item: Item, seed: int) -> list[tuple[str, str]]:
    """Up to two of an item's questions."""
    order = np.random.default_rng([7, seed]).permutation(len(item.questions))[:2]
    return [item.questions[int(index)] for index in order]


def few_shot_rates(
    model: Flamingo, tokenizer: Tokenizer, *, count: int, shots: Sequence[int] = SHOTS
) -> dict[str, dict[int, Rate]]:
    """For every format but the plain caption: `count` held-out items, asked with 0 to 32 shots from the training split."""
    support = Pool(scenes=1500, digits=600, videos=0, seed=3)
    queries = [*heldout("scene", 500), *heldout("digit", 200)]
    reader = Reader(model, tokenizer, [*support.items, *queries])
    table: dict[str, dict[int, Rate]] = {}
    for kind in ("scene", "digit"):
        for style in support.styles(kind):
            fits = [
                len(support.items) + index for index, item in enumerate(queries) if item.kind == kind and style in item.formats
            ]
            fits = fits[:count]
            for number in shots:
                rng = np.random.default_rng([11, number])
                draw = support.drawer(kind)
                prompts = []
                for query in fits:
                    examples = pages.prompt_page(support.items, rng, draw, style=style, shots=number)
                    prompts.append([*examples, pages.Piece(query, "Output:", "")])
                said = reader.ask(prompts, batch=16 if number > 8 else 32)
                table.setdefault(style, {})[number] = rate(said, [reader.items[query].formats[style] for query in fits])
    sums = {number: [rates[number] for rates in table.values()] for number in shots}
    table["all"] = {number: Rate(sum(r.right for r in rates), sum(r.total for r in rates)) for number, rates in sums.items()}
    return table


def markdown(results: Results) -> str:
    """The model card's tables."""
    lines = ["| held-out | exact captions | right answers |", "|---|---|---|"]
    for kind in ("images", "scene", "scene, one object", "scene, two or more", "digit", "video"):
        cells = [_cell(table.get(kind)) for table in (results.captions, results.questions)]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    shots = sorted(results.few_shot["all"])
    lines += ["", "| format told by the shots alone | " + " | ".join(f"{number} shots" for number in shots) + " |"]
    lines.append("|---" * (len(shots) + 1) + "|")
    for style, rates in results.few_shot.items():
        lines.append(f"| {style} | " + " | ".join(f"{rates[number].percent:.0f} %" for number in shots) + " |")
    return "\n".join(lines)


def _cell(value: Rate | None) -> str:
    return "" if value is None else f"{value.percent:.1f} % of {value.total}"


def contact_sheet(model: Flamingo, tokenizer: Tokenizer, path: Path) -> None:
    """Writes a picture of held-out images with what the model says of them (red where it is not what was expected)."""
    items = [*heldout("scene", 12), *heldout("digit", 6), *heldout("video", 6)]
    reader = Reader(model, tokenizer, items)
    said = reader.ask([[pages.Piece(index, "Output:", "")] for index in range(len(items))])
    columns, width, height = 6, 190, 172
    sheet = Image.new("RGB", (columns * width, -(-len(items) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (item, answer) in enumerate(zip(items, said, strict=True)):
        x, y = index % columns * width, index // columns * height
        sheet.paste(
            Image.fromarray(item.frames[len(item.frames) // 2]).resize((128, 128), Image.Resampling.NEAREST), (x + 8, y + 8)
        )
        words, line, row = answer.split(), "", 0
        for word in [*words, ""]:
            if not word or len(line) + len(word) > 28:
                draw.text((x + 8, y + 140 + 12 * row), line, fill="black" if answer == item.caption else "red")
                line, row = "", row + 1
            line += f"{word} "
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--markdown", action="store_true", help="print tables (the default)")
    parser.add_argument("--images", type=Path, help="also write a contact sheet into this folder")
    parser.add_argument("--quick", action="store_true", help="a tenth of the items")
    arguments = parser.parse_args()
    model = Flamingo.from_checkpoint(arguments.checkpoint)
    tokenizer = load_tokenizer(arguments.checkpoint / "tokenizer" / "tokenizer.json")
    part = 10 if arguments.quick else 1
    results = evaluate(
        model,
        tokenizer,
        scenes=1000 // part,
        digits=449 // part,
        videos=200 // part,
        few_shot=40 // (4 if arguments.quick else 1),
    )
    text = msgspec.json.encode(results).decode() if arguments.json else markdown(results)
    sys.stdout.write(text + "\n")
    if arguments.images:
        contact_sheet(model, tokenizer, arguments.images / "contact_sheet.png")


if __name__ == "__main__":
    main()
